"""benchmarks.codes: what it says of calibration's own way, which the quality of models/tiny is too coarse to tell."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from problems import CPU, problem, weighted_error

from benchmarks import codes
from benchmarks.code_ways import DEFAULT, NOW, WAYS, Way, descended, quantized, solved, undoing
from benchmarks.lab import TINY, Lab, demo_tokens, held_out
from v4forge.checkpoint.reader import Checkpoint
from v4forge.files import read_json
from v4forge.intervals import Estimate, ratio
from v4forge.profiling import Watch
from v4forge.quantization import experts, gptq, layer_files


def lab_of(samples: int, sequences: int) -> Lab:
    return Lab(Checkpoint(Path(TINY.source)), demo_tokens(samples), [held_out(sequences, 256)], CPU)


def test_calibration_loses_a_fifth_less_than_before_and_not_by_its_scales_alone() -> None:
    with torch.no_grad():
        lab = lab_of(32, 16)
        names = (DEFAULT, "round to nearest, the scales of now", "now")
        before, nearest, now = (lab.errors(WAYS[name]).numpy() for name in names)
    assert ratio(now, before).interval().high < 0.81
    # What GPTQ's compensation and the refit do: a sweep that compensates nothing is round-to-nearest.
    assert ratio(now, nearest).interval().high < 0.95


def test_the_way_of_now_is_calibration_s() -> None:
    assert NOW.dampening == layer_files.Settings().dampening and NOW.scales is gptq.searched_scales
    p = problem(1)
    half, inner = p.weights[..., :128], p.hessians[:, :128, :128].contiguous()
    h = experts.Hessians(p.hessians, inner, [])
    wanted = experts.quantize(p.weights, half, h, layer_files.Settings(), range(3), Watch(CPU))
    for weights, hessians, made in ((p.weights, p.hessians, wanted.gate_up), (half, inner, wanted.down)):
        found = quantized(weights, hessians, NOW)
        assert torch.equal(found.codes, made.codes) and torch.equal(found.scale, made.scale)


def test_what_refines_gptq_lowers_what_it_is_to_lower() -> None:
    p = problem(2)
    scale = gptq.searched_scales(p.weights, p.hessians.diagonal(dim1=-2, dim2=-1))
    plain = gptq.gptq(p.weights, p.hessians, scale, 0.01)

    def lost(found: gptq.Quantized) -> float:
        return float(weighted_error(p.weights, found.dequantized(), p.hessians).sum())

    assert lost(descended(p.weights, plain, p.hessians, 0.01)) < 0.99 * lost(plain)
    assert lost(solved(p.weights, plain, p.hessians, 0.01)) < lost(plain)
    exact = p.x[0]
    served = exact + 0.1 * torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    target = undoing(p.weights[0], exact, served, Way(target=1.0, target_dampening=1e-4))
    wanted, plainly, undone = (
        x.double() @ w.double().T for x, w in ((exact, p.weights[0]), (served, p.weights[0]), (served, target))
    )
    assert float((undone - wanted).norm()) < 0.9 * float((plainly - wanted).norm())


@pytest.mark.soak  # the whole program; the lab's errors, above
def test_a_run_writes_every_way_s_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "codes.json"
    monkeypatch.setattr(codes, "HELDOUT", (4, 256))
    monkeypatch.setattr("sys.argv", ["codes", "--ways", DEFAULT, "now", "--samples", "4", "--kl", "--out", str(out)])
    codes.main()
    content = read_json(out)
    assert [row["way"] for row in content["rows"]] == [DEFAULT, "now"] and content["samples"] == 4
    first, now = content["rows"]
    assert first["against_default"]["value"] == first["kl_against_first"]["value"] == 1
    assert Estimate.of(now["against_default"]).value < 0.75  # few tokens: all of them in every Hessian pay
    assert 0 < now["kl"]["value"] < 0.05 and now["agreement"]["value"] > 0.85
