"""make fetch behind proxies and authorities that the environment names, rightly and wrongly: whole, or one line."""

from __future__ import annotations

import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import network_stand_in as stand_in
import pytest
from fetched import REPO, assert_same, error, fetched, serving_upstream, write_upstream
from hub_stand_in import Fault, Hub

from v4forge import network


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_upstream(tmp_path_factory.mktemp("upstream"))


@pytest.fixture
def served(upstream: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", *network.AUTHORITIES):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    with serving_upstream(upstream, monkeypatch, tmp_path) as hub:
        yield hub


def test_a_socks_proxy_brings_it(served: Hub, upstream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("socksio")
    pytest.importorskip("socks")
    with stand_in.socks() as proxy:
        monkeypatch.setenv("ALL_PROXY", f"socks5://127.0.0.1:{proxy.port}")
        assert fetched(tmp_path / "upstream") == 0
    assert_same(tmp_path / "upstream", upstream)
    assert proxy.reached


def test_ranges_of_addresses_in_no_proxy_are_understood(
    served: Hub, upstream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "localhost,127.0.0.0/8,fd00::/8")
    assert fetched(tmp_path / "upstream") == 0
    assert_same(tmp_path / "upstream", upstream)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("SSL_CERT_FILE", "/nonexistent/ca.pem"),
        ("REQUESTS_CA_BUNDLE", "/dev/null"),
        ("ALL_PROXY", "socks4://127.0.0.1:1080"),
        ("https_proxy", "http://proxy:port"),
        ("HF_ENDPOINT", "hf-mirror.example"),
    ],
)
def test_a_wrong_variable_is_named_at_once(
    served: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variable: str,
    value: str,
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://127.0.0.1:9")
    monkeypatch.setenv(variable, value)
    started = time.monotonic()
    assert fetched(tmp_path / "upstream") == 1
    assert error(capsys).startswith(f"{variable}={value} ")
    assert time.monotonic() - started < 5


def test_a_date_to_come_back_at_is_kept_to(served: Hub, upstream: Path, tmp_path: Path) -> None:
    headers = {"Retry-After": formatdate(time.time() + 3, usegmt=True)}
    served.faults.append(Fault(f"/api/models/{REPO}", status=429, headers=headers))
    started = time.monotonic()
    assert fetched(tmp_path / "upstream") == 0
    assert time.monotonic() - started >= 1.5  # a date has whole seconds
    assert_same(tmp_path / "upstream", upstream)
