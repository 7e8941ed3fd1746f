"""The router in front of the replicas: haproxy, with a configuration of our own.

haproxy because it is in every distribution, streams without buffering, counts connections, repeats a request at another
server until the first byte of an answer, drains, and has statistics and a Prometheus exporter built in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jinja2

from v4forge.checkout import ROOT
from v4forge.serving.client import PIN

TEMPLATE = ROOT / "docker" / "serve" / "haproxy.cfg.j2"
SILENCE_S = 3600
# Checks of a replica in a row, 2 s apart, that fail before it gets nothing new: 30 s from the first to the last.
FALL = 16
DOCKER_RESOLVER = "127.0.0.11:53"
ERRORS = {
    502: "the replica that answered has gone",
    503: "no replica is ready; make serve-status says why",
    504: "no replica answered in time",
}


@dataclass(frozen=True)
class Addresses:
    """Where the router listens, and where the replicas do; `resolver` is a name server for their names, `certificate`
    a PEM with its key, for TLS at the public address."""

    public: str
    admin: str
    replicas: Sequence[str]
    resolver: str = ""
    certificate: str = ""


def configuration(addresses: Addresses, drain_s: int, affinity: bool = False, silence_s: int = SILENCE_S) -> str:
    """haproxy's configuration file. `drain_s`: how long a stop waits for running requests; `affinity`: requests with
    one X-Session-Id go to one replica; `silence_s`: how long nothing may come of an answer."""
    text = TEMPLATE.read_text(encoding="utf-8")
    template = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True).from_string(text)
    return template.render(
        public=addresses.public,
        admin=addresses.admin,
        replicas=addresses.replicas,
        resolver=addresses.resolver,
        certificate=addresses.certificate,
        log="stdout",
        pin=PIN,
        drain_s=drain_s,
        silence_s=silence_s,
        fall=FALL,
        errors=ERRORS,
        affinity=affinity,
    )
