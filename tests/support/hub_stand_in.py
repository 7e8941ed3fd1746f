"""A server in the place of the hub's: what huggingface_hub asks for to list and to download a repository, and faults.

Large files are git LFS objects that a redirect to another host name serves, as the hub's CDN does; small ones come from
the hub itself. A subclass of `Hub` adds to ROUTES what else it can be asked.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

CHUNK_BYTES = 16 << 10
MAIN = "0123456789abcdef" * 2 + "01234567"  # the commit of a repository that is given none


def sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_sha1_of(content: bytes) -> str:
    """The name that git has for a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def pointer_of(content: bytes) -> bytes:
    """What git holds in the place of an LFS object."""
    lines = ("version https://git-lfs.github.com/spec/v1", f"oid sha256:{sha256_of(content)}", f"size {len(content)}")
    return "".join(f"{line}\n" for line in lines).encode()


@dataclass
class Repo:
    """A model repository. commits: by 40 hex digits, name -> content; branches: name -> commit.

    Of a gated one anybody sees the listing, and only `tokens` get files; a private one only they see at all. `xet`: its
    large files are said to be in Xet storage too, as all of the hub's are today.
    """

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    tokens: set[str] = field(default_factory=set)
    xet: bool = False

    @classmethod
    def of(cls, files: Mapping[str, bytes] | Path, commit: str = MAIN, **options: Any) -> Repo:
        """A repository whose main branch holds these files, or those of a folder."""
        if isinstance(files, Path):
            found = sorted(path for path in files.rglob("*") if path.is_file())
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in found}
        return cls({commit: dict(files)}, {"main": commit}, **options)

    def commit_of(self, revision: str) -> str | None:
        commit = self.branches.get(revision, revision)
        return commit if commit in self.commits else None

    def is_lfs(self, name: str, content: bytes) -> bool:
        return name.endswith((".safetensors", ".bin")) or len(content) > 10 << 20

    def hash_of(self, name: str, content: bytes) -> str:
        """The hub's hash of a file: sha256 of an LFS object, git's sha1 of another."""
        return sha256_of(content) if self.is_lfs(name, content) else git_sha1_of(content)


@dataclass
class Fault:
    """What goes wrong with the next `times` requests of this method whose path matches `path`, a regular expression.

    status: they are answered with it; cut_after: the connection breaks after so many bytes of the answer's body;
    flip: this byte of the file, counted from its start, comes wrong; stall_s: so long passes before the answer;
    bytes_s: the body comes at this rate; held: the body waits for this event after its first `CHUNK_BYTES`.
    """

    path: str
    method: str = "GET"
    times: int = 1
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int = -1
    flip: int = -1
    stall_s: float = 0.0
    bytes_s: float = 0.0
    held: threading.Event | None = None


@dataclass
class Request:
    """A request of the log. sent: bytes of the body that went out, so far; `headers` by lower-case name."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes = b""
    status: int = 0
    sent: int = 0

    @property
    def start(self) -> int:
        """The first byte asked for."""
        match = re.fullmatch(r"bytes=(\d+)-\d*", self.headers.get("range", ""))
        return int(match[1]) if match else 0


class Call(BaseHTTPRequestHandler):
    """A request while it is answered: `logged` is its entry of the log, the rest are ways to answer."""

    protocol_version = "HTTP/1.1"
    server: _Server
    logged: Request
    fault: Fault

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def _any(self) -> None:
        parts = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self._body(headers)
        self.logged = Request(self.command, unquote(parts.path), parse_qs(parts.query), headers, body)
        self.server.hub.answer(self)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = _any

    def _body(self, headers: Mapping[str, str]) -> bytes:
        if headers.get("transfer-encoding", "").lower() != "chunked":
            return self.rfile.read(int(headers.get("content-length", 0)))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    @property
    def token(self) -> str:
        """What the caller authorizes itself with; '' without."""
        return self.logged.headers.get("authorization", "").removeprefix("Bearer ")

    def say(self, status: int, content: bytes = b"", headers: Mapping[str, str] | None = None, offset: int = 0) -> None:
        """Answers, with the fault of this call. offset: where in a file the content begins."""
        self.logged.status = status
        self.send_response(status)
        sent = {"Content-Length": str(len(content)), **(headers or {})}
        for name, value in sent.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD" and status != 304:
            self._send(content, offset)

    def _send(self, content: bytes, offset: int) -> None:
        fault = self.fault
        if 0 <= fault.flip - offset < len(content):
            at = fault.flip - offset
            content = content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :]
        end = len(content) if fault.cut_after < 0 else min(fault.cut_after, len(content))
        began = time.monotonic()
        for start in range(0, end, CHUNK_BYTES):
            if start and fault.held is not None:
                fault.held.wait()
            piece = content[start : min(start + CHUNK_BYTES, end)]
            self.wfile.write(piece)
            self.logged.sent += len(piece)
            if fault.bytes_s:
                time.sleep(max(0.0, began + self.logged.sent / fault.bytes_s - time.monotonic()))
        if end < len(content):
            self.wfile.flush()
            self.close_connection = True

    def json(self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.say(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def error(self, status: int, code: str, message: str) -> None:
        """As the hub says it: huggingface_hub goes by the header."""
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.json({"error": message}, status, headers)

    def file(self, content: bytes, headers: Mapping[str, str]) -> None:
        """A file, or the part of it that a Range asks for."""
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.logged.headers.get("range", ""))
        headers = {"Accept-Ranges": "bytes", **headers}
        if not match:
            return self.say(200, content, headers)
        start, end = int(match[1]), min(int(match[2] or len(content) - 1), len(content) - 1)
        if start >= len(content):
            return self.say(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        span = {"Content-Range": f"bytes {start}-{end}/{len(content)}"}
        self.say(206, content[start : end + 1], {**headers, **span}, start)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    hub: Hub

    def handle_error(self, *_: Any) -> None:
        """A client that is gone is no news."""


class Hub:
    """The hub. `repos`: by name; `requests`: what it was asked; `faults`: what goes wrong, see `Fault`.

    Changes to `repos` and `requests` by handlers are made under `lock`.
    """

    # method, regular expression of the path, the handler's name; the first that matches answers. A handler is called
    # with the Call and the expression's named groups.
    ROUTES: tuple[tuple[str, str, str], ...] = (
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?", "model_info"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(/(?P<folder>.*))?", "tree"),
        ("GET|HEAD", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)", "resolve"),
        ("GET|HEAD", r"/cdn/(?P<sha256>[0-9a-f]{64})", "cdn"),
        ("GET", r"/api/whoami-v2", "whoami"),
    )

    def __init__(self, repos: Mapping[str, Repo] | None = None) -> None:
        self.repos = dict(repos or {})
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.server = _Server(("127.0.0.1", 0), Call)
        self.server.hub = self

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    @property
    def cdn_url(self) -> str:
        """The same server by another host name: a caller must not send its token there."""
        return f"http://localhost:{self.server.server_port}"

    def asked(self, path: str, method: str = "GET") -> list[Request]:
        """The requests so far of this method whose path matches."""
        with self.lock:
            return [each for each in self.requests if each.method == method and re.search(path, each.path)]

    def asked_for(self, repo: str, name: str) -> list[Request]:
        """The requests that were for a file's content, by whichever address."""
        contents = [files[name] for files in self.repos[repo].commits.values() if name in files]
        paths = [rf"/{repo}/resolve/[^/]+/{re.escape(name)}$", *(f"/cdn/{sha256_of(each)}" for each in contents)]
        return [each for each in self.asked("|".join(paths)) if each.status in (200, 206)]

    def answer(self, call: Call) -> None:
        with self.lock:
            self.requests.append(call.logged)
            call.fault = self._fault(call.logged)
        if call.fault.stall_s:
            time.sleep(call.fault.stall_s)
        if call.fault.status:
            return call.say(call.fault.status, b"{}", call.fault.headers)
        for methods, path, handler in self.ROUTES:
            match = re.fullmatch(path, call.logged.path)
            if match and call.command in methods.split("|"):
                return getattr(self, handler)(call, **match.groupdict())
        call.error(404, "", f"no such page: {call.logged.path}")

    def _fault(self, request: Request) -> Fault:
        for fault in self.faults:
            if fault.times and fault.method == request.method and re.search(fault.path, request.path):
                fault.times -= 1
                return fault
        return Fault("")

    def permitted(self, call: Call, name: str, files: bool = False) -> Repo | None:
        """The repository, when the caller may see it, and its files if `files`; else it has been answered."""
        repo = self.repos.get(name)
        if repo is None or (repo.private and call.token not in repo.tokens):
            status = 404 if call.token else 401
            call.error(status, "RepoNotFound", "Repository not found")
            return None
        if files and repo.gated and call.token not in repo.tokens:
            call.error(403 if call.token else 401, "GatedRepo", f"Access to model {name} is restricted.")
            return None
        return repo

    def found(self, call: Call, repo: Repo, revision: str) -> str | None:
        """The commit, when there is one; else the caller has been answered."""
        commit = repo.commit_of(revision)
        if commit is None:
            call.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def model_info(self, call: Call, repo: str, revision: str | None) -> None:
        held = self.permitted(call, repo)
        if held is None or (commit := self.found(call, held, revision or "main")) is None:
            return
        siblings = []
        for name, content in sorted(held.commits[commit].items()):
            entry: dict[str, Any] = {"rfilename": name}
            if "blobs" in call.logged.query:
                entry |= {"size": len(content), "blobId": git_sha1_of(content)}
                if held.is_lfs(name, content):
                    pointer = pointer_of(content)
                    lfs = {"sha256": sha256_of(content), "size": len(content), "pointerSize": len(pointer)}
                    entry |= {"blobId": git_sha1_of(pointer), "lfs": lfs}
            siblings.append(entry)
        gated = "auto" if held.gated else False
        info = {"_id": "0", "id": repo, "modelId": repo, "sha": commit, "private": held.private, "gated": gated}
        call.json({**info, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings})

    def tree(self, call: Call, repo: str, revision: str, folder: str | None) -> None:
        held = self.permitted(call, repo)
        if held is None or (commit := self.found(call, held, revision)) is None:
            return
        inside = f"{folder}/" if folder else ""
        recursive = call.logged.query.get("recursive", ["false"])[0].lower() == "true"
        entries, folders = [], set()
        for name, content in sorted(held.commits[commit].items()):
            if not name.startswith(inside):
                continue
            rest = name.removeprefix(inside).split("/")
            folders |= {inside + "/".join(rest[:depth]) for depth in range(1, len(rest))}
            if recursive or len(rest) == 1:
                entries.append(self.tree_entry(held, name, content))
        shown = sorted(folders) if recursive else sorted(each for each in folders if "/" not in each[len(inside) :])
        call.json([*({"type": "directory", "oid": "0" * 40, "size": 0, "path": each} for each in shown), *entries])

    def tree_entry(self, repo: Repo, name: str, content: bytes) -> dict[str, Any]:
        """A file as the listing of a tree has it."""
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": git_sha1_of(content)}
        if repo.is_lfs(name, content):
            pointer = pointer_of(content)
            entry["oid"] = git_sha1_of(pointer)
            entry["lfs"] = {"oid": sha256_of(content), "size": len(content), "pointerSize": len(pointer)}
        return entry

    def resolve(self, call: Call, repo: str, revision: str, name: str) -> None:
        held = self.permitted(call, repo, files=True)
        if held is None or (commit := self.found(call, held, revision)) is None:
            return
        content = held.commits[commit].get(name)
        if content is None:
            return call.error(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": commit, "Content-Type": "application/octet-stream"}
        if not held.is_lfs(name, content):
            return call.file(content, {**headers, "ETag": f'"{git_sha1_of(content)}"'})
        digest = sha256_of(content)
        headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        if held.xet:
            route = f"{self.url}/api/models/{repo}/xet-read-token/{commit}"
            headers |= {"X-Xet-Hash": digest, "Link": f'<{route}>; rel="xet-auth"'}
        call.say(302, b"", {**headers, "Location": f"{self.cdn_url}/cdn/{digest}"})

    def cdn(self, call: Call, sha256: str) -> None:
        for repo in list(self.repos.values()):
            for files in list(repo.commits.values()):
                for content in list(files.values()):
                    if sha256_of(content) == sha256:
                        return call.file(content, {"ETag": f'"{sha256}"'})
        call.error(404, "", "NoSuchKey")

    def whoami(self, call: Call) -> None:
        if any(call.token in repo.tokens for repo in self.repos.values()):
            return call.json({"type": "user", "name": "someone", "orgs": [], "auth": {}})
        call.error(401, "", "Invalid credentials in Authorization header")


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub on its port until the block ends."""
    threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield hub
    finally:
        for fault in hub.faults:
            if fault.held is not None:
                fault.held.set()
        hub.server.shutdown()
        with suppress(OSError):
            hub.server.server_close()
