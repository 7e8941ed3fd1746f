"""versions.env is the only hand-edited place for a version, and the locks agree with it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from scripts import lock
from v4forge import pins
from v4forge.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ("requirements-calib.txt", "requirements-cuda.txt", "requirements-dev.txt")
# Generated from versions.env, or a record of how something was made.
NOT_HAND_EDITED = re.compile(r"versions\.env|docker/requirements-.*\.txt|models/.*|benchmarks/results/.+")


def hand_edited() -> list[Path]:
    """The project's own text files: those git tracks or would."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.splitlines() if not NOT_HAND_EDITED.fullmatch(name)]


def test_comments_and_blank_lines_are_skipped_and_empty_values_kept() -> None:
    assert pins.parse("# a comment\n\nA_VERSION=1.2\nB=\n", "x") == {"A_VERSION": "1.2", "B": ""}


@pytest.mark.parametrize("line", ["no value", "a=lower case key", "A = 1", "A=1 # trailing", "=1"])
def test_a_line_that_is_not_key_value_is_named(line: str) -> None:
    with pytest.raises(UserError, match=re.escape("versions.env:2")):
        pins.parse(f"# first\n{line}\n", "versions.env")


def test_a_key_set_twice_is_named() -> None:
    with pytest.raises(UserError, match=r"versions\.env:2 sets A a second time"):
        pins.parse("A=1\nA=2\n", "versions.env")


def test_no_pin_is_written_in_another_hand_edited_file() -> None:
    # Two-part versions and names occur by chance; longer versions, commits and digests do not.
    values = [value for value in pins.read().values() if re.fullmatch(r"\d+(\.\d+){2,}|[0-9a-f]{40,}", value)]
    pattern = re.compile(rf"(?<![\w.])(?:{'|'.join(map(re.escape, values))})(?![\w]|\.\d)")
    found = []
    for path in hand_edited():
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):
            continue
        found += [f"{path.relative_to(ROOT)}: {match.group()}" for match in pattern.finditer(text)]
    assert not found


def test_in_files_hold_names_only() -> None:
    for name in ("requirements-calib.in", "requirements-dev.in"):
        for package in lock.names(ROOT / "docker" / name):
            assert re.fullmatch(r"[a-z0-9-]+", package), f"{name}: {package}"


def locked(*names: str) -> lock.Lock:
    merged: lock.Lock = {}
    for name in names:
        merged |= lock.parse((ROOT / "docker" / name).read_text(encoding="utf-8"))
    return merged


@pytest.mark.parametrize("name", ["calib", "dev"])
def test_the_lock_agrees_with_versions_env(name: str) -> None:
    packages = locked(*LOCKS).keys()
    for wanted in lock.constraints(lock.names(ROOT / "docker" / f"requirements-{name}.in")).split():
        assert wanted in packages, "run: make lock"


def test_every_locked_package_has_hashes_and_appears_once() -> None:
    requirements = [line for name in LOCKS for line in locked(name)]
    packages = [lock.package_of(line) for line in requirements]
    assert len(packages) == len(set(packages))
    assert all(locked(*LOCKS).values())


def test_torch_is_locked_with_the_hashes_of_both_builds() -> None:
    (torch,) = (hashes for line, hashes in locked("requirements-calib.txt").items() if line.startswith("torch=="))
    cpu = {f"--hash=sha256:{value}" for key, value in pins.read().items() if key.startswith("TORCH_CPU_SHA256_")}
    assert cpu < set(torch)
    assert len(cpu) == 4


def test_cuda_packages_are_in_the_cuda_lock_only() -> None:
    for name in LOCKS:
        for requirement in locked(name):
            is_cuda = lock.CUDA_PACKAGE.fullmatch(lock.package_of(requirement)) is not None
            assert is_cuda == (name == "requirements-cuda.txt"), requirement


def test_locks_name_no_host_and_no_path_of_a_machine() -> None:
    for name in LOCKS:
        text = (ROOT / "docker" / name).read_text(encoding="utf-8")
        assert not re.search(r"://|--index-url|--find-links|file:|(?<!\w)/(opt|root|home|tmp)/", text), name
