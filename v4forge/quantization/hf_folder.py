"""Artifacts that llm-compressor and transformers save: recognized, and told what is wrong with them.

transformers drops the MTP block when it loads (C2), rounds F32 parameters where people make its forward pass run (C13),
and saves names of its own or, undoing some of its renames, hybrid ones. What only such a save has are the routed
experts' INT4 codes and scales; repair.py takes those, checked by `matrices`, and everything else from the source.

The folder is untrusted: nothing of it is read but JSON and the safetensors that lie in it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from v4forge.checkpoint import layout
from v4forge.checkpoint.formats import INT4_GROUP, Shape, TensorSpec
from v4forge.checkpoint.layout import Config
from v4forge.checkpoint.reader import INDEX, Checkpoint, matches
from v4forge.checkpoint.recipe import ALIASES, Rule, rule_for
from v4forge.checkpoint.vllm_schemes import unresolved
from v4forge.errors import UserError
from v4forge.files import check_no_pointer, read_json
from v4forge.model import names

SINGLE = "model.safetensors"  # what transformers writes when one shard holds everything, without an index
# Whose a tensor name is, the first that matches; what most names say holds for the folder.
NAMINGS = (
    ("transformers' own names", r"(model\.)?layers\.\d+\.(self_attn|mlp)\."),
    ("transformers' hybrid names", r"model\.layers\.\d+\.(attn|ffn)\."),
    ("transformers' hybrid names", r"layers\.\d+\.ffn\.experts\.\d+\.(gate_proj|up_proj|down_proj|wgate)\."),
    ("", r"(layers|mtp)\.\d+\.(attn|ffn)\."),
)
# What transformers calls upstream's tensors outside the layers; `model.` before them comes and goes.
ROOT_NAMES = ((r"^embed\.", "embed_tokens."), (r"^head\.", "lm_head."), (r"^hc_head_", "hc_head.hc_"))
# In hybrid names a rename is undone that was none of upstream's: `.kv_norm.` came from `.norm.` in the compressor only,
# and an expert's `.gate_proj.` becomes `.wgate.`, as the compressor's does.
UNDONE = ((r"\.attn\.kv_norm\.", ".attn.norm."),)
EXPERT_NAMES = {"w1": ("w1", "gate_proj", "wgate"), "w2": ("w2", "down_proj"), "w3": ("w3", "up_proj")}
EXPERT_PATHS = [
    p + q for p, q in product(("", "model."), ("layers.{}.ffn.experts.{}.{}", "layers.{}.mlp.experts.{}.{}"))
]
EXPERT = re.compile(r"layers\.(\d+)\.ffn\.experts\.(\d+)\.(w[123])\.\w+")
SCHEME = {"type": "int", "num_bits": 4, "strategy": "group", "group_size": INT4_GROUP, "symmetric": True}
PARTS = ("weight_packed", "weight_scale", "weight_shape")
DEQUANTIZED = "of attention that are not upstream's FP8 bytes but dequantized"
REQUANTIZED = "of scales: attention was quantized anew, not passed through"
REFUSED_PARTS = {
    "weight": "not quantized",
    "weight_zero_point": "asymmetric, and the artifact has no zero points",
    "weight_g_idx": "permuted (actorder 'group'), and the artifact has no permutation",
}
SCALES = ("BF16", "F32", "F16")  # F32 and F16 only where BF16 holds the same value
QUANTIZE_AGAIN = (
    "quantize the experts again, symmetric INT4 in groups of 128, actorder static or none;"
    " or python -m scripts.calibrate --source DIR --work DIR"
)


def spellings(name: str) -> list[str]:
    """A stored tensor of ours under every name that it may have in a foreign folder, ours first."""
    if match := EXPERT.fullmatch(name):
        layer, expert, which = match.groups()
        part = name.rpartition(".")[2]
        return [f"{p.format(layer, expert, w)}.{part}" for p, w in product(EXPERT_PATHS, EXPERT_NAMES[which])]
    bodies = (name, _replaced(name, UNDONE), _replaced(name, ROOT_NAMES), _in_transformers(name))
    return [prefix + body for body in dict.fromkeys(bodies) for prefix in ("", "model.")]


def _replaced(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


def _in_transformers(name: str) -> str:
    block = re.match(r"layers\.\d+\.", name)
    return block[0] + names.renamed(name[block.end() :]) if block else name


def _shown(name: object) -> str:
    """An untrusted name on one short line, whatever is in it."""
    return ascii(name)[1:-1][:200]


@dataclass(frozen=True)
class Foreign:
    """A folder that another tool may have saved. Its headers are read, not its weights.

    `naming` is "" when the names are ours; `faults` are the shards that are missing or damaged, a line each.
    """

    directory: Path
    naming: str
    weight_map: Mapping[str, str]
    shards: Mapping[str, Any] = field(repr=False)
    faults: tuple[str, ...] = ()

    @cached_property
    def raw(self) -> dict[str, Any]:
        """config.json, {} for one that is none."""
        return read_json(self.directory / "config.json")

    @property
    def quantization(self) -> dict[str, Any]:
        stated = self.raw.get("quantization_config")
        return stated if isinstance(stated, dict) else {}

    @property
    def maker(self) -> str:
        if not self.naming:
            return "another tool"
        quantized = self.quantization.get("quant_method") == "compressed-tensors"
        return f"{'llm-compressor through ' if quantized else ''}transformers"

    def stored(self, name: str) -> str | None:
        """The name under which the folder has our stored tensor `name`; None when it does not have it."""
        return next((s for s in spellings(name) if s in self.weight_map), None)

    def spec(self, theirs: str) -> tuple[str, Shape]:
        """A tensor's dtype, as safetensors names it, and shape; ("", ()) in a shard that is missing or damaged."""
        file = self.shards.get(self.weight_map[theirs])
        if file is None:
            return "", ()
        piece = file.get_slice(theirs)
        return piece.get_dtype(), tuple(piece.get_shape())

    def read(self, theirs: str) -> Tensor:
        return self.shards[self.weight_map[theirs]].get_tensor(theirs)

    def problems(self, source: Checkpoint | None = None) -> list[str]:
        """What is wrong with the folder as an artifact, a line each: how many, an example, the likely cause. The last
        line is the command that repairs it, or why none does. With the source, its config.json is compared too.
        """
        lines = [f"saved by {self.maker}, with {self.naming or 'the names of the artifact'}", *self.faults]
        try:
            config = source.config if source else layout.parse_config(self.raw, "config.json", "saved")
        except UserError as error:
            return [*lines, error.fact, "pass --source: its config.json says what must be there"]
        lines += [*_wrong_tensors(self, config), *_wrong_config(self, config)]
        try:
            matrices(self, config)
        except UserError as error:
            return [*lines, f"cannot be repaired: {error.fact}; {error.hint}"]
        inputs = f"--source {source.directory if source else 'DIR'} --from-hf {self.directory}"
        return [*lines, f"to repair it: python -m scripts.postprocess {inputs} --out DIR"]


def recognized(directory: Path) -> Foreign | None:
    """The folder when llm-compressor or transformers saved a DeepSeek-V4 there; None for one with our names, and for
    anything else. Never raises."""
    try:
        ours = read_json(directory / "config.json").get("model_type", "deepseek_v4") == "deepseek_v4"
        return opened(directory) if ours and _naming(_weight_map(directory)) else None
    except (UserError, OSError):
        return None


def opened(directory: Path) -> Foreign:
    """The folder, its shards' headers read. Raises UserError without an index, and for one that leaves the folder."""
    weight_map, faults = _weight_map(directory), []
    shards = {}
    for shard in sorted(set(weight_map.values())):
        try:
            file = _open(directory / shard)
            held = set(file.keys())
            if lost := sorted(name for name, where in weight_map.items() if where == shard and name not in held):
                raise ValueError(f"it lacks {lost[0]}, which the index has there")
            shards[shard] = file
        except (OSError, SafetensorError, ValueError) as error:
            faults.append(f"shard {directory / shard} is missing or damaged: {_shown(str(error))}")
    return Foreign(directory, _naming(weight_map), weight_map, shards, tuple(faults))


def _open(path: Path) -> Any:
    if not path.is_file():  # also a pipe, which would be waited for
        raise FileNotFoundError(f"no file {path.name}")
    check_no_pointer(path)
    return safe_open(path, framework="pt")


def _weight_map(directory: Path) -> dict[str, str]:
    """tensor -> shard: from the index, or all of them from the one file that needs none."""
    index, single = directory / INDEX, directory / SINGLE
    stated = index if index.is_file() else single
    try:
        if stated == single:
            return dict.fromkeys(_open(single).keys(), SINGLE)
        check_no_pointer(index)
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not all(shard == Path(shard).name and shard.endswith(".safetensors") for shard in weight_map.values()):
            raise ValueError("it names a shard outside the folder")
    except FileNotFoundError:
        fact = f"{directory} holds neither {INDEX} nor {SINGLE}"
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        fact = f"{stated} is not a list of safetensors in its folder: {_shown(str(error))}"
    else:
        return weight_map
    raise UserError(fact, "pass the folder that save_pretrained wrote")


def _naming(names: Mapping[str, str]) -> str:
    votes = Counter(next((n for n, pattern in NAMINGS if re.match(pattern, name)), "") for name in names)
    return max(votes, key=lambda naming: (votes[naming], naming == ""), default="")


def _wanted(config: Config) -> Iterator[tuple[str, TensorSpec, Rule]]:
    """Every stored tensor of the artifact with the rule that it follows."""
    for name, shape in layout.parameters(config):
        rule = rule_for(name)
        for stored, spec in layout.stored(name, shape, rule.artifact).items():
            yield stored, spec, rule
            yield from ((alias, spec, rule) for alias, original in ALIASES.items() if original == stored)


def _cause(name: str, found: str, rule: Rule) -> str:
    """Why a tensor has another dtype or shape than it should."""
    if found == "BF16" and rule.source == "f32":
        return "of F32 rounded to BF16 (C13)"
    if rule.artifact == "fp8-ct":
        return DEQUANTIZED if name.endswith(".weight") else REQUANTIZED
    if found == "BF16" and rule.artifact == "f32":
        return "in BF16 where the artifact has F32, without loss"
    return "with another dtype or shape"


def _missing(name: str, rule: Rule) -> str:
    if name in ALIASES:
        return "missing that repeat head and embedding in the MTP block (C14)"
    if name.startswith("mtp."):
        return "of the MTP block missing, which transformers drops when it loads (C2)"
    return DEQUANTIZED if rule.artifact == "fp8-ct" else f"missing of {rule.kind}"


def _unknown(name: str) -> str:
    part = name.rpartition(".")[2]
    if re.search(r"(^|\.)mtp\.", name) and part in PARTS:
        return "of the MTP block quantized (C10)"
    if ".experts." in name and part in REFUSED_PARTS:
        return f"of experts in another form: {REFUSED_PARTS[part]}"
    return "that no layout has"


def _wrong_tensors(foreign: Foreign, config: Config) -> Iterator[str]:
    """One line a kind of fault: how many tensors, the first of them, the cause."""
    faults: dict[str, list[str]] = {}
    known: dict[str, str] = {}
    for ours, spec, rule in _wanted(config):
        theirs = foreign.stored(ours)
        if theirs is None:
            faults.setdefault(_missing(ours, rule), []).append(ours)
            continue
        known[theirs] = ours
        dtype, shape = foreign.spec(theirs)
        if dtype and not matches(TensorSpec(dtype, shape), spec):
            example = f"{theirs} is {dtype} {list(shape)}, not {spec.dtype} {list(spec.shape)}"
            faults.setdefault(_cause(ours, dtype, rule), []).append(example)
    for theirs in foreign.weight_map.keys() - known.keys():
        faults.setdefault(_unknown(theirs), []).append(_shown(theirs))
    if renamed := [pair for pair in known.items() if pair[0] != pair[1]]:
        theirs, ours = min(renamed, key=lambda pair: (EXPERT.fullmatch(pair[1]) is None, pair[1]))
        yield f"{len(renamed)} of {len(foreign.weight_map)} names are not upstream's: {ours} is called {theirs}"
    for what, examples in sorted(faults.items(), key=lambda fault: "(C" not in fault[0]):  # findings first
        yield f"{len(examples)} tensor{'s' * (len(examples) > 1)} {what}: {min(examples)}"


def _wrong_config(foreign: Foreign, config: Config) -> Iterator[str]:
    stated = replace(config, raw={**config.raw, "quantization_config": foreign.quantization})
    by_code: dict[str, list[str]] = {}
    for line in unresolved(stated):
        code = re.search(r"\((C10|N4):", line)
        by_code.setdefault(code[1] if code else "", []).append(line)
    for lines in by_code.values():
        yield lines[0] + (f", and {len(lines) - 1} more of vLLM's modules" if len(lines) > 1 else "")
    ours, theirs = config.raw, foreign.raw
    keys = sorted(k for k in (ours.keys() | theirs.keys()) - {"quantization_config"} if ours.get(k) != theirs.get(k))
    if keys:
        yield f"config.json: {len(keys)} settings are not the source's: {', '.join(map(_shown, keys[:8]))}"


Matrices = dict[str, dict[str, str]]  # a routed expert's logical name -> its stored names in ours -> in the folder


def matrices(foreign: Foreign, config: Config) -> Matrices:
    """The routed experts' matrices, each there once and in a form that the artifact has, as far as headers tell.

    Raises UserError, naming the tensor, for the first that cannot be taken.
    """
    if foreign.faults:
        raise UserError(foreign.faults[0], "copy the folder again, with all its shards")
    found: dict[str, set[str]] = {}
    for name in foreign.weight_map:
        module, _, part = name.rpartition(".")
        found.setdefault(module, set()).add(part)
    taken: Matrices = {}
    for logical, shape in layout.parameters(config):
        if rule_for(logical).artifact == "int4":
            modules = [s.rpartition(".")[0] for s in spellings(logical)]
            there = [m for m in modules if m in found]
            if len(there) != 1:
                where = f"{len(there)} times" if there else "not"
                raise UserError(f"{logical} is {where} in {foreign.directory}", QUANTIZE_AGAIN)
            wanted = {n.rpartition(".")[2]: spec for n, spec in layout.stored(logical, shape, "int4").items()}
            _check_parts(foreign, there[0], found[there[0]], wanted)
            taken[logical] = {layout.stored_name(logical, part): f"{there[0]}.{part}" for part in wanted}
    _check_scheme(foreign.quantization)
    return taken


def _check_parts(foreign: Foreign, module: str, found: set[str], wanted: Mapping[str, TensorSpec]) -> None:
    """Raises UserError unless a matrix has exactly the parts of INT4 in groups of 128, with their dtypes and shapes."""
    for part in sorted(found ^ wanted.keys()):
        form = REFUSED_PARTS.get(part, "of a form that is not symmetric INT4")
        why = "is missing" if part in wanted else f"says that the matrix is {form}"
        raise UserError(f"{module}.{_shown(part)} {why}", QUANTIZE_AGAIN)
    for part, spec in wanted.items():
        dtype, shape = foreign.spec(f"{module}.{part}")
        if dtype not in (SCALES if part == "weight_scale" else (spec.dtype,)) or shape != spec.shape:
            needed = f"{spec.dtype} {list(spec.shape)}"
            fact = f"{module}.{part} is {dtype} {list(shape)}, INT4 in groups of {INT4_GROUP} is {needed}"
            raise UserError(fact, QUANTIZE_AGAIN)


def _check_scheme(quantization: Mapping[str, Any]) -> None:
    """Raises UserError when none of the schemes for integers in config.json is what the tensors were checked for."""
    groups = quantization.get("config_groups")
    schemes = [g.get("weights") for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
    wrong = [
        [f"{key} {_shown(str(scheme.get(key)))}" for key, value in SCHEME.items() if scheme.get(key) != value]
        for scheme in schemes
        if isinstance(scheme, dict) and scheme.get("type", "int") == "int"
    ]
    if wrong and all(wrong):
        raise UserError(f"config.json states {', '.join(wrong[0])} for the experts' weights", QUANTIZE_AGAIN)
