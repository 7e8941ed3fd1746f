"""What a checkpoint is, from its names, sizes and headers alone: form, release, parts, certificate, what it fits on.

No tensor is read, so no torch; where shards are not here, what the layout asks for is told as that.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from v4forge import artifact_folder, pins
from v4forge.artifact_folder import MANIFEST
from v4forge.checkpoint import incoming, layout, safetensors_header
from v4forge.checkpoint.formats import ITEM_BYTES, TensorSpec
from v4forge.checkpoint.incoming import INDEX
from v4forge.checkpoint.layout import Config
from v4forge.checkpoint.recipe import ALIASES
from v4forge.errors import UserError
from v4forge.files import read_json
from v4forge.pipeline import requirements
from v4forge.pipeline.stages import PROFILES
from v4forge.quantization import layer_files, manifest
from v4forge.serving import settings
from v4forge.units import MIB

UPSTREAM, DECODED, ARTIFACT, LAYERS, OTHER = "upstream", "decoded", "artifact", "layer folder", "other"
# By form, what layout calls it that reads its config.json.
CONFIGS = {UPSTREAM: "source", DECODED: "saved", ARTIFACT: "artifact"}
MTP, ROOT = "MTP block", "embedding, head, last norm"
# What serves the artifact: memory.total of nvidia-smi. preflight refuses what came before Hopper.
GPUS = {"H100": 81_559 * MIB, "H200": 143_771 * MIB}
FAULTS_SHOWN = 3


@dataclass(frozen=True)
class Part:
    """Tensors of one kind in one format, a key of formats.PARTS or, where no layout says, a dtype."""

    kind: str
    format: str
    tensors: int
    bytes: int


@dataclass(frozen=True)
class Fit:
    """On how many GPUs of a kind the artifact's weights are served, and calibration runs; 0 where 8 do not do."""

    gpu: str
    memory_bytes: int
    serve: int
    calibrate: int


@dataclass(frozen=True)
class Inspection:
    """What was found. `why`: of OTHER, what it is not. `measured`: whether bytes and tensors are those of the headers,
    or what the layout asks for; `faults`: where the two differ, the first ones, of `differing`."""

    folder: str
    form: str
    why: str = ""
    model: str = ""
    release: str = ""
    made: str = ""
    layers: int = 0
    finished: tuple[int, ...] = ()
    mtp: bool = False
    shards: int = 0
    missing: tuple[str, ...] = ()
    coming: int = 0
    file_bytes: int = 0
    measured: bool = False
    parts: tuple[Part, ...] = ()
    differing: int = 0
    faults: tuple[str, ...] = ()
    certificate: str = ""
    certificate_fact: str = ""
    fits: tuple[Fit, ...] = ()
    artifact_bytes: int = 0

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    def json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Headers:
    """The shards of a folder: name -> spec of every tensor whose header is here, and which shards have none."""

    folder: Path
    shards: list[str]
    tensors: dict[str, TensorSpec] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    coming: int = 0
    file_bytes: int = 0

    def read(self) -> _Headers:
        """Raises UserError for a shard that is cut or not safetensors."""
        for shard in self.shards:
            path = self.folder / shard
            whole = path.is_file()
            try:
                size = path.stat().st_size if whole else None
                header = safetensors_header.parsed(safetensors_header.read_head(incoming.with_header(path)), size)
            except FileNotFoundError:
                self.missing.append(shard)
                continue
            except (OSError, ValueError) as error:
                hint = "copy or download it again"
                raise UserError(f"{path} is truncated or not safetensors: {error}", hint) from None
            self.coming += not whole
            self.file_bytes += size or 0
            for name, each in header.items():
                if name != "__metadata__":
                    self.tensors[name] = TensorSpec(each["dtype"], tuple(each["shape"]))
                    self.places[name] = shard
        return self

    @property
    def complete(self) -> bool:
        return bool(self.shards) and not self.missing

    def facts(self) -> dict[str, Any]:
        """What an Inspection says of the files."""
        found = {"shards": len(self.shards), "missing": tuple(self.missing), "coming": self.coming}
        return {**found, "file_bytes": self.file_bytes, "measured": self.complete}

    def by_dtype(self) -> tuple[Part, ...]:
        """What there is where no layout says what it is."""
        counts: Counter[str] = Counter(spec.dtype for spec in self.tensors.values())
        sizes: Counter[str] = Counter()
        for spec in self.tensors.values():
            sizes[spec.dtype] += math.prod(spec.shape) * ITEM_BYTES.get(spec.dtype, 1)
        return tuple(Part("tensors", dtype, counts[dtype], count) for dtype, count in sizes.most_common())


def inspect(folder: Path) -> Inspection:
    """What lies in a folder. Raises UserError for one that is no checkpoint, and for a shard that is cut."""
    if folder.is_file():
        raise UserError(f"{folder} is a file", f"pass the folder of the checkpoint: {folder.absolute().parent}")
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist", "pass the folder of a checkpoint, or make fetch PROFILE=flash")
    if (folder / "config.json").is_file():
        return _checkpoint(folder)
    layers = sorted(folder.glob("layer-[0-9]*.safetensors"))
    if layers:
        return _layer_folder(folder, [path.name for path in layers])
    raise UserError(
        f"{folder} is no checkpoint: it has neither config.json nor layer files",
        "pass a folder of config.json, index and shards, or calibrate's --work",
    )


def _checkpoint(folder: Path) -> Inspection:
    raw = _raw_config(folder / "config.json")
    quantization = raw.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    form = ARTIFACT if method == "compressed-tensors" else UPSTREAM if quantization else DECODED
    headers = _Headers(folder, _shards(folder)).read()
    try:
        config = layout.load_config(folder, CONFIGS[form])
    except UserError as error:
        return Inspection(
            str(folder),
            OTHER,
            why=error.fact,
            model=str(raw.get("model_type")),
            parts=headers.by_dtype(),
            **headers.facts(),
        )
    subject = _Subject(folder, form, config, headers)
    state = artifact_folder.certificate_state(folder) if form == ARTIFACT else None
    return Inspection(
        str(folder),
        form,
        model=_model(config),
        release=_release(folder),
        made=_made(folder, config) if form == ARTIFACT else "",
        layers=config.num_hidden_layers,
        mtp=subject.has_mtp,
        parts=subject.parts,
        differing=len(subject.faults),
        faults=tuple(subject.faults[:FAULTS_SHOWN]),
        certificate=state.verdict if state else "",
        certificate_fact=state.fact if state else "",
        fits=tuple(fits(config)),
        artifact_bytes=requirements.sizes_of(config).artifact.total(),
        **headers.facts(),
    )


def _raw_config(path: Path) -> Mapping[str, Any]:
    try:
        raw = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}", "download the file again") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} is not an object of settings", "download the file again")
    return raw


def _shards(folder: Path) -> list[str]:
    """The shards that the index names; those that lie here where there is no index."""
    try:
        found = set(json.loads((folder / INDEX).read_bytes())["weight_map"].values())
    except FileNotFoundError:
        return sorted(path.name for path in folder.glob("*.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{folder / INDEX} is not a safetensors index", "download the file again") from None
    if not all(isinstance(name, str) and artifact_folder.is_name(name) for name in found):
        raise UserError(f"{folder / INDEX} names a shard outside of the folder", "download the file again")
    return sorted(found)


@dataclass
class _Subject:
    """A checkpoint beside what the layout asks of it."""

    folder: Path
    form: str
    config: Config
    headers: _Headers

    @cached_property
    def expected(self) -> dict[str, tuple[str, str, TensorSpec]]:
        """Stored name -> its part, its format and its spec, as the layout has them."""
        found = {}
        for kind, logical, shape in self._logical():
            rule = self.config.rule_for(logical)
            form = rule.artifact if self.form == ARTIFACT else rule.source
            if self.form == DECODED and form in ("fp4", "fp8"):
                form = "bf16"
            for name, spec in layout.stored(logical, shape, form).items():
                found[name] = (kind or rule.kind, form, spec)
        if self.form == ARTIFACT:
            found |= {alias: (MTP, found[original][1], found[original][2]) for alias, original in ALIASES.items()}
        return found

    def _logical(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        for name, shape in layout.root_parameters(self.config):
            yield ROOT, name, shape
        for layer in self.config.layers:
            for name, shape in layout.layer_parameters(self.config, layer):
                yield "", name, shape
        for name, shape in layout.mtp_parameters(self.config):
            yield MTP, name, shape

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """By bytes, the largest first: of the headers where all are here, else what there should be."""
        counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
        there = self.headers.tensors if self.headers.complete else {n: e[2] for n, e in self.expected.items()}
        for name, spec in there.items():
            kind, form = self.expected[name][:2] if name in self.expected else ("of no layout", spec.dtype)
            counts[kind, form][0] += 1
            counts[kind, form][1] += math.prod(spec.shape) * ITEM_BYTES.get(spec.dtype, 1)
        found = [Part(kind, form, *numbers) for (kind, form), numbers in counts.items()]
        return tuple(sorted(found, key=lambda part: -part.bytes))

    @cached_property
    def faults(self) -> list[str]:
        """What the headers that are here have otherwise, and what is in none where all are."""
        found = []
        for name, spec in self.headers.tensors.items():
            if name not in self.expected:
                found.append(f"{self.headers.places[name]} holds {name}, which this config.json does not ask for")
                continue
            asked = self.expected[name][2]
            wide = asked.dtype == "I64" and len(asked.shape) == 2 and spec.dtype == "I32"  # as the reader takes it
            if spec != asked and not (wide and spec.shape == asked.shape):
                found.append(f"{name} is {spec.dtype} {[*spec.shape]}, not {asked.dtype} {[*asked.shape]}")
        if self.headers.complete:
            found += [f"there is no tensor {name}" for name in self.expected if name not in self.headers.tensors]
        return found

    @property
    def has_mtp(self) -> bool:
        """Whether the MTP block is there whole; by the layout where headers are not here."""
        names = [name for name, (kind, *_) in self.expected.items() if kind == MTP]
        return not self.headers.complete or all(name in self.headers.tensors for name in names)


def _model(config: Config) -> str:
    shown = f"{config.num_hidden_layers} layers, {config.n_routed_experts} experts of which"
    shown += f" {config.num_experts_per_tok} are chosen, hidden size {config.hidden_size:,}"
    return f"{'DeepSeek-V4-Flash' if requirements.has_flash_layers(config) else 'DeepSeek-V4'}: {shown}"


def _release(folder: Path) -> str:
    """Where it comes from, by what fetch or the manifest wrote down; "" where neither has."""
    listing, source = incoming.listing(folder), read_json(folder / MANIFEST).get("source")
    told = source if isinstance(source, dict) else {}
    repo, revision = (listing.repo, listing.revision) if listing else (told.get("repo"), told.get("revision"))
    if not repo or not revision:
        return ""
    pinned = pins.read()
    known = (repo, revision) == (pinned["FLASH_REPO"], pinned["FLASH_REVISION"])
    return f"{repo} at {str(revision)[:12]}, {'the pinned release' if known else 'not the pinned release'}"


def _made(folder: Path, config: Config) -> str:
    """How the experts were quantized, by the manifest, and by which recipe."""
    calibration = read_json(folder / MANIFEST).get("calibration")
    try:
        return manifest.method_of(calibration) if isinstance(calibration, dict) else f"recipe {config.recipe}"
    except (KeyError, TypeError):
        return f"recipe {config.recipe}"


def _layer_folder(folder: Path, names: list[str]) -> Inspection:
    headers = _Headers(folder, names).read()
    made = read_json(folder / layer_files.FINGERPRINT)
    return Inspection(
        str(folder),
        LAYERS,
        made=manifest.method_of(made) if isinstance(made.get("settings"), dict) else "",
        layers=len(names),
        finished=tuple(int("".join(filter(str.isdigit, name))) for name in names),
        parts=headers.by_dtype(),
        **headers.facts(),
    )


def fits(config: Config) -> Iterator[Fit]:
    """By kind of GPU, the fewest that hold the artifact's weights, at the share of memory that the profile for use
    gives vLLM, and those that calibrate Flash's samples."""
    size = requirements.sizes_of(config).artifact.total()
    share = settings.serving(settings.PRODUCTION, "cuda", {}).memory_share
    samples, seq_len = PROFILES["flash"].samples, PROFILES["flash"].seq_len
    for name, memory in GPUS.items():
        need = {n: requirements.gpu_bytes(config, math.ceil(samples / n), seq_len) for n in settings.WIDTHS}
        yield Fit(
            name,
            memory,
            next((n for n in settings.WIDTHS if n * memory * share >= size), 0),
            next((n for n in settings.WIDTHS if memory >= need[n]), 0),
        )
