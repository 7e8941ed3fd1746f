"""What the pipeline does to the embedded model's perplexity and draft acceptance, calibrated as `make demo` does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dev.tiny import text
from v4forge.checkpoint.reader import Checkpoint
from v4forge.model import corpus
from v4forge.model.evaluation import Quality, evaluate, perplexity_change, unigram_perplexity
from v4forge.quantization import calibrate, layer_files
from v4forge.quantization.postprocess import assemble

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny"
SEQUENCES, SEQ_LEN = 16, 256
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def heldout() -> torch.Tensor:
    tokens = torch.from_numpy(text.heldout_tokens(TINY, TINY / "heldout.txt").astype("int64"))
    return tokens[: SEQUENCES * SEQ_LEN].view(SEQUENCES, SEQ_LEN)


@pytest.fixture(scope="module")
def qualities(tmp_path_factory: pytest.TempPathFactory, rounded: Path, heldout: torch.Tensor) -> dict[str, Quality]:
    folder = tmp_path_factory.mktemp("quality")
    source, work = Checkpoint(TINY), folder / "layers"
    digests = layer_files.source_digests(TINY, source.shard_names, folder / "digests.json")
    samples = corpus.load(TINY, TINY / "calibration.jsonl", 64, 256, 42, source.config.vocab_size)
    settings = layer_files.Settings(method="gptq")
    mark = layer_files.fingerprint(digests, samples, settings, CPU)
    layer_files.claim(work, mark, "refuse", print)
    calibrate.calibrate(source, samples, work, settings, mark, CPU)
    assemble(source, work, folder / "artifact")
    artifacts = {"gptq": folder / "artifact", "rtn": rounded / "artifact"}
    models = {"source": source} | {name: Checkpoint(path, form="artifact") for name, path in artifacts.items()}
    return {name: evaluate(model, heldout, CPU) for name, model in models.items()}


def test_the_embedded_model_beats_a_unigram_model_three_times_over(
    qualities: dict[str, Quality], heldout: torch.Tensor
) -> None:
    assert qualities["source"].perplexity < unigram_perplexity(heldout) / 3


def test_half_of_the_embedded_model_s_drafts_are_accepted(qualities: dict[str, Quality]) -> None:
    assert qualities["source"].mtp_acceptance > 0.5


def test_perplexity_rises_by_less_than_half_of_what_stock_rounding_costs(qualities: dict[str, Quality]) -> None:
    ours, stock = (perplexity_change(qualities[name], qualities["source"]).value for name in ("gptq", "rtn"))
    assert ours < 0.5 < stock


def test_acceptance_falls_by_less_than_two_points(qualities: dict[str, Quality]) -> None:
    assert qualities["gptq"].mtp_acceptance > qualities["source"].mtp_acceptance - 0.02


def test_gptq_is_clearly_better_than_round_to_nearest(qualities: dict[str, Quality]) -> None:
    assert perplexity_change(qualities["gptq"], qualities["rtn"]).high < 0
