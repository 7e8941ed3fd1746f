"""Asking one replica, through the router or itself: JSON, text and metrics, in time, with the key.

Whatever it may answer instead is a UserError, and so is the answer of another replica. The key is in no message.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import requests
from urllib3.exceptions import HTTPError, ReadTimeoutError

from v4forge.errors import UserError
from v4forge.serving import metrics as vllm_metrics
from v4forge.serving.metrics import Reading

PIN = "X-V4Forge-Replica"
GET_LIMIT_S = 15.0
# The first requests of a shape may compile kernels.
ANSWER_LIMIT_S = 180.0
# Of an answer: more than any model writes, and no more than a program can hold.
MOST_BYTES = 64 << 20
LOGS = "make serve-logs"

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
    headers = {"Accept-Encoding": "identity"}
    headers |= {PIN: str(at.replica)} if at.pinned else {}
    headers |= {"Authorization": f"Bearer {at.key}"} if at.key else {}
    method = "GET" if body is None else "POST"
    where = f"{method} {at.url}{path}"
    ends_s = time.monotonic() + limit_s
    try:
        with requests.Session() as session:
            session.trust_env = False  # neither a proxy nor .netrc is for a replica on this machine
            with session.request(
                method, at.url + path, json=body, headers=headers, timeout=limit_s, allow_redirects=False, stream=True
            ) as answer:
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
    except (requests.ConnectionError, HTTPError):
        raise UserError(f"{where}: the connection was refused or broke off", "make serve-status") from None
    except (requests.RequestException, ValueError) as error:
        # Their text may hold the headers, and so the key.
        raise UserError(
            f"{where} cannot be asked: {type(error).__name__}", "is the address right, the key printable?"
        ) from None
    text = b"".join(parts).decode(errors="replace")
    if at.pinned and (served := answer.headers.get(PIN)) != str(at.replica):
        who = f"replica {served}" if served else "no replica of the router's"
        raise UserError(f"{where}: {who} answered (HTTP {answer.status_code}); {at} is down?", "make serve-status")
    if answer.status_code != 200:
        hint = STATUS_HINTS.get(answer.status_code, LOGS)
        raise UserError(f"{where}: HTTP {answer.status_code}, {short(text)}", hint)
    return text


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
