"""verify on a GPU finds what it finds on the CPU."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from programs import calibrate_arguments, run_here, write_corpus, write_source

from v4forge.checkpoint import codec
from v4forge.checkpoint.reader import Checkpoint
from v4forge.digests import Digests
from v4forge.verification import reference, scan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]
EXACT = {"error": 0.0, "rows": (0.0, 0.0), "columns": (0.0, 0.0)}


def near(found: reference.Matrix, wanted: reference.Matrix) -> bool:
    """Equal but for the last digits of sums."""
    pairs = [(found.error, wanted.error), *zip(found.rows + found.columns, wanted.rows + wanted.columns, strict=True)]
    same = replace(found, **EXACT) == replace(wanted, **EXACT)  # type: ignore[arg-type]
    return same and all(math.isclose(a, b, rel_tol=1e-9) for a, b in pairs)


@pytest.mark.parametrize("shape", [(2048, 4096), (4096, 2048), (600, 256)])
def test_matrices_are_as_far_from_their_sources_as_on_the_cpu(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    sources = [codec.encode_fp4(torch.randn(shape)) for _ in range(3)]
    scales = [(0.3 + torch.rand(shape[0], shape[1] // 128)).bfloat16() for _ in range(3)]
    parts = [codec.encode_int4(torch.randint(-8, 8, shape, dtype=torch.int8), scale) for scale in scales]
    found = reference.all_compared(parts, sources, torch.device("cuda"))
    for matrix, *each in zip(found, parts, sources, strict=True):
        assert near(matrix, reference.compared(*each))
    alone = reference.all_compared(parts, [{}] * 3, torch.device("cuda"))
    assert alone == [reference.compared(each, {}) for each in parts]


def test_a_whole_artifact_is_seen_as_on_the_cpu(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    arguments = calibrate_arguments(source, tmp_path / "layers", write_corpus(tmp_path / "corpus.txt"))
    assert run_here("calibrate", *arguments, "--method", "rtn") == 0
    artifact = tmp_path / "artifact"
    assert run_here("postprocess", "--source", source, "--work", tmp_path / "layers", "--out", artifact) == 0
    both = []
    for device in ("cuda", "cpu"):
        known = Digests(tmp_path / f"{device}.json")
        checkpoints = Checkpoint(artifact, form="artifact"), Checkpoint(source)
        both.append(scan.scan(*checkpoints, known, device=torch.device(device)))
    for found, wanted in zip(*both, strict=True):
        assert replace(found, expert=None) == replace(wanted, expert=None)
        assert found.expert is None or (wanted.expert is not None and near(found.expert, wanted.expert))
