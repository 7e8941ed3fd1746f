"""What an image is built on: the pinned CUDA base, or a Debian made here where no registry answers."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from docker import DockerClient
from docker.errors import APIError, ImageNotFound
from requests.exceptions import RequestException

from v4forge import pins
from v4forge.errors import UserError
from v4forge.images import definitions, normalize

REGISTRY_TIMEOUT_S = 20
# What the engine mounts over the root while something runs must exist in the base, or a RUN leaves an empty file there
# with the time of the build. Documentation is left out, copyright files stay.
DEBOOTSTRAP = (
    *("--variant=minbase", "--include=ca-certificates"),
    *('--customize-hook=for name in hosts hostname resolv.conf; do : >"$1/etc/$name"; done',),
    *("--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/locale/*"),
    *("--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-include=/usr/share/doc/*/copyright"),
)


@dataclass(frozen=True)
class Base:
    """An image reference, and the address of the package snapshot that goes with it; '' is the base's own sources."""

    reference: str
    apt_snapshot: str


def find(client: DockerClient, given: str = "") -> Base:
    """`given` if there is one, else the pinned base if this host has it or its registry answers, else our Debian."""
    if given:
        return Base(given, os.environ.get("APT_SNAPSHOT", ""))
    pinned = Base(pins.read()["BASE_IMAGE"], os.environ.get("APT_SNAPSHOT", pins.read()["APT_SNAPSHOT"]))
    try:
        client.images.get(pinned.reference)
        return pinned
    except ImageNotFound:
        pass
    try:
        DockerClient.from_env(timeout=REGISTRY_TIMEOUT_S).images.get_registry_data(pinned.reference)
        return pinned
    except (APIError, RequestException):
        print(f"image: no registry answers for {pinned.reference.split('@')[0]}: building on Debian", flush=True)
        return Base(debian(client), "")


def debian(client: DockerClient) -> str:
    """The tag of a minimal Debian of DEBIAN_RELEASE, made from a mirror by mmdebstrap unless this host has it."""
    release, mirror = pins.read()["DEBIAN_RELEASE"], os.environ.get("DEBIAN_MIRROR", "http://deb.debian.org/debian")
    tag = f"v4forge-base:{release}-{pins.read()['LOCK_DATE']}"
    try:
        client.images.get(tag)
        return tag
    except ImageNotFound:
        pass
    if not shutil.which("mmdebstrap"):
        raise UserError(
            "there is no base to build on: no registry answers and mmdebstrap is not installed",
            "apt-get install mmdebstrap, or name a local image: make images BASE_IMAGE=<image>",
        )
    print(f"image: making {tag} with mmdebstrap (about a minute)", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "root.tar")
        environment = os.environ | {"SOURCE_DATE_EPOCH": str(definitions.epoch())}
        command = ["mmdebstrap", "--quiet", *DEBOOTSTRAP, release, str(root), mirror]
        if subprocess.run(command, env=environment).returncode:
            raise UserError(f"mmdebstrap could not make Debian {release} (above)", "DEBIAN_MIRROR=<mirror> make images")
        client.api.import_image_from_file(str(root), repository="v4forge-base", tag="unsealed")
    normalize.seal(client, "v4forge-base:unsealed", tag)
    return tag
