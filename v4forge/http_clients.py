"""Every HTTP client that we make, of httpx and of requests: with the network's proxies and authorities, and limits.

The libraries would read the environment themselves, each in its own way, and break on what they do not understand.
"""

from __future__ import annotations

import ssl
import threading
from typing import Any

import httpx
import requests
from requests.adapters import HTTPAdapter

from v4forge.network import CONNECT_S, READ_S, Network, Proxy

LIMITS = httpx.Timeout(READ_S, connect=CONNECT_S)


class Routed(httpx.BaseTransport):
    """Sends each request the way that the network asks for; an error of a proxy names it. Raises UserError for a
    variable that is wrong."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._ways: dict[tuple[str, bool], httpx.HTTPTransport] = {}
        self._lock = threading.Lock()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        proxy = self._network.proxy(str(request.url))
        way = self._way(proxy, request.url.scheme == "https")
        try:
            return way.handle_request(request)
        except httpx.TransportError as error:
            if proxy is None:
                raise
            raise type(error)(f"{error or type(error).__name__}, through {proxy}") from error

    def _way(self, proxy: Proxy | None, secure: bool) -> httpx.HTTPTransport:
        url = proxy.url if proxy else ""
        secure = secure or url.startswith("https:")
        with self._lock:
            if (url, secure) not in self._ways:
                trusted = self._network.context() if secure else False
                self._ways[url, secure] = httpx.HTTPTransport(verify=trusted, proxy=url or None, trust_env=False)
            return self._ways[url, secure]

    def close(self) -> None:
        for way in self._ways.values():
            way.close()


def client(network: Network | None = None, **options: Any) -> httpx.Client:
    """A client of httpx with these options of its own."""
    chosen: dict[str, Any] = {"timeout": LIMITS, **options}
    return httpx.Client(transport=Routed(network or Network()), trust_env=False, **chosen)


def serve_hub() -> None:
    """Lets huggingface_hub, and what goes through it, ask by such a client."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import hf_request_event_hook  # which refuses when HF_HUB_OFFLINE is set

    def made() -> httpx.Client:
        return client(event_hooks={"request": [hf_request_event_hook]}, follow_redirects=True)

    set_client_factory(made)


class _Adapter(HTTPAdapter):
    """As Routed, for requests. `proxied`: whether a proxy may stand between."""

    def __init__(self, network: Network, proxied: bool) -> None:
        self._network, self._proxied = network, proxied
        self._trusted: ssl.SSLContext | None = None
        super().__init__()

    def send(self, request: requests.PreparedRequest, *args: Any, **options: Any) -> requests.Response:
        proxy = self._network.proxy(str(request.url)) if self._proxied else None
        options["proxies"] = {"all": proxy.url} if proxy else {}
        options["timeout"] = options.get("timeout") or (CONNECT_S, READ_S)
        try:
            return super().send(request, *args, **options)
        except requests.exceptions.ConnectionError as error:
            if proxy is None:
                raise
            raise type(error)(f"{error}, through {proxy}", request=request) from error

    def build_connection_pool_key_attributes(
        self, request: requests.PreparedRequest, *args: Any, **options: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        host, pool = super().build_connection_pool_key_attributes(request, *args, **options)
        if str(request.url).lower().startswith("https:"):
            pool["ssl_context"] = self._context()
        return host, pool

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        if proxy.startswith("https:"):
            options["proxy_ssl_context"] = self._context()
        return super().proxy_manager_for(proxy, **options)

    def cert_verify(self, conn: Any, *_args: Any, **_options: Any) -> None:
        conn.cert_reqs = "CERT_REQUIRED"  # by the context alone: this would add certifi's authorities

    def _context(self) -> ssl.SSLContext:
        self._trusted = self._trusted or self._network.context()
        return self._trusted


def equip(session: requests.Session, network: Network | None = None, proxied: bool = True) -> requests.Session:
    """Lets a session go the network's way. `proxied`: whether a proxy may stand between."""
    session.trust_env = False
    for scheme in ("http://", "https://"):
        session.mount(scheme, _Adapter(network or Network(), proxied))
    return session


def session(proxied: bool = True) -> requests.Session:
    """A session of requests; no name and password of ~/.netrc. `proxied`: whether a proxy may stand between."""
    return equip(requests.Session(), proxied=proxied)
