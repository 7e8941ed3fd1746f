"""Builds an image twice without cache, each time from another checkout, and compares everything.

The two checkouts differ in what a clone on another machine may: times and order of files, umask, time zone. Equal
images have one ID; a difference is explained file by file.

python -m scripts.reproduce calib
"""

from __future__ import annotations

import difflib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from docker import DockerClient

from v4forge.checkout import ROOT
from v4forge.errors import UserError, run_main
from v4forge.images import archive, build, containers, definitions, diff
from v4forge.images import base as image_base

from .cli import parser_for

# umask, time zone, whether files are written in the other order
CHECKOUTS = ((0o022, "UTC", False), (0o077, "Pacific/Kiritimati", True))


def copy_checkout(target: Path, image: definitions.Image, backwards: bool) -> None:
    """Copies what a build reads to `target`, in the other order when `backwards`; every file gets a new time."""
    names = [Path(image.dockerfile), *definitions.files(ROOT, definitions.PROJECT + definitions.BUILD_ONLY)]
    for name in reversed(names) if backwards else names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target / name)
        if os.access(ROOT / name, os.X_OK):
            (target / name).chmod((target / name).stat().st_mode | 0o100)


def main() -> None:
    parser = parser_for("reproduce", __doc__)
    parser.add_argument("image", choices=definitions.IMAGES, help="which one")
    parser.add_argument("--lane", default="", help="as for scripts.image build")
    parser.add_argument("--base", default="", metavar="IMAGE", help="build on this instead of the pinned base")
    arguments = parser.parse_args()
    image = definitions.get(arguments.image)
    lane = arguments.lane or build.default_lane(image)
    client = containers.connect(instead="").client
    base = image_base.find(client, arguments.base)
    command = [sys.executable, "-m", "scripts.image", "build", image.name, "--no-cache", "--documents", "documents"]
    command += ["--lane", lane, "--base", base.reference, "--revision", build.revision()]
    tags, provenances = [], []
    with tempfile.TemporaryDirectory() as folder:
        checkouts = [Path(folder, str(number)) for number in (1, 2)]
        for checkout, (_, _, backwards) in zip(checkouts, CHECKOUTS, strict=True):
            copy_checkout(checkout, image, backwards)
        for checkout, (umask, zone, _) in zip(checkouts, CHECKOUTS, strict=True):
            tags.append(f"v4forge-{image.name}:reproduce-{checkout.name}")
            print(f"reproduce: building {tags[-1]} with umask {umask:03o} and time zone {zone}", flush=True)
            environment = os.environ | {"TZ": zone, "APT_SNAPSHOT": base.apt_snapshot}
            done = subprocess.run([*command, "--tag", tags[-1]], cwd=checkout, env=environment, umask=umask)
            if done.returncode:
                sys.exit(done.returncode)
            provenances.append((checkout / "documents" / image.name / "provenance.json").read_text(encoding="utf-8"))
    compare(client, image.name, tags)
    if provenances[0] != provenances[1]:
        one, other = (text.splitlines() for text in provenances)
        lines = difflib.unified_diff(one, other, lineterm="", n=0)
        print("\n".join(lines))
        raise UserError(f"the provenance of two builds of {image.name} differs", "see the lines above")


def compare(client: DockerClient, name: str, tags: Sequence[str]) -> None:
    """Says that two images are one, or which files differ; removes both tags."""
    first, second = (client.images.get(tag) for tag in tags)
    if first.id != second.id:
        one, other = (archive.of_daemon(client, tag) for tag in tags)
        print("\n".join(diff.differences(one, other)))
    for tag in tags:
        client.images.remove(tag)
    if first.id != second.id:
        raise UserError(f"two builds of {name} differ: {first.id} and {second.id}", "see the files above")
    layers = len(first.attrs["RootFS"]["Layers"])
    print(f"reproduce: {name} is reproducible: config and all {layers} layers equal, both builds are {first.id}")


if __name__ == "__main__":
    run_main(main)
