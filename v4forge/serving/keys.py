"""The API keys of a deployment: lines `name:key` or `name:key:requests a minute`, or one key alone.

The replicas read the file themselves, again and again (patches/vllm/plugin/v4forge_vllm/keys.py); here it is looked at
before they do, so that none with a fault in it is served.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field

from v4forge.errors import UserError
from v4forge.serving import secret_files

LINE = re.compile(r"(?:(?P<name>[A-Za-z0-9][\w.-]*):)?(?P<key>[!-9;-~]+)(?::(?P<limit>[1-9]\d*))?", re.ASCII)
ALONE = "default"
HINT = "a line a key, name:key or name:key:<requests a minute>: make serve API_KEY_FILE=<file>"


@dataclass(frozen=True)
class Key:
    """Whose key it is, and the requests a minute that it is good for, 0 for any number."""

    name: str
    key: str = field(repr=False)
    limit: int = 0


def parse(text: str, where: str) -> list[Key]:
    """The keys of a file. Raises UserError for another line, by its number, and where there is none."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not (stripped := line.strip()) or stripped.startswith("#"):
            continue
        match = LINE.fullmatch(stripped)
        if match is None:
            raise UserError(f"line {number} of {where} is no key", HINT)
        found.append(Key(match["name"] or ALONE, match["key"], int(match["limit"] or 0)))
    if not found:
        raise UserError(f"there is no key in {where}", HINT)
    return found


def read(file: str) -> str:
    """The keys in a file, or in the variable API_KEY, which no program that we start shall have, as text; "" for none.
    Raises UserError for what is no file of keys."""
    text, where = os.environ.pop("API_KEY", "").strip(), "the variable API_KEY"
    if file:
        text, where = secret_files.read(file, "the API key", HINT).strip(), file
    if text or file:
        parse(text, where)
    return text


def own(text: str) -> str:
    """The key that we ask with ourselves: the first without a limit, else the first; "" where there is none."""
    if not text.strip():
        return ""
    found = parse(text, "the file of keys")
    return next((key.key for key in found if not key.limit), found[0].key)
