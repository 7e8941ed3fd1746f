"""What the RECORD of an installed distribution states of its files."""

from __future__ import annotations

import base64
import csv
import hashlib
from pathlib import Path


def unrecorded(tree: Path, distribution: str) -> list[str]:
    """The files of an installed distribution that are not what its RECORD states (PEP 376, PEP 427)."""
    (record,) = tree.glob(f"{distribution}-*.dist-info/RECORD")
    with open(record, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if row and row[1]]
    return [path for path, *stated in rows if not (tree / path).is_file() or entry(tree / path) != stated[:2]]


def entry(path: Path) -> list[str]:
    content = path.read_bytes()
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return [f"sha256={digest}", str(len(content))]
