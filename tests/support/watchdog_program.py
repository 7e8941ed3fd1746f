"""docker/serve/watchdog.py as a module: it is a program beside others, in no package."""

from __future__ import annotations

import importlib.util
import sys

from v4forge.serving.supervisord import REPLICA

spec = importlib.util.spec_from_file_location("watchdog", REPLICA.with_name("watchdog.py"))
assert spec is not None and spec.loader is not None
watchdog = sys.modules["watchdog"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(watchdog)
