"""Loaded before the tests' modules, and so before torch: v4forge says how torch's threads wait."""

import signal

import v4forge  # noqa: F401

# A shell's background job ignores Ctrl-C, and so would the programs that tests start and stop with it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
