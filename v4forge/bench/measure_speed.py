"""Measures speed point by point: a server for each number of drafts, one after the other, or the one at an address."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from v4forge.bench import results, served_model, speed, vllm_bench, workloads
from v4forge.bench.results import Measurement
from v4forge.bench.served_model import Target
from v4forge.bench.session import Session
from v4forge.bench.speed import Point
from v4forge.bench.vllm_bench import Client, Load
from v4forge.bench.workloads import Vocabulary
from v4forge.errors import UserError
from v4forge.files import make_folder
from v4forge.images import definitions
from v4forge.serving import launch
from v4forge.serving.launch import Wanted, say
from v4forge.serving.metrics import Counts


@dataclass(frozen=True)
class Options:
    """Which points are measured, and how: `shapes` are tokens of prompt and answer, `requests_each` the requests of a
    point for each that runs at a time; `rates` are requests a second, each with as many requests as the most at a time;
    `slo_ms` is what a good request keeps to, ttft and tpot."""

    shapes: Sequence[tuple[int, int]]
    concurrency: Sequence[int]
    requests_each: int
    slo_ms: Mapping[str, float]
    point_limit_s: float
    answer_limit_s: float
    rates: Sequence[float] = ()

    def points(self, drafts: int) -> list[Point]:
        """Those of one server."""
        return speed.points(drafts, self.shapes, self.concurrency, self.rates)

    def together(self, point: Point) -> int:
        """Requests that warm a point up, of which it has requests_each times as many."""
        return point.concurrency or max(self.concurrency)

    def check_fits(self, length: int | None) -> None:
        """Raises UserError for requests that are longer than what the model takes, in tokens."""
        for read, written in self.shapes:
            if length and read + written > length:
                fact = f"{read}x{written} are {read + written} tokens, and max-model-len is {length}"
                raise UserError(fact, f"other --shapes, or --set max-model-len={read + written}")


@dataclass
class Bench:
    """One run of the bench. `artifact`: the folder of the tokenizer, of whose `words` the prompts are."""

    session: Session
    options: Options
    client: Client
    artifact: Path
    words: Vocabulary

    @property
    def folder(self) -> Path:
        """For the client's files, while it runs."""
        return Path(os.path.abspath(self.session.reports)) / ".speed"

    def prompts(self, point: Point, warm_up: bool = False) -> list[str]:
        """A point's prompts. They are those of its key without the drafts, so no two points of a server share any, and
        a cache of prefixes helps none."""
        count = self.options.together(point) * (1 if warm_up else self.options.requests_each)
        of = f"{self.session.seed}:{point.key.partition('/')[2]}:{'warm-up' if warm_up else 'measured'}"
        return workloads.random_prompts(self.words, point.input_tokens, count, of)

    def hashes(self, points: Sequence[Point]) -> dict[str, str]:
        """Of the prompts of one server's points, as the client reads them: key without drafts -> sha256."""
        texts = {point.key.partition("/")[2]: vllm_bench.lines(self.prompts(point)) for point in points}
        return {f"prompts/{key}": hashlib.sha256(text.encode()).hexdigest() for key, text in texts.items()}

    def begin(self, about: Mapping[str, Any], drafts: Sequence[int]) -> Measurement:
        options = self.options
        settings = {
            "drafts": list(drafts),
            "shapes": [f"{shape[0]}x{shape[1]}" for shape in options.shapes],
            "concurrency": options.concurrency,
            "requests_per_concurrency": options.requests_each,
            "warm_up": "before each point, as many other requests as run at a time",
            "client": "vllm bench serve",
            "slo_ms": options.slo_ms,
            **({"request_rate": list(options.rates)} if options.rates else {}),
        }
        sampling = {"temperature": 0, "ignore_eos": True, "prompts": "random tokens"}
        return self.session.begin(about, settings, sampling, self.hashes(options.points(0)))

    def server(self, opened: Measurement, at: Target, drafts: int) -> None:
        """Measures what is missing of a server's points. Raises UserError when it does not answer any more."""
        points = {point.key: point for point in self.options.points(drafts)}
        since = results.now()

        def one(key: str) -> Mapping[str, Any]:
            return {**self.point(at, points[key]), "server_since": since}

        with self.session.steps(f"speed, k={drafts}", len(points), "points", resumes=True) as progress:
            results.measured(opened, list(points), one, progress)

    def point(self, at: Target, point: Point) -> dict[str, Any]:
        """The figures of one point. Raises UserError for anything but whole answers to all requests in time."""
        options, limit_s = self.options, self.options.point_limit_s
        fixed = (point.output_tokens, point.concurrency, options.slo_ms, self.session.seed)
        whole = Load(at.url, at.model, self.prompts(point), *fixed, rate=point.request_rate)
        before = Load(at.url, at.model, self.prompts(point, warm_up=True), *fixed)
        vllm_bench.warm_up(at.endpoint, before, min(limit_s, options.answer_limit_s))
        earlier = counts(at)
        if earlier.generated is not None:
            at.wait_until_idle()
            earlier = counts(at)
        result = vllm_bench.measure(self.client, whole, self.artifact, self.folder, at.key, limit_s)
        found = speed.figures(result, point, len(whole.prompts), options.slo_ms)
        return {**found, "acceptance": counts(at).since(earlier).acceptance}

    def ended(self, opened: Measurement) -> Measurement:
        """The result file with what its parts say together."""
        shutil.rmtree(self.folder, ignore_errors=True)
        opened.content["summary"] = speed.summary(opened.content["parts"], self.session.seed)
        return opened


def counts(at: Target) -> Counts:
    """The target's counters; none at a router's public address, which has no metrics."""
    try:
        return at.counts()
    except UserError:
        if at.endpoints[0].pinned:
            raise
        return Counts()


def with_drafts(session: Session, drafts: int) -> Wanted:
    """The server of so many drafts: one replica, unless the user asks for more."""
    return replace(session.wanted, drafts=drafts, replicas=session.wanted.replicas or 1)


def client_of(session: Session) -> Client:
    """Where `vllm bench serve` is: beside the server that is started; an address is asked from the same place."""
    if not session.url:
        deployment = launch.deployment_of(with_drafts(session, 0))
        return Client(deployment.program, deployment.image)
    folder = session.programs()
    return Client(str(folder)) if folder else Client(image=definitions.resolve("serve"))


def prepared(session: Session, options: Options, artifact: Path) -> Bench:
    words = workloads.vocabulary(artifact)
    bench = Bench(session, options, client_of(session), Path(os.path.abspath(artifact)), words)
    shutil.rmtree(bench.folder, ignore_errors=True)
    make_folder(bench.folder)
    return bench


def measure_own(session: Session, options: Options, drafts: Sequence[int]) -> Measurement:
    """One server after the other, each only if a point of it is missing."""
    session.check_stopped()
    deployment = launch.deployment_of(with_drafts(session, drafts[0]))
    options.check_fits(deployment.serving.max_model_len)
    bench = prepared(session, options, Path(deployment.artifact))
    about = served_model.planned(deployment, bench.client.version(bench.folder), session.wanted.overrides)
    opened = bench.begin(about, drafts)
    for k in drafts:
        missing = [point.key for point in options.points(k) if opened.part(point.key) is None]
        if not missing:
            continue
        try:
            with session.served(with_drafts(session, k)) as at:
                bench.server(opened, at, k)
        except UserError as error:
            if not opened.content["parts"] and not opened.content["failures"]:
                raise  # not even the first server starts
            # Another number of drafts may do.
            for each in missing:
                if opened.part(each) is None and each not in opened.content["failures"]:
                    opened.fail(each, error)
    return bench.ended(opened)


def measure_there(session: Session, options: Options) -> Measurement:
    """The server at the session's url."""
    with session.served() as at:
        options.check_fits(at.facts["max_model_len"])
        known = at.facts["artifact"]
        bench = prepared(session, options, Path(known["folder"]) if known else session.wanted.artifact)
        if at.facts["drafts"] is None:
            at.facts["drafts"] = len(counts(at).accepted_at or ())
        opened = bench.begin(at.facts, [at.facts["drafts"]])
        try:
            bench.server(opened, at, at.facts["drafts"])
        except UserError as error:
            say(f"speed: {at.url} does not answer any more: {error.fact}")
    return bench.ended(opened)
