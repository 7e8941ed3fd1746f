"""verify on artifacts that are damaged in one way each: the check that is for it fails and names the damage."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from corruptions import CORRUPTIONS, Corruption, page
from damage import EXPERT, Artifact, dropped, one_code_bit, sha256
from programs import ROOT, calibrate_arguments, run_here, write_corpus, write_source
from synthetic import TINY
from torch import Tensor

from v4forge.checkpoint import codec
from v4forge.checkpoint.prefetch import read_into
from v4forge.checkpoint.reader import INDEX
from v4forge.checkpoint.recipe import INT4, MIXED
from v4forge.verification import checks


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `source`, `artifact`, `artifact-rtn`, and `artifact-mixed`, by that recipe."""
    base = tmp_path_factory.mktemp("pristine")
    source, corpus = write_source(base / "source"), write_corpus(base / "corpus.txt")
    for options, suffix in (((), ""), (("--method", "rtn"), "-rtn"), (("--recipe", MIXED), "-mixed")):
        work, out = base / f"layers{suffix}", base / f"artifact{suffix}"
        assert run_here("calibrate", *calibrate_arguments(source, work, corpus), *options) == 0
        assert run_here("postprocess", "--source", source, "--work", work, "--out", out) == 0
    return base


@pytest.fixture
def artifact(pristine: Path, tmp_path: Path) -> Artifact:
    return Artifact(Path(shutil.copytree(pristine / "artifact", tmp_path / "artifact")), pristine / "source")


@pytest.fixture
def mixed(pristine: Path, tmp_path: Path) -> Artifact:
    return Artifact(Path(shutil.copytree(pristine / "artifact-mixed", tmp_path / "mixed")), pristine / "source")


@pytest.fixture
def tiny_artifact(rounded: Path, tmp_path: Path) -> Artifact:
    """Of models/tiny, which predicts something; round-to-nearest, the worst that has to pass."""
    return Artifact(Path(shutil.copytree(rounded / "artifact", tmp_path / "artifact")), TINY)


def test_the_program_says_what_both_models_predict(
    tiny_artifact: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = ("--artifact", tiny_artifact.folder, "--source", TINY)
    assert run_here("verify", *folders, "--deep", 1024, "--seq-len", 128) == 0
    assert "then draft 3" in capsys.readouterr().out
    deep = json.loads((tiny_artifact.folder / "certificate.json").read_text())["deep"]
    assert deep["tokens"] == 8 * 127
    sequences = [list(range(40, 60)), list(range(100, 140))]
    (tmp_path / "served.jsonl").write_text("\n".join(map(json.dumps, sequences)))
    assert run_here("verify", *folders, "--tokens", tmp_path / "served.jsonl") == 0
    written = json.loads((tiny_artifact.folder / "certificate.json").read_text())
    assert written["not_run"] == {}
    assert all(check.keys() == {"name", "ok", "detail"} for check in written["checks"])
    assert written["deep"]["tokens"] == 19 + 39
    assert [each["k"] for each in written["deep"]["models"]["artifact"]["drafts"]] == [1, 2, 3]


def test_another_artifact_is_measured_beside_on_the_same_tokens(
    tiny_artifact: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(tiny_artifact.folder, tmp_path / "other"))
    options = ("--artifact", tiny_artifact.folder, "--source", TINY, "--deep", 512, "--seq-len", 128, "--threads", 2)
    assert run_here("verify", *options, "--beside", other) == 0
    shown = capsys.readouterr().out
    assert re.search(r"source +artifact +round-to-nearest *$", shown, re.MULTILINE) and "…" not in shown
    deep = json.loads((tiny_artifact.folder / "certificate.json").read_text())["deep"]
    assert deep["models"].keys() == {"source", "artifact", "round-to-nearest"}
    ours, theirs = deep["models"]["artifact"], deep["models"]["round-to-nearest"]
    assert ours == theirs and ours["made"] == "round-to-nearest" and ours["bytes"] > 1e7
    assert deep["text"]["file"] == "heldout.txt" and 1 < deep["unigram_perplexity"] < 512
    assert not (other / "certificate.json").exists(), "nothing is said of whether that one is right"


@pytest.mark.parametrize(
    ("folder", "fact"), [("nowhere", "does not exist"), ("artifact-rtn", "was made from another source than")]
)
def test_what_does_not_belong_beside_is_refused(
    tiny_artifact: Artifact, pristine: Path, capsys: pytest.CaptureFixture[str], folder: str, fact: str
) -> None:
    options = ("--artifact", tiny_artifact.folder, "--source", TINY, "--deep", 512)
    assert run_here("verify", *options, "--beside", pristine / folder) == 1
    assert fact in capsys.readouterr().err


@pytest.mark.parametrize("options", [("--beside", "x"), ("--deep", 512, "--threads", 0)])
def test_options_that_make_no_sense_are_wrong_usage(pristine: Path, options: tuple[object, ...]) -> None:
    folders = ("--artifact", pristine / "artifact", "--source", pristine / "source")
    assert run_here("verify", *folders, *options) == 2


@pytest.mark.parametrize("option", [("--deep", 512), ("--tokens", "x.jsonl"), ("--expect", "gptq")])
def test_a_comparison_needs_the_source(
    pristine: Path, capsys: pytest.CaptureFixture[str], option: tuple[str, object]
) -> None:
    assert run_here("verify", "--artifact", pristine / "artifact", *option) == 2
    assert "only with --source" in capsys.readouterr().err


def test_a_text_that_is_missing_is_missed_before_anything_is_read(
    pristine: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("v4forge.verification.certificate.verify", None)
    folders = ("--artifact", pristine / "artifact", "--source", pristine / "source")
    assert run_here("verify", *folders, "--deep", 512) == 1
    assert "heldout.txt does not exist" in capsys.readouterr().err


PREDICTIONS = [each for each in CORRUPTIONS if each.check == "quality"]


@pytest.mark.parametrize("corruption", PREDICTIONS, ids=lambda c: c.what)
def test_what_only_a_prediction_shows_fails_its_check(tiny_artifact: Artifact, corruption: Corruption) -> None:
    assert tiny_artifact.failed(deep=True) == {}
    corruption.how(tiny_artifact)
    assert tiny_artifact.failed(hashing=False) == {}
    failed = tiny_artifact.failed(deep=True)
    assert failed.keys() == {"quality", "recorded"}
    assert corruption.named in failed["quality"]


@pytest.mark.parametrize("corruption", [c for c in CORRUPTIONS if c not in PREDICTIONS], ids=lambda c: c.what)
def test_a_corruption_fails_its_check_and_is_named(artifact: Artifact, mixed: Artifact, corruption: Corruption) -> None:
    artifact = mixed if corruption.recipe == MIXED else artifact
    corruption.how(artifact)
    beside = "source" in corruption.needs
    failed = artifact.failed(with_source=beside)
    if beside:
        assert corruption.check not in artifact.failed(with_source=False)
    assert corruption.check in failed, failed
    assert corruption.named in failed[corruption.check]
    if corruption.check not in ("checksums", "opens"):
        assert "checksums" not in failed, failed["checksums"]


def test_every_check_fails_on_some_corruption() -> None:
    foreign = {"layout"}  # tests/quantization/test_hf_folder.py makes real ones
    assert {each.check for each in CORRUPTIONS} == {row.name for row in checks.CHECKS} - foreign


def test_the_page_of_corruptions_is_the_table() -> None:
    assert (ROOT / "docs" / "verify.md").read_text() == page()


def test_resealing_alone_is_no_damage(artifact: Artifact, mixed: Artifact) -> None:
    for each in (artifact, mixed):
        each.edit(lambda tensors: None)
        assert each.failed() == {}
        assert each.failed(with_source=False) == {}


def test_the_recipe_can_be_asked_for(pristine: Path, mixed: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--artifact", mixed.folder, "--source", pristine / "source", "--expect", "gptq", "--recipe")
    assert run_here("verify", *options, MIXED) == 0
    assert "routed experts: GPTQ (recipe mixed)" in capsys.readouterr().out
    assert run_here("verify", *options, INT4) == 1
    certificate = json.loads((mixed.folder / "certificate.json").read_text())
    (failed,) = (each for each in certificate["checks"] if not each["ok"])
    assert failed["name"] == "provenance" and "the recipe was 'mixed', 'int4' expected" in failed["detail"]


def test_without_hashing_a_code_s_flipped_bit_is_the_only_thing_that_is_missed(artifact: Artifact) -> None:
    artifact.replace(f"{EXPERT}.weight_packed", one_code_bit)
    assert artifact.failed().keys() == {"recorded"}
    assert artifact.failed(hashing=False) == {}


@pytest.mark.parametrize("with_source", [False, True])
def test_each_byte_is_read_once(artifact: Artifact, monkeypatch: pytest.MonkeyPatch, with_source: bool) -> None:
    read: dict[tuple[str, int], int] = {}

    def counted(file: int, path: str, target: memoryview, offset: int) -> None:
        assert (path, offset) not in read
        read[path, offset] = len(target)
        read_into(file, path, target, offset)

    monkeypatch.setattr("v4forge.verification.scan.read_into", counted)
    assert artifact.failed(with_source=with_source, hashing=False) == {}
    size = 0
    for folder in (artifact.folder, artifact.source)[: 1 + with_source]:
        for path in folder.glob("*.safetensors"):
            size += path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little")
    assert sum(read.values()) == size


def test_structural_damage_shows_without_the_source(artifact: Artifact) -> None:
    artifact.replace(f"{EXPERT}.weight_packed", torch.zeros_like)
    artifact.replace("layers.2.attn.attn_sink", Tensor.bfloat16)
    assert {"tensors", "expert codes"} <= artifact.failed(with_source=False).keys()


@pytest.mark.parametrize("which", ["artifact", "artifact-rtn", "artifact-mixed"])
def test_an_undamaged_artifact_passes_and_its_certificate_names_the_sums(
    pristine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], which: str
) -> None:
    folder = Path(shutil.copytree(pristine / which, tmp_path / which))
    assert run_here("verify", "--artifact", folder, "--source", pristine / "source") == 0
    assert capsys.readouterr().out.rstrip().endswith("certificate: ok")
    written = json.loads((folder / "certificate.json").read_text())
    assert written["ok"] is True
    assert written["sums_sha256"] == sha256(folder / "SHA256SUMS")
    assert [check["name"] for check in written["checks"]] == [
        row.name for row in checks.CHECKS if "deep" not in row.needs
    ]
    assert all(check["ok"] and check["detail"] for check in written["checks"])


def test_the_program_exits_1_and_writes_what_failed(artifact: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("verify", "--artifact", artifact.folder, "--source", artifact.source) == 0
    artifact.replace(f"{EXPERT}.weight_packed", torch.zeros_like)
    assert run_here("verify", "--artifact", artifact.folder, "--source", artifact.source) == 1
    assert f"certificate: FAILED (4 of {len(checks.CHECKS) - 1} checks)" in capsys.readouterr().out
    written = json.loads((artifact.folder / "certificate.json").read_text())
    assert written["ok"] is False
    failed = {check["name"]: check["detail"] for check in written["checks"] if not check["ok"]}
    assert failed.keys() == {"expert codes", "expert errors", "expert slopes", "recorded"}
    assert all(EXPERT in detail for detail in failed.values())


def test_only_the_first_failures_of_a_check_are_spelled_out(artifact: Artifact) -> None:
    dropped("mtp.")(artifact)
    detail = artifact.failed()["tensors"]
    assert detail.count("is missing") == checks.SHOWN
    missing = sum(name.startswith("mtp.") for name in json.loads((artifact.folder / INDEX).read_text())["weight_map"])
    assert missing == 0
    assert " … and " in detail


def test_an_artifact_of_another_source_fails(artifact: Artifact, tmp_path: Path) -> None:
    other = Artifact(artifact.folder, write_source(tmp_path / "other", seed=1))
    assert other.failed().keys() == {"passed through", "expert errors", "expert slopes", "provenance"}


@pytest.mark.parametrize(("which", "method"), [("artifact", "gptq"), ("artifact-rtn", "rtn")])
def test_the_method_is_told_from_the_codes(
    pristine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], which: str, method: str
) -> None:
    folder = Path(shutil.copytree(pristine / which, tmp_path / which))
    for expected in ("gptq", "rtn"):
        options = ("--artifact", folder, "--source", pristine / "source", "--expect", expected)
        assert run_here("verify", *options) == (0 if expected == method else 1)
    said = " ".join(capsys.readouterr().out.split())
    assert f"was quantized by {checks.METHODS[method]}" in said


def swapped_nibbles(weight: Tensor, scale: Tensor) -> Tensor:
    byte = weight.view(torch.uint8)
    return codec.decode_fp4((byte >> 4 | byte << 4).view(torch.int8), scale)


FAULTS: dict[str, tuple[str, Callable[..., Tensor], str]] = {
    "nibbles swapped": ("fp4", swapped_nibbles, "mtp.0.ffn.experts.0.w1.weight differs from the source"),
    "an FP8 scale off by 2": (
        "fp8",
        lambda weight, scale: 2 * codec.decode_fp8(weight, scale),
        "layers.1.attn.indexer.wq_b.weight differs from the source",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_postprocess_s_own_decoding_is_seen(
    pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    fmt, decode, named = FAULTS[fault]
    out = tmp_path / "artifact"
    work = Path(shutil.copytree(pristine / "layers", tmp_path / "layers"))
    with monkeypatch.context() as patched:
        patched.setitem(codec.DECODERS, fmt, decode)
        if fmt == "fp8":  # lies in the layer files, which calibrate writes
            shutil.rmtree(work)
            arguments = calibrate_arguments(pristine / "source", work, pristine / "corpus.txt")
            assert run_here("calibrate", *arguments, "--method", "rtn") == 0
        assert run_here("postprocess", "--source", pristine / "source", "--work", work, "--out", out) == 0
    failed = Artifact(out, pristine / "source").failed()
    assert named in failed["passed through"]
