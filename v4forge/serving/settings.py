"""What a replica is told: settings of vLLM, from docker/serve/settings.toml and the operator."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from v4forge import checkout
from v4forge.errors import UserError
from v4forge.files import read_json

FILE = checkout.file("docker/serve/settings.toml")
OVERRIDE, FOUND = "the operator", "this artifact, on this machine"
NAME = re.compile(r"[a-z0-9]+([-_.][a-z0-9_]+)*")
# A word that compose, a shell and supervisord hand on as it is; and what a path may have: these take the rest for their
# own, and a comment begins at a blank.
WORD = re.compile(r"[\w@%+=:,./\[\]-]*")
PATH = re.compile(r"(?!.* [;#])[^\"'\\$`\n]*")
TENSOR_PARALLEL = "tensor-parallel-size"
# GPUs of a replica: what divides the 64 heads, on one host.
WIDTHS = (1, 2, 4, 8)
MEMORY_SHARE = "gpu-memory-utilization"
DRAFTS = "speculative-config.num_speculative_tokens"
DRAFT_METHOD = "speculative-config.method"
SCHEDULE = "speculative-config.num_speculative_tokens_per_batch_size"
DRAFTS_TOLD = "per-request-spec-decode-metrics"  # which vLLM refuses where it drafts nothing
CONTEXT, NAME_SERVED = "max-model-len", "served-model-name"
SEQUENCES, PREFIX_CACHING = "max-num-seqs", "enable-prefix-caching"
DEFAULT_SEQUENCES = 1024  # vLLM's own, on a GPU of 70 GB and more
# What is for use, and what benches ask for.
PRODUCTION, PUBLISHED = "production", "published"

Value = str | int | float | bool


@dataclass(frozen=True)
class Setting:
    """An option of vLLM, its value, why it has it and where that comes from. "" leaves the option out."""

    name: str
    value: Value
    why: str
    source: str

    def words(self) -> list[str]:
        """The option on a command line."""
        if self.value == "":
            return []
        if isinstance(self.value, bool) and "." in self.name:  # a part of an option that is JSON
            return [f"--{self.name}", str(self.value).lower()]
        if isinstance(self.value, bool):
            return [f"--{self.name}" if self.value else f"--no-{self.name}"]
        return [f"--{self.name}", str(self.value)]


@dataclass(frozen=True)
class Serving:
    """The settings of a replica, by name; `environment` by variable; `caches`: variable -> folder below its cache."""

    profile: str
    backend: str
    settings: dict[str, Setting]
    environment: dict[str, Setting]
    caches: dict[str, str]

    def value(self, name: str) -> Value:
        """The value of an option, "" when it is left out."""
        return self.settings[name].value if name in self.settings else ""

    @property
    def tensor_parallel(self) -> int:
        """The GPUs of a replica. Raises UserError for a number that is none of WIDTHS."""
        width = self.value(TENSOR_PARALLEL) or 1
        if width not in WIDTHS:
            raise UserError(f"a replica takes {', '.join(map(str, WIDTHS))} GPUs, not {width}", "make serve TP=2")
        return int(width)

    @property
    def memory_share(self) -> float:
        """Of each GPU's memory, what vLLM may take. Raises UserError for what is no share."""
        text = str(self.value(MEMORY_SHARE) or 0.9)
        share = float(text) if re.fullmatch(r"[\d.]*\d", text) and text.count(".") < 2 else 0.0
        if not 0 < share <= 1:
            raise UserError(f"{MEMORY_SHARE} is a share of 1, not {text}", f'make serve SET="{MEMORY_SHARE}=0.9"')
        return share

    @property
    def max_model_len(self) -> int | None:
        """Tokens of prompt and answer together; None where vLLM decides."""
        length = str(self.value(CONTEXT))
        return int(length) if length.isdigit() else None

    @property
    def max_num_seqs(self) -> int:
        """Requests that a replica computes at a time."""
        count = str(self.value(SEQUENCES))
        return (int(count) if count.isdigit() else 0) or DEFAULT_SEQUENCES

    @property
    def prefix_caching(self) -> bool:
        """Whether a replica keeps beginnings; vLLM does unless it is told otherwise."""
        return self.value(PREFIX_CACHING) is not False

    @property
    def drafts(self) -> int:
        """k, the drafts a step; 0 without speculation."""
        return int(self.value(DRAFTS) or 0) if self.value(DRAFT_METHOD) else 0

    @property
    def model(self) -> str:
        """The name that clients ask for."""
        return str(self.value(NAME_SERVED))

    def arguments(self, artifact: str, port: int, host: str = "0.0.0.0") -> list[str]:
        """What follows `vllm serve`. Raises UserError for an artifact whose path would not stay as it is."""
        if not PATH.fullmatch(artifact):
            raise UserError(f"the path {artifact!r} has a quote or another special character", "move the artifact")
        chosen = [word for setting in self.settings.values() for word in setting.words()]
        return [artifact, "--host", host, "--port", str(port), *chosen]

    def variables(self, cache: str) -> dict[str, str]:
        """The environment of a replica whose caches are below `cache`."""
        fixed = {name: str(setting.value) for name, setting in self.environment.items()}
        return fixed | {name: f"{cache}/{folder}" for name, folder in self.caches.items()}


@lru_cache(maxsize=1)
def table() -> dict[str, Any]:
    return tomllib.loads(FILE.read_text(encoding="utf-8"))


def profiles() -> dict[str, str]:
    """Profile -> what it is for."""
    return {name: profile["why"] for name, profile in table()["profiles"].items()}


def name_of(artifact: Path) -> str:
    """The name that an artifact is served under, by its config.json; Flash's where there is none to read."""
    config = read_json(artifact / "config.json")
    names: dict[str, dict[str, int]] = table()["names"]
    fitting = (name for name, sizes in names.items() if not config or all(config.get(k) == v for k, v in sizes.items()))
    return next(fitting)


def serving(
    profile: str = PUBLISHED,
    backend: str = "cuda",
    overrides: Mapping[str, str] | None = None,
    found: Mapping[str, str | int] | None = None,
) -> Serving:
    """The settings of a profile on a backend; then `found`, those that follow from the artifact and this machine; then
    the operator's own: option -> value as text, "" to leave it out. Where the operator sets the drafts, a profile's
    schedule makes that many while it makes any. Raises UserError for a profile, an option or a value that cannot be."""
    for kind, name in (("profiles", profile), ("backends", backend)):
        if name not in table()[kind]:
            raise UserError(f"there is no serving {kind[:-1]} {name!r}", f"use one of: {', '.join(table()[kind])}")
    layers = [table(), table()["profiles"][profile], table()["backends"][backend]]
    settings = {name: row for layer in layers for name, row in _rows(layer, "settings").items()}
    settings |= {name: replace(settings[name], value=value, source=FOUND) for name, value in (found or {}).items()}
    if (asked := (overrides or {}).get(DRAFTS, "")).isdecimal() and SCHEDULE in settings:
        settings[SCHEDULE] = _rescheduled(settings[SCHEDULE], int(asked))
    for name, text in (overrides or {}).items():
        if not NAME.fullmatch(name) or not WORD.fullmatch(text):
            fact = f"{name}={text} is not an option of vllm serve and a word"
            raise UserError(fact, 'make serve SET="max-model-len=8192"')
        settings[name] = Setting(name, _parsed(text), "asked for", OVERRIDE)
    if not settings[DRAFT_METHOD].value or settings[DRAFTS].value in (0, ""):
        of_drafts = ("speculative-config.", DRAFTS_TOLD)
        settings = {name: row for name, row in settings.items() if not name.startswith(of_drafts)}
    environment = {name: row for layer in layers for name, row in _rows(layer, "environment").items()}
    return Serving(profile, backend, settings, environment, table()["caches"])


def _rescheduled(schedule: Setting, drafts: int) -> Setting:
    """The same with this many drafts where it had any."""
    rows = [[first, last, drafts if made else 0] for first, last, made in json.loads(str(schedule.value))]
    return replace(schedule, value=json.dumps(rows, separators=(",", ":")))


def _rows(layer: Mapping[str, Any], kind: str) -> dict[str, Setting]:
    return {name: Setting(name, **row) for name, row in layer.get(kind, {}).items()}


def _parsed(text: str) -> Value:
    """true and false are switches; numbers are numbers; all else is text."""
    if text in ("true", "false"):
        return text == "true"
    try:
        return int(text)
    except ValueError:
        return text
