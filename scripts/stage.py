"""Runs stages of the pipeline, each only when its inputs, settings, pins or code changed; the Makefile calls it.

python -m scripts.stage run calibrate postprocess --profile tiny --scratch scratch
python -m scripts.stage why calibrate --profile tiny --scratch scratch
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from v4forge import makefile
from v4forge.checkout import ROOT
from v4forge.checkpoint.recipe import INT4, RECIPES
from v4forge.errors import Parser, UserError, run_main
from v4forge.files import check_writable, exclusive
from v4forge.model import corpus_rows, hub_rows
from v4forge.pipeline import estimate, events, explain, run_state
from v4forge.pipeline.run_state import lock_file
from v4forge.pipeline.runner import READ_ONLY, Runner, StageFailed, say
from v4forge.pipeline.stages import DEEP, PROFILES, STAGES, Stage


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What the templates of STAGES and FILES are filled with: the profile's values, then the user's."""
    profile = PROFILES[args.profile]
    values: dict[str, Any] = dataclasses.asdict(profile)
    for key in ("source", "corpus", "heldout", "samples", "seq_len", "runtime"):
        if getattr(args, key) not in (None, ""):
            values[key] = getattr(args, key)
    values |= {"profile": args.profile, "seed": args.seed, "gpus": args.gpus, "from": args.from_ or ""}
    values |= {"recipe": args.recipe, "data_set": "", "bad_text": args.bad_text or "", "deep": args.deep}
    if values["corpus"].startswith(hub_rows.PREFIX):  # said to be wrong before anything is downloaded
        values |= {"data_set": hub_rows.parsed(values["corpus"]).argument, "corpus": ""}
    values["work"] = f"{args.scratch.rstrip('/')}/{args.profile}"
    values["source"] = values["source"] or f"{values['work']}/upstream"
    if values["runtime"] == "docker":  # a program there has another working folder
        for key in ("work", "from", *READ_ONLY):
            values[key] = values[key] and os.path.abspath(values[key])
    return values


def parse(argv: Sequence[str] | None, names: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m scripts.stage", description=__doc__)
    parser.add_argument("action", choices=("run", "why"))
    parser.add_argument("stages", nargs="+", metavar="stage", help=", ".join(names))
    parser.add_argument("--profile", default="tiny", choices=sorted(PROFILES), help="default: %(default)s")
    parser.add_argument("--scratch", default="scratch", help="where everything is written (default: %(default)s)")
    parser.add_argument("--title", default="", help="name of the whole: one line when nothing of it has to run")
    parser.add_argument("--next", default="", help="said at the end, below the report: the command that comes next")
    parser.add_argument("--runtime", choices=("", "host", "docker"), help="default: host for tiny, docker for flash")
    parser.add_argument("--gpus", type=int, default=1, help="processes of calibrate, each on a GPU if there are any")
    parser.add_argument("--source", help="another upstream checkpoint than the profile's")
    parser.add_argument("--from", dest="from_", metavar="DIR", help="a folder that fetch takes the checkpoint from")
    parser.add_argument(
        "--corpus",
        help=f"another calibration text than the profile's: .jsonl, .txt, either also .gz, or {hub_rows.FORM}",
    )
    parser.add_argument("--bad-text", choices=corpus_rows.BAD_TEXT, help="what becomes of what is no text in it")
    parser.add_argument("--heldout", help="another text to evaluate on than the profile's")
    parser.add_argument("--deep", type=int, default=DEEP, help="tokens of it (default: %(default)s)")
    parser.add_argument("--samples", type=int, help="calibration samples")
    parser.add_argument("--seq-len", type=int, help="tokens in a sample")
    parser.add_argument("--seed", type=int, default=42, help="default: %(default)s")
    kinds = "; ".join(f"{name}: {what}" for name, what in RECIPES.items())
    parser.add_argument("--recipe", choices=tuple(RECIPES), default=INT4, help=f"{kinds} (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="say what would run and why, with its command, and stop")
    args = parser.parse_args(argv)
    if args.gpus < 1:
        parser.error(f"argument --gpus: {args.gpus} is not a number of GPUs")
    for name in args.stages:
        if name not in names:
            parser.error(f"no stage {name!r}; there are: {', '.join(names)}")
    return args


def again(args: argparse.Namespace) -> str:
    """The command that goes on with this run, as its user gave it: make passes on the variables of its command line."""
    words = os.environ.get("MAKEFLAGS", "").partition(" -- ")[2]
    if "MAKELEVEL" in os.environ:
        return f"make {args.title or ' '.join(args.stages)} {words}".rstrip()
    return f"python -m scripts.{args.program} {shlex.join(sys.argv[1:])}"


def fetch_options(args: argparse.Namespace) -> list[str]:
    """This run's options for a process that only downloads."""
    given = {"--profile": args.profile, "--scratch": args.scratch, "--runtime": args.runtime, "--from": args.from_}
    return [word for name, value in given.items() if value for word in (name, value)]


def run_all(args: argparse.Namespace, runner: Runner, lock: int) -> int:
    """Runs the stages in order, `fetch` beside the first one that can begin on a part of the source -> exit code.

    However it ends early, the download beside it ends too.
    """
    names, name = args.stages, ""
    overlapping = "fetch" in names and any(runner.table[name].streams for name in names)
    try:
        for name in names:
            if not (name == "fetch" and overlapping and runner.begin_fetch(fetch_options(args))):
                runner.run(name, lock)
        runner.end_fetch()
    except StageFailed as failed:
        return failed.code
    except UserError as error:
        events.emit("failed", name, fact=error.fact)
        raise
    except KeyboardInterrupt:
        runner.stop_fetch()
        print(f"\nstopped; what is finished is kept. To go on: {again(args)}", file=sys.stderr, flush=True)
        return 130
    finally:
        runner.stop_fetch()
    return 0


def main(
    argv: Sequence[str] | None = None,
    table: Mapping[str, Stage] = STAGES,
    root: Path = ROOT,
    program: str = "stage",
) -> int:
    """Runs or explains stages of a table -> exit code; `program` of scripts/ is the one that its user called."""
    args = parse(argv, list(table))
    args.program = program
    values = settings_of(args)
    locked = lock_file(Path(values["work"]), args.stages)
    runner = Runner(values, table, root, locked)
    if args.action == "why" or args.dry_run:
        lines = (
            explain.dry_run(runner, args.stages)
            if args.dry_run
            else [line for name in args.stages for line in explain.why(runner, name)]
        )
        print("\n".join(lines))
        if runner.work.is_dir():
            with suppress(UserError):  # somebody else's folder
                runner.digests.save()
        return 0

    check_writable(runner.work)
    with ExitStack() as held:
        lock = held.enter_context(exclusive(locked, lambda: busy(runner)))
        held.enter_context(ending_on_sigterm())
        held.callback(lambda: runner.digests.save())
        if events.VARIABLE in os.environ:  # a part of a run that tells of itself
            code = run_all(args, runner, lock)
        else:
            held.enter_context(events.told(runner.work))
            code = told_run(args, runner, lock)
    return code


def told_run(args: argparse.Namespace, runner: Runner, lock: int) -> int:
    """A whole run, with its events, and at its end what was estimated beside what it took."""
    estimates = estimate.of_run(args.stages, runner.values, runner.work, args.gpus)
    seconds = {each.stage: each.seconds for each in estimates}
    others = ["fetch"] if args.stages != ["fetch"] else []
    if not run_state.lives(runner.work, others):
        events.make_room(runner.work)
    events.emit("run", "", stages=args.stages, title=args.title, command=again(args), estimates=seconds)
    code = 1
    try:
        code = run_all(args, runner, lock)
    except SystemExit as stopped:
        code = int(stopped.code or 0)
        raise
    finally:
        events.emit("run-end", "", code=code)
    if code:
        return code
    idle = args.title and not runner.seconds
    if idle:
        say(f"{args.title}: nothing to do, everything is up to date")
    else:
        runner.say_unsaid()
        for line in estimate.compared(estimates, runner.seconds) if args.title else ():
            say(line)
    if args.next:
        from scripts import report

        if idle:
            report.show_again(runner.work)
        say(f"open: {report.address(runner.work)}\nnext: {makefile.completed(args.next)}")
    return 0


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """Within the block SIGTERM ends the run as Ctrl-C does: the download beside it too, and its end is told."""
    if threading.current_thread() is not threading.main_thread():  # which alone may say so
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def busy(runner: Runner) -> UserError:
    status = f"make status{runner.profile_word}"
    hint = f"wait for it ({status}), or give this run a folder of its own: make … SCRATCH=<folder>"
    return UserError(f"another run is writing to {runner.work}", hint)


if __name__ == "__main__":
    run_main(main)
