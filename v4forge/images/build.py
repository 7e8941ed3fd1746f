"""Building an image so that the same inputs give the same image ID, whatever the clock, the checkout and the engine.

Three things make it so. The build context is a tar of our own making: sorted, without owners, with one time. Each RUN
ends in docker/steps/settle. And the engine's result is sealed (normalize).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from docker import DockerClient

from v4forge import checkout, pins
from v4forge.errors import UserError
from v4forge.images import attestation, definitions, normalize, refusals, sbom
from v4forge.images.definitions import Image

# ARGs that only an operator sets.
OPERATORS = ("SKIP_PATCHES", "VLLM_CHERRY_PICKS")
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
CA_BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt")


@dataclass(frozen=True)
class Build:
    """What decides an image's bytes, and how this host reaches what it is made from."""

    image: Image
    lane: str
    base: str
    apt_snapshot: str
    revision: str
    root: Path = checkout.ROOT
    no_cache: bool = False
    tag: str = ""
    chosen: Mapping[str, str] = field(default_factory=dict)  # by the operator, for other values of ARGs

    def arguments(self) -> dict[str, str]:
        """The build arguments: every ARG of the Dockerfile, from here or from versions.env."""
        known = (
            dict.fromkeys(OPERATORS, "")
            | pins.read()
            | {
                "BASE_IMAGE": self.base,
                "APT_SNAPSHOT": self.apt_snapshot,
                "SOURCE_DATE_EPOCH": str(definitions.epoch()),
                "LANE": self.lane,
            }
        )
        if self.lane not in self.image.lanes:
            lanes = ", ".join(self.image.lanes)
            raise UserError(f"{self.image.name} has no lane {self.lane!r}", f"LANE= takes one of: {lanes}")
        text = (self.root / self.image.dockerfile).read_text(encoding="utf-8")
        names = dict.fromkeys(re.findall(r"^ARG (\w+)", text, flags=re.M))
        if unknown := [name for name in names if name not in known]:
            fact = f"{self.image.dockerfile} has ARG {unknown[0]}, which versions.env does not"
            raise UserError(fact, "add it to versions.env")
        if unknown := [name for name in self.chosen if name not in names]:
            raise UserError(f"{self.image.dockerfile} has no ARG {unknown[0]}", f"use one of: {', '.join(names)}")
        return {name: self.chosen.get(name, known[name]) for name in names}


def default_lane(image: Image) -> str:
    """The first lane; for calibration the CPU's on a machine without an NVIDIA driver, as `make env` does."""
    if "cpu" in image.lanes and not NVIDIA_DRIVER.exists():
        return "cpu"
    return next(iter(image.lanes))


def revision() -> str:
    """The commit that is checked out, with -dirty where an image's files differ from it; unknown without git."""
    names = [
        *definitions.PROJECT,
        *definitions.BUILD_ONLY,
        *(image.dockerfile for image in definitions.IMAGES.values()),
    ]
    return checkout.revision("--", *names) or "unknown"


def context(root: Path, dockerfile: str, out: IO[bytes]) -> None:
    """Writes the build context: a tar that is the same for the same contents, whatever their times, modes and order."""
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.GNU_FORMAT) as tar:
        folders: set[Path] = set()
        for path in (Path(dockerfile), *definitions.files(root, definitions.PROJECT + definitions.BUILD_ONLY)):
            for folder in [*reversed(path.parents)][1:]:
                if folder not in folders:
                    folders.add(folder)
                    tar.addfile(_entry(folder, tarfile.DIRTYPE, 0o755))
            source = root / path
            with open(source, "rb") as file:
                entry = _entry(path, tarfile.REGTYPE, 0o755 if source.stat().st_mode & 0o100 else 0o644)
                entry.size = source.stat().st_size
                tar.addfile(entry, file)
        for name in definitions.BUILD_ONLY:
            if Path(name) not in folders:  # a Dockerfile may mount it empty
                tar.addfile(_entry(Path(name), tarfile.DIRTYPE, 0o755))


def _entry(path: Path, kind: bytes, mode: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(path.as_posix())
    entry.type, entry.mode, entry.mtime = kind, mode, definitions.epoch()
    return entry


def builder(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The command that builds with BuildKit: a docker with buildx, or one of those that had BuildKit built in."""
    folders = os.get_exec_path(dict(environment))
    found = [path for folder in folders if (path := shutil.which("docker", path=folder))]
    for program in dict.fromkeys(found):
        if _answers(program, "buildx", "version"):
            return [program, "buildx", "build", "--load"]
    for program in dict.fromkeys(found):
        version = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
        match = re.search(r"version (\d+)\.", version)
        if match and 18 < int(match[1]) < 23:
            return [program, "build"]
    if not found:
        raise UserError("docker is not installed", refusals.INSTALL)
    raise UserError(f"{found[0]} cannot build with BuildKit", "install its buildx plugin (docker-buildx)")


def _answers(*command: str) -> bool:
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def ca_bundle() -> str:
    """The file of certificates that this host trusts; '' when there is none."""
    named = [os.environ.get(key, "") for key in ("PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")]
    return next((path for path in (*named, *CA_BUNDLES) if path and Path(path).is_file()), "")


def pip_settings(ca: bool) -> str:
    """A pip.conf with what this host's pip is told and a container can use: indexes, not folders of the host."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    lines = ["[global]"]
    for name, value in re.findall(r"^(?:global|:env:)\.([\w-]+)='(.*)'$", listed, flags=re.M):
        urls = [url for url in value.split() if url.startswith(("http://", "https://"))]
        if name in ("index-url", "extra-index-url") and urls:
            lines.append(f"{name} = {' '.join(urls)}")
        elif name in ("trusted-host", "proxy", "timeout", "default-timeout", "retries"):
            lines.append(f"{name.removeprefix('default-')} = {value}")
    if ca:
        lines.append("cert = /dev/shm/ca.pem")
    return "\n".join(lines) + "\n"


@contextmanager
def secrets() -> Iterator[list[str]]:
    """The options that hand this host's certificates, pip settings and APT_SOURCES to a build, not to its layers."""
    ca = ca_bundle()
    with tempfile.TemporaryDirectory() as folder:
        pip = Path(folder, "pip.conf")
        pip.touch(mode=0o600)
        pip.write_text(pip_settings(bool(ca)), encoding="utf-8")
        given = {"pip": str(pip), "ca": ca, "apt": os.environ.get("APT_SOURCES", "")}
        yield [f"--secret=id={name},src={path}" for name, path in given.items() if path]


def documents(client: DockerClient, build: Build, image_id: str) -> dict[str, bytes]:
    """The documents that go with a built image: "sbom" (CycloneDX) and "provenance" (in-toto, SLSA), as bytes."""
    bill = sbom.sbom(client, image_id, build.image.name, build.base, definitions.epoch())
    inputs = [
        Path(build.image.dockerfile),
        Path("versions.env"),
        *definitions.files(build.root, definitions.BUILD_ONLY),
    ]
    dependencies = [attestation.file(build.root / path, path.as_posix()) for path in inputs]
    reference, _, digest = build.base.partition("@")
    dependencies.append(attestation.image(reference, digest or str(client.images.get(reference).id)))
    if re.fullmatch(r"[0-9a-f]{40}", build.revision):
        dependencies.append(attestation.revision(pins.read()["PROJECT_URL"], build.revision))
    docker_command = ["docker", *command(build, Path("image-id"))[1:]]
    version = {"docker": client.version()["Version"]}
    statement = attestation.provenance(
        f"v4forge-{build.image.name}", image_id, build.arguments(), dependencies, [docker_command], version, bill
    )
    return {"sbom": bill, "provenance": attestation.encoded(statement)}


def command(build: Build, output: Path) -> list[str]:
    """The docker command, but for the secrets; the context comes on its standard input."""
    labels = definitions.labels(build.image, build.lane, build.revision)
    return [
        *builder(),
        *(["--no-cache"] if build.no_cache else []),
        *(f"--build-arg={key}={value}" for key, value in build.arguments().items()),
        *(f"--label={key}={value}" for key, value in labels.items()),
        *(f"--iidfile={output}", f"--file={build.image.dockerfile}", "-"),
    ]


def run(client: DockerClient, build: Build) -> str:
    """Builds and seals an image; its ID. The engine's own output goes to stderr as it comes."""
    with tempfile.TemporaryDirectory() as folder, secrets() as options:
        output = Path(folder, "image-id")
        docker = command(build, output)
        docker[-1:-1] = options
        environment = os.environ | {"DOCKER_BUILDKIT": "1"}
        process = subprocess.Popen(docker, stdin=subprocess.PIPE, stdout=sys.stderr, env=environment)
        assert process.stdin is not None
        try:
            with process.stdin:
                context(build.root, build.image.dockerfile, process.stdin)
        except BrokenPipeError:
            pass  # docker has said why
        if process.wait():
            raise UserError(
                f"docker could not build {build.image.dockerfile} (above)", f"make images IMAGE={build.image.name}"
            )
        return normalize.seal(client, output.read_text().strip(), build.tag or definitions.tag(build.image.name))
