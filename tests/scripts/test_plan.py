"""v4forge.pipeline.requirements and scripts.plan: what a run needs, from the config alone."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections import Counter, namedtuple
from contextlib import chdir, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from flash import FLASH
from programs import run_here
from synthetic import OTHER, artifact_shard, config_dict

from v4forge.checkpoint import layout
from v4forge.checkpoint.codec import DTYPES
from v4forge.errors import UserError
from v4forge.pipeline import disk_speed, estimate, events, machines, requirements

Usage = namedtuple("Usage", "total used free")
TOKENS = 768, 512
NAMES = estimate.names_of("flash")


@cache
def flash_sizes() -> requirements.Sizes:
    return requirements.sizes_of(requirements.flash_config())


def test_recipe_mixed_needs_a_little_more_disk(capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for made_by in ("int4", "mixed"):
        assert run_here("plan", "--profile", "flash", "--no-measure", "--json", "--recipe", made_by) == 0
        stages = {each["stage"]: each for each in json.loads(capsys.readouterr().out)["stages"]}
        found.append(stages["calibrate"]["writes_bytes"] + stages["postprocess"]["writes_bytes"])
    weights = 3 * 256 * 3 * 2048 * 4096  # of the three hash-routed layers: FP4 groups of 32, INT4 groups of 128
    assert found[1] - found[0] == weights // 32 - 2 * weights // 128 - 3 * 768 * 16


def disk_with(monkeypatch: pytest.MonkeyPatch, free_gb: float) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(int(1e12), 0, int(free_gb * 1e9)))


def test_the_published_config_has_flash_sizes() -> None:
    assert requirements.flash_config().raw.items() >= FLASH.items()


def settings(work: Path, **changed: Any) -> dict[str, Any]:
    """The runner's, of a run of Flash."""
    return {"work": str(work), "source": f"{work}/upstream", "samples": 768, "seq_len": 512, **changed}


def steps_of(work: Path, **changed: Any) -> dict[str, requirements.Step]:
    found = requirements.steps(NAMES, requirements.flash_config(), flash_sizes(), settings(work, **changed))
    return {step.stage: step for step in found}


def room(work: Path, **changed: Any) -> int:
    given = settings(work, **changed)
    config, sizes = requirements.flash_config(), flash_sizes()
    return requirements.room_needed(requirements.steps(NAMES, config, sizes, given), NAMES, config, sizes, given)


def sparse(path: Path, size: int) -> None:
    """A file of holes: no bytes are written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.truncate(size)


def test_flash_is_159_6_gb_upstream_and_170_4_gb_as_artifact(tmp_path: Path) -> None:
    found = steps_of(tmp_path)
    assert round(found["fetch"].writes_bytes / 1e9, 1) == 159.6
    assert round((found["calibrate"].writes_bytes + found["postprocess"].writes_bytes) / 1e9, 1) == 170.4


def test_the_disk_is_fullest_while_hidden_states_lie_beside_source_and_layers(tmp_path: Path) -> None:
    found = steps_of(tmp_path)
    upstream, layers = found["fetch"].writes_bytes, found["calibrate"].writes_bytes
    assert found["calibrate"].held_bytes == upstream + layers + 2 * 768 * 512 * 4 * 4096 * 2
    assert found["calibrate"].held_bytes == max(step.held_bytes for step in found.values()) == room(tmp_path)


def test_linked_layers_count_once(tmp_path: Path) -> None:
    found = steps_of(tmp_path)
    assert found["card"].held_bytes == sum(step.writes_bytes for step in found.values())
    assert found["card"].held_bytes == flash_sizes().upstream.total() + flash_sizes().artifact.total()


@pytest.mark.parametrize("changed", [{}, OTHER], ids=["small", "other"])
def test_the_sizes_are_those_of_the_layout(changed: dict[str, Any]) -> None:
    options = {name: value for name, value in changed.items() if name != "shards"}
    config = layout.parse_config(config_dict(**options), "config.json")
    sizes = requirements.sizes_of(config)
    for found, specs in ((sizes.upstream, layout.upstream(config)), (sizes.artifact, layout.artifact(config))):
        by_hand: Counter[str] = Counter()
        for name, spec in specs.items():
            by_hand[artifact_shard(name)] += math.prod(spec.shape) * DTYPES[spec.dtype].itemsize
        assert found == by_hand


def test_a_gpu_of_flash_needs_streams_and_routed_outputs() -> None:
    tokens = 96 * 512
    by_hand = tokens * 4 * 4096 * 2 + 2 * tokens * 4096 * 2 + tokens * 6 * 4096 * 2 + 26 * 2**30
    assert requirements.gpu_bytes(requirements.flash_config(), 96, 512) == by_hand


def test_the_slower_of_disk_and_compute_sets_the_time() -> None:
    config = requirements.flash_config()
    fast_disk = requirements.layer_time(config, flash_sizes(), *TOKENS, 5, 5, 7.0)
    assert fast_disk.layer_s == 7.0 > fast_disk.disk_s
    assert fast_disk.layers == 43
    slow_disk = requirements.layer_time(config, flash_sizes(), *TOKENS, 1, 1, 7.0)
    assert slow_disk.layer_s == pytest.approx((slow_disk.read_bytes + slow_disk.write_bytes) / 1e9)
    assert slow_disk.layer_s == pytest.approx(5 * fast_disk.disk_s)


def test_what_is_there_already_need_not_fit_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = room(tmp_path)
    sparse(tmp_path / "upstream" / "model-00001-of-00001.safetensors", flash_sizes().upstream.total() + 1000)
    sparse(tmp_path / "layers" / "layer-000.safetensors", 10**9)
    after = room(tmp_path)
    assert before - after == flash_sizes().upstream.total() + 10**9
    disk_with(monkeypatch, 250)
    requirements.require_room(after, tmp_path)
    with pytest.raises(UserError, match="are missing"):
        requirements.require_room(before, tmp_path)


def test_a_source_elsewhere_takes_no_room_here(tmp_path: Path) -> None:
    assert room(tmp_path) - room(tmp_path, source="/elsewhere") == flash_sizes().upstream.total()


def test_calibrate_still_refuses_what_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = requirements.calibration_parts(requirements.flash_config(), tmp_path, *TOKENS)
    disk_with(monkeypatch, 150.8 + 25.7)
    with pytest.raises(UserError, match=r"the run writes 176\.6 GB"):
        requirements.require_space(parts, tmp_path)


def planned(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """The program without measuring, far from a run of flash that may be in this checkout -> code, stdout, stderr."""
    with tempfile.TemporaryDirectory() as empty, chdir(empty) if "tiny" not in arguments else nullcontext():
        code = run_here("plan", *arguments, "--no-measure")
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def rows(out: str) -> dict[str, str]:
    """The table's rows by stage."""
    return {line.split()[0]: line for line in out.split("\ndisk ")[0].splitlines() if line.strip()}


def test_too_little_space_ends_with_1_and_names_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    disk_with(monkeypatch, 100)
    work = tmp_path / "not" / "yet"
    code, out, err = planned(capsys, "--profile", "flash", "--work", work)
    assert code == 1
    assert "159.6" in rows(out)["fetch"] and "150.8" in rows(out)["calibrate"]
    error, hint = err.splitlines()
    # 159.6 upstream + 150.8 layers + 25.8 hidden states
    assert error == f"error: {work} has 100.0 GB free, the run writes 336.2 GB: 236.2 GB are missing"
    assert hint.startswith("hint: ")
    assert not work.exists()


def test_enough_space_ends_with_0_and_the_time_shows_its_arithmetic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    disk_with(monkeypatch, 400)
    fast = "--read-gbps", 5, "--write-gbps", 5
    code, out, _ = planned(capsys, "--profile", "flash", "--work", tmp_path, "--layer-seconds", 7, *fast)
    assert code == 0
    assert "400.0 GB free, enough" in out
    assert "43 layers x 7.0 s (compute) = 5.0 min" in out


def test_stages_come_in_order_and_the_download_counts_beside_calibrate(capsys: pytest.CaptureFixture[str]) -> None:
    out = planned(capsys, "--profile", "flash", "--gpus", 8, "--network-gb-s", 1)[1]
    assert [name for name in rows(out) if name in NAMES] == NAMES
    assert "calibrate begins on the first files of fetch: of the two the longer one counts" in out
    assert "an extrapolation from 1, 2 and 4" in " ".join(out.split())


def test_the_price_of_an_hour_gives_the_money(capsys: pytest.CaptureFixture[str]) -> None:
    given = "--profile", "flash", "--network-gb-s", 1, "--json"
    found = json.loads(planned(capsys, *given, "--price", 36)[1])
    assert found["cost"] == pytest.approx(found["total_s"] / 100)
    assert json.loads(planned(capsys, *given)[1])["cost"] is None
    out = planned(capsys, "--profile", "flash", "--network-gb-s", 1, "--price", 36)[1]
    assert f"{found['cost']:,.2f} at 36.00 an hour, for these stages alone" in out


def test_an_unknown_network_is_said_in_the_total(capsys: pytest.CaptureFixture[str]) -> None:
    out = planned(capsys, "--profile", "flash")[1]
    assert rows(out)["fetch"].split()[-1] == "unknown"
    assert "fetch assumed at 100 MB/s: NETWORK_GB_S=, or --network-gb-s, says other" in out


def test_json_names_what_is_assumed_in_the_total(capsys: pytest.CaptureFixture[str]) -> None:
    unknown, known = (
        json.loads(planned(capsys, "--profile", "flash", "--json", *more)[1]) for more in ([], ["--network-gb-s", 1])
    )
    assert (unknown["assumed"], known["assumed"]) == (["fetch"], [])


def test_a_run_that_was_interrupted_needs_only_what_is_missing(tmp_path: Path) -> None:
    """Half a download, a part of which has no name yet, and 20 layers: the rest, and the hidden states."""
    sizes = flash_sizes()
    layers = requirements.layer_bytes(sizes.artifact)
    sparse(tmp_path / "upstream" / "model-00001-of-00046.safetensors", 70 * 10**9)
    sparse(tmp_path / "upstream/.fetch/incoming/x/model-00002-of-00046.safetensors.incomplete", 9 * 10**9)
    for layer in range(20):
        sparse(tmp_path / "layers" / f"layer-{layer:03}.safetensors", sizes.artifact[f"layers.{layer}"])
    left = sizes.upstream.total() - 79 * 10**9 + layers - sum(sizes.artifact[f"layers.{n}"] for n in range(20))
    states = 2 * 768 * 512 * 4 * 4096 * 2
    assert room(tmp_path) == left + states
    sparse(tmp_path / "layers/streams/layer-016/00000.safetensors", states // 2)
    assert room(tmp_path) == left + states // 2
    parts = requirements.calibration_parts(requirements.flash_config(), tmp_path / "layers", *TOKENS)
    assert parts[1].missing_bytes == states // 2


def test_json_adds_up(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = "--profile", "flash", "--source", tmp_path, "--json"
    (tmp_path / "config.json").write_text(json.dumps(requirements.flash_config().raw))
    found = json.loads(planned(capsys, *arguments)[1])
    assert [each["stage"] for each in found["stages"]] == NAMES
    seconds = [each["seconds"] for each in found["stages"] if each["seconds"]]
    assert found["total_s"] == pytest.approx(sum(seconds))
    assert found["disk"]["peak_bytes"] == max(each["held_bytes"] for each in found["stages"])
    assert found["disk"]["peak_in"] == "calibrate"


def test_what_is_finished_is_shown_as_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for layer in range(12):
        sparse(tmp_path / "layers" / f"layer-{layer:03}.safetensors", 3 * 10**9)
    (tmp_path / ".stamps").mkdir()
    (tmp_path / ".stamps" / "fetch.json").write_text("{}")
    sparse(tmp_path / "upstream" / "model-00001-of-00001.safetensors", flash_sizes().upstream.total())
    out = planned(capsys, "--profile", "flash", "--work", tmp_path)[1]
    assert "done" in rows(out)["fetch"].split()
    assert "12/43 layers" in rows(out)["calibrate"]
    assert "31 layers x" in out


def test_the_embedded_model_is_not_downloaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = planned(capsys, "--profile", "tiny", "--work", tmp_path)
    assert code == 0
    assert "not needed" in rows(out)["fetch"]
    assert list(rows(out))[-2:] == ["card", "report"]


def test_the_last_run_is_set_against_its_estimate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(events.VARIABLE, str(events.file_of(tmp_path)))
    monkeypatch.delenv(events.STAGE, raising=False)
    events.emit("run", "", stages=["calibrate"], estimates={"calibrate": 20.0}, command="make demo")
    events.emit("start", "calibrate")
    events.emit("end", "calibrate", elapsed_s=25.0)
    events.emit("run-end", "", code=0)
    out = planned(capsys, "--profile", "tiny", "--work", tmp_path)[1]
    assert "the last run here, estimate against actual:" in out
    assert any(line.split() == ["calibrate", "20", "s", "25", "s", "+25%"] for line in out.splitlines())


def test_the_disk_is_measured_where_it_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    disk_with(monkeypatch, 400)
    measured = []

    def measure(folder: Path, _size: int = 0) -> disk_speed.Speed:
        measured.append(folder)
        return disk_speed.Speed(2e9, 3e9)

    monkeypatch.setattr(disk_speed, "measure", measure)
    assert run_here("plan", "--profile", "flash", "--work", tmp_path / "not yet") == 0
    assert "3.0 GB/s read, 2.0 GB/s written, measured now" in capsys.readouterr().out
    assert measured == [tmp_path] and not list(tmp_path.iterdir())
    assert run_here("plan", "--profile", "flash", "--work", tmp_path) == 0
    assert run_here("plan", "--profile", "flash", "--work", tmp_path) == 0
    assert measured == [tmp_path, tmp_path]  # and kept
    assert "measured here" in capsys.readouterr().out.split("\n\n")[-2]


def test_a_source_with_only_its_config_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_dict()))
    code, out, _ = planned(capsys, "--source", tmp_path, "--samples", 8, "--seq-len", 64, "--gpus", 2)
    assert code == 0
    assert "4 x 64 tokens" in out


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        ([], 2),
        (["--profile", "flash", "--samples", "0"], 2),
        (["--profile", "flash", "--price", "nan"], 2),
        (["--profile", "flash", "--network-gb-s", "0"], 2),
        (["--source", "/no/such/folder"], 1),
    ],
)
def test_exit_codes(arguments: list[str], code: int) -> None:
    assert run_here("plan", *arguments) == code


def on(kind: str, *options: str) -> int:
    return run_here("plan", "--profile", "flash", "--on", kind, *options)


def test_a_machine_that_is_named_is_planned_for_whatever_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    disk_with(monkeypatch, 1)
    work = tmp_path / "flash"
    sparse(work / "upstream/model-00001-of-00046.safetensors", 10**9)  # here, not there
    assert on("8xH200", "--work", str(work)) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("8 GPUs, 96 x 512 tokens each, in 8xH200:/scratch/flash") and "8 x NVIDIA H200" in said[1]
    assert said[-2] == "8xH200 has all that" and said[-1].startswith("here it needs ")
    assert said[-1].endswith("336.2 GB of disk, where 1.0 GB are free")
    assert on("8xH200", "--work", str(work), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["stages"][0]["there"] == "" and found["missing"]["on"] == []
    assert found["cost"] == pytest.approx(found["total_s"] / 3600 * found["machine"]["price"])


def test_what_a_kind_has_is_overridden_and_may_be_too_little(capsys: pytest.CaptureFixture[str]) -> None:
    assert on("8xH200", "--gpus", "4", "--price", "36", "--network-gb-s", "2", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["title"].count("4 GPUs") == 1 and found["cost"] == pytest.approx(found["total_s"] / 100)
    for options, lacks in (
        (("--disk-gb", "100"), "336.2 GB of disk, where 100.0 GB are free"),
        (("--gpu-memory-gb", "24"), "30.5 GiB a GPU, where one has 22.4 GiB"),
        (("--memory-gib", "32"), "44.3 GiB of memory, where it has 32.0 GiB"),
        (("--gpus", "16"), "16 GPUs of 28.2 GiB, where it has 8"),
    ):
        assert on("8xH200", *options) == 1
        assert capsys.readouterr().err.startswith(
            f"error: 8xH200 is too small: it needs {lacks}\nhint: make plan ON=8xH100"
        )


def test_every_kind_says_where_its_figures_are_from_and_what_is_not_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert all(kind.sources and kind.gpus in (1, 2, 4, 8) for kind in machines.kinds().values())
    assert on("8xH100") == 0
    said = capsys.readouterr().out
    assert "NVIDIA H100 has not been measured: the times are those of NVIDIA H200" in said
    assert "PRICE= adds money" in said and "cost" not in said
    assert on("9xH200") == 1
    assert (
        capsys.readouterr().err
        == "error: no kind of machine is called 9xH200\nhint: make plan ON=8xH200, or ON=8xH100\n"
    )
