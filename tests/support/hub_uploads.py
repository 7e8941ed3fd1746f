"""The hub's stand-in with what an upload asks for: repositories and branches made, large files taken as git LFS
objects, in one piece or in parts, and commits; with uploads that break, and a store that keeps other bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

from hub_stand_in import Call, Hub, Repo

EMPTY = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}


@dataclass
class Break:
    """The next `times` uploads of an object to a path that matches break after so many bytes of their body."""

    path: str
    after_bytes: int = 0
    times: int = 1


class UploadCall(Call):
    """A request whose connection may break while its body comes."""

    def _body(self, headers: Any) -> bytes:
        hub = self.server.hub
        assert isinstance(hub, UploadHub)
        with hub.lock:
            broken = next((each for each in hub.breaks if each.times and re.search(each.path, self.path)), None)
            if broken and self.command == "PUT":
                broken.times -= 1
                self.rfile.read(broken.after_bytes)
                raise ConnectionResetError
        return super()._body(headers)


@dataclass
class UploadHub(Hub):
    """users: token -> name; `writers` are the names and organizations that its owner may write to, by token.

    `objects`: what the store has, by sha256 in hex; `part_bytes`: larger objects are taken in parts of this size;
    `spoils`: of an object with one of these digests the store keeps other bytes; `echo`: errors repeat the token that
    they were asked with; `yaml_errors`: what the hub finds wrong with a card.
    """

    users: dict[str, str] = field(default_factory=dict)
    writers: dict[str, set[str]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    part_bytes: int = 1 << 62
    spoils: set[str] = field(default_factory=set)
    breaks: list[Break] = field(default_factory=list)
    echo: bool = False
    yaml_errors: list[str] = field(default_factory=list)

    ROUTES = (
        *Hub.ROUTES,
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<branch>.+)", "create_branch"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>.+)", "preupload"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>.+)", "commit"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "put"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})/(?P<part>\d+)", "put"),
        ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/complete", "complete"),
        ("POST", r"/lfs/verify", "verify"),
    )

    def __post_init__(self) -> None:
        super().__init__()
        self.server.RequestHandlerClass = UploadCall

    @property
    def uploads(self) -> list[str]:
        """The objects whose bytes were taken, in order."""
        return [each.path.split("/")[2] for each in self.asked(r"^/lfs/", "PUT") if each.status == 200]

    @property
    def changes(self) -> list[str]:
        """What was asked for that changes anything."""
        kinds = r"/(create|commit|branch|preupload|batch|lfs)\b"
        return [f"{each.method} {each.path}" for each in self.requests if re.search(kinds, each.path)]

    def whoami(self, call: Call) -> None:
        if call.token in self.users:
            return call.json({"type": "user", "name": self.users[call.token], "orgs": [], "auth": {}})
        self.refuse(call, 401, "Invalid credentials in Authorization header")

    def refuse(self, call: Call, status: int, message: str, code: str = "") -> None:
        call.error(status, code, message + (f": {call.logged.headers.get('authorization')}" if self.echo else ""))

    def may_write(self, call: Call, name: str) -> bool:
        """Whether the caller may; if not, it has been answered."""
        if call.token not in self.users:
            self.refuse(call, 401, "Invalid credentials in Authorization header")
        elif name.split("/")[0] not in self.writers.get(call.token, set()):
            self.refuse(call, 403, f"you have no rights to write to {name}")
        else:
            return True
        return False

    def create(self, call: Call) -> None:
        asked = json.loads(call.logged.body)
        name = f"{asked['organization']}/{asked['name']}"
        if not self.may_write(call, name):
            return
        with self.lock:
            if name in self.repos:
                return call.json({"url": f"{self.url}/{name}", "error": "You already created this model repo"}, 409)
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.repos[name] = Repo.of(EMPTY, private=private, tokens={call.token})
        call.json({"url": f"{self.url}/{name}", "name": name})

    def create_branch(self, call: Call, repo: str, branch: str) -> None:
        if self.may_write(call, repo):
            with self.lock:
                held = self.repos[repo]
                held.branches.setdefault(branch, held.branches["main"])
            call.json({})

    def validate_yaml(self, call: Call) -> None:
        errors = [{"message": message} for message in self.yaml_errors]
        call.json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, call: Call, repo: str, revision: str) -> None:
        held = self.permitted(call, repo)
        if held is None or not self.may_write(call, repo) or (commit := self.found(call, held, revision)) is None:
            return
        files = []
        for asked in json.loads(call.logged.body)["files"]:
            content = held.commits[commit].get(asked["path"])
            oid = None if content is None else held.hash_of(asked["path"], content)
            mode = "lfs" if held.is_lfs(asked["path"], b"") or asked["size"] > 10 << 20 else "regular"
            files.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        call.json({"files": files})

    def batch(self, call: Call, repo: str) -> None:
        if not self.may_write(call, repo):
            return
        answered: list[dict[str, Any]] = []
        for asked in json.loads(call.logged.body)["objects"]:
            oid, size = asked["oid"], asked["size"]
            if oid in self.objects:
                answered.append({"oid": oid, "size": size})
                continue
            verify = {"href": f"{self.url}/lfs/verify"}
            signed = f"{self.cdn_url}/lfs/{oid}"
            if size <= self.part_bytes:
                upload: dict[str, Any] = {"href": f"{signed}?X-Amz-Signature=5ec2e7"}
            else:
                numbers = range(1, -(-size // self.part_bytes) + 1)
                header = {str(number): f"{signed}/{number}?X-Amz-Signature=5ec2e7" for number in numbers}
                upload = {
                    "href": f"{self.url}/lfs/{oid}/complete",
                    "header": {"chunk_size": str(self.part_bytes), **header},
                }
            answered.append({"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}})
        call.json({"transfer": "basic", "objects": answered})

    def put(self, call: Call, oid: str, part: str = "") -> None:
        body = call.logged.body
        with self.lock:
            if part:
                self.parts.setdefault(oid, {})[int(part)] = body
            else:
                self.store(oid, body)
        call.say(200, b"", {"ETag": f'"{hashlib.md5(body).hexdigest()}"'})

    def complete(self, call: Call, oid: str) -> None:
        with self.lock:
            parts = self.parts.pop(oid)
            self.store(oid, b"".join(parts[number] for number in sorted(parts)))
        call.json({})

    def store(self, oid: str, content: bytes) -> None:
        self.objects[oid] = content[:-1] + bytes([content[-1] ^ 1]) if oid in self.spoils else content

    def verify(self, call: Call) -> None:
        asked = json.loads(call.logged.body)
        whole = len(self.objects.get(asked["oid"], b"")) == asked["size"]
        call.json({} if whole else {"error": "size"}, 200 if whole else 422)

    def commit(self, call: Call, repo: str, revision: str) -> None:
        held = self.permitted(call, repo)
        if held is None or not self.may_write(call, repo) or (parent := self.found(call, held, revision)) is None:
            return
        files = dict(held.commits[parent])
        for line in call.logged.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.objects:
                    return self.refuse(call, 400, f"{value['path']}: there is no object {value['oid']}")
                files[value["path"]] = self.objects[value["oid"]]
        commit = hashlib.sha1(call.logged.body + parent.encode()).hexdigest()
        with self.lock:
            held.commits[commit] = files
            held.branches[revision] = commit
        call.json({"commitUrl": f"{self.url}/{repo}/commit/{commit}", "commitOid": commit, "hookOutput": ""})
