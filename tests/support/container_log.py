"""What a container's log says besides what is expected of it: lines at the level of a warning or worse."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Colours and cursor movements, and the time that `docker logs --timestamps` puts first.
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07")
TIMESTAMP = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z ")
# Levels as loggers write them (`WARNING`, `[ERROR]`, `level=error`), as the core of torch and NCCL does (`[W1124
# 03:43:11`, `E1124 03:43:11`), and as programs do that have no logger: `warning: …`, `UserWarning: …`.
TROUBLE = re.compile(
    r"""\b(?:WARN|WARNING|ERROR|CRITICAL|FATAL|SEVERE|PANIC)\b
    | \blevel"?[=:]\s*"?(?:warn|warning|error|fatal|panic|critical)\b
    | ^\[?[WEF]\d{4}\s+\d\d:\d\d:\d\d
    | ^(?:[\w./-]+:\s*)*(?i:warning|(?:fatal\ )?error|fatal|panic)(?:\[\w+\])?:
    | (?<![\w.:])[A-Za-z_][\w.]*(?:Warning|Error|Exception)\b(?::|$)
    | ^Traceback\ \(most\ recent\ call\ last\)
    | (?:Segmentation\ fault|core\ dumped|^Killed$)""",
    re.VERBOSE,
)


def problems(log: str, allowed: Sequence[re.Pattern[str]] = ()) -> list[str]:
    """The lines of `log` that report trouble and that no pattern of `allowed` is found in, without colours."""
    lines = (TIMESTAMP.sub("", CONTROL.sub("", line)).strip() for line in re.split(r"[\r\n]+", log))
    return [line for line in lines if TROUBLE.search(line) and not any(pattern.search(line) for pattern in allowed)]
