"""Builds, pushes and pulls the two images, and opens a shell in one; the Makefile calls it.

python -m scripts.image build calib serve     as v4forge-calib:local and v4forge-serve:local
python -m scripts.image push calib --to registry.example.org/v4forge
python -m scripts.image pull calib            by the digest in images.lock, checked against it
python -m scripts.image shell calib           as a stage sees it
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from v4forge.checkout import ROOT
from v4forge.errors import Parser, UserError, run_main
from v4forge.files import make_folder, write_text
from v4forge.images import archive, containers, definitions, registry
from v4forge.images import base as image_base
from v4forge.images import build as image_build
from v4forge.images.build import Build
from v4forge.images.jobs import Job

from . import env
from .cli import pair, parser_for, say

# What is known about an image, by the kind of document; below a folder of the image's name.
DOCUMENTS = {"sbom": "sbom.cdx.json", "provenance": "provenance.json"}
# Debian's and Ubuntu's.
PYTHONS = ("3.11", "3.12")


def build(arguments: argparse.Namespace) -> None:
    """Builds images, with the cache of earlier builds."""
    client = containers.connect(instead="").client
    base = image_base.find(client, arguments.base)
    for image in arguments.images:
        started = time.monotonic()
        wanted = Build(
            image=image,
            lane=arguments.lane or image_build.default_lane(image),
            base=base.reference,
            apt_snapshot=base.apt_snapshot,
            revision=arguments.revision or image_build.revision(),
            no_cache=arguments.no_cache,
            tag=tag_of(arguments, image),
            chosen=dict(arguments.set),
        )
        if wanted.lane == "cpu":
            fetch_cpu_torch(ROOT / "wheels")
        print(f"image: building {wanted.tag} on {base.reference.split('@')[0]}", flush=True)
        made = image_build.run(client, wanted)
        print(f"image: {wanted.tag} is {made}, {time.monotonic() - started:.0f} s", flush=True)
        folder = arguments.documents / image.name
        for name, content in image_build.documents(client, wanted, made).items():
            write_text(folder / DOCUMENTS[name], content.decode())
        sizes = archive.layer_sizes(client, made)
        report = archive.size_report(sizes, image.lanes[wanted.lane])
        write_text(folder / "sizes.txt", "\n".join(report) + "\n")
        print("\n".join([*report, f"image: its documents are in {folder}"]), flush=True)


def fetch_cpu_torch(wheels: Path) -> None:
    """Puts the CPU build of the locked torch into wheels/ where this host's pip can have it and the build's may not."""
    if any(wheels.glob("torch-*")):
        return
    lock = env.lock_file("calib").read_text(encoding="utf-8")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(env.cpu_torch(lock))
        file.flush()
        for python in PYTHONS:
            command = [sys.executable, "-m", "pip", "download", "-qqq", "--no-deps", "--only-binary=:all:"]
            command += ["--python-version", python, "--platform", f"manylinux_2_28_{platform.machine()}"]
            command += ["--require-hashes", "--dest", str(wheels), "--requirement", file.name]
            subprocess.run(command)


def push(arguments: argparse.Namespace) -> None:
    """Pushes images with their documents, and writes images.lock."""
    if not arguments.to:
        raise UserError("push needs a registry", "make push REGISTRY=<host>/<path>")
    client = containers.connect(instead="").client
    for image in arguments.images:
        documents = {name: read_document(arguments.documents / image.name / file) for name, file in DOCUMENTS.items()}
        repository, tag = f"{arguments.to.rstrip('/')}/v4forge-{image.name}", tag_of(arguments, image)
        entry = registry.push(
            client,
            image.name,
            tag,
            repository,
            documents,
            say,
            arguments.sign_key,
            arguments.lock,
        )
        say(f"image: {tag} is {entry.reference}; commit {arguments.lock.name}")


def read_document(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", "make images writes it") from None


def pull(arguments: argparse.Namespace) -> None:
    """Pulls images by the digests of images.lock, and refuses what differs from it."""
    client = containers.connect(instead="").client
    for image in arguments.images:
        tag = tag_of(arguments, image)
        documents = registry.pull(client, image.name, tag, say, arguments.verify_key, arguments.lock)
        for name, content in documents.items():
            write_text(arguments.documents / image.name / DOCUMENTS[name], content.decode())
        say(f"image: {tag} is what {arguments.lock.name} says")


def shell(arguments: argparse.Namespace) -> None:
    """A shell in an image, as a stage sees it: the scratch folder to write to, all GPUs asked for."""
    engine = containers.connect(instead="")
    reference = definitions.resolve(arguments.images[0].name)
    found = containers.find(engine, reference, definitions.code_sha256())
    gpus = 0 if found.lane == "cpu" else arguments.gpus
    make_folder(arguments.scratch)
    containers.shell(engine, Job(image=found.id, command=["bash"], work=arguments.scratch, gpus=gpus, online=True))


def tag_of(arguments: argparse.Namespace, image: definitions.Image) -> str:
    return arguments.tag or definitions.tag(image.name)


def option(*names: str, **settings: object) -> Parser:
    """A parser of one option, for the commands that share it."""
    parser = Parser(add_help=False)
    parser.add_argument(*names, **settings)  # type: ignore[arg-type]
    return parser


def image_argument(name: str) -> definitions.Image:
    try:
        return definitions.get(name)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main() -> None:
    parser = parser_for("image", __doc__)
    commands = parser.add_subparsers(required=True, metavar="build|push|pull|shell")
    folder = option("--documents", type=Path, default=ROOT / "scratch/images", help="default: scratch/images")
    lock = option("--lock", type=Path, default=definitions.LOCK, metavar="FILE", help="default: images.lock")
    tag = option("--tag", default="", help="default: v4forge-<image>:local")
    for run, parents in ((build, [folder, tag]), (push, [folder, lock, tag]), (pull, [folder, lock, tag]), (shell, [])):
        command = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__, parents=parents)
        command.add_argument("images", nargs="+", type=image_argument, metavar="calib|serve")
        command.set_defaults(run=run)

    add = commands.choices["build"].add_argument
    add("--lane", default="", help="calib: cuda or cpu; serve: wheel or source; default: the first that fits")
    add("--base", default="", metavar="IMAGE", help="build on this instead of the pinned base")
    add("--revision", default="", help="the label's commit; default: the one checked out")
    add(
        "--set",
        nargs="+",
        type=pair("ARG=VALUE"),
        default=[],
        metavar="ARG=VALUE",
        help="other values for ARGs of the Dockerfile",
    )
    add("--no-cache", action="store_true", help="run every step anew")

    add = commands.choices["push"].add_argument
    add("--to", required=True, metavar="REGISTRY", help="such as registry.example.org/v4forge")
    add("--sign-key", type=Path, metavar="PEM", help="sign the provenance with this private key")

    add = commands.choices["pull"].add_argument
    add("--verify-key", type=Path, metavar="PEM", help="refuse an image that this public key did not sign")

    add = commands.choices["shell"].add_argument
    add("--scratch", type=Path, default=Path("scratch"), metavar="DIR", help="default: scratch")
    add("--gpus", type=int, default=1, metavar="N", help="default: 1; an image of the CPU's lane gets none")

    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    run_main(main)
