"""The chat smoke: each prompt has answers that pass and answers that fail; the page of a model is looked at safely."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import openai_stand_in as stand_in
import pytest

from v4forge.bench.tools import answer_text, browser, smoke_prompts, strict_yaml
from v4forge.bench.tools.browser import PageError, open_page
from v4forge.bench.tools.chat_client import Reply
from v4forge.errors import UserError

PROMPTS = {prompt.name: prompt for prompt in smoke_prompts.load()}
ANSWERS = strict_yaml.load(stand_in.ANSWERS)
BAD = [(name, bad) for name, given in ANSWERS.items() for bad in given["bad"]]
needs_chromium = pytest.mark.skipif(
    not any(map(shutil.which, browser.PROGRAMS)), reason="sudo apt-get install chromium"
)


def no_programs(programs: Sequence[str]) -> list[tuple[bool, str]]:
    raise AssertionError("nothing is run here")


def part_of(name: str, answer: str, finish: str = "stop") -> dict[str, Any]:
    return smoke_prompts.part(PROMPTS[name], lambda _text: Reply(answer, finish=finish), no_programs)


def test_there_are_four_quick_prompts_four_of_writing_and_two_of_code() -> None:
    assert [prompt.group for prompt in PROMPTS.values()] == ["quick"] * 4 + ["quality"] * 4 + ["coding"] * 2
    assert set(ANSWERS) == set(PROMPTS) - {"calm-spells"}  # whose answers are run: tests/docker/test_smoke_program.py


@pytest.mark.parametrize("name", ANSWERS)
def test_a_good_answer_passes_every_check(name: str) -> None:
    part = part_of(name, ANSWERS[name]["good"])
    assert part["ok"], [check for check in part["checks"] if not check["ok"]]


@pytest.mark.parametrize(("name", "bad"), BAD)
def test_a_bad_answer_fails_the_check_that_it_should(name: str, bad: dict[str, str]) -> None:
    part = part_of(name, bad["answer"])
    failed = [check["name"] for check in part["checks"] if not check["ok"]]
    assert not part["ok"] and any(each.startswith(bad["fails"]) for each in failed), failed


@pytest.mark.parametrize(("answer", "finish"), [("55", "length"), ("", "stop"), (" \n", "stop")])
def test_an_answer_that_is_cut_or_empty_is_not_ok(answer: str, finish: str) -> None:
    part = part_of("division", answer, finish)
    assert not part["ok"] and part["checks"][0]["name"] == "a whole answer"


def test_code_is_taken_from_the_block_that_holds_it() -> None:
    answer = "Use it so:\n```python\nprint(calm_spells(range(100), 1, 2), 'a long line')\n```\nIt is:\n"
    answer += "```\ndef calm_spells(a, b, c):\n    return []\n```\n"
    assert answer_text.code(answer, r"\bdef\s+calm_spells\b").startswith("def calm_spells")
    assert answer_text.code("def f(): pass", "def") == "def f(): pass"


def test_a_check_that_cannot_be_is_told_with_file_line_and_prompt(tmp_path: Path) -> None:
    path = tmp_path / "smoke.yaml"
    text = smoke_prompts.FILE.read_text()
    path.write_text(text.replace("- language: german", "- language: finnish"))
    line = text[: text.index("- language: german")].count("\n") + 1
    with pytest.raises(UserError) as caught:
        smoke_prompts.load(path)
    assert caught.value.fact.startswith(f"{path}:{line}: lighthouse: language: finnish is not known")


HOSTILE = {
    "a script without end": "<script>while (true) {}</script>",
    "a script without end, later": "<p>x</p><script>setTimeout(() => { while (true) {} }, 20)</script>",
    "all of the memory": "<script>const a = []; while (true) a.push(new Array(1e6).fill(1))</script>",
    "a page that loads itself": "<script>location.reload()</script>",
}


@needs_chromium
@pytest.mark.parametrize("html", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_page_ends_at_the_limit_and_leaves_nothing(html: str) -> None:
    with pytest.raises(PageError), open_page(html, limit_s=1) as page:
        for _ in range(200):
            page.page.wait_for_timeout(50)
            page.count("p")
    assert not list(Path("/tmp").glob("v4forge-page-*/SingletonLock"))


REACHING = """<h1>Hi  there</h1><img src="file:///etc/passwd"><img src="http://HOST/img"><iframe src="http://HOST/frame">
</iframe><link rel="preconnect" href="http://HOST"><link rel="prefetch" href="http://HOST/prefetch"><form id="form"
action="http://HOST/form" method="post" target="_blank"></form><script>
fetch("http://HOST/fetch").catch(() => { document.title = "no" });
new WebSocket("ws://HOST/socket"); new EventSource("http://HOST/events");
navigator.sendBeacon("http://HOST/beacon", "x");
const code = 'fetch("http://HOST/worker"); new WebSocket("ws://HOST/worker-socket")';
new Worker(URL.createObjectURL(new Blob([code])));
const peer = new RTCPeerConnection({iceServers: [{urls: "turn:HOST?transport=tcp", username: "a", credential: "b"}]});
peer.createDataChannel("x"); peer.createOffer().then(offer => peer.setLocalDescription(offer));
window.open("http://HOST/window"); form.submit(); alert("hello")</script>"""


@needs_chromium
def test_a_page_reaches_neither_network_nor_files_nor_keys_and_what_it_asked_for_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("API_KEY", "sesame")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host = f"127.0.0.1:{listener.getsockname()[1]}"
        with open_page(REACHING.replace("HOST", host)) as page:
            assert page.texts("h1") == ["Hi there"]
            page.page.wait_for_timeout(500)
            assert page.title == "no"
            assert browsers() and not any(b"sesame" in environment for environment in browsers())
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert {f"http://{host}/img", f"http://{host}/fetch", f"ws://{host}/socket"} <= set(page.asked)
    assert any("file:///etc/passwd" in error for error in page.errors)


def browsers() -> list[bytes]:
    """The environments of the browsers that run."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if b"--user-data-dir=" in (place / "cmdline").read_bytes():
                found.append((place / "environ").read_bytes())
    return found


@needs_chromium
def test_a_page_that_is_left_in_an_endless_script_does_not_keep_the_program() -> None:
    with open_page("<button onclick='setTimeout(() => { while (true) {} }, 300)'>go</button>") as page:
        page.click("button")


@needs_chromium
def test_texts_that_do_not_fit_are_found() -> None:
    cut = "<p style='width: 40px; overflow: hidden; white-space: nowrap'>this is far too long for it</p>"
    outside = "<p style='position: absolute; left: 700px; width: 300px'>outside</p>"
    scrolls = "<div style='overflow-x: auto; width: 200px'><p style='width: 2000px'>this one scrolls</p></div>"
    with open_page(f"<body>{cut}{outside}{scrolls}<p>fits</p>", width=800) as page:
        assert page.cut_off() == ["this is far too long for it", "outside"]


def test_without_chromium_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError) as caught:
        part_of("tide-table", ANSWERS["tide-table"]["good"])
    assert caught.value.hint == "sudo apt-get install chromium"
