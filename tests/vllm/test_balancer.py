"""The router's configuration in a real haproxy, before servers that fail in ways that a healthy vLLM does not."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from balanced import router
from ports import free_ports
from served import wait_until

from v4forge.serving import haproxy
from v4forge.serving.haproxy import PIN, Addresses

pytestmark = pytest.mark.serve


@dataclass
class Backend:
    """A server whose answer to a POST is `answer`: a status, or "reset" for none; `seen` are the bodies it got."""

    port: int
    answer: int | str = 200
    seen: list[bytes] = field(default_factory=list)

    @contextmanager
    def running(self) -> Iterator[None]:
        backend = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.reply(200)

            def do_POST(self) -> None:
                backend.seen.append(self.rfile.read(int(self.headers["Content-Length"])))
                if backend.answer == "reset":
                    self.connection.close()
                else:
                    self.reply(int(backend.answer))

            def reply(self, status: int) -> None:
                self.send_response(status)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *_: object) -> None: ...

        server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        server.handle_error = lambda *_: None  # type: ignore[method-assign]  # of connections that we have closed
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield
        finally:
            server.shutdown()
            server.server_close()


@dataclass
class Balanced:
    public: str
    admin: str
    backends: list[Backend]

    def post(self, content: bytes = b"{}", at: str = "", **headers: str) -> httpx.Response:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        return httpx.post(f"{at or self.public}/v1/completions", content=content, headers=sent, timeout=30)


@pytest.fixture
def balanced(tmp_path: Path) -> Iterator[Callable[..., Balanced]]:
    with ExitStack() as stack:

        def start(answers: list[int | str]) -> Balanced:
            first = free_ports(2 + len(answers))
            backends = [Backend(first + 2 + place, answer) for place, answer in enumerate(answers)]
            addresses = [f"127.0.0.1:{backend.port}" for backend in backends]
            public, admin = f"127.0.0.1:{first}", f"127.0.0.1:{first + 1}"
            (tmp_path / "haproxy.cfg").write_text(
                haproxy.configuration(Addresses(public, admin, addresses), 30, haproxy.Limits(), by_prefix=False)
            )
            for backend in backends:
                stack.enter_context(backend.running())
            program = shutil.which("haproxy", path="/usr/sbin:/usr/bin:/usr/local/sbin")
            assert program, "apt-get install haproxy"
            log = stack.enter_context(open(tmp_path / "log", "wb"))
            process = subprocess.Popen([program, "-W", "-db", "-f", tmp_path / "haproxy.cfg"], stdout=log, stderr=log)
            stack.callback(process.wait, 30)
            stack.callback(process.terminate)
            wait_until(lambda: healthy(f"http://{public}"), 20)
            return Balanced(f"http://{public}", f"http://{admin}", backends)

        yield start


def healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.HTTPError:
        return False


@pytest.mark.parametrize("failure", ["reset", 500, 503])
def test_a_request_that_one_replica_fails_is_answered_by_another(
    balanced: Callable[..., Balanced], failure: int | str
) -> None:
    front = balanced([failure, 200])
    answers = [front.post(b'{"n": %d}' % number) for number in range(6)]
    assert {(answer.status_code, answer.headers[PIN]) for answer in answers} == {(200, "1")}
    assert len(front.backends[0].seen) >= 1  # it was asked


def test_a_long_request_is_repeated_whole(balanced: Callable[..., Balanced]) -> None:
    front = balanced(["reset", 200])
    contents = [bytes(range(256)) * 3600 + b"%d" % number for number in range(4)]  # 0.9 MB
    assert [front.post(content).status_code for content in contents] == [200] * 4
    assert front.backends[0].seen and set(front.backends[1].seen) == set(contents)


def test_a_pin_chooses_on_the_admin_address_only(balanced: Callable[..., Balanced]) -> None:
    front = balanced([200, 200])
    pinned = [front.post(at=front.admin, **{PIN: "1"}).headers[PIN] for _ in range(6)]
    assert pinned == ["1"] * 6
    assert {front.post(**{PIN: "1"}).headers[PIN] for _ in range(6)} == {"0", "1"}


def test_without_a_replica_the_error_is_json_with_a_command(balanced: Callable[..., Balanced], tmp_path: Path) -> None:
    answer = balanced(["reset"]).post()
    assert (answer.status_code, answer.json()["error"]["message"]) == (502, "the replica that answered has gone")
    with router(tmp_path, 1) as front:
        front.workers[0].kill()
        refused = [front.ask(n=n) for n in range(2)]  # the first finds that nobody listens, the other knows it
        assert "retry-after" not in front.ask(at=front.admin).headers  # status and probe are not to wait
    assert [each.headers["retry-after"] for each in refused] == ["10", "10"]
    told = {(each.status, json.loads(each.lines[0])["error"]["message"]) for each in refused}
    assert told == {(503, "no replica is ready; make serve-status says why")}
