"""Layer files: the unit of work and of resume. What determined their bytes, where they are, which are finished.

A layer file is a final shard of the artifact. It appears whole, after its report `layer-NNN.json`, and carries the
digest of a fingerprint: the source, the corpus, the settings, the code, the library versions and the hardware.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from v4forge import machine
from v4forge.checkout import ROOT
from v4forge.checkpoint import incoming, recipe
from v4forge.checkpoint.incoming import INDEX
from v4forge.checkpoint.layout import COMPRESS_RATIOS, Config
from v4forge.checkpoint.safetensors_header import carries
from v4forge.digests import Digests, changed
from v4forge.errors import UserError
from v4forge.files import make_folder, read_json, remove_leftovers, write_json
from v4forge.quantization import determining

if TYPE_CHECKING:
    import torch

    from v4forge.model.corpus import Corpus

FINGERPRINT = "fingerprint.json"
HIDDEN_STATES = "streams"  # the folder that hidden_states.py keeps
DETERMINING_LOOP = "quantization/calibrate"  # the module whose imports determine the bytes
DETERMINING_PACKAGES = ("torch", "triton", "transformers", "compressed-tensors")
METHODS = {"gptq": "GPTQ", "rtn": "round-to-nearest"}
# What a layer's report says is lost: by GPTQ, by stock round-to-nearest, and by it at the scales that GPTQ begins with.
LOST = ("gptq", "rtn", "rtn_same_scales")
ENGINES = ("v4forge", "llmcompressor")
SCALES = ("searched", "absmax")  # how GPTQ's are chosen, by experts.SCALES


@dataclass(frozen=True)
class Settings:
    """What determines the bytes besides the source and the corpus. Never the number of processes."""

    recipe: str = recipe.INT4  # one of recipe.RECIPES: which tensors get which precision
    method: str = "gptq"  # or "rtn", round-to-nearest, which reads no corpus
    scales: str = "searched"  # of GPTQ; or "absmax", llm-compressor's default rule, which round-to-nearest always has
    engine: str = "v4forge"  # whose GPTQ; or "llmcompressor", a second implementation
    dampening: float = 0.02  # share of the mean of the Hessian's diagonal (benchmarks/codes.py)
    experts: str = "routed"  # whose tokens make an expert's Hessian: those routed to it, or "all"
    micro_batch_tokens: int = 4096  # of a forward pass; Hessians are summed in this order
    threads: int = 2  # of a process on the CPU: Cholesky bits differ between thread counts

    @property
    def packages(self) -> tuple[str, ...]:
        """What determines bytes besides DETERMINING_PACKAGES."""
        return (self.engine,) if self.engine != "v4forge" else ()

    def micro_batch(self, seq_len: int) -> int:
        """Samples of `seq_len` tokens in a forward pass: as many as its tokens allow, and one at least."""
        return max(1, self.micro_batch_tokens // seq_len)


def layer_file(work: Path, layer: int) -> Path:
    return work / f"layer-{layer:03}.safetensors"


def layer_report(work: Path, layer: int) -> Path:
    return work / f"layer-{layer:03}.json"


def source_digests(source: Path, shards: list[str], cache_file: Path) -> dict[str, str]:
    """sha256 of config.json, the index and every shard; cached by (size, mtime_ns, inode) in `cache_file`.

    A shard that fetch has yet to bring has the one that the hub says: fetch lets no other in.
    """
    digests = Digests(cache_file)
    names = ["config.json", INDEX, *shards]
    to_come = incoming.digests_to_come(source, shards)
    by_path = digests.of([source / name for name in names if name not in to_come])
    digests.save()
    return {name: to_come.get(name) or by_path[source / name] for name in names}


def fingerprint(
    source: Mapping[str, str], corpus: Corpus | None, settings: Settings, device: torch.device
) -> dict[str, Any]:
    """All that determines the bytes of the layer files, as JSON data."""
    hardware = machine.cpu_identity()
    if device.type == "cuda":
        import torch  # only who has made a device of it needs it: plan and replay read this module too

        hardware = torch.cuda.get_device_name(device)
    return {
        "source": dict(source),
        "corpus": None if corpus is None else _described(corpus),
        "settings": asdict(settings),
        "code": {m: code_digest(m) for m in determining.modules(DETERMINING_LOOP)},
        "versions": {p: version(p) for p in (*DETERMINING_PACKAGES, *settings.packages)},
        "hardware": hardware,
    }


def code_digest(module: str) -> str:
    """sha256 of a module's file; the name is its path below v4forge/, without .py."""
    return hashlib.sha256((ROOT / "v4forge" / f"{module}.py").read_bytes()).hexdigest()


def _described(corpus: Corpus) -> dict[str, Any]:
    """By content alone: what the corpus is called changes no byte."""
    samples, seq_len = corpus.tokens.shape
    return {
        "sha256": corpus.sha256,
        "origin": dict(corpus.origin),
        "documents": list(corpus.documents),
        "samples": samples,
        "seq_len": seq_len,
        "seed": corpus.seed,
    }


def claim(work: Path, mark: Mapping[str, Any], on_mismatch: str, say: Callable[[str], None]) -> None:
    """Makes `work` the folder of this fingerprint. One that another has claimed is refused or moved aside."""
    found = read_json(work / FINGERPRINT)
    if found and found != mark:
        differing = ", ".join(changed(found, mark)[:4])
        if on_mismatch == "refuse":
            raise UserError(
                f"{work} holds layers of another run: {differing} differ",
                f"choose another --work, or move it aside: mv {work} {work}.old",
            )
        number = next(n for n in range(1, 1 << 20) if not work.with_name(f"{work.name}.old-{n}").exists())
        aside = work.with_name(f"{work.name}.old-{number}")
        work.rename(aside)
        say(f"moved the layers of another run ({differing} differ) to {aside}")
    make_folder(work)
    remove_leftovers(work)
    write_json(work / FINGERPRINT, mark)


def finished(work: Path, layer: int, mark: str) -> bool:
    """Whether the layer's file and report are there, whole and of this fingerprint."""
    return carries(layer_file(work, layer), mark) and layer_report(work, layer).is_file()


def report(
    config: Config,
    layer: int,
    settings: Settings,
    mark: str,
    tokens: list[int],
    notes: Mapping[int, Mapping[str, Any]],
    used: list[dict[str, Any]],
) -> dict[str, Any]:
    """What layer-NNN.json holds. tokens: by expert; notes: by expert, its losses, and whether its Hessian was blended
    or not factorized; used: by rank, seconds by stage and peak memory in bytes, which differ from run to run. A layer
    whose experts stay as they are loses nothing, and `error` is empty.
    """
    experts = sorted(notes)
    error = {}
    if settings.method == "gptq" and layer >= config.fp4_layers:
        error = {w: {m: [notes[e][w][m] for e in experts] for m in LOST} for w in ("w1", "w2", "w3")}
    return {
        "layer": layer,
        "attention": COMPRESS_RATIOS[config.compress_ratios[layer]],
        "method": settings.method,
        "stored": config.rule_for(f"layers.{layer}.ffn.experts.0.w1.weight").artifact,
        "fingerprint": mark,
        "tokens": tokens,
        "error": error,
        "codes": {w: [notes[e]["codes"][w] for e in experts] for w in ("w1", "w2", "w3")},
        "blended": [notes[e]["blended"] for e in experts if "blended" in notes[e]],
        "fallback": [matrix for e in experts for matrix in notes[e].get("fallback", [])],
        "run": used,
    }
