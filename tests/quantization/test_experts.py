"""What calibration makes of a layer's experts: few tokens, none, a Hessian without a factor, other batches."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import CPU, indefinite, problem, weighted_error
from safetensors.torch import load_file
from synthetic import write_checkpoint
from torch import Tensor

from v4forge.checkpoint import layout
from v4forge.checkpoint.codec import unpack_int4
from v4forge.checkpoint.reader import Checkpoint
from v4forge.checkpoint.writer import write_shard
from v4forge.model import deepseek_v4
from v4forge.model.corpus import Corpus
from v4forge.profiling import Watch
from v4forge.quantization import calibrate, experts, gptq, layer_files
from v4forge.quantization import layer as quantization_layer

RARE = 5  # the only token that layer 0 sends to expert 2
HASHED, ROUTED = 0, 1


@dataclass
class Calibrated:
    """A source in which layer 0's table never routes to expert 3 and rarely to 2, and layer 1's router never to 0."""

    source: Checkpoint
    work: Path
    tokens: Tensor  # [samples, seq_len]

    def again(self, work: Path) -> Calibrated:
        """The same into another folder, whatever has been changed meanwhile."""
        mark = {"a": "fingerprint"}
        layer_files.claim(work, mark, "refuse", print)
        corpus = Corpus(self.tokens, "sha256", 0, "random tokens")
        calibrate.calibrate(self.source, corpus, work, layer_files.Settings(micro_batch_tokens=4 * 64), mark, CPU)
        return Calibrated(self.source, work, self.tokens)

    def report(self, layer: int) -> dict:
        return json.loads(layer_files.layer_report(self.work, layer).read_text())

    def matrix(self, layer: int, expert: int, which: str) -> tuple[Tensor, gptq.Quantized]:
        """The source's weight and what calibration made of it, each with a leading dimension of 1."""
        base = f"layers.{layer}.ffn.experts.{expert}.{which}"
        stored = load_file(layer_files.layer_file(self.work, layer))
        codes = unpack_int4(stored[f"{base}.weight_packed"], stored[f"{base}.weight_shape"])
        shape = tuple(codes.shape)
        wanted = self.source.load(f"{base}.weight", shape).float()
        return wanted[None], gptq.Quantized(codes[None], stored[f"{base}.weight_scale"][None])


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Calibrated:
    folder = tmp_path_factory.mktemp("few")
    write_checkpoint(folder / "source", shards=1)
    (shard,) = (folder / "source").glob("*.safetensors")
    tensors = load_file(shard)
    table = tensors[f"layers.{HASHED}.ffn.gate.tid2eid"]
    table[:] = torch.tensor([0, 1])
    table[RARE] = torch.tensor([0, 2])
    tensors[f"layers.{ROUTED}.ffn.gate.bias"][0] = -100
    write_shard(shard, tensors)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(64, (8, 64), generator=generator)
    return Calibrated(Checkpoint(folder / "source"), folder, tokens).again(folder / "work")


def test_experts_that_few_tokens_reach_are_listed_with_their_tokens(calibrated: Calibrated) -> None:
    rare = int((calibrated.tokens == RARE).sum())
    assert 0 < rare < 128
    hashed, routed = calibrated.report(HASHED), calibrated.report(ROUTED)
    everything = calibrated.tokens.numel()
    assert hashed["tokens"] == [everything, everything - rare, rare, 0]
    assert {note["expert"]: note["tokens"] for note in hashed["blended"]} == {2: rare, 3: 0}
    assert routed["tokens"][0] == 0
    assert sum(routed["tokens"]) == 2 * everything
    assert {"expert": 0, "tokens": 0}.items() <= routed["blended"][0].items()
    assert hashed["fallback"] == routed["fallback"] == []


@pytest.mark.parametrize(("layer", "expert"), [(HASHED, 2), (HASHED, 3), (ROUTED, 0)])
def test_experts_that_few_tokens_reach_are_their_source_and_not_zero(
    calibrated: Calibrated, layer: int, expert: int
) -> None:
    for which in ("w1", "w2", "w3"):
        wanted, found = calibrated.matrix(layer, expert, which)
        assert len(found.codes.unique()) == 16
        served = found.dequantized().float()
        assert float((served - wanted).norm() / wanted.norm()) < 0.3
        # the kernel ran on a Hessian: an expert without one would be rounded to nearest
        assert not torch.equal(found.codes, gptq.round_to_nearest(wanted, found.scale).codes)


@torch.no_grad()
def experts_input(calibrated: Calibrated) -> Tensor:
    """What enters the experts of the first layer, [tokens, hidden]."""
    config = deepseek_v4.hf_config(calibrated.source.config)
    weights = deepseek_v4.Weights(calibrated.source, CPU)
    streams = deepseek_v4.embed(deepseek_v4.load_root(weights, config), config, calibrated.tokens)
    context = deepseek_v4.Rotary(config, CPU, weights.dtype).context(calibrated.tokens)
    return deepseek_v4.attend(deepseek_v4.load_layer(weights, config, HASHED), streams, context).x


def table_of(source: Checkpoint) -> Tensor:
    return source.raw(f"layers.{HASHED}.ffn.gate.tid2eid")


def test_an_expert_without_tokens_is_quantized_for_the_tokens_of_the_others(calibrated: Calibrated) -> None:
    x = experts_input(calibrated)
    everything = (gptq.gram(x) / len(x))[None]
    for which in ("w1", "w3"):
        wanted, found = calibrated.matrix(HASHED, 3, which)
        nearest = gptq.round_to_nearest(wanted, found.scale)
        lost = [weighted_error(wanted, q.dequantized(), everything) for q in (found, nearest)]
        assert bool(lost[0] < 0.9 * lost[1]), lost


def test_an_expert_with_enough_tokens_does_better_than_round_to_nearest(calibrated: Calibrated) -> None:
    config = calibrated.source.config
    compared = 0
    for layer in config.layers:
        report = calibrated.report(layer)
        for which, width in (
            ("w1", config.hidden_size),
            ("w2", config.moe_intermediate_size),
            ("w3", config.hidden_size),
        ):
            for tokens, ours, stock, nearest in zip(report["tokens"], *report["error"][which].values(), strict=True):
                if tokens >= width:
                    assert ours < nearest < stock  # the same scales make some of it, GPTQ the rest
                    compared += 1
    assert tuple(report["error"]["w1"]) == layer_files.LOST
    assert compared > 20


def test_layer_files_hold_exactly_their_layer_of_the_artifact(calibrated: Calibrated) -> None:
    expected = layout.artifact(calibrated.source.config)
    for layer in calibrated.source.config.layers:
        stored = load_file(layer_files.layer_file(calibrated.work, layer))
        assert set(stored) == {n for n in expected if n.startswith(f"layers.{layer}.")}


def test_a_matrix_that_gptq_gave_up_is_named_in_the_layer_s_report(
    calibrated: Calibrated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = experts.hessians

    def disturbed(rows: list[Tensor], gate_up: Tensor, *rest: Any) -> experts.Hessians:
        made = undisturbed(rows, gate_up, *rest)
        for i, e in enumerate(rest[-1]):
            if e in (1, 2):
                made.inner[i] = indefinite(made.inner.shape[-1])
            if e == 2:
                made.hidden[i] = indefinite(made.hidden.shape[-1])
        return made

    monkeypatch.setattr(experts, "hessians", disturbed)
    found = calibrated.again(tmp_path)
    for layer in calibrated.source.config.layers:
        assert found.report(layer)["fallback"] == ["w2 of expert 1", "w1, w3 of expert 2", "w2 of expert 2"]
    for expert, which in ((1, "w2"), (2, "w1"), (2, "w2"), (2, "w3")):
        wanted, stored = found.matrix(ROUTED, expert, which)
        assert torch.equal(stored.codes, gptq.round_to_nearest(wanted, stored.scale).codes)
    kept, changed = (load_file(layer_files.layer_file(work, HASHED)) for work in (calibrated.work, found.work))
    differing = {".".join(n.split(".")[4:6]) for n in kept if not torch.equal(kept[n], changed[n])}
    assert differing == {"1.w2", "2.w1", "2.w2", "2.w3"}


def test_the_number_of_experts_quantized_at_a_time_changes_no_code() -> None:
    p = problem(5)
    gate_up = p.weights.repeat(1, 6, 1)[:, :256]
    down = gate_up[..., :128]
    inner = p.hessians[:, :128, :128].contiguous()

    def of(*numbers: int) -> experts.Experts:
        some = list(numbers)
        h = experts.Hessians(p.hessians[some], inner[some], [])
        return experts.quantize(gate_up[some], down[some], h, layer_files.Settings(), some, Watch(CPU))

    whole, parts = of(0, 1, 2), (of(0, 1), of(2))
    for kind in ("gate_up", "down"):
        for part in ("codes", "scale"):
            joined = torch.cat([getattr(getattr(each, kind), part) for each in parts])
            assert torch.equal(getattr(getattr(whole, kind), part), joined)
    for which, methods in whole.error.items():
        for method, values in methods.items():
            assert parts[0].error[which][method] + parts[1].error[which][method] == pytest.approx(values, rel=1e-5)


def test_the_number_of_experts_in_a_step_changes_no_code(
    calibrated: Calibrated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization_layer, "EXPERT_BATCH", {"cpu": 3})
    found = calibrated.again(tmp_path)
    for layer in calibrated.source.config.layers:
        one, three = (load_file(layer_files.layer_file(work, layer)) for work in (calibrated.work, found.work))
        assert [n for n in one if not torch.equal(one[n], three[n])] == []
        for which, methods in calibrated.report(layer)["error"].items():
            for method, values in methods.items():
                assert found.report(layer)["error"][which][method] == pytest.approx(values, rel=1e-5)


def test_what_the_report_says_is_lost_is_what_the_codes_lose(calibrated: Calibrated) -> None:
    config = calibrated.source.config
    source, x = calibrated.source, experts_input(calibrated)
    for which in ("w1", "w3"):
        for expert in (0, 1):
            wanted, found = calibrated.matrix(HASHED, expert, which)
            rows = x[(table_of(source)[calibrated.tokens.flatten()] == expert).any(-1)].double()
            everything = x.double().T @ x.double() / len(x) * config.hidden_size
            hessian = ((rows.T @ rows + everything) / (len(rows) + config.hidden_size))[None]
            looked_at = slice(None, None, experts.ERROR_ROWS)
            wanted, q = wanted[:, looked_at], gptq.Quantized(found.codes[:, looked_at], found.scale[:, looked_at])
            errors = calibrated.report(HASHED)["error"][which]
            for method, served in (("gptq", q), ("rtn", experts.nearest(wanted.bfloat16()))):
                exact = weighted_error(wanted, served.dequantized(), hessian)
                assert errors[method][expert] == pytest.approx(float(exact), rel=1e-2)


def test_the_rules_for_scales_that_calibrate_offers_are_those_there_are() -> None:
    assert tuple(experts.SCALES) == layer_files.SCALES


def test_another_engine_chooses_nearly_the_same_codes_and_is_part_of_the_fingerprint() -> None:
    p = problem(6)
    down, inner = p.weights[..., :128], p.hessians[:, :128, :128].contiguous()
    p.hessians[1] = indefinite(p.hessians.shape[-1])

    def by(engine: str) -> experts.Experts:
        settings = layer_files.Settings(engine=engine)
        return experts.quantize(
            p.weights, down, experts.Hessians(p.hessians, inner, []), settings, range(3), Watch(CPU)
        )

    ours, theirs = (by(engine) for engine in layer_files.ENGINES)
    assert theirs.fallback == ours.fallback == ["w1, w3 of expert 1"]
    for kind in ("gate_up", "down"):
        assert float((getattr(ours, kind).codes == getattr(theirs, kind).codes).double().mean()) > 0.97
    mark = layer_files.fingerprint({}, None, layer_files.Settings(engine="llmcompressor"), CPU)
    assert mark["settings"]["engine"] == "llmcompressor" and mark["versions"]["llmcompressor"]
    assert "llmcompressor" not in layer_files.fingerprint({}, None, layer_files.Settings(), CPU)["versions"]
