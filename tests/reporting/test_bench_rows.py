"""Tables and figures of the benches: v4forge.reporting.benches and what is made of it, on made-up result files."""

from __future__ import annotations

import csv
import html
import io
import json
import math
import re
import subprocess
import sys
import types
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import bench_results as made
import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_files import CHECKS, DEEP, MANIFEST, RUN, layer

from scripts import report as program
from v4forge import artifact_folder
from v4forge.bench import published_figures, results, terms
from v4forge.bench.standing import worth_of
from v4forge.checkout import ROOT
from v4forge.errors import UserError
from v4forge.quantization.layer_reports import layer_rows
from v4forge.reporting import (
    bench_drafts,
    bench_quality,
    bench_speed,
    benches,
    cost,
    figures_csv,
    layer_charts,
    overview,
    page,
    prediction,
    published_comparison,
    rendering,
    run_sections,
    speed_charts,
    tables,
)
from v4forge.reporting.inputs import Inputs
from v4forge.reporting.published_comparison import Pipeline
from v4forge.reporting.tables import Cell, Column, Drawing, Section, Table

FLASH = {each["bench"]: each for each in made.full()}
TINY = {each["bench"]: each for each in made.full(tiny=True, trial=4)}


def section_of(bench: str, result: dict[str, Any]) -> Section:
    return benches.Told(bench, result).section


def headline_of(found: dict[str, Any], made_by: Pipeline | None = None) -> dict[str, list[Cell]]:
    rows = published_comparison.table(benches.told(found), made_by or Pipeline()).rows
    return {row[0].text: list(row) for row in rows if len(row) > 1}


def test_published_figures_have_conditions_sources_and_one_of_the_benches() -> None:
    assert len(published_figures.figures()) == len(published_figures.by_key()) == 33
    for figure in published_figures.figures():
        assert figure.conditions and figure.bench in (*benches.BENCHES, "pipeline")
        assert figure.original or figure.siblings
        for value in (figure.original, *figure.siblings):
            assert value is None or value.source


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("speed/k1/256x256/c1/tpot_ms", 6.02, "6.02 ms"),
        ("speed/k1/256x256/c1/output_tok_s", 88.35, "88.35 tok/s"),
        ("draft/random", 69.94, "69.94%"),
        ("tools/total", 24, "24 of 30"),
        ("pipeline/calibrate", 15.09, "15.09 h"),
    ],
)
def test_a_published_figure_is_shown_as_it_was_published(key: str, value: float, shown: str) -> None:
    figure = published_figures.by_key()[key]
    assert figure.original and figure.original.value == value
    assert figure.shown(figure.original.value) == shown


@pytest.mark.parametrize(
    ("gpus", "backend", "size", "trial", "marks"),
    [
        (["NVIDIA H200"] * 8, "cuda", made.FLASH_SIZE, None, []),
        (["NVIDIA H200"], None, made.FLASH_SIZE, 8, ["a trial of 8: not a result"]),
        (["NVIDIA GH200 480GB"], "cuda", made.FLASH_SIZE, None, ["on 1 x NVIDIA GH200 480GB, where nothing was"]),
        ([], "cpu", made.TINY_SIZE, None, ["tiny model on a CPU: a test of the bench, not a result"]),
        (["NVIDIA H200"], "cpu", made.TINY_SIZE, 4, ["tiny model on a CPU: a test of the bench", "a trial of 4"]),
        (["NVIDIA H200"], "cuda", made.TINY_SIZE, None, ["tiny model: a test of the bench, not a result"]),
        (["NVIDIA H200"], "cuda", {}, None, ["a model of unknown size: a test of the bench, not a result"]),
    ],
)
def test_what_is_not_flash_on_h200_or_a_trial_is_marked(
    gpus: list[str], backend: str | None, size: dict[str, int], trial: int | None, marks: list[str]
) -> None:
    result = made.tools(trial=trial)
    result["machine"]["gpus"], result["target"]["backend"], result["target"]["artifact"] = gpus, backend, size
    worth = worth_of(result)
    assert len(worth.marks) == len(marks)
    assert all(said.startswith(mark) for said, mark in zip(worth.marks, marks, strict=True))
    assert worth.comparable == (not marks)


def test_the_headline_sets_ours_beside_the_original_and_its_siblings() -> None:
    rows = headline_of(FLASH)
    _, ours, original, difference, siblings = rows["GSM8K 8-shot, strict"]
    assert (ours.text, original.text) == ("93.10% ±0.70", "93.71% ±0.67")
    assert difference == Cell("-0.61 ±0.97", "p = 0.53")
    assert siblings.text == "94.99%, without MTP; 91.00%, NVFP4 by RedHat"
    assert rows["tool calls, points"][1].text == "26 of 30"
    assert rows["chat smoke, coding"][1].text == "1 of 2"
    assert rows["TPOT speed-up, k=1, concurrency 1"][1].note.startswith("1.")


def glance_of(results: dict[str, Any], **found: Any) -> dict[str, tuple[Cell, Cell]]:
    rows = overview.table(Inputs(benches=benches.told(results), **found)).rows
    return {row[0].text: (row[0], row[1]) for row in rows}


def test_one_look_says_what_there_is_to_know() -> None:
    certificate = {"ok": True, "checks": [{"name": "tensors", "ok": True, "detail": ""}], "deep": DEEP}
    said = glance_of(
        certificate=certificate,
        layers=[layer(0), layer(1, True)],
        manifest=MANIFEST,
        results=FLASH,
    )
    texts = {name: answer.text for name, (_, answer) in said.items()}
    assert texts == {
        "Artifact": "4.0 MB in 1 shard",
        "Certificate": "ok, 1 check",
        "Prediction beside the source": ("KL 0.0110±0.0020 nats a token, 94.7±0.6% of the most likely tokens the same"),
        "Losses by layer": "GPTQ lost less than round-to-nearest on 12 of 12 matrices",
        "Speed by concurrency": "TPOT 4.79 ms with k=3, 1.88x as fast as k=0, concurrency 1",
        "Acceptance by workload": "acceptance rate at position 1: 70.3% (random tokens) to 93.1% (code)",
        "Quality": "no difference from the published beyond noise, of 6 tested",
        "Tool calls and conversations": "26 of 30 points for tool calls, 9 of 10 conversations as they should be",
    }
    speed = said["Speed by concurrency"][1]
    assert speed.note == (
        "output throughput against k=0, with the best k: 1.77x (k=3) at concurrency 1, 0.87x (k=1) at concurrency 16"
    )


def test_one_look_says_what_is_bad() -> None:
    checks = [{"name": name, "ok": name != "tensors", "detail": ""} for name in ("tensors", "INT4 error")]
    said = glance_of({"quality": made.quality(better=-0.02)}, certificate={"ok": False, "checks": checks})
    assert said["Certificate"][1] == Cell("FAILED, 1 of 2 checks", "tensors", "bad")
    assert said["Quality"][1].text.startswith("beyond noise: ") and said["Quality"][1].mark == "bad"
    assert "MMLU 5-shot -2.76 points" in said["Quality"][1].text


def test_one_look_at_the_tiny_model_says_that_it_is_a_test() -> None:
    said = glance_of(results=TINY)
    for bench in benches.BENCHES.values():
        assert said[bench.TITLE][0].note == "tiny model on a CPU; a trial of 4"
    assert said["Quality"][1].text == "6 figures, none tested against the published"


@pytest.mark.parametrize("bench", made.BENCHES)
def test_one_look_at_a_bench_that_measured_nothing_says_so(bench: str) -> None:
    result = made.BENCHES[bench]() | {"parts": {}, "complete": False}
    title, said = glance_of(results={bench: result})[benches.BENCHES[bench].TITLE]
    assert title.note == "unfinished" and said.text


def test_what_was_published_without_its_noise_is_subtracted_and_called_untested() -> None:
    rows = headline_of(FLASH)
    assert rows["TPOT, k=1, concurrency 1"][3] == Cell("+5.4%", mark="dim")
    assert rows["acceptance rate, code"][3] == Cell("+0.14", mark="dim")
    assert rows["tool calls, points"][3] == Cell("+2", mark="dim")
    assert rows["TPOT speed-up, k=2, concurrency 1"][3].text == "", "there is no original"


def test_the_page_says_where_each_published_figure_is_from() -> None:
    text = page.page(Inputs(benches=benches.told(FLASH)))
    for figure in published_figures.figures():
        for value in (figure.original, *figure.siblings):
            assert value is None or html.escape(value.source) in text
    assert all(html.escape(page) in text for page in published_figures.pages())


def test_the_headline_of_nothing_says_what_measures_each() -> None:
    for row in headline_of({}).values():
        assert row[1].text == "not measured" and row[1].note.startswith("make ")


def test_no_figure_of_the_tiny_model_stands_beside_a_published_one() -> None:
    for row in headline_of(TINY).values():
        assert row[1].text in ("not comparable", "not measured") and row[3].text == ""
    for row in bench_quality.rows(TINY["quality"]):
        assert row.delta is None and row.p is None
    text = page.page(Inputs(benches=benches.told(TINY)))
    assert "p = " not in text and "p &lt;" not in text and "<title>published" not in text
    assert text.count("Tiny model on a CPU: a test of the bench, not a result. A trial of 4: not a result.") == 4


def test_a_trial_of_flash_is_beside_the_published_but_marked_and_not_tested() -> None:
    trial = {each["bench"]: each for each in made.full(trial=8)}
    row = headline_of(trial)["GSM8K 8-shot, strict"]
    assert row[1] == Cell("93.10% ±0.70", "a trial of 8") and row[3].text == ""


def test_several_replicas_are_other_conditions_than_the_published_one() -> None:
    result = made.speed()
    result["target"]["replicas"] = 4
    row = headline_of({"speed": result})["throughput, k=1, concurrency 1"]
    assert row[1].note == "other conditions: 4 replicas of TP=2" and row[3].text == ""


def test_making_flash_is_beside_the_published_and_making_another_model_is_not() -> None:
    ours = Pipeline(
        flash=True, calibrate_s=1800.0, calibrated="768 x 512 tokens", postprocess_s=90, bytes=170_400_000_000
    )
    rows = headline_of({}, ours)
    assert rows["calibration"][1] == Cell("0.50 h", "768 x 512 tokens")
    assert rows["intermediate checkpoint on disk"][1] == Cell("0 GB", "none is written")
    assert rows["artifact"][1].text == "170.4 GB"
    tiny = published_comparison.pipeline(RUN, MANIFEST)
    assert not tiny.flash and tiny.calibrate_s == 40.5 and tiny.calibrated == "64 x 256 tokens"
    assert headline_of({}, tiny)["calibration"][1] == Cell("not comparable", "another model", "dim")


def test_points_are_ordered_and_measured_again_ones_left_out() -> None:
    rows = bench_speed.rows(FLASH["speed"]).points
    assert len(rows) == 2 * 3 * 4
    order = [(row.shape, row.concurrency, row.drafts) for row in rows]
    assert order[0] == ("256x256", 1, 0) and order[-1] == ("1024x1024", 16, 3)
    assert all((row.gain is None) == (row.drafts == 0) for row in rows)


def test_each_k_and_shape_has_a_sentence_on_where_it_stops_paying() -> None:
    said = bench_speed.rows(FLASH["speed"]).stops
    assert len(said) == 6
    assert all("stops paying" in sentence for sentence in said)


def test_without_k0_gains_are_not_known() -> None:
    result = made.speed()
    result["parts"] = {key: part for key, part in result["parts"].items() if not key.startswith("k0/")}
    speed = bench_speed.rows(result)
    assert all(row.gain is None for row in speed.points)
    assert len(speed.stops) == 6 and all(said.endswith("k=0 was not measured") for said in speed.stops)


def test_drafts_are_shown_by_position_beside_the_offline_figure() -> None:
    found = {table.name: table for table in section_of("draft", FLASH["draft"]).tables}
    assert [column.title for column in found["draft"].columns][-3:] == ["position 1", "position 2", "position 3"]
    assert found["draft-given"].rows[-1][0].text == "offline"
    assert found["draft-given"].rows[-1][1] == Cell("80.0%", "78.0 to 82.0")


def test_without_an_offline_figure_the_command_that_makes_it_is_said() -> None:
    result = made.draft()
    for part in result["parts"].values():
        part["offline"] = None
    assert "--deep 8192" in section_of("draft", result).said[0]


def test_a_difference_beyond_noise_is_named_among_those_tested() -> None:
    said = section_of("quality", made.quality(better=-0.02)).said[0]
    assert said.startswith("Beyond noise at 5%: ")
    assert "MMLU 5-shot (-2.76)" in said and "of 6 tested; chance alone makes 0.3 of them so" in said


def test_lost_points_are_said_with_their_reason() -> None:
    section = section_of("tools", FLASH["tools"])
    assert "selection 0: the second call has another city" in section.said
    assert "coding/1: has a button: no <button> in the page" in section.said
    assert [row[-1].text for row in section.tables[0].rows][-1] == "26/30"


def test_checks_that_hold_are_no_reason_for_lost_points() -> None:
    result = made.tools(lost=1)
    why = ["pass: holds: at most 4 calls: 1 call", "pass: fails: order a(), then b(): no call of b", "x" * 500]
    result["parts"]["selection/s0"]["why"] = why
    (said,) = section_of("tools", result).said[:1]
    assert said.startswith("selection 0: order a(), then b(): no call of b; xxx") and said.endswith("x…")
    assert len(said) < 200


def test_in_what_a_task_was_run_otherwise_is_said_beside_its_figure() -> None:
    assert headline_of(FLASH)["MMLU-Pro 5-shot"][1].note == "other prompts than published"


def test_how_far_servers_drifted_is_said() -> None:
    (table,) = section_of("speed", FLASH["speed"]).tables
    assert re.search(r"differed by at most [\d.]+% in TPOT, [\d.]+% in output throughput", table.note)


def test_how_a_bench_was_measured_is_all_there() -> None:
    told = dict(section_of("speed", FLASH["speed"]).provenance)
    assert {"model", "artifact", "SHA256SUMS", "image", "machine", "versions", "settings", "seed", "command"} <= set(
        told
    )
    assert told["machine"].startswith("8 x NVIDIA H200, driver 580")
    assert told["sha256 of prompts"] == "8" * 64
    assert told["from, to"] == "2026-11-26T01:02:03+00:00, 2026-11-26T03:04:05+00:00"


def drawings_of(bench: str) -> list[Drawing]:
    return list(benches.Told(bench, FLASH[bench]).drawn.drawings)


def test_figures_of_the_same_rows_have_the_same_bytes() -> None:
    for bench in benches.BENCHES:
        assert drawings_of(bench) == drawings_of(bench)


def test_figures_take_all_their_colours_from_the_page() -> None:
    style = (rendering.TEMPLATES / "style.html.j2").read_text()
    rows = layer_rows([layer(0), layer(1)])
    layers = [*layer_charts.loss_charts(rows), *layer_charts.token_charts(rows), *layer_charts.heat_map(rows)]
    for some in (layers, *map(drawings_of, benches.BENCHES)):
        for drawing in some:
            assert not re.search(r"#[0-9a-fA-F]{6}\b", drawing.svg), drawing.name
            for variable in set(re.findall(r"var\((--[\w-]+)\)", drawing.svg)):
                assert style.count(f"{variable}:") == 2, f"{variable} in light and in dark"


def test_ids_of_a_page_are_its_own() -> None:
    ids = re.findall(r'\bid="([^"]+)"', page.page(Inputs(benches=benches.told(FLASH))))
    assert len(ids) == len(set(ids))


def test_markdown_has_every_table_of_the_page() -> None:
    certificate = {"ok": True, "checks": CHECKS, "deep": DEEP}
    told = benches.told(FLASH)
    inputs = Inputs(certificate, [layer(0), layer(1)], RUN, MANIFEST, told)
    text = page.markdown(inputs)
    found = [table for each in told.values() for table in each.section.tables]
    found += [overview.table(inputs)]
    found += [published_comparison.table(told, published_comparison.pipeline(RUN, MANIFEST))]
    found += [prediction.table(DEEP), run_sections.losses_table(layer_rows([layer(0), layer(1)]))]
    found += [run_sections.certificate_table(artifact_folder.verdict(certificate))]
    for table in found:
        assert tables.markdown_table(table) in text, table.name
    assert "| 0 | CSA | 3.000 | 1.700 | 1.500 |" in text
    assert "Not measured: `make bench-speed`" in page.markdown(Inputs())


@given(st.text(), st.text())
def test_a_cell_of_markdown_is_one_line_with_as_many_bars_whatever_it_says(text: str, note: str) -> None:
    columns = [Column("a"), Column("b", False)]
    lines = tables.markdown_table(Table("t", "t", columns, [[Cell(text, note), Cell("x")]])).splitlines()
    assert len(lines) == 3
    assert len(re.findall(r"(?<!\\)\|", lines[2].replace("\\\\", ""))) == 3


@given(st.floats(0, 1))
def test_a_p_value_is_never_shown_as_zero(p: float) -> None:
    assert not re.search(r"= 0\.0+$", tables.p_value(p))


def test_a_share_without_a_value_is_a_dash() -> None:
    assert tables.percent(bench_drafts.UNKNOWN).text == tables.number(math.nan).text == "–"


def test_the_result_that_counts_is_the_newest_whole_one(tmp_path: Path) -> None:
    made.write(tmp_path, made.tools(trial=2), stamp="20261127T000000Z")
    made.write(tmp_path, made.tools(), stamp="20261126T000000Z")
    assert results.newest(tmp_path, benches.BENCHES)["tools"].path.name == "tools-20261126T000000Z.json"


BAD: dict[str, Any] = {
    "torn": lambda text: text[: len(text) // 2],
    "not an object": lambda text: "[]",
    "another bench": lambda text: json.dumps({**json.loads(text), "bench": "other"}),
    "another form": lambda text: json.dumps({**json.loads(text), "form": 2}),
    "no parts": lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "parts"}),
    "parts that are none": lambda text: json.dumps({**json.loads(text), "parts": {"k0": 1}}),
    "parts without keys": lambda text: json.dumps({**json.loads(text), "parts": {"k0/256x256/c1": {}}}),
    "parts of other types": lambda text: re.sub(r'"(tpot_ms|acceptance|metrics|score)": ', r'"\1": "x", "_": ', text),
    "no artifact's object": lambda text: text.replace('"artifact": {', '"artifact": "a", "_": {', 1),
    "bytes": lambda text: "\udcff",
}


@pytest.mark.parametrize("bench", made.BENCHES)
@pytest.mark.parametrize("damage", BAD)
def test_a_bad_result_file_is_named_with_a_hint(tmp_path: Path, bench: str, damage: str) -> None:
    (path,) = made.write(tmp_path / "reports", made.BENCHES[bench]())
    path.write_bytes(BAD[damage](path.read_text()).encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=re.escape(path.name)) as raised:
        program.main(["--work", str(tmp_path)])
    assert raised.value.hint
    assert not (tmp_path / "reports/index.html").exists()


def test_rows_are_made_once_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    for name, bench in benches.BENCHES.items():
        spy = types.ModuleType(name)
        vars(spy).update(vars(bench))

        def rows(result: Any, name: str = name, real: Any = bench.rows) -> Any:
            asked.append(name)
            return real(result)

        monkeypatch.setattr(spy, "rows", rows)
        monkeypatch.setitem(benches.BENCHES, name, spy)
    made.write(tmp_path / "reports", *made.full())
    program.main(["--work", str(tmp_path)])
    assert asked == list(benches.BENCHES)


FIFTH = '''"""A bench of how long a nap takes."""

from v4forge.reporting import svg
from v4forge.reporting.tables import Cell, Drawing, Figure, Found, Table, columns, number

TITLE, SAID = "Naps by place", "On naps"


def rows(result):
    return {key: part["minutes"] for key, part in result["parts"].items()}


def tables(found, worth):
    lines = [[Cell(place), number(minutes)] for place, minutes in found.items()]
    return [Table("naps", "Naps", columns("<place", "minutes"), lines)], ["a nap is short"]


def overview(found, worth):
    return Cell(f"{max(found.values())} minutes at most")


def published(found):
    return {f"nap/{place}": Found(minutes) for place, minutes in found.items()}


def figures(found):
    return [Figure(place, "minutes", minutes, "min") for place, minutes in found.items()]


def drawings(found, worth):
    with svg.drawing() as drawn:
        drawn.line(range(len(found)), list(found.values()), svg.series(0))
        return [Drawing("naps-drawn", "Minutes", drawn.svg("naps-drawn", "Minutes", "by place"))]
'''


def test_a_fifth_bench_is_one_module_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("bench_naps")
    exec(FIFTH, vars(module))
    monkeypatch.setitem(benches.BENCHES, "nap", module)
    naps = made.facts("nap", tiny=False, trial=None) | {
        "parts": {"sofa": {"minutes": 20.5}, "hammock": {"minutes": 30}}
    }
    made.write(tmp_path / "reports", naps)
    program.main(["--work", str(tmp_path)])

    page = (tmp_path / "reports/index.html").read_text()
    assert re.search(r"Naps by place</th>\s*<td class=\"\">30 minutes at most</td>", page), "the overview's row"
    assert '<table id="naps"' in page and "20.50" in page and "<li>a nap is short</li>" in page
    assert re.search(r'<figure id="figure-naps-drawn">.*?<svg class="figure"', page, re.DOTALL)
    text = (tmp_path / "reports/benchmarks.md").read_text()
    assert "this artifact,nap,sofa,minutes,20.5,,,min\n" in (tmp_path / "reports/figures.csv").read_text()
    assert "## Naps by place\n" in text and "| sofa | 20.50 |" in text
    (tmp_path / "reports" / f"nap-{made.STAMP}.json").unlink()
    made.write(tmp_path / "reports", made.tools())
    program.main(["--work", str(tmp_path)])
    assert "Not measured: `make bench-nap`" in (tmp_path / "reports/benchmarks.md").read_text()


def test_tables_of_the_benches_are_made_without_matplotlib() -> None:
    code = "import sys; from v4forge.reporting import calibration_page, card, page; "
    code += "sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_term_of_the_field_is_spelled_out_once_and_before_it_is_used() -> None:
    """On the page and in its Markdown."""
    inputs = Inputs(benches=benches.told(TINY))
    for text, form in (
        (html.unescape(page.page(inputs)), "<dt>{}</dt><dd>{}</dd>"),
        (page.markdown(inputs), "{}: {}."),
    ):
        text = text.replace("\\", "")
        for name, meaning in terms.TERMS.items():
            assert text.count(form.format(name, meaning)) == 1, name
        assert text.index(terms.TERMS["TPOT"]) < text.index("TPOT speed-up")
        assert "a token, against" not in text and "at once" not in text and "first draft" not in text


def test_the_acceptance_length_is_one_token_and_the_accepted_drafts_of_a_step() -> None:
    part = FLASH["draft"]["parts"]["code"]
    (row,) = [row for row in bench_drafts.rows(FLASH["draft"]).workloads if row.workload == "code"]
    assert row.length == pytest.approx(1 + sum(part["accepted_at"]) / part["drafts"])
    assert math.isnan(terms.acceptance_length(0, 0))
    speed = next(row for row in at_rates().rows.points if row.drafts == 3)
    assert bench_speed._acceptance(speed) == Cell("48.0%", "length 2.44")


def test_itl_is_shown_where_a_file_has_it() -> None:
    result = made.speed(tiny=True)
    heads = [column.title for column in section_of("speed", result).tables[0].columns]
    assert "ITL, ms" not in heads and "TPOT, ms" in heads
    result["parts"]["k0/256x256/c1"]["itl_ms"] = {"median": 9.0, "p99": 12.5}
    table = section_of("speed", result).tables[0]
    at = [column.title for column in table.columns].index("ITL, ms")
    assert table.rows[1][at] == Cell("9.00", "p99 12.5") and table.rows[2][at] == tables.NONE


def with_rates(result: dict[str, Any]) -> dict[str, Any]:
    """The result, and two rates at each k of the first shape."""
    for k in (0, 1, 2, 3):
        for rate in (0.5, 2):
            part = made.speed_part(k, (256, 256), 4, 1.0, 7, again=False)
            result["parts"][f"k{k}/256x256/r{rate:g}"] = part | {"concurrency": None, "request_rate": rate}
    return result


@cache
def at_rates() -> benches.Told:
    """Of one shape."""
    result = made.speed()
    result["parts"] = {key: part for key, part in result["parts"].items() if "/256x256/" in key}
    return benches.Told("speed", with_rates(result))


def test_points_at_a_rate_stand_behind_those_at_a_concurrency_without_gains() -> None:
    speed = at_rates().rows
    some = speed.points
    assert [row.load for row in some[-8:]] == ["0.5 req/s"] * 4 + ["2 req/s"] * 4
    assert all(row.gain is None for row in some[-8:]) and len(speed.closed) == 12
    assert "0.5 req/s" in tables.markdown_table(at_rates().section.tables[0])


def test_what_k_brings_is_one_without_drafts_and_told_at_each_k() -> None:
    (drawn,) = [each for each in at_rates().drawn.drawings if each.name == "speed-k-256x256"]
    said = re.findall(r"<title>([^<]+)</title>", drawn.svg)
    assert "k=0: TPOT speed-up 1.00" in said and "k=3: acceptance length 2.44, acceptance rate 48.0%" in said
    assert any(re.fullmatch(r"k=3: throughput ratio 0\.\d\d", each) for each in said), "at the most at a time"
    without = [replace(row, gain=None) for row in at_rates().rows.closed]
    assert speed_charts._by_k("a", "a", without) == []


def test_throughput_is_per_gpu_and_pareto_s_frontier_is_what_nothing_beats() -> None:
    speed = at_rates().rows
    assert (speed.gpus, speed.machine_gpus) == (2, 8)
    some = [row for row in speed.points if row.shape == "256x256"]
    best = speed_charts.frontier(some)
    for row in some:
        beats = [other for other in some if other.user_tok_s > row.user_tok_s and other.output_tok_s > row.output_tok_s]
        assert (row in best) == (not beats), row.load
    drawn = {each.name: each for each in at_rates().drawn.drawings}
    text = drawn["speed-pareto-256x256"].svg
    assert "k=0, 2 req/s: " in text and "tok/s per GPU, " in text and "at a rate" in text
    tiny = bench_speed.rows(made.speed(tiny=True))
    assert tiny.gpus is None, "a CPU has none"


def csv_of(inputs: Inputs) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(figures_csv.text(inputs))))


def test_the_csv_has_a_line_a_figure_of_every_bench_layer_and_model() -> None:
    certificate = {"ok": True, "checks": CHECKS, "deep": DEEP}
    told = {**benches.told(FLASH), "speed": at_rates()}
    inputs = Inputs(certificate, [layer(0), layer(1, True)], RUN, MANIFEST, told, price=40)
    lines = csv_of(inputs)
    found = {(each["about"], each["part"], each["figure"]): each for each in lines}
    assert len(found) == len(lines) and {each["of"] for each in lines} == {"this artifact"}
    part = at_rates().result["parts"]["k3/256x256/c1"]
    assert float(found["speed", "k3/256x256/c1", "TPOT, median"]["value"]) == part["tpot_ms"]["median"]
    per_gpu = float(found["speed", "k3/256x256/c1", "output throughput per GPU"]["value"])
    assert per_gpu == pytest.approx(part["output_tok_s"] / 2)
    cost = float(found["speed", "k3/256x256/c1", "cost per million output tokens"]["value"])
    assert cost == pytest.approx(40 * (2 / 8) / 3600 / part["output_tok_s"] * 1e6)
    speedup = found["speed", "k3/256x256/c1", "TPOT speed-up"]
    assert float(speedup["low"]) < float(speedup["value"]) < float(speedup["high"])
    assert ("draft", "code", "acceptance rate at position 2, where all earlier were accepted") in found
    assert found["quality", "gsm8k", "strict"]["unit"] == "%" and found["tools", "recovery", "points for tool calls"]
    assert ("prediction", "GPTQ", "KL divergence a token") in found
    assert found["calibration", "layer 1", "starved experts"]["value"] == "1"


def test_in_the_csv_what_is_of_another_artifact_says_so() -> None:
    inputs = Inputs(benches=benches.told(TINY, "1" * 64))
    assert {each["of"] for each in csv_of(inputs)} == {"another artifact, SHA256SUMS 555555555555…"}
    assert csv_of(Inputs()) == []


def test_a_price_says_what_tokens_cost_on_the_page_and_not_in_the_markdown() -> None:
    inputs = Inputs(benches=benches.told({"speed": TINY["speed"]}), price=40)
    assert "At 40 an hour of the machine, all of which is charged" in page.page(inputs)
    assert page.markdown(inputs) == page.markdown(replace(inputs, price=None)), "which a release is checked by"
    assert page._priced(inputs.benches["speed"], None) == inputs.benches["speed"].drawn
    found = cost.table(at_rates().rows, 40)
    assert "of whose 8 GPUs the 2 that served are charged" in found.note
    least = [cell for row in found.rows for cell in row if cell.mark == "good"]
    assert len(least) == 1, "one a shape"


@pytest.mark.parametrize("price", ["0", "-3", "nan", "inf"])
def test_a_price_that_is_none_is_refused(tmp_path: Path, price: str) -> None:
    made.write(tmp_path / "reports", made.tools())
    with pytest.raises(UserError, match="an hour is none"):
        program.main(["--work", str(tmp_path), "--price", price])
