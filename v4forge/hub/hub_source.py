"""A repository of the hub as a source of files, through huggingface_hub: its listing with hashes, and bytes by Range.

Files come by plain HTTP, not by Xet, and not by hf_hub_download: those begin a file anew when a process was killed, and
here every byte that came stays. The token goes to the hub alone: a redirect to another host drops it.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import httpx
from huggingface_hub import HfApi, constants, get_session, get_token, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from v4forge import http_clients, network
from v4forge.checkpoint.incoming import Expected
from v4forge.errors import UserError
from v4forge.hub.partial_file import Partial
from v4forge.network import Network

RETRIES = 5  # one after the other, none of which brought anything
BACKOFF_S = 1.0  # before the first, doubled for each further one
LONGEST_BACKOFF_S = 60.0
TRANSIENT = (408, 429, 500, 502, 503, 504)
LISTING_TIMEOUT_S = 30.0
AGAIN = "check the network, then run it again, it goes on where it stopped: make fetch PROFILE=flash"
LOGIN = ".venv/bin/hf auth login"
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")

TOLD_S = 3.0  # a wait from here on is told

T = TypeVar("T")
log = logging.getLogger(__name__)


class Stopped(Exception):
    """The run ends: another file failed, or somebody pressed Ctrl-C."""


@dataclass
class Hub:
    """A repository at a commit. The endpoint and the token are those of the usual variables."""

    repo: str
    revision: str
    endpoint: str = field(default_factory=lambda: Network().hub())
    stop: threading.Event = field(default_factory=threading.Event)

    attempts = 2  # of a file that comes damaged

    def __post_init__(self) -> None:
        http_clients.serve_hub()
        check_token(get_token())

    def listing(self) -> list[Expected]:
        """All files, with the hub's hashes. Raises UserError for a repository that the caller cannot see."""
        api = HfApi(endpoint=self.endpoint)

        def ask() -> list[Expected]:
            info = api.model_info(self.repo, revision=self.revision, files_metadata=True, timeout=LISTING_TIMEOUT_S)
            if info.sha != self.revision:
                raise ValueError(f"it gave {info.sha} for {self.revision}")
            return [_expected(each) for each in info.siblings or []]

        try:
            return self._retried(ask, self.repo)
        except (ValueError, KeyError, TypeError, AttributeError, httpx.InvalidURL) as error:
            fact = f"{self.endpoint} does not list {self.repo} as a hub does: {_said(error)}"
            raise UserError(fact, "correct HF_ENDPOINT, or --repo") from None

    def bring(self, partial: Partial, took: Callable[[int], None], until: int | None = None) -> None:
        """Adds to a partial file what it lacks of its first `until` bytes, of all by default. `took` gets its size, now
        and then. Raises UserError when the hub refuses, or does not answer any more."""
        end = partial.expected.bytes if until is None else until
        if partial.size > partial.expected.bytes:
            partial.clear()
        self._retried(lambda: self._stream(partial, end, took), partial.expected.name, lambda: partial.size)

    def blame(self, name: str, fault: str) -> UserError:
        """The error for a file that came damaged each time."""
        return UserError(
            f"{name} came damaged {self.attempts} times: {fault}",
            "run it again later, or past the proxy: make fetch PROFILE=flash",
        )

    def _stream(self, partial: Partial, end: int, took: Callable[[int], None]) -> None:
        start, whole = partial.size, partial.expected.bytes
        if start >= end:
            return
        headers = build_hf_headers(token=None) | {"Accept-Encoding": "identity"}
        if start or end < whole:
            headers["Range"] = f"bytes={start}-{end - 1}"
        url = hf_hub_url(self.repo, partial.expected.name, revision=self.revision, endpoint=self.endpoint)
        with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
            hf_raise_for_status(response)
            if start and response.status_code == 200:  # whoever answered knows no Range
                partial.clear()
            for part in response.iter_bytes():
                if self.stop.is_set():
                    raise Stopped
                partial.write(part[: max(whole - partial.size, 0) + 1])  # one too many tells that there are too many
                took(partial.size)
                if partial.size > whole or (partial.size >= end and end < whole):
                    return
        if partial.size < end:
            raise httpx.RemoteProtocolError(f"it ended after {partial.size:,} of {end:,} bytes")

    def _retried(self, action: Callable[[], T], what: str, size: Callable[[], int] = lambda: 0) -> T:
        """Does what the network may spoil, again until RETRIES in a row have brought nothing more."""
        failures, before = 0, size()
        while True:
            try:
                return action()
            except (httpx.HTTPError, HfHubHTTPError, OfflineModeIsEnabled) as error:
                if not _is_transient(error):
                    raise self._refusal(error, what) from None
                failures, before = (0, size()) if size() > before else (failures + 1, before)
                if failures > RETRIES:
                    raise UserError(f"{what} could not be downloaded: {_said(error)}", AGAIN) from None
                pause_s = _patience(error, failures)
                if pause_s >= TOLD_S:
                    log.warning("%s: %s; once more in %.0f s", what, _said(error), pause_s)
                if self.stop.wait(pause_s):
                    raise Stopped from None

    def _refusal(self, error: Exception, what: str) -> UserError:
        """What a user can do about an answer that will not change by asking again."""
        if isinstance(error, GatedRepoError):
            whose = "this token has no access to it" if get_token() else "no token is set"
            page = f"{self.endpoint}/{self.repo}"
            return UserError(f"{self.repo} is gated, and {whose}", f"accept its terms on {page}, then: {LOGIN}")
        if isinstance(error, RevisionNotFoundError):
            return UserError(f"{self.repo} has no revision {self.revision}", "correct FLASH_REVISION in versions.env")
        if isinstance(error, RepositoryNotFoundError):
            return UserError(f"{self.repo} is not on the hub, or not for you", f"{LOGIN}, or correct FLASH_REPO")
        if isinstance(error, OfflineModeIsEnabled):
            return UserError(
                "HF_HUB_OFFLINE is set, and fetch downloads", "unset it, or: make fetch PROFILE=flash FROM=<folder>"
            )
        if network.is_distrust(error):
            return network.distrusted(self.endpoint, error)
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403) and get_token():
            return UserError(f"the hub refuses the token: {_said(error)} for {what}", LOGIN)
        return UserError(f"{what} could not be downloaded: {_said(error)}", AGAIN)


def check_token(token: str | None) -> None:
    """Raises UserError for a token that no request can carry; the token is in no message."""
    if token and not (token.isascii() and token.isprintable()):
        where = next((name for name in TOKENS if os.environ.get(name)), "the token of hf auth login")
        raise UserError(f"{where} holds characters that no token has", f"{LOGIN}, or unset it")


def _expected(sibling: RepoSibling) -> Expected:
    if sibling.size is None or not (sibling.lfs or sibling.blob_id):
        raise ValueError(f"it says no hash of {sibling.rfilename}")
    sha256, git_sha1 = (sibling.lfs.sha256, None) if sibling.lfs else (None, sibling.blob_id)
    return Expected(sibling.rfilename, sibling.size, sha256, git_sha1)


def _is_transient(error: Exception) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in TRANSIENT
    is_final = isinstance(error, httpx.UnsupportedProtocol) or network.is_distrust(error)
    return isinstance(error, httpx.TransportError) and not is_final


def _said(error: Exception) -> str:
    """One line about an error; of an answer only its status, since addresses may hold signatures."""
    if isinstance(error, HfHubHTTPError):
        return f"the answer was {error.response.status_code} {error.response.reason_phrase}".rstrip()
    return (str(error) or type(error).__name__).splitlines()[0]


def _patience(error: Exception, failures: int) -> float:
    """Seconds until the next attempt: what the answer asks for, else doubled each time up to LONGEST_BACKOFF_S."""
    asked = (
        network.retry_after(error.response.headers.get("Retry-After")) if isinstance(error, HfHubHTTPError) else None
    )
    return min(BACKOFF_S * 2 ** max(failures - 1, 0), LONGEST_BACKOFF_S) if asked is None else asked
