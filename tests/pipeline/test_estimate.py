"""pipeline.estimate and pipeline.reference_timings: how long stages take, from measured tables, and what the figures
rest on."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from synthetic import config_dict

from v4forge.pipeline import disk_speed, estimate, events, reference_timings, requirements
from v4forge.pipeline.disk_speed import Speed
from v4forge.pipeline.estimate import Given, StageTime

GB = 1e9
FAST = Given(Speed(5 * GB, 5 * GB))
RESULTS = reference_timings.RESULTS


def values(work: Path, profile: str = "flash", **changed: Any) -> dict[str, Any]:
    source = f"{work}/upstream" if profile == "flash" else "models/tiny"
    samples, seq_len = (768, 512) if profile == "flash" else (64, 256)
    known = {"profile": profile, "work": str(work), "source": source, "samples": samples, "seq_len": seq_len}
    return known | {"corpus": "", "heldout": "", "gpus": 1} | changed


def of_flash(work: Path, gpus: int = 1, given: Given = FAST, **changed: Any) -> dict[str, StageTime]:
    names = estimate.names_of("flash")
    found = estimate.of_run(names, values(work, gpus=gpus, **changed), work, gpus, given)
    assert [each.stage for each in found] == names
    return {each.stage: each for each in found}


def digests_s(given: Given = FAST) -> float:
    assert given.disk
    return (
        requirements.layer_bytes(requirements.sizes_of(requirements.flash_config()).artifact) / given.disk.read_bytes_s
    )


def stamp(work: Path, stage: str, *outputs: str) -> None:
    (work / ".stamps").mkdir(parents=True, exist_ok=True)
    (work / ".stamps" / f"{stage}.json").write_text("{}")
    for name in outputs:
        (work / name).mkdir(exist_ok=True)


def test_a_run_is_what_its_last_stages_come_after() -> None:
    assert estimate.names_of("flash") == ["fetch", "calibrate", "postprocess", "verify", "card"]
    assert {"rtn", "postprocess-rtn", "verify-deep", "report", "card"} < set(estimate.names_of("tiny"))
    assert "verify" not in estimate.names_of("tiny")
    assert "dequant" not in estimate.names_of("tiny")


def test_one_gpu_takes_the_measured_seconds_of_each_kind_of_attention(tmp_path: Path) -> None:
    raw = json.loads((RESULTS / "calibrate-h200.json").read_text())["compute_s_by_layer"]
    by_hand = 2 * raw["0"] + 21 * raw["1"] + 20 * raw["2"]  # sliding window, CSA, HCA
    assert of_flash(tmp_path)["calibrate"].seconds == pytest.approx(by_hand + digests_s())


@pytest.mark.parametrize("gpus", [2, 4])
def test_so_many_gpus_as_were_measured_take_what_was_measured(gpus: int) -> None:
    ranks = json.loads((RESULTS / "ranks-h200-x4.json").read_text())["ranks"]
    tables = reference_timings.layers()
    assert tables
    assert tables.on(gpus) == pytest.approx(ranks[str(gpus)]["layer_s"] / ranks["1"]["layer_s"])


def test_eight_gpus_are_an_extrapolation_and_said_to_be(tmp_path: Path) -> None:
    tables = reference_timings.layers()
    assert tables
    assert tables.on(4) / 2 < tables.on(8) < tables.on(4)  # a part of it is not shared
    assert "8 x NVIDIA H200: an extrapolation from 1, 2 and 4" in of_flash(tmp_path, 8)["calibrate"].basis
    assert "extrapolation" not in of_flash(tmp_path, 4)["calibrate"].basis


def test_fewer_tokens_save_only_what_grows_with_them(tmp_path: Path) -> None:
    tables = reference_timings.layers()
    assert tables
    whole, half = tables.layer_s("CSA", 1, 768, 512), tables.layer_s("CSA", 1, 384, 512)
    assert whole / 2 < half < whole
    assert "scaled from 768 x 512 tokens" in of_flash(tmp_path, samples=384)["calibrate"].basis


def test_a_slow_disk_sets_the_time(tmp_path: Path) -> None:
    slow = Given(Speed(0.1 * GB, 0.1 * GB))
    found = of_flash(tmp_path, 8, slow)["calibrate"]
    assert "(disk)" in found.basis
    config = requirements.flash_config()
    layer = requirements.layer_time(config, requirements.sizes_of(config), 768, 512, 0.1, 0.1, 0)
    assert found.seconds == pytest.approx(43 * layer.disk_s + digests_s(slow))


def test_the_disk_is_the_given_one_or_the_measured_one_or_the_benchmarks(tmp_path: Path) -> None:
    assert "the benchmark machine's" in estimate.disk_of(tmp_path)[1]
    (tmp_path / ".stamps").mkdir()
    (tmp_path / ".stamps" / disk_speed.FILE).write_text(json.dumps({"write_bytes_s": 3e9, "read_bytes_s": 2e9}))
    assert estimate.disk_of(tmp_path) == (Speed(3e9, 2e9), "2.0 GB/s read, 3.0 GB/s written, measured here")
    assert estimate.disk_of(tmp_path, FAST)[0] == FAST.disk


def test_layers_that_are_there_are_not_counted(tmp_path: Path) -> None:
    (tmp_path / "layers").mkdir()
    for layer in range(43):
        if layer != 7:
            (tmp_path / "layers" / f"layer-{layer:03}.safetensors").touch()
    tables = reference_timings.layers()
    assert tables
    hca = tables.compute_s["HCA"]
    assert of_flash(tmp_path)["calibrate"].seconds == pytest.approx(hca + digests_s())


def test_stamped_stages_take_nothing_unless_one_before_them_runs(tmp_path: Path) -> None:
    stamp(tmp_path, "fetch", "upstream")
    stamp(tmp_path, "calibrate", "layers")
    found = of_flash(tmp_path)
    assert (found["fetch"].seconds, found["calibrate"].seconds) == (0, 0)
    assert found["postprocess"].seconds
    (tmp_path / ".stamps" / "fetch.json").unlink()
    assert of_flash(tmp_path)["calibrate"].seconds


def test_an_unknown_network_gives_no_figure_but_two_examples(tmp_path: Path) -> None:
    fetch = of_flash(tmp_path)["fetch"]
    assert fetch.seconds is None
    assert fetch.basis == "159.6 GB, network unknown: 26 min 36 s at 100 MB/s, 2 min 40 s at 1,000 MB/s"
    assert fetch.assumed_s == pytest.approx(1596, abs=1)


def test_a_given_network_or_an_earlier_fetch_gives_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = Given(FAST.disk, network_bytes_s=0.5 * GB)
    assert of_flash(tmp_path, given=given)["fetch"].seconds == pytest.approx(319, abs=1)
    monkeypatch.setenv(events.VARIABLE, str(events.file_of(tmp_path)))
    monkeypatch.delenv(events.STAGE, raising=False)
    events.emit("progress", "fetch", done=1, total=9, unit="MB", rate=200.0)
    events.emit("progress", "calibrate", done=1, total=9, unit="layers", rate=0.2)
    found = of_flash(tmp_path)["fetch"]
    assert found.seconds == pytest.approx(798, abs=1)
    assert "at 200 MB/s (1.6 Gbit/s), as in the last fetch here" in found.basis


def test_a_part_that_has_arrived_is_not_fetched_again(tmp_path: Path) -> None:
    (tmp_path / "upstream").mkdir()
    with open(tmp_path / "upstream" / "model-00001-of-00046.safetensors", "wb") as file:
        file.truncate(100 * 10**9)
    assert "59.6 GB" in of_flash(tmp_path)["fetch"].basis


def test_another_source_is_not_fetched_and_its_digests_are_read(tmp_path: Path) -> None:
    found = of_flash(tmp_path, source=str(tmp_path / "elsewhere"))
    assert found["fetch"] == StageTime("fetch", 0.0, f"not needed: the source is {tmp_path / 'elsewhere'}")
    own, other = of_flash(tmp_path)["calibrate"].seconds, found["calibrate"].seconds
    assert own and other
    assert other - own == pytest.approx(159_609_485_896 / (5 * GB))


def test_layers_of_other_dimensions_have_no_figure(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_dict()))
    found = of_flash(tmp_path, source=str(tmp_path))
    assert found["calibrate"].seconds is None
    assert "measured only for layers of DeepSeek-V4-Flash" in found["calibrate"].basis


def test_without_the_tables_nothing_is_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate.reference_timings, "layers", lambda: None)
    monkeypatch.setattr(estimate.reference_timings, "verify", lambda: None)
    monkeypatch.setattr(estimate.reference_timings, "disk", lambda: None)
    monkeypatch.setattr(estimate.reference_timings, "pipeline", lambda: {})
    found = of_flash(tmp_path, given=Given())
    assert {each.seconds for each in found.values()} == {None}


TINY = {
    "stages": {"calibrate": {"median_s": 20.0}, "verify": {"median_s": 5.0}},
    "samples": 64,
    "seq_len": 256,
    "runs": 3,
    "machine": {"cores": 2, "cpu": "a CPU"},
}


def test_the_embedded_model_takes_what_it_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate.reference_timings, "pipeline", lambda: TINY)
    names = ["fetch", "calibrate", "verify", "card"]
    found = estimate.of_run(names, values(tmp_path, "tiny"), tmp_path, 1)
    assert [each.seconds for each in found] == [0, 20, 5, None]
    assert found[1].basis == "median of 3 runs on 2 x a CPU"


def test_times_of_a_machine_that_did_other_work_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate.reference_timings, "pipeline", lambda: TINY | {"load_before": 7.1})
    (found,) = estimate.of_run(["verify"], values(tmp_path, "tiny"), tmp_path, 1)
    assert found.basis == "median of 3 runs on 2 x a CPU, beside other work"


def test_the_table_of_the_embedded_model_has_every_stage_of_the_demo(tmp_path: Path) -> None:
    names = estimate.names_of("tiny")
    found = estimate.of_run(names, values(tmp_path, "tiny"), tmp_path, 1)
    assert all(each.seconds is not None for each in found), found


@pytest.mark.parametrize("changed", [{"samples": 128}, {"seq_len": 128}, {"source": "elsewhere"}, {"gpus": 2}])
def test_what_was_not_measured_of_the_embedded_model_is_not_scaled(
    changed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate.reference_timings, "pipeline", lambda: TINY)
    settings = values(tmp_path, "tiny", **changed)
    (found,) = estimate.of_run(["calibrate"], settings, tmp_path, settings["gpus"])
    assert found.seconds is None
    assert found.basis.startswith("measured only")


def test_an_estimate_is_quick(tmp_path: Path) -> None:
    of_flash(tmp_path)
    started = time.process_time()  # of its own: other programs may hold the cores
    of_flash(tmp_path, 8)
    assert time.process_time() - started < 0.5


def test_a_download_and_the_stage_beside_it_count_once() -> None:
    seconds = {"fetch": 100.0, "calibrate": 300.0, "verify": 10.0}
    assert estimate.together(seconds) == estimate.Together(310.0, ())
    assert estimate.together(seconds | {"fetch": 500.0}) == estimate.Together(510.0, ())
    assert estimate.together({"calibrate": 300.0, "fetch": None}) == estimate.Together(300.0, ("fetch",))


def test_estimate_against_actual_has_a_line_for_each_stage_that_ran() -> None:
    estimates = [StageTime("fetch", 0.0, ""), StageTime("calibrate", 200.0, ""), StageTime("card", None, "")]
    assert estimate.compared(estimates, {}) == []
    title, *lines = estimate.compared(estimates, {"calibrate": 250.0, "card": 2.0})
    assert title == "estimate against actual:"
    assert [line.split() for line in lines] == [
        ["calibrate", "3", "min", "20", "s", "4", "min", "10", "s", "+25%"],
        ["card", "unknown", "2.0", "s"],
    ]


def test_a_stage_that_is_none_of_the_pipelines_is_unknown(tmp_path: Path) -> None:
    (found,) = estimate.of_run(
        ["polish"], {"profile": "tiny", "source": "models/tiny", "work": str(tmp_path)}, tmp_path, 1
    )
    assert found == StageTime("polish", None, "no stage of the pipeline")
