"""An artifact is untrusted input: whatever its index and headers say, verify ends with a verdict or a refusal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from programs import calibrate_arguments, run_here, write_corpus, write_source

from v4forge.checkpoint.reader import INDEX, Checkpoint
from v4forge.digests import Digests
from v4forge.errors import UserError
from v4forge.verification import certificate

SHARD = "model-00001-of-00005.safetensors"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("untrusted")
    source, corpus = write_source(base / "source"), write_corpus(base / "corpus.txt")
    work, out = base / "layers", base / "artifact"
    assert run_here("calibrate", *calibrate_arguments(source, work, corpus), "--method", "rtn") == 0
    assert run_here("postprocess", "--source", source, "--work", work, "--out", out) == 0
    return out


@pytest.fixture(scope="module")
def copy(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(artifact, tmp_path_factory.mktemp("copy") / "artifact"))


def verdict(folder: Path) -> bool | None:
    """What verify says; None for a refusal. Anything but these two is a defect."""
    try:
        checks, *_ = certificate.verify(folder, None, Digests(folder.parent / "digests.json"))
    except UserError:
        return None
    return all(check.ok for check in checks)


@contextmanager
def replaced(path: Path, content: bytes) -> Iterator[None]:
    """The file with other content, for a while."""
    before = path.read_bytes()
    path.unlink()  # a hard link's other name keeps its content
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def test_the_undamaged_one_passes(copy: Path) -> None:
    assert verdict(copy) is True


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def with_header(header: Any, data: bytes) -> bytes:
    head = json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + data


NUMBERS = st.integers(-(2**65), 2**65) | st.sampled_from([-1, 0, 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(["dtype", "shape", "data_offsets"])
common = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@common
@given(where=st.integers(0, 10**6), field=FIELDS, value=JSON | st.lists(NUMBERS, min_size=2, max_size=2))
def test_a_header_that_says_anything_of_a_tensor_is_refused_or_fails(
    copy: Path, where: int, field: str, value: Any
) -> None:
    header, data = header_of((copy / SHARD).read_bytes())
    name = sorted(header)[where % len(header)]
    if header[name].get(field) == value:
        return
    header[name][field] = value
    with replaced(copy / SHARD, with_header(header, data)):
        assert verdict(copy) is not True


@common
@given(value=JSON | st.dictionaries(st.text(max_size=8), st.lists(NUMBERS, max_size=3), max_size=3))
def test_any_json_for_a_header_is_refused_or_fails(copy: Path, value: Any) -> None:
    _, data = header_of((copy / SHARD).read_bytes())
    with replaced(copy / SHARD, with_header(value, data)):
        assert verdict(copy) is not True


@common
@given(where=st.integers(0, 1 << 14), bit=st.integers(0, 7))
def test_a_flipped_bit_at_the_start_of_a_shard_is_refused_or_fails(copy: Path, where: int, bit: int) -> None:
    content = bytearray((copy / SHARD).read_bytes())
    content[where % len(content)] ^= 1 << bit
    with replaced(copy / SHARD, bytes(content)):
        assert verdict(copy) is not True


@common
@given(value=JSON | st.fixed_dictionaries({"weight_map": JSON}))
def test_any_json_for_an_index_is_refused_or_fails(copy: Path, value: Any) -> None:
    with replaced(copy / INDEX, json.dumps(value).encode()):
        assert verdict(copy) is not True


@common
@given(
    value=JSON
    | st.fixed_dictionaries(
        {}, optional={key: JSON | st.lists(JSON, max_size=3) for key in ("source", "calibration", "layers", "files")}
    )
)
def test_any_json_for_a_manifest_fails(copy: Path, value: Any) -> None:
    with replaced(copy / "manifest.json", json.dumps(value).encode()):
        assert verdict(copy) is False


def test_a_manifest_names_no_file_outside_the_source(copy: Path) -> None:
    content = json.loads((copy / "manifest.json").read_text())
    content["source"]["files"]["../../etc/passwd"] = {"sha256": "0"}
    with replaced(copy / "manifest.json", json.dumps(content).encode()):
        checks, *_ = certificate.verify(copy, None, Digests(copy.parent / "digests.json"))
    assert "does not say what" in next(check.detail for check in checks if check.name == "provenance")


@pytest.mark.parametrize("name", [INDEX, "config.json", "manifest.json", "tokenizer.json"])
def test_json_nested_a_hundred_thousand_times_is_refused_or_fails(copy: Path, name: str) -> None:
    with replaced(copy / name, b"[" * 100_000):
        assert verdict(copy) is False


@pytest.mark.parametrize("outside", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", ""])
def test_an_index_that_leaves_the_folder_is_refused_before_anything_is_opened(
    copy: Path, monkeypatch: pytest.MonkeyPatch, outside: str
) -> None:
    index = json.loads((copy / INDEX).read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = outside
    opened: list[str] = []
    monkeypatch.setattr("v4forge.checkpoint.reader.safe_open", lambda path, **_: opened.append(str(path)))
    refused = pytest.raises(UserError, match="is not a safetensors index")
    with replaced(copy / INDEX, json.dumps(index).encode()), refused:
        Checkpoint(copy, form="artifact")
    assert not opened


def test_a_shard_that_is_a_pickle_is_refused_and_not_loaded(copy: Path, tmp_path: Path) -> None:
    told = tmp_path / "loaded"
    pickle = f"cposix\nsystem\n(S'touch {told}'\ntR.".encode()
    with replaced(copy / SHARD, pickle):
        assert verdict(copy) is False
    assert not told.exists()
