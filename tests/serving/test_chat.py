"""A conversation with a served model: what comes of a stream, what is kept, the program in a pipe and a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from chat_stand_in import ends, going_on, refusing, says, streaming, thinks
from openai_stand_in import MODEL, Answer, Server, serving

from scripts import chat as program
from v4forge.checkout import ROOT
from v4forge.errors import UserError
from v4forge.files import write_json
from v4forge.serving.chat import Chat, Reply
from v4forge.serving.deployment import STATE, Deployment

PROGRAM = [sys.executable, "-m", "scripts.chat"]
SUM = streaming(thinks("They ask "), thinks("for a sum."), says("It is"), says(" 4."), *ends())


@contextmanager
def chatting(answer: Answer, **settings: object) -> Iterator[tuple[Chat, Server]]:
    with serving(answer) as server:
        chat = Chat(server.url, proxied=False, **settings)  # type: ignore[arg-type]
        chat.meet()
        yield chat, server


def told(chat: Chat, prompt: str = "2 + 2?") -> Reply:
    reply = Reply(time.monotonic())
    for _ in chat.say(prompt, reply):
        pass
    return reply


# --- replies


def test_a_reply_is_said_and_thought_and_tells_what_it_took() -> None:
    with chatting(SUM) as (chat, _):
        reply = told(chat)
    assert (reply.text, reply.thoughts, reply.finish) == ("It is 4.", "They ask for a sum.", "stop")
    shape = r"30 tokens, the first after \d\.\d\d s, [\d.]+ tok/s, 7 of 44 drafts accepted \(16%\)"
    assert re.fullmatch(shape, reply.figures), reply.figures


@pytest.mark.parametrize(
    ("reply", "figures"),
    [
        (Reply(1.0), ""),
        (Reply(1.0, 1.5, 1.5, events=1, usage={"completion_tokens": 1}), "1 token, the first after 0.50 s"),
        (Reply(1.0, 2.0, 12.0, events=20, usage={"completion_tokens": 31}),
         "31 tokens, the first after 1.00 s, 3.0 tok/s, 1.6 tokens an event"),
        (Reply(1.0, 13.0, 14.0, events=2), "2 events, the first after 12.0 s"),
        (Reply(0.0, usage={"completion_tokens": 9}, finish="length"), "9 tokens, cut at its limit"),
    ],
)  # fmt: skip
def test_what_the_server_does_not_count_is_not_told(reply: Reply, figures: str) -> None:
    assert reply.figures == figures


def test_the_older_name_of_thoughts_is_known() -> None:
    with chatting(streaming(thinks("Hm.", "reasoning_content"), says("No."), *ends())) as (chat, _):
        assert told(chat).thoughts == "Hm."


def test_what_was_said_is_asked_again_and_settings_are_sent() -> None:
    with chatting(SUM, system="Be short.", thinking=True, max_tokens=9) as (chat, server):
        told(chat, "2 + 2?")
        told(chat, "And now?")
    first, second = server.asked
    assert second["messages"] == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "It is 4."},
        {"role": "user", "content": "And now?"},
    ]
    assert first["model"] == MODEL and first["max_tokens"] == 9 and first["chat_template_kwargs"] == {"thinking": True}


@pytest.mark.parametrize(
    ("answer", "fact", "hint", "kept"),
    [
        (streaming(says("It is")), "the answer was cut off", "make serve-status", 2),
        (streaming(thinks("Hm."), {"error": {"message": "the engine is dead"}}), "failed: 'the engine is dead'",
         "make serve-logs", 0),
        (streaming("{"), "answered in another form", "make serve-logs", 0),
        (streaming({"choices": [{"delta": 3}]}), "answered in another form", "make serve-logs", 0),
        (refusing(401, "no"), "the server asks for an API key", "make chat API_KEY_FILE=<file>", 0),
        (refusing(400, "40 tokens do not fit"), r"does not take this \(400\): 40 tokens", "/reset", 0),
        (refusing(422, "it has ended two", 600), r"is refused \(422\): it has ended two", "try again in 600 s", 0),
        (refusing(429, "full", 5), r"not now \(429\): full", "try again in 5 s", 0),
        (refusing(503, "no replica", 10), r"nothing answers \(503\): no replica", "try again in 10 s", 0),
        (refusing(500, "x"), r"has failed \(500\): x", "make serve-logs", 0),
        (lambda handler, _: handler.say(502, "<html>"), r"has failed \(502\)$", "make serve-logs", 0),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_said_in_words_and_only_a_reply_is_kept(
    answer: Answer, fact: str, hint: str, kept: int
) -> None:
    with chatting(answer) as (chat, _), pytest.raises(UserError) as caught:
        told(chat)
    assert re.search(fact, caught.value.fact), caught.value.fact
    assert caught.value.hint.startswith(hint)
    assert len(chat.turns) == kept


def test_a_wrong_key_and_a_server_that_is_not_there_are_said_in_words() -> None:
    with chatting(refusing(401, "no"), key="wrong") as (chat, _), pytest.raises(UserError, match="does not know this"):
        told(chat)
    with pytest.raises(UserError, match="cannot be reached"):
        told(chat)
    assert "wrong" not in repr(chat)


# --- the program


def piped(url: str, prompt: str, *words: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*PROGRAM, "--url", url, *words], cwd=ROOT, input=prompt.encode(), capture_output=True)


def test_in_a_pipe_there_is_the_reply_and_nothing_else() -> None:
    with serving(streaming(thinks("Hm."), says("a\x1b[2J"), says("é\n"), *ends())) as server:
        done = piped(server.url, "What\nis it?\n", "--thinking")
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, "a\x1b[2Jé\n\n", b"")
    (asked,) = server.asked
    assert asked["messages"] == [{"role": "user", "content": "What\nis it?\n"}]


def test_without_an_address_it_is_what_make_serve_has_started(tmp_path: Path) -> None:
    done = subprocess.run([*PROGRAM, "--folder", tmp_path], cwd=ROOT, input=b"x", capture_output=True)
    assert (done.returncode, done.stdout) == (1, b"")
    hint = "hint: make serve, or make chat URL=http://<host>:<port>"
    assert done.stderr.decode().splitlines() == [f"error: nothing is served from {tmp_path}", hint]


@pytest.mark.parametrize("cert", ["", "/mine/cert.pem"])
def test_what_make_serve_has_started_is_asked_with_its_own_key(tmp_path: Path, cert: str) -> None:
    with serving(SUM) as server:
        # With TLS at the address of this machine, one port above: its certificate is for another name.
        port = server.server_port - bool(cert)
        (tmp_path / "keys").write_text("bounded:one:5\nfree:two\n")
        kept = Deployment(str(tmp_path), "", "host", port=port, cert=cert, key_file=str(tmp_path / "keys"))
        write_json(tmp_path / STATE, asdict(kept))
        chat = program.chat_of(program.parse(["--folder", str(tmp_path), "--system", "Be short."]))
        told(chat)
    assert chat.system == "Be short." and server.keys == {"Bearer two"}


@dataclass
class Person:
    """Who sits before the program, in a terminal of its own."""

    screen: int
    program: subprocess.Popen[bytes]
    seen: bytes = b""

    def sees(self, text: str) -> None:
        """Waits for a text, and has seen all before it."""
        while text.encode() not in self.seen:
            self.seen += os.read(self.screen, 65536)
        self.seen = self.seen.partition(text.encode())[2]

    def types(self, text: str) -> None:
        os.write(self.screen, text.encode())


@contextmanager
def at_a_terminal(url: str) -> Iterator[Person]:
    screen, there = pty.openpty()

    def own() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    environment = os.environ | {"TERM": "dumb", "COLUMNS": "200"}
    talking = subprocess.Popen(
        [*PROGRAM, "--url", url], cwd=ROOT, stdin=there, stdout=there, stderr=there, env=environment, preexec_fn=own
    )
    os.close(there)
    try:
        yield Person(screen, talking)
    finally:
        talking.kill()
        talking.wait()
        os.close(screen)


@pytest.mark.timeout(60)
def test_in_a_terminal_a_stop_ends_the_reply_and_a_command_is_obeyed() -> None:
    with serving(going_on("on and \x1b]0;on")) as server, at_a_terminal(server.url) as person:
        person.sees(f"{MODEL} at {server.url}, context 65,536")
        person.sees("> ")
        person.types("Go on.\n")
        person.sees("on and �]0;on")
        person.types("\x03")
        person.sees("1 event, the first after")
        person.sees(", stopped")
        server.answer = SUM
        person.types("/thinking on\n")
        person.sees("it thinks first")
        person.types("2 + 2?\n")
        person.sees("thought for 0.0 s, 19 characters")
        person.sees("It is 4.")
        person.sees("7 of 44 drafts accepted (16%)")
        person.types("/thoughts\n")
        person.sees("They ask for a sum.")
        person.types("/reset\n")
        person.sees("a new conversation")
        server.answer = refusing(429, "full", 5)
        person.types("2 + 2?\n")
        person.sees("error: not now (429): full\r\nhint: try again in 5 s")
        person.sees("> ")
        person.types("\x04")
        assert person.program.wait(20) == 0
    continued, anew = server.asked[1:]
    assert [turn["role"] for turn in continued["messages"]] == ["user", "assistant", "user"]
    assert continued["chat_template_kwargs"] == {"thinking": True} and len(anew["messages"]) == 1
