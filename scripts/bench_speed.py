"""TTFT, TPOT, ITL, output throughput and goodput, with drafts and without, by shape of requests and concurrency.

For each number of drafts a server of one replica is started, measured with `vllm bench serve` and stopped; the server
without drafts comes first. Prompts are random tokens, the same for every server and no two the same; answers are greedy
and always of full length. Before each point as many other requests as run at a time warm the server up. Each server's
first point is measured once more in the end, which tells how far it drifted.

With --url, what is served there is measured, and nothing compared.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from v4forge.bench import speed
from v4forge.bench.measure_speed import Options, measure_own, measure_there
from v4forge.bench.session import conclude
from v4forge.bench.terms import TERMS
from v4forge.errors import UserError
from v4forge.serving.launch import say

from . import benching

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
    parser.set_defaults(drafts=None)
    add = parser.add_argument_group("speed").add_argument
    add("--drafts", dest="compared", nargs="+", type=int, metavar="K",
        help="k, num_speculative_tokens, of the servers that are compared; default: 0 1 2 3")  # fmt: skip
    add("--concurrency", nargs="+", type=int, default=list(CONCURRENCY), metavar="N",
        help="requests that run at a time; default: 1 4 16")  # fmt: skip
    add("--request-rate", nargs="+", type=float, default=[], metavar="R",
        help="and open loops: requests a second, no matter when earlier ones end; default: none")  # fmt: skip
    add("--shapes", nargs="+", type=shape, default=[shape(each) for each in SHAPES], metavar="INxOUT",
        help=f"tokens of prompt and answer; default: {' '.join(SHAPES)}")  # fmt: skip
    add("--requests-per-concurrency", type=int, default=FEWEST, metavar="N",
        help="requests of a point for each that runs at a time; default and least: %(default)s")  # fmt: skip
    add("--slo-ttft-ms", type=float, default=SLO_MS["ttft"], metavar="MS",
        help="time to first token of requests that goodput counts; default: %(default)s")  # fmt: skip
    add("--slo-tpot-ms", type=float, default=SLO_MS["tpot"], metavar="MS",
        help="time per output token of those requests; default: %(default)s")  # fmt: skip
    add("--point-timeout", type=float, default=1800, metavar="S", help="for all of a point; default: %(default)s")


def shape(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not found or int(found[2]) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not tokens of a prompt x tokens of an answer, 256x256 say")
    return int(found[1]), int(found[2])


def options_of(arguments: argparse.Namespace) -> Options:
    """Which points the options ask for."""
    return Options(
        shapes=list(dict.fromkeys(arguments.shapes)),
        concurrency=sorted(set(arguments.concurrency)),
        requests_each=int(arguments.limit or arguments.requests_per_concurrency),
        slo_ms={"ttft": arguments.slo_ttft_ms, "tpot": arguments.slo_tpot_ms},
        point_limit_s=arguments.point_timeout,
        answer_limit_s=arguments.request_timeout,
        rates=sorted(set(arguments.request_rate)),
    )


def drafts_of(arguments: argparse.Namespace) -> list[int]:
    """The servers that are compared; none for one at an address."""
    return [] if arguments.url else sorted(set(arguments.compared or DRAFTS))


def check(arguments: argparse.Namespace) -> None:
    """Raises UserError for numbers that cannot be."""
    benching.check(arguments)
    again = "python -m scripts.bench speed --help"
    if arguments.requests_per_concurrency < FEWEST:
        fact = f"{arguments.requests_per_concurrency} requests for each at a time are too few for a figure"
        raise UserError(fact, f"for a trial: --limit {max(1, arguments.requests_per_concurrency)}")
    if arguments.url and arguments.compared is not None:
        raise UserError("--drafts says which servers to start, --url that none is", "leave one of them out")
    if min(arguments.concurrency) < 1 or min(arguments.compared or DRAFTS) < 0:
        raise UserError("a concurrency is at least 1, a number of drafts at least 0", again)
    if min(arguments.point_timeout, arguments.slo_ttft_ms, arguments.slo_tpot_ms) <= 0:
        raise UserError("times are above 0", again)
    if not all(0 < rate < math.inf for rate in arguments.request_rate):
        raise UserError("a request rate is above 0, in requests a second", "--request-rate 0.5 1 2")


def run(arguments: argparse.Namespace) -> int:
    check(arguments)
    options, drafts = options_of(arguments), drafts_of(arguments)
    if arguments.dry_run:
        dry_run(options, drafts, arguments.url)
        return 0
    session = benching.session_of(arguments)
    opened = measure_own(session, options, drafts) if drafts else measure_there(session, options)
    if opened.content["parts"]:
        show(opened.content)
    return conclude(opened)


COLUMNS = ("tokens", "n", "k", "TPOT", "p99", "TTFT", "tok/s", "good/s", "acc.", "x TPOT", "x tok/s", "pays")
GAINS = ("tpot_speedup", "throughput_ratio")


def show(content: Mapping[str, Any]) -> None:
    """The figures, point by point, and what they say together."""
    Console(width=None if sys.stdout.isatty() else 100).print(table(content))
    slo = content["settings"]["slo_ms"]
    say(
        f"TPOT: {TERMS['TPOT']}\nTTFT: {TERMS['TTFT']}; both medians, in ms\n"
        f"n: concurrency, or requests a second; k: {TERMS['k']}\n"
        f"good/s: goodput, requests a second with TTFT up to {slo['ttft']:g} ms and TPOT up to {slo['tpot']:g} ms\n"
        "acc.: acceptance rate; x: against k=0, above 1 is better"
    )
    for drafts, drift in content["summary"]["drift"].items():
        if drift:
            told = f"{drift['tpot']:+.1%} TPOT, {drift['throughput']:+.1%} tok/s"
            say(f"drift with k={drafts}, from the first point to the same in the end: {told}")
    for stop in content["summary"]["stops_paying"]:
        say(stop["sentence"])
    if held := [(key, part["bursts"]) for key, part in content["parts"].items() if (part["bursts"] or 0) > HELD_BACK]:
        say(
            f"{held[0][0]}: {held[0][1]:.0%} of the chunks came together with the one before. What lies between holds\n"
            "the stream back: TTFT is not the server's, and TPOT may not be."
        )


def table(content: Mapping[str, Any]) -> Table:
    """A row a point, without those that were measured again."""
    gains = {(each["drafts"], each["shape"], each["concurrency"]): each for each in content["summary"]["comparisons"]}
    drawn = Table(box=None, pad_edge=False)
    for place, column in enumerate(COLUMNS):
        drawn.add_column(column, justify="left" if place == 0 else "right", no_wrap=True)
    order = sorted(content["parts"].values(), key=speed.place)
    for part in [part for part in order if not part["again"]]:
        where = f"{part['input_tokens']}x{part['output_tokens']}"
        gain = gains.get((part["drafts"], where, part["concurrency"]))
        drawn.add_row(
            where,
            f"{part['request_rate']:g}/s" if speed.is_open(part) else str(part["concurrency"]),
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


def dry_run(options: Options, drafts: Sequence[int], url: str) -> None:
    """Says what would be measured, and how long that would take at the published speed."""
    which = f"a server each with k = {speed.listed(drafts)}" if drafts else url
    say(f"{which}, at these points, input x output tokens/c<concurrency> or r<requests a second>:")
    seconds = ROUGH_START_S if drafts else 0.0
    requests = tokens = 0
    for point in options.points(0):
        warm = options.together(point)
        count = warm * options.requests_each
        rate = next((rate for most, rate in ROUGH_TOK_S.items() if warm <= most), max(ROUGH_TOK_S.values()))
        requests, tokens = requests + count, tokens + count * point.output_tokens
        seconds += max((count + warm) * point.output_tokens / rate, count / (point.request_rate or math.inf))
        say(f"  {point.key.partition('/')[2]:<24} {count:>5} requests, {warm} before them to warm up")
    servers = max(1, len(drafts))
    start = f", {ROUGH_START_S / 60:.0f} of them to start each server" if drafts else ""
    say(f"{servers * requests:,} requests, {servers * tokens:,} tokens of answers")
    say(f"about {servers * seconds / 60:.0f} minutes at the published speed{start}")
