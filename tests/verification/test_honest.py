"""What is good passes verify, however hard its matrices were; what may be either gives way to the whole model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from damage import Artifact
from programs import ROOT, calibrate_arguments, run_here, write_corpus, write_source
from synthetic import heavy_tailed
from torch import Tensor

from v4forge.artifact_folder import certificate_state
from v4forge.checkpoint import codec
from v4forge.checkpoint.reader import Checkpoint
from v4forge.digests import Digests
from v4forge.model.evaluation import Quality
from v4forge.outcomes import FAILED, WARNING, Outcome
from v4forge.quantization import gptq
from v4forge.verification import certificate, reference, scan, tolerances

DRAWS = [pytest.param(1, id="1"), pytest.param(50, id="50", marks=pytest.mark.soak)]


@pytest.mark.parametrize("draws", DRAWS)
def test_heavy_tailed_and_starved_experts_of_another_form_pass(tmp_path: Path, draws: int) -> None:
    corpus = write_corpus(tmp_path / "corpus.txt")
    for seed in range(draws):
        folder = tmp_path / str(seed)
        source = write_source(folder / "source", "other", seed=seed, draw=heavy_tailed)
        arguments = calibrate_arguments(source, folder / "layers", corpus, samples=3)
        assert run_here("calibrate", *arguments) == 0
        reports = [json.loads(path.read_text()) for path in (folder / "layers").glob("layer-*.json")]
        assert min(min(report["tokens"]) for report in reports) < 4
        out = folder / "artifact"
        assert run_here("postprocess", "--source", source, "--work", folder / "layers", "--out", out) == 0
        assert Artifact(out, source).failed() == {}, f"seed {seed}"
        shutil.rmtree(folder)


ROWS, WIDTH = 1024, 512


@pytest.fixture(scope="module")
def wide() -> tuple[dict[str, Tensor], gptq.Quantized]:
    """An FP4 source [ROWS, WIDTH], as stored, its rows' first groups at 1/32, and its GPTQ on correlated inputs."""
    torch.manual_seed(0)
    weights = torch.randn(ROWS, WIDTH)
    weights[:, :128] /= 32
    source = codec.encode_fp4(weights)
    x = torch.randn(4 * WIDTH, 16) @ torch.randn(16, WIDTH) + 0.3 * torch.randn(4 * WIDTH, WIDTH)
    hessian = (x.mT @ x / len(x)).unsqueeze(0)
    values = codec.decode_fp4(source["weight"], source["scale"]).unsqueeze(0)
    scale = gptq.searched_scales(values, hessian.diagonal(dim1=1, dim2=2))
    return source, gptq.gptq(values, hessian, scale, 0.03)


def beside(source: dict[str, Tensor], codes: Tensor, scale: Tensor) -> reference.Matrix:
    return reference.compared(codec.encode_int4(codes, scale), source)


def passes(found: reference.Matrix) -> bool:
    low, high = tolerances.SLOPES
    return all(low <= least and most <= high for least, most in (found.rows, found.columns))


def test_a_group_at_a_32nd_of_its_row_fails_no_bound(wide: tuple[dict[str, Tensor], gptq.Quantized]) -> None:
    source, found = wide
    w = codec.decode_fp4(source["weight"], source["scale"]).float().unflatten(-1, (-1, 128))
    q = found.dequantized()[0].float().unflatten(-1, (-1, 128))
    slopes = (q * w).sum(-1) / w.square().sum(-1)
    assert slopes[:, 0].min() < 0.7, "as hard as meant"
    matrix = beside(source, found.codes[0], found.scale[0])
    assert passes(matrix)
    assert matrix.error < tolerances.INT4_RELATIVE_ERROR
    assert matrix.moved / matrix.codes > tolerances.MOVED_CODES


def test_slopes_are_means_over_groups_weighted_by_their_norms(wide: tuple[dict[str, Tensor], gptq.Quantized]) -> None:
    source, found = wide
    w = codec.decode_fp4(source["weight"], source["scale"]).double().unflatten(-1, (-1, 128))
    q = (found.codes[0].double().unflatten(-1, (-1, 128))) * found.scale[0].double().unsqueeze(-1)
    slopes, norms = (q * w).sum(-1) / w.square().sum(-1), w.square().sum(-1).sqrt()
    matrix = beside(source, found.codes[0], found.scale[0])
    rows = (slopes * norms).sum(1).div(norms.sum(1)).sort().values
    columns = ((slopes * norms).sum(0) / norms.sum(0))[1:]  # the first is faint
    left_out = int(ROWS * tolerances.TOLERATED_ROWS)
    assert matrix.rows == pytest.approx((float(rows[left_out]), float(rows[-1 - left_out])))
    assert matrix.columns == pytest.approx((float(columns.min()), float(columns.max())))


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_wrong_scales_of_a_column_of_groups_or_of_more_rows_than_are_tolerated_leave_the_bounds(
    wide: tuple[dict[str, Tensor], gptq.Quantized], factor: float
) -> None:
    source, found = wide
    tolerated = int(ROWS * tolerances.TOLERATED_ROWS)
    assert tolerated == 5
    for rows, expected in ((tolerated, True), (tolerated + 1, False)):
        scale = found.scale[0].clone()
        scale[:rows] *= factor
        assert passes(beside(source, found.codes[0], scale)) is expected
    scale = found.scale[0].clone()
    scale[:, 2] *= factor
    assert not passes(beside(source, found.codes[0], scale))


def test_a_negative_scale_with_its_codes_negated_is_the_same_matrix(
    wide: tuple[dict[str, Tensor], gptq.Quantized],
) -> None:
    source, found = wide
    codes = found.codes[0].clamp(-7, 7)
    one, other = (beside(source, sign * codes, sign * found.scale[0]) for sign in (1, -1))
    assert (one.error, one.rows, one.columns) == (other.error, other.rows, other.columns)
    assert one.scales_ok and other.scales_ok
    zeroed = found.scale[0].clone()
    zeroed[3, 1] = 0
    assert not beside(source, codes, zeroed).scales_ok


def test_a_row_without_weights_has_no_slope() -> None:
    source = codec.encode_fp4(torch.zeros(4, 256))
    codes, scale = torch.zeros(4, 256, dtype=torch.int8), torch.full((4, 2), 0.5, dtype=torch.bfloat16)
    found = reference.compared(codec.encode_int4(codes, scale), source)
    assert (found.rows, found.columns, found.error) == ((1.0, 1.0), (1.0, 1.0), 0.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A good artifact that was rounded to nearest, of a source without a held-out text; not to be changed."""
    base = tmp_path_factory.mktemp("honest")
    source = write_source(base / "source")
    arguments = calibrate_arguments(source, base / "layers", write_corpus(base / "corpus.txt"))
    assert run_here("calibrate", *arguments, "--method", "rtn") == 0
    assert run_here("postprocess", "--source", source, "--work", base / "layers", "--out", base / "artifact") == 0
    return Artifact(base / "artifact", source)


def test_what_is_seen_does_not_depend_on_how_many_matrices_a_thread_has(
    made: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    for together in (1, 5):
        monkeypatch.setattr(scan, "TOGETHER", {"cpu": together})
        seen.append(scan.scan(Checkpoint(made.folder, form="artifact"), Checkpoint(made.source), None))
    assert [str(each) for each in seen[0]] == [str(each) for each in seen[1]]
    assert sum(each.expert is not None for each in seen[0]) > 5


def predicting(sequences: int, kl: float = 0.01) -> Quality:
    """Of 512 tokens each, the same in every sequence."""
    rows = torch.zeros(sequences, 511, dtype=torch.float64)
    drafts = torch.full((3, sequences), 400)
    return Quality(rows + 2, rows + kl, rows + 1, drafts + 100, drafts)


def outcomes(
    artifact: Artifact, sequences: int = 0, kl: float = 0.01, expect: str = "", hashing: bool = True
) -> dict[str, Outcome]:
    """What verify finds, with `sequences` of a whole-model comparison."""
    compared = [predicting(sequences, 0.0), predicting(sequences, kl)]
    digests = Digests(artifact.folder.parent / "digests.json")
    found, not_run, _ = certificate.verify(
        artifact.folder,
        Checkpoint(artifact.source),
        digests,
        expect=expect,
        hashing=hashing,
        compare=(lambda *_: compared) if sequences else None,
    )
    certificate.write(
        artifact.folder / "certificate.json", certificate.content(artifact.folder, found, not_run, digests)
    )
    return {each.name: each for each in found}


@pytest.fixture
def unlikely(made: Artifact, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    """Good, and beyond the bound of a statistic."""
    monkeypatch.setattr("v4forge.verification.checks.INT4_RELATIVE_ERROR", 0.01)
    return made


def test_a_failed_statistic_says_how_to_look_closer_in_one_command(unlikely: Artifact) -> None:
    found = outcomes(unlikely)["expert errors"]
    assert found.status == FAILED
    command = f"python -m scripts.verify --artifact {unlikely.folder} --source {unlikely.source}"
    assert found.detail.endswith(f"look closer: {command} --heldout models/tiny/heldout.txt --deep 8192")
    assert (ROOT / "models/tiny/heldout.txt").is_file()


def test_a_failed_statistic_is_a_warning_once_the_whole_model_was_looked_at(unlikely: Artifact) -> None:
    found = outcomes(unlikely, 16)
    assert {name for name, each in found.items() if each.status != "ok"} == {"expert errors"}
    assert found["expert errors"].status == WARNING
    assert certificate_state(unlikely.folder).verdict == "ok"
    written = json.loads((unlikely.folder / "certificate.json").read_text())
    (told,) = (check for check in written["checks"] if check["name"] == "expert errors")
    assert told["ok"] is True
    assert told["detail"].startswith("warning: layers.0.ffn.experts.0.w1.weight: relative error")
    assert "over 8,176 tokens the model predicts as its source does" in told["detail"]


@pytest.mark.parametrize(
    "less",
    [
        pytest.param({"sequences": 8}, id="few tokens"),
        pytest.param({"sequences": 16, "kl": 0.1}, id="another model"),
        pytest.param({"sequences": 16, "hashing": False}, id="codes that may not be those recorded"),
        pytest.param({"sequences": 16, "expect": "gptq"}, id="another method than the manifest states"),
    ],
)
def test_less_than_everything_else_does_not_outvote_a_statistic(unlikely: Artifact, less: dict[str, object]) -> None:
    found = outcomes(unlikely, **less)  # type: ignore[arg-type]
    assert found["expert errors"].status == FAILED
    assert certificate_state(unlikely.folder).verdict == "failed"


def test_a_prediction_that_fails_asks_for_more_tokens(made: Artifact) -> None:
    found = outcomes(made, 16, kl=0.1)["quality"]
    assert found.status == FAILED
    assert found.detail.endswith(f"--deep {4 * 16 * 511}")


def test_the_method_that_the_manifest_states_is_the_expected_one(made: Artifact) -> None:
    assert outcomes(made, expect="rtn")["provenance"].ok
    assert "method 'rtn', 'gptq' expected" in outcomes(made, expect="gptq")["provenance"].fact


def test_matrices_compared_together_are_what_each_is_alone(wide: tuple[dict[str, Tensor], gptq.Quantized]) -> None:
    source, found = wide
    parts = [codec.encode_int4(found.codes[0].roll(shift, 0), found.scale[0]) for shift in (0, 1)]
    parts.append(codec.encode_int4(found.codes[0].clamp(-1, 1), -found.scale[0]))
    together = reference.all_compared(parts, [source] * 3)
    assert [str(each) for each in together] == [str(reference.compared(each, source)) for each in parts]
    assert [each.distinct for each in reference.all_compared(parts, [{}] * 3)] == [16, 16, 3]
    assert together[0].error < together[1].error
