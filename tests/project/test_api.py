"""What other programs import: the examples of docs/api.md, and that a layer is calibrate's."""

from __future__ import annotations

import doctest
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from programs import run_here, write_source
from safetensors.torch import load_file
from synthetic import TINY

import v4forge
from v4forge import Checkpoint, Settings, quantize_layer
from v4forge.checkout import ROOT
from v4forge.model.corpus import Corpus
from v4forge.quantization import calibrate

FOUR_LAYERS = [0, 4, 128, 0, 0]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source as small as the layout allows, of as many layers as models/tiny."""
    folder = tmp_path_factory.mktemp("small")
    write_source(folder / "source", compress_ratios=FOUR_LAYERS)
    work = folder / "layers"
    assert run_here("calibrate", "--source", folder / "source", "--work", work, "--method", "rtn") == 0
    assert run_here("postprocess", "--source", folder / "source", "--work", work, "--out", folder / "artifact") == 0
    return folder


@pytest.mark.parametrize("of", ["small", pytest.param("tiny", marks=pytest.mark.soak)])
def test_the_examples_of_the_page_are_true(
    of: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    made = request.getfixturevalue("rounded") if of == "tiny" else small
    (tmp_path / "models").mkdir()
    (tmp_path / "scratch/tiny").mkdir(parents=True)
    (tmp_path / "models/tiny").symlink_to(TINY if of == "tiny" else small / "source")
    (tmp_path / "scratch/tiny/artifact").symlink_to(made / "artifact")
    monkeypatch.chdir(tmp_path)
    failed, tried = doctest.testfile(str(ROOT / "docs/api.md"), module_relative=False, encoding="utf-8")
    assert not failed and tried > 15


def test_importing_the_package_loads_nothing() -> None:
    program = "import sys, v4forge; sys.exit(bool({'torch', 'numpy', 'safetensors', 'v4forge.api'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-S", "-c", program], cwd=ROOT).returncode == 0
    assert all(getattr(v4forge, name) is not None for name in v4forge.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        v4forge.nothing  # noqa: B018


def test_layers_one_after_the_other_are_calibrates(small: Path, tmp_path: Path) -> None:
    source, settings = Checkpoint(small / "source"), Settings(micro_batch_tokens=64)
    tokens = torch.randint(source.config.vocab_size, (3, 32), generator=torch.Generator().manual_seed(1))
    corpus = Corpus(tokens, "", 0, "")
    (tmp_path / "whole").mkdir()
    calibrate.calibrate(source, corpus, tmp_path / "whole", settings, {}, torch.device("cpu"))
    streams = None
    for layer in (0, 1):
        found = quantize_layer(source, layer, tmp_path / "each", tokens, streams, settings)
        streams = found.streams
        theirs, ours = load_file(tmp_path / "whole" / found.file.name), load_file(found.file)
        assert theirs.keys() == ours.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_what_does_not_belong_together_is_refused(small: Path, tmp_path: Path) -> None:
    source, tokens = Checkpoint(small / "source"), torch.zeros(1, 8, dtype=torch.int64)
    for layer, given, options in (
        (4, tokens, {}),
        (1, tokens, {}),
        (0, tokens, {"streams": torch.zeros(1, 8, 4, 128)}),
        (0, None, {"settings": Settings()}),
    ):
        with pytest.raises(ValueError):
            quantize_layer(source, layer, tmp_path, given, **options)
    assert list(tmp_path.iterdir()) == []
