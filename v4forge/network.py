"""What the environment says of the network: proxies, the hosts that need none, certificate authorities, the hub.

It is read here and nowhere else, and what is wrong in it is told by the variable's name and value. A variable is judged
when it is needed: a wrong proxy is none of a request's that goes without.
"""

from __future__ import annotations

import ipaddress
import os
import re
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from v4forge.errors import UserError

HUB = "https://huggingface.co"
KINDS = ("http", "https", "socks5", "socks5h")
AUTHORITIES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_DIR")
SOCKS = {"socksio": "httpx", "socks": "requests"}  # the module by which each library speaks it
HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?")
CONNECT_S, READ_S = 15.0, 300.0
LONGEST_WAIT_S = 3600.0


@dataclass(frozen=True)
class Proxy:
    """A proxy that a variable names."""

    url: str
    variable: str

    def __str__(self) -> str:
        return f"{self.variable}={shown(self.url)}"


@dataclass(frozen=True)
class Network:
    """The network as `environment` describes it."""

    environment: Mapping[str, str] = field(default_factory=lambda: os.environ, repr=False)

    def proxy(self, url: str) -> Proxy | None:
        """The proxy for a request, None where it goes without. Raises UserError for one that is wrong."""
        asked = urlsplit(url)
        variable, value = self._first(*_both(f"{asked.scheme}_proxy"), *_both("all_proxy"))
        if not value or self._exempt(asked):
            return None
        return Proxy(_checked(variable, value if "://" in value else f"http://{value}"), variable)

    def proxies(self) -> list[Proxy]:
        """Every proxy that is named. Raises UserError for the first that is wrong."""
        found = []
        for scheme in ("http", "https", "all"):
            variable, value = self._first(*_both(f"{scheme}_proxy"))
            if value:
                found.append(Proxy(_checked(variable, value if "://" in value else f"http://{value}"), variable))
        return found

    def authorities(self) -> dict[str, list[Path]]:
        """Files and folders of certificates, by variable. Raises UserError for one that cannot be read."""
        found = {}
        for variable in AUTHORITIES:
            value = self.environment.get(variable, "")
            names = value.split(os.pathsep) if variable == "SSL_CERT_DIR" else [value]
            paths = [Path(name) for name in names if name]
            for path in paths if variable != "SSL_CERT_DIR" else ():
                _check_readable(variable, path)
            if paths:
                found[variable] = paths
        return found

    def context(self) -> ssl.SSLContext:
        """What certificates are judged by: every authority that a variable names, certifi's where none does. Raises
        UserError for what holds no certificate."""
        named = [(variable, path) for variable, paths in self.authorities().items() for path in paths]
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if not named:
            import certifi

            context.load_verify_locations(certifi.where())
        for variable, path in named:
            try:
                if path.is_dir():
                    context.load_verify_locations(capath=str(path))
                elif variable != "SSL_CERT_DIR":
                    context.load_verify_locations(cafile=str(path))
            except (ssl.SSLError, OSError) as error:
                raise _wrong(variable, str(path), f"holds no certificate: {_reason(error)}") from None
        return context

    def authority_file(self) -> Path | None:
        """The first file of certificates that a variable names, for a program that takes one."""
        files = [path for paths in self.authorities().values() for path in paths if path.is_file()]
        return files[0] if files else None

    def for_programs(self, folder: Path) -> dict[str, str]:
        """The variables by which another program trusts the same files; several become one in `folder`."""
        files = list(dict.fromkeys(path for paths in self.authorities().values() for path in paths if path.is_file()))
        if not files:
            return {}
        bundle = files[0]
        if len(files) > 1:
            bundle = folder / "authorities.pem"
            folder.mkdir(parents=True, exist_ok=True)
            bundle.write_bytes(b"\n".join(path.read_bytes() for path in files))
        return dict.fromkeys(AUTHORITIES[:2], str(bundle))

    def hub(self) -> str:
        """The hub's address, of HF_ENDPOINT where that is set. Raises UserError for one that is no address."""
        value = self.environment.get("HF_ENDPOINT", "").strip() or HUB
        if fault := fault_of(value, ("http", "https")):
            raise _wrong("HF_ENDPOINT", value, fault, "unset HF_ENDPOINT")
        return value.rstrip("/")

    def _first(self, *names: str) -> tuple[str, str]:
        """The first of these variables that is set, and its value."""
        return next(((name, text) for name in names if (text := self.environment.get(name, "").strip())), ("", ""))

    def _exempt(self, asked: SplitResult) -> bool:
        """Whether NO_PROXY names the host: a name and all below it, an address, a range of addresses, each perhaps with
        a port, or *. What is none of these names nobody."""
        _, text = self._first(*_both("no_proxy"))
        host = (asked.hostname or "").rstrip(".")
        port = asked.port or {"http": 80, "https": 443}.get(asked.scheme)
        return any(_names(entry, host, port) for entry in re.split(r"[,\s]+", text) if entry)


def _both(name: str) -> tuple[str, str]:
    return name, name.upper()


def _names(entry: str, host: str, port: int | None) -> bool:
    if entry == "*":
        return True
    entry = entry.partition("://")[2] or entry
    with_port = re.fullmatch(r"(\[[^]]*\]|[^:]*):(\d+)", entry)
    if with_port:
        if int(with_port[2]) != port:
            return False
        entry = with_port[1]
    try:
        address = ipaddress.ip_address(host)
        return address in ipaddress.ip_network(entry.replace("[", "").replace("]", ""), strict=False)
    except ValueError:  # one of the two is a name
        name = entry.removeprefix("*").strip(".").lower()
        return bool(name) and (host == name or host.endswith(f".{name}"))


def fault_of(url: str, kinds: tuple[str, ...]) -> str:
    """What is wrong with an address; "" for nothing."""
    if not re.fullmatch(r"[!-~]+", url):
        return "has characters that no address has"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError as error:
        return f"is not an address: {error}"
    if "://" not in url or parts.scheme not in kinds:
        return f"does not begin with {' or '.join(f'{kind}://' for kind in kinds)}"
    if not host:
        return "names no host"
    if ":" in host:
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return f"is not an address: {host}"
    elif not HOST.fullmatch(host) or ".." in host or max(map(len, host.split("."))) > 63:
        return f"is not an address: {host}"
    return ""


def _checked(variable: str, url: str) -> str:
    """A proxy's address. Raises UserError for one that cannot be."""
    if fault := fault_of(url, KINDS):
        raise _wrong(variable, url, fault, f"export {variable}=http://<host>:<port>, or unset {variable}")
    missing = [module for module in SOCKS if find_spec(module) is None] if url.startswith("socks") else []
    if missing:
        raise _wrong(variable, url, f"is a SOCKS proxy, and this environment has no {missing[0]}", "make env")
    return url


def _check_readable(variable: str, path: Path) -> None:
    try:
        if path.is_dir():
            list(path.iterdir())
        elif path.exists() and not path.is_file():
            raise _wrong(variable, str(path), "is neither a file nor a folder")
        else:
            path.open("rb").close()
    except OSError as error:
        raise _wrong(variable, str(path), f"cannot be read: {error.strerror}") from None


def _wrong(variable: str, value: str, fault: str, hint: str = "") -> UserError:
    return UserError(
        f"{variable}={shown(value)} {fault}", hint or f"unset {variable}, or let it name a file of certificates"
    )


def _reason(error: OSError) -> str:
    return str(getattr(error, "reason", "") or error.strerror or error)


def shown(url: str) -> str:
    """An address, or what is none, on one line and without the name and password in it."""
    hidden = re.sub(r"^([a-z0-9+.-]*://)?.*@", r"\1…@", url, flags=re.DOTALL | re.IGNORECASE)
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in hidden)


def retry_after(value: str | None, now: float | None = None) -> float | None:
    """Seconds that an answer's Retry-After asks for, which are a number or a date; None where it asks for none."""
    text = (value or "").strip()
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]+)?", text):
        return min(float(text), LONGEST_WAIT_S)
    try:
        date = parsedate_to_datetime(text)
        seconds = date.timestamp() - (time.time() if now is None else now)
    except (TypeError, ValueError, OverflowError):
        return None
    return min(max(0.0, seconds), LONGEST_WAIT_S)


def is_distrust(error: BaseException) -> bool:
    """Whether a connection broke because the other side's certificate is not trusted."""
    return "CERTIFICATE_VERIFY_FAILED" in str(error)


def distrusted(where: str, error: BaseException) -> UserError:
    """The error for that."""
    found = re.search(r"certificate verify failed: ([^(\"']+)", str(error))
    why = found[1].strip() if found else "its certificate is not trusted"
    hint = "export REQUESTS_CA_BUNDLE=<the file of who signed it>; where that is right, sudo timedatectl set-ntp true"
    return UserError(f"{where}: the certificate is not trusted: {why}", hint)
