"""Whether replicas give the same answers: greedy completions, token by token, with their log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from v4forge.errors import UserError
from v4forge.outcomes import NOT_CHECKED, Outcome, failed, ok
from v4forge.serving.client import LOGS, Endpoint, ask, form_of

TOKENS = 64  # of a completion. Fixed for good: a stored answer stays comparable.
# Two tokens whose log-probabilities are this close may change places by rounding alone: each of the two differs by 0.01
# to 0.05 between ways to compute the same in BF16, as seen with vLLM on an H200.
NEAR_TIE = 0.1
BEST = 5  # tokens told at each position


@dataclass(frozen=True)
class Completion:
    """Token ids of an answer, and at each position the best ones' log-probabilities by id."""

    tokens: tuple[int, ...]
    best: tuple[Mapping[int, float], ...]

    def gap(self, position: int, other: int) -> float:
        """How much likelier the token at a position is than `other`, by log-probability; inf if that is not among the
        best, and so no tie."""
        best = self.best[position]
        return best[self.tokens[position]] - best.get(other, -math.inf)


def completion(at: Endpoint, model: str, prompt: str, tokens: int = TOKENS) -> Completion:
    """The greedy completion of a prompt by so many tokens, with the BEST tokens at each position."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": BEST,
        # Ids, because several tokens may be written with the same text.
        "return_tokens_as_token_ids": True,
    }
    with form_of("POST /v1/completions"):
        told = ask(at, "/v1/completions", body)["choices"][0]["logprobs"]
        ids = tuple(map(_id, told["tokens"]))
        chosen = zip(ids, told["token_logprobs"], told["top_logprobs"], strict=True)
        best = tuple({_id(name): float(p) for name, p in top.items()} | {token: float(p)} for token, p, top in chosen)
    if len(ids) != tokens:
        raise UserError(f"{len(ids)} tokens were generated, {tokens} asked for", LOGS)
    if not all(math.isfinite(p) for each in best for p in each.values()):
        raise UserError("a token's log-probability is not finite: NaN in the model?", LOGS)
    return Completion(ids, best)


def _id(name: str) -> int:
    return int(name.removeprefix("token_id:"))


def agreement(answers: Mapping[int, Mapping[str, Completion]], replicas: int) -> Outcome:
    """All replicas gave the first one's tokens.

    Identical tokens are what is asked for. Where two replicas part at a near tie, that is told and passes: vLLM fixes
    neither the kernels that each process tunes for itself nor the order of their sums, so two healthy replicas may
    round such a choice differently, and what follows is then of another text. Damage shows far above NEAR_TIE: a wrong
    scale or expert moves log-probabilities by 0.1 to 6 at every position.
    """
    name = "replicas agree"
    if replicas < 2:
        return Outcome(name, NOT_CHECKED, "there is one replica")
    if len(answers) < replicas:
        return failed(f"{replicas - len(answers)} of {replicas} replicas did not complete the prompts", LOGS, name)
    (first, reference), *others = answers.items()
    ties: list[str] = []
    worst = 0.0
    for replica, completions in others:
        for prompt, mine in completions.items():
            theirs = reference[prompt]
            at = parting(theirs, mine)
            worst = max(worst, drift(theirs, mine, len(mine.tokens) if at is None else at))
            if at is None:
                continue
            gap = max(theirs.gap(at, mine.tokens[at]), mine.gap(at, theirs.tokens[at]))
            where = f"replicas {first} and {replica} part at token {at + 1} of the {prompt} prompt"
            where += f", log-probabilities {gap:.3f} apart" if gap < math.inf else f", not by one of its {BEST} best"
            if not gap <= NEAR_TIE:
                fact = f"{where}, more than {NEAR_TIE} of a near tie: one of them is damaged? {LOGS}"
                return failed(fact, name=name)
            ties.append(where)
    same = f"{len(reference) * TOKENS} tokens of {replicas} replicas, log-probabilities at most {worst:.4f} apart"
    return ok("; ".join((f"{'the same' if not ties else 'near ties in'} {same}", *ties)), name)


def parting(one: Completion, other: Completion) -> int | None:
    """The first position at which two answers differ."""
    pairs = enumerate(zip(one.tokens, other.tokens, strict=True))
    return next((at for at, (mine, theirs) in pairs if mine != theirs), None)


def drift(one: Completion, other: Completion, until: int) -> float:
    """The largest difference of the chosen tokens' log-probabilities before a position."""
    both = zip(one.tokens[:until], one.best, other.best, strict=False)
    return max((abs(mine[token] - theirs[token]) for token, mine, theirs in both), default=0.0)
