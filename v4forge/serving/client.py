"""Asking one replica, through the router or itself: JSON, text and metrics, in time, with the key.

Whatever it may answer instead is a UserError, and so is the answer of another replica. The key is in no message.
"""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import HTTPError, ReadTimeoutError

from v4forge import http_clients, network
from v4forge.errors import UserError
from v4forge.serving import metrics as vllm_metrics
from v4forge.serving.metrics import Reading

PIN = "X-V4Forge-Replica"
GET_LIMIT_S = 15.0
# The first requests of a shape may compile kernels.
ANSWER_LIMIT_S = 180.0
# Between requests that were refused for now, where the answer does not say; doubled each time.
BACKOFF_S, LONGEST_BACKOFF_S = 1.0, 30.0
# Of an answer: more than any model writes, and no more than a program can hold.
MOST_BYTES = 64 << 20
LOGS, BENCH = "make serve-logs", "make bench"
# Of the models that a server lists, how many are named.
MODELS_SHOWN = 5
API = re.compile(r"/*(/v1(/(chat/)?completions|/models|/responses)?)?/*$")

STATUS_HINTS = {
    401: "ask with the API key that the replicas were started with",
    403: "ask with the API key that the replicas were started with",
    404: f"is {PIN}'s listener asked, and the model's name right? make serve-status",
    503: "make serve-status",
}


@dataclass(frozen=True)
class Endpoint:
    """Where a replica is asked: through the router's admin listener, pinned, or itself at its own `url`."""

    replica: int
    url: str
    key: str = field(default="", repr=False)
    pinned: bool = True

    def __str__(self) -> str:
        return f"replica {self.replica}"


def endpoints(admin: str, replicas: int, key: str = "") -> list[Endpoint]:
    """The replicas behind the router whose admin listener is at `admin`."""
    return [Endpoint(replica, admin.rstrip("/"), key) for replica in range(replicas)]


def metrics(at: Endpoint) -> Reading:
    """The replica's counters and gauges now."""
    return vllm_metrics.read(fetch(at, "/metrics"), time.time())


def ask(at: Endpoint, path: str, body: Mapping[str, Any] | None = None, limit_s: float | None = None) -> Any:
    """The JSON that a replica answers, as fetch() asks. Raises UserError for anything else."""
    text = fetch(at, path, body, limit_s)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{path} answered {short(text)}, not JSON", f"{LOGS}: is vLLM behind {at.url}?") from None


def fetch(at: Endpoint, path: str, body: Mapping[str, Any] | None = None, limit_s: float | None = None) -> str:
    """What a replica answers to GET, or POST with a body. Raises UserError for what is not its answer in time.

    limit_s: for the whole answer, and once more for the last wait.
    """
    limit_s = limit_s or (GET_LIMIT_S if body is None else ANSWER_LIMIT_S)
    headers = {"Accept-Encoding": "identity"} | _headers(at)
    method = "GET" if body is None else "POST"
    where = f"{method} {at.url}{path}"
    ends_s = time.monotonic() + limit_s
    for attempt in count():
        answer, text = _asked(where, method, at.url + path, body, headers, limit_s, ends_s)
        pause_s = _come_back(answer, attempt)
        if pause_s is None:
            break
        if time.monotonic() + pause_s >= ends_s:
            fact = (
                f"{where}: HTTP {answer.status_code}, come back in {pause_s:.0f} s, where an answer has {limit_s:.0f} s"
            )
            raise UserError(fact, "wait that long, or ask for less at a time, then the same command again")
        time.sleep(pause_s)
    _check_server(at, where, answer)
    if answer.status_code != 200:
        hint = STATUS_HINTS.get(answer.status_code, LOGS)
        raise UserError(f"{where}: HTTP {answer.status_code}, {short(text)}", hint)
    return text


def status(at: Endpoint, path: str) -> int:
    """The status of a replica's answer to GET. Raises UserError where none comes, or another replica's."""
    where, ends_s = f"GET {at.url}{path}", time.monotonic() + GET_LIMIT_S
    answer, _ = _asked(where, "GET", at.url + path, None, _headers(at), GET_LIMIT_S, ends_s)
    _check_server(at, where, answer)
    return answer.status_code


def _headers(at: Endpoint) -> dict[str, str]:
    pinned = {PIN: str(at.replica)} if at.pinned else {}
    return pinned | ({"Authorization": f"Bearer {at.key}"} if at.key else {})


def _check_server(at: Endpoint, where: str, answer: requests.Response) -> None:
    """Raises UserError where another has answered than was asked."""
    if at.pinned and (served := answer.headers.get(PIN)) != str(at.replica):
        who = f"replica {served}" if served else "no replica of the router's"
        raise UserError(f"{where}: {who} answered (HTTP {answer.status_code}); {at} is down?", "make serve-status")


def _asked(
    where: str,
    method: str,
    url: str,
    body: Mapping[str, Any] | None,
    headers: Mapping[str, str],
    limit_s: float,
    ends_s: float,
) -> tuple[requests.Response, str]:
    """An answer, of whatever status, and its text. Raises UserError where none comes, or too much of it."""
    try:
        # Neither a proxy nor .netrc is for what is measured.
        with (
            http_clients.session(proxied=False) as session,
            session.request(
                method, url, json=body, headers=headers, timeout=limit_s, allow_redirects=False, stream=True
            ) as answer,
        ):
            parts, size = [], 0
            # What has come; iter_content would wait for a whole piece, however slowly it comes.
            while part := answer.raw.read1(1 << 16):
                parts.append(part)
                size += len(part)
                if size > MOST_BYTES:
                    raise UserError(f"{where} answered more than {MOST_BYTES >> 20} MiB", LOGS)
                if time.monotonic() > ends_s:
                    raise requests.ReadTimeout
    except (requests.Timeout, ReadTimeoutError):
        raise UserError(f"{where} was not answered within {limit_s:.0f} s", LOGS) from None
    except requests.exceptions.SSLError as error:
        if network.is_distrust(error):
            raise network.distrusted(where, error) from None
        raise UserError(f"{where}: it does not speak TLS as we do", "is it http:// and not https://?") from None
    except (requests.ConnectionError, HTTPError):
        raise UserError(f"{where}: the connection was refused or broke off", "make serve-status") from None
    except (requests.RequestException, ValueError) as error:
        # Their text may hold the headers, and so the key.
        raise UserError(
            f"{where} cannot be asked: {type(error).__name__}", "is the address right, the key printable?"
        ) from None
    return answer, b"".join(parts).decode(errors="replace")


def _come_back(answer: requests.Response, attempt: int) -> float | None:
    """Seconds until a request may be made again that was refused for now; None where it was not."""
    asked_s = network.retry_after(answer.headers.get("Retry-After"))
    if answer.status_code == 429:
        return asked_s if asked_s is not None else min(BACKOFF_S * 2**attempt, LONGEST_BACKOFF_S)
    return asked_s if answer.status_code == 503 else None


def address(given: str, command: str = BENCH) -> str:
    """What an address that a user gives to a command stands for, http://host:port or https://…, without what OpenAI's
    API has below.

    Raises UserError for one that is none.
    """
    url = given.strip()
    url = url if "://" in url else f"http://{url}"
    hint = f"{command} URL=http://<host>:<port>"
    if fault := network.fault_of(url, ("http", "https")):
        raise UserError(f"{network.shown(given)} {fault}", hint)
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise UserError(
            f"{network.shown(url)} has a name or a password in it", f"give the key: {command} API_KEY_FILE=<file>"
        )
    return f"{parts.scheme}://{parts.netloc}{API.sub('', parts.path)}"


def chosen(url: str, served: Sequence[Mapping[str, Any]], model: str, command: str = BENCH) -> Mapping[str, Any]:
    """The entry of a model among those that a server lists; of one that has several names, the first. Raises UserError
    where there are several, and where the one that is asked for is not among them."""
    names = [str(each["id"]) for each in served]
    listed = ", ".join(names[:MODELS_SHOWN]) + (" and more" if len(names) > MODELS_SHOWN else "")
    again = f"{command} URL={url} MODEL={shlex.quote(names[0])}" if names else LOGS
    if model:
        if model not in names:
            raise UserError(f"{url} serves no {model}, but {listed}", again)
        return served[names.index(model)]
    if len({str(each.get("root") or each["id"]) for each in served}) > 1:
        raise UserError(f"{url} serves several models: {listed}", again)
    return served[0]


@contextmanager
def form_of(where: str) -> Iterator[None]:
    """Around code that takes an answer apart: one of another form is the server's fault, told as such."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise UserError(f"{where} answered in another form: {type(error).__name__} {error}", LOGS) from None


def short(value: Any) -> str:
    """The beginning of what somebody else wrote, on one line."""
    text = repr(value)
    return text if len(text) <= 120 else text[:119] + "…"
