"""The patches and the plugin on the pinned vLLM's own wheel, checked by patches/vllm/check.py. Needs no docker.

The environment is .venv with what vLLM's Python code imports besides, from the lock of the serving image: no CUDA, so
that no kernel is there. The image's build runs the same checks on all of the lock.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from recorded import unrecorded

from v4forge import pins
from v4forge.errors import UserError
from v4forge.images import locks, patches

pytestmark = [pytest.mark.images, pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ROOT / "patches" / "vllm" / "plugin"
IMPORTED = (
    *("aiohappyeyeballs", "aiohttp", "aiosignal", "apache-tvm-ffi", "attrs", "cachetools", "cbor2", "cloudpickle"),
    *(
        "compressed-tensors",
        "einops",
        "fastapi",
        "frozenlist",
        "httpx2",
        "llguidance",
        "msgspec",
        "multidict",
        "openai",
    ),
    *("oss-harmony", "partial-json-parser", "prometheus-client", "propcache", "pybase64", "pyzmq", "sniffio"),
    *("starlette", "uvloop", "xgrammar", "yarl"),
)


def pip(*arguments: str | Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def lock() -> locks.Lock:
    return locks.parse((ROOT / locks.lock_file("serve")).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pinned wheel, from the folder V4FORGE_WHEELS or the package index; its hash is the pinned one."""
    sha256 = pins.read()["VLLM_WHEEL_SHA256"]
    folder = Path(os.environ.get("V4FORGE_WHEELS") or tmp_path_factory.mktemp("wheel"))
    if not list(folder.glob("vllm-*.whl")):
        requirement = tmp_path_factory.mktemp("pip") / "vllm.txt"
        requirement.write_text(f"vllm=={pins.read()['VLLM_VERSION']} --hash=sha256:{sha256}\n")
        pip("download", "--no-deps", "--require-hashes", "--only-binary=:all:", "--dest", folder, "-r", requirement)
    (found,) = folder.glob("vllm-*.whl")
    with open(found, "rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == sha256
    return found


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, wheel: Path, lock: locks.Lock) -> Path:
    """site-packages with vLLM's Python files, unpatched, and what they import."""
    folder = tmp_path_factory.mktemp("vllm")
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python3.*/site-packages")
    (site / "v4forge-environment.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".py") or ".dist-info/" in name]
        archive.extractall(site, names)
    wanted = {line: hashes for line, hashes in lock.items() if locks.package_of(line) in IMPORTED}
    assert len(wanted) == len(IMPORTED)
    requirements = folder / "requirements.txt"
    requirements.write_text(locks.dump(wanted, "requirements-serve.in"))
    pip(
        "install",
        "--no-compile",
        "--no-deps",
        "--require-hashes",
        "--only-binary=:all:",
        "--target",
        site,
        "-r",
        requirements,
    )
    return site


@pytest.fixture(scope="module")
def patched(environment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The environment with the series applied and the plugin installed."""
    patches.apply(patches.series("vllm"), environment)
    source = tmp_path_factory.mktemp("plugin") / "plugin"
    shutil.copytree(PLUGIN, source)
    pip("install", "--no-compile", "--no-deps", "--no-index", "--no-build-isolation", "--target", environment, source)
    return environment


def check(site: Path, *names: str) -> subprocess.CompletedProcess[str]:
    """What check.py says in the environment of `site`. The bytecode that it leaves there is for the checks after it."""
    python = site.parents[2] / "bin" / "python"
    command: list[str | Path] = [python, ROOT / "patches" / "vllm" / "check.py", *names]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONDONTWRITEBYTECODE": ""})


def test_unpatched_vllm_fails_the_checks_of_the_patches(environment: Path) -> None:
    checks = [one.check for one in patches.series("vllm")]
    done = check(environment, *checks)
    assert done.returncode == 1
    assert done.stdout.count("FAILED  #") == len(checks), done.stdout


@pytest.fixture(scope="module")
def checked(patched: Path) -> subprocess.CompletedProcess[str]:
    """What the program says of the patched environment."""
    words = ["-m", "scripts.patch", "check", "vllm", "--python", patched.parents[2] / "bin" / "python"]
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)


def test_the_series_applies_and_every_check_holds(checked: subprocess.CompletedProcess[str]) -> None:
    assert checked.returncode == 0, checked.stdout + checked.stderr
    outcomes = re.findall(r"^(ok|FAILED) +(\S+)", checked.stdout, flags=re.M)
    assert {outcome for outcome, _ in outcomes} == {"ok"}
    assert {"C14:", "C15:"} < {about for _, about in outcomes}


def test_the_record_states_the_patched_files(patched: Path) -> None:
    changed = {path for one in patches.series("vllm") for path in one.after}
    recorded = set(unrecorded(patched, "vllm"))
    assert not changed & recorded
    assert all(name.endswith(".py") is False for name in recorded), "only the compiled files are left out here"


def test_a_second_apply_is_refused(patched: Path) -> None:
    with pytest.raises(UserError, match="is already applied"):
        patches.apply(patches.series("vllm"), patched)


def test_the_program_runs_the_checks(checked: subprocess.CompletedProcess[str]) -> None:
    """All of them, with a line for each."""
    assert "vLLM" in checked.stdout
    assert len(re.findall(r"^ok ", checked.stdout, flags=re.M)) >= len(patches.series("vllm"))
