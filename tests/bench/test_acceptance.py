"""v4forge.bench.acceptance and the draft bench against a server whose counts and faults are known."""

from __future__ import annotations

import json
import math
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from draft_stand_in import Handler, Server
from rich.console import Console

from scripts import bench, bench_draft
from v4forge.bench import acceptance, results, workloads
from v4forge.bench.acceptance import Answered, Kept, Sampling
from v4forge.bench.standing import Worth
from v4forge.errors import UserError
from v4forge.model import heldout

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny"
SAMPLING = Sampling(16)
PROMPT = workloads.written("code")[0]
T_9 = 2.262157  # Student's t with 9 degrees of freedom, 2.5% beyond it, from a table


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(acceptance, "SETTLE_S", 0.3)
    found = Server()
    threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


def count(server: Server, limit_s: float = 30.0) -> Answered:
    return acceptance.count(server.target(), PROMPT, 0, SAMPLING, limit_s=limit_s)


# A request and its counts.


def test_a_prompt_has_the_counts_that_its_answer_added(server: Server) -> None:
    assert count(server) == Answered(PROMPT.id, [1, 2, 3], list(range(16)), 8, 15, [6, 4])
    assert count(server).accepted == [6, 4]


def test_counters_that_lag_behind_the_answer_are_waited_for(server: Server) -> None:
    def late(handler: Handler) -> None:
        server.shown, server.hidden = server.metrics(), 2
        handler.answer(16)

    server.faults[0] = late
    assert count(server).drafts == 8


def test_greedy_requests_say_so_and_others_have_a_seed_of_their_own() -> None:
    greedy = SAMPLING.body(PROMPT, 3, "m")
    assert greedy["temperature"] == 0 and "seed" not in greedy and "ignore_eos" not in greedy
    drawn = Sampling(16, temperature=0.7, seed=40).body(PROMPT, 3, "m")
    assert (drawn["temperature"], drawn["seed"], drawn["top_p"]) == (0.7, 43, 1.0)


def stall(handler: Handler) -> None:
    time.sleep(2.5)


def hang_up(handler: Handler) -> None:
    handler.connection.close()


def restart(handler: Handler) -> None:
    handler.server.started_s += 50  # before the answer ends the client's wait for it
    handler.answer(16)


def others(handler: Handler) -> None:
    handler.server.counts["generation_tokens"] += 5
    handler.answer(16)


def impossible(handler: Handler) -> None:
    handler.server.counts["at"][0] += 100
    handler.answer(16)


FAULTS: dict[str, tuple[Callable[[Handler], None], str]] = {
    "500": (lambda h: h.reply("out of memory", 500), "HTTP 500, 'out of memory'"),
    "garbage": (lambda h: h.reply("<html>"), "answered '<html>', not JSON"),
    "another form": (lambda h: h.reply('{"choices": []}'), "answered in another form"),
    "no token ids": (lambda h: h.reply('{"choices": [{"text": "a"}], "usage": {}}'), "answered in another form"),
    "a stall": (stall, "was not answered within 1 s"),
    "a broken connection": (hang_up, "refused or broke off"),
    "a restart": (restart, "was started again meanwhile"),
    "another client": (others, "21 tokens were generated, 16 of them for us"),
    "counters elsewhere": (lambda h: h.answer(16, counted=0), "the counters know of 0"),
    "impossible counters": (impossible, "which cannot be"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_happens_instead_is_told_with_the_prompt(server: Server, fault: str) -> None:
    happens, told = FAULTS[fault]
    server.faults[0] = happens
    if fault == "counters elsewhere":
        server.count = lambda tokens: None  # type: ignore[method-assign]
    with pytest.raises(UserError) as caught:
        count(server, limit_s=1.0 if happens is stall else 30.0)
    assert told in caught.value.fact
    assert caught.value.fact.startswith(f"prompt {PROMPT.id}: ")
    assert caught.value.hint


def test_a_server_without_speculation_is_refused_with_the_command(server: Server) -> None:
    server.speculation = False
    with pytest.raises(UserError) as caught:
        acceptance.depth(server.target())
    assert "without speculation" in caught.value.fact
    assert caught.value.hint == "make serve DRAFTS=1"


# Figures.

COUNTED = [(20, 14), (20, 17), (20, 11), (20, 20), (20, 9), (20, 16), (20, 13), (20, 18), (20, 12), (20, 15)]


def answers(second: int = 3) -> list[Answered]:
    """Ten prompts of twenty drafts each; of two tokens, all but `second` of the accepted are accepted again."""
    return [Answered(str(n), [1], [2] * 40, of, 2 * of, [hit, hit - second]) for n, (of, hit) in enumerate(COUNTED)]


def test_sums_and_shares_are_those_of_all_prompts() -> None:
    part = acceptance.figures("code", answers())
    assert (part["drafts"], part["draft_tokens"], part["accepted"], part["accepted_at"]) == (200, 400, 260, [145, 115])
    assert part["acceptance"]["value"] == 260 / 400
    assert [each["value"] for each in part["by_position"]] == [145 / 200, 115 / 200]
    assert [each["value"] for each in part["given_earlier"]] == [145 / 200, 115 / 145]
    assert part["counted"][0] == [20, 14, 11]


def test_an_interval_is_wilsons_for_as_many_drafts_as_have_the_error_between_prompts() -> None:
    """For prompts of equal length that error is the textbook's, of a mean of ten rates."""
    rates = [hit / of for of, hit in COUNTED]
    p, error = statistics.mean(rates), statistics.stdev(rates) / math.sqrt(10)
    n = p * (1 - p) / error**2
    assert n < 200  # the prompts differ by more than chance
    middle, margin = p + T_9**2 / (2 * n), T_9 * math.sqrt(p * (1 - p) / n + T_9**2 / (4 * n * n))
    ends = [(middle + sign * margin) / (1 + T_9**2 / n) for sign in (-1, 1)]
    found = acceptance.figures("code", answers())["by_position"][0]
    assert [found["low"], found["high"]] == pytest.approx(ends, rel=1e-3)


def test_one_prompt_has_no_interval() -> None:
    told = acceptance.figures("code", answers()[:1])["acceptance"]
    assert told["value"] is not None and told["low"] is None


def test_a_workload_without_drafts_is_an_error() -> None:
    with pytest.raises(UserError, match="no draft was made in 1 answers"):
        acceptance.figures("code", [Answered("a", [1], [2] * 9, 0, 0, [0, 0])])


# Offline figures.


def artifact(folder: Path, k: int = 3, **more: Any) -> dict[str, Any]:
    """A folder with a tokenizer and a certificate, and what Target.facts say of it."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_bytes((TINY / "tokenizer.json").read_bytes())
    ends = {"value": 0.6, "low": 0.5, "high": 0.7}
    drafts = [{"k": n + 1, "acceptance_after_accepted": ends, "acceptance_rate": ends} for n in range(k)]
    deep = {"tokens": 8176, "sequences": 16, "models": {"artifact": {"drafts": drafts}}}
    (folder / "certificate.json").write_text(json.dumps({"ok": True, "sums_sha256": "ab", "deep": deep} | more))
    return {"folder": str(folder), "sums_sha256": "ab", "certificate": "ok"}


def test_offline_figures_are_those_of_the_served_artifacts_certificate(tmp_path: Path) -> None:
    found = acceptance.offline(artifact(tmp_path / "a"), k=2)
    assert found and (found.tokens, len(found.given_earlier)) == (8176, 2)
    told = acceptance.beside(acceptance.figures("code", answers()), found)
    assert told["source"].endswith("certificate.json")
    assert told["difference"]["acceptance"]["value"] == pytest.approx(0.05)
    assert told["difference"]["acceptance"]["low"] < 0 < told["difference"]["acceptance"]["high"]
    assert len(told["difference"]["given_earlier"]) == 2


def test_without_fitting_figures_there_are_none(tmp_path: Path) -> None:
    facts = artifact(tmp_path / "a")
    assert acceptance.offline(None, 1) is None
    assert acceptance.offline(facts | {"certificate": "stale"}, 1) is None
    assert acceptance.offline(artifact(tmp_path / "b", deep=None), 1) is None
    assert acceptance.offline(artifact(tmp_path / "c", k=1), 2) is None


def test_a_file_about_another_artifact_is_refused(tmp_path: Path) -> None:
    facts = artifact(tmp_path / "a")
    artifact(tmp_path / "b", sums_sha256="cd")
    with pytest.raises(UserError, match="another artifact than the one served"):
        acceptance.offline(facts, 1, tmp_path / "b" / "certificate.json")
    artifact(tmp_path / "c", deep=None)
    with pytest.raises(UserError, match="no figures of verify --deep"):
        acceptance.offline(facts, 1, tmp_path / "c" / "certificate.json")


# What is kept.


def test_kept_answers_are_read_by_verify(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "x.jsonl")
    for each in answers():
        kept.add(each)
    sequences = heldout.read_tokens(kept.path, vocab_size=1024)
    assert sequences[0].tolist() == [1] + [2] * 40
    assert Kept(kept.path).answers == answers()


def test_half_a_line_of_a_killed_run_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    whole = answers()[0].line()
    path.write_text(whole + answers()[1].line()[:30])
    assert Kept(path).answers == answers()[:1]
    assert path.read_text() == whole


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="was changed"):
        Kept(tmp_path / "x.jsonl")


# The bench.


def run(server: Server, folder: Path, *more: str) -> int:
    given = ["--url", server.url, "--folder", str(folder / "serve"), "--reports", str(folder / "reports")]
    config = folder / "artifact" / "config.json"
    if not config.exists():
        artifact(folder / "artifact")
        config.write_text("{}")
        (folder / "artifact" / "SHA256SUMS").write_text("")
    where = ["--artifact", str(folder / "artifact"), "--tokens", "16", "--request-timeout", "30"]
    return bench.main(["draft", *given, *where, *more])


def result(folder: Path) -> dict[str, Any]:
    return results.newest(folder / "reports", ["draft"])["draft"].content


def test_every_workload_is_measured_with_its_prompts(server: Server, tmp_path: Path) -> None:
    assert run(server, tmp_path, "--limit", "3") == 0
    content = result(tmp_path)
    assert content["complete"] and content["trial"] == 3
    assert set(content["parts"]) == set(workloads.WORKLOADS)
    assert content["parts"]["code"]["drafts"] == 3 * 8
    assert content["settings"]["drafts"] == 2 and content["sampling"]["temperature"] == 0
    assert set(content["hashes"]) == set(workloads.WORKLOADS)
    paths = {("messages" in each, isinstance(each.get("prompt"), list)) for each in server.asked}
    assert len(server.asked) == 12 and paths == {(False, True), (False, False), (True, False)}


def test_an_interrupted_workload_goes_on_behind_what_is_kept(server: Server, tmp_path: Path) -> None:
    server.faults[2] = FAULTS["500"][0]
    assert run(server, tmp_path, "--limit", "5", "--workloads", "code", "prose") == 1
    content = result(tmp_path)
    assert set(content["parts"]) == {"prose"} and not content["complete"]
    assert "2 of 5 prompts are kept" in content["failures"]["code"]["hint"]
    asked = len(server.asked)
    assert run(server, tmp_path, "--limit", "5", "--workloads", "code", "prose") == 0
    assert len(server.asked) - asked == 3
    content = result(tmp_path)
    assert content["complete"] and len(content["commands"]) == 2
    assert content["parts"]["code"]["prompts"] == 5 and content["failures"] == {}
    prompts = [each["prompt"] for each in server.asked if each["prompt"].startswith(PROMPT.asked["prompt"][:40])]
    assert len(prompts) == 1


def test_a_server_that_is_gone_ends_the_bench(server: Server, tmp_path: Path) -> None:
    def die(handler: Handler) -> None:
        handler.connection.close()
        server.server_close()
        threading.Thread(target=server.shutdown).start()

    server.faults[1] = die
    with pytest.raises(UserError, match="refused or broke off"):
        run(server, tmp_path, "--limit", "3")
    assert len(result(tmp_path)["failures"]) == results.GIVE_UP
    (kept,) = (tmp_path / "reports").glob("*-random.jsonl")
    assert len(kept.read_text().splitlines()) == 1


def test_a_dry_run_asks_nobody(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert bench.main(["draft", "--dry-run", "--limit", "4", "--reports", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "16 requests, one at a time: 4 random, 4 code, 4 chat, 4 prose" in said
    assert "4,096 tokens of answers at most" in said


@pytest.mark.parametrize(("option", "value"), [("--tokens", "3"), ("--temperature", "-1"), ("--limit", "0")])
def test_numbers_that_cannot_be_are_refused(option: str, value: str) -> None:
    with pytest.raises(UserError, match=f"{option} "):
        bench.main(["draft", option, value])


@pytest.mark.parametrize("published", [True, False])
def test_the_table_has_a_column_a_workload_and_fits_a_terminal(tmp_path: Path, published: bool) -> None:
    given = acceptance.offline(artifact(tmp_path / "a"), k=2)
    assert given
    part = acceptance.figures("code", answers())
    parts = {name: part | {"offline": acceptance.beside(part, given)} for name in workloads.WORKLOADS}
    parts["prose"]["offline"] = None  # of a run before verify --deep
    worth = Worth(None, "" if published else "tiny model", "", True)
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(bench_draft.table(parts, 2, worth))
    shown = console.export_text()
    assert all(
        name in shown for name in (*workloads.WORKLOADS, "offline", "72.5%", "acceptance length", "position 2, if 1")
    )
    assert ("92.9%" in shown) is published and ("not a result" in shown) is not published
    assert "…" not in shown
