"""scripts.certified, and scripts.verify where it only compares bytes or may not write: what they say and end with."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import certified_artifact
import pytest
from keys import keypair
from programs import run_here

SHARD = "model-00002-of-00005.safetensors"


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return certified_artifact.write(tmp_path / "work")


def test_a_certified_artifact_is_told_with_how_it_was_compared(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here("certified", "check", artifact, "--check", "sizes") == 0
    assert run_here("certified", "check", artifact) == 0
    private, public = keypair(tmp_path)
    assert run_here("certified", "sign", artifact, "--key", private) == 0
    assert run_here("certified", "check", artifact, "--verify-key", public) == 0
    sizes, contents, signed, both = capsys.readouterr().out.splitlines()
    assert sizes == "certified: 11 files, 0.2 MB, by name and size; 2 checks passed"
    assert contents == "certified: 11 files, 0.2 MB, by content; 2 checks passed"
    assert signed == f"signed: {artifact}/certificate.sig.json"
    assert both == f"certified: 11 files, 0.2 MB, by content, signed by {public}; 2 checks passed"


@pytest.mark.parametrize("command", [["certified", "check"], ["verify", "--sums-only", "--artifact"]], ids=" ".join)
def test_what_is_not_there_or_was_never_certified_is_one_fact_and_one_command(
    command: list[str], artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here(*command, tmp_path / "none") == 1
    (artifact / "certificate.json").write_text("{}")
    assert run_here(*command, artifact) == 1
    (artifact / "certificate.json").unlink()
    assert run_here(*command, artifact) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["error", "hint"] * 3
    assert "does not exist" in lines[0] and "says that it failed" in lines[2] and "has no certificate.json" in lines[4]


def test_sums_only_says_whether_every_byte_is_the_certified_one_and_names_all_that_are_not(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    certificate = (artifact / "certificate.json").read_bytes()
    assert run_here("verify", "--artifact", artifact, "--sums-only") == 0
    assert capsys.readouterr().out == "sums: ok, 11 files, 0.2 MB, each byte as it was certified\n"
    os.truncate(artifact / SHARD, 20_000)
    with open(artifact / "model-00004-of-00005.safetensors", "r+b") as file:
        file.write(b"other")
    (artifact / "pytorch_model.bin").write_bytes(b"x")
    assert run_here("verify", "--artifact", artifact, "--sums-only") == 1
    said = capsys.readouterr()
    assert said.out == "sums: FAILED, 3 differences from what was certified\n"
    assert [line for line in said.err.splitlines() if line.startswith("error")] == [
        f"error: {artifact}/{SHARD} has 20,000 bytes where 40,002 were certified",
        f"error: {artifact}/pytorch_model.bin is none of the files that manifest.json lists",
        f"error: {artifact}/model-00004-of-00005.safetensors has other bytes than SHA256SUMS says",
    ]
    assert f"hint: mv {artifact}/pytorch_model.bin {artifact.parent}/" in said.err
    assert (artifact / "certificate.json").read_bytes() == certificate


def test_sums_only_refuses_a_certificate_of_another_key(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    private, public = keypair(tmp_path)
    words = ["verify", "--artifact", artifact, "--sums-only", "--verify-key", public]
    assert run_here(*words) == 1
    assert "is not signed" in capsys.readouterr().err
    assert run_here("certified", "sign", artifact, "--key", private) == 0
    assert run_here(*words) == 0


def test_a_verify_that_may_not_write_tells_all_that_it_found_and_that_the_certificate_went_nowhere(
    rounded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = shutil.copytree(rounded / "artifact", tmp_path / "work/artifact")
    (artifact / "certificate.json").mkdir()  # in the way, also of root
    (artifact.parent / ".stamps").write_text("")
    assert run_here("verify", "--artifact", artifact) == 1
    said = capsys.readouterr()
    assert "Every tensor that the config asks for is there" in said.out
    assert said.out.splitlines()[-1] == "certificate: ok"
    error, hint = said.err.splitlines()[-2:]
    assert error.startswith(f"error: the certificate could go nowhere: cannot write {artifact}/certificate.json: ")
    assert hint.startswith("hint: the same command with --certificate FILE")
    elsewhere = tmp_path / "elsewhere.json"
    assert run_here("verify", "--artifact", artifact, "--certificate", elsewhere) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"certificate: ok, in {elsewhere}"
    assert json.loads(elsewhere.read_text())["ok"] is True


def test_what_verify_has_read_is_remembered_and_an_old_signature_goes(
    rounded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = shutil.copytree(rounded / "artifact", tmp_path / "work/artifact")
    (artifact / "certificate.sig.json").write_text("{}")
    assert run_here("verify", "--artifact", artifact) == 0
    assert not (artifact / "certificate.sig.json").exists()
    monkeypatch.setattr("v4forge.digests.file_sha256", lambda path, *_: pytest.fail(f"{path} was read again"))
    assert run_here("certified", "check", artifact) == 0
