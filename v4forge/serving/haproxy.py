"""The router in front of the replicas: haproxy, with a configuration of our own.

haproxy because it is in every distribution, streams without buffering, counts connections, repeats a request at another
server until the first byte of an answer, drains, and has statistics and a Prometheus exporter built in.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import jinja2

from v4forge import checkout
from v4forge.serving.client import PIN

TEMPLATE = checkout.file("docker/serve/haproxy.cfg.j2")
# What a browser gets at /.
PAGE = checkout.file("docker/serve/chat.html")
SILENCE_S = 3600
# Checks of a replica in a row, 2 s apart, that fail before it gets nothing new: 30 s from the first to the last.
FALL = 16
DOCKER_RESOLVER = "127.0.0.11:53"
# A conversation goes to another replica where its own has more requests than these percent of the mean and so many. And
# of a prompt without messages, how many characters tell conversations apart.
BOUND_PERCENT, BOUND_SLACK, PROMPT_CHARACTERS = 150, 2, 1024


@dataclass(frozen=True)
class Error:
    """What the router itself answers; `after_s`: when clients may try again, 0 where they are not told."""

    message: str
    after_s: int = 0

    def body(self, status: int) -> str:
        """In the form of OpenAI's errors."""
        return json.dumps({"error": {"message": self.message, "type": "router", "code": status}})


# A log-format of haproxy's.
POISONOUS = "this request has ended two replicas, or seems to, and is refused for a while: %[var(txn.digest)]"
ERRORS = {
    408: Error("the request did not come"),
    429: Error("every replica has as many requests as may run and wait", after_s=5),
    502: Error("the replica that answered has gone"),
    503: Error("no replica is ready; make serve-status says why", after_s=10),
    504: Error("no replica answered in time"),
}


@dataclass(frozen=True)
class Addresses:
    """Where the router listens, and where the replicas do; `resolver` is a name server for their names, `certificate`
    a PEM with its key, for TLS at the public address, `socket` takes commands, `page` is a copy of PAGE."""

    public: str
    admin: str
    replicas: Sequence[str]
    resolver: str = ""
    certificate: str = ""
    socket: str = ""
    page: str = str(PAGE)


@dataclass(frozen=True)
class Limits:
    """What the router lets in: requests that a replica has `running` and `waiting`, all else gets 429; connections of
    one source. `request_s`: how long a request may take to come; `refused_s`: how long one is refused that has ended
    two replicas; `descriptors`: of which each connection takes one."""

    running: int = 256
    waiting: int = 256
    per_source: int = 2048
    request_s: int = 60
    refused_s: int = 600
    descriptors: int = 65536

    @property
    def room(self) -> int:
        """The requests of a replica."""
        return self.running + self.waiting


def page_policy(page: str) -> str:
    """The Content-Security-Policy of a page: its own scripts and styles, by their digests, and requests to where it
    came from; nothing else, nothing in a frame, and no text that becomes HTML."""

    def digests(kind: str) -> str:
        inline = re.findall(rf"<{kind}>(.*?)</{kind}>", page, flags=re.DOTALL)
        found = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in inline]
        return " ".join(f"'sha256-{digest}'" for digest in found)

    allowed = f"script-src {digests('script')}; style-src {digests('style')}; connect-src 'self'; img-src data:"
    refused = "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    return f"default-src 'none'; {allowed}; {refused}"


def configuration(
    addresses: Addresses,
    drain_s: int,
    limits: Limits,
    by_prefix: bool,
    silence_s: int = SILENCE_S,
    out: Collection[int] = (),
) -> str:
    """haproxy's configuration file. `drain_s`: how long a stop waits for running requests; `by_prefix`: a conversation
    goes to the replica that has its beginning, else every request to the one with the fewest; `silence_s`: how long
    nothing may come of an answer; `out`: the replicas that get nothing but what asks for them."""
    text = TEMPLATE.read_text(encoding="utf-8")
    template = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True).from_string(text)
    return template.render(
        public=addresses.public,
        admin=addresses.admin,
        replicas=addresses.replicas,
        resolver=addresses.resolver,
        certificate=addresses.certificate,
        socket=addresses.socket,
        page=addresses.page,
        page_policy=page_policy(PAGE.read_text(encoding="utf-8")),
        out=out,
        log="stdout",
        pin=PIN,
        drain_s=drain_s,
        limits=limits,
        by_prefix=by_prefix,
        bound_percent=BOUND_PERCENT,
        bound_slack=BOUND_SLACK,
        prompt_characters=PROMPT_CHARACTERS,
        silence_s=silence_s,
        fall=FALL,
        errors=ERRORS,
        poisonous=Error(POISONOUS, limits.refused_s),
    )
