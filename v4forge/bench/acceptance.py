"""How many drafts a server accepts: prompts one at a time, its counters read before and after each.

A prompt is one observation, because the tokens of one answer resemble each other: intervals are Wilson's for as many
independent drafts as would have the error between prompts (v4forge.intervals.share).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from v4forge.artifact_folder import CERTIFICATE
from v4forge.bench.served_model import Target
from v4forge.bench.statistics import difference
from v4forge.bench.workloads import Prompt
from v4forge.errors import UserError
from v4forge.files import read_json, writing
from v4forge.intervals import Estimate, share
from v4forge.serving import client, metrics
from v4forge.serving.client import LOGS, ask, form_of, short
from v4forge.serving.metrics import Counts, Reading

SETTLE_S = 5.0  # in which the counters follow the end of an answer
BETWEEN_S = 0.05
ALONE = "stop the other clients, then run the same command again"
# For whoever compares the figures.
WHY = (
    "the server is judged where it stands in text of its own making, verify --deep at every place of held-out text, "
    "and there a draft behind the first only where the text goes on as the drafts before it did"
)


@dataclass(frozen=True)
class Sampling:
    """What a request asks for besides its prompt. Greedy at temperature 0; else request i has the seed `seed` + i."""

    tokens: int
    temperature: float = 0.0
    seed: int = 0
    thinking: bool = False

    def body(self, prompt: Prompt, number: int, model: str) -> dict[str, Any]:
        """The request. With token ids in its answer, for `verify --tokens`."""
        chat = {"chat_template_kwargs": {"thinking": self.thinking}} if "messages" in prompt.asked else {}
        drawn = {"top_p": 1.0, "seed": self.seed + number} if self.temperature else {}
        settings = {"max_tokens": self.tokens, "temperature": self.temperature, "return_token_ids": True}
        return {"model": model, **prompt.asked, **settings, **drawn, **chat}


@dataclass(frozen=True)
class Answered:
    """A prompt's and its answer's tokens, and what the server counted meanwhile: drafts, the tokens proposed in them,
    those accepted by position."""

    id: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    drafts: int
    draft_tokens: int
    accepted: list[int]

    def line(self) -> str:
        """A line of a file that `verify --tokens` reads too; it passes over the counts."""
        return json.dumps(asdict(self)) + "\n"


def readings(target: Target) -> list[Reading]:
    """Every replica's counters. Raises UserError for one that does not count drafts."""
    found = [client.metrics(each) for each in target.endpoints]
    for at, reading in zip(target.endpoints, found, strict=True):
        if reading.counts.generated is None:
            raise UserError(f"{at.url}/metrics has no counters of vLLM's", "measure a server of vLLM: make serve")
        if reading.counts.drafts is None or reading.counts.accepted_at is None:
            raise UserError(f"{target.url} serves without speculation, so no draft is made", "make serve DRAFTS=1")
    return found


def depth(target: Target) -> int:
    """How many tokens a draft has, k. Raises UserError for a server without speculation."""
    return len(metrics.total(each.counts for each in readings(target)).accepted_at or ())


def count(target: Target, prompt: Prompt, number: int, sampling: Sampling, limit_s: float) -> Answered:
    """Sends a prompt and counts its drafts. Raises UserError, naming the prompt, for whatever else happens: no answer,
    one of another form, a replica that was started again, requests of somebody else."""
    try:
        before = readings(target)
        answer = ask(target.endpoint, prompt.path, sampling.body(prompt, number, target.model), limit_s)
        with form_of(f"POST {prompt.path}"):
            choice = answer["choices"][0]
            # Chats have them beside the choices, completions in each.
            prompted = choice.get("prompt_token_ids") or answer["prompt_token_ids"]
            ids, written = choice["token_ids"], int(answer["usage"]["completion_tokens"])
            if not all(type(each) is int for each in (*prompted, *ids)) or len(ids) != written:
                raise ValueError(f"{written} tokens, {short(ids)}")
        added = _added(target, before, written)
        return Answered(prompt.id, prompted, ids, *_drafts(added, written))
    except UserError as error:
        raise UserError(f"prompt {prompt.id}: {error.fact}", error.hint) from None


def _added(target: Target, before: Sequence[Reading], written: int) -> Counts:
    """What all replicas have counted since `before`, once that holds the answer's tokens."""
    end_s = time.monotonic() + SETTLE_S
    while True:
        now = readings(target)
        for at, then, later in zip(target.endpoints, before, now, strict=True):
            if later.restarted(then):
                raise UserError(f"{at} was started again meanwhile, and with it its counters", LOGS)
        added = metrics.total(later.counts.since(then.counts) for then, later in zip(before, now, strict=True))
        generated = added.generated or 0
        if generated == written:
            return added
        if generated > written:
            fact = f"{generated:.0f} tokens were generated, {written} of them for us: others use {target.url}"
            raise UserError(fact, ALONE)
        if time.monotonic() > end_s:
            fact = f"{written} tokens came, and the counters know of {generated:.0f}"
            raise UserError(
                fact, f"{LOGS}; are all replicas behind {target.url} read? --folder DIR names their deployment"
            )
        time.sleep(BETWEEN_S)


def _drafts(added: Counts, written: int) -> tuple[int, int, list[int]]:
    """Drafts, proposed tokens, accepted ones by position, after a look at whether they can be."""
    drafts, proposed, accepted = added.drafts or 0.0, added.draft_tokens or 0.0, added.accepted_at or ()
    falls = all(0 <= later <= earlier for earlier, later in zip((drafts, *accepted), accepted, strict=False))
    if not (falls and sum(accepted) <= proposed <= drafts * len(accepted) and drafts <= written < math.inf):
        told = f"{drafts:.0f} drafts of {proposed:.0f} tokens, accepted by position {[int(a) for a in accepted]}"
        raise UserError(f"for {written} tokens /metrics counts {told}, which cannot be", LOGS)
    return int(drafts), int(proposed), [int(each) for each in accepted]


class Kept:
    """The answers of one workload, a line each in a file that is added to: a run that ends goes on behind them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: list[Answered] = []
        try:
            text = path.read_bytes().decode(errors="replace") if path.exists() else ""
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}", "run with --fresh") from None
        whole = text[: text.rfind("\n") + 1]  # a run that was killed may leave half a line
        for line in whole.splitlines():
            try:
                self.answers.append(Answered(**json.loads(line)))
            except (ValueError, TypeError, RecursionError):
                raise UserError(f"{path} was changed: {short(line)}", f"rm {path}, or run with --fresh") from None
        if whole != text:
            with writing(path):
                path.write_text(whole, encoding="utf-8")

    def add(self, answered: Answered) -> None:
        with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(answered.line())
        self.answers.append(answered)


def figures(workload: str, answers: Sequence[Answered]) -> dict[str, Any]:
    """A part of the result file: sums, shares with their intervals over prompts, counts of each prompt.

    by_position: of all drafts, the share whose i-th token was accepted; given_earlier: of those whose tokens before it
    were. A draft at the end of an answer may propose fewer tokens than k; draft_tokens counts those proposed, while the
    positions are over all drafts. Raises UserError where no draft was made.
    """
    drafts, proposed, accepted = columns(answers)
    if not drafts.sum():
        fact = f"no draft was made in {len(answers)} answers of {workload}"
        raise UserError(fact, "serve with drafts for single requests: make serve DRAFTS=1")
    before = [drafts, *accepted[:-1]]
    return {
        "workload": workload,
        "prompts": len(answers),
        "prompt_tokens": sum(len(each.prompt_token_ids) for each in answers),
        "tokens": sum(len(each.token_ids) for each in answers),
        "drafts": int(drafts.sum()),
        "draft_tokens": int(proposed.sum()),
        "accepted": int(accepted.sum()),
        "accepted_at": [int(at.sum()) for at in accepted],
        "acceptance": share(accepted.sum(0), proposed).json(),
        "by_position": [share(at, drafts).json() for at in accepted],
        "given_earlier": [share(at, of).json() for at, of in zip(accepted, before, strict=True)],
        "counted": [[each.drafts, *each.accepted] for each in answers],
        "proposed": [each.draft_tokens for each in answers],
    }


def columns(answers: Sequence[Answered]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """By prompt: drafts and proposed tokens, [prompts] i64 each, and accepted ones, [k, prompts] i64."""
    rows = [[each.drafts, each.draft_tokens, *each.accepted] for each in answers]
    table = np.array(rows, np.int64).T
    return table[0], table[1], table[2:]


@dataclass(frozen=True)
class Offline:
    """What `verify --deep` found of the artifact, for k drafts a step: accepted of all drafted; by position, of those
    whose drafts before were accepted. `source` says which file tells it."""

    source: str
    tokens: int
    sequences: int
    acceptance: Estimate
    given_earlier: list[Estimate]


def offline(artifact: Mapping[str, Any] | None, k: int, file: Path | None = None) -> Offline | None:
    """The figures in the served artifact's certificate, or in `file`, another certificate of it.

    artifact: Target.facts["artifact"]. None where nothing was given and the certificate has none, or is of other files.
    Raises UserError for a file without them, or about another artifact.
    """
    if file is None:
        if not artifact or artifact["certificate"] not in ("ok", "failed"):
            return None
        path = Path(artifact["folder"]) / CERTIFICATE
    else:
        path = file
    certificate = read_json(path)
    wanted = (artifact or {}).get("sums_sha256")
    if file and wanted and certificate.get("sums_sha256") not in (None, wanted):
        raise UserError(f"{path} is about another artifact than the one served", "pass its own: --offline FILE")
    deep = certificate.get("deep")
    if not deep:
        if file:
            hint = "python -m scripts.verify --artifact DIR --source DIR --deep 8192 writes DIR/certificate.json"
            raise UserError(f"{path} has no figures of verify --deep", hint)
        return None
    with form_of(str(path)):
        rows = sorted(deep["models"]["artifact"]["drafts"], key=lambda row: row["k"])[:k]
        if rows[-1]["k"] < k:
            return None
        conditional = [Estimate.of(row["acceptance_after_accepted"]) for row in rows]
        overall = Estimate.of(rows[-1]["acceptance_rate"])
        return Offline(str(path), deep["tokens"], deep["sequences"], overall, conditional)


def beside(part: Mapping[str, Any], given: Offline) -> dict[str, Any]:
    """The offline figures for a part of the result file, and by how much the server's differ from them."""
    ours, theirs = Estimate.of(part["acceptance"]), [Estimate.of(each) for each in part["given_earlier"]]
    pairs = zip(theirs, given.given_earlier, strict=True)
    return {
        "source": given.source,
        "tokens": given.tokens,
        "sequences": given.sequences,
        "acceptance": given.acceptance.json(),
        "given_earlier": [each.json() for each in given.given_earlier],
        "difference": {
            "acceptance": difference(ours, given.acceptance).json(),
            "given_earlier": [difference(one, other).json() for one, other in pairs],
        },
        "why": WHY,
    }
