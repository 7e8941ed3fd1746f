"""Sets pins, resolves every lock again and says what changed (`make lock`, `make image-lock SET="KEY=VALUE …"`).

Each docker/requirements-<name>.in becomes the hash lock of that name, for Python 3.11 and 3.12 (images/locks.py has
the table). A hash in versions.env that belongs to a wheel follows the wheel's version, read from its package index. All
files are written at the end or, when anything fails, none. Needs the package index.

Standard library only: it runs before the environment exists.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from v4forge import pins
from v4forge.checkout import ROOT
from v4forge.errors import Parser, UserError, run_main
from v4forge.images import lock_update, locks
from v4forge.images.locks import Lock


def versions(lock: Lock) -> dict[str, tuple[str, str]]:
    """Package -> its versions, and all that the lock says of it, as `changes` takes them."""
    lines: dict[str, list[str]] = {}
    for line in sorted(lock):
        lines.setdefault(locks.package_of(line), []).append(line)
    return {
        name: (", ".join(map(locks.version_of, found)), "\n".join(f"{line} {sorted(lock[line])}" for line in found))
        for name, found in lines.items()
    }


def changes(old: Mapping[str, tuple[str, str]], new: Mapping[str, tuple[str, str]]) -> list[str]:
    """Lines `name  old -> new` for what differs; a value is (what is shown, what is compared besides)."""
    none = ("none", "")
    rows = []
    for name in sorted(old.keys() | new.keys()):
        (was, was_more), (now, now_more) = old.get(name, none), new.get(name, none)
        if was != now:
            rows.append((name, was, now))
        elif was_more != now_more:
            rows.append((name, was, "the same, other hashes or markers"))
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    return [f"  {name:<{widths[0]}}  {was:<{widths[1]}} -> {now}" for name, was, now in rows]


def shown(values: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Pins as `changes` takes them: of a long hash its beginning and end."""
    return {key: (re.sub(r"(?<=[0-9a-f]{8})[0-9a-f]{24,}(?=[0-9a-f]{4})", "…", v), v) for key, v in values.items()}


def main() -> None:
    parser = Parser(prog="python -m dev.lock", description=__doc__)
    parser.add_argument("pins", nargs="*", metavar="KEY=VALUE", help="a pin of versions.env to set first")
    given = parser.parse_args().pins
    if wrong := [pin for pin in given if not re.fullmatch(r"[A-Z][A-Z0-9_]*=\S+", pin)]:
        raise UserError(f"{wrong[0]!r} is not KEY=VALUE", 'make image-lock SET="RUFF_VERSION=…"')
    given = dict(pin.split("=", 1) for pin in given)
    before = pins.FILE.read_text(encoding="utf-8")
    paths = [locks.lock_file(name) for source in locks.SOURCES for name in source.locks]
    old = {path: locks.parse((ROOT / path).read_text("utf-8")) if (ROOT / path).exists() else {} for path in paths}

    after = lock_update.with_pins(before, given, old)
    values = pins.parse(after, pins.FILE.name)
    texts = lock_update.resolve(values, lambda line: print(line, flush=True))
    lock_update.write_all({pins.FILE.name: after, **texts} if after != before else texts)

    rows = changes(shown(pins.parse(before, pins.FILE.name)), shown(values))
    print("\n".join([f"{pins.FILE.name}{':' if rows else ', nothing changed'}", *rows]))
    for path, text in texts.items():
        lock = locks.parse(text)
        rows = changes(versions(old[path]), versions(lock))
        print("\n".join([f"{path}, {len(lock)} packages{':' if rows else ', nothing changed'}", *rows]))


if __name__ == "__main__":
    run_main(main)
