"""v4forge.plan and scripts.plan: what a run needs, from the config alone."""

from __future__ import annotations

import json
import math
import shutil
from collections import namedtuple
from functools import cache
from pathlib import Path

import pytest
from programs import run_here
from synthetic import OTHER, config_dict
from test_layout import FLASH

from v4forge import layout, plan
from v4forge.errors import UserError

Usage = namedtuple("Usage", "total used free")
TOKENS = 768, 512


@cache
def flash_sizes() -> plan.Sizes:
    return plan.sizes_of(plan.flash_config())


def disk_with(monkeypatch: pytest.MonkeyPatch, free_gb: float) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(int(1e12), 0, int(free_gb * 1e9)))


def test_the_published_config_has_flash_sizes() -> None:
    assert plan.flash_config().raw.items() >= FLASH.items()


def test_flash_is_159_6_gb_upstream_and_170_4_gb_as_artifact() -> None:
    config = plan.flash_config()
    upstream, layers, states, rest = plan.disk_parts(config, flash_sizes(), *TOKENS, None, None)
    assert round(upstream.whole_bytes / 1e9, 1) == 159.6
    assert round((layers.whole_bytes + rest.whole_bytes) / 1e9, 1) == 170.4
    assert states.whole_bytes == 2 * 768 * 512 * 4 * 4096 * 2


def test_the_parts_add_up_to_the_layout() -> None:
    config = layout.parse_config(config_dict(**{k: v for k, v in OTHER.items() if k != "shards"}), "config.json")
    specs = [layout.upstream(config), layout.artifact(config)]
    upstream, artifact = (sum(math.prod(s.shape) * s.dtype.itemsize for s in of.values()) for of in specs)
    parts = plan.disk_parts(config, plan.sizes_of(config), 1, 1, None, None)
    states = 2 * plan.streams_bytes(config, 1, 1)
    assert sum(part.whole_bytes for part in parts) == upstream + artifact + states
    assert parts[0].whole_bytes == upstream


def test_a_gpu_of_flash_needs_streams_and_routed_outputs() -> None:
    tokens = 96 * 512
    by_hand = tokens * 4 * 4096 * 2 + 2 * tokens * 4096 * 2 + tokens * 6 * 4096 * 2 + 26 * 2**30
    assert plan.gpu_bytes(plan.flash_config(), 96, 512) == by_hand


def test_the_slower_of_disk_and_compute_sets_the_time() -> None:
    config = plan.flash_config()
    fast_disk = plan.layer_time(config, flash_sizes(), *TOKENS, 5, 5, 7.0)
    assert fast_disk.layer_s == 7.0 > fast_disk.disk_s
    assert fast_disk.total_s == 43 * 7.0
    slow_disk = plan.layer_time(config, flash_sizes(), *TOKENS, 1, 1, 7.0)
    assert slow_disk.layer_s == pytest.approx((slow_disk.read_bytes + slow_disk.write_bytes) / 1e9)
    assert slow_disk.layer_s == pytest.approx(5 * fast_disk.disk_s)


def test_what_is_there_already_need_not_fit_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, sizes = plan.flash_config(), flash_sizes()
    (tmp_path / "upstream").mkdir()
    with open(tmp_path / "upstream" / "model-00001-of-00001.safetensors", "wb") as file:
        file.truncate(sizes.upstream.total() + 1000)  # a hole: no bytes are written
    (tmp_path / "layers").mkdir()
    with open(tmp_path / "layers" / "layer-000.safetensors", "wb") as file:
        file.truncate(10**9)
    before = plan.disk_parts(config, sizes, *TOKENS, None, tmp_path / "elsewhere")
    after = plan.disk_parts(config, sizes, *TOKENS, None, tmp_path)
    saved = sum(part.missing_bytes for part in before) - sum(part.missing_bytes for part in after)
    assert saved == sizes.upstream.total() + 10**9
    disk_with(monkeypatch, 250)
    plan.require_space(after, tmp_path)
    with pytest.raises(UserError, match="are missing"):
        plan.require_space(before, tmp_path)


def test_too_little_space_ends_with_1_and_names_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    disk_with(monkeypatch, 100)
    work = tmp_path / "not" / "yet"
    assert run_here("plan", "--profile", "flash", "--work", work) == 1
    printed = capsys.readouterr()
    assert "159.6" in printed.out and "150.8" in printed.out
    # 159.6 upstream + 170.4 artifact + 25.8 hidden states
    error, hint = printed.err.splitlines()
    assert error == f"error: {work} has 100.0 GB free, the run writes 355.8 GB: 255.8 GB are missing"
    assert hint.startswith("hint: ")
    assert not work.exists()


def test_enough_space_ends_with_0_and_the_time_shows_its_arithmetic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    disk_with(monkeypatch, 400)
    assert run_here("plan", "--profile", "flash", "--work", tmp_path, "--layer-seconds", 7) == 0
    out = capsys.readouterr().out
    assert "400.0 GB free, enough" in out
    assert "43 layers x 7.0 s (compute) = 5.0 min" in out


def test_a_source_with_only_its_config_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_dict()))
    assert run_here("plan", "--source", tmp_path, "--samples", 8, "--seq-len", 64, "--gpus", 2) == 0
    assert "4 x 64 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--help"], 0), ([], 2), (["--profile", "flash", "--samples", "0"], 2), (["--source", "/no/such/folder"], 1)],
)
def test_exit_codes(arguments: list[str], code: int) -> None:
    assert run_here("plan", *arguments) == code
