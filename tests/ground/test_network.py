"""What the environment says of the network, as every client has it: proxies, exceptions from them, authorities."""

from __future__ import annotations

import os
import ssl
import threading
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import network_stand_in as stand_in
import pytest
import requests

from v4forge import http_clients, network
from v4forge.errors import UserError
from v4forge.network import Network, retry_after

VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", *network.AUTHORITIES, "HF_ENDPOINT")


@pytest.fixture(autouse=True)
def no_network_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


class Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_: object) -> None:
        """Nothing."""


class Server(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """A client that does not trust us is no news."""


@pytest.fixture(params=["http", "https"])
def page(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of a page, and who has signed its server's certificate."""
    authority, both = stand_in.certificate(tmp_path)
    with Server(("127.0.0.1", 0), Page) as server:
        if request.param == "https":
            stand_in.secured(server, both)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"{request.param}://127.0.0.1:{server.server_port}/", authority
        server.shutdown()


def by_httpx(url: str) -> str:
    with http_clients.client() as client:
        return client.get(url).text


def by_requests(url: str) -> str:
    with http_clients.session() as session:
        return session.get(url).text


both = pytest.mark.parametrize("get", [by_httpx, by_requests])


@both
def test_a_private_authority_is_trusted_where_a_variable_names_it(
    get: Callable[[str], str], page: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, authority = page
    if url.startswith("https:"):
        with pytest.raises((httpx.ConnectError, requests.exceptions.SSLError)) as found:
            get(url)
        assert network.is_distrust(found.value)
    for variable in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        with monkeypatch.context() as patch:
            patch.setenv(variable, str(authority))
            assert get(url) == "ok"
    # Beside the system's, which another variable names.
    monkeypatch.setenv("SSL_CERT_FILE", ssl.get_default_verify_paths().cafile or str(authority))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(authority))
    assert get(url) == "ok"


@both
@pytest.mark.parametrize("kind", ["socks5", "socks5h"])
def test_a_socks_proxy_is_gone_through(
    get: Callable[[str], str], kind: str, page: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("socksio")
    pytest.importorskip("socks")
    url, authority = page
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    with stand_in.socks() as proxy:
        monkeypatch.setenv("ALL_PROXY", f"{kind}://127.0.0.1:{proxy.port}")
        assert get(url) == "ok"
        assert proxy.reached == [url.partition("://")[2].rstrip("/")]
        monkeypatch.setenv("NO_PROXY", "localhost,fd00::/8,127.0.0.0/8")
        assert get(url) == "ok"
        assert len(proxy.reached) == 1


@both
def test_a_proxy_that_does_not_answer_is_named(get: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://me:secret@127.0.0.1:9")
    with pytest.raises((httpx.ConnectError, requests.exceptions.ProxyError)) as found:
        get("http://example.invalid/")
    assert "through HTTP_PROXY=http://…@127.0.0.1:9" in str(found.value) and "secret" not in str(found.value)


@both
def test_a_proxy_is_judged_where_it_is_needed(
    get: Callable[[str], str], page: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, authority = page
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    monkeypatch.setenv("ALL_PROXY", "no proxy at all")
    with pytest.raises(UserError, match="ALL_PROXY=http://no proxy at all has characters"):
        get(url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert get(url) == "ok"


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ("socks4://127.0.0.1:1080", "does not begin with http"),
        ("socks://127.0.0.1:1080", "does not begin with http"),
        ("http://proxy:port", "is not an address"),
        ("http://proxy:99999", "is not an address"),
        ("http://", "names no host"),
        ("http://[::1", "is not an address"),
        ("http://pröxy:3128", "has characters"),
        ("http://a..b:1", "is not an address"),
    ],
)
def test_a_wrong_proxy_is_named_with_its_value(value: str, fault: str) -> None:
    with pytest.raises(UserError) as found:
        Network({"https_proxy": value}).proxy("https://huggingface.co/api")
    assert found.value.fact.startswith(f"https_proxy={value} {fault}") and "unset https_proxy" in found.value.hint


def test_a_proxy_s_password_is_in_no_error() -> None:
    with pytest.raises(UserError) as found:
        Network({"HTTPS_PROXY": "ftp://me:hunter22@proxy:1"}).proxy("https://huggingface.co/")
    assert "hunter22" not in str(found.value)


@pytest.mark.parametrize(
    ("exceptions", "url", "goes_without"),
    [
        ("localhost,fd00::/8", "https://localhost/", True),
        ("localhost,fd00::/8", "https://[fd12::1]:8000/", True),
        ("localhost,fd00::/8", "https://[fe80::1]/", False),
        ("10.0.0.0/8", "http://10.1.2.3/", True),
        ("10.0.0.0/8", "http://11.1.2.3/", False),
        (".example.com", "http://a.example.com/", True),
        ("*.example.com", "http://a.example.com/", True),
        ("example.com", "http://example.com/", True),
        ("example.com", "http://notexample.com/", False),
        ("example.com:8000", "http://example.com:8000/", True),
        ("example.com:8000", "http://example.com/", False),
        ("[::1]:443", "https://[::1]/", True),
        ("other other.example", "http://other.example/", True),
        ("http://example.com", "http://example.com/", True),
        ("*", "http://any.where/", True),
        ("::::,[,:,%,.,//", "http://any.where/", False),
    ],
)
def test_no_proxy_names_hosts_addresses_and_ranges(exceptions: str, url: str, goes_without: bool) -> None:
    found = Network({"ALL_PROXY": "http://proxy:3128", "NO_PROXY": exceptions}).proxy(url)
    assert (found is None) == goes_without


@pytest.mark.parametrize("variable", network.AUTHORITIES[:3])
def test_authorities_that_are_none_are_named(variable: str, tmp_path: Path) -> None:
    text = tmp_path / "text.pem"
    text.write_text("no certificate")
    named = {
        str(tmp_path / "none.pem"): "No such file",
        str(text): "holds no certificate",
        os.devnull: "neither a file",
    }
    for value, fault in named.items():
        with pytest.raises(UserError) as found:
            Network({variable: value}).context()
        assert found.value.fact.startswith(f"{variable}={value} ") and fault in found.value.fact
        assert f"unset {variable}" in found.value.hint


@pytest.mark.parametrize("value", ["hf-mirror.example", "https://", "ftp://x", "http://a b", "https://[x]"])
def test_an_endpoint_that_is_no_address_is_named(value: str) -> None:
    with pytest.raises(UserError, match="HF_ENDPOINT=") as found:
        Network({"HF_ENDPOINT": value}).hub()
    assert "unset HF_ENDPOINT" in found.value.hint


def test_what_retry_after_asks_for() -> None:
    now = 1_700_000_000.0
    assert retry_after("7") == 7 and retry_after(" 1.5 ") == 1.5
    assert retry_after(formatdate(now + 30, usegmt=True), now) == 30
    assert retry_after(formatdate(now - 30, usegmt=True), now) == 0
    assert retry_after("9" * 9) == network.LONGEST_WAIT_S
    for nothing in (None, "", "soon", "²", "-1", "nan"):
        assert retry_after(nothing) is None


def test_another_program_trusts_the_same_files(tmp_path: Path) -> None:
    one, two = tmp_path / "one.pem", tmp_path / "two.pem"
    one.write_text("one\n")
    two.write_text("two\n")
    folder = tmp_path / "new" / "folder"
    assert Network({}).for_programs(folder) == {}
    assert set(Network({"REQUESTS_CA_BUNDLE": str(one)}).for_programs(folder).values()) == {str(one)}
    found = Network({"SSL_CERT_FILE": str(one), "REQUESTS_CA_BUNDLE": str(two)}).for_programs(folder)
    assert set(found) == {"SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"}
    assert Path(found["SSL_CERT_FILE"]).read_text().split() == ["one", "two"]
