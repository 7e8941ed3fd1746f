"""The doctor's checks of what a shell or a pod has set, and of what surrounds the checkout."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from doctored import Machine, says

from v4forge import checkout
from v4forge.checkout import Told
from v4forge.outcomes import FAILED, OK, WARNING, Outcome
from v4forge.pipeline.doctor import checks, environment
from v4forge.pipeline.doctor.host import Host


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path, gpus=0)


def judged(name: str, host: Host) -> Outcome:
    (check,) = [check for check in checks.CHECKS if check.name == name]
    return checks.judge(host, check)


WRONG = {
    "proxies": [{"ALL_PROXY": "socks4://127.0.0.1:1080"}, {"https_proxy": "http://proxy:port"}],
    "certificates": [{"SSL_CERT_FILE": "/nonexistent/ca.pem"}, {"REQUESTS_CA_BUNDLE": os.devnull}],
    "ranks": [
        {"WORLD_SIZE": "1"},
        {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
        {"GLOO_SOCKET_IFNAME": "eth77"},
        {"TORCHELASTIC_RUN_ID": "x"},
    ],
    "Python variables": [{"PYTHONPATH": "/foreign"}, {"PYTHONHOME": "/nowhere"}, {"PYTHONSAFEPATH": "1"}],
}


@pytest.mark.parametrize(("name", "variables"), [(name, each) for name in WRONG for each in WRONG[name]])
def test_what_is_set_wrongly_is_named_with_its_value(name: str, variables: dict[str, str], machine: Machine) -> None:
    says(judged(name, machine.host("tiny")), OK, "")
    found = judged(name, machine.host("tiny", variables))
    assert found.status in (WARNING, FAILED) and found.fix.startswith("unset ") and ", or " not in found.fix
    first, value = next(iter(variables.items()))
    assert first in found.fact and (value in found.fact or first == "TORCHELASTIC_RUN_ID")


def test_a_proxy_s_password_is_not_shown(machine: Machine) -> None:
    found = judged("proxies", machine.host("tiny", {"HTTPS_PROXY": "http://me:hunter22@proxy:1"}))
    says(found, OK, "HTTPS_PROXY=http://…@proxy:1")


def test_a_disk_without_links_or_locks_is_told(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    host = machine.host("tiny")
    machine.work.mkdir(parents=True)
    says(judged("hard links", host), OK, "takes hard links")
    says(judged("locks", host), OK, "has locks")

    def refused(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(os, "link", refused)
    monkeypatch.setattr(fcntl, "flock", refused)
    says(judged("hard links", host), WARNING, "takes no hard links", "SCRATCH=")
    says(judged("locks", host), FAILED, "has no locks: Operation not supported", "make doctor")
    assert list(machine.work.iterdir()) == []


def test_a_name_that_does_not_resolve_is_told(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    says(judged("host name", machine.host("tiny")), WARNING, "does not resolve", "/etc/hosts")
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    says(judged("host name", machine.host("tiny")), OK, "localhost resolves")


def test_a_revision_that_git_does_not_tell_is_told(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkout, "told", lambda *_, **__: Told(None, "git is not installed"))
    says(environment.revision(machine.host("tiny")), WARNING, "git is not installed", "apt-get install git")
