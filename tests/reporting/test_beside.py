"""v4forge.reporting.beside: the artifact beside a baseline, in report, Markdown, CSV, card and `make compare`."""

from __future__ import annotations

import csv
import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_results as made
import card_inputs
import pytest

from scripts import compare as compare_program
from scripts import report as program
from v4forge.errors import UserError
from v4forge.reporting import benches, beside, card, card_subject, overview, page
from v4forge.reporting.inputs import Inputs

UPSTREAM = {
    "folder": "/machine/place/upstream",
    "sums_sha256": None,
    "config_sha256": "c" * 64,
    "certificate": "missing",
}


def of_upstream(result: dict[str, Any]) -> dict[str, Any]:
    """As measured of another folder, that nobody has summed."""
    result["target"]["artifact"] |= UPSTREAM
    return result


def inputs() -> Inputs:
    ours = benches.told({"quality": made.quality(better=-0.05), "tools": made.tools()})
    baseline = benches.told({"quality": of_upstream(made.quality()), "tools": of_upstream(made.tools())})
    return Inputs(benches=ours, baseline=baseline)


def test_page_and_markdown_set_both_beside_each_other_with_a_verdict() -> None:
    found = inputs()
    assert found.beside and found.beside.title == "Beside the baseline, upstream (cccccccccccc…)"
    said = "of 8 tested figures this artifact is beyond noise worse in 4 (quality 4)"
    assert found.beside.verdict.startswith(said)
    (line,) = [row for row in overview.table(found).rows if row[0].text == "Beside the baseline"]
    assert line[1].text == found.beside.verdict
    rows = {row[0].text: row for row in found.beside.table.rows if len(row) > 1}
    mmlu = rows["mmlu: accuracy"]
    assert (mmlu[1].text, mmlu[2].text) == ("86.12%", "81.12%") and mmlu[3].mark == "bad"
    assert mmlu[3].text == "-5.00 points" and "p < 0.001" in mmlu[3].note
    text = page.page(found)
    assert '<section id="part-baseline">' in text and '<a href="#part-baseline">' in text and f"<p>O{said[1:]}" in text
    assert "| mmlu: accuracy | 86.12% | 81.12% |" in page.markdown(found)
    assert "/machine/place" not in text


def test_what_was_not_measured_alike_is_said() -> None:
    other = of_upstream(made.tools())
    other["target"]["options"] = {"max-model-len": "8192"}
    found = beside.beside(benches.told({"tools": made.tools()}), benches.told({"tools": other}))
    assert found and found.said[0] == "tools: not measured alike, but for the checkpoint: target.options.max-model-len"
    trial = beside.beside(
        benches.told({"tools": made.tools()}), benches.told({"tools": of_upstream(made.tools(trial=2))})
    )
    assert trial and "tools: baseline: a trial of 2: not a result" in trial.said


def test_a_baseline_of_other_benches_or_parts_is_not_compared() -> None:
    ours = benches.told({"tools": made.tools()})
    assert beside.beside(ours, {}) is None
    assert beside.beside(ours, benches.told({"draft": made.draft()})) is None
    found = Inputs(benches=ours, baseline=benches.told({"draft": made.draft()}))
    assert overview.table(found).rows[-1][1].text == "no bench was run on both"
    assert "part-baseline" not in page.page(found)


def test_many_figures_are_folded() -> None:
    found = inputs().beside
    assert found and not found.folded
    assert replace(found, table=replace(found.table, rows=[*found.table.rows] * 3)).folded


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A work folder whose artifact and baseline were measured."""
    card_inputs.write(tmp_path / "work", card_inputs.TINY_CONFIG, repo=None, results=[made.tools()])
    made.write(tmp_path / "work/reports/baseline", of_upstream(made.tools(lost=12)))
    return tmp_path / "work"


def test_the_reports_folder_has_a_place_for_it_that_report_compare_and_card_read(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program.main(["--work", str(work)])
    text = (work / "reports/index.html").read_text()
    assert "Beside the baseline, upstream (cccccccccccc…)" in text
    lines = list(csv.DictReader((work / "reports/figures.csv").open()))
    assert {line["of"] for line in lines if line["about"] == "tools"} == {"this artifact", "baseline"}
    capsys.readouterr()
    compare_program.main([str(work / "reports/baseline"), str(work / "reports")])
    verdict = capsys.readouterr().out.splitlines()[0]
    said = verdict.removeprefix("verdict: ").replace("A and B", "the baseline and this artifact")
    assert verdict.startswith("verdict: ") and said.replace(" B is", " this artifact is") in text
    shown = card.text(card_subject.gathered(work, work / "artifact"))
    assert "### Beside the baseline, upstream (cccccccccccc…)" in shown and "/machine/place" not in shown
    assert "| tool calls, 15 of them" in shown and "; beyond noise)" in shown, "which has no colours"
    assert shown.index(said[1:].replace(" B is", " this artifact is")) < shown.index("| tool calls, 15 of them")


def test_a_baseline_s_file_of_another_form_is_named(work: Path) -> None:
    (path,) = (work / "reports/baseline").iterdir()
    path.write_text("{")
    with pytest.raises(UserError, match=re.escape(f"baseline/{path.name}")):
        program.main(["--work", str(work)])


def test_results_of_another_artifact_are_not_set_beside_it(tmp_path: Path) -> None:
    sums = hashlib.sha256(b"ours").hexdigest()
    found = Inputs(benches=benches.told({"tools": made.tools()}, sums), baseline=inputs().baseline, sums=sums)
    assert found.beside is None
