"""What inspect says of folders: from headers where they are here, from the layout where they are not."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import certified_artifact
import pytest
from programs import run_here
from safetensors.torch import load_file, save_file
from synthetic import TINY

from v4forge.checkpoint import recipe
from v4forge.checkpoint.incoming import INDEX
from v4forge.errors import UserError
from v4forge.pipeline import inspection, requirements
from v4forge.pipeline.inspection import ARTIFACT, DECODED, LAYERS, MTP, OTHER, UPSTREAM, inspect

SECOND = "model-00002-of-00002.safetensors"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder with files of models/tiny's own."""
    return Path(shutil.copytree(TINY, tmp_path / "tiny"))


def config(folder: Path, **changes: Any) -> Path:
    """Flash's config.json alone."""
    folder.mkdir()
    raw = json.loads(requirements.FLASH_CONFIG.read_text()) | changes
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def test_an_upstream_checkpoint_is_told_by_its_headers() -> None:
    found = inspect(TINY)
    assert (found.form, found.layers, found.mtp, found.measured, found.differing) == (UPSTREAM, 4, True, True, 0)
    assert found.bytes == json.loads((TINY / INDEX).read_text())["metadata"]["total_size"]
    assert found.artifact_bytes == requirements.sizes_of(inspection.layout.load_config(TINY)).artifact.total()


def test_an_artifact_says_how_it_was_made_and_what_its_certificate_is(rounded: Path, tmp_path: Path) -> None:
    found = inspect(rounded / "artifact")
    assert (found.form, found.made, found.certificate, found.differing) == (
        ARTIFACT,
        "round-to-nearest",
        "missing",
        0,
    )
    assert {part.format for part in found.parts if part.kind == "routed experts"} == {"int4"}
    assert {part.format for part in found.parts if part.kind == MTP} == {"bf16", "f32"}
    assert found.bytes == found.artifact_bytes
    copy = Path(shutil.copytree(rounded / "artifact", tmp_path / "artifact"))
    certified_artifact.seal(copy)
    assert inspect(copy).certificate == "ok"


def test_what_dequant_writes_is_told_as_that(tmp_path: Path) -> None:
    assert run_here("dequant", "--source", TINY, "--out", tmp_path / "bf16") == 0
    found = inspect(tmp_path / "bf16")
    assert (found.form, found.differing, found.mtp) == (DECODED, 0, True)
    assert {part.format for part in found.parts} == {"bf16", "f32", "int"}


def test_layers_are_listed(rounded: Path) -> None:
    found = inspect(rounded / "layers")
    assert (found.form, found.finished, found.made) == (LAYERS, (0, 1, 2, 3), "round-to-nearest")


def test_config_alone_tells_what_there_should_be(tmp_path: Path) -> None:
    """The counts and the bytes of the published release."""
    found = inspect(config(tmp_path / "upstream"))
    assert not found.measured and sum(part.tensors for part in found.parts) == 69_187
    assert [(fit.gpu, fit.serve) for fit in found.fits] == [("H100", 4), ("H200", 2)]
    ours = inspect(config(tmp_path / "ours", quantization_config=recipe.quantization_config(43)))
    assert (ours.form, sum(part.tensors for part in ours.parts)) == (ARTIFACT, 101_285)


def test_shards_that_are_not_here_are_named_and_their_bytes_are_the_layouts(tiny: Path) -> None:
    (tiny / SECOND).unlink()
    found = inspect(tiny)
    assert (found.missing, found.measured, found.differing) == ((SECOND,), False, 0)
    assert found.bytes == inspect(TINY).bytes


def test_what_config_does_not_ask_for_is_a_fault(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = next(path for path in sorted(tiny.glob("*.safetensors")) if "head.weight" in _names(path))
    tensors = load_file(shard)
    for name in ("head.weight", "hc_head_scale"):
        tensors.pop(name, None)
    save_file(tensors | {"stray": tensors["norm.weight"].clone()}, shard)
    found = inspect(tiny)
    assert any("holds stray" in fault for fault in found.faults)
    assert "there is no tensor head.weight" in found.faults
    assert run_here("inspect_checkpoint", tiny) == 1
    assert "holds stray" in capsys.readouterr().out


def _names(shard: Path) -> set[str]:
    return inspection._Headers(shard.parent, [shard.name]).read().tensors.keys() & {"head.weight"}


def test_another_release_is_told_as_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = config(tmp_path / "other", dspark_layers=3)
    found = inspect(folder)
    assert found.form == OTHER and "setting of another release" in found.why
    assert run_here("inspect_checkpoint", folder, "--json") == 1
    assert json.loads(capsys.readouterr().out)["form"] == OTHER


@pytest.mark.parametrize("what", ["nothing", "a file", "an empty folder", "a cut shard", "a torn config"])
def test_what_is_no_checkpoint_is_one_fact_and_one_hint(what: str, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    folder = {"nothing": tmp_path / "x", "a file": tiny / SECOND, "an empty folder": tmp_path / "empty"}.get(what, tiny)
    os.truncate(tiny / SECOND, 1000)
    if what == "a torn config":
        (tiny / "config.json").write_text("{")
    with pytest.raises(UserError):
        inspect(folder)
