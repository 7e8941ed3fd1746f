"""lm-eval's tasks: the table, what is derived from them, its command line, its results and its failures."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import quality_data
import yaml

from v4forge.bench import lm_eval as lm_eval_harness
from v4forge.bench import lm_eval_tasks, prepare_quality, quality, sandbox
from v4forge.bench.lm_eval import Asked, Environment, Limits
from v4forge.bench.quality import Output
from v4forge.checkout import ROOT
from v4forge.errors import UserError


def test_the_module_of_figures_loads_without_torch() -> None:
    code = "import sys, v4forge.bench.quality; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# The table.


def test_the_table_holds_the_published_tasks_in_order() -> None:
    assert [task.name for task in quality.choose([])] == ["gsm8k", "mmlu", "mmlu_pro", "humaneval_instruct", "aime24"]


def test_a_task_that_is_not_known_is_told_with_those_that_are() -> None:
    with pytest.raises(UserError, match="no task 'gsm9k'") as raised:
        quality.choose(["gsm9k"])
    assert "gsm8k" in raised.value.hint


def test_only_programs_have_no_metric_of_lm_evals() -> None:
    assert [task.name for task in quality.table().tasks.values() if task.runs_code] == ["humaneval_instruct"]


def test_a_trial_asks_so_many_questions_of_each_part() -> None:
    assert quality.table().tasks["mmlu"].asked(2) == 114
    assert quality.table().tasks["aime24"].asked(100) == 30


# Derived tasks.


@pytest.fixture
def lm_eval(tmp_path: Path) -> Path:
    """Tasks in the form of lm-eval's: one that includes another, with functions, and a group of two."""
    folder = tmp_path / "lm_eval/tasks"
    (folder / "group").mkdir(parents=True)
    (folder / "base.yaml").write_text(
        "task: base\ndataset_path: some/set\nmetric_list: [{metric: !function utils.score}]\ndoc_to_text: '{{q}}'\n"
        "generation_kwargs: {until: [a, b, c, d, e], max_gen_toks: 99}\nunsafe_code: true\n"
    )
    (folder / "code.yaml").write_text("include: base.yaml\ntask: code\n")
    for name in ("group_red_hat", "group_blue"):
        (folder / f"group/{name}.yaml").write_text(f"task: {name}\ndataset_name: {name[6:]}\ndoc_to_text: x\n")
    (folder / "group/_group.yaml").write_text(
        "group: group\ntask: [group_tasks]\naggregate_metric_list: [{metric: acc}]\n"
    )
    return folder


def spec(**more: Any) -> dict[str, Any]:
    common = {"lm_eval": "group", "group": False, "code": False, "splits": ["test"], "folders": "", "local": ""}
    return common | {"revision": "0" * 40, "max_tokens": 7} | more


def test_a_derived_task_includes_the_original_and_pins_its_revision(lm_eval: Path) -> None:
    task = lm_eval_tasks.derived(lm_eval / "group/group_blue.yaml", spec())
    assert task == {
        "include": str(lm_eval / "group/group_blue.yaml"),
        "task": "group_blue",
        "dataset_kwargs": {"revision": "0" * 40},
    }


def test_a_task_of_programs_is_written_out_without_the_functions_that_run_them(lm_eval: Path) -> None:
    task = lm_eval_tasks.derived(lm_eval / "code.yaml", spec(code=True))
    assert task and "include" not in task and "!function" not in yaml.safe_dump(task)
    assert task["metric_list"] == [{"metric": "bypass"}] and task["unsafe_code"] is False
    assert task["doc_to_text"] == "{{q}}"


def test_the_server_is_told_four_strings_that_end_a_program_and_the_rest_is_cut_off_after(lm_eval: Path) -> None:
    task = lm_eval_tasks.derived(lm_eval / "code.yaml", spec(code=True))
    assert task and task["generation_kwargs"] == {"until": ["a", "b", "c", "d"], "max_gen_toks": 7}
    assert lm_eval_tasks.stops({"until": ["a", "b", "c", "d", "e"]}, spec(code=True))[1] == ["e"]
    assert lm_eval_tasks.stops({"until": ["a", "b", "c", "d", "e"]}, spec(code=False))[1] == []


def test_local_files_take_the_place_of_the_hub(lm_eval: Path, tmp_path: Path) -> None:
    quality_data.lines(tmp_path / "data/test.jsonl", [{"q": 1}])
    task = lm_eval_tasks.derived(lm_eval / "base.yaml", spec(local=str(tmp_path / "data")))
    assert task and (task["dataset_path"], task["dataset_name"]) == ("json", None)
    assert task["dataset_kwargs"] == {"data_files": {"test": str(tmp_path / "data/test.jsonl")}}


def test_parts_with_folders_of_their_own_are_those_whose_folder_is_there(lm_eval: Path, tmp_path: Path) -> None:
    quality_data.lines(tmp_path / "data/blue/test.jsonl", [{"q": 1}])
    chosen = spec(group=True, folders="colour", local=str(tmp_path / "data"))
    assert lm_eval_tasks.derived(lm_eval / "group/group_blue.yaml", chosen)
    assert lm_eval_tasks.derived(lm_eval / "group/group_red_hat.yaml", chosen) is None


def test_parts_of_a_shared_file_are_those_with_questions_in_it(lm_eval: Path, tmp_path: Path) -> None:
    quality_data.lines(tmp_path / "data/test.jsonl", [{"category": "red hat"}])
    chosen = spec(group=True, local=str(tmp_path / "data"))
    assert lm_eval_tasks.derived(lm_eval / "group/group_red_hat.yaml", chosen)
    assert lm_eval_tasks.derived(lm_eval / "group/group_blue.yaml", chosen) is None


def test_a_group_keeps_its_metrics_and_names_the_parts_that_there_are(lm_eval: Path) -> None:
    found = lm_eval_tasks.group(spec(), ["group_blue"], lm_eval / "group")
    assert found == {"group": "group", "task": ["group_blue"], "aggregate_metric_list": [{"metric": "acc"}]}


def test_an_unpinned_revision_is_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_quality.pins, "read", dict)
    with pytest.raises(UserError, match="GSM8K_REVISION"):
        prepare_quality.data_of(quality.table().tasks["gsm8k"], None)


def test_each_local_file_is_told_by_its_sha256(tmp_path: Path) -> None:
    quality_data.write(tmp_path)
    about = prepare_quality.data_of(quality.table().tasks["mmlu"], tmp_path)
    assert set(about["sha256"]) == {f"{s}/{split}.jsonl" for s in quality_data.SUBJECTS for split in ("dev", "test")}


def test_a_split_without_a_local_file_is_told(tmp_path: Path) -> None:
    (quality_data.write(tmp_path) / "gsm8k/test.jsonl").unlink()
    with pytest.raises(UserError, match=r"there is no .*gsm8k/test.jsonl"):
        prepare_quality.data_of(quality.table().tasks["gsm8k"], tmp_path)


# lm-eval's command line.


def asked(**more: Any) -> Asked:
    common = {"url": "http://127.0.0.1:1", "model": "m", "tokenizer": "/t", "seed": 42, "fewshot_seed": 1234}
    return Asked(
        **{**common, "concurrency": 8, "attempts": 3, "timeout_s": 9.5, "max_tokens": 5, "limit": None, **more}
    )


def words(name: str, **more: Any) -> list[str]:
    return lm_eval_harness.command("python", quality.table().tasks[name], asked(**more), Path("/tasks"), Path("/work"))


def model_arguments(command: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(command[command.index("--model_args") + 1])
    return found


def test_choices_are_weighed_with_the_tokenizer_and_the_published_context() -> None:
    arguments = model_arguments(words("mmlu"))
    assert (arguments["tokenizer"], arguments["max_length"]) == ("/t", 2048)
    assert "--gen_kwargs" not in words("mmlu")


def test_answers_need_no_tokenizer_and_are_greedy() -> None:
    assert "tokenizer" not in model_arguments(words("gsm8k"))
    assert json.loads(words("gsm8k")[words("gsm8k").index("--gen_kwargs") + 1])["temperature"] == 0


def test_a_conversation_goes_through_the_chat_template() -> None:
    assert model_arguments(words("gsm8k_chat"))["base_url"].endswith("/v1/chat/completions")
    assert "--apply_chat_template" in words("gsm8k_chat") and "--apply_chat_template" not in words("gsm8k")


def test_lm_eval_is_never_allowed_to_run_programs() -> None:
    assert "--predict_only" in words("humaneval_instruct")
    assert not any("unsafe" in word for name in quality.table().tasks for word in words(name))


# Its results.


@pytest.fixture
def output(tmp_path: Path) -> Output:
    """What lm-eval leaves of gsm8k: three questions, each seen through two filters."""
    results = {
        "results": {"gsm8k": {"exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": "N/A"}},
        "n-samples": {"gsm8k": {"original": 1319, "effective": 3}},
        "versions": {"gsm8k": 3.0},
        "task_hashes": {"gsm8k": "ab"},
    }
    (tmp_path / "model").mkdir()
    (tmp_path / "model/results_2026.json").write_text(json.dumps(results))
    answers = {0: ("so 4", {"strict-match": "[invalid]", "flexible-extract": "4"}), 1: ("  ", None), 2: ("no", None)}
    rows = []
    for number, (text, found) in answers.items():
        for name in ("strict-match", "flexible-extract"):
            read = (found or {}).get(name, quality.INVALID)
            rows.append({"doc_id": number, "resps": [[text]], "filtered_resps": [read], "filter": name})
    quality_data.lines(tmp_path / "model/samples_gsm8k_2026.jsonl", rows)
    return quality.read_output(tmp_path)


def test_an_answer_is_invalid_when_it_is_empty_or_no_filter_finds_anything(output: Output) -> None:
    about = quality.describe(quality.table().tasks["gsm8k"], output)
    assert (about["questions"], about["invalid"], about["empty"]) == (3, 2, 1)
    assert about["unread"] == {"strict-match": 3, "flexible-extract": 2}


def test_a_standard_error_that_lm_eval_does_not_give_is_none(output: Output) -> None:
    output.results["results"]["gsm8k"]["exact_match,flexible-extract"] = 1
    metrics = quality.metrics(quality.table().tasks["gsm8k"], output)
    assert metrics == {"strict": {"value": 0.5, "se": None}, "flexible": {"value": 1.0, "se": None}}


def test_a_metric_that_lm_eval_does_not_give_is_an_error(output: Output) -> None:
    with pytest.raises(UserError, match="flexible-extract"):
        quality.metrics(quality.table().tasks["gsm8k"], output)


def test_the_hash_of_one_task_is_lm_evals_and_of_several_it_depends_on_each() -> None:
    assert quality.prompts_hash({"gsm8k": "ab"}) == "ab"
    hashes = {"a": "1", "b": "2"}
    assert quality.prompts_hash(hashes) == quality.prompts_hash(dict(reversed(hashes.items())))
    assert quality.prompts_hash(hashes) != quality.prompts_hash(hashes | {"b": "3"})


@pytest.mark.parametrize("content", ["", "{", '{"results": {}}'])
def test_results_that_are_not_whole_are_an_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "results_2026.json").write_text(content)
    with pytest.raises(UserError, match="not whole"):
        quality.read_output(tmp_path)


def test_no_results_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="without results"):
        quality.read_output(tmp_path)


def test_a_program_ends_with_its_code_block_and_is_followed_by_its_tests() -> None:
    sample = {"doc": {"prompt": "def f():\n"}, "resps": [["  return 1\n```\nThat is it."]], "target": "check(f)"}
    assert quality.program(sample) == "def f():\n  return 1\n\ncheck(f)"


def test_a_program_ends_where_the_server_was_not_told_to_stop() -> None:
    sample = {"doc": {"prompt": "def f():\n"}, "resps": [["  return 1\nprint(f())\n```"]], "target": "check(f)"}
    assert quality.program(sample, ["\nprint"]) == "def f():\n  return 1\ncheck(f)"


# How it runs, and fails.


@pytest.mark.parametrize(
    ("said", "fact"),
    [
        (
            "Requesting API:  50%| 1/2 [\nStatus code: 503, Response text: busy\nException:ClientResponseError(x)",
            "HTTP 503",
        ),
        ("Requesting API:  50%| 1/2 [\nException:ClientConnectorError(x)\nException:CancelledError()", "refuses"),
        ("Requesting API:   0%| 0/2 [\nException:TimeoutError(), (no outputs)", "in time"),
        ("Requesting API:   0%| 0/2 [\nException:KeyError('text'), {}", "no completion"),
        (
            "Requesting API:   0%| 0/2 [\nException:ContentTypeError(x)\nException:ContentTypeError(x)\n"
            "Exception:ServerDisconnectedError(x)",
            "something else than JSON",
        ),
        ("datasets.exceptions.DatasetNotFoundError: Dataset 'x' doesn't exist", "not on the hub"),
        ("jinja2.exceptions.UndefinedError: 'question' is undefined", "lack a field"),
        ("ModuleNotFoundError: No module named 'lm_eval'", "lm-eval ended with 1"),
        ("", "it said nothing"),
    ],
)
def test_what_lm_eval_said_last_becomes_a_fact(said: str, fact: str) -> None:
    assert fact in lm_eval_harness.explain(said, 1, Path("log")).fact


def test_the_last_progress_counts() -> None:
    assert lm_eval_harness.reached("Requesting API:   0%|  | 0/24 [00:00\rRequesting API:  58%|#  | 14/24 [00:18") == (
        14,
        24,
    )
    assert lm_eval_harness.reached("Checking cached requests: 100%| 2/2") == (0, 0)


def run(code: str, tmp_path: Path, limits: Limits) -> str:
    environment = Environment(tmp_path, Path(sys.executable).parent)
    return lm_eval_harness.run(environment, [environment.python, "-c", code], {}, tmp_path / "log", limits)


def test_a_server_that_stalls_ends_the_run_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_eval_harness, "GRACE_S", 0.5)
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"stalls.* after 3 of 9"):
        run("import time; print('Requesting API: 3/9', flush=True); time.sleep(60)", tmp_path, Limits(0.5))
    assert time.monotonic() - begun < 20


def test_a_run_that_does_not_get_as_far_as_the_first_question_ends_in_time(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did nothing"):
        run("import time; time.sleep(60)", tmp_path, Limits(60, prepare_s=0.5))


def test_what_an_earlier_run_said_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("Exception:TimeoutError()\nRequesting API: 1/2\n")
    with pytest.raises(UserError, match="lm-eval ended with 3: 'bye'"):
        run("print('bye'); raise SystemExit(3)", tmp_path, Limits(10, 10))


def test_a_program_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be run"):
        lm_eval_harness.run(
            Environment(tmp_path, tmp_path), [str(tmp_path / "python")], {}, tmp_path / "log", Limits(1)
        )


# Programs of a model.


def test_without_a_daemon_no_program_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere.sock")
    with pytest.raises(UserError, match="run in containers only") as raised:
        sandbox.connect("any")
    assert "--tasks" in raised.value.hint


def test_a_container_for_a_program_has_nothing_that_it_does_not_need() -> None:
    options = sandbox.options("image", "pass", "mark")
    assert options["network_mode"] == "none" and options["read_only"] is True and options["cap_drop"] == ["ALL"]
    assert options["user"] == "65534:65534" and options["security_opt"] == ["no-new-privileges"]
    assert "volumes" not in options and "mounts" not in options
