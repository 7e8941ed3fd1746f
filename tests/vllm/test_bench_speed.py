"""`python -m scripts.bench speed` with a real vLLM on the CPU and its real client, from the first server to the table;
and the client against servers that fail as no vLLM does on demand."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from ports import free_ports
from served import SERVE_ENVIRONMENT, Served, serve, share_caches, wait_until

from benchmarks.clients import kill, processes
from v4forge.bench import results, speed, vllm_bench
from v4forge.bench.speed import Point
from v4forge.bench.vllm_bench import Client, Load
from v4forge.errors import UserError
from v4forge.files import read_json
from v4forge.serving.deployment import Deployment

pytestmark = [pytest.mark.serve, pytest.mark.timeout(1200)]

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "models/tiny"
STAND_INS = ROOT / "tests/support"
SLO_MS = {"ttft": 5000.0, "tpot": 1000.0}
MODEL = "stand-in"
TOKENS = 8
TOKEN = json.dumps({"choices": [{"index": 0, "text": "a"}]})


class Bench:
    """The bench of one artifact in one folder; every run of it is the same command. `program`: the folder of vllm."""

    def __init__(self, folder: Path, artifact: Path, program: Path = SERVE_ENVIRONMENT / "bin") -> None:
        self.folder, self.reports = folder / "serve", folder / "reports"
        self.serves_in = folder / "serve-bench"  # as a bench names it
        self.port = free_ports(8)
        self.started: list[subprocess.Popen[str]] = []
        self.down = folder / "down"
        points = ["--shapes", "32x16", "--concurrency", "2", "--limit", "3"]
        places = ["--artifact", str(artifact), "--folder", str(self.folder), "--reports", str(self.reports)]
        served = ["--backend", "cpu", "--port", str(self.port), "--drain", "5"]
        self.words = [sys.executable, "-m", "scripts.bench", "speed", *points, *places, *served, "--program", program]

    def start(self, *drafts: int) -> subprocess.Popen[str]:
        """Of servers with so many drafts: without, and with two."""
        words = [*self.words, "--drafts", *map(str, drafts or (0, 2))]
        process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.started.append(process)
        return process

    @property
    def content(self) -> dict[str, Any]:
        found = results.files(self.reports, "speed")
        return read_json(found[-1]) if found else {}

    def wait_for(self, key: str, process: subprocess.Popen[str]) -> None:
        """Until the file has this part."""
        wait_until(lambda: key in self.content.get("parts", {}) or process.poll() is not None, 800)
        assert process.poll() is None, process.communicate()[0]

    def stop(self) -> None:
        for process in self.started:
            process.kill()
        serve("stop", "--folder", str(self.serves_in))


def lines_until(lines: Iterable[str], beginning: str) -> Iterator[str]:
    """The lines up to one that begins so."""
    for line in lines:
        yield line
        if line.startswith(beginning):
            return


@pytest.fixture
def bench(tmp_path: Path, tiny_artifact: Path, vllm_caches: Path) -> Iterator[Bench]:
    found = Bench(tmp_path, tiny_artifact)
    share_caches(found.serves_in, vllm_caches)
    yield found
    found.stop()


def stand_ins(folder: Path, down: Path) -> Path:
    """A folder of programs where `vllm serve`, which does not come up where the file `down` is, and `vllm bench` stand
    in for the real ones."""
    folder.mkdir()
    stand_in = f"exec env PYTHONPATH={ROOT} {sys.executable} {STAND_INS}"
    for name, lines in {
        "python": [f'exec {SERVE_ENVIRONMENT}/bin/python "$@"'],
        "vllm": [
            f'[ "$1" = bench ] && {stand_in}/bench_client_stand_in.py "$@"',
            f"[ -e {down} ] && exec sleep 600",
            f'{stand_in}/replica_stand_in.py "$@"',
        ],
    }.items():
        path = folder / name
        path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
        path.chmod(0o755)
    return folder


@pytest.fixture
def quick(tmp_path: Path, tiny_artifact: Path) -> Iterator[Bench]:
    """The bench whose servers and client stand in for vLLM's; the servers do not come up where the file `down` is."""
    found = Bench(tmp_path, tiny_artifact, stand_ins(tmp_path / "bin", tmp_path / "down"))
    yield found
    found.stop()


@pytest.mark.soak  # below: with stand-ins for vLLM, and with a real one that is there already
def test_a_server_is_started_for_the_bench_and_stopped_after_it(bench: Bench) -> None:
    running = bench.start(2)
    said, content = running.communicate()[0], bench.content
    assert running.returncode == 0, said
    assert content["complete"] and set(content["parts"]) == {"k2/32x16/c2", "k2/32x16/c2/again"}
    assert content["target"]["artifact"]["certificate"] == "ok" and content["versions"]["vllm"]
    for part in content["parts"].values():
        check_figures(part)
        assert 0 < part["acceptance"] < 1
    assert not Deployment.load(bench.serves_in)
    assert not processes(bench.port + 2)


def check_figures(part: dict[str, Any]) -> None:
    assert part["requests"] == part["completed"] == 3 * part["concurrency"] and part["prompt_tokens"] == [32, 32]
    assert 0 < part["tpot_ms"]["median"] <= part["tpot_ms"]["p99"] and part["ttft_ms"]["median"] > 0
    assert part["output_tok_s"] == pytest.approx(part["requests"] * 16 / part["duration_s"])


@pytest.mark.parametrize(
    "which", ["quick", pytest.param("bench", marks=pytest.mark.soak)], ids=["stand-ins", "real servers"]
)
def test_a_bench_that_is_killed_goes_on_and_one_whose_server_dies_keeps_what_it_measured(
    which: str, request: pytest.FixtureRequest
) -> None:
    """Killed when the first server's points are there and the other starts; the next run needs that one only, and it is
    killed after its first point."""
    bench: Bench = request.getfixturevalue(which)
    first = bench.start()
    assert first.stdout
    said = list(lines_until(first.stdout, "serve: 1 x TP=1, k=2"))
    first.kill()
    first.communicate()
    kept = bench.content["parts"]
    assert set(kept) == {"k0/32x16/c2", "k0/32x16/c2/again"}, said

    second = bench.start()
    bench.wait_for("k2/32x16/c2", second)
    bench.down.touch()
    kill(processes(bench.port + 2))
    text, content = second.communicate()[0], bench.content
    assert second.returncode == 1, text
    assert text.count("ready:") == 1 and "TP=1, k=0" not in text, "what needs no server starts none"
    assert len(results.files(bench.reports, "speed")) == 1 and len(content["commands"]) == 2
    parts = content["parts"]
    assert set(parts) == {*kept, "k2/32x16/c2"} and {key: parts[key] for key in kept} == kept
    assert set(content["failures"]) == {"k2/32x16/c2/again"}
    assert "not measured: k2/32x16/c2/again: " in text and "Traceback" not in text
    assert not content["complete"] and content["trial"] == 3
    assert not Deployment.load(bench.serves_in), "its server is stopped"

    assert parts["k0/32x16/c2"]["acceptance"] is None and 0 < parts["k2/32x16/c2"]["acceptance"] < 1
    for part in parts.values():
        check_figures(part)
    (one,) = content["summary"]["comparisons"]
    assert one["throughput_ratio"]["value"] > 0 and one["tpot_speedup"]["value"] > 0
    assert content["summary"]["drift"]["0"] and content["summary"]["stops_paying"][0]["sentence"] in text
    assert content["target"]["artifact"]["certificate"] == "ok" and content["versions"]["vllm"]
    assert {len(each) for each in content["hashes"].values()} == {64} and len(content["hashes"]) == 2


def test_a_first_server_that_does_not_start_is_the_error_and_no_list_of_points(bench: Bench) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", bench.port))
        taken.listen()
        said = bench.start().communicate()[0]
    assert said.splitlines()[-2].startswith(f"error: port {bench.port} on 127.0.0.1 is taken") and "k0/" not in said
    assert not bench.content["parts"] and not bench.content["complete"]


def test_what_is_served_already_is_measured_and_not_compared(tiny: Served, tmp_path: Path) -> None:
    words = ["--url", tiny.deployment.url, "--folder", str(tiny.folder), "--backend", "cpu", *tiny.key_words]
    words += ["--reports", str(tmp_path), "--program", str(SERVE_ENVIRONMENT / "bin")]
    points = ["--shapes", "32x16", "--concurrency", "2", "--limit", "3"]
    command = [sys.executable, "-m", "scripts.bench", "speed", *words, *points]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    content = results.newest(tmp_path, ["speed"])["speed"].content
    assert content["complete"] and content["settings"]["drafts"] == [2] and content["versions"]["vllm"]
    assert set(content["parts"]) == {"k2/32x16/c2", "k2/32x16/c2/again"} and not content["summary"]["comparisons"]
    for part in content["parts"].values():
        check_figures(part)
        assert 0 < part["acceptance"] < 1


class StandIn(BaseHTTPRequestHandler):
    """Streams its first answer as vLLM does; the others are of `fault`, a function of the handler and the prompt."""

    fault: ClassVar[Callable[[Any, str], None]]
    headers_seen: ClassVar[list[dict[str, str]]]

    def do_GET(self) -> None:
        self.send_error(404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.headers_seen.append(dict(self.headers))
        if body["prompt"] != "prompt 0":
            self.fault(body["prompt"])
            return
        self.begin()
        for _ in range(body["max_tokens"]):
            self.event(TOKEN)
        self.event(json.dumps({"choices": [], "usage": {"completion_tokens": body["max_tokens"], "prompt_tokens": 4}}))
        self.event("[DONE]")

    def begin(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()

    def event(self, text: str) -> None:
        self.wfile.write(f"data: {text}\n\n".encode())

    def log_message(self, *words: object) -> None:
        pass


@contextmanager
def standing_in(fault: Callable[[Any, str], None]) -> Iterator[tuple[str, type[StandIn]]]:
    kind = type("Handler", (StandIn,), {"fault": fault, "headers_seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", kind
    finally:
        server.shutdown()
        server.server_close()


def measured(url: str, folder: Path, limit_s: float) -> dict[str, Any]:
    """The figures of four requests, two at a time."""
    asked = Load(url, MODEL, [f"prompt {number}" for number in range(4)], TOKENS, 2, SLO_MS, 42)
    result = vllm_bench.measure(Client(str(SERVE_ENVIRONMENT / "bin")), asked, TINY, folder, "sesame", limit_s)
    return speed.figures(result, Point(0, 4, TOKENS, 2), 4, SLO_MS)


def test_a_server_that_fails_is_told_with_its_own_words_and_asked_with_the_key(tmp_path: Path) -> None:
    """One answer is whole, one 500, one is garbage, one breaks off."""

    def fault(handler: StandIn, prompt: str) -> None:
        if prompt == "prompt 1":
            handler.send_error(500, "Internal Server Error")
            return
        handler.begin()
        handler.event("{what is this" if prompt == "prompt 2" else TOKEN)

    with standing_in(fault) as (url, kind), pytest.raises(UserError) as told:
        measured(url, tmp_path, 120.0)
    assert [seen["Authorization"] for seen in kind.headers_seen] == ["Bearer sesame"] * 4
    assert re.fullmatch(r"[23] of 4 requests failed, the first with: Internal Server Error", told.value.fact)
    assert "sesame" not in (tmp_path / vllm_bench.LOG).read_text()


def test_a_server_that_stalls_is_given_up_and_its_client_ended(tmp_path: Path) -> None:
    def stall(handler: StandIn, _prompt: str) -> None:
        handler.begin()
        handler.event(TOKEN)
        time.sleep(60)

    with standing_in(stall) as (url, _), pytest.raises(UserError, match="not answered within 10 s"):
        measured(url, tmp_path, 10.0)
    listed = subprocess.run(["ps", "-wweo", "args="], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in listed


def test_a_folder_without_vllm_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no vllm in"):
        Client(str(tmp_path)).version(tmp_path)
