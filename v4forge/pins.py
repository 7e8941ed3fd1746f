"""versions.env, the one hand-edited place for versions, revisions and digests."""

from __future__ import annotations

import re
from functools import lru_cache

from v4forge import checkout
from v4forge.errors import UserError

FILE = checkout.file("versions.env")
_LINE = re.compile(r"([A-Z][A-Z0-9_]*)=(\S*)")


def parse(text: str, name: str) -> dict[str, str]:
    """KEY=VALUE lines; blank lines and lines starting with # are skipped. Raises UserError naming the line."""
    values: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise UserError(f"{name}:{number} is not KEY=VALUE: {line!r}", f"correct line {number} of {name}")
        key, value = match.groups()
        if key in values:
            raise UserError(f"{name}:{number} sets {key} a second time", f"keep one line for {key} in {name}")
        values[key] = value
    return values


@lru_cache(maxsize=1)
def read() -> dict[str, str]:
    """The pins by key; a pin that is not known yet has the value ''."""
    return parse(FILE.read_text(encoding="utf-8"), FILE.name)
