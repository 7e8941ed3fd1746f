"""checkpoint.layout and checkpoint.recipe against the counts and tables of DeepSeek-V4-Flash's published files."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import pytest
from flash import FLASH
from synthetic import OTHER, SMALL, config_dict

from v4forge.checkpoint import layout, recipe, vllm_schemes
from v4forge.checkpoint.codec import DTYPES
from v4forge.checkpoint.formats import TensorSpec
from v4forge.errors import UserError
from v4forge.quantization.postprocess import config_json


@cache
def flash() -> layout.Config:
    return layout.parse_config(config_dict(**FLASH), "config.json")


@cache
def upstream() -> dict[str, TensorSpec]:
    return layout.upstream(flash())


@cache
def artifact() -> dict[str, TensorSpec]:
    return layout.artifact(flash())


def gigabytes(specs: dict[str, TensorSpec]) -> float:
    return sum(prod(s.shape) * DTYPES[s.dtype].itemsize for s in specs.values()) / 1e9


def block_of(name: str) -> str:
    match = re.match(r"layers\.\d+\.|mtp\.", name)
    return match[0] if match else "root"


def test_flash_has_69187_tensors_upstream() -> None:
    assert len(upstream()) == 69_187
    assert sum(n.endswith(".scale") for n in upstream()) == 34_167
    assert round(gigabytes(upstream()), 1) == 159.6


def test_every_flash_block_has_as_many_tensors_as_upstream() -> None:
    counts = Counter(map(block_of, upstream()))
    by_ratio = {0: 1565, 4: 1576, 128: 1569}
    ratios = flash().compress_ratios
    assert Counter(ratios[:43]) == {0: 2, 4: 21, 128: 20}
    assert counts == {"root": 6, "mtp.": 1575} | {f"layers.{i}.": by_ratio[ratios[i]] for i in range(43)}


def test_flash_has_101285_tensors_in_the_artifact() -> None:
    assert len(artifact()) == 101_285
    assert sum(n.startswith("mtp.") for n in artifact()) == 799
    assert round(gigabytes(artifact()), 1) == 170.4


def test_flash_has_417_f32_parameters() -> None:
    f32 = {n for n, s in upstream().items() if s.dtype == "F32"}
    assert len(f32) == 417
    in_artifact = {n for n, s in artifact().items() if s.dtype == "F32" and not n.endswith(".weight_scale")}
    assert in_artifact == f32 | {"head.weight", "mtp.0.head.weight"}


I8, E4M3, E8M0 = "I8", "F8_E4M3", "F8_E8M0"
BF16, F32, I32, I64 = "BF16", "F32", "I32", "I64"


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [
        ("layers.0.ffn.experts.255.w1.weight", I8, (2048, 2048)),
        ("layers.0.ffn.experts.255.w1.scale", E8M0, (2048, 128)),
        ("mtp.0.ffn.experts.0.w2.weight", I8, (4096, 1024)),
        ("mtp.0.ffn.experts.0.w2.scale", E8M0, (4096, 64)),
        ("layers.5.attn.wq_b.weight", E4M3, (32768, 1024)),
        ("layers.5.attn.wq_b.scale", E8M0, (256, 8)),
        ("layers.5.attn.wo_a.weight", E4M3, (8192, 4096)),
        ("layers.5.attn.wo_b.weight", E4M3, (4096, 8192)),
        ("layers.2.attn.indexer.wq_b.weight", E4M3, (8192, 1024)),
        ("layers.2.attn.indexer.weights_proj.weight", BF16, (64, 4096)),
        ("layers.2.attn.compressor.ape", F32, (4, 1024)),
        ("layers.3.attn.compressor.ape", F32, (128, 512)),
        ("layers.3.attn.compressor.wkv.weight", BF16, (512, 4096)),
        ("layers.2.attn.indexer.compressor.ape", F32, (4, 256)),
        ("mtp.0.e_proj.weight", E4M3, (4096, 4096)),
        ("mtp.0.e_proj.scale", E8M0, (32, 32)),
        ("layers.2.ffn.gate.tid2eid", I64, (129280, 6)),
        ("layers.3.ffn.gate.bias", F32, (256,)),
        ("mtp.0.ffn.gate.bias", F32, (256,)),
        ("layers.0.hc_attn_fn", F32, (24, 16384)),
        ("layers.0.hc_ffn_base", F32, (24,)),
        ("layers.0.hc_ffn_scale", F32, (3,)),
        ("hc_head_fn", F32, (4, 16384)),
        ("mtp.0.hc_head_scale", F32, (1,)),
        ("head.weight", BF16, (129280, 4096)),
    ],
)
def test_a_flash_tensor_upstream(name: str, dtype: str, shape: tuple[int, ...]) -> None:
    assert upstream()[name] == TensorSpec(dtype, shape)


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [
        ("layers.0.ffn.experts.0.w1.weight_packed", I32, (2048, 512)),
        ("layers.0.ffn.experts.0.w3.weight_scale", BF16, (2048, 32)),
        ("layers.42.ffn.experts.255.w2.weight_packed", I32, (4096, 256)),
        ("layers.42.ffn.experts.255.w2.weight_scale", BF16, (4096, 16)),
        ("layers.42.ffn.experts.255.w2.weight_shape", I64, (2,)),
        ("layers.7.attn.wq_a.weight", E4M3, (1024, 4096)),
        ("layers.7.attn.wq_a.weight_scale", F32, (8, 32)),
        ("layers.7.attn.wkv.weight", E4M3, (512, 4096)),
        ("layers.2.attn.indexer.wq_b.weight", BF16, (8192, 1024)),
        ("layers.2.ffn.shared_experts.w2.weight", BF16, (4096, 2048)),
        ("mtp.0.ffn.experts.9.w3.weight", BF16, (2048, 4096)),
        ("mtp.0.attn.wkv.weight", BF16, (512, 4096)),
        ("mtp.0.head.weight", F32, (129280, 4096)),
        ("mtp.0.emb.tok_emb.weight", BF16, (129280, 4096)),
    ],
)
def test_a_flash_tensor_in_the_artifact(name: str, dtype: str, shape: tuple[int, ...]) -> None:
    assert artifact()[name] == TensorSpec(dtype, shape)


def test_the_flash_tensors_by_rule_are_as_many_as_published() -> None:
    kinds = Counter(recipe.rule_for(name).kind for name, _ in layout.parameters(flash()))
    everything_else = kinds.pop("everything else")
    assert kinds == {
        "routed experts": 3 * 11_008,
        "attention projections": 215,
        "MTP experts": 768,
        "MTP projections": 10,
        "indexer queries": 21,
        "shared experts": 129,
        "output head": 1,
        "F32 parameters": 417,
        "hash routing tables": 3,
    }
    assert everything_else == 35_020 - kinds.total()


@pytest.mark.parametrize(
    ("name", "kind", "source", "artifact_form"),
    [
        ("layers.42.ffn.experts.255.w2.weight", "routed experts", "fp4", "int4"),
        ("layers.0.attn.wq_a.weight", "attention projections", "fp8", "fp8-ct"),
        ("layers.10.attn.wq_b.weight", "attention projections", "fp8", "fp8-ct"),
        ("layers.0.attn.wkv.weight", "attention projections", "fp8", "fp8-ct"),
        ("layers.0.attn.wo_a.weight", "attention projections", "fp8", "fp8-ct"),
        ("layers.0.attn.wo_b.weight", "attention projections", "fp8", "fp8-ct"),
        ("layers.2.attn.indexer.wq_b.weight", "indexer queries", "fp8", "bf16"),
        ("layers.2.attn.indexer.compressor.wkv.weight", "everything else", "bf16", "bf16"),
        ("layers.2.attn.indexer.weights_proj.weight", "everything else", "bf16", "bf16"),
        ("layers.2.attn.compressor.wkv.weight", "everything else", "bf16", "bf16"),
        ("layers.2.attn.compressor.wgate.weight", "everything else", "bf16", "bf16"),
        ("layers.2.attn.compressor.norm.weight", "everything else", "bf16", "bf16"),
        ("layers.2.attn.compressor.ape", "F32 parameters", "f32", "f32"),
        ("layers.2.attn.indexer.compressor.ape", "F32 parameters", "f32", "f32"),
        ("layers.2.attn.attn_sink", "F32 parameters", "f32", "f32"),
        ("layers.2.ffn.shared_experts.w3.weight", "shared experts", "fp8", "bf16"),
        ("layers.2.ffn.gate.weight", "everything else", "bf16", "bf16"),
        ("layers.3.ffn.gate.bias", "F32 parameters", "f32", "f32"),
        ("layers.2.ffn.gate.tid2eid", "hash routing tables", "int", "int"),
        ("layers.2.hc_attn_fn", "F32 parameters", "f32", "f32"),
        ("layers.2.attn_norm.weight", "everything else", "bf16", "bf16"),
        ("mtp.0.ffn.experts.3.w1.weight", "MTP experts", "fp4", "bf16"),
        ("mtp.0.attn.wo_a.weight", "MTP projections", "fp8", "bf16"),
        ("mtp.0.ffn.shared_experts.w1.weight", "MTP projections", "fp8", "bf16"),
        ("mtp.0.e_proj.weight", "MTP projections", "fp8", "bf16"),
        ("mtp.0.h_proj.weight", "MTP projections", "fp8", "bf16"),
        ("mtp.0.enorm.weight", "everything else", "bf16", "bf16"),
        ("mtp.0.norm.weight", "everything else", "bf16", "bf16"),
        ("mtp.0.attn.attn_sink", "F32 parameters", "f32", "f32"),
        ("mtp.0.hc_head_base", "F32 parameters", "f32", "f32"),
        ("hc_head_fn", "F32 parameters", "f32", "f32"),
        ("head.weight", "output head", "bf16", "f32"),
        ("embed.weight", "everything else", "bf16", "bf16"),
        ("norm.weight", "everything else", "bf16", "bf16"),
    ],
)
def test_a_logical_name_has_the_precision_of_the_published_table(
    name: str, kind: str, source: str, artifact_form: str
) -> None:
    rule = recipe.rule_for(name)
    assert (rule.kind, rule.source, rule.artifact) == (kind, source, artifact_form)


@pytest.mark.parametrize("overrides", [SMALL, {k: v for k, v in OTHER.items() if k != "shards"}, FLASH])
def test_no_two_patterns_but_the_last_match_one_name(overrides: dict[str, Any]) -> None:
    config = layout.parse_config(config_dict(**overrides), "config.json")
    names = [n for n, _ in layout.parameters(config) if not re.search(r"\.experts\.([2-9]|\d\d+)\.", n)]
    assert len(names) == len(set(names))
    for name in names:
        matching = [r.kind for r in recipe.RULES[:-1] if re.fullmatch(r.pattern, name)]
        assert len(matching) <= 1, (name, matching)


@cache
def mixed() -> layout.Config:
    """Flash with its own FP4 in the hash-routed layers, 0 to 2."""
    return replace(flash(), recipe=recipe.MIXED)


def test_recipe_mixed_keeps_the_fp4_of_hash_routed_layers_and_nothing_else() -> None:
    specs, usual = layout.artifact(mixed()), artifact()
    other = {n for n in specs.keys() | usual.keys() if specs.get(n) != usual.get(n)}
    assert other == {n for n in usual if re.match(r"layers\.[012]\.ffn\.experts\.", n)}
    assert len(specs) == len(usual) - 3 * 768  # without their weight_shape
    for which, out, inputs in (("w1", 2048, 4096), ("w2", 4096, 2048), ("w3", 2048, 4096)):
        base = f"layers.2.ffn.experts.255.{which}"
        assert specs[f"{base}.weight_packed"] == TensorSpec("U8", (out, inputs // 2))
        assert specs[f"{base}.weight_scale"] == TensorSpec("U8", (out, inputs // 32))
        theirs = [upstream()[f"{base}.{part}"] for part in ("weight", "scale")]
        assert [specs[f"{base}.weight_{part}"].bytes for part in ("packed", "scale")] == [s.bytes for s in theirs]
    assert gigabytes(specs) / gigabytes(usual) == pytest.approx(1.00177, abs=5e-6)


@pytest.mark.parametrize("overrides", [SMALL, {k: v for k, v in OTHER.items() if k != "shards"}, FLASH])
@pytest.mark.parametrize("made_by", recipe.RECIPES)
def test_every_vllm_module_resolves_to_its_scheme(overrides: dict[str, Any], made_by: str) -> None:
    source = replace(layout.parse_config(config_dict(**overrides), "config.json"), recipe=made_by)
    raw = config_json(source)
    config = layout.parse_config(raw, "config.json", "artifact")
    assert config.recipe == made_by, "it is read from the groups"
    assert list(vllm_schemes.unresolved(config)) == []
    fp4 = {m for m, scheme in vllm_schemes.served_modules(config).items() if scheme == recipe.FP4_EXPERTS}
    assert {int(m.split(".")[2]) for m in fp4} == set(range(source.num_hash_layers if made_by == recipe.MIXED else 0))
    swapped = raw["quantization_config"]["config_groups"]
    if made_by == recipe.MIXED:
        swapped["experts"]["targets"], swapped["fp4_experts"]["targets"] = (
            swapped[name]["targets"] for name in ("fp4_experts", "experts")
        )
        assert any("resolves to ('int', 4, 'group', 128)" in line for line in vllm_schemes.unresolved(config))


def test_where_every_layer_is_hash_routed_there_is_no_int4_group() -> None:
    groups = recipe.quantization_config(2, 2)["config_groups"]
    assert groups.keys() == {"attention", "fp4_experts"}


@pytest.mark.parametrize("quantization", [None, [], {}, {"config_groups": []}, {"config_groups": {"experts": {}}}])
def test_a_config_of_no_known_groups_is_taken_for_the_usual_recipe(quantization: object) -> None:
    assert recipe.stated(quantization) == recipe.INT4


def test_a_name_that_no_rule_knows_raises() -> None:
    for name in ("layers.0.attn.wq_a.scale", "layers.0.attn.rotary", "hc_head_weight"):
        with pytest.raises(KeyError, match=re.escape(name)):
            recipe.rule_for(name)


def test_quantization_targets_end_before_the_mtp_block() -> None:
    groups = recipe.quantization_config(43)["config_groups"]

    def hits(group: str, name: str) -> bool:
        return any(re.match(target.removeprefix("re:"), name) for target in groups[group]["targets"])

    for prefix in ("", "model."):
        for layer in (0, 4, 39, 42):
            for module in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b", "fused_wqa_wkv"):
                assert hits("attention", f"{prefix}layers.{layer}.attn.{module}")
            for module in ("w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"):
                assert hits("experts", f"{prefix}layers.{layer}.ffn.experts.0.{module}")
        for name in (
            "layers.43.attn.wq_a",
            "layers.43.ffn.experts.0.w1",
            "mtp.0.attn.wq_a",
            "mtp.0.ffn.experts.0.w1",
            "layers.2.attn.indexer.wq_b",
            "layers.2.attn.compressor.wkv",
            "layers.2.ffn.shared_experts.w1",
        ):
            assert not hits("attention", prefix + name) and not hits("experts", prefix + name)


@pytest.mark.parametrize(
    ("overrides", "fact"),
    [
        (
            {"model_type": "deepseek_v41", "architectures": ["DeepseekV41ForCausalLM"]},
            "architectures ['DeepseekV41ForCausalLM'] is not DeepSeek-V4",
        ),
        ({"architectures": ["DeepseekV3ForCausalLM"]}, "is not DeepSeek-V4"),
        ({"compress_ratios": [*FLASH["compress_ratios"], 0, 0]}, "compress_ratios has 46 entries for 43 layers"),
        ({"num_nextn_predict_layers": 3}, "num_nextn_predict_layers is 3"),
        ({"num_nextn_predict_layers": 0}, "num_nextn_predict_layers is 0"),
        ({"hidden_size": 4000}, "hidden_size 4000 is not divisible by 128"),
        ({"moe_intermediate_size": 2080}, "moe_intermediate_size 2080 is not divisible by 128"),
        ({"compress_ratios": [*FLASH["compress_ratios"][:-1], 4]}, "the MTP block's compress ratio is 4"),
        ({"compress_ratios": [8, *FLASH["compress_ratios"][1:]]}, "compress_ratios holds 8"),
        ({"o_groups": 7}, "o_groups 7 does not divide"),
    ],
)
def test_a_config_that_is_not_supported_is_refused(overrides: dict[str, Any], fact: str) -> None:
    with pytest.raises(UserError) as caught:
        layout.parse_config(config_dict(**FLASH | overrides), "some/config.json")
    assert caught.value.fact.startswith("some/config.json: ")
    assert fact in caught.value.fact
    assert caught.value.hint


def test_a_missing_field_is_named() -> None:
    raw = config_dict()
    del raw["o_lora_rank"]
    with pytest.raises(UserError, match="no 'o_lora_rank'"):
        layout.parse_config(raw, "config.json")


def test_a_missing_or_broken_config_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        layout.load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        layout.load_config(tmp_path)
