"""The ways in which an artifact may be corrupted, each with the check that must catch it by name.

Every one is made from a good artifact, and SHA256SUMS and the hashes of manifest.json are rewritten afterwards as a
careless tool would, unless the sums themselves are the damage. docs/verify.md is what
`PYTHONPATH=. python tests/support/corruptions.py` prints.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from damage import (
    EXPERT,
    KEPT,
    ZERO_CODES,
    Damage,
    another_tokenizer,
    as_e8m0,
    as_int4,
    changed,
    configured,
    copied,
    copied_as,
    dropped,
    eight_bits,
    extra_file,
    flipped,
    int4_like,
    int4_targets_everywhere,
    lowest_bit,
    missing_file,
    nibbles_swapped,
    no_expression,
    noise,
    nonsense_sums,
    not_a_number,
    one_code_bit,
    packed_mtp,
    poisoned,
    random_like,
    removed,
    renamed,
    retold,
    rounded_layer,
    scaled,
    stale_sums,
    step_up,
    swapped,
    truncated,
    twice,
    unanchored,
    weightless,
    without_fp4_group,
    without_probe_name,
    wrong_shard,
)
from torch import Tensor

from v4forge.checkpoint.recipe import INT4, MIXED
from v4forge.verification import checks, tolerances

NEEDS = {"source": "`--source`", "hashes": "hashing", "deep": "`--deep`"}
PACKED, SCALE, SHAPE = (f"{EXPERT}.weight_{part}" for part in ("packed", "scale", "shape"))
KEPT_PACKED, KEPT_SCALE = (f"{KEPT}.weight_{part}" for part in ("packed", "scale"))


@dataclass(frozen=True)
class Corruption:
    """`what` was done by `how`; `check` must fail and say `named`, some only where there is a source."""

    what: str
    how: Damage
    check: str
    named: str
    beside_source: bool = False  # the check sees others without one, but not this
    recipe: str = INT4  # by which the good artifact was made

    @property
    def needs(self) -> tuple[str, ...]:
        """Keys of NEEDS without which the check does not see it."""
        row = next(row.needs for row in checks.CHECKS if row.name == self.check)
        return tuple(need for need in NEEDS if need in row or (need == "source" and self.beside_source))


# One byte flipped, in each class of stored tensor. The codes and scales of experts have their own entries.
FLIPPED = {
    "embedding": ("embed.weight", "passed through"),
    "head": ("head.weight", "passed through"),
    "final norm": ("norm.weight", "passed through"),
    "norm": ("layers.1.attn_norm.weight", "passed through"),
    "FP8 weight": ("layers.1.attn.wq_a.weight", "passed through"),
    "FP8 scale": ("layers.1.attn.wkv.weight_scale", "finite"),
    "compressor": ("layers.1.attn.compressor.wkv.weight", "passed through"),
    "indexer query": ("layers.1.attn.indexer.wq_b.weight", "passed through"),
    "indexer weight": ("layers.1.attn.indexer.weights_proj.weight", "passed through"),
    "position bias": ("layers.1.attn.compressor.ape", "passed through"),
    "attention sink": ("layers.2.attn.attn_sink", "passed through"),
    "hyper-connection": ("layers.1.hc_attn_fn", "passed through"),
    "router": ("layers.1.ffn.gate.weight", "passed through"),
    "router bias": ("layers.1.ffn.gate.bias", "passed through"),
    "routing table": ("layers.0.ffn.gate.tid2eid", "finite"),
    "shared expert": ("layers.1.ffn.shared_experts.w2.weight", "passed through"),
    "MTP attention": ("mtp.0.attn.wo_b.weight", "passed through"),
    "MTP expert": ("mtp.0.ffn.experts.1.w2.weight", "passed through"),
    "MTP projection": ("mtp.0.e_proj.weight", "passed through"),
    "MTP norm": ("mtp.0.hnorm.weight", "passed through"),
    "head's alias": ("mtp.0.head.weight", "aliases"),
    "embedding's alias": ("mtp.0.emb.tok_emb.weight", "aliases"),
}

CORRUPTIONS = [
    *(
        Corruption(f"a byte flipped: {what}", changed(n, flipped), check, n.removesuffix("_scale"))
        for what, (n, check) in FLIPPED.items()
    ),
    # dtypes, shapes and names
    Corruption(
        "F32 written as BF16", changed("layers.2.attn.attn_sink", Tensor.bfloat16), "tensors", "attn_sink is BF16"
    ),
    Corruption("head written as BF16", changed("head.weight", Tensor.bfloat16), "tensors", "head.weight is BF16"),
    Corruption("a dtype of no such file", changed("norm.weight", Tensor.double), "tensors", "norm.weight is F64"),
    Corruption("a shape", changed("layers.0.ffn_norm.weight", lambda t: t[:64].clone()), "tensors", "ffn_norm.weight"),
    Corruption(
        "a scale's name",
        renamed("layers.0.attn.wq_a.weight_scale", "layers.0.attn.wq_a.weight_scale_inv"),
        "tensors",
        "layers.0.attn.wq_a.weight_scale_inv is not part of the layout",
    ),
    Corruption("scales transposed", changed(SCALE, lambda t: t.T.contiguous()), "tensors", SCALE),
    Corruption("an extra tensor", copied_as("norm.weight", "norm2.weight"), "tensors", "norm2.weight is not part"),
    Corruption("an expert missing", dropped("layers.2.ffn.experts.3."), "tensors", "layers.2.ffn.experts.3.w1"),
    # values that pass through
    Corruption(
        "F32 rounded through BF16",
        changed("layers.2.hc_ffn_base", lambda t: t.bfloat16().float()),
        "passed through",
        "layers.2.hc_ffn_base",
    ),
    Corruption(
        "attention quantized anew",
        changed("layers.1.attn.wkv.weight_scale", lambda t: t * 1.5),
        "finite",
        "layers.1.attn.wkv.weight has a weight_scale that is not a power of two",
    ),
    Corruption(
        "FP8 scales doubled",
        changed("layers.1.attn.wkv.weight_scale", lambda t: t * 2),
        "passed through",
        "layers.1.attn.wkv.weight_scale",
    ),
    Corruption(
        "a routing table shuffled",
        changed("layers.0.ffn.gate.tid2eid", lambda t: t.flip(0)),
        "passed through",
        "tid2eid",
    ),
    Corruption(
        "a routing table's experts renumbered",
        changed("layers.0.ffn.gate.tid2eid", lambda t: t + 1),
        "finite",
        "layers.0.ffn.gate.tid2eid routes to expert 4",
    ),
    Corruption("NaN in BF16", changed("mtp.0.ffn.gate.weight", poisoned), "finite", "mtp.0.ffn.gate.weight holds NaN"),
    # routed experts
    Corruption("two experts exchanged", swapped(EXPERT, "layers.1.ffn.experts.0.w3"), "expert errors", EXPERT),
    Corruption("w1 and w3 exchanged", swapped(EXPERT, EXPERT[:-2] + "w1"), "expert errors", EXPERT),
    Corruption("two layers' experts exchanged", swapped(EXPERT, "layers.2.ffn.experts.2.w3"), "expert errors", EXPERT),
    Corruption("nibbles exchanged", changed(PACKED, nibbles_swapped), "expert errors", EXPERT),
    Corruption("rows rotated", changed(PACKED, lambda t: t.roll(1, 0)), "expert errors", EXPERT),
    Corruption(
        "an expert zeroed, as stock tooling saves one that no token reached",
        changed(PACKED, lambda t: torch.full_like(t, ZERO_CODES)),
        "expert codes",
        f"{EXPERT}.weight uses 1 of 16 codes",
    ),
    Corruption("an expert zeroed through its scales", changed(SCALE, torch.zeros_like), "expert codes", EXPERT),
    Corruption("a row's scale doubled", changed(SCALE, scaled(5, 2)), "expert slopes", f"{EXPERT}.weight: rows are "),
    Corruption("a row's scale halved", changed(SCALE, scaled(9, 0.5)), "expert slopes", f"{EXPERT}.weight: rows are "),
    Corruption("a scale NaN", changed(SCALE, poisoned), "expert codes", f"{EXPERT}.weight: weight_scale"),
    Corruption("scales negative, codes not", changed(SCALE, lambda t: -t), "expert errors", f"{EXPERT}.weight"),
    Corruption(
        "a stated shape", changed(SHAPE, lambda t: t // 2), "expert codes", f"{EXPERT}.weight: weight_shape says"
    ),
    Corruption(
        "one layer rounded to nearest instead of GPTQ",
        rounded_layer,
        "rounding",
        "layer 1 was quantized by round-to-nearest (0.00% of its codes are not the nearest ones), GPTQ expected",
    ),
    Corruption(
        "one bit of one INT4 code flipped: only a checksum can see it",
        changed(PACKED, one_code_bit),
        "recorded",
        f"{EXPERT}.weight: its codes and scales are",
    ),
    Corruption("the lowest bit of one scale flipped", changed(SCALE, lowest_bit), "recorded", f"{EXPERT}.weight: its"),
    Corruption("30% of all codes moved by one", noise(0.3), "quality", "KL divergence is 0."),
    # the MTP block
    Corruption("the MTP block dropped", dropped("mtp."), "tensors", "(C2"),
    Corruption("an MTP tensor missing", dropped("mtp.0.hnorm.weight"), "tensors", "mtp.0.hnorm.weight is missing (C2"),
    Corruption("an MTP expert packed", packed_mtp, "mtp untouched", "mtp.0.ffn.experts.0.w1.weight_packed"),
    Corruption("MTP attention random", changed("mtp.0.attn.wq_b.weight", random_like), "passed through", "(N1)"),
    Corruption(
        "an MTP expert from another layer",
        copied("mtp.0.ffn.experts.0.w1.weight", "layers.1.ffn.shared_experts.w1.weight"),
        "passed through",
        "mtp.0.ffn.experts.0.w1.weight",
    ),
    Corruption("an alias missing", dropped("mtp.0.head.weight"), "tensors", "mtp.0.head.weight is missing"),
    Corruption("an alias stale", changed("mtp.0.emb.tok_emb.weight", lambda t: t.flip(0)), "aliases", "(C14)"),
    # config.json and the tokenizer
    Corruption("targets unanchored", configured(unanchored), "config resolves", "model.layers.3.attn.wq_a resolves to"),
    Corruption("a probe name missing", configured(without_probe_name), "config resolves", "experts.0.gate_proj"),
    Corruption("8-bit experts", configured(eight_bits), "config resolves", "resolves to ('int', 8, 'group', 128)"),
    Corruption("a target that is no expression", configured(no_expression), "config resolves", "config.json"),
    Corruption("a group without weights", configured(weightless), "config resolves", "resolves to None"),
    Corruption(
        "no quantization_config", configured(lambda c: c.pop("quantization_config")), "config resolves", "config.json"
    ),
    Corruption(
        "ignore list short",
        configured(lambda c: c["quantization_config"]["ignore"].pop()),
        "config kept",
        "quantization_config is not the recipe's",
    ),
    Corruption("topk_method lost", configured(lambda c: c.pop("topk_method")), "config kept", "topk_method is None"),
    Corruption(
        "a setting changed", configured(lambda c: c.update(rope_theta=1)), "config kept", "rope_theta is 1, the", True
    ),
    Corruption(
        "compress_ratios shifted",
        configured(lambda c: c.update(compress_ratios=[4, 0, 128, 0])),
        "config kept",
        "compress_ratios is [4, 0, 128, 0], the source has [0, 4, 128, 0]",
        True,
    ),
    Corruption(
        "the MTP block's ratio changed (N1)",
        configured(lambda c: c.update(compress_ratios=[0, 4, 128, 4])),
        "opens",
        "the MTP block's compress ratio is 4",
    ),
    Corruption("the tokenizer exchanged", another_tokenizer, "tokenizer", "tokenizer.json is not the source's", True),
    Corruption("the tokenizer missing", removed("tokenizer.json"), "tokenizer", "tokenizer.json is missing"),
    # shards, index, manifest and sums
    Corruption("the index pointing at the wrong shard", wrong_shard, "opens", "norm.weight is not in"),
    Corruption("a tensor in two shards", twice, "opens", "which the index does not have there"),
    Corruption("a shard truncated", truncated, "opens", "is truncated or not safetensors"),
    Corruption("a shard missing", removed("model-00001-of-00005.safetensors"), "opens", "is missing"),
    Corruption("no index", removed("model.safetensors.index.json"), "opens", "does not exist"),
    Corruption("no config.json", removed("config.json"), "opens", "config.json does not exist"),
    Corruption(
        "the manifest's settings edited",
        retold(lambda m: m["calibration"]["settings"].update(dampening=0.1)),
        "provenance",
        "was made from another source or with other settings",
    ),
    Corruption(
        "the manifest's source edited",
        retold(lambda m: m["source"]["files"]["config.json"].update(sha256="0" * 64)),
        "provenance",
        "was made from another source",
    ),
    Corruption(
        "the manifest's records dropped", retold(lambda m: m.update(layers=[])), "recorded", "has no record of it"
    ),
    Corruption(
        "a file dropped from the manifest",
        retold(lambda m: m["files"].pop("config.json")),
        "checksums",
        "manifest.json does not describe config.json",
    ),
    Corruption("an extra file", extra_file, "checksums", "notes.txt"),
    Corruption("a file changed behind the sums", stale_sums, "checksums", "generation_config.json has sha256"),
    Corruption("a file missing behind the sums", missing_file, "checksums", "listed in SHA256SUMS but missing"),
    Corruption("no sums", lambda a: (a.folder / "SHA256SUMS").unlink(), "checksums", "SHA256SUMS is missing"),
    Corruption("sums of nonsense", nonsense_sums, "checksums", "SHA256SUMS is missing or damaged"),
    # recipe mixed: upstream's FP4 in the hash-routed layer
    *(
        Corruption(f"recipe mixed: {what}", how, check, named, recipe=MIXED)
        for what, how, check, named in (
            ("one bit of one FP4 code flipped", changed(KEPT_PACKED, one_code_bit), "passed through", KEPT_PACKED),
            ("the same, where there is no source", changed(KEPT_PACKED, one_code_bit), "recorded", f"{KEPT}.weight"),
            ("one scale doubled", changed(KEPT_SCALE, step_up), "passed through", KEPT_SCALE),
            ("the same, where there is no source", changed(KEPT_SCALE, step_up), "recorded", f"{KEPT}.weight"),
            ("a scale that is none in BF16", changed(KEPT_SCALE, not_a_number), "finite", "the E8M0 scale byte 255"),
            ("nibbles exchanged", changed(KEPT_PACKED, nibbles_swapped), "passed through", KEPT_PACKED),
            ("two experts exchanged", swapped(KEPT, f"{KEPT[:-4]}0.w3"), "passed through", "another expert's"),
            ("w1 and w3 exchanged", swapped(KEPT, f"{KEPT[:-2]}w1"), "passed through", KEPT_PACKED),
            ("scales as E8M0, not U8", changed(KEPT_SCALE, as_e8m0), "tensors", f"{KEPT_SCALE} is F8_E8M0"),
            ("INT4 in the FP4 layer", int4_like, "tensors", "weight_shape is not part of the layout"),
            ("the FP4 group dropped", configured(without_fp4_group), "tensors", "weight_shape is missing"),
            ("INT4 targets in every layer", configured(int4_targets_everywhere), "config resolves", "matches 2 groups"),
            ("another recipe told", retold(as_int4), "provenance", "says that the recipe was 'int4'"),
        )
    ),
]


# How the second table came to be, and what a failure of a statistic means.
RISKS = """
## What a bound costs, and what it is worth

A good artifact of DeepSeek-V4-Flash has 33,024 expert matrices, 90 million rows and 2.2 billion groups of 128 weights:
what happens once in a million must not fail it. The chances are those of a Flash all of whose experts are of the worst
kind: heavy-tailed weights, groups of lognormal sizes or one at 1/32 of its row, inputs of low rank or of which a
hundredth is 100 times as large, experts that hardly a token reaches. `python -m benchmarks.verify_bounds` quantizes
such matrices with the project's own GPTQ and continues the tails of what it sees, as a generalized Pareto distribution
two standard errors heavier than fitted; `benchmarks/results/verify-bounds-cpu.json` has its figures, on matrices that
are narrower than Flash's, where a group is more of its row. Those of errors, slopes and rounding are so measured, the
other three reasoned. The bounds were set with these figures in sight, and one of the five kinds of weights is left out:
columns of lognormal sizes. None of 600 such experts failed (the greatest error was 0.49), but the tail of columns,
continued, does: a Flash of nothing else would fail with a chance near 1, and has to be looked at closer.
Every other check compares exactly: a good artifact never fails it, and one wrong bit does.
""".strip().splitlines()

STILL = """
## Whether the bytes are still those

A certificate names SHA256SUMS by its digest, and so every file. `python -m scripts.verify --artifact DIR --sums-only`
makes no check of this page: it reads every byte, by all cores, says whether they are the certified ones, and names each
file that is cut, missing, other or too many. [Serving](serving.md#guards) asks the same, once a folder. Where nothing
can be written into the artifact the table is printed all the same, and then that the certificate could go nowhere;
`--certificate FILE` says where it may.
""".strip().splitlines()

CLOSER = (
    """
Errors, slopes and rounding say what is unlikely, not what is wrong. Such a failure ends with one command that looks
closer, verify with `--deep 8192`. When that finds no other failure, and `quality` over {tokens:,} tokens or more,
`recorded`, `provenance` and `checksums` were all run and passed, the codes are those that calibration made and the
whole model predicts as its source does with them: the failure is a warning, the certificate is ok, and nothing blocks
serving or publishing. A failed `quality` names the same command with four times as many tokens.
""".strip()
    .format(tokens=tolerances.ENOUGH_TOKENS)
    .splitlines()
)

INTRODUCTION = """# What verify checks

Generated by `PYTHONPATH=. python tests/support/corruptions.py`. tests/verification/test_checks.py makes each corruption
below from a good artifact, with SHA256SUMS and the hashes of manifest.json rewritten as a careless tool would, and
fails when the check named here does not catch it, or when one that is said to need `--source` is caught without.
""".strip().splitlines()


def page() -> str:
    """docs/verify.md: the checks, and the table of corruptions with the check that catches each."""
    lines = [*INTRODUCTION, "", "| check | passes when | needs |", "|---|---|---|"]
    for row in checks.CHECKS:
        needs = ", ".join(NEEDS[need] for need in row.needs if need in NEEDS)
        lines.append(f"| {row.name} | {(row.function.__doc__ or '').splitlines()[0]} | {needs} |")
    lines += ["", *RISKS, "", "| check | bound | a good Flash fails it | because | weakest fault that it catches |"]
    lines += ["|---|---|---|---|---|"]
    for check, risk in tolerances.RISKS.items():
        cells = (check, risk.bound, f"at most {risk.chance:.0e}", risk.because, risk.weakest)
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        *CLOSER,
        "",
        *STILL,
        "",
        f"{len(CORRUPTIONS)} corruptions:",
        "",
        "| corruption | caught by | only with |",
        "|---|---|---|",
    ]
    for each in CORRUPTIONS:
        lines.append(f"| {each.what} | {each.check} | {', '.join(NEEDS[need] for need in each.needs)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
