"""The guard after the start: every replica, asked for itself, answers as a healthy one does, and as the others do.

A replica that fails a check is told by name, fact and hint; nothing that a server may answer ends in a traceback.
"""

from __future__ import annotations

import json
import math
import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from v4forge.errors import UserError
from v4forge.model.chat_format import ASSISTANT, END_THINK, USER
from v4forge.outcomes import NotChecked, Outcome, failed, not_checked, ok
from v4forge.serving.agreement import TOKENS, Completion, agreement, completion
from v4forge.serving.client import LOGS, Endpoint, ask, form_of, metrics, short, status
from v4forge.serving.metrics import Counts, Reading

# What is completed, greedily, for TOKENS tokens each. Fixed for good too.
PROMPTS = {
    "English": "The lighthouse stood at the end of the pier, and every evening the keeper climbed its stairs to",
    "code": "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n    return",
    "chat": f"{USER}What is the capital of France, and what is it known for?{ASSISTANT}{END_THINK}",
}

# The share of drafts whose first token must be accepted. On these prompts models/tiny's artifact has 0.65, at k = 1 and
# at 3, and 0.005 with the rows of its MTP block's matrices in another order; a public figure of Flash is 0.71, at k = 3
# over all positions; 0 is how C14 looked. The first token, because it does not depend on how many are drafted. It fails
# when the whole 95% interval lies below.
FLOOR = 0.2
# The three answers are enough for that. A step yields its own token and the accepted ones, so without a single accepted
# draft their 192 tokens take 189 drafts, of which Wilson's interval ends at 2.0%; and an MTP block of which half of 120
# are accepted lies above the floor even if neighbouring tokens resemble each other so much that four count for one.
# Fewer drafts mean that more were accepted, or that steps went without: this share of tokens must be drafted for.
DRAFTED = 0.5

# A strict tool's schema bounds what is generated: a model that knows nothing, as models/tiny, calls it rightly too.
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "strict": True,
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
FILLED = re.compile(r"v4forge: (?P<what>.+?): all (?P<parameters>\d+) parameters filled from (?P<tensors>\d+) tensors")
MODEL, MTP = "the model", "the MTP block"
# What lists the models, and paths of vLLM's that are not served.
MODELS, UNSERVED = "/v1/models", ("/invocations", "/tokenize")


@dataclass(frozen=True)
class Expected:
    """What was started: the model's name, whether with drafts, how many processes hold its weights."""

    model: str
    speculation: bool
    ranks: int = 1
    floor: float = FLOOR


def probe(
    replicas: Sequence[Endpoint],
    expected: Expected,
    log: Callable[[int], str],
    progress: Callable[[int, str], None] = lambda _done, _doing: None,
) -> list[Outcome]:
    """Every check of every replica, then that they agree.

    log: from a replica's number to what it has logged since it started. progress gets replicas done, and what is being
    done: as v4forge's programs show it.
    """
    outcomes: list[Outcome] = []
    answers: dict[int, dict[str, Completion]] = {}
    for done, replica in enumerate(replicas):
        state = State(replica, expected, log)
        for name, check in CHECKS.items():
            progress(done, f"{replica}: {name}")
            outcomes.append(_outcome(f"{replica}: {name}", check, state))
        if state.answers:
            answers[replica.replica] = state.answers
    progress(len(replicas), "replicas agree")
    outcomes.append(agreement(answers, len(replicas)))
    return outcomes


@dataclass
class State:
    """A replica under test, and what earlier checks of it have brought for the later ones."""

    at: Endpoint
    expected: Expected
    log: Callable[[int], str]
    answers: dict[str, Completion] = field(default_factory=dict)
    before: Reading | None = None
    after: Reading | None = None


def _outcome(name: str, check: Callable[[State], str], state: State) -> Outcome:
    try:
        return ok(check(state), name)
    except NotChecked as why:
        return not_checked(why, name)
    except UserError as error:
        return failed(error.fact, error.hint, name)


def models(s: State) -> str:
    """The replica serves the model under the expected name."""
    with form_of("GET /v1/models"):
        names = [str(each["id"]) for each in ask(s.at, MODELS)["data"]]
    if s.expected.model not in names:
        raise UserError(
            f"it serves {', '.join(names) or 'nothing'}, not {s.expected.model}", "make serve-stop, make serve"
        )
    return s.expected.model


def prompts(s: State) -> str:
    """Three prompts are completed greedily; the counters are read before and after."""
    s.before = metrics(s.at)
    started_s = time.monotonic()
    answers = {name: completion(s.at, s.expected.model, prompt) for name, prompt in PROMPTS.items()}
    elapsed_s = time.monotonic() - started_s
    s.after = metrics(s.at)
    s.answers = answers
    return f"{len(answers)} of {TOKENS} tokens each, {len(answers) * TOKENS / elapsed_s:.1f} tok/s"


def drafts(s: State) -> str:
    """Drafts were proposed for those prompts, and accepted as those of an MTP block are that was read right."""
    if not s.expected.speculation:
        raise NotChecked("served without speculation")
    if s.before is None or s.after is None:
        raise UserError("no drafts were counted, the prompts failed", LOGS)
    if s.after.restarted(s.before):
        raise UserError("it restarted in between", LOGS)
    return acceptance(s.after.counts.since(s.before.counts), s.expected.floor)


def acceptance(counts: Counts, floor: float) -> str:
    """The counted acceptance in words. Raises UserError where few drafts were made, or too few accepted."""
    made, first = counts.drafts, (counts.accepted_at or (None,))[0]
    if made is None or first is None:
        raise UserError("/metrics has no counters of drafts: it runs without speculation", "make serve DRAFTS=1")
    tokens, accepted = TOKENS * len(PROMPTS), counts.accepted or 0.0
    if not made + accepted >= DRAFTED * tokens:
        raise UserError(f"only {made:.0f} drafts were made for {tokens} tokens, {accepted:.0f} accepted", LOGS)
    if not (0 <= first <= made and 0 < made < math.inf):
        raise UserError(f"/metrics says that {first} of {made} drafts were accepted", LOGS)
    from v4forge.intervals import wilson  # with numpy, which would double what `serve --help` takes

    found = wilson(first / made, made)
    ends = f"{found.low:.1%} to {found.high:.1%}"
    figures = f"{first:.0f} of {made:.0f} first drafts accepted, {found.value:.1%} ({ends})"
    if found.high < floor:
        raise UserError(
            f"{figures}, at least {floor:.0%} expected: an MTP block with another's weights (C14)?",
            "python -m scripts.verify --artifact DIR; without drafts: make serve DRAFTS=0",
        )
    deeper = ", ".join(f"{share:.1%}" for share in (counts.acceptance_at or ())[1:])
    return figures + (f"; later positions {deeper}" if deeper else "")


def tool_call(s: State) -> str:
    """A chat that must call a tool does, and the call's arguments are what the tool takes."""
    message = chat(s, "What is the weather in Paris?", 256, thinking=False, tools=[TOOL], tool_choice="required")
    with form_of("the chat with a tool"):
        calls = message.get("tool_calls") or []
        if not calls:
            raise UserError(f"no tool was called; its answer: {short(message.get('content'))}", LOGS)
        called = calls[0]["function"]
        arguments = _json_of(called["arguments"])
        if called["name"] != "get_weather" or not isinstance(arguments, dict) or "city" not in arguments:
            raise UserError(f"it called {called['name']} with {short(called['arguments'])}", LOGS)
        return f"get_weather({short(arguments['city'])})"


def _json_of(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise UserError(f"the call's arguments are not JSON: {short(text)}", LOGS) from None


def reasoning(s: State) -> str:
    """A chat that thinks tells its thoughts apart from the answer."""
    message = chat(s, "Which is larger, 9.11 or 9.9?", 64, thinking=True)
    with form_of("the chat with thinking"):
        # vLLM's older name is the second.
        thoughts = message.get("reasoning") or message.get("reasoning_content")
        if not thoughts:
            raise UserError(f"no reasoning was parsed; its answer: {short(message.get('content'))}", LOGS)
        return f"{len(thoughts)} characters of thoughts"


def weights(s: State) -> str:
    """Each process says that every parameter of model and MTP block was filled."""
    try:
        log = s.log(s.at.replica)
    except OSError as error:
        raise UserError(f"its log cannot be read: {error}", LOGS) from None
    return filled(log, s.expected)


def filled(log: str, expected: Expected) -> str:
    """What the log says of it. Raises UserError where a line is missing, for fewer processes than there are."""
    found: dict[str, list[tuple[int, int]]] = {}
    for match in FILLED.finditer(log):
        found.setdefault(match["what"], []).append((int(match["parameters"]), int(match["tensors"])))
    told = []
    for what in (MODEL, MTP) if expected.speculation else (MODEL,):
        counts = found.get(what, [])
        if len(counts) < expected.ranks or not all(all(count) for count in counts):
            raise UserError(
                f"{len(counts)} of {expected.ranks} processes say that all parameters of {what} were filled",
                f"{LOGS}: is the plugin v4forge_vllm installed, and INFO logged?",
            )
        told.append(f"{what}: {counts[-1][0]} parameters from {counts[-1][1]} tensors")
    return "; ".join(told)


def access(s: State) -> str:
    """The replica asks for a key, where it was started with one, and answers nothing besides what is served."""
    strangers = {"a wrong key": secrets.token_urlsafe(), "no key": ""} if s.at.key else {}
    for what, key in strangers.items():
        _expect(s, replace(s.at, key=key), MODELS, 401, what)
    for path in UNSERVED:
        _expect(s, s.at, path, 404, "the key" if s.at.key else "no key")
    told = [f"401 with {' and with '.join(strangers)}"] if strangers else []
    return "; ".join([*told, f"404 for {' and '.join(UNSERVED)}"])


def _expect(s: State, at: Endpoint, path: str, wanted: int, shown: str) -> None:
    if (told := status(at, path)) != wanted:
        fact = f"GET {path} with {shown} was answered with HTTP {told}, not {wanted}"
        raise UserError(fact, f"{LOGS}: does it run with --middleware, as make serve-print shows?")


# In this order: drafts need the counters that prompts reads.
CHECKS: dict[str, Callable[[State], str]] = {
    "models": models,
    "access": access,
    "prompts": prompts,
    "drafts": drafts,
    "tool call": tool_call,
    "reasoning": reasoning,
    "weights": weights,
}


def chat(s: State, question: str, max_tokens: int, thinking: bool, **more: Any) -> dict[str, Any]:
    """The message that answers a question, greedily."""
    body = {
        "model": s.expected.model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "chat_template_kwargs": {"thinking": thinking},
        **more,
    }
    with form_of("POST /v1/chat/completions"):
        return dict(ask(s.at, "/v1/chat/completions", body)["choices"][0]["message"])
