"""A page in headless Chromium, as a person would see it: its texts, styles and errors, clicks.

The page may be hostile: it reaches no network and no file, runs in Chromium's sandbox (as root there is none) with a
fresh profile, and everything that it does ends at a limit.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from v4forge.errors import UserError

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page, Route

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = (
    "--headless",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    # Whatever goes around the routes below: no name resolves, no datagram leaves, a proxy that is not there.
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--force-webrtc-ip-handling-policy=disable_non_proxied_udp",
)
NO_PROXY = "http://127.0.0.1:9"  # the discard port, where nothing listens
PLACE = "http://page.invalid/"
# Of the caller's environment; the rest may hold keys.
VARIABLES = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ", "TMPDIR", "FONTCONFIG_FILE", "FONTCONFIG_PATH")
START_LIMIT_S = 60.0
LIMIT_S = 30.0
WAIT_MS = 2000  # for an element that is clicked to be visible
LOOK = "look at the page in a browser"
MOST = 100  # messages and addresses that are kept

# Elements with a text of their own that is wider or higher than its box shows, or outside of the page; not those that
# are made a pixel small, for screen readers alone.
CUT = """() => [...document.querySelectorAll('body *')].filter(element => {
  const own = [...element.childNodes].some(node => node.nodeType === Node.TEXT_NODE && node.textContent.trim());
  if (!own || element.closest('svg, script, style, noscript')) return false;
  const style = getComputedStyle(element), box = element.getBoundingClientRect();
  if (style.display === 'none' || style.visibility === 'hidden' || box.width < 2 || box.height < 2) return false;
  const clips = ['hidden', 'clip'].includes(style.overflowX) || ['hidden', 'clip'].includes(style.overflowY);
  const cut = clips &&
    (element.scrollWidth > element.clientWidth + 1 || element.scrollHeight > element.clientHeight + 1);
  let scrolls = false;
  for (let at = element; at; at = at.parentElement)
    scrolls ||= ['auto', 'scroll'].includes(getComputedStyle(at).overflowX);
  return cut || (!scrolls && box.right > document.documentElement.clientWidth + 1);
}).map(element => element.textContent.trim().slice(0, 80))"""


class PageError(UserError):
    """The page's own fault: it broke down, does not answer, or has not what was looked for."""


@dataclass
class Opened:
    """A page that is open. `errors`: what its console and its scripts complained of; `asked`: the addresses that it
    wanted and did not get. Every method raises PageError once the limit is over, or when the page does not do it."""

    page: Page = field(repr=False)
    limit_s: float
    errors: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    @property
    def title(self) -> str:
        with self.answering():
            return self.page.title()

    def count(self, selector: str) -> int:
        """How many elements a CSS selector finds."""
        with self.answering():
            return self.page.locator(selector).count()

    def texts(self, selector: str) -> list[str]:
        """What each of them shows, with single spaces."""
        with self.answering():
            return [" ".join(text.split()) for text in self.page.locator(selector).all_inner_texts()]

    def style(self, selector: str, name: str) -> str:
        """The computed style of the first one, colours as rgb(…)."""
        with self.answering():
            found = self._first(selector)
            return str(found.evaluate("(e, name) => getComputedStyle(e).getPropertyValue(name)", name, timeout=WAIT_MS))

    def click(self, selector: str) -> None:
        """Clicks the first one, as soon as it can be."""
        with self.answering():
            self._first(selector).click(timeout=WAIT_MS)

    def _first(self, selector: str) -> Locator:
        """The page is loaded: what is not there now is not waited for."""
        found = self.page.locator(selector)
        if not found.count():
            raise PageError(f"no such element: {selector}", LOOK)
        return found.first

    def evaluate(self, script: str) -> Any:
        """The JSON value of a JavaScript expression or function."""
        with self.answering():
            return self.page.evaluate(script)

    def cut_off(self) -> list[str]:
        """Texts that do not fit: cut by their box, or outside of the page where nothing scrolls."""
        return [str(text) for text in self.evaluate(CUT)]

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Around what asks the page: no answer is the page's fault."""
        from playwright.sync_api import Error

        try:
            yield
        except Error as error:
            if self.ended.is_set():
                fact = f"the page did not come to rest within {self.limit_s:.0f} s"
            else:
                fact = f"the page does not do it: {error.message.splitlines()[0]}"
            raise PageError(fact, LOOK) from None


def program() -> str:
    """Where Chromium is. Raises UserError where it is not."""
    for name in PROGRAMS:
        if found := shutil.which(name):
            return found
    raise UserError("pages are looked at in Chromium, which is not installed", "sudo apt-get install chromium")


def version() -> str:
    """What Chromium calls itself. Raises UserError where it is not, or does not say."""
    executable = program()
    try:
        said = subprocess.run([executable, "--version"], capture_output=True, text=True, timeout=LIMIT_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"{executable} does not start: {error}", f"{executable} --version") from None
    return said.stdout.strip()


@contextmanager
def open_page(source: str | Path, width: int = 1280, height: int = 900, limit_s: float = LIMIT_S) -> Iterator[Opened]:
    """The page of an HTML text or file, loaded, in a window of so many pixels; as long as the block lasts.

    limit_s: for the block and all in it, once Chromium has started. Raises UserError when there is no Chromium, or it
    does not start; PageError when the page does not come to an end of loading.
    """
    from playwright.sync_api import Error, sync_playwright  # only who opens a page has it

    executable = program()
    try:
        html = source.read_text(encoding="utf-8") if isinstance(source, Path) else source
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source} cannot be read: {error}", "give an HTML file") from None
    as_root = os.geteuid() == 0
    with (
        tempfile.TemporaryDirectory(prefix="v4forge-page-", ignore_cleanup_errors=True) as profile,
        sync_playwright() as playwright,
    ):
        ended = threading.Event()
        watchdog = threading.Timer(limit_s, _end, (profile, ended))
        watchdog.daemon = True
        try:
            try:
                context = playwright.chromium.launch_persistent_context(
                    profile,
                    executable_path=executable,
                    args=[*ARGUMENTS, *(["--no-sandbox"] if as_root else [])],
                    ignore_default_args=["--disable-popup-blocking"],
                    chromium_sandbox=not as_root,
                    proxy={"server": NO_PROXY},
                    viewport={"width": width, "height": height},
                    accept_downloads=False,
                    service_workers="block",
                    timeout=START_LIMIT_S * 1000,
                    env={**{name: os.environ[name] for name in VARIABLES if name in os.environ}, "HOME": profile},
                )
            except Error as error:
                fact = f"{executable} does not start: {error.message.splitlines()[0]}"
                raise UserError(fact, f"{executable} --headless --dump-dom about:blank") from None
            watchdog.start()
            opened = Opened(context.pages[0], limit_s, ended=ended)
            _listen(opened, html)
            with opened.answering():
                opened.page.goto(PLACE, wait_until="load", timeout=limit_s * 1000)
            yield opened
        finally:
            watchdog.cancel()
            if not ended.is_set():
                # A page whose script never ends keeps a polite close waiting.
                _end(profile, threading.Event())


def _listen(opened: Opened, html: str) -> None:
    """Serves the page and nothing else; keeps what it complains of."""

    def answer(route: Route) -> None:
        if route.request.url == PLACE and route.request.is_navigation_request():
            route.fulfill(body=html, content_type="text/html; charset=utf-8")
            return
        if not route.request.url.endswith("/favicon.ico"):
            _note(opened.asked, route.request.url)
        route.abort("blockedbyclient")

    opened.page.context.route("**/*", answer)
    opened.page.on("websocket", lambda socket: _note(opened.asked, socket.url))
    opened.page.on("pageerror", lambda error: _note(opened.errors, str(error)))
    opened.page.on("crash", lambda _page: _note(opened.errors, "the page has crashed"))
    opened.page.on("console", lambda message: _note(opened.errors, message.text) if message.type == "error" else None)


def _note(kept: list[str], text: str) -> None:
    if len(kept) < MOST:
        kept.append(text[:300])


def _end(profile: str, ended: threading.Event) -> None:
    """Ends the browser of this profile, whatever its pages do."""
    ended.set()
    marked = f"--user-data-dir={profile}".encode()
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            with suppress(OSError):
                if marked in (place / "cmdline").read_bytes().split(b"\0"):
                    os.kill(int(place.name), signal.SIGKILL)
