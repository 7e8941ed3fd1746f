"""What other programs import: `from v4forge import Checkpoint, quantize_layer, verify`. docs/api.md shows each.

Checkpoint opens a folder and decodes its tensors; quantize_layer takes one turn of calibrate's loop; verify runs the
checks of a certificate. Each is as the programs use it, and raises UserError, a fact and a hint, for what its caller
can act on. Other modules change without notice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from v4forge import artifact_folder
from v4forge.checkpoint import layout
from v4forge.checkpoint.prefetch import Reader
from v4forge.checkpoint.reader import Checkpoint
from v4forge.digests import Digests, cache_of, digest_of
from v4forge.errors import UserError
from v4forge.files import make_folder, read_json
from v4forge.model import deepseek_v4
from v4forge.model.distributed import Ranks
from v4forge.outcomes import Outcome
from v4forge.profiling import Watch
from v4forge.quantization import calibrate, layer_files
from v4forge.quantization.layer import Layer, Run, groups_of
from v4forge.quantization.layer_files import Settings
from v4forge.verification import certificate

__all__ = ["Checkpoint", "QuantizedLayer", "Settings", "UserError", "Verification", "quantize_layer", "verify"]


@dataclass(frozen=True)
class QuantizedLayer:
    """A finished layer: its file, a shard of the artifact; its report, what each expert lost by matrix and method; and
    the residual streams that leave it, [samples, tokens, hc_mult, hidden] bf16, None where no tokens went through."""

    file: Path
    report: Mapping[str, Any]
    streams: Tensor | None


@torch.no_grad()
def quantize_layer(
    source: Checkpoint,
    layer: int,
    out: Path | str,
    tokens: Tensor | None = None,
    streams: Tensor | None = None,
    settings: Settings | None = None,
    device: torch.device | str = "cpu",
) -> QuantizedLayer:
    """Quantizes the routed experts of decoder layer `layer` by GPTQ, and writes the layer into the folder `out`.

    tokens: [samples, tokens] int64. streams: [samples, tokens, hc_mult, hidden], as the layer before returned them; of
    layer 0 the tokens' embeddings. Without tokens by round-to-nearest. The tensors are those of calibrate with the same
    samples, settings and torch.get_num_threads(); calibrate makes such a file anew, since it does not say what its
    samples were. Raises UserError for a broken source, ValueError for tokens or streams that do not belong together.
    """
    settings = settings or Settings(method="gptq" if tokens is not None else "rtn")
    if layer not in source.config.layers:
        raise ValueError(f"there is no layer {layer}, there are {source.config.num_hidden_layers}")
    if (tokens is None) != (settings.method == "rtn"):
        raise ValueError("GPTQ takes tokens, and round-to-nearest none")
    if (streams is not None) != (tokens is not None and layer > 0):
        raise ValueError(f"layer {layer} takes {'the streams of the layer before' if layer else 'no streams'}")
    source, where, folder = source.made_by(settings.recipe), torch.device(device), Path(out)
    source.validate(layout.upstream(source.config))
    make_folder(folder)
    hf_config, weights = deepseek_v4.hf_config(source.config), deepseek_v4.Weights(source, where)
    size = settings.micro_batch(tokens.shape[1]) if tokens is not None else 1
    batches = [batch.to(where) for batch in tokens.split(size)] if tokens is not None else []
    if streams is None:
        root = deepseek_v4.load_root(weights, hf_config)
        entering = [deepseek_v4.embed(root, hf_config, batch) for batch in batches]
    else:
        entering = [each.to(where) for each in streams.split(size)]
    digest = digest_of({"api": vars(settings), "source": str(source.directory)})
    run = Run(source, folder, settings, digest, where, Ranks(), Watch(where), _silent, _silent, _silent)
    rotary = deepseek_v4.Rotary(hf_config, where, weights.dtype)
    groups = [(layer, names) for names in groups_of(run, layer, todo=True)]
    with (
        Reader(source, groups, calibrate.READ_AHEAD_BYTES, where, run.watch) as reader,
        ThreadPoolExecutor(calibrate.WRITE_THREADS, "writer") as writer,
    ):
        turn = Layer(run, layer, writer, todo=True)
        turn.reserve()
        attended = turn.attend(reader, hf_config, entering, batches, rotary)
        leaving = turn.mix(attended, reader, float(hf_config.swiglu_limit), last=False)
        turn.publish()
    report = read_json(layer_files.layer_report(folder, layer))
    return QuantizedLayer(layer_files.layer_file(folder, layer), report, torch.cat(leaving) if leaving else None)


def _silent(*_: object) -> None:
    return None


@dataclass(frozen=True)
class Verification:
    """What verify found: the outcome of each check, and why those that are not among them were not run."""

    outcomes: Sequence[Outcome]
    not_run: Mapping[str, str]
    certificate: Mapping[str, Any]

    @property
    def ok(self) -> bool:
        return artifact_folder.verdict(self.certificate).ok

    @property
    def failed(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if not outcome.ok]


def verify(
    artifact: Path | str,
    source: Checkpoint | Path | str | None = None,
    *,
    expect: str = "",
    recipe: str = "",
    hashing: bool = True,
    progress: Callable[[int, int], None] = _silent,
) -> Verification:
    """Checks every tensor of an artifact against what its config asks for and, with `source`, against upstream's bytes.

    expect: "gptq" or "rtn", how the experts must have been quantized; recipe: by which it must be made; hashing:
    SHA-256 of every file too; progress gets bytes that were read, and of how many. Writes nothing: the program writes
    certificate.json, of which `certificate` is the content. Raises UserError where there is no such folder.
    """
    folder = Path(artifact)
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist", "pass the folder of an artifact")
    against = source if isinstance(source, Checkpoint) or source is None else Checkpoint(Path(source))
    digests = Digests(cache_of(folder.parent))
    outcomes, not_run, _ = certificate.verify(folder, against, digests, progress, expect, hashing, recipe=recipe)
    return Verification(outcomes, not_run, certificate.content(folder, outcomes, not_run, digests))
