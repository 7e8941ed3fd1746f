"""The checks of verify: each a small function that yields failures, each failure one line with tensor, expected, found.

What must be there comes from the config and the recipe, never from the artifact. With a source, everything passed
through is compared bit for bit, and everything quantized within a stated bound. The tensors are read once, by scan.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from v4forge.checkpoint import layout, recipe
from v4forge.checkpoint.formats import TensorSpec
from v4forge.checkpoint.reader import matches
from v4forge.checkpoint.vllm_schemes import unresolved
from v4forge.errors import UserError
from v4forge.model.corpus import check_vocabulary, load_tokenizer
from v4forge.model.evaluation import agreement, mean, perplexity_change
from v4forge.quantization import hf_folder
from v4forge.quantization.layer_files import METHODS
from v4forge.quantization.postprocess import TOKENIZER_FILES
from v4forge.verification.records import checksums, provenance, recorded
from v4forge.verification.subject import Failures, Subject
from v4forge.verification.tolerances import (
    ACCEPTANCE_LOST,
    AGREEMENT,
    DISTINCT_CODES,
    INT4_RELATIVE_ERROR,
    KL_NATS,
    MOVED_CODES,
    PERPLEXITY_PERCENT,
    SLOPES,
)

SHOWN = 5  # failures of one check that the certificate spells out
# By kind of the recipe's rule: why a tensor that passes through may differ.
CAUSES = {
    "attention projections": "attention quantized anew?",
    "hash-routed experts": "another expert's, or quantized anew?",
    "F32 parameters": "C13: rounded through BF16?",
    "hash routing tables": "another order of experts or tokens?",
    "MTP experts": "an MTP block of another checkpoint, or left random (N1)?",
    "MTP projections": "an MTP block of another checkpoint, or left random (N1)?",
}


def own_layout(s: Subject) -> Failures:
    """The folder is not one that llm-compressor or transformers saved under other names."""
    if found := hf_folder.recognized(s.folder):
        yield from found.problems(s.source)


def opens(s: Subject) -> Failures:
    """The index, all shards' headers and config.json can be read and agree with one another."""
    s.artifact.config  # noqa: B018, reads and checks it
    yield from ()


def tensors(s: Subject) -> Failures:
    """Every tensor that the config asks for is there with its dtype and shape, and no other."""
    expected = layout.artifact(s.config)
    for name in sorted(expected.keys() - s.artifact.weight_map.keys()):
        yield f"{name} is missing" + (" (C2: the MTP block was dropped)" if name.startswith("mtp.") else "")
    for name in sorted(s.artifact.weight_map.keys() - expected.keys()):
        quantized = name.startswith("mtp.") and name.endswith(("weight_packed", "weight_scale", "weight_shape"))
        yield f"{name} is not part of the layout" + (" (C10: the MTP block was quantized)" if quantized else "")
    for name, spec in expected.items():
        if name in s.artifact.weight_map and not matches(found := s.artifact.spec(name), spec):
            rounded = spec.dtype == "F32" and found.dtype == "BF16"
            cause = " (C13: an F32 tensor was rounded)" if rounded else ""
            yield f"{name} is {_described(found)}, expected {_described(spec)}{cause}"


def _described(spec: TensorSpec) -> str:
    return f"{spec.dtype} {list(spec.shape)}"


def finite(s: Subject) -> Failures:
    """No tensor holds NaN or Inf, FP8 weights decode exactly, routing tables name experts that there are."""
    for each in s.seen:
        if each.fault and s.config.rule_for(each.name).artifact != "int4":
            yield each.fault


def passed_through(s: Subject) -> Failures:
    """Everything that is not quantized equals the source bit for bit: FP8 and FP4 bytes, exact decodes, F32, BF16."""
    for each in s.seen:
        cause = CAUSES.get(kind := s.config.rule_for(each.name).kind, "")
        if kind != "routed experts" and each.source_fault:
            yield f"the source's {each.source_fault}"
        for difference in each.differences:
            yield difference + (f" ({cause})" if cause else "")


def aliases(s: Subject) -> Failures:
    """The MTP block's copies of head and embedding are those tensors (C14)."""
    for each in s.seen:
        for alias in each.stale:
            yield f"{alias} is not {each.name} (C14)"


def expert_codes(s: Subject) -> Failures:
    """Scales are finite and not zero, shapes are stated right, and no expert's codes are constant or nearly so."""
    for each in s.seen:
        if each.fault and s.config.rule_for(each.name).artifact == "int4":
            yield each.fault
    shapes = dict(layout.parameters(s.config))
    for each, matrix in s.experts:
        if matrix.stated != shapes[each.name]:
            yield f"{each.name}: weight_shape says {list(matrix.stated)}, expected {list(shapes[each.name])}"
        elif not matrix.scales_ok:
            yield f"{each.name}: weight_scale is zero or not finite somewhere"
        elif matrix.distinct < DISTINCT_CODES:
            cause = "a zeroed expert, one that no calibration token reached?"
            yield f"{each.name} uses {matrix.distinct} of 16 codes: {cause}"


def expert_errors(s: Subject) -> Failures:
    """Every INT4 matrix is its source within the stated relative error."""
    for each in s.seen:
        if s.config.rule_for(each.name).artifact == "int4" and (fault := each.fault or each.source_fault):
            yield f"{each.name}: {fault}"
    for each, matrix in s.experts:
        if not each.source_fault and not matrix.error <= INT4_RELATIVE_ERROR:
            cause = "zeroed" if 0.99 < matrix.error < 1.01 else "another matrix's, or codes in another order"
            yield (
                f"{each.name}: relative error {matrix.error:.3f} against the source,"
                f" at most {INT4_RELATIVE_ERROR} expected: {cause}?"
            )


def expert_slopes(s: Subject) -> Failures:
    """Rows, and columns of groups, are neither larger nor smaller than their source's, as wrong scales make them."""
    low, high = SLOPES
    for each, matrix in s.experts:
        for what, ends in (("rows", matrix.rows), ("columns of groups", matrix.columns)):
            if not (low <= ends[0] and ends[1] <= high):
                worst = ends[0] if not low <= ends[0] else ends[1]
                yield (
                    f"{each.name}: {what} are up to {worst:.2f} times their source, {low} to {high} expected:"
                    " scales of another matrix?"
                )
                break


def rounding(s: Subject) -> Failures:
    """All layers were quantized alike, by the expected method: GPTQ moves codes away from the nearest ones."""
    moved: dict[str, list[int]] = {}
    for each, matrix in s.experts:
        counts = moved.setdefault(each.name.split(".")[1], [0, 0])
        counts[0] += matrix.moved
        counts[1] += matrix.codes
    shares = {layer: some / max(whole, 1) for layer, (some, whole) in moved.items()}
    found = {layer: "gptq" if share >= MOVED_CODES else "rtn" for layer, share in shares.items()}
    methods = list(found.values())
    wanted = s.expect or max(METHODS, key=methods.count)
    for layer, method in found.items():
        if method != wanted:
            why = f"{shares[layer]:.2%} of its codes are not the nearest ones"
            others = "" if s.expect else ", as in the other layers"
            yield f"layer {layer} was quantized by {METHODS[method]} ({why}), {METHODS[wanted]} expected{others}"


def mtp_untouched(s: Subject) -> Failures:
    """No tensor of the MTP block is packed or has a scale."""
    for name in sorted(s.artifact.weight_map):
        if name.startswith("mtp.") and name.endswith(("weight_packed", "weight_scale", "weight_shape", ".scale")):
            yield f"{name}: the MTP block is quantized (C10)"


def config_resolves(s: Subject) -> Failures:
    """quantization_config, read by compressed-tensors' own classes and matcher, gives every vLLM module its scheme."""
    yield from unresolved(s.config)


def config_kept(s: Subject) -> Failures:
    """config.json is the source's but for quantization_config, and router biases will be read (`noaux_tc`)."""
    if (method := s.config.raw.get("topk_method")) != "noaux_tc":
        yield f"config.json: topk_method is {method!r}, vLLM reads gate.bias only for 'noaux_tc'"
    if s.config.raw.get("quantization_config") != recipe.quantization_config(
        s.config.num_hidden_layers, s.config.fp4_layers
    ):
        yield "config.json: quantization_config is not the recipe's"
    if s.source is not None:
        theirs = s.source.config.raw
        for key in sorted((s.config.raw.keys() | theirs.keys()) - {"quantization_config"}):
            if s.config.raw.get(key) != theirs.get(key):
                yield f"config.json: {key} is {s.config.raw.get(key)!r}, the source has {theirs.get(key)!r}"


def tokenizer(s: Subject) -> Failures:
    """The tokenizer's files are the source's, and its tokens fit the vocabulary."""
    try:
        size = load_tokenizer(s.folder).get_vocab_size()
        check_vocabulary(size - 1, s.config.vocab_size, s.folder)
    except UserError as error:
        yield error.fact
    for name in TOKENIZER_FILES if s.source else ():
        ours, theirs = (_content(folder / name) for folder in (s.folder, s.source.directory))  # type: ignore[union-attr]
        if ours != theirs:
            yield f"{name} is not the source's" if ours is not None else f"{name} is missing, the source has it"


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def quality(s: Subject) -> Failures:
    """On held-out tokens the artifact predicts as its source does, and its MTP block drafts as well."""
    source, artifact = s.qualities[:2]
    change, same, kl = perplexity_change(artifact, source), agreement(artifact), mean(artifact.kl).interval()
    theirs, ours = (q.accepted_share(1) for q in (source, artifact))
    for fine, fact in (
        (
            change.least <= PERPLEXITY_PERCENT,
            f"perplexity changes by {change.value:+.2f}%, at most {PERPLEXITY_PERCENT}%",
        ),
        (same.most >= AGREEMENT, f"{same.value:.1%} of tokens have the same most likely one, at least {AGREEMENT:.0%}"),
        (kl.least <= KL_NATS, f"KL divergence is {kl.value:.4f} nats a token, at most {KL_NATS}"),
        (
            ours.most >= theirs.least - ACCEPTANCE_LOST,
            f"{ours.value:.1%} of the MTP block's first drafts are accepted, the source's {theirs.value:.1%}:"
            " another MTP block, or hidden states that it does not know",
        ),
    ):
        if not fine:
            yield f"{fact} expected"


@dataclass(frozen=True)
class Check:
    """Its function, what it needs (keys of certificate.LACKING), and how many failures are spelled out.

    statistical: a good artifact may fail it, with the chance that tolerances.RISKS states.
    """

    name: str
    function: Callable[[Subject], Failures]
    needs: tuple[str, ...] = ()
    shown: int = SHOWN
    statistical: bool = False


# the docstring of a check says what passing means
CHECKS = (
    Check("layout", own_layout, shown=100),
    Check("opens", opens),
    Check("tensors", tensors, ("tensors",)),
    Check("finite", finite, ("tensors",)),
    Check("aliases", aliases, ("tensors",)),
    Check("mtp untouched", mtp_untouched, ("tensors",)),
    Check("expert codes", expert_codes, ("tensors",)),
    Check("config resolves", config_resolves, ("tensors",)),
    Check("config kept", config_kept, ("tensors",)),
    Check("tokenizer", tokenizer, ("tensors",)),
    Check("passed through", passed_through, ("tensors", "source")),
    Check("expert errors", expert_errors, ("tensors", "source"), statistical=True),
    Check("expert slopes", expert_slopes, ("tensors", "source"), statistical=True),
    Check("rounding", rounding, ("tensors", "source"), statistical=True),
    Check("recorded", recorded, ("tensors", "hashes")),
    Check("provenance", provenance, ("tensors",)),
    Check("checksums", checksums, ("hashes",)),
    Check("quality", quality, ("tensors", "source", "deep"), statistical=True),
)
