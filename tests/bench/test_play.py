"""The tool-calling bench: every scenario can be won, half won and lost; no answer of a model or server upsets it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai_stand_in as stand_in
import pytest
from openai_stand_in import Answer, Choice, Server, choice

from scripts import bench
from v4forge.bench.tools import chat_client, play, scenarios
from v4forge.bench.tools.chat_client import Speaker
from v4forge.bench.tools.scenarios import Scenario
from v4forge.errors import UserError
from v4forge.files import read_json
from v4forge.serving.client import Endpoint

ROOT = Path(__file__).resolve().parents[2]
SUITE = scenarios.load()
SCENARIOS = {scenario.name: scenario for scenario in SUITE.scenarios}
PLAYERS = stand_in.players()
CASES = [(name, number) for name, listed in PLAYERS.items() for number in range(len(listed))]
STALL = stand_in.late(5, stand_in.saying("Too late."))
READ = '{"room": "print-store", "quantity": "humidity"}'


def played(turns: list[Choice], scenario: Scenario, **speaker: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The part of a scenario with scripted turns, and the requests that were made."""
    with stand_in.serving(stand_in.play(stand_in.script(scenario, turns))) as server:
        return against(server, scenario, **speaker), server.asked


def against(server: Server, scenario: Scenario, limit_s: float = 20, max_tokens: int = 100) -> dict[str, Any]:
    at = Endpoint(0, server.url, pinned=False)
    speaker = Speaker(at, stand_in.MODEL, max_tokens, seed=7, limit_s=limit_s)
    return play.part(SUITE, scenario, lambda messages, tools: chat_client.reply(speaker, messages, tools))


@pytest.mark.parametrize(("name", "number"), CASES)
def test_a_player_gets_the_points_that_its_moves_are_worth(name: str, number: int) -> None:
    player = PLAYERS[name][number]
    part, _ = played([stand_in.turn(row) for row in player["turns"]], SCENARIOS[name])
    assert part["score"] == player["points"], "\n".join(part["why"])


def test_every_scenario_is_proven_to_be_worth_two_points_one_and_none() -> None:
    assert {name: {player["points"] for player in listed} for name, listed in PLAYERS.items()} == {
        scenario.name: {0, 1, 2} for scenario in SUITE.scenarios
    }


def test_the_suite_is_of_thirty_points() -> None:
    assert len(SUITE.scenarios) * play.PASS == play.MOST == 30
    assert [scenario.category for scenario in SUITE.scenarios[::3]] == list(scenarios.CATEGORIES)


def test_requests_are_greedy_seeded_and_the_same_every_time() -> None:
    turns = [stand_in.turn(row) for row in PLAYERS["crowns"][0]["turns"]]
    (first, asked), (second, again) = (played(turns, SCENARIOS["crowns"]) for _ in range(2))
    assert asked == again and first["trace"] == second["trace"]
    assert {(body["temperature"], body["seed"], body["max_tokens"]) for body in asked} == {(0, 7, 100)}
    assert len(asked[0]["tools"]) == len(SUITE.tools) == 12


def test_the_trace_holds_all_that_was_said() -> None:
    part, asked = played([choice("Let me see.", [("read_sensor", READ)]), choice("63 percent.")], SCENARIOS["damp-air"])
    assert [message["role"] for message in part["trace"]] == ["system", "user", "assistant", "tool", "assistant"]
    assert part["trace"][2]["content"] == "Let me see." and part["trace"][2]["calls"][0]["arguments"] == READ
    assert json.loads(part["trace"][3]["content"])["value"] == 63
    assert asked[1]["messages"][2]["content"] == "Let me see."
    assert part["score"] == 2 and part["ended"] == "answered"


BAD_CALLS = {
    "arguments that are not JSON": ("read_sensor", '{"room": "print-store", "quant'),
    "arguments that are no object": ("read_sensor", '["print-store"]'),
    "a tool that is not there": ("measure", READ),
    "an argument that is missing": ("read_sensor", '{"room": "print-store"}'),
    "an argument that is unknown": ("read_sensor", READ[:-1] + ', "unit": "percent"}'),
    "an argument of another type": ("read_sensor", '{"room": 5, "quantity": "humidity"}'),
    "nesting without end": ("read_sensor", "[" * 100_000),
}


@pytest.mark.parametrize("call", BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_call_that_is_not_well_formed_is_answered_with_an_error_and_costs_a_point(call: tuple[str, str]) -> None:
    turns = [choice(None, [call]), choice(None, [("read_sensor", READ)]), choice("63 percent.")]
    part, asked = played(turns, SCENARIOS["damp-air"])
    assert "error" in json.loads(part["trace"][3]["content"])
    assert part["trace"][2]["calls"][0] == {"name": call[0], "arguments": call[1]}
    for message in asked[-1]["messages"]:
        for sent in message.get("tool_calls", ()):
            assert isinstance(json.loads(sent["function"]["arguments"]), dict)
    assert part["score"] == 1
    assert any(line.startswith("pass: fails: every call is well formed") for line in part["why"])


ENDS = {
    "limit of turns": [choice(None, [("read_sensor", READ)])],
    "limit of tokens": [choice("It is 63 and 63 and 63", finish_reason="length")],
    "empty answer": [choice("  \n")],
    "too many calls in a turn": [choice(None, [("read_sensor", READ)] * 17)],
}


@pytest.mark.parametrize("how", ENDS)
def test_a_conversation_without_a_whole_answer_ends_and_does_not_pass(how: str) -> None:
    part, _ = played(ENDS[how], SCENARIOS["damp-air"])
    assert part["ended"] == how and part["turns"] <= SUITE.max_turns
    assert part["score"] == 0


def test_calls_that_the_limit_of_tokens_cut_end_the_conversation() -> None:
    part, _ = played([choice(None, [("read_sensor", READ[:20])], finish_reason="length")], SCENARIOS["damp-air"])
    assert part["ended"] == "limit of tokens" and part["turns"] == 1


def test_thoughts_are_kept_and_sent_back_under_their_name() -> None:
    thinking = choice(None, [("read_sensor", READ)], message={"reasoning": "I should look."})
    part, asked = played([thinking, choice("63 percent.")], SCENARIOS["damp-air"])
    assert part["trace"][2]["reasoning"] == asked[1]["messages"][2]["reasoning"] == "I should look."
    assert part["score"] == 2


def test_parallel_calls_are_answered_each_by_its_id() -> None:
    part, asked = played([stand_in.turn(row) for row in PLAYERS["warn-if-damp"][0]["turns"]], SCENARIOS["warn-if-damp"])
    sent = asked[1]["messages"][2]["tool_calls"]
    answers = asked[1]["messages"][3:]
    assert [call["id"] for call in sent] == [answer["tool_call_id"] for answer in answers] and len(sent) == 2
    assert part["score"] == 2


TOO_LONG = stand_in.text_as_answer(
    400, '{"error":{"message":"This model\'s maximum context length is 2048 tokens. However, you requested more"}}'
)


def test_an_answer_takes_what_room_there_is() -> None:
    with stand_in.serving(stand_in.saying("By 2.4 degrees.")) as server:
        server.fault = lambda number: TOO_LONG if number == 1 else None
        assert against(server, SCENARIOS["said-before"])["score"] == 2
    assert "max_tokens" in server.asked[0] and "max_tokens" not in server.asked[1]


def test_a_context_that_is_full_ends_the_conversation_and_one_that_is_too_short_is_an_error() -> None:
    turns = stand_in.play(stand_in.script(SCENARIOS["damp-air"], [choice(None, [("read_sensor", READ)])]))
    with stand_in.serving(turns) as server:
        server.fault = lambda number: TOO_LONG if number > 1 else None
        part = against(server, SCENARIOS["damp-air"])
        assert part["ended"] == "context is full" and part["score"] == 0
        server.fault = lambda _number: TOO_LONG
        with pytest.raises(UserError, match="longer than the server takes") as caught:
            against(server, SCENARIOS["damp-air"])
    assert "max-model-len" in caught.value.hint


@pytest.fixture
def server() -> Iterator[Server]:
    with stand_in.serving(stand_in.perfect()) as found:
        yield found


def arguments(server: Server, reports: Path, *more: str, limit_s: int = 30) -> list[str]:
    places = ["--url", server.url, "--reports", str(reports), "--folder", str(reports / "none")]
    return ["tools", *places, "--request-timeout", str(limit_s), *more]


def the_file(reports: Path) -> dict[str, Any]:
    (path,) = reports.glob("tools-*.json")
    return read_json(path)


def test_the_perfect_player_gets_thirty_of_thirty(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(arguments(server, tmp_path, "--leave-out", "smoke/coding")) == 0
    content = the_file(tmp_path)
    assert play.points(content["parts"]) == dict.fromkeys(scenarios.CATEGORIES, (6, 6))
    assert content["complete"] is True and content["trial"] is None
    assert len(content["parts"]) == 15 + 8
    assert content["hashes"].keys() == {*(f"tools/{path.name}" for path in SUITE.files), "smoke.yaml"}
    told = capsys.readouterr().out.split("\n")
    rows = {line.split("  ")[0].strip(): line.split() for line in told if line.strip()}
    assert rows["tool calls"][-2:] == ["30", "30"] and rows["recovery"][-2:] == ["6", "6"]
    assert rows["smoke quick"][-2:] == rows["smoke quality"][-2:] == ["4", "4"]


def test_help_loads_no_bench() -> None:
    code = "import sys; from scripts import bench\ntry: bench.parse(['--help'])\nexcept SystemExit: pass\n"
    code += "sys.exit(bool({'torch', 'pydantic', 'scripts.bench_tools'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Tool calls in fifteen scenarios" in done.stdout


def test_a_dry_run_asks_nothing_and_says_how_much_it_would(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(arguments(server, tmp_path, "--dry-run", "--limit", "1")) == 0
    told = capsys.readouterr().out
    assert "recovery/busy-once" in told and "requests" in told
    assert not server.asked and not list(tmp_path.iterdir())


FAULTS: dict[str, tuple[Answer, str]] = {
    "500": (stand_in.broken, "HTTP 500"),
    "a stall": (STALL, "not answered within 2 s"),
    "a drip": (stand_in.drip, "not answered within 2 s"),
    "a broken connection": (stand_in.broken_off, "broke off"),
    "garbage": (stand_in.garbage, "not JSON"),
    "another form": (stand_in.text_as_answer(200, '{"choices": []}'), "another form"),
    "calls of another form": (
        stand_in.text_as_answer(200, '{"choices": [{"message": {"tool_calls": [7]}}]}'),
        "another form",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_the_server_is_told_and_the_next_run_measures_what_is_missing(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    fault, said = FAULTS[name]
    server.fault = lambda number: fault if number == 3 else None  # the second scenario's first request
    words = arguments(server, tmp_path, "--limit", "1", "--leave-out", "smoke", limit_s=2 if "within" in said else 30)
    assert bench.main(words) == 1
    content = the_file(tmp_path)
    assert said in content["failures"]["precision/fahrenheit"]["fact"]
    assert content["complete"] is False and len(content["parts"]) == 4
    assert f"not measured: precision/fahrenheit: {content['failures']['precision/fahrenheit']['fact']}" in (
        capsys.readouterr().out
    )
    asked = len(server.asked)
    assert bench.main(words) == 0
    content = the_file(tmp_path)
    assert content["complete"] is True and len(content["parts"]) == 5 and len(content["commands"]) == 2
    assert len(server.asked) - asked == 2


def test_a_server_that_is_gone_ends_the_run_with_what_was_measured(server: Server, tmp_path: Path) -> None:
    server.fault = lambda number: stand_in.broken_off if number > 2 else None
    with pytest.raises(UserError, match="broke off"):
        bench.main(arguments(server, tmp_path))
    content = the_file(tmp_path)
    assert list(content["parts"]) == ["selection/damp-air"] and len(content["failures"]) == 3


def test_a_bench_that_is_killed_goes_on_where_it_was(server: Server, tmp_path: Path) -> None:
    server.fault = lambda number: STALL if number == 5 else None
    words = arguments(server, tmp_path, "--leave-out", "smoke")
    running = subprocess.Popen([sys.executable, "-m", "scripts.bench", *words], cwd=ROOT, stdout=subprocess.DEVNULL)
    while len(server.asked) < 5:
        assert running.poll() is None
        time.sleep(0.05)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    assert list(the_file(tmp_path)["parts"]) == ["selection/damp-air", "selection/dry-chairs"]
    server.fault = lambda _number: None
    assert bench.main(words) == 0
    content = the_file(tmp_path)
    assert content["complete"] is True and len(content["parts"]) == 15


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(scenarios.FOLDER, tmp_path / "tools"))


WRONG = {
    "an unknown field": ("about: A reading", "abuot: A reading", "abuot: is not known here"),
    "an unknown tool": ("{tool: read_sensor, arguments", "{tool: read_senser, arguments", "no tool read_senser"),
    "an unknown rule": ("at_most: 1", "at_least: 1", "at_least: no rule"),
    "a rule of another type": ("at_most: 1", "at_most: one", "at_most: 'one' is not a whole number"),
    "an expression that is none": ("answer_matches: '\\b63\\b'", "answer_matches: '('", "no regular expression"),
    "a form that is unknown": ("{room: print-store, quantity", "{room: {like: x}, quantity", "no form of a value"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_fault_in_a_scenario_is_told_with_file_line_scenario_and_field(folder: Path, name: str) -> None:
    before, after, said = WRONG[name]
    path = folder / "selection.yaml"
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))
    line = text[: text.index(before)].count("\n") + 1
    with pytest.raises(UserError) as caught:
        scenarios.load(folder)
    assert caught.value.fact.startswith(f"{path}:{line}: damp-air: ") and said in caught.value.fact


def test_a_category_with_a_scenario_too_few_is_refused(folder: Path) -> None:
    path = folder / "recovery.yaml"
    path.write_text(path.read_text().partition("  - id: refused")[0])
    with pytest.raises(UserError, match=r"recovery.yaml:3: scenarios: 2, not 3"):
        scenarios.load(folder)


def test_a_name_that_leaves_nothing_out_is_refused() -> None:
    keys = [scenario.key for scenario in SUITE.scenarios]
    assert scenarios.choose(keys, 1, ["recovery", "chains/crowns"]) == [
        "selection/damp-air",
        "precision/fahrenheit",
        "chains/which-sextant",
        "restraint/said-before",
    ]
    with pytest.raises(UserError, match="there is no recover to leave out"):
        scenarios.choose(keys, None, ["recover"])
