"""make lock and make image-lock: pins set, hashes that follow a version, what changed; all files or none."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dev import lock
from v4forge import pins
from v4forge.errors import UserError
from v4forge.images import lock_update, locks

ROOT = Path(__file__).resolve().parents[2]
SHA = "0123456789abcdef" * 4
VERSIONS = "# a\nTORCH_VERSION=7.1\n\n# b\nTORCH_CPU_SHA256_CP311_X86_64=aa\nB=\\1\n"
PAGE = f"""<html><body>
<a href="/whl/cpu/torch-7.2%2Bcpu-cp311-cp311-manylinux_2_28_x86_64.whl#sha256={SHA}" data-x="y">a</a>
<a href='torch-7.2%2Bcpu-cp311-cp311-win_amd64.whl#sha256={SHA[::-1]}'>b</a>
<a href="torch-7.2%2Bcpu-cp312-cp312-manylinux_2_28_x86_64.whl#md5=00">c</a></body></html>"""
OLD = {
    locks.lock_file("calib"): {"torch==7.1": [], "numpy==2.0": ["--hash=sha256:a"], "rich==3": []},
    locks.lock_file("serve"): {"vllm==0.1 ; python_version < '3'": []},
}


def test_the_committed_locks_are_in_the_form_that_lock_writes() -> None:
    for source in locks.SOURCES:
        for name in source.locks:
            text = (ROOT / locks.lock_file(name)).read_text(encoding="utf-8")
            assert locks.dump(locks.parse(text), f"requirements-{source.name}.in") == text


def test_a_pin_is_set_on_its_line_and_nothing_else_moves() -> None:
    text = lock_update.with_values(VERSIONS, {"TORCH_VERSION": "7.2", "B": r"c\2"})
    assert text == VERSIONS.replace("=7.1", "=7.2").replace(r"=\1", r"=c\2")


@pytest.mark.parametrize("key", ["TORCH", "ORCH_VERSION", "TORCH.VERSION"])
def test_a_key_that_versions_env_lacks_is_refused(key: str) -> None:
    with pytest.raises(UserError, match=f"versions.env has no {key}"):
        lock_update.with_values(VERSIONS, {key: "1"})


def test_a_wheel_hash_follows_its_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(PAGE, encoding="utf-8")
    wheels = [dataclasses.replace(wheel, page=page.as_uri()) for wheel in lock_update.WHEELS]
    monkeypatch.setattr(lock_update, "WHEELS", wheels)
    key = "TORCH_CPU_SHA256_CP311_X86_64"
    values = {"TORCH_VERSION": "7.2", key: "old"}
    assert lock_update.wheel_hashes(values, {}, OLD) == {key: SHA}
    assert lock_update.wheel_hashes(values, {key: "old"}, OLD) == {}
    assert lock_update.wheel_hashes(values | {"TORCH_VERSION": "7.1"}, {}, OLD) == {}
    with pytest.raises(UserError, match=r"lists 0 files torch-7\.2\+cpu-cp312-cp312"):
        lock_update.wheel_hashes({"TORCH_VERSION": "7.2", "TORCH_CPU_SHA256_CP312_X86_64": "old"}, {}, OLD)


def test_an_index_that_cannot_be_read_is_answered_with_the_command_to_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wheels = [dataclasses.replace(wheel, page=(tmp_path / "none").as_uri()) for wheel in lock_update.WHEELS]
    monkeypatch.setattr(lock_update, "WHEELS", wheels)
    with pytest.raises(UserError, match="cannot be read") as error:
        lock_update.wheel_hashes({"VLLM_VERSION": "0.2", "VLLM_WHEEL_SHA256": ""}, {"VLLM_VERSION": "0.2"}, OLD)
    assert error.value.hint.endswith('make image-lock SET="VLLM_VERSION=0.2 VLLM_WHEEL_SHA256=…"')


def test_every_wheel_has_a_pin_and_a_package_of_its_lock() -> None:
    for wheel in lock_update.WHEELS:
        assert any(re.fullmatch(wheel.key, key) for key in pins.read()), wheel.key
        text = (ROOT / locks.lock_file(wheel.lock)).read_text(encoding="utf-8")
        assert wheel.package in {locks.package_of(line) for line in locks.parse(text)}


def test_a_release_is_not_changed_without_its_commit() -> None:
    values = {"VLLM_VERSION": "0.1", "VLLM_COMMIT": "c", "RUFF_VERSION": "1"}
    with pytest.raises(UserError, match="VLLM_VERSION changes and VLLM_COMMIT would not") as error:
        lock_update.check_together(values, {"VLLM_VERSION": "0.2"})
    assert error.value.hint == 'make image-lock SET="VLLM_VERSION=0.2 VLLM_COMMIT=…"'
    for given in ({"VLLM_VERSION": "0.2", "VLLM_COMMIT": "d"}, {"VLLM_VERSION": "0.1"}, {"RUFF_VERSION": "2"}):
        lock_update.check_together(values, given)


def test_what_changed_is_one_line_a_package() -> None:
    old = lock.versions({"a==1": [], "b==1": ["x"], "c==1": [], "same==1": ["x"]})
    new = lock.versions({"a==22": [], "b==1": ["y"], "dd==1 ; m": [], "dd==2 ; n": [], "same==1": ["x"]})
    assert lock.changes(old, new) == [
        "  a   1    -> 22",
        "  b   1    -> the same, other hashes or markers",
        "  c   1    -> none",
        "  dd  none -> 1, 2",
    ]
    assert lock.changes(lock.shown({"A": SHA}), lock.shown({"A": SHA[::-1]})) == ["  A  01234567…cdef -> fedcba98…3210"]


def test_no_file_is_written_unless_all_can_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lock_update, "ROOT", tmp_path)
    (tmp_path / "versions.env").write_text("old")
    (tmp_path / "docker").write_text("a file where the locks' folder should be")
    with pytest.raises(UserError, match="cannot write"):
        lock_update.write_all({"versions.env": "new", "docker/requirements-calib.txt": "new"})
    assert {path.name: path.read_text()[:3] for path in tmp_path.iterdir()} == {"versions.env": "old", "docker": "a f"}
    lock_update.write_all({"versions.env": "new", "other/lock.txt": "new"})
    assert (tmp_path / "versions.env").read_text() == (tmp_path / "other/lock.txt").read_text() == "new"


def test_a_source_takes_its_own_key_before_the_general_one() -> None:
    by_name = {source.name: source for source in locks.SOURCES}
    calib, serve = by_name["calib"], by_name["serve"]
    values = {"TORCH_VERSION": "7.1", "SERVE_TORCH_VERSION": "8.1", "NUMPY_VERSION": "2"}
    assert locks.constraints(calib, "torch\nnumpy # why\n", values) == ["torch==7.1", "numpy==2"]
    assert locks.constraints(serve, "torch[x]\nnumpy\n", values) == ["torch==8.1", "numpy==2"]
    with pytest.raises(UserError, match=r"versions\.env has no RICH_VERSION, which docker/requirements-calib\.in asks"):
        locks.constraints(calib, "rich", values)


def test_the_hashes_of_a_cpu_torch_go_with_the_version_that_the_source_takes() -> None:
    serve, cpu = (locks.source_of(name) for name in ("serve", "serve-cpu"))
    values = {"TORCH_VERSION": "7.1", "SERVE_TORCH_VERSION": "8.1", "TORCH_CPU_SHA256_CP311_X86_64": SHA}
    assert serve.cpu_torch_hashes(values) == []
    assert cpu.cpu_torch_hashes(values) == [f"--hash=sha256:{SHA}"]
    assert cpu.cpu_torch_hashes(values | {"SERVE_CPU_TORCH_VERSION": "9.1"}) == []


def test_what_is_never_installed_is_in_no_lock() -> None:
    for source in locks.SOURCES:
        for name in source.locks:
            lock = locks.parse((ROOT / locks.lock_file(name)).read_text(encoding="utf-8"))
            packages = {locks.package_of(line) for line in lock}
            assert not packages & set(source.without)
            if source.without:
                assert not any(map(locks.CUDA_PACKAGE.fullmatch, packages))


def test_an_override_is_said_in_the_in_file() -> None:
    assert locks.overrides("a\nb-c # override: why\nd # overrides nothing\n# e # override: why\n") == ["b-c"]


@pytest.mark.parametrize(("argument", "fact"), [("NOPE=1", "versions.env has no NOPE"), ("x", "'x' is not KEY=VALUE")])
def test_a_wrong_argument_is_one_fact_and_one_hint(argument: str, fact: str) -> None:
    done = subprocess.run([sys.executable, "-m", "dev.lock", argument], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["error", "hint"]
    assert fact in done.stderr
