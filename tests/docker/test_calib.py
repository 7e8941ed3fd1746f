"""The calibration image for real: built here and from another checkout, and the whole pipeline run in it. By night
(soak) built twice without cache, and pushed, wiped and pulled by digest."""

from __future__ import annotations

import grp
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import container_log
import docker
import pytest
from fetched import shard_of_layer, write_by_layer
from hub_stand_in import Fault, Hub, Repo, serving, sha256_of
from registries import Server

from scripts import reproduce
from v4forge import pins
from v4forge.checkout import ROOT
from v4forge.images import archive, definitions

pytestmark = [pytest.mark.images, pytest.mark.timeout(1800)]

SOAK = pytest.mark.soak
TAG = definitions.tag("calib")
SOMEBODY = 54321  # a user that neither this host nor the image knows
# What the build host must not leave in an image.
TRACES = ("/etc/ssl/certs/ca-certificates.crt", "proxy", "PIP_INDEX", "find-links", str(ROOT))


def program(*arguments: str, cwd: Path = ROOT, **settings: object) -> str:
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=cwd, stdout=subprocess.PIPE, text=True, **settings)
    assert done.returncode == 0, done.stdout
    return done.stdout


def in_image(*command: str, user: str = "") -> str:
    """What a command says in the image, without network."""
    flags = ["--rm", "--network=none", *([f"--user={user}"] if user else [])]
    done = subprocess.run(["docker", "run", *flags, TAG, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def reproduced() -> str:
    return program("scripts.reproduce", "calib", "--lane", "cpu")


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image is built, from what the daemon's cache has of it; what was written about it."""
    folder = tmp_path_factory.mktemp("documents")
    program("scripts.image", "build", "calib", "--lane", "cpu", "--documents", str(folder))
    return folder / "calib"


@pytest.mark.soak  # as below; of the context, which all follows from: tests/images/test_build.py
def test_a_build_from_another_checkout_is_that_image_too(documents: Path, tmp_path: Path) -> None:
    """Of other times, umask, time zone and order of files. From the cache, but for the steps that this is news to."""
    client = docker.from_env()
    built, elsewhere = client.images.get(TAG), "v4forge-calib:elsewhere"
    umask, zone, backwards = reproduce.CHECKOUTS[1]
    reproduce.copy_checkout(tmp_path / "checkout", definitions.get("calib"), backwards)
    revision = built.labels["org.opencontainers.image.revision"]
    words = ["--lane", "cpu", "--documents", "documents", "--tag", elsewhere, "--revision", revision]
    environment = {**os.environ, "TZ": zone}
    program("scripts.image", "build", "calib", *words, cwd=tmp_path / "checkout", env=environment, umask=umask)
    other = client.images.get(elsewhere).id
    client.images.remove(elsewhere)
    assert other == built.id
    said = tmp_path / "checkout/documents/calib/provenance.json"
    assert said.read_bytes() == (documents / "provenance.json").read_bytes()


@pytest.mark.soak
def test_two_builds_without_cache_are_one_image(reproduced: str) -> None:
    assert re.search(r"calib is reproducible: config and all [5-9] layers equal, both builds are sha256:", reproduced)


@pytest.mark.soak
def test_a_build_with_cache_is_that_image_too(reproduced: str, documents: Path) -> None:
    assert reproduced.strip().endswith(docker.from_env().images.get(TAG).id)


def test_labels_say_what_is_inside(documents: Path) -> None:
    labels = docker.from_env().images.get(TAG).labels
    assert labels["io.v4forge.lane"] == "cpu"
    assert labels["org.opencontainers.image.created"].startswith(pins.read()["LOCK_DATE"])
    assert re.match(r"[0-9a-f]{40}(-dirty)?$|unknown$", labels["org.opencontainers.image.revision"])
    inside = in_image(
        "python", "-c", "from v4forge.images import definitions; print(definitions.code_sha256())"
    ).strip()
    assert labels["io.v4forge.code"] == inside == definitions.code_sha256()


def test_nothing_of_the_build_host_is_in_it(documents: Path) -> None:
    client = docker.from_env()
    saved = archive.of_daemon(client, TAG)
    text = json.dumps(saved.config)
    assert [trace for trace in TRACES if trace in text] == []
    paths = [path for layer in saved.layers for path in layer.files]
    assert [path for path in paths if path.endswith((".pyc", "/__pycache__", "pip.conf", "/.git", "/wheels"))] == []
    newest = max(entry.mtime for layer in saved.layers for entry in layer.files.values())
    assert newest <= definitions.epoch()


@pytest.mark.parametrize("user", ["", str(SOMEBODY), f"{SOMEBODY}:{SOMEBODY}"])
def test_it_runs_as_any_user_but_root_without_being_asked(user: str, documents: Path) -> None:
    script = (
        "import getpass, os, pathlib, torch; home = pathlib.Path.home(); (home / '.cache').mkdir();"
        "print(os.getuid(), getpass.getuser(), home, os.access('/opt/v4forge/scripts', os.W_OK))"
    )
    said = in_image("python", "-c", script, user=user).split()
    assert said == [user.partition(":")[0] or "10000", "v4forge", "/home/v4forge", "False"]


def test_the_documents_describe_it(documents: Path) -> None:
    bill = json.loads((documents / "sbom.cdx.json").read_text())
    versions = {component["name"]: component.get("version") for component in bill["components"]}
    assert versions["torch"].partition("+")[0] == pins.read()["TORCH_VERSION"]
    assert {"gcc", "libc6", "safetensors"} <= versions.keys()
    statement = json.loads((documents / "provenance.json").read_text())
    inputs = {item["name"] for item in statement["predicate"]["buildDefinition"]["resolvedDependencies"]}
    assert {"Dockerfile.calib", "versions.env", "docker/requirements-calib.txt"} <= inputs
    said = json.dumps(statement).replace("haproxy", "")  # the router's configuration is an input by its name
    assert [trace for trace in TRACES if trace in said] == []
    assert re.search(r"together, \d+% of 2\.5 GiB", (documents / "sizes.txt").read_text())


@pytest.mark.soak  # of an image of small layers, tests/docker/test_registry.py
def test_pushed_wiped_and_pulled_by_digest_it_is_that_image(documents: Path, tmp_path: Path) -> None:
    client = docker.from_env()
    built = client.images.get(TAG).id
    lock = tmp_path / "images.lock"
    shared = ("--documents", str(documents.parent), "--lock", str(lock))
    server = Server(tmp_path)
    server.start()
    try:
        program("scripts.image", "push", "calib", "--to", f"{server.host}/v4forge", *shared)
        client.images.remove(built, force=True)
        program("scripts.image", "pull", "calib", *shared)
    finally:
        server.stop()
    client.images.remove(pins.parse(lock.read_text(), lock.name)["CALIB_IMAGE"])
    assert client.images.get(TAG).id == built


# make docs-check runs the demo on the host.
@pytest.mark.parametrize(
    ("target", "last"), [("artifact", "artifact/README.md"), pytest.param("demo", "reports/index.html", marks=SOAK)]
)
def test_the_pipeline_runs_in_it(target: str, last: str, documents: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:  # pytest's own folder lets nobody else in
        log = made_by_somebody(target, Path(scratch))
        assert "certificate: ok" in log
        assert container_log.problems(log) == []
        work = Path(scratch) / "tiny"
        assert json.loads((work / "artifact/certificate.json").read_text())["ok"]
        assert (work / last).stat().st_uid == SOMEBODY


def test_calibration_in_a_container_begins_while_fetch_downloads_in_another(documents: Path, tmp_path: Path) -> None:
    upstream = write_by_layer(ROOT / "models/tiny", tmp_path / "upstream")
    log = overlapped(upstream, tmp_path / "scratch", "docker")
    assert container_log.problems(log) == []


def overlapped(upstream: Path, scratch: Path, runtime: str) -> str:
    """Fetches this checkpoint and calibrates meanwhile, from a server that holds the last layer back until the first
    one is finished; what the run said."""
    work, last = scratch / "flash", shard_of_layer(3)
    values, allowed = pins.read(), threading.Event()
    repo = Repo.of(upstream, values["FLASH_REVISION"])
    path = f"/cdn/{sha256_of((upstream / last).read_bytes())}"
    with serving(Hub({values["FLASH_REPO"]: repo})) as hub:
        hub.faults += [Fault(path), Fault(path, times=-1, held=allowed)]  # its header comes, then no more
        words = ["run", "fetch", "calibrate", "--profile", "flash", "--runtime", runtime, "--scratch", str(scratch)]
        words += ["--corpus", str(ROOT / "models/tiny/calibration.jsonl"), "--samples", "4", "--seq-len", "64"]
        with subprocess.Popen(
            [sys.executable, "-m", "scripts.stage", *words],
            cwd=ROOT,
            env={**os.environ, "HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1,localhost"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as run:
            try:
                while run.poll() is None and not (work / "layers/layer-000.safetensors").exists():
                    time.sleep(0.2)
                assert run.poll() is None and not (work / "upstream" / last).exists()
            finally:
                allowed.set()
            log, _ = run.communicate()
    assert run.returncode == 0, log
    assert len(list((work / "layers").glob("layer-*.safetensors"))) == 4
    assert (work / "upstream" / last).read_bytes() == (upstream / last).read_bytes()
    return log


def made_by_somebody(target: str, scratch: Path) -> str:
    """Runs what `make <target> RUNTIME=docker` runs, with 8 samples (`make test` has the demo's 64), as a user that may
    use docker and is not root; what it said."""
    words = ["make", "-n", target, "RUNTIME=docker", "SAMPLES=8", f"SCRATCH={scratch}"]
    said = subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout
    command = shlex.split(said.splitlines()[-1])
    assert command[0] == ".venv/bin/python"
    python = Path(sys.executable).resolve()
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    if python.is_relative_to("/root"):  # which nobody else may enter
        python = Path("/usr/bin", version)
    os.chown(scratch, SOMEBODY, SOMEBODY)
    packages = ROOT / ".venv/lib" / version / "site-packages"
    done = subprocess.run(
        [str(python), *command[1:]],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "HOME": str(scratch), "PYTHONPATH": str(packages)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        user=SOMEBODY,
        group=SOMEBODY,
        extra_groups=[grp.getgrnam("docker").gr_gid],
    )
    assert done.returncode == 0, done.stdout
    return done.stdout
