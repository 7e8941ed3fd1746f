"""A data set of the hub as a corpus: which one, by a commit, and which of its rows and columns."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from v4forge import pins
from v4forge.errors import UserError
from v4forge.model.corpus_rows import FORMS, document_of

PREFIX = "hub:"
FORM = f"{PREFIX}<owner>/<name>@<commit>,split=<split>,column=<column>"


@dataclass(frozen=True)
class DataSet:
    """Where rows come from. column: the one that holds a text or a conversation, "" for a row that says it by names.
    config: which of several tables the data set has."""

    repo: str
    revision: str
    split: str
    column: str = ""
    config: str = ""

    def __str__(self) -> str:
        config, column = f", {self.config}" if self.config else "", f", {self.column}" if self.column else ""
        return f"{self.repo}@{self.revision} ({self.split}{config}{column})"

    @property
    def origin(self) -> dict[str, str]:
        """What a manifest keeps of it."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name))}

    @property
    def argument(self) -> str:
        """What `parsed` reads it from."""
        named = {"split": self.split, "column": self.column, "config": self.config}
        return ",".join([f"{PREFIX}{self.repo}@{self.revision}", *(f"{k}={v}" for k, v in named.items() if v)])


def pinned() -> DataSet:
    """The data set that is calibrated on where nothing is named, as versions.env has it."""
    return DataSet(*(pins.read()[f"CORPUS_{name}"] for name in ("REPO", "REVISION", "SPLIT")))


def parsed(text: str) -> DataSet:
    """The data set that a --corpus of FORM names. Raises UserError."""
    whole, *rest = text.removeprefix(PREFIX).split(",")
    named = re.fullmatch(r"([\w.-]+(?:/[\w.-]+)?)@(\S+)", whole)
    pairs = [part.partition("=")[::2] for part in rest]
    given = dict(pairs)
    if not named or len(given) < len(pairs) or not all(given.values()) or given.keys() - {"split", "column", "config"}:
        raise UserError(f"{text} names no data set", f"write {FORM}")
    if not re.fullmatch(r"[0-9a-f]{40}", named[2]):
        page = f"https://huggingface.co/datasets/{named[1]}/commits/main"
        raise UserError(f"the revision {named[2]} of {named[1]} is not a commit", f"take its 40 hex digits from {page}")
    if "split" not in given:
        raise UserError(f"{text} names no split", f"write {FORM}")
    return DataSet(named[1], named[2], **given)


def named(text: str) -> Path | DataSet:
    """What --corpus names: a file, or a data set in the form of FORM. Raises UserError."""
    return parsed(text) if text.startswith(PREFIX) else Path(text)


def rows(source: DataSet, bad_text: str) -> tuple[int, Callable[[int], str]]:
    """How many documents there are, and the one at an index, which raises UserError with the row's number.

    Raises UserError when the data set cannot be loaded, or lacks the column.
    """
    try:
        import datasets

        from v4forge import http_clients

        http_clients.serve_hub()
        named = (source.config,) if source.config else ()
        table = datasets.load_dataset(source.repo, *named, revision=source.revision, split=source.split)
    except UserError:
        raise
    except Exception as error:  # no package, no network, no such revision: many libraries' errors, one remedy
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"the data set {source} cannot be loaded: {reason}",
            "pass --corpus FILE (.jsonl or .txt) to calibrate on a local file",
        ) from error
    columns = getattr(table, "column_names", None)
    if source.column and columns is not None and source.column not in columns:
        raise UserError(f"the data set {source} has no such column", f"use one of {', '.join(columns)}")

    def document(index: int) -> str:
        try:
            return document_of(_row(table[index], source.column), bad_text)
        except UserError as error:
            raise UserError(f"{source}, row {index}: {error.fact}", error.hint) from error

    return len(table), document


def _row(row: dict[str, Any], column: str) -> dict[str, Any]:
    """The row with its column under the name of its form: a list is a conversation, anything else a text."""
    if not column:
        return row
    value = row.get(column)
    form = column if column in FORMS else "conversations" if isinstance(value, list) else "text"
    return {form: value, "tools": row.get("tools") if isinstance(value, list) else None}
