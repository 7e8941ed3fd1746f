"""manifest: everything that determines an artifact's bytes, and nothing else."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from v4forge import artifact_folder, machine
from v4forge.checkpoint import incoming, recipe
from v4forge.model import corpus
from v4forge.pipeline import requirements
from v4forge.quantization import layer_files, manifest

MARK: dict[str, Any] = {
    "source": {"config.json": "", "model.safetensors": ""},
    "corpus": {"sha256": "2" * 64, "origin": {"file_sha256": "3" * 64, "documents": 9}, "documents": [4, 0], "seed": 7},
    "settings": {"method": "gptq", "dampening": 0.01},
    "code": {"gptq": "4" * 64},
    "versions": {"torch": "2.x"},
    "hardware": "A Processor",
}
LOSSES = {which: {"gptq": [0.1, 0.3], "rtn": [0.4, 0.6]} for which in ("w1", "w2", "w3")}
REPORT: dict[str, Any] = {
    "layer": 0,
    "tokens": [17, 400],
    "error": LOSSES,
    "codes": {which: ["5" * 16, "6" * 16] for which in LOSSES},
    "blended": [{"expert": 0, "tokens": 17, "inputs": "w1, w3"}],
    "fallback": [],
    "run": [{"seconds": {"sweep": 1.5}, "peak_gpu": 0, "peak_host": 1}],
}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A source and an artifact of two files each."""
    for folder in ("source", "artifact"):
        (tmp_path / folder).mkdir()
        for name in MARK["source"]:
            (tmp_path / folder / name).write_text(f"{name} of the {folder}")
    return tmp_path / "source", tmp_path / "artifact"


def written(folders: tuple[Path, Path], made_by: str = recipe.INT4) -> dict[str, Any]:
    source, artifact = folders
    config = replace(requirements.flash_config(), recipe=made_by)
    manifest.write(artifact, [REPORT], source, config, MARK, source.parent / "digests.json")
    return dict(json.loads((artifact / "manifest.json").read_text()))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_source_is_named_with_the_revision_that_fetch_took(folders: tuple[Path, Path]) -> None:
    incoming.write_listing(folders[0], incoming.Listing("org/model", "a" * 40, {}))
    source = written(folders)["source"]
    assert (source["repo"], source["revision"]) == ("org/model", "a" * 40)
    assert source["files"]["config.json"]["sha256"] == sha256(folders[0] / "config.json")


def test_a_source_that_was_not_fetched_has_hashes_and_no_name(folders: tuple[Path, Path]) -> None:
    source = written(folders)["source"]
    assert (source["repo"], source["revision"]) == (None, None)
    assert source["files"].keys() == MARK["source"].keys()


def test_the_recipe_is_the_table_itself(folders: tuple[Path, Path]) -> None:
    told = written(folders)["recipe"]
    assert [recipe.Rule(**rule) for rule in told["rules"]] == list(recipe.RULES)
    assert told["aliases"] == recipe.ALIASES
    assert told["name"] == recipe.INT4


def test_recipe_mixed_says_which_layers_it_leaves(folders: tuple[Path, Path]) -> None:
    told = written(folders, recipe.MIXED)["recipe"]
    kept, *others = (recipe.Rule(**rule) for rule in told["rules"])
    assert told["name"] == recipe.MIXED and others == list(recipe.RULES)
    assert (kept.kind, kept.source, kept.artifact) == ("hash-routed experts", "fp4", "mxfp4")
    assert "layers 0 to 2" in kept.why


def test_the_calibration_is_the_whole_fingerprint_but_the_source(folders: tuple[Path, Path]) -> None:
    assert written(folders)["calibration"] == {key: value for key, value in MARK.items() if key != "source"}


def test_a_layer_has_its_losses_tokens_by_expert_and_codes(folders: tuple[Path, Path]) -> None:
    (layer,) = written(folders)["layers"]
    assert layer["tokens"] == [17, 400] and layer["codes"] == REPORT["codes"] and layer["blended"] == REPORT["blended"]
    assert layer["error"]["w2"] == {"gptq": pytest.approx(0.2), "rtn": pytest.approx(0.5)}
    assert "run" not in layer, "seconds and memory determine nothing"


def test_two_runs_give_the_same_bytes(folders: tuple[Path, Path]) -> None:
    written(folders)
    first = [(folders[1] / name).read_bytes() for name in ("manifest.json", "SHA256SUMS")]
    (folders[1] / "run.json").write_text("of another run")
    written(folders)
    assert [(folders[1] / name).read_bytes() for name in ("manifest.json", "SHA256SUMS")] == first


def test_what_determines_no_bytes_is_named_and_not_summed(folders: tuple[Path, Path]) -> None:
    for name in artifact_folder.UNSUMMED:
        (folders[1] / name).write_text("later")
    content = written(folders)
    sums = (folders[1] / "SHA256SUMS").read_text()
    assert content["run"] == "run.json"
    assert content["files"].keys() == MARK["source"].keys()
    assert not any(f"  {name}\n" in sums for name in artifact_folder.UNSUMMED) and "  manifest.json\n" in sums


def text(name: str, file_sha256: str = "3" * 64) -> corpus.Corpus:
    origin = {"file_sha256": file_sha256, "documents": 9}
    return corpus.Corpus(torch.zeros(2, 4, dtype=torch.int64), "2" * 64, 7, f"packed from {name}", origin, (4, 0))


def test_a_fingerprint_names_the_documents_and_the_processor() -> None:
    mark = layer_files.fingerprint({}, text("a.txt"), layer_files.Settings(), torch.device("cpu"))
    assert mark["corpus"]["documents"] == [4, 0] and mark["corpus"]["origin"]["documents"] == 9
    assert (mark["corpus"]["samples"], mark["corpus"]["seq_len"], mark["corpus"]["seed"]) == (2, 4, 7)
    assert mark["hardware"] == machine.cpu_identity()


def test_what_a_corpus_file_is_called_is_no_part_of_a_fingerprint() -> None:
    marks = [
        layer_files.fingerprint({}, each, layer_files.Settings(), torch.device("cpu"))
        for each in (text("a.txt"), text("b.txt"), text("a.txt", "9" * 64))
    ]
    assert marks[0] == marks[1] != marks[2]
