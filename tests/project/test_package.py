"""The package as pip installs it, from its own sdist: the command, what it carries, and what it lacks."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import certified_artifact
import once
import pytest

from scripts.__main__ import PROGRAMS
from v4forge import checkout, pins
from v4forge.checkout import ROOT

GROUPS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["v4forge"]["dependencies"]
CARRIED = [name for name, program in PROGRAMS.items() if not program.checkout]
STARTUP_S = 1.0  # of computing: half of it where nothing else runs
BUILD = "from setuptools import build_meta; build_meta.build_{}({!r})"


def built(what: str, source: Path, into: Path) -> Path:
    """An sdist or a wheel, made without an index."""
    done = subprocess.run(
        [sys.executable, "-c", BUILD.format(what, str(into))], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (made,) = into.glob({"sdist": "*.tar.gz", "wheel": "*.whl"}[what])
    return made


def install(folder: Path) -> None:
    """The wheel of the sdist of this checkout, unpacked, with the command as pip writes it."""
    for name in checkout.names():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / "source" / name)
    (folder / "made").mkdir()
    sdist = built("sdist", folder / "source", folder / "made")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    with zipfile.ZipFile(built("wheel", unpacked, folder / "made")) as archive:
        archive.extractall(folder / "site")
    (entry_points,) = (folder / "site").glob("*.dist-info/entry_points.txt")
    (module,) = re.findall(r"^v4forge = ([\w.]+):main$", entry_points.read_text(), flags=re.MULTILINE)
    (folder / "v4forge").write_text(f"from {module} import main\nmain()\n")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once.in_session(tmp_path_factory, "installed", install)


def v4forge(installed: Path, *words: str | Path, libraries: bool = True) -> subprocess.CompletedProcess[str]:
    """The command, in an empty environment and another folder; `libraries`: beside those of this one."""
    beside = [sysconfig.get_path("purelib")] if libraries else []
    environment = {"PYTHONPATH": os.pathsep.join([str(installed / "site"), *beside]), "PATH": os.defpath}
    command = [sys.executable, *([] if libraries else ["-S"]), installed / "v4forge", *words]
    return subprocess.run(command, cwd=installed, env=environment, capture_output=True, text=True)


def test_the_groups_name_what_the_locks_are_made_of() -> None:
    listed = {
        line
        for name in ("calib", "host")
        for line in (ROOT / f"docker/requirements-{name}.in").read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    }
    asked = {name for names in GROUPS.values() for name in names}
    assert listed <= asked
    assert asked - listed == {"requests"}  # docker's, which huggingface-hub is no longer of


def test_every_program_is_a_command_of_the_package() -> None:
    programs = {path.stem for path in (ROOT / "scripts").glob("*.py") if "__main__" in path.read_text(encoding="utf-8")}
    # What torchrun and doctor start is nobody's command.
    assert {program.module for program in PROGRAMS.values()} == programs - {"__main__", "all_reduce"}


def test_the_wheel_asks_for_the_locked_versions_and_lays_claim_to_one_name(installed: Path) -> None:
    (metadata,) = (installed / "site").glob("*.dist-info/METADATA")
    text = metadata.read_text(encoding="utf-8")
    pinned = pins.read()
    assert f"Version: {pinned['LOCK_DATE'].replace('-', '.')}\n" in text
    assert re.search(rf"^Requires-Dist: numpy<\d+,>={re.escape(pinned['NUMPY_VERSION'])}$", text, flags=re.MULTILINE)
    assert re.search(
        rf"^Requires-Dist: torch<\d+,>={re.escape(pinned['TORCH_VERSION'])}; extra == \"gpu\"$", text, flags=re.M
    )
    names = {path.name for path in (installed / "site").iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"v4forge", "v4forge_scripts"}
    data = [path for path in checkout.names() if path.startswith("v4forge/") and not path.endswith(".py")]
    assert data and [path for path in data if not (installed / "site" / path).is_file()] == []


def test_help_names_every_program_and_each_answers_at_once(installed: Path) -> None:
    told = v4forge(installed, "--help")
    assert told.returncode == 0, told.stderr
    assert re.findall(r"^  ([a-z-]+)\s", told.stdout, flags=re.MULTILINE)[1:] == list(PROGRAMS)
    for words in ([], *([name] for name in CARRIED)):
        took = []
        while not took or (took[-1] > STARTUP_S and len(took) < 3):  # another may have the core
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            told = v4forge(installed, *words, "--help")
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
            assert told.returncode == 0 and told.stdout.startswith("usage: v4forge"), (words, told.stderr)
            assert "scripts." not in told.stdout.replace("v4forge_scripts.", ""), words
        assert took[-1] <= STARTUP_S, words


def test_it_works_away_from_a_checkout(installed: Path, tmp_path: Path) -> None:
    artifact = certified_artifact.write(tmp_path)
    done = v4forge(installed, "verify", "--artifact", artifact, "--sums-only")
    assert done.returncode == 0 and done.stdout.startswith("sums: ok, 11 files"), done.stderr
    done = v4forge(installed, "inspect", ROOT / "models/tiny")
    assert done.returncode == 0 and "an upstream checkpoint" in done.stdout, done.stderr
    done = v4forge(installed, "plan", "--profile", "flash", "--no-measure", "--json")
    assert done.returncode == 0 and '"seconds"' in done.stdout, done.stderr
    done = v4forge(installed, "serve-print", "--artifact", artifact, "--devices", "0,1")
    assert done.returncode == 0 and "vllm serve" in done.stdout, done.stderr


def test_what_only_a_checkout_can_do_says_so(installed: Path) -> None:
    for name in sorted(PROGRAMS.keys() - set(CARRIED))[::4]:
        done = v4forge(installed, name)
        fact = f"error: {name} needs a checkout of v4forge, and this is an installed package\n"
        assert (done.returncode, done.stderr) == (1, f"{fact}hint: git clone {pins.read()['PROJECT_URL']}\n")


def test_a_hint_is_a_command_that_the_package_has(installed: Path, tmp_path: Path) -> None:
    artifact = certified_artifact.write(tmp_path)
    certified_artifact.seal(artifact, ok=False)
    done = v4forge(installed, "verify", "--artifact", artifact, "--sums-only")
    assert done.stderr.endswith(f"hint: v4forge verify --artifact {artifact}\n")
    assert v4forge(installed, "compare", "nowhere", "nowhere").stderr.endswith("\nhint: v4forge compare …\n")


def test_what_a_group_brings_is_asked_for_by_name(installed: Path) -> None:
    done = v4forge(installed, "dequant", "--source", "x", "--out", "y", libraries=False)
    assert done.returncode == 1, done.stderr
    assert re.fullmatch(r"error: dequant needs (\w+), .+\nhint: pip install .*v4forge.*\n", done.stderr)
    done = v4forge(installed, "unknown")
    assert done.returncode == 2 and "there is no program 'unknown'" in done.stderr
