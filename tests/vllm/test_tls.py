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
from balanced import Router, router, wait_for
from tls import Authority

from v4forge.serving import secret_files

pytestmark = pytest.mark.serve


def serial(front: Router, trusted: ssl.SSLContext) -> int:
    """The number of the certificate that the endpoint shows."""
    port = int(front.public.rpartition(":")[2])
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

        def read() -> None:
            body = {"stream": True, "tokens": 30, "token_s": 0.1}
            with httpx.stream("POST", f"{front.public}/v1/completions", json=body, verify=trusted) as answer:
                events.extend(line for line in answer.iter_lines() if line)

        reader = threading.Thread(target=read)
        reader.start()
        wait_for(lambda: len(events) > 2, 10)
        before = serial(front, trusted)
        authority.issue(tmp_path)
        secret_files.write(pem, secret_files.certificate(*files))
        os.kill(front.process.pid, signal.SIGUSR2)  # what make serve-reload sends
        wait_for(lambda: serial(front, trusted) != before, 10)
        assert len(events) < 30
        reader.join()
        assert len(events) == 31 and events[-1] == "data: [DONE]"
