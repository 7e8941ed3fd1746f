"""Time a token and tokens a second, with drafts and without, by shape of requests and how many run at a time.

For each number of drafts a server of one replica is started, measured with `vllm bench serve` and stopped; the server
without drafts comes first. Prompts are random tokens, the same for every server and no two the same; answers are greedy
and always of full length. Before each point as many other requests as run at a time warm the server up. Each server's
first point is measured once more in the end, which tells how far it drifted.

With --url, what is served there is measured, and nothing compared.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from scripts import benching, serve
from scripts.cli import steps
from v4forge.bench import results, served_model, speed, vllm_bench, workloads
from v4forge.bench.results import Measurement
from v4forge.bench.served_model import Target
from v4forge.bench.speed import Point
from v4forge.bench.vllm_bench import Client, Load
from v4forge.bench.workloads import Vocabulary
from v4forge.errors import UserError
from v4forge.files import make_folder
from v4forge.images import definitions
from v4forge.serving.deployment import Plan
from v4forge.serving.metrics import Counts

DRAFTS = (0, 1, 2, 3)
CONCURRENCY = (1, 4, 16)
SHAPES = ("256x256", "1024x1024")
FEWEST = 8  # requests for each that runs at a time; fewer are a trial
SLO_MS = {"ttft": 1000, "tpot": 25}
HELD_BACK = 0.5  # of the chunks of answers, in bursts: more is no stream
# Published output tokens a second with drafts, up to so many requests at a time: only for how long it may take.
ROUGH_TOK_S = {1: 88, 4: 139, 16: 367}
ROUGH_START_S = 300.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this bench; --drafts takes the place of the servers' own."""
    add = parser.add_argument_group("speed").add_argument
    add("--drafts", nargs="+", type=int, metavar="K", help="drafts a step that are compared; default: 0 1 2 3")
    add("--concurrency", nargs="+", type=int, default=list(CONCURRENCY), metavar="N",
        help="requests at a time; default: 1 4 16")  # fmt: skip
    add("--shapes", nargs="+", type=shape, default=[shape(each) for each in SHAPES], metavar="INxOUT",
        help=f"tokens of prompt and answer; default: {' '.join(SHAPES)}")  # fmt: skip
    add("--requests-per-concurrency", type=int, default=FEWEST, metavar="N",
        help="requests of a point for each that runs at a time; default and least: %(default)s")  # fmt: skip
    add("--slo-ttft-ms", type=float, default=SLO_MS["ttft"], metavar="MS",
        help="to the first token, of requests that goodput counts; default: %(default)s")  # fmt: skip
    add("--slo-tpot-ms", type=float, default=SLO_MS["tpot"], metavar="MS",
        help="a token after it, of those requests; default: %(default)s")  # fmt: skip
    add("--point-timeout", type=float, default=1800, metavar="S", help="for all of a point; default: %(default)s")


def shape(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not found or int(found[2]) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not tokens of a prompt x tokens of an answer, 256x256 say")
    return int(found[1]), int(found[2])


@dataclass
class Bench:
    """One run of the bench. `artifact`: the folder of the tokenizer, of whose `words` the prompts are."""

    arguments: argparse.Namespace
    client: Client
    artifact: Path
    words: Vocabulary

    @property
    def folder(self) -> Path:
        """For the client's files, while it runs."""
        return Path(os.path.abspath(self.arguments.reports)) / ".speed"

    @property
    def slo_ms(self) -> dict[str, float]:
        return {"ttft": self.arguments.slo_ttft_ms, "tpot": self.arguments.slo_tpot_ms}

    def prompts(self, point: Point, warm_up: bool = False) -> list[str]:
        """A point's prompts. They are those of its key without the drafts, so no two points of a server share any, and
        a cache of prefixes helps none."""
        count = point.concurrency * (1 if warm_up else requests_each(self.arguments))
        of = f"{self.arguments.seed}:{point.key.partition('/')[2]}:{'warm-up' if warm_up else 'measured'}"
        return workloads.random_prompts(self.words, point.input_tokens, count, of)

    def hashes(self, points: Sequence[Point]) -> dict[str, str]:
        """Of the prompts of one server's points, as the client reads them: key without drafts -> sha256."""
        texts = {point.key.partition("/")[2]: vllm_bench.lines(self.prompts(point)) for point in points}
        return {f"prompts/{key}": hashlib.sha256(text.encode()).hexdigest() for key, text in texts.items()}

    def begin(self, about: Mapping[str, Any], drafts: Sequence[int]) -> Measurement:
        arguments = self.arguments
        settings = {
            "drafts": list(drafts),
            "shapes": [f"{shape[0]}x{shape[1]}" for shape in arguments.shapes],
            "concurrency": arguments.concurrency,
            "requests_per_concurrency": requests_each(arguments),
            "warm_up": "before each point, as many other requests as run at a time",
            "client": "vllm bench serve",
            "slo_ms": self.slo_ms,
        }
        sampling = {"temperature": 0, "ignore_eos": True, "prompts": "random tokens"}
        return benching.begin(arguments, about, settings, sampling, self.hashes(self.points(0)))

    def points(self, drafts: int) -> list[Point]:
        return speed.points(drafts, self.arguments.shapes, self.arguments.concurrency)

    def server(self, opened: Measurement, at: Target, drafts: int) -> None:
        """Measures what is missing of a server's points. Raises UserError when it does not answer any more."""
        points = {point.key: point for point in self.points(drafts)}
        since = results.now()

        def one(key: str) -> Mapping[str, Any]:
            return {**self.point(at, points[key]), "server_since": since}

        with steps(f"speed, k={drafts}", len(points), "points", resumes=True) as progress:
            results.measured(opened, list(points), one, progress)

    def point(self, at: Target, point: Point) -> dict[str, Any]:
        """The figures of one point. Raises UserError for anything but whole answers to all requests in time."""
        limit_s = self.arguments.point_timeout
        fixed = (point.output_tokens, point.concurrency, self.slo_ms, self.arguments.seed)
        asked = Load(at.url, at.model, self.prompts(point), *fixed)
        before = Load(at.url, at.model, self.prompts(point, warm_up=True), *fixed)
        vllm_bench.warm_up(at.endpoint, before, min(limit_s, self.arguments.request_timeout))
        earlier = counts(at)
        if earlier.generated is not None:
            at.wait_until_idle()
            earlier = counts(at)
        result = vllm_bench.measure(self.client, asked, self.artifact, self.folder, at.key, limit_s)
        found = speed.figures(result, point, len(asked.prompts), self.slo_ms)
        return {**found, "acceptance": counts(at).since(earlier).acceptance}


def requests_each(arguments: argparse.Namespace) -> int:
    """Requests for each that runs at a time."""
    return int(arguments.limit or arguments.requests_per_concurrency)


def counts(at: Target) -> Counts:
    """The target's counters; none at a router's public address, which has no metrics."""
    try:
        return at.counts()
    except UserError:
        if at.endpoints[0].pinned:
            raise
        return Counts()


def check(arguments: argparse.Namespace) -> None:
    """Raises UserError for numbers that cannot be."""
    benching.check(arguments)
    again = "python -m scripts.bench speed --help"
    if arguments.requests_per_concurrency < FEWEST:
        fact = f"{arguments.requests_per_concurrency} requests for each at a time are too few for a figure"
        raise UserError(fact, f"for a trial: --limit {max(1, arguments.requests_per_concurrency)}")
    if arguments.url and arguments.drafts is not None:
        raise UserError("--drafts says which servers to start, --url that none is", "leave one of them out")
    if min(arguments.concurrency) < 1 or min(arguments.drafts or DRAFTS) < 0:
        raise UserError("a concurrency is at least 1, a number of drafts at least 0", again)
    if min(arguments.point_timeout, arguments.slo_ttft_ms, arguments.slo_tpot_ms) <= 0:
        raise UserError("times are above 0", again)
    arguments.concurrency = sorted(set(arguments.concurrency))
    arguments.shapes = list(dict.fromkeys(arguments.shapes))


def check_fits(arguments: argparse.Namespace, length: int | None) -> None:
    """Raises UserError for requests that are longer than what the model takes, in tokens."""
    for read, written in arguments.shapes:
        if length and read + written > length:
            fact = f"{read}x{written} are {read + written} tokens, and max-model-len is {length}"
            raise UserError(fact, f"other --shapes, or --set max-model-len={read + written}")


def plan_for(arguments: argparse.Namespace, drafts: int) -> Plan:
    """The deployment that `benching.served` starts."""
    return serve.plan_of(argparse.Namespace(**{**vars(arguments), **options_for(arguments, drafts)}))


def options_for(arguments: argparse.Namespace, drafts: int) -> dict[str, int]:
    return {"drafts": drafts, "replicas": arguments.replicas or 1}


def client_of(arguments: argparse.Namespace) -> Client:
    """Where `vllm bench serve` is: beside the server that is started; an address is asked from the same place."""
    plan = plan_for(arguments, 0) if not arguments.url else None
    if plan:
        return Client(plan.program, plan.image)
    folder = benching.programs(arguments)
    return Client(str(folder)) if folder else Client(image=definitions.resolve("serve"))


def run(arguments: argparse.Namespace) -> int:
    check(arguments)
    if arguments.dry_run:
        dry_run(arguments)
        return 0
    return measure_there(arguments) if arguments.url else measure_own(arguments)


def measure_own(arguments: argparse.Namespace) -> int:
    """One server after the other, each only if a point of it is missing."""
    benching.check_stopped(arguments)
    key = serve.read_key(arguments.api_key_file)
    drafts = sorted(set(arguments.drafts or DRAFTS))
    plan = plan_for(arguments, drafts[0])
    check_fits(arguments, plan.serving.max_model_len)
    bench = prepared(arguments, Path(plan.artifact))
    about = served_model.planned(plan, bench.client.version(bench.folder), dict(arguments.set))
    opened = bench.begin(about, drafts)
    for k in drafts:
        missing = [point.key for point in bench.points(k) if opened.part(point.key) is None]
        if not missing:
            continue
        if key:
            os.environ["API_KEY"] = key  # each server takes it away
        try:
            with benching.served(arguments, **options_for(arguments, k)) as at:
                bench.server(opened, at, k)
        except UserError as error:
            if not opened.content["parts"] and not opened.content["failures"]:
                raise  # not even the first server starts
            # Another number of drafts may do.
            for each in missing:
                if opened.part(each) is None and each not in opened.content["failures"]:
                    opened.fail(each, error)
    return concluded(bench, opened)


def measure_there(arguments: argparse.Namespace) -> int:
    """The server at --url."""
    with benching.served(arguments) as at:
        check_fits(arguments, at.facts["max_model_len"])
        known = at.facts["artifact"]
        bench = prepared(arguments, Path(known["folder"] if known else arguments.artifact))
        if at.facts["drafts"] is None:
            at.facts["drafts"] = len(counts(at).accepted_at or ())
        opened = bench.begin(at.facts, [at.facts["drafts"]])
        try:
            bench.server(opened, at, at.facts["drafts"])
        except UserError as error:
            serve.say(f"speed: {at.url} does not answer any more: {error.fact}")
    return concluded(bench, opened)


def prepared(arguments: argparse.Namespace, artifact: Path) -> Bench:
    bench = Bench(arguments, client_of(arguments), Path(os.path.abspath(artifact)), workloads.vocabulary(artifact))
    shutil.rmtree(bench.folder, ignore_errors=True)
    make_folder(bench.folder)
    return bench


def concluded(bench: Bench, opened: Measurement) -> int:
    shutil.rmtree(bench.folder, ignore_errors=True)
    opened.content["summary"] = speed.summary(opened.content["parts"], bench.arguments.seed)
    if opened.content["parts"]:
        show(opened.content)
    return benching.conclude(opened)


COLUMNS = ("tokens", "n", "k", "TPOT", "p99", "TTFT", "tok/s", "good/s", "acc.", "x TPOT", "x tok/s", "pays")
ORDER = ("input_tokens", "output_tokens", "concurrency", "drafts")
GAINS = ("tpot_speedup", "throughput_ratio")


def show(content: Mapping[str, Any]) -> None:
    """The figures, point by point, and what they say together."""
    Console(width=None if sys.stdout.isatty() else 100).print(table(content))
    slo = content["settings"]["slo_ms"]
    serve.say(
        "n requests at a time, k drafts a step; TPOT and TTFT: medians, in ms; good/s: requests a second of at most\n"
        f"{slo['ttft']:g} ms to the first token and {slo['tpot']:g} ms a token; x: against no drafts, above 1 is better"
    )
    for drafts, drift in content["summary"]["drift"].items():
        if drift:
            told = f"{drift['tpot']:+.1%} ms a token, {drift['throughput']:+.1%} tok/s"
            serve.say(f"drift with {drafts} drafts, from the first point to the same in the end: {told}")
    for stop in content["summary"]["stops_paying"]:
        serve.say(stop["sentence"])
    if held := [(key, part["bursts"]) for key, part in content["parts"].items() if (part["bursts"] or 0) > HELD_BACK]:
        serve.say(
            f"{held[0][0]}: {held[0][1]:.0%} of the chunks came together with the one before. What lies between holds\n"
            "the stream back: TTFT is not the server's, and TPOT may not be."
        )


def table(content: Mapping[str, Any]) -> Table:
    """A row a point, without those that were measured again."""
    gains = {(each["drafts"], each["shape"], each["concurrency"]): each for each in content["summary"]["comparisons"]}
    drawn = Table(box=None, pad_edge=False)
    for place, column in enumerate(COLUMNS):
        drawn.add_column(column, justify="left" if place == 0 else "right", no_wrap=True)
    order = sorted(content["parts"].values(), key=lambda part: [part[name] for name in ORDER])
    for part in [part for part in order if not part["again"]]:
        where = f"{part['input_tokens']}x{part['output_tokens']}"
        gain = gains.get((part["drafts"], where, part["concurrency"]))
        drawn.add_row(
            where,
            str(part["concurrency"]),
            str(part["drafts"]),
            f"{part['tpot_ms']['median']:.2f}",
            f"{part['tpot_ms']['p99']:.2f}",
            f"{part['ttft_ms']['median']:.0f}",
            f"{part['output_tok_s']:.1f}",
            f"{part['goodput_request_s']:.2f}",
            "-" if part["acceptance"] is None else f"{part['acceptance']:.0%}",
            *([f"{gain[name]['value']:.2f}x" for name in GAINS] if gain else ("", "")),
            gain["pays"] if gain else "",
        )
    return drawn


def dry_run(arguments: argparse.Namespace) -> None:
    """Says what would be measured, and how long that would take at the published speed."""
    drafts = [] if arguments.url else sorted(set(arguments.drafts or DRAFTS))
    which = f"a server each with {speed.listed(drafts)} drafts a step" if drafts else arguments.url
    serve.say(f"{which}, at these points, input x output tokens/c<requests at a time>:")
    seconds = ROUGH_START_S if drafts else 0.0
    requests = tokens = 0
    for point in speed.points(0, arguments.shapes, arguments.concurrency):
        warm, count = point.concurrency, point.concurrency * requests_each(arguments)
        rate = next((rate for most, rate in ROUGH_TOK_S.items() if warm <= most), max(ROUGH_TOK_S.values()))
        requests, tokens = requests + count, tokens + count * point.output_tokens
        seconds += (count + warm) * point.output_tokens / rate
        serve.say(f"  {point.key.partition('/')[2]:<24} {count:>5} requests, {warm} before them to warm up")
    servers = max(1, len(drafts))
    start = f", {ROUGH_START_S / 60:.0f} of them to start each server" if drafts else ""
    serve.say(f"{servers * requests:,} requests, {servers * tokens:,} tokens of answers")
    serve.say(f"about {servers * seconds / 60:.0f} minutes at the published speed{start}")
