"""The page at / of the router in headless Chromium, and `make chat`: before a stand-in, and before a real vLLM."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from balanced import Router, router
from chat_stand_in import ends, says, stream, thinks
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright
from served import ROOT, Served, wait_until

from v4forge.bench.tools import browser
from v4forge.bench.tools.browser import CUT
from v4forge.serving import haproxy

pytestmark = [pytest.mark.serve, pytest.mark.timeout(600)]

ANSWERS = "**/v1/chat/completions"
MODELS = '{"data": [{"id": "stand-in", "max_model_len": 65536}]}'
# As a model may write it: a fence that comes in pieces, a line that no narrow window shows, and HTML.
TEXT = ["See <img src=x onerror=alert(1)>:\n", "``", "`python\nreturn 2 + 2  #", " two" * 60, "\n```\n", "It is ", "4."]
REPLY = stream(thinks("They ask for "), thinks("a sum."), *map(says, TEXT), *ends())
FIGURES = r"the first after \d+\.\d+ s(, [\d.]+ tok/s)?, "


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    with router(tmp_path_factory.mktemp("router"), 1) as made:
        yield made


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    if not any(map(shutil.which, browser.PROGRAMS)):
        pytest.skip("sudo apt-get install chromium")
    with sync_playwright() as playwright:
        words = ["--disable-gpu", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        with playwright.chromium.launch(executable_path=browser.program(), args=words) as launched:
            yield launched


Open = Callable[..., Page]


@pytest.fixture
def visit(chromium: Browser) -> Iterator[Open]:
    """Opens the page of an address in a window of its own; `reply` is what stands in for the API, where it does."""

    def open_page(address: str, reply: str = "", **options: object) -> Page:
        context = chromium.new_context(**options)  # type: ignore[arg-type]
        page = context.new_page()
        page.set_default_timeout(20_000)
        if reply:
            page.route("**/v1/models", lambda route: route.fulfill(body=MODELS))
            page.route(ANSWERS, answering(200, reply, {"Content-Type": "text/event-stream"}))
        page.goto(address)
        return page

    yield open_page
    for context in chromium.contexts:
        context.close()


def answering(status: int, body: str, headers: dict[str, str]) -> Callable[[Route], None]:
    return lambda route: route.fulfill(status=status, body=body, headers=headers)


def go_on(route: Route) -> None:
    """What the page asks, of an answer that is always the same and ends when it has to."""
    asked = json.loads(route.request.post_data or "{}") | {"temperature": 0, "ignore_eos": True}
    route.continue_(post_data=json.dumps(asked))


def ask(page: Page, prompt: str) -> None:
    page.fill("#prompt", prompt)
    page.press("#prompt", "Enter")


# --- what the router gives


def test_the_page_is_at_the_root_alone_and_may_do_little(front: Router) -> None:
    answer = httpx.get(front.public)
    assert (answer.status_code, answer.text) == (200, haproxy.PAGE.read_text(encoding="utf-8"))
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(row.strip().split(" ", 1) for row in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    for kind in ("script-src", "style-src"):
        assert re.fullmatch(r"'sha256-[\w+/]{43}='", policy[kind])
    assert httpx.head(front.public).headers["content-length"] == str(len(answer.content))
    for path in ("/chat.html", "/router/chat.html", "/index.html", "//", "/metrics", "/tokenize"):
        assert httpx.get(f"{front.public}{path}").status_code == 404, path
    assert [httpx.request(method, front.public).status_code for method in ("POST", "PUT", "DELETE")] == [404] * 3
    assert httpx.get(f"{front.admin}/").text != answer.text and front.workers[0].seen == []


# --- what the page does with what may come


def test_a_reply_is_shown_as_text_with_its_thoughts_folded_and_its_figures(front: Router, visit: Open) -> None:
    page = visit(front.public, REPLY)
    expect(page.locator("#model")).to_have_text("stand-in context 65,536")
    ask(page, "2 + 2?")
    shown = page.locator(".assistant")
    expect(shown.locator(".figures")).to_have_text(
        re.compile(rf"^30 tokens, {FIGURES}7 of 44 drafts accepted \(16%\)$")
    )
    assert shown.locator(".said").all_inner_texts() == ["See <img src=x onerror=alert(1)>:\n", "It is 4."]
    assert shown.locator("code").inner_text() == f"return 2 + 2  #{' two' * 60}\n"
    assert shown.locator("img").count() == 0
    expect(shown.locator("summary")).to_have_text(re.compile(r"^Thought for \d+\.\d\d s$"))
    assert not shown.locator(".thoughts").is_visible()
    shown.locator("summary").press("Enter")
    assert shown.locator(".thoughts").inner_text() == "They ask for a sum."


def test_nothing_is_cut_off_in_a_narrow_window_light_or_dark(front: Router, visit: Open) -> None:
    page = visit(front.public, REPLY, viewport={"width": 400, "height": 720})
    ask(page, "word " * 40 + "W" * 90)
    expect(page.locator(".assistant .figures")).to_be_visible()
    page.click("#more")
    assert page.evaluate(CUT) == []
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    for scheme, ground in (("light", "rgb(255, 255, 255)"), ("dark", "rgb(22, 24, 27)")):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == ground


REFUSALS = [
    (401, "there is no such API key", "", "The server asks for an API key."),
    (400, "40 tokens do not fit", "", "The server does not take this (400): 40 tokens do not fit."),
    (422, "it has ended two", "600", "This request is refused (422): it has ended two. Try again in 600 s."),
    (429, "full", "5", "Not now (429): full. Try again in 5 s."),
    (503, "no replica is ready", "10", "Nothing answers (503): no replica is ready. Try again in 10 s."),
    (200, "", "", "The answer was cut off: the server that gave it has gone."),
    (0, "", "", "The server cannot be reached."),
]


def test_what_goes_wrong_is_said_in_words_and_may_be_sent_again(front: Router, visit: Open) -> None:
    page = visit(front.public, REPLY)
    for status, message, after, words in REFUSALS:
        body = f'{{"error": {{"message": "{message}"}}}}' if message else ""
        refusal = answering(status, body, {"Retry-After": after} if after else {})
        page.route(ANSWERS, refusal if status else lambda route: route.abort())
        ask(page, "2 + 2?")
        expect(page.locator(".error")).to_have_text(words)
        expect(page.locator("#state")).to_have_text("Not answered")
        assert page.input_value("#prompt") == "2 + 2?"
    page.route(ANSWERS, answering(200, REPLY, {}))
    page.press("#prompt", "Enter")
    expect(page.locator(".figures")).to_be_visible()
    assert page.locator(".error").count() == 0 and page.locator(".user").count() == 1


def test_the_policy_holds_back_what_a_page_must_not_do(front: Router, visit: Open) -> None:
    page = visit(front.public, REPLY)
    page.evaluate("""() => {
      window.refused = [];
      addEventListener('securitypolicyviolation', (event) => refused.push(event.effectiveDirective));
      try { document.body.insertAdjacentHTML('beforeend', '<b>x</b>'); } catch (error) { /* the policy's */ }
      const script = document.createElement('script');
      try { script.append('window.ran = true'); document.body.append(script); } catch (error) { /* the same */ }
      fetch('http://127.0.0.1:9/').catch(() => {});
      document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/x.png'}));
    }""")
    page.wait_for_function("refused.includes('connect-src') && refused.includes('img-src')")
    assert "require-trusted-types-for" in page.evaluate("refused") and not page.evaluate("window.ran")


# --- a real vLLM


def test_a_person_talks_to_a_real_vllm_in_a_browser(tiny: Served, visit: Open) -> None:
    page = visit(tiny.deployment.url)
    page.route(ANSWERS, go_on)
    expect(page.locator("#state")).to_have_text("The server asks for an API key.")
    page.fill("#key", "wrong")
    page.press("#key", "Enter")
    expect(page.locator("#state")).to_have_text("The server does not know this API key.")
    page.fill("#key", tiny.key)
    page.press("#key", "Enter")
    expect(page.locator("#model")).to_have_text("deepseek-v4-tiny-w4a16 context 8,192")

    page.fill("#most", "40")
    page.check("#thinking")
    page.fill("#prompt", "Write a")
    page.press("#prompt", "Shift+Enter")
    page.keyboard.type("function.")
    page.press("#prompt", "Enter")
    expect(page.locator(".user .said")).to_have_text("Write a\nfunction.")
    expect(page.locator(".figures")).to_have_text(
        re.compile(rf"^40 tokens, {FIGURES}\d+ of \d+ drafts accepted \(\d+%\), cut at its limit$")
    )
    assert page.locator(".thoughts").text_content() and not page.locator(".thoughts").is_visible()

    page.fill("#most", "")
    page.uncheck("#thinking")
    ask(page, "Go on.")
    expect(page.locator(".assistant").last.locator(".said").first).not_to_be_empty()
    page.keyboard.press("Escape")
    expect(page.locator(".figures").last).to_have_text(re.compile(r" tokens?, .*, stopped$"))
    wait_until(lambda: tiny.computing == 0, 5)

    page.reload()
    expect(page.locator("#model")).to_contain_text("deepseek-v4-tiny-w4a16")  # the tab has kept the key
    assert page.evaluate("localStorage.length + document.cookie.length") == 0


def test_what_is_piped_into_make_chat_is_answered(tiny: Served, tmp_path: Path) -> None:
    words = ["--folder", str(tiny.folder), "--max-tokens", "12"]
    done = subprocess.run(
        [sys.executable, "-m", "scripts.chat", *words], cwd=ROOT, input="Hello", capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.strip() and done.stderr == ""
