"""verification.engines and what verify, reproduce and the report know of `calibrate --engine`: both on models/tiny."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from programs import run_here

from v4forge.checkout import ROOT
from v4forge.errors import UserError
from v4forge.files import read_json
from v4forge.verification import engines, reproduce

TINY = ROOT / "models" / "tiny"
TEXT = ("--corpus", TINY / "calibration.jsonl", "--samples", 8, "--seq-len", 128)

pytestmark = pytest.mark.slow


def calibrated(work: Path, *options: object) -> Path:
    assert run_here("calibrate", "--source", TINY, "--work", work, *TEXT, *options) == 0
    return work


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with the layers of both engines, and the artifact of the other one."""
    work = tmp_path_factory.mktemp("made") / "tiny"
    calibrated(work / "layers")
    calibrated(work / "layers-peer", "--engine", "llmcompressor")
    options = ("--source", TINY, "--work", work / "layers-peer", "--out", work.parent / "peer/artifact")
    assert run_here("postprocess", *options) == 0
    return work


@pytest.fixture
def work(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "tiny"))


def test_the_report_finds_the_other_engine_by_its_fingerprint_and_sets_both_beside_each_other(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here("report", "--work", work) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"\d+\.\d\d% of the codes of GPTQ and of GPTQ by llm-compressor \S+ are equal", said), said
    found = read_json(work / "reports/engines.json")
    assert [each["layer"] for each in found["layers"]] == [0, 1, 2, 3]
    assert found["differing"] == [] and [each["engine"] for each in found["engines"]] == ["v4forge", "llmcompressor"]
    for row in found["layers"]:
        report = read_json(work / f"layers/layer-{row['layer']:03}.json")
        assert 0.9 < row["equal_codes"] <= 1 and row["loss"][1] == pytest.approx(row["loss"][0], rel=0.02)
        losses = [loss for by in report["error"].values() for loss in by["gptq"]]
        assert row["loss"][0] == pytest.approx(sum(losses) / len(losses))
        assert 0 <= row["identical"] <= row["matrices"] == len(losses)
    assert 'id="engines"' in (work / "reports/index.html").read_text()
    assert "## Two implementations of GPTQ" in (work / "reports/benchmarks.md").read_text()


def test_what_was_found_is_kept_while_both_are_the_same(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_here("report", "--work", work) == 0
    monkeypatch.setattr(engines, "compared", None)
    assert run_here("report", "--work", work) == 0
    shutil.rmtree(work / "layers-peer")
    assert run_here("report", "--work", work) == 0
    assert "Two implementations of GPTQ" in (work / "reports/index.html").read_text(), "though one is gone by now"
    fingerprint = read_json(work / "layers/fingerprint.json")
    fingerprint["settings"]["dampening"] = 0.5
    (work / "layers/fingerprint.json").write_text(json.dumps(fingerprint))
    assert run_here("report", "--work", work) == 0
    assert "Two implementations of GPTQ" not in (work / "reports/index.html").read_text(), "it is of other layers"


def test_an_artifact_of_the_other_engine_can_be_given(made: Path, work: Path) -> None:
    shutil.rmtree(work / "layers-peer")
    assert run_here("report", "--work", work) == 0
    assert not (work / "reports/engines.json").exists()
    assert run_here("report", "--work", work, "--peer", made.parent / "peer/artifact") == 0
    by_artifact = read_json(work / "reports/engines.json")["layers"]
    ours, theirs = engines.opened(made), engines.opened(made / "layers-peer")
    assert by_artifact == engines.compared(ours, theirs, torch.device("cpu"))["layers"]


def test_what_cannot_be_compared_is_refused_with_what_can(made: Path, work: Path) -> None:
    ours, theirs = engines.opened(work / "layers"), engines.opened(work / "layers-peer")
    with pytest.raises(UserError, match="both by the engine v4forge") as raised:
        engines.check(ours, engines.opened(made))
    assert "--engine llmcompressor" in raised.value.hint
    with pytest.raises(UserError, match="neither an artifact nor the layers of a calibration"):
        engines.opened(work.parent)
    fingerprint = read_json(work / "layers-peer/fingerprint.json")
    fingerprint["source"]["config.json"] = "0" * 64
    (work / "layers-peer/fingerprint.json").write_text(json.dumps(fingerprint))
    with pytest.raises(UserError, match="was made from another source"):
        engines.check(ours, engines.opened(work / "layers-peer"))
    assert engines.beside(work, ours) is None
    for path in (work / "layers").glob("layer-*.safetensors"):
        path.unlink()
    with pytest.raises(UserError, match="has no layer that"):
        engines.check(engines.opened(work / "layers"), theirs)


@pytest.mark.parametrize(("expected", "code"), [("llmcompressor", 0), ("v4forge", 1)])
def test_verify_knows_whose_gptq_it_is(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], expected: str, code: int
) -> None:
    artifact = Path(shutil.copytree(made.parent / "peer/artifact", tmp_path / "artifact"))
    options = ("--artifact", artifact, "--source", TINY, "--expect", "gptq", "--engine", expected)
    assert run_here("verify", *options) == code
    said = " ".join(capsys.readouterr().out.split())
    assert "routed experts: GPTQ by llm-compressor" in said
    assert ("the engine was llmcompressor, v4forge expected" in said) == bool(code)


def test_reproduce_repeats_the_engine_and_compares_none_with_another(made: Path, tmp_path: Path) -> None:
    manifest = made.parent / "peer/artifact/manifest.json"
    assert reproduce.load(manifest).settings.engine == "llmcompressor"
    again = calibrated(tmp_path / "again", "--engine", "llmcompressor", "--compare", manifest)
    assert (again / "layer-003.safetensors").read_bytes() == (made / "layers-peer/layer-003.safetensors").read_bytes()
    options = ("--source", TINY, "--work", tmp_path / "other", *TEXT, "--compare", manifest)
    assert run_here("calibrate", *options) == 1
