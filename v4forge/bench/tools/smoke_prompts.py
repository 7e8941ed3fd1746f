"""The chat smoke: one prompt, one answer, checks with a definite outcome; from v4forge/bench/data/smoke.yaml."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from v4forge.bench.tools import scenarios, strict_yaml
from v4forge.bench.tools.answer_assertions import AnyCheck, Check, Program
from v4forge.bench.tools.chat_client import Reply
from v4forge.bench.tools.strict_yaml import Model, each_once, fault

FILE = scenarios.FOLDER.with_name("smoke.yaml")
GROUPS = {"quick": 4, "quality": 4, "coding": 2}  # prompts each, as published
PREFIX = "smoke"


class Row(Model):
    """A prompt as it is in the file."""

    id: str
    about: str
    prompt: str
    checks: list[AnyCheck] = Field(min_length=1)


class MaxTokens(Model):
    quick: int
    quality: int
    coding: int


class File(Model):
    max_tokens: MaxTokens
    quick: list[Row]
    quality: list[Row]
    coding: list[Row]

    @model_validator(mode="after")
    def _as_published(self) -> Self:
        for group, count in GROUPS.items():
            if len(self.prompts(group)) != count:
                raise fault(f"{len(self.prompts(group))} prompts, not {count}", group)
        each_once(((group, n, "id"), row.id) for group in GROUPS for n, row in enumerate(self.prompts(group)))
        return self

    def prompts(self, group: str) -> list[Row]:
        rows: list[Row] = getattr(self, group)
        return rows


@dataclass(frozen=True)
class Prompt:
    group: str
    name: str
    about: str
    text: str
    max_tokens: int
    checks: Sequence[Check]

    @property
    def key(self) -> str:
        return f"{PREFIX}/{self.group}/{self.name}"

    @property
    def needs(self) -> set[str]:
        return {check.needs for check in self.checks if check.needs}


def load(path: Path = FILE) -> list[Prompt]:
    """The prompts, by group. Raises UserError for what is wrong in the file."""
    file = strict_yaml.read(path, File)
    return [
        Prompt(group, row.id, row.about, row.prompt, getattr(file.max_tokens, group), row.checks)
        for group in GROUPS
        for row in file.prompts(group)
    ]


def part(prompt: Prompt, ask: Callable[[str], Reply], run: Program) -> dict[str, Any]:
    """Asks, and checks the answer: its part of the result file.

    run: runs Python programs in containers and says of each whether it came to its end. Raises UserError when the
    model cannot be asked, or a check cannot be made.
    """
    begun_s = time.monotonic()
    reply = ask(prompt.text)
    answered_s = time.monotonic() - begun_s
    whole = reply.finish != "length" and bool(reply.text.strip())
    found = [("a whole answer", whole, reply.finish if reply.text.strip() else "empty")]
    for check in prompt.checks:
        found += check.check(reply.text, run)
    return {
        "group": prompt.group,
        "id": prompt.name,
        "about": prompt.about,
        "ok": all(ok for _, ok, _ in found),
        "checks": [{"name": name, "ok": ok, "detail": detail} for name, ok, detail in found],
        "prompt": prompt.text,
        "answer": reply.text,
        **reply.thoughts,
        "finish_reason": reply.finish,
        "usage": dict(reply.usage),
        "elapsed_s": round(answered_s, 3),
    }


def counts(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    """By group: how many were ok, of how many that were asked."""
    found: dict[str, tuple[int, int]] = {}
    for group in GROUPS:
        own = [part for key, part in parts.items() if key.startswith(f"{PREFIX}/{group}/")]
        if own:
            found[group] = sum(part["ok"] for part in own), len(own)
    return found
