"""TLS at the endpoint: a real haproxy with a certificate of the tests' authority, asked by a client that checks it."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import threading
from pathlib import Path

import httpx
import pytest
from balanced import router, wait_for
from keeper_stand_in import steps
from ports import free_ports
from served import ROOT, SERVE_ENVIRONMENT
from tls import Authority

from v4forge.errors import UserError
from v4forge.serving import launch, preflight, probe, router_control, secret_files
from v4forge.serving.deployment import CONFIGURATION
from v4forge.serving.launch import Start, Wanted

pytestmark = pytest.mark.serve


def serial(port: int, trusted: ssl.SSLContext) -> int:
    """The number of the certificate that the endpoint shows."""
    with (
        socket.create_connection(("127.0.0.1", port)) as plain,
        trusted.wrap_socket(plain, server_hostname="127.0.0.1") as speaking,
    ):
        return int(str((speaking.getpeercert() or {})["serialNumber"]), 16)


def test_the_endpoint_speaks_tls_alone_and_a_new_certificate_ends_no_stream(tmp_path: Path) -> None:
    authority, pem = Authority(), tmp_path / "both.pem"
    trusted = ssl.create_default_context(cafile=authority.write(tmp_path))
    files = [str(path) for path in authority.issue(tmp_path)]
    pem.write_text(secret_files.certificate(*files))
    with router(tmp_path, 1, certificate=str(pem)) as front:
        assert httpx.get(f"{front.public}/health", verify=trusted).status_code == 200
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{front.public}/health")  # who does not know the authority
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(front.public.replace("https", "http") + "/health")

        events: list[str] = []
        port = int(front.public.rpartition(":")[2])

        def read() -> None:
            body = {"stream": True, "tokens": 30, "token_s": 0.1}
            with httpx.stream("POST", f"{front.public}/v1/completions", json=body, verify=trusted) as answer:
                events.extend(line for line in answer.iter_lines() if line)

        reader = threading.Thread(target=read)
        reader.start()
        wait_for(lambda: len(events) > 2, 10)
        before = serial(port, trusted)
        authority.issue(tmp_path)
        secret_files.write(pem, secret_files.certificate(*files))
        os.kill(front.process.pid, signal.SIGUSR2)  # what make serve-reload sends
        wait_for(lambda: serial(port, trusted) != before, 10)
        assert len(events) < 30
        reader.join()
        assert len(events) == 31 and events[-1] == "data: [DONE]"


# `vllm serve` with the real middleware and uvicorn, and a stand-in behind them.
VLLM = """#!/bin/sh
while [ "$1" != --port ]; do shift; done
exec {python} {program} "$2" 15
"""


def test_a_deployment_of_this_host_speaks_tls_asks_for_keys_and_takes_others_while_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """supervisord, the router and the replicas' ways in as they are; neither GPUs nor weights."""
    monkeypatch.setattr(preflight, "check", lambda *_: None)
    monkeypatch.setattr(probe, "probe", lambda *_: [])
    monkeypatch.setenv("API_KEY_FILE", "/of/another")  # what a shell has set does not count
    programs = tmp_path / "bin"
    programs.mkdir()
    python, program = SERVE_ENVIRONMENT / "bin/python", ROOT / "tests/support/guarded_app.py"
    (programs / "vllm").write_text(VLLM.format(python=python, program=program))
    (programs / "vllm").chmod(0o755)
    authority = Authority()
    trusted = ssl.create_default_context(cafile=authority.write(tmp_path))
    cert, key = map(str, authority.issue(tmp_path))
    folder = tmp_path / "serve"
    asked = Wanted(folder, tmp_path, backend="cpu", port=free_ports(4), cert=cert, cert_key=key, program=str(programs))
    running = launch.up(launch.deployment_of(asked), "ann:open", Start(timeout_s=60), steps)
    try:
        replica = f"http://127.0.0.1:{running.replica_port(1)}"

        def statuses(sent: str) -> list[int]:
            headers = {"Authorization": f"Bearer {sent}"} if sent else {}
            urls = [f"{running.url}/v1/models", f"{running.admin_url}/v1/models", f"{replica}/v1/models"]
            return [httpx.get(url, headers=headers, verify=trusted).status_code for url in urls]

        assert running.url.startswith("https://")
        assert [statuses(sent) for sent in ("", "new", "open")] == [[401] * 3, [401] * 3, [200] * 3]
        assert httpx.get(f"{running.url}/health", verify=trusted).status_code == 200
        before = serial(running.port, trusted)
        authority.issue(tmp_path)
        launch.reload(folder, "ann:new")
        wait_for(lambda: statuses("new") == [200] * 3, 5)
        wait_for(lambda: statuses("open") == [401] * 3, 5)  # the other replica looks at its own time
        assert (after := serial(running.port, trusted)) != before  # by whoever answers now
        (folder / CONFIGURATION).write_text("nonsense\n")
        monkeypatch.setattr(router_control, "RELOAD_S", 3.0)
        with pytest.raises(UserError, match="could not read its new configuration and goes on with the one before"):
            launch.reload(folder, "")
        assert serial(running.port, trusted) == after
        (folder / "keys/api_key").unlink()
        wait_for(lambda: statuses("new") == [503] * 3, 10)
    finally:
        launch.stop(folder)
    assert not list((folder / "tls").iterdir()) and not list((folder / "keys").iterdir())
