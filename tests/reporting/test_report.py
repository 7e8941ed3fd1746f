"""v4forge.reporting.page and scripts.report, on hand-written inputs."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import bench_results as made
import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_files import CHECKS, DEEP, MANIFEST, RUN, SOURCE_FILES, layer

from scripts import report as program
from scripts import stage
from v4forge import artifact_folder
from v4forge.errors import UserError
from v4forge.quantization import layer_reports
from v4forge.quantization.layer_reports import layer_rows
from v4forge.reporting import calibration_page, layer_charts, page, run_sections, svg
from v4forge.reporting.inputs import Inputs
from v4forge.reporting.tables import Drawing, markdown_table


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """What a finished run leaves: reports/, layers/ and artifact/."""
    layers = {f"layers/layer-{i:03}.json": layer(i, blended=i == 1) for i in range(3)}
    sums = hashlib.sha256(b"sums").hexdigest()
    files: dict[str, Any] = {
        "reports/run.json": RUN,
        "artifact/certificate.json": {"ok": True, "sums_sha256": sums, "checks": CHECKS, "deep": DEEP},
        "artifact/manifest.json": MANIFEST,
        **layers,
    }
    for name, value in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(value))
    (tmp_path / "artifact/SHA256SUMS").write_bytes(b"sums")
    return tmp_path


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def call(folder: Path) -> int:
    return program.main(["--work", str(folder)])


def test_a_good_run_ends_with_certificate_ok(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(run_folder) == 0
    assert capsys.readouterr().out.endswith("\ncertificate: ok\n")


def test_a_whole_that_has_nothing_to_do_shows_the_result_again_and_what_comes_next(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = Path(shutil.copytree(run_folder, run_folder / "a b/tiny"))
    words = ["run", "fetch", "--title", "demo", "--next", "make plan", "--scratch", str(work.parent)]
    assert stage.main(words) == 0  # the source of tiny is models/tiny: nothing to fetch
    first, *table, certificate, page_at, after = capsys.readouterr().out.splitlines()
    assert first == "demo: nothing to do, everything is up to date" and certificate == "certificate: ok"
    assert any(line.split()[:1] == ["GPTQ"] for line in table)
    assert page_at == f"open: file://{run_folder}/a%20b/tiny/reports/index.html" and after == "next: make plan"


def test_a_failed_check_is_exit_code_1_and_named(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checks = copy.deepcopy(CHECKS)
    checks[1] |= {"ok": False, "detail": "layers.0.attn.wq_a.weight differs"}
    change(run_folder / "artifact/certificate.json", ok=False, checks=checks)
    assert call(run_folder) == 1
    out = capsys.readouterr().out
    assert out.endswith("\ncertificate: FAILED (1 of 3 checks)\n")
    assert "failed: pass-through: layers.0.attn.wq_a.weight differs" in out
    assert "certificate: FAILED (1 of 3 checks)" in (run_folder / "reports/index.html").read_text()


@given(st.lists(st.booleans(), max_size=6), st.booleans())
def test_a_certificate_is_ok_only_if_it_and_every_check_say_so(oks: list[bool], ok: bool) -> None:
    checks = [{"name": str(i), "ok": value, "detail": ""} for i, value in enumerate(oks)]
    verdict = artifact_folder.verdict({"ok": ok, "checks": checks})
    assert verdict.ok == (ok and oks != [] and all(oks))
    assert (verdict.line == "certificate: ok") == verdict.ok
    assert [check.ok for check in verdict.checks] == sorted(oks), "failed checks come first"


def test_a_certificate_of_other_files_is_refused(run_folder: Path) -> None:
    (run_folder / "artifact/SHA256SUMS").write_bytes(b"other sums")
    with pytest.raises(UserError, match="is about other files") as raised:
        call(run_folder)
    assert raised.value.hint == "make verify"


def test_the_table_has_each_model_with_its_changes(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(run_folder)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["source", "18.4", "10.000", "60.0%"] in rows
    assert ["round-to-nearest", "21.9", "0.0240±0.0020", "91.8%", "10.800", "57.0%"] in rows
    assert ["GPTQ", "21.9", "0.0110±0.0020", "94.7%", "10.250", "59.0%"] in rows


def test_a_table_of_a_large_model_fits_80_columns(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deep: dict[str, Any] = copy.deepcopy(DEEP)
    for figures in deep["models"].values():
        figures["bytes"] = 167_000_000_000
    change(run_folder / "artifact/certificate.json", deep=deep)
    call(run_folder)
    out = capsys.readouterr().out
    assert "167,000.0" in out and " same " in out and "…" not in out


def test_seconds_are_listed_in_the_order_in_which_stages_began(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(run_folder)
    assert "seconds: calibrate 40.5, verify 6.0, together 46.5\n" in capsys.readouterr().out


def test_the_page_shows_the_layers_of_the_images_that_stages_ran_in() -> None:
    image = {"id": "sha256:abc", "lane": "cpu", "layers": [{"bytes": 3 << 20, "step": "imported"}]}
    image["layers"].append({"bytes": 1 << 19, "step": "RUN <it>"})
    run = {name: {**entry, "image": image} for name, entry in RUN.items()}
    text = page.page(Inputs(run=run))
    assert "sha256:abc</code>, lane cpu, ran calibrate, verify." in text
    assert re.findall(r'<t[dh] class="n">(\d+\.\d)</t[dh]><t[dh]>(.+)</t[dh]>', text) == [
        *(("3.0", "imported"), ("0.5", "RUN &lt;it&gt;"), ("3.5", "together")),
    ]
    assert "lane" not in page.page(Inputs(run=RUN))


def test_a_run_without_run_json_has_no_seconds(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_folder / "reports/run.json").unlink()
    assert call(run_folder) == 0
    assert "seconds" not in capsys.readouterr().out
    assert "Seconds" not in (run_folder / "reports/index.html").read_text()


@pytest.mark.parametrize(
    ("missing", "what", "command"),
    [
        ("artifact/certificate.json", "Prediction beside the source", "python -m scripts.verify … --deep N"),
        ("artifact/certificate.json", "Certificate", "make verify"),
        ("artifact/manifest.json", "Artifact", "make postprocess"),
        ("layers", "Losses by layer", "make calibrate"),
        ("reports/speed.json", "Speed by concurrency", "make bench-speed"),
        ("reports/draft.json", "Acceptance by workload", "make bench-draft"),
        ("reports/quality.json", "Quality", "make bench-quality"),
        ("reports/tools.json", "Tool calls and conversations", "make bench-tools"),
    ],
)
def test_what_is_not_there_is_said_with_the_command_that_makes_it(
    run_folder: Path, missing: str, what: str, command: str
) -> None:
    path = run_folder / missing
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    assert call(run_folder) == 0
    text = " ".join(Page((run_folder / "reports/index.html").read_text()).text.split())
    assert f"{what} not measured {command}" in text


def test_a_run_without_a_certificate_says_so_in_its_last_line(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_folder / "artifact/certificate.json").unlink()
    assert call(run_folder) == 0
    assert capsys.readouterr().out.endswith("\ncertificate: not there (make verify)\n")
    assert "certificate: ok" not in (run_folder / "reports/index.html").read_text()


@pytest.mark.parametrize("folders", [(), ("reports", "layers", "artifact")])
def test_a_folder_in_which_there_is_nothing_is_an_error(tmp_path: Path, folders: tuple[str, ...]) -> None:
    for name in folders:
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="holds nothing to report on"):
        call(tmp_path)
    assert not (tmp_path / "reports/index.html").exists()


def test_a_certificate_without_the_sums_it_is_about_is_refused(run_folder: Path) -> None:
    (run_folder / "artifact/SHA256SUMS").unlink()
    with pytest.raises(UserError, match="SHA256SUMS does not exist") as raised:
        call(run_folder)
    assert raised.value.hint == "make postprocess"


def test_figures_of_another_form_are_named(run_folder: Path) -> None:
    change(run_folder / "artifact/certificate.json", deep={"models": {}})
    with pytest.raises(UserError, match=r"certificate\.json has no 'source'") as raised:
        call(run_folder)
    assert raised.value.hint == "make verify"


def test_figures_that_an_earlier_verify_wrote_are_shown(run_folder: Path) -> None:
    """Of source and artifact alone, without the text that they are of and sizes."""
    deep: dict[str, Any] = copy.deepcopy({key: DEEP[key] for key in ("tokens", "sequences", "models")})
    del deep["models"]["round-to-nearest"]
    for figures in deep["models"].values():
        del figures["bytes"], figures["made"]
    change(run_folder / "artifact/certificate.json", deep=deep)
    assert call(run_folder) == 0
    text = " ".join(Page((run_folder / "reports/index.html").read_text()).text.split())
    assert "source this artifact perplexity 10.000" in text and "16,352 tokens in 32 sequences." in text


@pytest.mark.parametrize("name", ["layers/layer-001.json", "artifact/certificate.json"])
@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"models": 1, "checks": 1, "layer": 1, "tokens": 1}'])
def test_a_file_of_another_form_is_named(run_folder: Path, name: str, content: str) -> None:
    (run_folder / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(name)):
        call(run_folder)


class Page(HTMLParser):
    """Collects what a browser would load, the text, and tags that are not closed."""

    VOID = ("meta", "link", "line", "circle", "polyline", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.note(attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.note(attrs)

    def note(self, attrs: list[tuple[str, str | None]]) -> None:
        if self.tags[-1:] == ["a"]:  # what one may click on is not loaded
            self.links += [value or "" for name, value in attrs if name == "href"]
            return
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "


def test_the_pages_load_nothing_and_run_nothing(run_folder: Path) -> None:
    made.write(run_folder / "reports", *made.full())
    call(run_folder)
    for text in ((run_folder / "reports/index.html").read_text(), calibration_page.page([layer(0), layer(1, True)])):
        page = Page(text)
        assert [load for load in page.loads if not load.startswith("#")] == ["data:,"]
        assert not {"script", "iframe", "img", "object"} & set(page.tags)
        assert "url(" not in text and "@import" not in text
        assert page.open == []


def test_the_page_of_calibration_shows_losses_tokens_seconds_and_memory() -> None:
    page = Page(calibration_page.page([layer(1, blended=True), layer(0)]))
    text = " ".join(page.text.split())
    assert "2 layers of 2 experts" in text
    assert "3.000 1.700 1.500 -50%" in text, "of round-to-nearest, at the same scales, of GPTQ: means"
    assert "1 17 458 900 1 of 2 0 (17)" in text
    assert "0 2 2.50 0.75 0.50 3.00 5.00 1 2 2.50" in text, "each of the rank with the most"
    assert page.tags.count("svg") == 6


def test_the_pages_tell_how_much_of_what_gptq_saves_is_its_scales() -> None:
    text = " ".join(Page(calibration_page.page([layer(0)])).text.split())
    assert "on 6 of 6 matrices, and less than round-to-nearest at the same scales (those" in text
    assert "that GPTQ begins with) on 3." in text
    assert "loses 3.000%, at the same scales 1.700%, and GPTQ 1.500%: 87% of what GPTQ saves" in text


def test_a_report_of_before_shows_the_losses_that_it_has() -> None:
    before = layer(0)
    before["error"] = {kind: {m: by[m] for m in ("rtn", "gptq")} for kind, by in before["error"].items()}
    for layers in ([before], [before, layer(1)]):
        text = " ".join(Page(calibration_page.page(layers)).text.split())
        assert "3.000 1.500 -50%" in text and "same scales" not in text
        table = markdown_table(run_sections.losses_table(layer_rows(layers)))
        assert "| 0 | CSA | 3.000 | – | 1.500 |" in table


def test_a_layer_that_keeps_its_experts_has_no_loss_and_the_pages_say_so() -> None:
    kept = {**layer(0), "stored": "mxfp4", "error": {}}
    text = " ".join(Page(calibration_page.page([kept, {**layer(1), "stored": "int4"}])).text.split())
    assert "without a loss: the experts of layer 0, which keep upstream’s own FP4 bytes (recipe mixed)" in text
    assert "0 CSA upstream’s FP4 upstream’s FP4 upstream’s FP4 1 CSA 3.000 1.700" in text
    assert "on 6 of 6 matrices" in text
    table = markdown_table(run_sections.losses_table(layer_rows([kept, layer(1)])))
    assert f"| 0 | CSA |{' – |' * 9}" in table
    assert "0 of 0 matrices" in calibration_page.page([kept]), "where every layer is one"


def test_the_page_shows_losses_thin_experts_checks_and_provenance(run_folder: Path) -> None:
    change(run_folder / "layers/layer-002.json", fallback=["w2 of expert 1"])
    call(run_folder)
    text = " ".join(Page((run_folder / "reports/index.html").read_text()).text.split())
    assert "GPTQ lost less than round-to-nearest on 18 of 18 matrices" in text
    assert "3.000 1.700 1.500 -50%" in text, "of round-to-nearest, at the same scales, of GPTQ: means"
    assert "1 of 6 experts, in 1 of 3 layers" in text
    assert "1 of 2 0 (17)" in text
    assert "Layer 2, round-to-nearest instead of GPTQ: w2 of expert 1" in text
    assert "pass-through ok 118 tensors equal" in text
    assert "settings.dampening 0.01" in text and "versions.torch 2.x+cpu" in text
    assert "https://example.org/corpus <b>" in text, "a manifest's text is text, not markup"
    assert "50 values, in manifest.json" in text, "which documents were used is too long to read"


def test_a_listing_of_files_becomes_one_digest_that_depends_on_each_of_them() -> None:
    def source_row(files: dict[str, Any]) -> str:
        return dict(run_sections.provenance({"source": {"files": files}})[0][1])["source.files"]

    row = source_row(SOURCE_FILES)
    assert row.startswith("2 files, 18.0 MB; sha256 of their list ")
    assert source_row(dict(reversed(SOURCE_FILES.items()))) == row
    assert source_row({**SOURCE_FILES, "model-2.safetensors": {"sha256": "9" * 64, "bytes": 9_000_000}}) != row


@given(st.floats(0, 1e6))
def test_an_axis_covers_its_data_in_at_most_five_even_steps(highest: float) -> None:
    ticks = svg.axis(highest)
    assert ticks[0] == 0 and ticks[-1] >= highest * (1 - 1e-6) and 2 <= len(ticks) <= 6
    steps = [b - a for a, b in itertools.pairwise(ticks)]
    assert all(step == pytest.approx(steps[0], rel=1e-3) and step > 0 for step in steps)


@given(st.integers(0, 10**6), st.integers(1, 10**6))
def test_a_logarithmic_axis_encloses_its_counts_in_few_ticks(fewest: int, more: int) -> None:
    most = layer_charts.LOG_RATIO * fewest + more
    ticks = svg.log_axis(fewest, most)
    assert ticks == sorted(set(ticks)) and ticks[0] <= fewest and ticks[-1] >= most
    assert 2 <= len(ticks) <= 10
    assert (ticks[0] == 0) == (fewest == 0)


Place = tuple[float, float]


def marks_of(drawing: Drawing) -> dict[str, Place]:
    """What is said when one points at a mark -> where it is, downwards."""
    marks = re.findall(
        r"<title>([^<]+)</title>\n<path.*?<use [^>]*x=\"([\d.]+)\" y=\"([\d.]+)\"", drawing.svg, re.DOTALL
    )
    return {said: (float(x), float(y)) for said, x, y in marks}


def line_of(drawing: Drawing, layers: int, said: str) -> list[Place]:
    """The marks of a line, by layer."""
    marks = marks_of(drawing)
    found = [[mark for tip, mark in marks.items() if re.match(f"layer {i}, .*{said}", tip)] for i in range(layers)]
    assert all(len(each) == 1 for each in found), "a mark a layer"
    return [each[0] for each in found]


def labels_of(drawing: Drawing, anchor: str) -> list[str]:
    return re.findall(rf"text-anchor: {anchor};[^>]*>([^<]+)</text>", drawing.svg)


def inside(drawing: Drawing) -> tuple[Place, Place]:
    """The least and the most x and y between the axes, where the lines across are."""
    across = re.findall(
        r"M ([\d.]+) ([\d.]+)\nL ([\d.]+) [\d.]+\n\" style=\"fill: none; stroke: var\(--line\)", drawing.svg
    )
    left, height, right = zip(*(map(float, each) for each in across), strict=True)
    return (min(left), min(height)), (max(right), max(height))


@pytest.mark.parametrize("layers", [1, 4, 43])
@pytest.mark.parametrize("tokens", [[17, 900], [0, 900], [0, 0], [600, 900], [800_000, 1_000_000]])
def test_every_layer_has_its_points_inside_the_charts(layers: int, tokens: list[int]) -> None:
    rows = layer_rows([{**layer(i, blended=i % 2 == 1), "tokens": tokens} for i in range(layers)])
    losses, counts = layer_charts.loss_charts(rows), layer_charts.token_charts(rows)
    for chart in (*losses, *counts):
        numbers = [label for label in labels_of(chart, "middle") if label != "layer"]
        assert 0 < len(numbers) <= layer_charts.X_LABELS
        (left, top), (right, bottom) = inside(chart)
        assert all(left <= x <= right and top <= y <= bottom for x, y in marks_of(chart).values())
        assert ('class="pointed"' in chart.svg) == (layers > layer_charts.MANY)
    for chart in losses:
        lines = [line_of(chart, layers, f"{loss}%") for loss in ("3", "1.7", "1.5")]
        assert all(r[1] < s[1] < g[1] for r, s, g in zip(*lines, strict=True)), "less loss is lower"
    fewest, most = line_of(counts[0], layers, "fewest"), line_of(counts[0], layers, "most")
    assert len(line_of(counts[0], layers, "median")) == len(line_of(counts[1], layers, "of 2 experts")) == layers
    assert all(few[1] >= many[1] for few, many in zip(fewest, most, strict=True))


@pytest.mark.parametrize(("most", "logarithmic"), [(20_000, False), (20_001, True)])
def test_tokens_of_very_different_counts_have_a_logarithmic_axis(most: int, logarithmic: bool) -> None:
    chart = layer_charts.token_charts(layer_rows([{**layer(0), "tokens": [1_000, most]}]))[0]
    assert ("logarithmic" in chart.title) == logarithmic
    assert labels_of(chart, "end") == (
        ["1k", "2k", "5k", "10k", "20k", "50k"] if logarithmic else ["0", "5k", "10k", "15k", "20k"]
    )


def test_charts_of_the_same_layers_have_the_same_bytes() -> None:
    rows = layer_rows([layer(i, blended=i == 1) for i in range(3)])
    assert layer_charts.loss_charts(rows) == layer_charts.loss_charts(rows)
    assert layer_charts.token_charts(rows) == layer_charts.token_charts(rows)


def blocks_of(drawing: Drawing) -> list[tuple[str, float, bool]]:
    """What is said when one points at each block of a heat map, how wide it is, whether it is red."""
    found = re.findall(
        r"<title>([^<]+)</title>\n<path d=\"M ([\d.]+) .*?\nL ([\d.]+) .*?fill: ([^;\"]+)", drawing.svg, re.DOTALL
    )
    return [(said, float(right) - float(left), "bad" in fill) for said, left, right, fill in found]


def test_every_expert_of_every_layer_is_in_the_heat_map_and_the_starved_are_red_and_first() -> None:
    tokens = [300, 17, 900, 300, 40, 4000, 310, 305]
    starved = [{"expert": 1, "tokens": 17, "inputs": "w1, w3"}, {"expert": 4, "tokens": 40, "inputs": "w1, w3"}]
    (drawn,) = layer_charts.heat_map(
        layer_rows([{**layer(0), "tokens": tokens, "blended": starved}, {**layer(1), "tokens": [5] * 8}])
    )
    found = blocks_of(drawn)
    assert found[0][0] == "layer 0: 2 of 8 experts, 17 to 40 tokens, starved" and found[0][2]
    assert [said for said, *_ in found[1:]] == [
        "layer 0: 4 of 8 experts, 300 to 310 tokens",
        "layer 0: 1 of 8 experts, 900 tokens",
        "layer 0: 1 of 8 experts, 4,000 tokens",
        "layer 1: 8 of 8 experts, 5 tokens",
    ]
    assert sum(width for _, width, _ in found[:-1]) == pytest.approx(found[-1][1], rel=1e-3)
    assert not any(bad for *_, bad in found[1:])


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=40))
def test_runs_of_a_heat_map_hold_each_expert_once_by_its_tokens(tokens: list[int]) -> None:
    (row,) = layer_rows([{**layer(0), "tokens": tokens}])
    runs = layer_charts._runs(row, set())
    order = [expert for _, run in runs for expert in run]
    assert sorted(order) == list(range(len(tokens))) and [tokens[e] for e in order] == sorted(tokens)
    assert [begin for begin, _ in runs] == list(itertools.accumulate((len(run) for _, run in runs[:-1]), initial=0))


def test_the_median_of_a_layer_is_one_in_its_line_and_in_the_report() -> None:
    even = {**layer(0), "tokens": [1, 2, 5, 9]}
    assert layer_rows([even])[0].median == 3.5 and "median 3.5," in layer_reports.summary(even)


def about(folder: Path) -> str:
    text = (folder / "reports/index.html").read_text()
    return " ".join(Page(text[text.index('<section id="part-about">') : text.index("<nav")]).text.split())


def test_the_page_begins_with_what_it_is_of_and_links_what_there_is(run_folder: Path) -> None:
    machine = {"gpus": ["NVIDIA H200"] * 2, "driver": "580", "cpu": "A CPU", "cores": 192, "memory_bytes": 2 << 40}
    run = {name: {**stage, "machine": machine, "revision": "c" * 40} for name, stage in RUN.items()}
    change(run_folder / "reports/run.json", **run)
    (run_folder / "artifact/config.json").write_text(json.dumps(made.TINY_SIZE))
    made.write(run_folder / "reports", made.tools())
    measured = {**made.tools(), "target": {**made.tools()["target"]}}
    measured["target"]["artifact"] = {**made.TINY_SIZE, "sums_sha256": hashlib.sha256(b"sums").hexdigest()}
    made.write(run_folder / "reports", measured)
    (run_folder / "reports/card.html").write_text("card")
    call(run_folder)
    said = about(run_folder)
    assert "model DeepSeek-V4 of 4 layers, hidden size 256, 8 experts" in said
    assert f"profile {run_folder.name} artifact SHA256SUMS {hashlib.sha256(b'sums').hexdigest()}" in said
    assert f"made 2026-01-01; 2 x NVIDIA H200, driver 580; 192 CPUs (A CPU), 2048.0 GiB; commit {'c' * 40}" in said
    assert f"measured 2026-11-26; 8 x NVIDIA H200, driver 580; 192 CPUs (A CPU), 2015.1 GiB; commit {'a' * 40}" in said
    page = Page((run_folder / "reports/index.html").read_text())
    files = [link for link in page.links if not link.startswith("#")]
    assert {"card.html", "../artifact/certificate.json", "../artifact/manifest.json"} <= set(files)
    assert all((run_folder / "reports" / link).is_file() for link in files)


def test_contents_lead_to_each_part_and_every_part_is_in_them(run_folder: Path) -> None:
    made.write(run_folder / "reports", made.quality(), made.tools())
    call(run_folder)
    text = (run_folder / "reports/index.html").read_text()
    parts = re.findall(r'<section id="([\w-]+)"', text)
    links = [link.removeprefix("#") for link in Page(text).links if link.startswith("#")]
    assert links == [part for part in parts if part != "part-about"] and len(set(links)) == len(links)


def test_results_of_another_artifact_are_never_shown_as_ours(run_folder: Path) -> None:
    made.write(run_folder / "reports", made.quality(), made.tools())
    call(run_folder)
    page = Page((run_folder / "reports/index.html").read_text())
    text = " ".join(page.text.split())
    assert text.count("Not of this artifact but of another artifact, SHA256SUMS 555555555555….") == 2
    assert "Quality not measured make bench-quality; here it is of another artifact" in text
    whole = (run_folder / "reports/index.html").read_text()
    published = whole[whole.index('<section id="published">') : whole.index('<section id="part-prediction">')]
    headline = " ".join(Page(published).text.split())
    assert "93.10%" not in headline and "GSM8K 8-shot, strict not comparable another artifact" in headline
    assert "measured 2026" not in about(run_folder)
    assert "p = 0.53" not in text and "Beyond noise at 5%" not in text
    assert "<title>published" not in whole


def test_of_two_results_the_one_of_this_artifact_counts_though_it_is_older(run_folder: Path) -> None:
    ours = made.tools(lost=1)
    ours["target"]["artifact"]["sums_sha256"] = hashlib.sha256(b"sums").hexdigest()
    made.write(run_folder / "reports", ours, stamp="20261101T000000Z")
    made.write(run_folder / "reports", made.tools(), stamp="20261126T010203Z")
    call(run_folder)
    text = (run_folder / "reports/index.html").read_text()
    assert "29 of 30 points" in text and "another artifact" not in text


def test_without_a_bench_the_terms_stand_with_the_published_figures(run_folder: Path) -> None:
    call(run_folder)
    text = (run_folder / "reports/index.html").read_text()
    assert text.count("<dt>TPOT</dt>") == 1
    assert text.index("The published figures</summary>") < text.index("<dt>TPOT</dt>") < text.index("TPOT, k=0")


def test_without_an_artifact_the_page_says_of_which_ones_the_results_are(tmp_path: Path) -> None:
    made.write(tmp_path / "reports", made.tools(), made.quality())
    call(tmp_path)
    assert about(tmp_path).count(f"artifact SHA256SUMS {made.SUMS} measured") == 1
    other = made.quality()
    other["target"]["artifact"]["sums_sha256"] = "9" * 64
    made.write(tmp_path / "reports", other)
    call(tmp_path)
    assert f"SHA256SUMS {'9' * 64}; SHA256SUMS {made.SUMS}" in about(tmp_path)
