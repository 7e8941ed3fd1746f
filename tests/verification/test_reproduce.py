"""replay: a run made again from its manifest, compared layer by layer and file by file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import calibrate_arguments, run_here, write_corpus, write_source
from safetensors.torch import load_file

from scripts import replay as program
from v4forge import digests
from v4forge.checkpoint.writer import write_shard
from v4forge.errors import UserError
from v4forge.model import hub_rows
from v4forge.quantization import layer_files
from v4forge.verification import reproduce

Edit = Callable[[dict[str, Any]], object]


@dataclass(frozen=True)
class Made:
    """An artifact of 4 x 64 tokens, and what it was made from."""

    source: Path
    text: Path
    folder: Path

    @property
    def manifest(self) -> Path:
        return self.folder / "artifact" / "manifest.json"

    def edited(self, folder: Path, change: Edit, beside: bool = False) -> Path:
        """A manifest that says something else; beside: with the rest of the artifact beside it."""
        folder.mkdir()
        if beside:
            shutil.copytree(self.manifest.parent, folder, dirs_exist_ok=True)
        content = json.loads(self.manifest.read_text())
        change(content)
        (folder / "manifest.json").write_text(json.dumps(content))
        return folder / "manifest.json"

    def calibrate(self, work: Path, manifest: Path, *more: str) -> int:
        arguments = calibrate_arguments(self.source, work, self.text, samples=4)
        return run_here("calibrate", *arguments, "--compare", manifest, *more)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    base = tmp_path_factory.mktemp("replay")
    run = Made(write_source(base / "source"), write_corpus(base / "corpus.txt"), base / "made")
    arguments = calibrate_arguments(run.source, run.folder / "layers", run.text, samples=4)
    assert run_here("calibrate", *arguments) == 0
    words = ("--source", run.source, "--work", run.folder / "layers", "--out", run.folder / "artifact")
    assert run_here("postprocess", *words) == 0
    return run


def test_the_same_run_is_identical_layer_by_layer_and_file_by_file(
    made: Made, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [str(made.manifest), "--scratch", str(tmp_path), "--source", str(made.source), "--corpus", str(made.text)]
    assert program.main(words) == 0
    said = capfd.readouterr().out
    assert [f"layer {i} beside the manifest: identical, 12 matrices\n" in said for i in range(3)] == [True] * 3
    assert said.endswith("files have the same bytes\n") and "replay: identical, all " in said
    (work,) = tmp_path.glob("replay-*/tiny")
    assert (work / "artifact/manifest.json").read_bytes() == made.manifest.read_bytes()


def test_a_dry_run_says_what_the_replay_would_run_and_writes_nothing(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(made.manifest), "--scratch", str(tmp_path), "--source", str(made.source), "--corpus", str(made.text)]
    assert program.main([*words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "calibrate: would run" in said and "--compare" in said and "postprocess: would run" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "To go on: python -m scripts.replay "),
        (
            {"MAKELEVEL": "1", "MAKEFLAGS": "w -- MANIFEST=x/manifest.json"},
            "To go on: make reproduce MANIFEST=x/manifest.json\n",
        ),
    ],
)
def test_ctrl_c_says_the_command_that_goes_on_with_the_replay(
    made: Made,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    environment: dict[str, str],
    said: str,
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    for name in ("MAKELEVEL", "MAKEFLAGS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("v4forge.pipeline.runner.Runner.run", interrupted)
    words = [str(made.manifest), "--scratch", str(tmp_path), "--source", str(made.source), "--corpus", str(made.text)]
    assert program.main(words) == 130
    assert said in capsys.readouterr().err


def test_another_code_stops_at_its_layer_and_names_expert_and_matrix(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(content: dict[str, Any]) -> None:
        content["layers"][1]["codes"]["w3"][2] = "0" * 16

    assert made.calibrate(tmp_path / "layers", made.edited(tmp_path / "edited", change)) == 1
    said = capsys.readouterr()
    assert "layer 0 beside the manifest: identical" in said.out and "layer 1 beside" not in said.out
    assert said.err.startswith(f"error: layer 1, expert 2, w3, codes and scales: {'0' * 16} in the manifest, ")
    assert not layer_files.layer_file(tmp_path / "layers", 2).exists(), "nothing is made behind the first difference"


def test_a_replay_goes_on_behind_what_is_finished_and_compares_that_too(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(content: dict[str, Any]) -> None:
        content["layers"][0]["tokens"][0] += 1

    edited = made.edited(tmp_path / "edited", change)
    assert made.calibrate(tmp_path / "layers", edited) == 1
    first = layer_files.layer_file(tmp_path / "layers", 0).stat().st_ino
    assert "error: layer 0, expert 0, tokens: " in capsys.readouterr().err
    assert made.calibrate(tmp_path / "layers", edited) == 1, "the finished layer still differs"
    capsys.readouterr()
    assert made.calibrate(tmp_path / "layers", made.manifest) == 0
    assert capsys.readouterr().out.count("beside the manifest: identical") == 3
    assert layer_files.layer_file(tmp_path / "layers", 0).stat().st_ino == first


def test_losses_and_blended_experts_are_compared_too(made: Made, tmp_path: Path) -> None:
    report = json.loads(layer_files.layer_report(made.folder / "layers", 0).read_text())
    original = reproduce.load(made.manifest)
    exact = reproduce.Comparison(original, made.folder / "layers", True, torch.device("cpu"))
    assert "identical" in exact.layer(report)
    worse = {**report["error"], "w2": {"gptq": [2 * x for x in report["error"]["w2"]["gptq"]], "rtn": [1.0] * 4}}
    for changed, said in (({"error": worse}, "w2, mean loss with gptq"), ({"fallback": ["w1 0"]}, "fallback")):
        with pytest.raises(UserError, match=f"layer 0, {said}"):
            exact.layer({**report, **changed})


def elsewhere(content: dict[str, Any]) -> None:
    """A manifest of another machine: with other versions, code and hardware."""
    made = content["calibration"]
    made["versions"]["torch"] = "0.1"
    made["code"]["gptq"] = "0" * 64
    made["hardware"] = "NVIDIA H200"
    for layer in content["layers"]:
        layer["codes"]["w1"] = ["0" * 16] * 4
        layer["tokens"] = [tokens + 1 for tokens in layer["tokens"]]


def test_elsewhere_a_layer_is_held_to_the_tolerance_and_every_difference_is_said_first(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert made.calibrate(tmp_path / "layers", made.edited(tmp_path / "edited", elsewhere, beside=True)) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "promised" in line or "beside" in line]
    assert [line.split(": ", 1)[1].split(" ")[0] for line in lines[:3]] == ["hardware:", "torch", "code:"]
    assert "torch 0.1 there, 2" in lines[1]
    assert len(lines) == 6
    assert all("(+0.000%); 100.00% of the codes equal; 8 of 12 matrices identical" in line for line in lines[3:])


@pytest.mark.parametrize(("factor", "code"), [(1.008, 0), (1.012, 1), (0.988, 1)])
def test_elsewhere_a_loss_may_differ_by_the_stated_share(made: Made, tmp_path: Path, factor: float, code: int) -> None:
    def change(content: dict[str, Any]) -> None:
        elsewhere(content)
        for layer in content["layers"]:
            layer["error"] = {w: {m: v * factor for m, v in by.items()} for w, by in layer["error"].items()}

    shutil.copytree(made.folder / "layers", tmp_path / "layers")
    assert made.calibrate(tmp_path / "layers", made.edited(tmp_path / "edited", change)) == code


def test_elsewhere_too_few_equal_codes_are_a_difference(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edited = made.edited(tmp_path / "edited", elsewhere, beside=True)
    index = json.loads((edited.parent / "model.safetensors.index.json").read_text())["weight_map"]
    shard = edited.parent / index["layers.1.ffn.experts.0.w1.weight_packed"]
    tensors = load_file(shard)
    for name in [name for name in tensors if name.endswith("w1.weight_packed")]:
        tensors[name][: len(tensors[name]) // 2] ^= 0x11111111
    metadata = {"fingerprint": digests.digest_of(json.loads((made.folder / "layers/fingerprint.json").read_text()))}
    write_shard(shard, tensors, metadata)
    shutil.copytree(made.folder / "layers", tmp_path / "layers")
    assert made.calibrate(tmp_path / "layers", edited) == 1
    assert "layer 1, codes that are equal: at least 85% in the manifest, 83.33% here" in capsys.readouterr().err


def test_an_artifact_that_lies_in_a_cache_of_links_is_compared_by_its_codes_too(made: Made, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for path in made.manifest.parent.iterdir():
        shutil.copy(path, tmp_path / "blobs")
        (tmp_path / "snapshot" / path.name).symlink_to(f"../blobs/{path.name}")
    copy = reproduce.copied(reproduce.load(tmp_path / "snapshot/manifest.json"), tmp_path / "work/deep/original")
    assert all(reproduce.load(copy).shard(layer) for layer in range(3))


def test_another_source_is_refused_before_anything_is_made(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(content: dict[str, Any]) -> None:
        content["source"]["files"]["config.json"]["sha256"] = "0" * 64

    assert made.calibrate(tmp_path / "layers", made.edited(tmp_path / "edited", change)) == 1
    assert capsys.readouterr().err.startswith(f"error: the source's config.json: sha256 {'0' * 16}… in ")
    assert not (tmp_path / "layers").exists()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("--dampening", "0.2"), f"dampening is {layer_files.Settings().dampening} in "),
        (("--seed", "7"), "the calibration text is not that of "),
    ],
)
def test_other_settings_and_another_text_are_refused(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: tuple[str, str], said: str
) -> None:
    assert made.calibrate(tmp_path / "layers", made.manifest, *option) == 1
    assert capsys.readouterr().err.startswith(f"error: {said}")


def test_another_corpus_file_is_refused_by_its_content(made: Made, tmp_path: Path) -> None:
    other = write_corpus(tmp_path / "other.txt", 61)
    with pytest.raises(UserError, match=f"{other} has "):
        words = ["--scratch", str(tmp_path), "--source", str(made.source), "--corpus", str(other)]
        program.main([str(made.manifest), *words])
    same = tmp_path / "renamed.txt"
    same.write_bytes(made.text.read_bytes())
    reproduce.check_corpus(reproduce.load(made.manifest), same)


def test_a_data_set_must_be_the_manifests(made: Made, tmp_path: Path) -> None:
    here = hub_rows.pinned().origin

    def manifest_of(revision: str) -> reproduce.Original:
        def change(content: dict[str, Any]) -> None:
            content["calibration"]["corpus"]["origin"] = {**here, "revision": revision, "documents": 3}

        return reproduce.load(made.edited(tmp_path / revision, change))

    reproduce.check_corpus(manifest_of(here["revision"]), None)
    other = manifest_of("elsewhere")
    with pytest.raises(UserError, match="this would be of ") as raised:
        reproduce.check_corpus(other, None)
    assert f"CORPUS=hub:{here['repo']}@elsewhere,split={here['split']}" in raised.value.hint
    reproduce.check_corpus(other, reproduce.data_set(other))


def test_the_settings_that_make_does_not_have_come_from_the_manifest(made: Made, tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["calibration"]["settings"] |= {"experts": "all", "scales": "absmax", "dampening": 0.05, "threads": 1}

    original = reproduce.load(made.edited(tmp_path / "edited", change))
    words = [str(part) for part in program.table_of(original, "cpu")["calibrate"].arguments]
    told = {
        name: words[words.index(name) + 1] for name in ("--scales", "--dampening", "--threads", "--micro-batch-tokens")
    }
    assert told == {"--scales": "absmax", "--dampening": "0.05", "--threads": "1", "--micro-batch-tokens": "256"}
    assert "--calibrate-all-experts" in words and words[words.index("--device") + 1] == "cpu"


def test_a_file_that_must_be_the_same_everywhere_is_named(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(content: dict[str, Any]) -> None:
        elsewhere(content)
        for name in ("model-00001-of-00005.safetensors", "tokenizer.json"):
            content["files"][name]["sha256"] = "0" * 64

    original = reproduce.load(made.edited(tmp_path / "edited", change))
    assert program.verdict(original, made.folder, gpus=1) == 1
    said = capsys.readouterr().out
    assert "tokenizer.json: sha256 0000000000000000… there, " in said and said.count(": it must be the same") == 1
    assert said.rstrip().endswith("1 of 10 files that must be the same, tokenizer.json first")


def test_only_layers_may_differ_within_the_tolerance(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(content: dict[str, Any]) -> None:
        elsewhere(content)
        content["files"]["model-00001-of-00005.safetensors"]["sha256"] = "0" * 64

    assert program.verdict(reproduce.load(made.edited(tmp_path / "edited", change)), made.folder, gpus=1) == 0
    assert "replay: within the stated tolerance; 9 of 10 files have the same bytes" in capsys.readouterr().out


def test_another_number_of_gpus_lets_bytes_differ_and_of_processes_on_a_processor_does_not(
    made: Made, tmp_path: Path
) -> None:
    mark = json.loads((made.folder / "layers/fingerprint.json").read_text())
    path = made.edited(tmp_path / "edited", lambda content: content["calibration"].update(hardware="NVIDIA H200"))
    (path.parent / "run.json").write_text(json.dumps({"layers": [{"ranks": 8}]}))
    gpu = {**mark, "hardware": "NVIDIA H200"}
    assert reproduce.differences(reproduce.load(path), gpu, 8) == []
    assert reproduce.differences(reproduce.load(path), gpu, 4) == ["GPUs: 8 there, 4 here"]
    assert reproduce.differences(reproduce.load(made.manifest), mark, 4) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content.update(format=1), "has format 1"),
        (lambda content: content.update(calibration={"from": "another tool", "code": {}}), "another tool; nobody here"),
        (lambda content: content["layers"][0].pop("tokens"), "has no 'tokens'"),
        (lambda content: content.pop("layers"), "does not say what the artifact was made from"),
    ],
)
def test_a_manifest_that_cannot_be_repeated_is_refused(made: Made, tmp_path: Path, change: Edit, said: str) -> None:
    with pytest.raises(UserError, match=said):
        reproduce.load(made.edited(tmp_path / "edited", change))


def test_a_manifest_from_before_there_were_recipes_is_of_the_usual_one(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.folder / "layers", tmp_path / "layers")

    def before(content: dict[str, Any]) -> None:
        assert content["calibration"]["settings"].pop("recipe") == "int4"

    assert made.calibrate(tmp_path / "layers", made.edited(tmp_path / "edited", before)) == 0
