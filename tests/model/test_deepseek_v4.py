"""model.deepseek_v4 against transformers' whole model and against the MTP block written out from its definition."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_mtp import PlainMTP, distance, swiglu
from problems import OnGpu
from safetensors.torch import save_file
from synthetic import OTHER, write_checkpoint
from torch import Tensor
from transformers import DeepseekV4ForCausalLM

from v4forge.checkpoint import layout
from v4forge.checkpoint.reader import Checkpoint
from v4forge.checkpoint.recipe import rule_for
from v4forge.model import deepseek_v4, indexer
from v4forge.model import mtp as model_mtp

CPU = torch.device("cpu")
SEQ_LEN = 300  # two windows of HCA, 75 of CSA of which index_topk are seen, and more than one sliding window
FORMS: dict[str, dict[str, Any]] = {"small": {}, "other": OTHER}


@dataclass
class Opened:
    """A synthetic checkpoint, its blocks in F32, and two sequences that went through it one layer at a time."""

    directory: Path
    checkpoint: Checkpoint
    config: Any
    weights: deepseek_v4.Weights
    root: deepseek_v4.Root
    tokens: Tensor
    context: deepseek_v4.Context
    layers: list
    streams: list[Tensor]  # before each layer, and after the last one

    @property
    def raw(self) -> dict[str, Any]:
        return self.checkpoint.config.raw


@pytest.fixture(scope="module", params=FORMS)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    directory = tmp_path_factory.mktemp(request.param)
    # a limit that many activations reach, so that the clamp is part of what is compared
    write_checkpoint(directory, **FORMS[request.param], swiglu_limit=0.7)
    return open_checkpoint(directory)


@torch.no_grad()
def open_checkpoint(directory: Path) -> Opened:
    checkpoint = Checkpoint(directory)
    config = deepseek_v4.hf_config(checkpoint.config)
    weights = deepseek_v4.Weights(checkpoint, CPU, torch.float32)
    root = deepseek_v4.load_root(weights, config)
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(checkpoint.config.vocab_size, (2, SEQ_LEN), generator=generator)
    context = deepseek_v4.Rotary(config, CPU, torch.float32).context(tokens)
    layers = [deepseek_v4.load_layer(weights, config, i) for i in checkpoint.config.layers]
    streams = [deepseek_v4.embed(root, config, tokens)]
    for layer in layers:
        streams.append(deepseek_v4.run_layer(layer, streams[-1], context))
    return Opened(directory, checkpoint, config, weights, root, tokens, context, layers, streams)


@torch.no_grad()
def test_logits_equal_transformers_whole_model(opened: Opened, tmp_path: Path) -> None:
    # transformers reads the upstream names by its own conversion table, not by ours
    config = opened.checkpoint.config
    tensors = {n: opened.checkpoint.load(n, s) for n, s in layout.parameters(config) if not n.startswith("mtp.")}
    save_file(
        {n: (t.float() if t.is_floating_point() else t).contiguous() for n, t in tensors.items()},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    raw = json.loads((opened.directory / "config.json").read_text())
    del raw["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(raw | {"torch_dtype": "float32"}))
    whole, report = DeepseekV4ForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    expected = whole.eval()(opened.tokens, use_cache=False).logits
    ours = opened.root.final(opened.streams[-1], opened.root.head)
    assert ours.dtype == torch.float32
    assert distance(ours, expected) < 1e-5
    assert expected.std() > 0.1


@torch.no_grad()
def test_two_halves_of_a_layer_equal_its_own_forward(opened: Opened) -> None:
    context = opened.context
    for number, layer in enumerate(opened.layers):
        whole = layer(
            opened.streams[number],
            input_ids=context.input_ids,
            position_embeddings=context.position_embeddings,
            position_ids=context.position_ids,
            attention_mask=context.attention_mask,
        )
        attended = deepseek_v4.attend(layer, opened.streams[number], context)
        experts = layer.mlp.experts
        routed = deepseek_v4.routed_experts(attended, experts.gate_up_proj, experts.down_proj, experts.limit)
        assert distance(deepseek_v4.combine(attended, routed), whole) < 1e-6


# What the published table lists as F32, under transformers' names.
F32_NAMES = ("sinks", "position_bias", "attn_hc.", "ffn_hc.", "hc_head.", "e_score_correction_bias")


@pytest.mark.parametrize("block", ["layers", "mtp", "root"])
def test_f32_parameters_stay_f32_and_the_others_are_bf16(opened: Opened, block: str) -> None:
    weights = deepseek_v4.Weights(opened.checkpoint, CPU)
    modules = {
        "layers": lambda: [deepseek_v4.load_layer(weights, opened.config, i) for i in opened.checkpoint.config.layers],
        "mtp": lambda: [model_mtp.load_mtp(weights, opened.config)],
        "root": lambda: [deepseek_v4.load_root(weights, opened.config).final],
    }[block]()
    for module in modules:
        for name, tensor in module.state_dict().items():
            if name.endswith("tid2eid"):
                assert tensor.dtype == torch.int64
            else:
                f32 = any(part in name for part in F32_NAMES)
                assert tensor.dtype == (torch.float32 if f32 else torch.bfloat16), name


def test_a_loaded_f32_parameter_has_the_source_bits(opened: Opened) -> None:
    weights = deepseek_v4.Weights(opened.checkpoint, CPU)
    number = opened.checkpoint.config.num_hidden_layers - 1
    state = deepseek_v4.load_layer(weights, opened.config, number).state_dict()
    names = [(n, s) for n, s in layout.layer_parameters(opened.checkpoint.config, number)]
    f32 = [n for n, _ in names if rule_for(n).source == "f32"]
    assert len(f32) >= 8
    for name in f32:
        local = deepseek_v4.renamed(name.removeprefix(f"layers.{number}."))
        assert torch.equal(state[local], opened.checkpoint.raw(name))


def test_building_transformers_config_leaves_the_checkpoints_config_alone(opened: Opened) -> None:
    deepseek_v4.hf_config(opened.checkpoint.config)
    assert opened.raw == json.loads((opened.directory / "config.json").read_text())


def split_context(context: deepseek_v4.Context, row: int) -> deepseek_v4.Context:
    return replace(
        context, input_ids=context.input_ids[row : row + 1], attention_mask=context.attention_mask[row : row + 1]
    )


def test_sparse_attention_is_loaded_with_our_indexer(opened: Opened) -> None:
    compressors = [layer.self_attn.compressor for layer in opened.layers]
    own = [type(each.indexer) for each in compressors if hasattr(each, "indexer")]
    assert own and set(own) == {indexer.Indexer}


@torch.no_grad()
def test_a_layer_gives_the_same_result_in_micro_batches(opened: Opened) -> None:
    """To rounding only: a GEMM of another shape may sum in another order."""
    for number, layer in enumerate(opened.layers):
        streams = opened.streams[number]
        parts = [deepseek_v4.run_layer(layer, streams[i : i + 1], split_context(opened.context, i)) for i in range(2)]
        assert distance(torch.cat(parts), opened.streams[number + 1]) < 1e-5


@torch.no_grad()
def test_routed_experts_equal_a_sum_over_each_tokens_choices(opened: Opened) -> None:
    attended = deepseek_v4.attend(opened.layers[-1], opened.streams[-2], opened.context)
    experts = opened.layers[-1].mlp.experts
    ours = deepseek_v4.routed_experts(attended, experts.gate_up_proj, experts.down_proj, experts.limit)
    inner = opened.checkpoint.config.moe_intermediate_size
    for token in range(0, len(ours), 37):
        expected = torch.zeros(ours.shape[1], dtype=torch.float64)
        for expert, weight in zip(attended.indices[token], attended.weights[token], strict=True):
            w1, w3 = experts.gate_up_proj[expert].double().split(inner)
            x = attended.x[token].double()
            expected += weight.double() * (experts.down_proj[expert].double() @ swiglu(w1 @ x, w3 @ x, experts.limit))
        assert distance(ours[token], expected) < 1e-5


@torch.no_grad()
def test_the_mtp_block_equals_its_definition_in_float64(opened: Opened) -> None:
    mtp = model_mtp.load_mtp(opened.weights, opened.config)
    following = deepseek_v4.Rotary(opened.config, CPU, torch.float32).context(opened.tokens[:, 1:])
    embeds = opened.root.embed[following.input_ids]
    streams = mtp(opened.streams[-1][:, :-1], embeds, following)
    logits = mtp.head(streams, opened.root.head)
    plain = PlainMTP(opened.checkpoint)
    for row in range(2):
        expected_streams, expected_logits = plain(opened.streams[-1][row, :-1].double(), embeds[row].double())
        assert distance(streams[row], expected_streams) < 2e-6
        assert distance(logits[row], expected_logits) < 2e-6
        assert (logits[row].argmax(-1) == expected_logits.argmax(-1)).all()


@pytest.mark.parametrize("learning", ["streams", "comb"])
def test_training_on_a_gpu_mixes_streams_with_a_gradient(learning: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"streams": (2, 3, 4, 8), "comb": (2, 3, 4, 4), "post": (2, 3, 4), "output": (2, 3, 8)}
    tensors = {name: torch.randn(shape, generator=generator).as_subclass(OnGpu) for name, shape in shapes.items()}
    tensors[learning].requires_grad_()
    deepseek_v4.mixed(**tensors).square().sum().backward()
    assert bool((tensors[learning].grad != 0).any())
