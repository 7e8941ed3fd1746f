"""Stands in for an OpenAI-compatible server: its answers come from a function of the test, faults from another."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from v4forge import scenarios, smoke, strict_yaml
from v4forge.scenarios import Scenario

MODEL = "stand-in"
PLAYERS = Path(__file__).with_name("tool_players.yaml")
ANSWERS = Path(__file__).with_name("smoke_answers.yaml")
Choice = dict[str, Any]
Answer = Callable[[Mapping[str, Any]], Choice]
Fault = Callable[[BaseHTTPRequestHandler], None]


class Server(ThreadingHTTPServer):
    """`asked`: the bodies of the chat requests so far. fault: of the request of this number, from 1 on, or None."""

    daemon_threads = True

    def __init__(self, answer: Answer) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = answer
        self.fault: Callable[[int], Fault | None] = lambda _number: None
        self.asked: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away, or a fault of the test's."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        return None

    def do_GET(self) -> None:
        pages = {"/v1/models": {"data": [{"id": MODEL, "max_model_len": 8192}]}, "/version": {"version": "0"}}
        if self.path in pages:
            send(self, 200, json.dumps(pages[self.path]))
        else:
            send(self, 404, "{}")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        fault = self.server.fault(len(self.server.asked))
        if fault:
            return fault(self)
        send(self, 200, json.dumps({"choices": [self.server.answer(body)], "usage": {"completion_tokens": 1}}))


def send(handler: BaseHTTPRequestHandler, status: int, text: str) -> None:
    content = text.encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


def choice(text: str | None = None, calls: list[tuple[str, str]] | None = None, **more: Any) -> Choice:
    """A choice of a chat completion; calls: names, and arguments as they are written."""
    listed = [
        {"id": f"x{number}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for number, (name, arguments) in enumerate(calls or [])
    ]
    message = {"role": "assistant", "content": text, "tool_calls": listed, **more.pop("message", {})}
    return {"message": message, "finish_reason": "tool_calls" if calls else "stop", **more}


def turn(row: Mapping[str, Any]) -> Choice:
    return choice(row.get("say"), [(name, json.dumps(given)) for name, given in row.get("calls", [])])


def players() -> dict[str, list[dict[str, Any]]]:
    """By scenario: the players, each with `turns` and the `points` that they are worth."""
    return dict(strict_yaml.load(PLAYERS))


def play(turns: Mapping[str, list[Choice]]) -> Answer:
    """Answers with the turns of what the last message of the user begins, one after the other, the last one again."""

    def answer(body: Mapping[str, Any]) -> Choice:
        messages = body["messages"]
        last = max(number for number, message in enumerate(messages) if message["role"] == "user")
        own = turns[messages[last]["content"]]
        done = sum(message["role"] == "assistant" for message in messages[last:])
        return own[min(done, len(own) - 1)]

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
    for prompt in smoke.load():
        turns[prompt.text] = [choice(good.get(prompt.name, "I cannot do that."))]
    return play(turns)


@contextmanager
def serving(answer: Answer) -> Iterator[Server]:
    server = Server(answer)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
