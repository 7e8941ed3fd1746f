"""The two images as data: what they are built from, what they are called, and which one a stage runs in."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from v4forge import pins
from v4forge.checkout import ROOT
from v4forge.errors import UserError

LOCK = ROOT / "images.lock"
# What an image holds of the project, in /opt/v4forge.
PROJECT = ("LICENSE", "docker/serve/settings.toml", "models", "scripts", "v4forge", "versions.env")
# What a build reads besides, and no image holds.
BUILD_ONLY = ("docker", "patches", "wheels")
VERSION = re.compile(r"_(VERSION|COMMIT)$")


@dataclass(frozen=True)
class Image:
    """One image. `lanes` are the ways to build it, the default first, each with its size budget in GiB."""

    name: str
    title: str
    dockerfile: str
    base: str  # the key of its base in versions.env
    lanes: dict[str, float]


IMAGES = {
    image.name: image
    for image in (
        Image(
            name="calib",
            title="v4forge calibration: the stages from the download to the certificate",
            dockerfile="Dockerfile.calib",
            base="BASE_IMAGE",
            lanes={"cuda": 9.0, "cpu": 2.5},
        ),
        Image(
            name="serve",
            title="v4forge serving: vLLM with our patches and plugin, and the benchmark clients",
            dockerfile="Dockerfile.serve",
            base="BASE_IMAGE",
            lanes={"wheel": 11.0, "source": 11.0},
        ),
    )
}


def get(name: str) -> Image:
    if name not in IMAGES:
        raise UserError(f"there is no image {name!r}", f"IMAGE= takes one of: {', '.join(IMAGES)}")
    return IMAGES[name]


def tag(name: str) -> str:
    """What `make images` and `make pull` call an image on this host."""
    return f"v4forge-{name}:local"


def resolve(name: str) -> str:
    """The reference of the image to run: what the environment says, V4FORGE_IMAGE_<NAME>, else the local tag."""
    return os.environ.get(f"V4FORGE_IMAGE_{get(name).name.upper()}") or tag(name)


def locked() -> dict[str, str]:
    """images.lock by key."""
    return pins.parse(LOCK.read_text(encoding="utf-8"), LOCK.name)


def epoch() -> int:
    """SOURCE_DATE_EPOCH of an image, in seconds: the day of the locks, 0:00 UTC."""
    day = datetime.fromisoformat(pins.read()["LOCK_DATE"]).replace(tzinfo=timezone.utc)
    return int(day.timestamp())


def created() -> str:
    """epoch() in the form that OCI asks for."""
    return datetime.fromtimestamp(epoch(), timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def files(root: Path, names: tuple[str, ...] = PROJECT) -> Iterator[Path]:
    """The files below `root` that belong to an image, relative and sorted; bytecode and hidden files do not."""
    within = {name for name in names if any(parent.as_posix() in names for parent in Path(name).parents)}
    for name in sorted(set(names) - within):
        folder = root / name
        found = sorted(folder.rglob("*")) if folder.is_dir() else [folder]
        for path in found:
            relative = path.relative_to(root)
            hidden = any(part.startswith(".") or part == "__pycache__" for part in relative.parts)
            if path.is_file() and not hidden:
                yield relative


def code_sha256(root: Path = ROOT) -> str:
    """sha256 over the names and contents of what an image holds of the project; in hex."""
    digest = hashlib.sha256()
    for path in files(root):
        content = hashlib.sha256((root / path).read_bytes()).hexdigest()
        digest.update(f"{path.as_posix()} {content}\n".encode())
    return digest.hexdigest()


def labels(image: Image, lane: str, revision: str) -> dict[str, str]:
    """The labels of an image; what a pull and a run compare."""
    values = pins.read()
    return {
        "org.opencontainers.image.title": image.title,
        "org.opencontainers.image.source": values["PROJECT_URL"],
        "org.opencontainers.image.revision": revision,
        "org.opencontainers.image.created": created(),
        "org.opencontainers.image.version": values["LOCK_DATE"],
        "org.opencontainers.image.licenses": "MIT",
        "io.v4forge.code": code_sha256(),
        "io.v4forge.lane": lane,
        "io.v4forge.versions": " ".join(f"{key}={value}" for key, value in values.items() if VERSION.search(key)),
        "io.v4forge.versions-sha256": hashlib.sha256(pins.FILE.read_bytes()).hexdigest(),
    }


def expected_labels(name: str) -> dict[str, str]:
    """The labels on which image and checkout must agree: which image it is, and the versions it was built from."""
    return {
        "org.opencontainers.image.title": get(name).title,
        "io.v4forge.versions-sha256": hashlib.sha256(pins.FILE.read_bytes()).hexdigest(),
    }
