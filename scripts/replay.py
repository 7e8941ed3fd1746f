"""Makes an artifact again from its manifest and compares: every layer as soon as it is finished, then every file.

    python -m scripts.replay scratch/tiny/artifact/manifest.json --profile tiny

Settings, seed and number of tokens are the manifest's; source and corpus must have its hashes. On the same model of
processor or GPU, with the same versions and code, everything must have the same bytes. Elsewhere it says first what is
another, and holds every layer to the stated tolerance. It stops at the first difference, with layer, expert and matrix.
It works in a folder of its own, <scratch>/replay-<manifest>; the same command goes on after a stop.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import replace as changed
from pathlib import Path

from v4forge.artifact_folder import MANIFEST
from v4forge.errors import UserError, run_main
from v4forge.files import read_json
from v4forge.model.hub_rows import named
from v4forge.pipeline.stages import CALIBRATE, PROFILES, STAGES, Stage
from v4forge.quantization.layer_files import FINGERPRINT
from v4forge.verification import reproduce

from . import stage
from .cli import parser_for

ORIGINAL = "original"  # folder of the work folder: the manifest, and what lies beside it
FILES_SHOWN = 8


def table_of(original: reproduce.Original, device: str) -> dict[str, Stage]:
    """The stages, with the manifest's settings."""
    made = original.settings
    words: list[str | tuple[str, str]] = ["--work", "{work}/layers", "--method", made.method, "--scales", made.scales]
    words += ["--engine", made.engine]
    words += ["--dampening", repr(made.dampening), "--micro-batch-tokens", str(made.micro_batch_tokens)]
    words += ["--threads", str(made.threads), "--compare", f"{{work}}/{ORIGINAL}/{MANIFEST}"]
    words += ["--calibrate-all-experts"] if made.experts == "all" else []
    words += ["--device", device] if device else []
    return {**STAGES, "calibrate": changed(STAGES["calibrate"], arguments=(*words, *CALIBRATE))}


def work_scratch(scratch: str, manifest: Path) -> str:
    """Where a manifest's replay works, by the manifest's content."""
    return f"{scratch.rstrip('/')}/replay-{hashlib.sha256(manifest.read_bytes()).hexdigest()[:12]}"


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_for("replay", __doc__)
    add = parser.add_argument
    add("manifest", type=Path, metavar="MANIFEST", help="manifest.json of an artifact, best where it lies")
    add("--scratch", default="scratch", metavar="DIR", help="default: %(default)s")
    add("--profile", default="tiny", choices=sorted(PROFILES), help="whose source and corpus (default: %(default)s)")
    add("--source", metavar="DIR", help="the upstream checkpoint (default: the profile's)")
    add("--corpus", metavar="FILE", help="the calibration text (default: the profile's)")
    add("--runtime", choices=("", "host", "docker"), default="", help="default: host for tiny, docker for flash")
    add("--gpus", type=int, default=1, help="processes of calibrate, each on a GPU if there are any")
    add("--dry-run", action="store_true", help="say what would run and why, with its command, and stop")
    add("--device", default="", help="cpu, where there are GPUs and the manifest is of a processor")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments_of(argv)
    original = reproduce.load(args.manifest)
    profile = PROFILES[args.profile]
    source = args.source or profile.source or f"{args.scratch.rstrip('/')}/{args.profile}/upstream"
    of_hub = reproduce.data_set(original)
    text = args.corpus or (of_hub.argument if of_hub else profile.corpus)
    reproduce.check_corpus(original, named(text) if text else None)
    if not Path(source, "config.json").is_file():
        again = "" if args.profile == "tiny" else f" PROFILE={args.profile}"
        raise UserError(f"{source} is no checkpoint", f"make fetch{again}, or make reproduce … SOURCE=<folder>")
    scratch = work_scratch(args.scratch, args.manifest)
    work = Path(scratch, args.profile)
    if not args.dry_run:
        reproduce.copied(original, work / ORIGINAL)
    print(f"replay: {args.manifest}, in {work}", flush=True)
    words = ["run", "calibrate", "postprocess", "--title", "reproduce", "--scratch", scratch]
    words += ["--profile", args.profile, "--source", source]
    words += ["--recipe", original.settings.recipe, "--runtime", args.runtime, "--gpus", str(args.gpus)] + (
        ["--corpus", text] if text else []
    )
    if corpus := original.corpus:
        sizes = {"--samples": corpus["samples"], "--seq-len": corpus["seq_len"], "--seed": corpus["seed"]}
        words += [word for name, value in sizes.items() for word in (name, str(value))]
        words += ["--bad-text", "replace"] if corpus["origin"].get("bad_text") == "replace" else []
    words += ["--dry-run"] if args.dry_run else []
    code = stage.main(words, table_of(original, args.device), program="replay")
    if code or args.dry_run:
        return code
    return verdict(original, work, args.gpus)


def verdict(original: reproduce.Original, work: Path, gpus: int) -> int:
    """Says how the files compare -> 0 when all are as they must be, else 1."""
    artifact = work / "artifact"
    mark = read_json(work / "layers" / FINGERPRINT)
    reproduce.check_inputs(original, mark)
    reasons = reproduce.differences(original, mark, gpus)
    differing = reproduce.file_differences(original, artifact)
    allowed = reproduce.layer_shards(artifact) if reasons else set()
    count = len(original.content["files"])
    if not differing:
        print(f"replay: identical, all {count} files have the same bytes")
        return 0
    for name, (there, here) in list(differing.items())[:FILES_SHOWN]:
        print(f"{name}: sha256 {there} there, {here} here{'' if name in allowed else ': it must be the same'}")
    if wrong := sorted(set(differing) - allowed):
        print(f"replay: DIFFERENT, {len(wrong)} of {count} files that must be the same, {wrong[0]} first")
        return 1
    print(f"replay: within the stated tolerance; {count - len(differing)} of {count} files have the same bytes")
    print("".join(f"byte identity is not promised: {line}\n" for line in reasons), end="")
    return 0


if __name__ == "__main__":
    run_main(main)
