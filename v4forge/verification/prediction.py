"""What --deep runs the models over, which models, and the figures that the certificate keeps of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from v4forge.artifact_folder import MANIFEST
from v4forge.checkpoint.reader import Checkpoint
from v4forge.errors import UserError
from v4forge.files import read_json, understood
from v4forge.model import evaluation, heldout
from v4forge.model.evaluation import Quality
from v4forge.quantization.manifest import method_of


@dataclass(frozen=True)
class Text:
    """Token sequences of a file, [n] int64 each; `prompts`: how many tokens of each were a server's prompt."""

    file: Path
    sequences: Sequence[Tensor]
    prompts: Sequence[int] = ()


def held_out(source: Checkpoint, file: Path | None, tokens: int, seq_len: int) -> Text:
    """About `tokens` tokens of a text, by default of the source's heldout.txt, in sequences of `seq_len`.

    Raises UserError where it has fewer, or one that the model does not know.
    """
    chosen = file or source.directory / "heldout.txt"
    found = heldout.tokens(source.directory, chosen, tokens // seq_len, seq_len, source.config.vocab_size)
    return Text(chosen, list(found))


def given(source: Checkpoint, file: Path) -> Text:
    """The sequences of a .jsonl file in one of heldout.FORMS. Raises UserError for one of another form."""
    return Text(file, heldout.read_tokens(file, source.config.vocab_size), heldout.prompt_lengths(file))


def beside(folders: Sequence[Path], source: Checkpoint) -> dict[str, Checkpoint]:
    """Other artifacts by how they were quantized, as their manifests say; two of a kind by their folders too.

    Raises UserError for a folder that is no artifact of this source.
    """
    found: dict[str, Checkpoint] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} does not exist", "pass the folder of an artifact: --beside DIR")
        name = made_how(folder) or folder.name
        found[f"{name}, {folder}" if name in found else name] = Checkpoint(folder, form="artifact")
        _refuse_other_source(folder, source)
    return found


def _refuse_other_source(folder: Path, source: Checkpoint) -> None:
    """By the size of each shard that the manifest names: its hash would take as long as all else."""
    files = read_json(folder / MANIFEST).get("source", {}).get("files") or {}
    for name in source.shard_names:
        stated = files.get(name, {}).get("bytes")
        if files and stated != (source.directory / name).stat().st_size:
            fact = f"{folder} was made from another source than {source.directory}: its {name} is another"
            raise UserError(fact, "pass an artifact of the same source: --beside DIR")


def made_how(folder: Path) -> str:
    """How an artifact's experts were quantized, as its manifest says; '' where it says nothing."""
    made = read_json(folder / MANIFEST).get("calibration")
    return understood(folder / MANIFEST, "make postprocess", lambda: method_of(made)) if made else ""


def compare(
    models: Mapping[str, Checkpoint], text: Text, device: torch.device, progress: Callable[[int, int, str], None]
) -> list[Quality]:
    """Each of the models, of which the first is the source, over the text. progress: steps done, of how many, what."""
    checkpoints = list(models.values())
    count = evaluation.step_count(checkpoints)
    return evaluation.compare(
        checkpoints, text.sequences, device, lambda done, what: progress(done, count, what), given=text.prompts
    )


def figures(models: Mapping[str, Checkpoint], qualities: Sequence[Quality], text: Text) -> dict[str, Any]:
    """evaluation.figures, what they are of, and of each model the bytes of its shards and how it was quantized."""
    found = evaluation.figures(qualities, list(models))
    for name, model in models.items():
        size = sum((model.directory / shard).stat().st_size for shard in model.shard_names)
        found["models"][name] |= {"bytes": size, "made": made_how(model.directory) or name}
    return {
        "text": {"file": text.file.name, "sha256": hashlib.sha256(text.file.read_bytes()).hexdigest()},
        "unigram_perplexity": evaluation.unigram_perplexity(torch.cat(list(text.sequences))),
        **found,
    }
