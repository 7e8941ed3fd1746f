"""The doctor's checks of what is outside: the hub, the token for it, and the clock, by which certificates are judged.

Without a token first, and with it only where the hub asks for one. No check tells the token.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from v4forge import http_clients, pins
from v4forge import network as of_network
from v4forge.errors import UserError
from v4forge.model import hub_rows
from v4forge.network import Network
from v4forge.outcomes import NotChecked, Outcome, failed, ok, warning
from v4forge.pipeline import requirements
from v4forge.pipeline.doctor.host import Host

LIMIT_S = 5.0
# A certificate's times are exact to the second, those of signed requests to some minutes.
SKEW_WARNING_S, SKEW_FAILED_S = 30.0, 300.0
REFUSALS = (401, 403)  # a token that is unknown, one that is not let in
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
TRUE = {"1", "ON", "YES", "TRUE"}
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
LOGIN = ".venv/bin/hf auth login"
SET_CLOCK = "sudo timedatectl set-ntp true"


@dataclass(frozen=True)
class Answer:
    """Of the hub: HTTP status, seconds, how far our clock is ahead of its (None where it does not tell), and whether
    the repository asks who wants its files: of a gated one anybody may see that it is there."""

    status: int
    seconds: float
    ahead_s: float | None
    asks: bool


def endpoint(host: Host) -> str:
    return Network(host.environment).hub()


def shown(host: Host) -> str:
    """The endpoint without a name and password in it."""
    parts = urlsplit(endpoint(host))
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def repositories(host: Host) -> list[str]:
    """What the run downloads: paths of the hub's API."""
    values = pins.read()
    data_set = hub_rows.parsed(host.data_set) if host.data_set else hub_rows.pinned()
    model, corpus = f"models/{values['FLASH_REPO']}", f"datasets/{data_set.repo}"
    if not host.full_size:
        return [model]
    return [*([] if host.upstream else [model]), *([] if host.corpus else [corpus])]


def ask(host: Host, repository: str, token: str = "") -> Answer:
    """What the hub says of a repository. Raises UserError where it does not answer in time."""

    def get() -> Answer:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        before, started = host.clock(), time.monotonic()
        try:
            with http_clients.client(Network(host.environment), timeout=LIMIT_S) as client:
                found = client.get(f"{endpoint(host)}/api/{repository}", headers=headers)
        except httpx.TimeoutException:
            raise UserError(f"{shown(host)} did not answer within {LIMIT_S:.0f} s", _try(host)) from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            if of_network.is_distrust(error):
                raise of_network.distrusted(shown(host), error) from None
            why = str(error) or type(error).__name__
            raise UserError(f"{shown(host)} cannot be reached: {why}", _try(host)) from None
        taken_s = time.monotonic() - started
        asks = found.status_code in REFUSALS or _gated(found)
        return Answer(found.status_code, taken_s, _ahead(found.headers.get("date"), before, host), asks)

    return host.once(f"hub {repository} {bool(token)}", get)


def _gated(found: httpx.Response) -> bool:
    try:
        content = found.json()
    except ValueError:
        return False
    return isinstance(content, dict) and bool(content.get("gated"))


def _try(host: Host) -> str:
    if host.environment.get("HF_ENDPOINT"):
        return "unset HF_ENDPOINT"
    return "export HF_ENDPOINT=<a mirror's address>"


def _ahead(date: str | None, before: float, host: Host) -> float | None:
    """Seconds; the answer's time is some moment of its second, and between our two readings of the clock."""
    try:
        theirs: datetime = parsedate_to_datetime(date or "")
    except (TypeError, ValueError):
        return None
    middle = (before + host.clock()) / 2
    return middle - theirs.timestamp() - 0.5


def hub(host: Host) -> Outcome:
    """The hub answers, and has the repositories."""
    if name := next((name for name in OFFLINE if host.environment.get(name, "").upper() in TRUE), ""):
        return _needed(host, f"{name} is set: nothing may be downloaded", f"unset {name}")
    if not (wanted := repositories(host)):
        return ok("source and corpus are here: nothing is downloaded")
    for repository in wanted:
        try:
            found = ask(host, repository)
        except UserError as error:
            without = "" if host.upstream else "; a copy of the checkpoint will do: make fetch FROM=<its folder>"
            return _needed(host, error.fact + without, error.hint)
        if found.status >= 500 or found.status == 429:
            return _needed(host, f"{shown(host)} answers HTTP {found.status} now", host.make("doctor"))
        if found.status == 404:
            fact = f"{shown(host)} has no {repository}"
            return _needed(host, fact, _try(host))
        if found.status >= 400 and found.status not in REFUSALS:
            return _needed(host, f"{shown(host)} answers HTTP {found.status} to {repository}", _try(host))
    return ok(f"{shown(host)} answers in {found.seconds:.2f} s")


def _needed(host: Host, fact: str, fix: str) -> Outcome:
    """The full size cannot do without the hub unless all is here already."""
    if not host.full_size:
        return warning(f"{fact}; PROFILE=tiny downloads nothing", fix)
    case = (host.config(), host.sizes(), host.settings)
    missing = requirements.steps(["fetch"], *case)[0].writes_bytes
    here = "the source is here" + ("" if host.corpus else ", the corpus only where it was downloaded before")
    return failed(fact, fix) if missing else warning(f"{fact}; {here}", fix)


def token(host: Host) -> Outcome:
    """A token is there where a repository asks for one, and is taken."""
    held = held_token(host)
    present = "a token is there" if held else "no token"
    gated = []
    for repository in repositories(host):
        try:
            if ask(host, repository).asks:
                gated.append(repository)
        except UserError:
            raise NotChecked(f"{present}; the hub did not answer", _try(host), "hub") from None
    for repository in gated:
        if not held:
            return failed(f"{repository} is gated and there is no token", LOGIN)
        status = ask(host, f"{repository}/auth-check", held).status
        if status == 401:
            variable = next((name for name in TOKENS if host.environment.get(name, "").strip()), "")
            again = f"unset {variable} && {LOGIN}" if variable else LOGIN  # the variable comes first
            return failed(f"{repository} is gated; the hub does not know the token (HTTP 401)", again)
        if status in REFUSALS:
            page = f"{shown(host)}/{repository.removeprefix('models/')}"
            fact = f"{repository} is gated; the token is not let in (HTTP {status})"
            return failed(fact, f"accept the terms: {page}")
        if status >= 400:
            fact = f"{repository} is gated; {shown(host)} does not say whether the token is let in (HTTP {status})"
            raise NotChecked(fact, host.make("fetch"))
    needed = f"{' and '.join(gated)} takes it" if gated else "none is needed: no repository of the run is gated"
    return ok(f"{present}; {needed}")


def held_token(host: Host) -> str:
    """The token of huggingface_hub's usual places, "" where there is none."""
    environment = host.environment
    for name in TOKENS:
        if value := environment.get(name, "").strip():
            return value
    cache = environment.get("XDG_CACHE_HOME") or f"{environment.get('HOME', '')}/.cache"
    home = environment.get("HF_HOME") or f"{cache}/huggingface"
    try:
        return Path(environment.get("HF_TOKEN_PATH") or f"{home}/token").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def clock(host: Host) -> Outcome:
    """Our clock goes with the hub's, or says that it is kept."""
    try:
        ahead = ask(host, repositories(host)[0]).ahead_s
    except (UserError, IndexError):
        ahead = None
    if ahead is None:
        return _kept(host)
    off = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the hub's"
    if abs(ahead) > SKEW_FAILED_S:
        return failed(f"the clock is {off}: certificates and signed requests fail", SET_CLOCK)
    if abs(ahead) > SKEW_WARNING_S:
        return warning(f"the clock is {off}", SET_CLOCK)
    return ok(f"within {max(1, round(abs(ahead)))} s of the hub's")


def _kept(host: Host) -> Outcome:
    """What systemd or chrony say."""
    told = host.command(["timedatectl", "show", "--property=NTPSynchronized", "--value"])
    if told and told.code == 0 and told.said in ("yes", "no"):
        if told.said == "yes":
            return ok("kept by NTP, says timedatectl")
        return warning("not kept by NTP, says timedatectl", SET_CLOCK)
    told = host.command(["chronyc", "tracking"])
    if told and told.code == 0:
        if "Leap status     : Normal" in told.out:
            return ok("kept by NTP, says chronyc")
        return warning("not kept by NTP, says chronyc", "sudo chronyc makestep")
    fact = "neither the hub nor timedatectl nor chronyc tells the time"
    raise NotChecked(fact, "sudo apt-get install chrony")
