"""A server in the place of vLLM's that answers as a test wants: what a player of the suite would, late, wrongly, or not
any more."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from v4forge.bench.tools import scenarios, smoke_prompts, strict_yaml
from v4forge.bench.tools.scenarios import Scenario
from v4forge.checkout import ROOT

MODEL = "stand-in"
PLAYERS = ROOT / "tests/data/tool_players.yaml"
ANSWERS = ROOT / "tests/data/smoke_answers.yaml"
Choice = dict[str, Any]
Body = Mapping[str, Any]
Answer = Callable[["Handler", Body], None]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        known = {"/v1/models": {"data": [{"id": MODEL, "max_model_len": 65536}]}, "/version": {"version": "0"}}
        self.say(200 if self.path in known else 404, json.dumps(known.get(self.path, {})))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append(body)
            self.server.keys.add(self.headers.get("Authorization", ""))
            fault = self.server.fault(len(self.server.asked))
        (fault or self.server.answer)(self, body)

    def say(self, status: int, text: str, kind: str = "application/json") -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def choose(self, choice: Choice) -> None:
        self.say(200, json.dumps({"model": MODEL, "choices": [choice], "usage": {"completion_tokens": 1}}))


class Server(ThreadingHTTPServer):
    """`asked`: the bodies of the requests so far, `keys` what they authorized themselves with. fault: of the request of
    this number, from 1 on, or None."""

    daemon_threads = True

    def __init__(self, answer: Answer, port: int) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.answer, self.lock = answer, threading.Lock()
        self.fault: Callable[[int], Answer | None] = lambda _number: None
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: Any) -> None:
        """A client that is gone is no news."""


@contextmanager
def serving(answer: Answer, port: int = 0) -> Iterator[Server]:
    server = Server(answer, port)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


# Answers of any text, and faults.


def saying(text: str) -> Answer:
    """As a completion, and as a turn of a conversation."""
    return lambda handler, _body: handler.choose({"text": text, **choice(text)})


def text_as_answer(status: int, text: str, kind: str = "application/json") -> Answer:
    return lambda handler, _body: handler.say(status, text, kind)


def late(seconds: float, then: Answer) -> Answer:
    def answer(handler: Handler, body: Body) -> None:
        time.sleep(seconds)
        then(handler, body)

    return answer


broken = text_as_answer(500, json.dumps({"error": {"message": "the engine is dead"}}))
garbage = text_as_answer(200, '{"choices": [{"text": "\x00\x01')


def broken_off(handler: Handler, _: Body) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "5000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def drip(handler: Handler, _: Body) -> None:
    """A byte now and then, without end."""
    handler.send_response(200)
    handler.end_headers()
    for _number in range(100):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.1)


def dying(after: int, before: Answer) -> Answer:
    """Answers so many requests, then closes the port and breaks every connection off."""

    def answer(handler: Handler, body: Body) -> None:
        server = handler.server
        if len(server.asked) <= after:
            return before(handler, body)
        server.socket.close()
        handler.close_connection = True

    return answer


# Players of the tool-calling suite and of the chat smoke.


def choice(text: str | None = None, calls: list[tuple[str, str]] | None = None, **more: Any) -> Choice:
    """A choice of a chat completion; calls: names, and arguments as they are written."""
    listed = [
        {"id": f"x{number}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for number, (name, arguments) in enumerate(calls or [])
    ]
    message = {"role": "assistant", "content": text, "tool_calls": listed, **more.pop("message", {})}
    return {"index": 0, "message": message, "finish_reason": "tool_calls" if calls else "stop", **more}


def turn(row: Mapping[str, Any]) -> Choice:
    return choice(row.get("say"), [(name, json.dumps(given)) for name, given in row.get("calls", [])])


def players() -> dict[str, list[dict[str, Any]]]:
    """By scenario: the players, each with `turns` and the `points` that they are worth."""
    return dict(strict_yaml.load(PLAYERS))


def play(turns: Mapping[str, list[Choice]]) -> Answer:
    """Answers with the turns of what the last message of the user begins, one after the other, the last one again."""

    def answer(handler: Handler, body: Body) -> None:
        messages = body["messages"]
        last = max(number for number, message in enumerate(messages) if message["role"] == "user")
        own = turns[messages[last]["content"]]
        done = sum(message["role"] == "assistant" for message in messages[last:])
        handler.choose(own[min(done, len(own) - 1)])

    return answer


def script(scenario: Scenario, turns: list[Choice]) -> dict[str, list[Choice]]:
    return {str(scenario.messages[-1]["content"]): turns}


def perfect(extra: Mapping[str, str] | None = None) -> Answer:
    """Wins every scenario and every conversation of the smoke. extra: answers by the prompt's name."""
    suite = {scenario.name: scenario for scenario in scenarios.load().scenarios}
    turns: dict[str, list[Choice]] = {}
    for name, listed in players().items():
        turns |= script(suite[name], [turn(row) for row in listed[0]["turns"]])
    good = {name: given["good"] for name, given in strict_yaml.load(ANSWERS).items()} | dict(extra or {})
    for prompt in smoke_prompts.load():
        turns[prompt.text] = [choice(good.get(prompt.name, "I cannot do that."))]
    return play(turns)
