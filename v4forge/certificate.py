"""The checks of verify: each a small function that yields failures, each failure one line with tensor, expected, found.

What must be there comes from the config and the recipe, never from the artifact. With a source, everything passed
through is compared bit for bit, and everything quantized within a stated bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_name
from torch import Tensor

from v4forge import layout, recipe
from v4forge.checkpoint import DTYPE_NAMES, Checkpoint, matches
from v4forge.codec import INT4_GROUP, CodecError, dequantize_int4, unpack_int4
from v4forge.errors import UserError
from v4forge.files import read_json, remove_leftovers, write_json
from v4forge.independent import expected
from v4forge.layout import Config, Shape, TensorSpec
from v4forge.manifest import MANIFEST, SUMS, members
from v4forge.recipe import ALIASES, rule_for
from v4forge.stamps import Digests

CERTIFICATE = "certificate.json"
SHOWN = 5  # failures of one check that the certificate spells out
# ||W - Q|| / ||W|| of an INT4 g128 matrix against its source: on models/tiny at most 0.11 for round-to-nearest and 0.12
# for GPTQ, 0.15 for GPTQ on absmax scales (it trades weight error for output error). A zeroed or permuted matrix has 1
# or more.
INT4_RELATIVE_ERROR = 0.30
# <q, w> / <w, w> of each group of 128 weights: 0.91 to 1.06 on models/tiny, 0.78 to 1.14 seen on good GPTQ output. A
# doubled row or a group's scale that is off by 2 has 0.5 or 2.
GROUP_SLOPES = (0.7, 1.3)
# Share of a layer's codes that differ from the nearest ones at the same scales: 0 for round-to-nearest, 4% to 8% for
# GPTQ on models/tiny.
MOVED_CODES = 0.01
METHODS = {"gptq": "GPTQ", "rtn": "round-to-nearest"}
DISTINCT_CODES = 8  # at least, in a matrix; good output uses all 16


@dataclass(frozen=True)
class Check:
    """One check's outcome. `detail` says what was compared, or the first failures."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Subject:
    """What is verified, and against what."""

    artifact: Checkpoint
    source: Checkpoint | None
    digests: Digests
    expect: str = ""  # a key of METHODS, or "" where either will do

    @property
    def config(self) -> Config:
        return self.artifact.config

    @cached_property
    def experts(self) -> list[Comparison]:
        """Every INT4 matrix beside its source; each is read once, whichever checks ask."""
        return [_compared(self, name, shape) for name, shape in _logical(self, experts=True)]


@dataclass(frozen=True)
class Comparison:
    """An INT4 matrix Q beside its source W. `fact` says why there is none."""

    name: str
    fact: str = ""
    error: float = 0.0  # ||W - Q|| / ||W||
    slopes: tuple[float, float] = (1.0, 1.0)  # least and greatest <q, w> / <w, w> of a group of 128
    moved: int = 0  # codes that are not the nearest ones
    codes: int = 0

    @property
    def layer(self) -> str:
        return self.name.split(".")[1]


Failures = Iterator[str]


def checksums(s: Subject) -> Failures:
    """Every file has the SHA-256 of SHA256SUMS and of manifest.json, and none is unlisted."""
    folder = s.artifact.directory
    try:
        lines = (folder / SUMS).read_text().splitlines()
    except (OSError, ValueError):
        yield f"{SUMS} is missing or damaged: run postprocess again"
        return
    stated = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    found = {path.name: digest for path, digest in s.digests.of(members(folder)).items()}
    for name in sorted(stated.keys() | found.keys()):
        if name not in found:
            yield f"{name} is listed in {SUMS} but missing"
        elif stated.get(name) != found[name]:
            says = stated.get(name, "nothing")[:12]
            yield f"{name} has sha256 {found[name][:12]}…, {SUMS} says {says}: changed after postprocess"
    listed = read_json(folder / MANIFEST).get("files")
    for name in sorted(found.keys() - {MANIFEST}):
        entry = listed.get(name) if isinstance(listed, dict) else None
        if not isinstance(entry, dict) or entry.get("sha256") != found[name]:
            yield f"{MANIFEST} does not describe {name} as it is"


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
            rounded = spec.dtype == torch.float32 and found.dtype == torch.bfloat16
            cause = " (C13: an F32 tensor was rounded)" if rounded else ""
            yield f"{name} is {_described(found)}, expected {_described(spec)}{cause}"


def _described(spec: TensorSpec) -> str:
    return f"{DTYPE_NAMES[spec.dtype]} {list(spec.shape)}"


def _logical(s: Subject, experts: bool) -> Iterator[tuple[str, Shape]]:
    for name, shape in layout.parameters(s.config):
        if (rule_for(name).artifact == "int4") == experts:
            yield name, shape


def finite(s: Subject) -> Failures:
    """No tensor holds NaN or Inf, and every FP8 weight decodes exactly."""
    for name, shape in _logical(s, experts=False):
        try:
            s.artifact.load(name, shape)
        except UserError as error:
            yield error.fact


def passed_through(s: Subject) -> Failures:
    """Everything but the routed experts equals the source bit for bit: FP8 bytes, exact decodes, F32 and BF16."""
    assert s.source is not None
    for name, shape in _logical(s, experts=False):
        try:
            wanted = expected(s.source, name, shape)
        except UserError as error:
            yield f"the source's {error.fact}"
            continue
        for stored, tensor in wanted.items():
            if stored in s.artifact.weight_map and not _same_bits(found := s.artifact.raw(stored), tensor):
                yield f"{stored} differs from the source: {_difference(found, tensor)}"


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))


def _bits(t: Tensor) -> Tensor:
    return t.contiguous().reshape(-1).view(torch.uint8)


def _difference(found: Tensor, wanted: Tensor) -> str:
    if found.dtype != wanted.dtype or found.shape != wanted.shape:
        return _described(TensorSpec(found.dtype, tuple(found.shape)))
    unequal = (_bits(found).view(-1, found.element_size()) != _bits(wanted).view(-1, found.element_size())).any(1)
    where = int(unequal.nonzero()[0])
    values = found.reshape(-1)[where].item(), wanted.reshape(-1)[where].item()
    return f"{int(unequal.sum())} of {found.numel()} values, first at {where}: {values[0]} instead of {values[1]}"


def aliases(s: Subject) -> Failures:
    """The MTP block's copies of head and embedding are those tensors (C14)."""
    for alias, original in ALIASES.items():
        if not {alias, original} <= s.artifact.weight_map.keys():
            continue
        if not _same_bits(s.artifact.raw(alias), s.artifact.raw(original)):
            yield f"{alias} is not {original}"


def expert_codes(s: Subject) -> Failures:
    """Scales are finite and positive, shapes are stated right, and no expert's codes are constant or nearly so."""
    for name, shape in _logical(s, experts=True):
        try:
            packed, scale, stated = s.artifact.parts(name, shape).values()
        except UserError as error:
            yield error.fact
            continue
        if tuple(stated.tolist()) != shape:
            yield f"{name}: weight_shape says {stated.tolist()}, expected {list(shape)}"
        elif not bool(scale.isfinite().all()) or not bool((scale > 0).all()):
            yield f"{name}: weight_scale is not finite and positive everywhere"
        elif (distinct := len(unpack_int4(packed, stated).unique())) < DISTINCT_CODES:
            yield f"{name} uses {distinct} of 16 codes: a zeroed expert, one that no calibration token reached?"


def _compared(s: Subject, name: str, shape: Shape) -> Comparison:
    assert s.source is not None
    try:
        wanted = s.source.load(name, shape).float()
        packed, scale, _ = s.artifact.parts(name, shape).values()
        codes = unpack_int4(packed, torch.tensor(shape))
    except (UserError, CodecError) as error:
        return Comparison(name, str(error))
    found = dequantize_int4(codes, scale).float()
    grouped = wanted.unflatten(-1, (-1, INT4_GROUP))
    energy = grouped.square().sum(-1)
    products = (found.unflatten(-1, (-1, INT4_GROUP)) * grouped).sum(-1)
    slopes = torch.where(energy > 0, products / energy, 1.0)
    nearest = (grouped / scale.float().unsqueeze(-1)).round().clamp(-8, 7).flatten(-2)
    return Comparison(
        name,
        error=float((found - wanted).norm() / wanted.norm().clamp_min(1e-30)),
        slopes=(float(slopes.min()), float(slopes.max())),
        moved=int((nearest != codes).sum()),
        codes=codes.numel(),
    )


def expert_errors(s: Subject) -> Failures:
    """Every INT4 matrix is its source within the stated relative error."""
    for each in s.experts:
        if each.fact:
            yield f"{each.name}: {each.fact}"
        elif not each.error <= INT4_RELATIVE_ERROR:
            yield (
                f"{each.name}: relative error {each.error:.3f} against the source,"
                f" at most {INT4_RELATIVE_ERROR} expected"
            )


def expert_slopes(s: Subject) -> Failures:
    """No group of 128 weights is larger or smaller than its source's, as one with a wrong scale would be."""
    low, high = GROUP_SLOPES
    for each in s.experts:
        if not (low <= each.slopes[0] and each.slopes[1] <= high):
            worst = each.slopes[0] if not low <= each.slopes[0] else each.slopes[1]
            yield (
                f"{each.name}: a group is {worst:.2f} times its source, {low} to {high} expected:"
                " a scale or a row of another matrix?"
            )


def rounding(s: Subject) -> Failures:
    """All layers were quantized alike, by the expected method: GPTQ moves codes away from the nearest ones."""
    moved: dict[str, list[int]] = {}
    for each in s.experts:
        counts = moved.setdefault(each.layer, [0, 0])
        counts[0] += each.moved
        counts[1] += each.codes
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


def served_modules(config: Config) -> dict[str, str | None]:
    """vLLM's module names -> the quantization they must resolve to: "attention", "experts", or None for none.

    Names of vLLM 0.26 to 0.33: one layer of each attention kind, the first and last expert, and the MTP block as layer
    `num_hidden_layers` and under its upstream name.
    """
    names: dict[str, str | None] = {"lm_head": None, "model.embed_tokens": None}
    last = config.n_routed_experts - 1
    for layer in (*config.layers, config.num_hidden_layers):
        mtp = layer == config.num_hidden_layers
        for prefix in [f"model.layers.{layer}"] + ([f"model.layers.{layer}.mtp_block", "mtp.0"] if mtp else []):
            for projection in ("wq_a", "wkv", "fused_wqa_wkv", "wq_b", "wo_a", "wo_b"):
                names[f"{prefix}.attn.{projection}"] = None if mtp else "attention"
            for expert in (0, last):
                for matrix in ("w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"):
                    names[f"{prefix}.ffn.experts.{expert}.{matrix}"] = None if mtp else "experts"
            for plain in (
                *(f"attn.compressor.{m}" for m in ("wkv", "wgate", "fused_wkv_wgate")),
                *(f"attn.indexer.{m}" for m in ("wq_b", "weights_proj")),
                *(f"attn.indexer.compressor.{m}" for m in ("wkv", "fused_wkv_wgate")),
                *(f"ffn.shared_experts.{m}" for m in ("w1", "w2", "w3", "gate_up_proj", "down_proj")),
                *("ffn.gate", "e_proj", "h_proj", "shared_head.head"),
            ):
                names[f"{prefix}.{plain}"] = None
    return names


def _schemes(parsed: QuantizationConfig, module: str) -> tuple[bool, list[tuple[Any, ...] | None]]:
    """Whether the module is ignored, and (type, bits, strategy) of the weights in each group that it matches."""
    ignored = any(match_name(module, pattern) for pattern in parsed.ignore or [])
    weights = [g.weights for g in parsed.config_groups.values() if any(match_name(module, t) for t in g.targets)]
    return ignored, [
        tuple(getattr(v, "value", v) for v in (w.type, w.num_bits, w.strategy)) if w else None for w in weights
    ]


def config_resolves(s: Subject) -> Failures:
    """quantization_config, read by compressed-tensors' own classes and matcher, gives every vLLM module its scheme."""
    stated = s.config.raw.get("quantization_config") or {}
    try:
        parsed = QuantizationConfig.model_validate(stated)
        resolved = {module: _schemes(parsed, module) for module in served_modules(s.config)}
    except Exception as error:  # pydantic's, or re's for a target that is no regular expression
        yield f"config.json: quantization_config is not compressed-tensors': {str(error).splitlines()[0]}"
        return
    kinds = {"attention": ("float", 8, "block"), "experts": ("int", 4, "group")}
    for module, wanted in served_modules(s.config).items():
        ignored, schemes = resolved[module]
        found = None if ignored or not schemes else schemes[0]
        if len(schemes) > 1:
            yield f"config.json: {module} matches {len(schemes)} groups"
        elif found != (kinds[wanted] if wanted else None):
            yield f"config.json: {module} resolves to {found}, expected {kinds.get(wanted or '')} (N4, C10)"


def config_kept(s: Subject) -> Failures:
    """config.json is the source's but for quantization_config, and router biases will be read (`noaux_tc`)."""
    if (method := s.config.raw.get("topk_method")) != "noaux_tc":
        yield f"config.json: topk_method is {method!r}, vLLM reads gate.bias only for 'noaux_tc'"
    if s.config.raw.get("quantization_config") != recipe.quantization_config(s.config.num_hidden_layers):
        yield "config.json: quantization_config is not the recipe's"
    if s.source is not None:
        theirs = s.source.config.raw
        for key in sorted((s.config.raw.keys() | theirs.keys()) - {"quantization_config"}):
            if s.config.raw.get(key) != theirs.get(key):
                yield f"config.json: {key} is {s.config.raw.get(key)!r}, the source has {theirs.get(key)!r}"


# (name, the check, whether it needs the source); the docstring says what passing means
CHECKS: tuple[tuple[str, Callable[[Subject], Failures], bool], ...] = (
    ("checksums", checksums, False),
    ("tensors", tensors, False),
    ("finite", finite, False),
    ("aliases", aliases, False),
    ("mtp untouched", mtp_untouched, False),
    ("expert codes", expert_codes, False),
    ("config resolves", config_resolves, False),
    ("config kept", config_kept, False),
    ("passed through", passed_through, True),
    ("expert errors", expert_errors, True),
    ("expert slopes", expert_slopes, True),
    ("rounding", rounding, True),
)


@torch.no_grad()
def verify(
    artifact: Checkpoint,
    source: Checkpoint | None,
    digests: Digests,
    progress: Callable[[int, str], None] = lambda _done, _what: None,
    expect: str = "",
) -> list[Check]:
    """Runs every check that can run; those that need a source are left out without one. expect: a key of METHODS, how
    the routed experts must have been quantized; without it all layers alike.

    Raises UserError when a config.json does not say what to expect.
    """
    subject = Subject(artifact, source, digests, expect)
    for checkpoint in (artifact, *([source] if source else [])):
        checkpoint.config  # noqa: B018, reads and checks it
    results = []
    for done, (name, check, needs_source) in enumerate(CHECKS):
        if needs_source and source is None:
            continue
        progress(done, name)
        try:
            failures = list(check(subject))
        except UserError as error:
            failures = [error.fact]
        first = (check.__doc__ or "").splitlines()[0]
        more = f" … and {len(failures) - SHOWN} more" if len(failures) > SHOWN else ""
        results.append(Check(name, not failures, "; ".join(failures[:SHOWN]) + more if failures else first))
    return results


def write(artifact: Path, checks: list[Check], digests: Digests) -> dict[str, Any]:
    """Writes certificate.json into the artifact and returns it; it names SHA256SUMS by its digest."""
    remove_leftovers(artifact)
    sums = artifact / SUMS
    certificate = {
        "ok": all(check.ok for check in checks),
        "sums_sha256": digests.of([sums])[sums] if sums.is_file() else None,
        "checks": [asdict(check) for check in checks],
    }
    write_json(artifact / CERTIFICATE, certificate)
    return certificate
