"""The keys that requests may carry: a file of lines `name:key` or `name:key:requests a minute`, or of one key alone.

The file is looked at again once a second and read again when it is another; so keys come and go without a restart,
also where it is replaced, or is a link, as in a volume of Kubernetes. Where it cannot be read nobody gets in.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

# As in v4forge/serving/keys.py, which refuses a file with any other line before it is served.
LINE = re.compile(r"(?:(?P<name>[A-Za-z0-9][\w.-]*):)?(?P<key>[!-9;-~]+)(?::(?P<limit>[1-9]\d*))?", re.ASCII)
ALONE = "default"
LOOK_S = 1.0
LOGGER = logging.getLogger("vllm.v4forge")


@dataclass(frozen=True)
class Key:
    """Whose key it is, its sha256, and the requests a minute that it is good for, 0 for any number."""

    name: str
    digest: bytes
    limit: int = 0


class UnreadableError(Exception):
    """There is no file of keys, or none in it."""


class Keys:
    """The keys of a file, as it is now, but for a second."""

    def __init__(self, file: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.file = file
        self.clock = clock
        self.look_at = clock()
        self.seen: tuple[int, ...] = ()
        self.found: tuple[Key, ...] = ()

    def owner(self, given: bytes) -> Key | None:
        """The key that `given` is, None for no key of the file. Raises UnreadableError."""
        if self.clock() >= self.look_at:
            self.look_at = self.clock() + LOOK_S
            self._look()
        if not self.found:
            raise UnreadableError
        digest = hashlib.sha256(given).digest()
        owners = [key for key in self.found if hmac.compare_digest(key.digest, digest)]
        return owners[0] if owners else None

    def _look(self) -> None:
        try:
            is_now = os.stat(self.file)
            seen = (is_now.st_ino, is_now.st_mtime_ns, is_now.st_ctime_ns, is_now.st_size)
            if seen != self.seen:
                with open(self.file, encoding="utf-8") as file:
                    self.found = parse(file.read())
                self.seen = seen
                LOGGER.info("v4forge: %d keys are good", len(self.found))
        except (OSError, UnicodeDecodeError) as error:
            if self.found or not self.seen:
                LOGGER.error("v4forge: nobody gets in: the file of keys cannot be read: %s", type(error).__name__)
            self.seen, self.found = (-1,), ()


def parse(text: str) -> tuple[Key, ...]:
    """The keys in a file's lines. One that is no key is told by its number, and good for nothing."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not (stripped := line.strip()) or stripped.startswith("#"):
            continue
        if match := LINE.fullmatch(stripped):
            digest = hashlib.sha256(match["key"].encode()).digest()
            found.append(Key(match["name"] or ALONE, digest, int(match["limit"] or 0)))
        else:
            LOGGER.error("v4forge: line %d of the file of keys is not name:key and is left out", number)
    return tuple(found)
