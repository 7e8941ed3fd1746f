"""The model card: each part from its source, what was not measured, trials, certificates, odd names, its page."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import bench_results
import card_inputs
import pytest
from card_inputs import FLASH_CONFIG, REPO, REVISION, TINY_CONFIG
from programs import run_here

from v4forge.bench import published_figures
from v4forge.bench.results import command_of
from v4forge.checkpoint import layout, recipe
from v4forge.errors import UserError
from v4forge.quantization.postprocess import config_json
from v4forge.reporting import card, card_html, card_subject, run_record
from v4forge.reporting.benches import BENCHES
from v4forge.serving import settings


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def text_of(work: Path) -> str:
    run_record.write(work, work / "artifact")
    return card.text(card_subject.gathered(work, work / "artifact"))


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The card of Flash with everything measured."""
    work = tmp_path_factory.mktemp("flash") / "work"
    card_inputs.write(work, results=bench_results.full())
    return text_of(work)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A work folder of a tiny model, nothing measured on it."""
    card_inputs.write(tmp_path / "work", TINY_CONFIG, repo=None)
    return tmp_path / "work"


def test_title_and_metadata_are_of_the_repository_that_was_fetched(flash: str) -> None:
    assert "\n# DeepSeek-V4-Flash W4A16-FP8-MTP\n" in flash
    matter = flash.split("---\n")[1]
    assert f'base_model: "{REPO}"\n' in matter and 'license: "mit"\n' in matter and 'library_name: "vllm"\n' in matter
    assert f"{REPO} at `{REVISION}`" in flash


def test_the_precision_table_has_every_rule_of_the_recipe(flash: str) -> None:
    table = flash.split("\n## Precision\n")[1].split("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows[1:]] == [rule.kind for rule in recipe.RULES]
    assert "| INT4, BF16 scale per 128 (GPTQ) | 142.8 GB |" in table


def test_recipe_mixed_says_which_layers_keep_upstream_s_fp4(tiny: Path) -> None:
    config = replace(layout.load_config(TINY_CONFIG.parent), recipe=recipe.MIXED)
    (tiny / "artifact/config.json").write_text(json.dumps(config_json(config)))
    rules = [asdict(rule) for rule in recipe.rules(config.fp4_layers)]
    change(tiny / "artifact/manifest.json", recipe={"name": config.recipe, "rules": rules, "aliases": recipe.ALIASES})
    text = text_of(tiny)
    assert "Recipe mixed: the routed experts of the hash-routed layer 0 are not quantized either." in text
    (row,) = (line for line in text.splitlines() if line.startswith("| hash-routed experts |"))
    _, upstream, here, size, why = row.strip("| ").split(" | ")
    assert (upstream, here) == ("FP4 E2M1, E8M0 per 32", "the same FP4 bytes") and why.startswith("layer 0: INT4 costs")
    assert re.fullmatch(r"[\d.]+ [kM]B", size)


def test_figures_stand_beside_the_published_ones_with_standard_errors_and_sources(flash: str) -> None:
    figure = published_figures.by_key()["quality/gsm8k/strict"]
    assert figure.original
    assert "| GSM8K 8-shot, strict | 93.10% ±0.70 | 93.71% ±0.67 | -0.61 ±0.97 (p = 0.53) |" in flash
    assert figure.original.source.split(":")[0] in flash.split("Where the published figures are from")[1]


def test_each_bench_has_its_tables_and_tells_how_it_was_measured(flash: str) -> None:
    for bench in BENCHES.values():
        assert f"\n### {bench.TITLE}\n" in flash
    assert flash.count("<details><summary>Measured how</summary>") == len(BENCHES)


def test_what_verify_deep_found_is_there_with_its_intervals(flash: str) -> None:
    assert "| change of perplexity | – | +0.90% (+0.50 to +1.30) |" in flash


def test_the_serve_command_is_the_settings_of_make_serve(flash: str) -> None:
    command = flash.split("    vllm serve . ")[1].split("\n\n")[0].replace("\\\n", " ").split()
    rows = [row for row in settings.serving().settings.values() if card.OWN_CODE not in str(row.value)]
    assert [word for word in command if word != "\\"] == [word for row in rows for word in row.words()]


def test_the_gpus_that_hold_it_follow_from_the_size_of_the_shards(flash: str) -> None:
    assert "| H200 | 141 GB | 2 | 55.2 GB |" in flash and "| H100 | 80 GB | 4 |" in flash


def test_machine_images_seconds_and_commands_are_told(flash: str) -> None:
    made = flash.split("\n## Made how\n")[1]
    assert "| calibrate | 700.5 | 777777777777 (lane cuda) | 8 x NVIDIA H200, driver 580; 192 cores of A CPU" in made
    assert "    python -m scripts.postprocess --work $WORK/layers\n" in made
    assert "    make reproduce MANIFEST=<this folder>/manifest.json PROFILE=flash\n" in made


def test_stages_stand_in_the_order_in_which_they_follow(flash: str) -> None:
    made = flash.split("\n## Made how\n")[1]
    assert re.findall(r"^\| (\w+) \| \d", made.replace(",", ""), re.MULTILINE) == list(card_inputs.SECONDS)
    assert re.findall(r"scripts\.(\w+) ", made) == list(card_inputs.SECONDS)


def layers_of(work: Path, ranks: int) -> None:
    """Reports of two layers that computed for 5,000 s each, on the rank that computed longest."""
    (work / "layers").mkdir()
    for layer in range(2):
        used = [
            {"seconds": {"sweep": 5000.0 - 100 * rank, "read": 9000.0 * rank}, "peak_gpu": 0, "peak_host": 1}
            for rank in range(ranks)
        ]
        (work / f"layers/layer-{layer:03}.json").write_text(json.dumps({"layer": layer, "run": used}))


def test_a_calibration_that_was_resumed_is_not_said_to_have_taken_its_last_run_only(tmp_path: Path) -> None:
    card_inputs.write(tmp_path / "work", results=bench_results.full())
    layers_of(tmp_path / "work", ranks=8)
    text = text_of(tmp_path / "work")
    assert "| calibrate | 700.5 |" in text and "seconds, last run" in text
    assert "The 2 layers computed for 10,000.0 s together." in text
    assert "| calibration | 2.78 h (768 x 512 tokens) |" in text, "beside the published hours stands the whole"


def test_a_run_of_several_gpus_is_repeated_on_as_many(tmp_path: Path) -> None:
    card_inputs.write(tmp_path / "work")
    layers_of(tmp_path / "work", ranks=8)
    assert "/manifest.json PROFILE=flash GPUS=8\n" in text_of(tmp_path / "work")


def test_where_the_folders_lie_is_not_told(tmp_path: Path) -> None:
    work = tmp_path / "work"
    result = bench_results.speed()
    result["target"]["artifact"]["folder"] = "/home/somebody/flash/artifact"
    result["commands"] = ["python -m scripts.bench speed --artifact /home/somebody/flash/artifact --url http://x/v1"]
    card_inputs.write(work, results=[result])
    noted = json.loads((work / "reports/run.json").read_text())
    noted["calibrate"]["command"] = f"/usr/bin/torchrun --source /data/somebody/Flash --work {work}/layers"
    (work / "reports/run.json").write_text(json.dumps(noted))
    text = text_of(work)
    assert "somebody" not in (text + (work / "artifact/run.json").read_text()).replace("(c) somebody", "")
    assert "    …/torchrun --source …/Flash --work $WORK/layers\n" in text
    assert "- command: python -m scripts.bench speed --artifact $WORK/artifact --url http://x/v1\n" in text


def test_many_layers_are_summarized_and_all_of_them_folded(flash: str) -> None:
    losses = flash.split("### Losses by kind of attention")[1]
    assert "| all | 43 |" in losses.split("<details>")[0]
    assert "<summary>All 43 layers</summary>" in losses and "\n| 42 | CSA | " in losses


def test_losses_of_round_to_nearest_at_the_same_scales_stand_between_the_two(tiny: Path) -> None:
    assert "| nearest, % | nearest, same scales, % | GPTQ, % | GPTQ / nearest |" in text_of(tiny)
    assert " | 0.510 | 0.140 | 0.120 | 0.24 |\n" in text_of(tiny)
    manifest = json.loads((tiny / "artifact/manifest.json").read_text())
    for by in manifest["layers"][0]["error"].values():
        del by["rtn_same_scales"]
    change(tiny / "artifact/manifest.json", layers=manifest["layers"])
    assert " | 0.510 | – | 0.120 | 0.24 |\n" in text_of(tiny), "a manifest of before"


def test_what_nobody_measured_is_said_with_the_command_that_measures_it(tiny: Path) -> None:
    change(tiny / "artifact/certificate.json", deep=None, not_run={"quality": "it needs --deep N"})
    text = text_of(tiny)
    missing = text.split("\n## Not measured")[1].split("\n## ")[0]
    for name, bench in BENCHES.items():
        assert f"- {bench.TITLE}: not measured ({command_of(name)}).\n" in missing
    assert "- Check “quality”: not run, it needs --deep N.\n" in missing
    assert "- Prediction beside the source, on the same tokens: not measured" in missing
    assert "\n## What was measured\n\nNothing yet.\n" in text


def test_a_trial_is_called_one_and_compared_with_nothing(tmp_path: Path) -> None:
    card_inputs.write(tmp_path / "work", results=[bench_results.quality(trial=2)])
    text = text_of(tmp_path / "work")
    assert "- Quality: a trial of 2: not a result.\n" in text
    assert "**a trial of 2: not a result.**" in text
    assert "| GSM8K 8-shot, strict | 93.10% ±0.70 (a trial of 2) | 93.71% ±0.67 |   |" in text


@pytest.mark.parametrize(("sums", "said"), [("5" * 64, "another"), (None, "an unknown")])
def test_a_result_of_other_files_is_not_shown(tmp_path: Path, sums: str | None, said: str) -> None:
    card_inputs.write(tmp_path / "work", TINY_CONFIG)
    result = bench_results.speed(tiny=True)
    result["target"]["artifact"]["sums_sha256"] = sums
    (path,) = bench_results.write(tmp_path / "work/reports", result)
    text = text_of(tmp_path / "work")
    assert f"not measured (make bench-speed; {path.name} is of {said} artifact)" in text
    assert "ms a token" not in text


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), "There is no certificate"),
        (lambda path: change(path, sums_sha256="0" * 64), "is of other files than these"),
        (lambda path: change(path, ok=False), "The certificate says FAILED"),
        (
            lambda path: change(path, checks=[{"name": "aliases", "ok": False, "detail": "gone"}]),
            "The certificate says FAILED: aliases.",
        ),
    ],
)
def test_without_a_passing_certificate_the_card_begins_with_that(tiny: Path, damage: Any, said: str) -> None:
    damage(tiny / "artifact/certificate.json")
    beginning = text_of(tiny).split("---\n")[2].strip().split("\n\n")
    assert beginning[0].startswith("# ") and beginning[1].startswith("> **Do not use this yet.** ")
    assert said in beginning[1]


def test_with_a_passing_certificate_nothing_warns(tiny: Path) -> None:
    assert "Do not use" not in text_of(tiny)


def test_a_model_that_is_not_flash_does_not_claim_to_be(tiny: Path) -> None:
    text = text_of(tiny)
    title = next(line for line in text.splitlines() if line.startswith("# "))
    assert title == "# DeepSeek-V4 of 4 layers, hidden size 256, W4A16-FP8-MTP"
    assert "base_model" not in text and "flash" not in text.lower().replace("this is not deepseek-v4-flash", "")
    assert "Ours beside what was published" not in text


def test_flashs_dimensions_alone_do_not_make_it_flash(tmp_path: Path) -> None:
    card_inputs.write(tmp_path / "work", FLASH_CONFIG, repo=None)
    text = text_of(tmp_path / "work")
    assert "\n# DeepSeek-V4 of 43 layers, hidden size 4096, W4A16-FP8-MTP\n" in text
    assert "whose weights these are, only the hashes say" in text


def test_a_source_without_a_licence_file_has_an_unknown_one(tiny: Path) -> None:
    (tiny / "artifact/LICENSE").unlink()
    text = text_of(tiny)
    assert 'license: "unknown"\n' in text and "came without a `LICENSE` file" in text


def test_experts_that_another_tool_quantized_are_said_to_be_its(tiny: Path) -> None:
    change(tiny / "artifact/manifest.json", calibration={"from": "routed experts saved by *another* tool", "files": {}})
    text = text_of(tiny)
    assert r"Not known here: routed experts saved by \*another\* tool" in text and "make reproduce" not in text


def test_odd_names_stay_text_on_the_card_and_on_its_page(tmp_path: Path) -> None:
    odd = "org/<script>alert(1)</script>|**x**\n# y"
    card_inputs.write(tmp_path / "work", TINY_CONFIG, repo=odd)
    text = text_of(tmp_path / "work")
    assert re.search(r"^# y", text, re.MULTILINE) is None
    page = card_html.page(text)
    assert "<script" not in page and "<strong>x</strong>" not in page
    assert page.count("<h1>") == 1


def test_the_same_inputs_give_the_same_text(tiny: Path) -> None:
    first = text_of(tiny)
    change(tiny / "reports/run.json", rtn={"elapsed_s": 1.0, "started": "2026", "command": "later"})
    assert text_of(tiny) == first, "a stage that does not make the artifact is no part of it"


def test_run_json_stays_where_the_work_folder_knows_nothing(tiny: Path, tmp_path: Path) -> None:
    written = run_record.write(tiny, tiny / "artifact")
    assert set(written["stages"]) == set(card_inputs.SECONDS)
    assert run_record.write(tmp_path / "elsewhere", tiny / "artifact") == written


def test_the_program_writes_card_page_and_run_json(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("card", "--work", tiny, "--artifact", tiny / "artifact") == 0
    assert (tiny / "artifact/README.md").read_text() == card.text(card_subject.gathered(tiny, tiny / "artifact"))
    page = (tiny / "reports/card.html").read_text()
    assert "<table>" in page and "Metadata for the hub" in page
    assert str(tiny) not in (tiny / "artifact/run.json").read_text()
    assert "README.md" in capsys.readouterr().out


def test_the_page_renders_tables_and_keeps_what_folds(flash: str) -> None:
    page = card_html.page(flash)
    assert "<details><summary>All 43 layers</summary>" in page and page.count("<details>") == page.count("</details>")
    assert "| layer |" not in page and "<td>sliding window</td>" in page


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("manifest.json", {"format": 1}, "has format 1"),
        ("manifest.json", {"layers": [{"layer": 0}]}, "manifest.json has no 'error'"),
        ("certificate.json", {"checks": [{"name": "x"}]}, "certificate.json has no 'ok'"),
        ("run.json", {"layers": [{"layer": 0}]}, "run.json has no 'seconds'"),
    ],
)
def test_a_file_of_another_form_is_named(tiny: Path, name: str, content: dict[str, Any], said: str) -> None:
    run_record.write(tiny, tiny / "artifact")
    change(tiny / "artifact" / name, **content)
    with pytest.raises(UserError, match=re.escape(said)):
        card.text(card_subject.gathered(tiny, tiny / "artifact"))


def test_a_folder_without_an_artifact_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("card", "--work", tmp_path, "--artifact", tmp_path / "artifact") == 1
    assert capsys.readouterr().err.endswith("hint: make postprocess\n")
