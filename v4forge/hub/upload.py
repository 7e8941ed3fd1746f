"""A repository of the hub to publish to: what it has, an upload in one commit, and what it has afterwards.

Large files are sent first and one commit then names all of them, so that nobody can download half an artifact. What
was sent before a break is not sent again: the hub knows it by its hash. Nothing is written into the artifact's folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import httpx
from huggingface_hub import CommitOperationAdd, HfApi, constants, get_session, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging
from huggingface_hub.utils import validate_repo_id as validate

from v4forge import http_clients, network
from v4forge.errors import UserError
from v4forge.hub.hub_source import check_token
from v4forge.hub.publication import Member, Progress, Remote
from v4forge.network import Network

AT_A_TIME = 4  # large files that are sent beside one another
LOGIN = "hf auth login, or HF_TOKEN=<a token that may write>"
SHOWN = 300  # characters of what the hub says


@dataclass(frozen=True)
class Found:
    """What the hub has at a revision. `private` is None where there is no such repository, `commit` "" where there is
    no such branch."""

    private: bool | None = None
    commit: str = ""
    files: dict[str, Remote] = field(default_factory=dict)


@dataclass(frozen=True)
class Repository:
    """`name` is ORG/NAME, `branch` what an upload commits to, `again` the command that goes on with a broken one.

    Endpoint and token are those of huggingface_hub's usual places. Raises UserError for a name that is none.
    """

    name: str
    branch: str = constants.DEFAULT_REVISION
    again: str = "make publish CONFIRM=1 REPO=ORG/NAME"

    def __post_init__(self) -> None:
        try:
            validate(self.name)
        except HFValidationError:
            fact = f"{self.name!r} is no name of a repository: letters, digits, '-', '_' and '.', with one '/'"
            raise UserError(fact, "make publish REPO=ORG/NAME") from None
        if "/" not in self.name:
            raise UserError(f"{self.name!r} does not say whose repository it is", f"make publish REPO=ORG/{self.name}")

    @cached_property
    def _token(self) -> str | None:
        token = get_token()
        check_token(token)
        return token

    @cached_property
    def _api(self) -> HfApi:
        http_clients.serve_hub()
        return HfApi(Network().hub(), token=self._token or False)

    @property
    def address(self) -> str:
        """Where people see it."""
        return f"{self._api.endpoint}/{self.name}"

    def user(self) -> str | None:
        """Who the hub takes us for; None without a token. Raises UserError for a token that it does not know."""
        if not self._token:
            return None
        with self._asking("does not say who we are"):
            return str(self._api.whoami()["name"])

    def look(self, revision: str = "") -> Found:
        """What there is at a revision, by default the branch. Raises UserError when the hub cannot be asked."""
        with self._asking(f"does not show {self.name}"):
            try:
                info = self._api.model_info(self.name, revision=revision or self.branch)
            except RepositoryNotFoundError:
                return Found()
            except RevisionNotFoundError:
                return Found(self._api.model_info(self.name).private)
            tree = list(self._api.list_repo_tree(self.name, recursive=True, revision=info.sha))
        files = {
            entry.path: Remote(entry.size, entry.blob_id, entry.lfs.sha256 if entry.lfs else None)
            for entry in tree
            if isinstance(entry, RepoFile)
        }
        return Found(info.private, str(info.sha), files)

    def check_card(self, text: str) -> None:
        """Raises UserError for a card whose metadata the hub does not take: better before the upload than behind it."""
        with self._asking("does not read README.md"):
            asked = {"repoType": "model", "content": text}
            answer = get_session().post(f"{self._api.endpoint}/api/validate-yaml", json=asked)
            wrong = [str(each.get("message")) for each in answer.json().get("errors", ())]
        if answer.status_code == 400 and wrong:
            fact = f"{self._api.endpoint} does not take README.md: {'; '.join(wrong)[:SHOWN]}"
            raise UserError(fact, "correct v4forge/reporting/templates/model_card.md.j2, then make card")

    def create(self, private: bool) -> None:
        """Makes repository and branch where they are missing."""
        with self._asking(f"does not make {self.name}"):
            self._api.create_repo(self.name, private=private, exist_ok=True)
            if self.branch != constants.DEFAULT_REVISION:
                self._api.create_branch(self.name, branch=self.branch, exist_ok=True)

    def upload(self, members: Sequence[Member], message: str, progress: Progress) -> str:
        """Sends files and commits them together -> the commit. progress gets bytes sent, and what is being sent.

        Raises UserError when it breaks; the same call then goes on where it was.
        """
        additions = [_addition(member) for member in sorted(members, key=lambda member: -member.size)]
        sent = 0
        with self._asking(f"did not take all of {self.name}"):
            for first in range(0, len(additions), AT_A_TIME):
                some = additions[first : first + AT_A_TIME]
                progress(sent, some[0].path_in_repo)
                self._api.preupload_lfs_files(
                    self.name, some, revision=self.branch, num_threads=AT_A_TIME, free_memory=False
                )
                sent += sum(each.upload_info.size for each in some)
            progress(sent, "commit")
            made = self._api.create_commit(self.name, additions, commit_message=message, revision=self.branch)
        return str(made.oid)

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        """Makes what the hub, the network and the library raise an error that a user can act on, without secrets."""
        with _quiet():
            try:
                yield
            except OfflineModeIsEnabled:
                raise UserError("HF_HUB_OFFLINE is set, and publishing asks the hub", "unset HF_HUB_OFFLINE") from None
            except (HfHubHTTPError, httpx.HTTPError, OSError, RuntimeError, ValueError) as error:
                raise self._reason(error, what) from None

    def _reason(self, error: BaseException, what: str) -> UserError:
        while isinstance(error, RuntimeError) and error.__cause__:  # the library's "could not upload <file>"
            error = error.__cause__
        endpoint = self._api.endpoint
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if status == 401:
            return UserError(f"{endpoint} does not know the token", LOGIN)
        if status == 403:
            return UserError(f"{endpoint} {what}: the token may not write there", LOGIN)
        if network.is_distrust(error):
            return network.distrusted(endpoint, error)
        if status is None and isinstance(error, httpx.HTTPError | OSError):
            return UserError(f"{endpoint} {what}: {self._said(error)}", f"check the network, then go on: {self.again}")
        return UserError(f"{endpoint} {what}: {self._said(error)}", f"it goes on where it stopped: {self.again}")

    def _said(self, error: BaseException) -> str:
        """An error in a line; a server may repeat what it was sent, and an address may be signed."""
        text = getattr(error, "server_message", None) or str(error) or type(error).__name__
        text = re.sub(r"(https?://[^\s?]+)\?\S*", r"\1", " ".join(text.split()))
        return (text.replace(self._token, "<token>") if self._token else text)[:SHOWN]


def _addition(member: Member) -> CommitOperationAdd:
    addition = CommitOperationAdd(path_in_repo=member.name, path_or_fileobj=member.path)
    addition.upload_info.sha256 = bytes.fromhex(member.sha256)  # known already, and the library would read all of it
    return addition


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's bars and warnings, which would tear our progress and name signed addresses."""
    level, barred = logging.get_verbosity(), are_progress_bars_disabled()
    logging.set_verbosity_error()
    disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if not barred:
            enable_progress_bars()
