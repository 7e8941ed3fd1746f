"""How far from the same pass in F32 throughout is our forward of a checkpoint, and is vLLM with each MoE kernel?

    python -m benchmarks.precision                                  # ours, of models/tiny
    python -m benchmarks.precision --artifact scratch/tiny/artifact --moe humming marlin --out FILE

Over held-out text, every token's whole distribution: KL from the F32 pass in nats, and the share of equal most likely
tokens. A server is asked for the log-probabilities of its prompt, one start for each MoE kernel, without drafts. The
interval is over sequences; the last rows compare the kernels with one another, sequence by sequence.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.machine import machine
from benchmarks.serve import option
from benchmarks.serve_client import Server
from scripts.cli import parser_for
from v4forge.artifact_folder import MANIFEST
from v4forge.checkout import ROOT
from v4forge.checkpoint.reader import Checkpoint
from v4forge.errors import UserError, run_main
from v4forge.files import write_json
from v4forge.intervals import Estimate
from v4forge.model import deepseek_v4, heldout
from v4forge.model.evaluation import divergence, mean
from v4forge.serving.settings import DRAFTS, TENSOR_PARALLEL, serving

TINY = ROOT / "models" / "tiny"
CALM = 0.99  # share of the tokens, without those of which a layer's experts are others: these have most of the mean
AT_A_TIME = 4  # sequences of a pass


@dataclass(frozen=True)
class Distance:
    """From another pass, over all tokens: KL in nats, [sequences, seq] f64, and equal most likely tokens, 1 or 0."""

    kl: Tensor
    same: Tensor

    @classmethod
    def between(cls, reference: Tensor, other: Tensor) -> Distance:
        """Of log-probabilities, [sequences, seq, vocab] f64."""
        return cls(divergence(reference, other), (reference.argmax(-1) == other.argmax(-1)).double())

    @property
    def mean(self) -> float:
        return float(self.kl.mean())

    @property
    def agreement(self) -> float:
        return float(self.same.mean())

    @property
    def calm_mean(self) -> float:
        """Of the tokens that are nearest."""
        nearest = self.kl.flatten().sort().values
        return float(nearest[: int(CALM * len(nearest))].mean())

    def figures(self) -> tuple[Estimate, Estimate]:
        """Mean KL and the share of equal tokens, with 95% intervals over sequences."""
        return mean(self.kl).interval(), mean(self.same).interval()

    def json(self) -> dict[str, Any]:
        kl, same = self.figures()
        return {"kl": kl.json(), "same": same.json(), "median": float(self.kl.median()), "calm_mean": self.calm_mean}


@torch.no_grad()
def log_probabilities(checkpoint: Checkpoint, tokens: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """tokens: [sequences, seq] -> [sequences, seq, vocab] f64 on the CPU, of a pass whose compute dtype is `dtype`."""
    config, weights = deepseek_v4.hf_config(checkpoint.config), deepseek_v4.Weights(checkpoint, device, dtype)
    root, rotary = deepseek_v4.load_root(weights, config), deepseek_v4.Rotary(config, device, dtype)
    texts = tokens.to(device).split(AT_A_TIME)
    contexts = [rotary.context(text) for text in texts]
    streams = [deepseek_v4.embed(root, config, text) for text in texts]
    for index in checkpoint.config.layers:
        layer = deepseek_v4.load_layer(weights, config, index)
        streams = [deepseek_v4.run_layer(layer, each, context) for each, context in zip(streams, contexts, strict=True)]
    return torch.cat([root.final(each, root.head).double().log_softmax(-1).cpu() for each in streams])


def served(server: Server, tokens: Tensor, vocabulary: int) -> Tensor:
    """What a server says of each token of its prompts: [sequences, seq - 1, vocab] f64."""

    def one(prompt: list[int]) -> Tensor:
        asked = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "prompt_logprobs": -1}
        (choice,) = server.post("/v1/completions", asked)["choices"]
        _, *places = choice["prompt_logprobs"]
        found = torch.full((len(places), vocabulary), -torch.inf, dtype=torch.float64)
        for row, place in zip(found, places, strict=True):
            ids = torch.tensor([int(token) for token in place])
            row[ids] = torch.tensor([told["logprob"] for told in place.values()], dtype=torch.float64)
        if not bool(found.isfinite().all()):
            raise UserError("the server did not give all log-probabilities", f"see {server.log}")
        return found

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        return torch.stack(list(pool.map(one, tokens.tolist())))


def kernels(args: argparse.Namespace, tokens: Tensor, vocabulary: int) -> dict[str, Tensor]:
    """Each MoE kernel's log-probabilities, one server after the other. Says what the server was told."""
    found = {}
    for kernel in args.moe:
        told = dict(args.set) | {DRAFTS: "0", TENSOR_PARALLEL: "1", "moe-backend": kernel, "max-logprobs": "-1"}
        settings = serving(args.profile, args.backend, told)
        log = args.logs / f"precision-{kernel}.log"
        server = Server(shlex.split(args.vllm), args.artifact, settings, [0], log, args.cache)
        try:
            server.start()
            if not server.wait(args.limit):
                raise UserError(f"the server with {kernel} {server.failure}", f"see {log}")
            found[kernel] = served(server, tokens, vocabulary)
            print(f"{kernel}: served, ready after {server.found['ready_s']:.0f} s", flush=True)
        finally:
            server.stop()
    return found


def rows(exact: Tensor, others: dict[str, Tensor]) -> dict[str, Distance]:
    """Each from the F32 pass, then each pair of servers from one another."""
    found = {name: Distance.between(exact[:, : each.shape[1]], each) for name, each in others.items()}
    pairs = itertools.combinations([name for name in others if name != "ours"], 2)
    return found | {f"{a} from {b}": Distance.between(others[b], others[a]) for a, b in pairs}


def table(found: Iterable[tuple[str, Distance]]) -> Table:
    shown = Table("", "KL, nats (95%)", "nearest 99%", "same token (95%)")
    for name, each in found:
        kl, same = each.figures()
        likely = f"{same.value:.1%} ({same.low:.1%} to {same.high:.1%})"
        shown.add_row(name, f"{kl.value:.5f} ({kl.low:.5f} to {kl.high:.5f})", f"{each.calm_mean:.5f}", likely)
    return shown


def arguments() -> argparse.Namespace:
    parser = parser_for("precision", __doc__)
    parser.prog = "python -m benchmarks.precision"
    add = parser.add_argument
    add("--artifact", type=Path, default=TINY, metavar="DIR", help="artifact or source (default: models/tiny)")
    add("--out", type=Path, metavar="FILE", help="gets the figures as JSON")
    add("--moe", nargs="*", default=[], metavar="KERNEL", help="vLLM's MoE kernels to serve with: humming marlin")
    add("--sequences", type=int, default=48, help="of the text (default: %(default)s)")
    add("--seq-len", type=int, default=300, help="tokens of each (default: %(default)s)")
    add("--prompts", type=Path, default=TINY / "heldout.txt", metavar="FILE", help="text (default: models/tiny's)")
    add("--profile", default="published", help="of settings.toml (default: %(default)s)")
    add("--backend", default="cuda", help="of settings.toml (default: %(default)s)")
    add("--set", type=option, action="append", default=[], metavar="OPTION=VALUE", help="another value of a setting")
    add("--vllm", default="vllm", metavar="COMMAND", help="what starts vLLM (default: %(default)s)")
    add(
        "--cache", type=Path, default=Path("scratch/serve-cache"), metavar="DIR", help="what vLLM compiles is kept here"
    )
    add("--logs", type=Path, default=Path("scratch/serve-logs"), metavar="DIR", help="the servers' logs")
    add("--limit", type=float, default=480, metavar="S", help="for a start, in seconds (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of our forward")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    args.artifact, args.cache = args.artifact.absolute(), args.cache.absolute()
    form = "artifact" if (args.artifact / MANIFEST).exists() else "source"
    checkpoint, device = Checkpoint(args.artifact, form=form), torch.device(args.device)
    vocabulary = checkpoint.config.vocab_size
    tokens = heldout.tokens(args.artifact, args.prompts, args.sequences, args.seq_len, vocabulary)
    others = kernels(args, tokens, vocabulary)  # before ours: a server wants the GPU's memory
    exact, ours = (log_probabilities(checkpoint, tokens, dtype, device) for dtype in (torch.float32, torch.bfloat16))
    found = rows(exact, {"ours": ours, **others})
    Console(width=110).print(table(found.items()))
    if args.out:
        result = {
            "command": shlex.join(["python", "-m", "benchmarks.precision", *sys.argv[1:]]),
            **machine(device),
            "tokens": tokens.numel(),
            "from_f32": {name: each.json() for name, each in found.items()},
        }
        write_json(args.out, result)
        print(json.dumps(result["from_f32"]))
    return 0


if __name__ == "__main__":
    run_main(main)
