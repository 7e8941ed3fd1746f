"""Loaded before the tests' modules, and so before torch: v4forge says how torch's threads wait."""

import v4forge  # noqa: F401
