"""Recipe mixed: what calibration makes of hash-routed layers, whose experts keep upstream's own FP4 bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import CPU
from programs import contents, write_source
from safetensors.torch import load_file

from v4forge.checkpoint import layout
from v4forge.checkpoint.reader import Checkpoint
from v4forge.checkpoint.recipe import MIXED
from v4forge.model.corpus import Corpus
from v4forge.quantization import calibrate, experts, layer_files, layer_reports

KEPT, QUANTIZED = 0, 1  # the hash-routed layer of the synthetic model, and one that is not
MARK = {"a": "fingerprint"}


def run(source: Path, work: Path, said: list[str] | None = None, **settings: Any) -> Path:
    """Calibrates what `work` lacks; `said` gets the line of each layer."""
    tokens = torch.randint(64, (8, 64), generator=torch.Generator().manual_seed(3))
    corpus = None if settings.get("method") == "rtn" else Corpus(tokens, "sha256", 0, "random tokens")
    layer_files.claim(work, MARK, "refuse", print)
    chosen = layer_files.Settings(micro_batch_tokens=4 * 64, recipe=MIXED, **settings)
    log = (said if said is not None else []).append
    calibrate.calibrate(Checkpoint(source), corpus, work, chosen, MARK, CPU, log=log)
    return work


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    """A source, its layer files and the lines that were said of them."""
    base = tmp_path_factory.mktemp("mixed")
    said: list[str] = []
    source = write_source(base / "source")
    return source, run(source, base / "work", said), said


def report(work: Path, layer: int) -> dict[str, Any]:
    return dict(json.loads(layer_files.layer_report(work, layer).read_text()))


def test_a_hash_routed_layer_keeps_the_bytes_of_its_experts_and_the_others_are_int4(
    made: tuple[Path, Path, list[str]],
) -> None:
    source, work, _ = made
    upstream = Checkpoint(source)
    kept, quantized = (load_file(layer_files.layer_file(work, layer)) for layer in (KEPT, QUANTIZED))
    matrices = experts.matrix_shapes(upstream.config, KEPT, range(upstream.config.n_routed_experts))
    assert len(matrices) == 12
    for name in matrices:
        base = name.removesuffix(".weight")
        for ours, theirs in (("weight_packed", "weight"), ("weight_scale", "scale")):
            stored = kept[f"{base}.{ours}"]
            assert stored.dtype == torch.uint8
            assert torch.equal(stored, upstream.raw(f"{base}.{theirs}").view(torch.uint8))
        assert f"{base}.weight_shape" not in kept
    assert quantized["layers.1.ffn.experts.0.w1.weight_packed"].dtype == torch.int32
    expected = layout.artifact(upstream.made_by(MIXED).config)
    assert kept.keys() == {name for name in expected if name.startswith("layers.0.")}


def test_its_report_has_tokens_and_digests_and_no_loss(made: tuple[Path, Path, list[str]]) -> None:
    _, work, said = made
    kept, quantized = report(work, KEPT), report(work, QUANTIZED)
    assert (kept["stored"], quantized["stored"]) == ("mxfp4", "int4")
    assert kept["error"] == {} and quantized["error"].keys() == {"w1", "w2", "w3"}
    assert sum(kept["tokens"]) == sum(quantized["tokens"]) > 0 and kept["blended"] == []
    assert all(len(digests) == 4 for digests in kept["codes"].values())
    assert "upstream's own FP4 stays" in said[KEPT] and "lost" not in said[KEPT] and "lost" in said[QUANTIZED]
    first, second = layer_reports.layer_rows([kept, quantized])[:2]
    assert first.losses == {} and second.losses.keys() == {"w1", "w2", "w3"}


def test_a_run_that_goes_on_behind_it_gives_the_same_bytes(made: tuple[Path, Path, list[str]], tmp_path: Path) -> None:
    source, work, _ = made
    again = Path(shutil.copytree(work, tmp_path / "work"))
    for layer in (QUANTIZED, QUANTIZED + 1):
        layer_files.layer_file(again, layer).unlink()
    assert contents(run(source, again)) == contents(work)


def test_round_to_nearest_leaves_it_as_it_is_too(made: tuple[Path, Path, list[str]], tmp_path: Path) -> None:
    source, work, _ = made
    nearest = run(source, tmp_path / "rtn", method="rtn")
    ours, theirs = (load_file(layer_files.layer_file(folder, KEPT)) for folder in (work, nearest))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert report(nearest, QUANTIZED)["error"] == {}
