"""determining: the modules whose text is part of a fingerprint, from what imports what."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from v4forge.checkout import ROOT
from v4forge.quantization import determining, from_hf, layer_files

# What decodes and encodes, what goes forward, what chooses codes.
KNOWN = {
    *(f"checkpoint/{name}" for name in ("codec", "conversion", "formats", "layout", "reader", "recipe", "writer")),
    *(f"checkpoint/{name}" for name in ("prefetch", "safetensors_header")),
    *(f"model/{name}" for name in ("attention", "chat_format", "corpus", "deepseek_v4", "distributed")),
    *(f"model/{name}" for name in ("expert_dispatch", "experts", "kernels", "layer_classes", "names")),
    *(f"quantization/{name}" for name in ("calibrate", "experts", "gptq", "hidden_states", "kernels", "layer")),
    "quantization/layer_files",
}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of v4forge/ in which modules are looked for -> its folder."""
    shutil.copytree(ROOT / "v4forge", tmp_path / "v4forge", ignore=shutil.ignore_patterns("__pycache__"))
    for module in (determining, layer_files):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    determining.modules.cache_clear()
    yield tmp_path / "v4forge"
    determining.modules.cache_clear()


def mark() -> object:
    return layer_files.fingerprint({}, None, layer_files.Settings(), torch.device("cpu"))


def test_a_byte_in_any_module_that_the_layer_loop_reaches_changes_the_fingerprint(checkout: Path) -> None:
    before = mark()
    names = determining.modules(layer_files.DETERMINING_LOOP)
    assert set(names) >= KNOWN
    for name in names:
        path = checkout / f"{name}.py"
        text = path.read_bytes()
        path.write_bytes(text + b"#")
        assert mark() != before, name
        path.write_bytes(text)
    assert mark() == before


def test_a_module_counts_as_soon_as_it_is_imported_even_within_a_function(checkout: Path) -> None:
    (checkout / "model/new.py").write_text("from v4forge.model import newer\n")
    (checkout / "model/newer.py").write_text("")
    with open(checkout / "quantization/gptq.py", "a") as file:
        file.write("\n\ndef later() -> None:\n    import v4forge.model.new\n")
    assert {"model/new", "model/newer"} <= set(determining.modules(layer_files.DETERMINING_LOOP))


def test_what_only_reports_and_what_only_type_checkers_see_does_not_count(checkout: Path) -> None:
    names = determining.modules(layer_files.DETERMINING_LOOP)
    assert "quantization/layer_reports" not in names and all("/" in name for name in names)
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from v4forge.bench import speed\n"
    assert list(determining.imports(text)) == []


def test_an_artifact_of_another_tool_s_experts_is_determined_by_what_takes_them() -> None:
    names = determining.modules(from_hf.DETERMINING)
    assert {"quantization/from_hf", "quantization/hf_folder", "checkpoint/conversion", "model/names"} <= set(names)
    assert "quantization/calibrate" not in names
