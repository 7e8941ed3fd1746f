"""How two images differ: in their configs, in the files of their layers, and in the first line of a small text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import zip_longest
from typing import Any

from v4forge.images.archive import Entry, Layer, Saved, entries, members, shortened, step_of, unpacked

TEXT_BYTES = 64 << 10  # a changed file up to this size is read again for its first differing line


def differences(a: Saved, b: Saved, limit: int = 40) -> list[str]:
    """Lines that say how two images differ, at most `limit` of them about files; [] for equal ones."""
    if a.id == b.id:
        return []
    lines = [f"config {line}" for line in config_differences(a.config, b.config)]
    for where, layers in (("first", a.layers[len(b.layers) :]), ("second", b.layers[len(a.layers) :])):
        lines += [f"a layer only in the {where}: {step_of(layer.created_by)}" for layer in layers]
    pairs = [
        (index, one, other)
        for index, (one, other) in enumerate(zip(a.layers, b.layers, strict=False))
        if one.diff_id != other.diff_id
    ]
    changed = {index: changed_files(one, other) for index, one, other in pairs}
    texts = [texts_of(saved, changed, limit) for saved in (a, b)]
    for index, one, other in pairs:
        lines.append(f"layer {index} ({step_of(one.created_by, 60)}): {summary(one, other, changed[index])}")
        for path in changed[index]:
            if limit == 0:
                break
            limit -= 1
            detail = file_difference(one.files.get(path), other.files.get(path))
            line = first_difference(*(text.get((index, path)) for text in texts))
            lines.append("  " + "; ".join(filter(None, (f"{path}: {detail}", line))))
    hidden = sum(map(len, changed.values())) - sum(line.startswith("  /") for line in lines)
    return [*lines, f"and {hidden} more files"] if hidden else lines


def config_differences(a: Any, b: Any, where: str = "") -> list[str]:
    """One line for each value of a config that differs, without the layers' digests."""
    if isinstance(a, dict) and isinstance(b, dict):
        pairs = [(f"{where}.{key}".lstrip("."), a.get(key), b.get(key)) for key in sorted({*a, *b})]
    elif isinstance(a, list) and isinstance(b, list):
        pairs = [(f"{where}[{index}]", one, other) for index, (one, other) in enumerate(zip_longest(a, b))]
    else:
        return [] if a == b else [f"{where}: {shortened(repr(a))} and {shortened(repr(b))}"]
    return [line for key, one, other in pairs if key != "rootfs" for line in config_differences(one, other, key)]


def changed_files(a: Layer, b: Layer) -> list[str]:
    return [path for path in sorted({*a.files, *b.files}) if a.files.get(path) != b.files.get(path)]


def summary(a: Layer, b: Layer, changed: Sequence[str]) -> str:
    """What differs between two layers whose bytes differ, in one line."""
    if changed:
        added = sum(path not in a.files for path in changed)
        removed = sum(path not in b.files for path in changed)
        return f"{added} files added, {removed} removed, {len(changed) - added - removed} changed"
    for one, other in zip(a.files, b.files, strict=True):
        if one != other:
            return f"the same files in another order, first {one} and {other}"
    return "the same files in the same order; the archives' headers or padding differ"


def file_difference(a: Entry | None, b: Entry | None) -> str:
    if a is None or b is None:
        return "added" if a is None else "removed"
    parts = []
    for column in fields(Entry):
        one, other = getattr(a, column.name), getattr(b, column.name)
        if one != other:
            as_text = oct if column.name == "mode" else str
            parts.append(f"{column.name} {shortened(as_text(one), 40)} and {shortened(as_text(other), 40)}")
    return ", ".join(parts)


def texts_of(saved: Saved, changed: Mapping[int, Sequence[str]], limit: int) -> dict[tuple[int, str], str]:
    """The text of the first `limit` changed files of each layer, those that are small and text."""
    wanted: dict[str, dict[str, int]] = {}
    for index, paths in changed.items():
        layer = saved.layers[index]
        small = {
            path: index
            for path in paths[:limit]
            if (file := layer.files.get(path)) and file.type == "file" and file.size <= TEXT_BYTES
        }
        if small:
            wanted[layer.member] = small
    if not wanted:
        return {}
    texts = {}
    for name, _, stream in members(saved.open()):
        if stream is None or name not in wanted:
            continue
        for path, _, content in entries(unpacked(name, stream.peek(512)[:512], stream)):
            if path in wanted[name] and content is not None:
                try:
                    texts[wanted[name][path], path] = content.read().decode("utf-8")
                except UnicodeDecodeError:
                    continue
    return texts


def first_difference(a: str | None, b: str | None) -> str:
    """The first line that differs between two texts; "" when it cannot be said."""
    if a is None or b is None:
        return ""
    for number, (one, other) in enumerate(zip_longest(a.splitlines(), b.splitlines()), start=1):
        if one != other:
            return f"line {number}: {shortened(repr(one))} and {shortened(repr(other))}"
    return ""
