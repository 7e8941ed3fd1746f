"""Hidden states on disk, so that a run that starts again does not compute its finished layers a second time.

`<work>/streams/layer-NNN/` holds what enters layer NNN, one file a micro-batch, whichever rank wrote it.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from v4forge.checkpoint.safetensors_header import carries
from v4forge.checkpoint.writer import write_shard
from v4forge.errors import UserError
from v4forge.quantization.layer_files import HIDDEN_STATES


def _file(work: Path, layer: int, number: int) -> Path:
    return work / HIDDEN_STATES / f"layer-{layer:03}" / f"{number:05}.safetensors"


def save(work: Path, layer: int, number: int, streams: Tensor, digest: str) -> None:
    """Writes micro-batch `number`'s streams before `layer`, [batch, seq, hc_mult, hidden]."""
    write_shard(_file(work, layer, number), {"streams": streams}, {"fingerprint": digest})


def load(work: Path, layer: int, number: int, device: torch.device) -> Tensor:
    """What `save` wrote."""
    path = _file(work, layer, number)
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("streams").to(device)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}", f"rm -r {path.parent} and run it again") from None


def latest(work: Path, upto: int, batches: int, digest: str) -> int:
    """The last layer, at most `upto`, before which all micro-batches are there and this run's; 0 if none."""
    for layer in range(upto, 0, -1):
        if all(carries(_file(work, layer, number), digest) for number in range(batches)):
            return layer
    return 0


def keep(work: Path, layers: Sequence[int]) -> None:
    """Removes the hidden states that are not before one of these layers."""
    wanted = {_file(work, layer, 0).parent for layer in layers}
    for folder in (work / HIDDEN_STATES).glob("layer-[0-9][0-9][0-9]"):
        if folder not in wanted:
            shutil.rmtree(folder)
    with suppress(OSError):  # it is not there, or not empty
        (work / HIDDEN_STATES).rmdir()
