"""Serves an artifact as replicas behind the router, kills one of them under load, and says what became of each request.

    python -m benchmarks.serve_replicas --artifact scratch/bench/artifact --out benchmarks/results/replicas-h100 \\
        --serve --backend cuda --runtime host --program .venv-serve/bin --replicas 2

What follows --serve goes to `scripts.serve up`. First the load alone, then the same with a replica killed in it, then,
once that replica is ready again, the load once more. --out gets a .json. Exit code 1 when a request failed whose answer
had not begun, or the replica does not come back.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.clients import Outcome, ask_all, kill, message, processes
from benchmarks.machine import machine
from scripts.cli import parser_for
from v4forge.errors import UserError, run_main
from v4forge.files import write_json
from v4forge.serving import status
from v4forge.serving.deployment import Deployment

POLL_S = 1.0


def program(command: str, folder: Path, *words: str) -> None:
    """A command of scripts.serve. Raises UserError when it fails."""
    done = subprocess.run([sys.executable, "-m", "scripts.serve", command, "--folder", str(folder), *words])
    if done.returncode:
        raise UserError(f"scripts.serve {command} ended with code {done.returncode}", "see its output above")


def loaded(
    deployment: Deployment, requests: int, tokens: int, meanwhile: Callable[[], None] | None = None
) -> dict[str, Any]:
    """Chats at once, streamed and whole in turn, and what became of them."""
    asked = [message(f"tale {number}", tokens, stream=number % 2 == 0) for number in range(requests)]
    begun = time.monotonic()
    outcomes = ask_all(deployment.url, asked, deployment.key, meanwhile)
    return {**told(outcomes), "elapsed_s": time.monotonic() - begun, "requests": requests, "tokens": tokens}


def told(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Counts: whole answers by replica, answers broken off, and requests that failed before their first token."""
    whole = [outcome for outcome in outcomes if outcome.whole]
    broken = [outcome for outcome in outcomes if not outcome.whole]
    return {
        "whole": len(whole),
        "whole_by_replica": {
            name: sum(o.replica == name for o in whole) for name in sorted({o.replica for o in whole})
        },
        "broken_off": sum(bool(outcome.text) for outcome in broken),
        "failed_before_a_token": sum(not outcome.text for outcome in broken),
        "errors": sorted({outcome.error or str(outcome.status) for outcome in broken}),
    }


def ready(deployment: Deployment) -> list[bool]:
    """Which replicas answer."""
    return [status.read(deployment, number) is not None for number in range(deployment.replicas)]


def arguments() -> argparse.Namespace:
    words, serve = sys.argv[1:], []
    if "--serve" in words:
        at = words.index("--serve")
        words, serve = words[:at], words[at + 1 :]
    parser = parser_for("serve_replicas", __doc__)
    parser.prog = "python -m benchmarks.serve_replicas"
    add = parser.add_argument
    add("--artifact", type=Path, required=True, metavar="DIR", help="what to serve")
    add("--out", type=Path, required=True, metavar="FILE", help="gets FILE.json")
    add("--folder", type=Path, default=Path("scratch/serve-replicas"), metavar="DIR", help="of the deployment")
    add("--requests", type=int, default=64, help="at once (default: %(default)s)")
    add("--tokens", type=int, default=256, help="of an answer (default: %(default)s)")
    add("--strike-after", type=float, default=2.0, metavar="S", help="of the load's start (default: %(default)s)")
    add("--limit", type=float, default=300.0, metavar="S", help="for the replica's return (default: %(default)s)")
    found = parser.parse_args(words)
    found.serve = serve
    return found


def main() -> int:
    args = arguments()
    program("up", args.folder, "--artifact", str(args.artifact.absolute()), *args.serve)
    try:
        found = measured(args)
    finally:
        program("stop", args.folder)
    found = {
        "command": "python -m benchmarks.serve_replicas --serve " + " ".join(args.serve),
        **machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        **found,
    }
    ok = found["back_after_s"] is not None and found["struck"]["failed_before_a_token"] == 0
    ok = ok and all(found[name]["whole"] == args.requests for name in ("before", "after"))
    found["within"] = ok
    write_json(args.out.with_name(args.out.name + ".json"), found)
    print(json.dumps(found, indent=1))
    return 0 if ok else 1


def measured(args: argparse.Namespace) -> dict[str, Any]:
    deployment = Deployment.load(args.folder)
    assert deployment
    victim = deployment.replicas - 1
    struck: list[float] = []

    def strike() -> None:
        time.sleep(args.strike_after)
        killed = processes(deployment.replica_port(victim))
        kill(killed)
        struck.append(time.monotonic())
        print(f"killed replica {victim}: {len(killed)} processes", flush=True)

    found: dict[str, Any] = {
        "replicas": deployment.replicas,
        "tensor_parallel": deployment.serving.tensor_parallel,
        "drafts": deployment.serving.drafts,
        "gpus": deployment.gpus,
        "before": loaded(deployment, args.requests, args.tokens),
    }
    found["struck"] = loaded(deployment, args.requests, args.tokens, strike)
    found["back_after_s"] = None
    while time.monotonic() - struck[0] < args.limit:
        if all(ready(deployment)):
            found["back_after_s"] = time.monotonic() - struck[0]
            break
        time.sleep(POLL_S)
    found["after"] = loaded(deployment, args.requests, args.tokens)
    return found


if __name__ == "__main__":
    run_main(main)
