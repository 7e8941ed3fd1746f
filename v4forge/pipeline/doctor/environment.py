"""The doctor's checks of what a shell, a pod or an administrator has set, and of what surrounds the checkout."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from v4forge import checkout, launched
from v4forge.errors import UserError
from v4forge.files import can_link
from v4forge.network import Network
from v4forge.outcomes import Outcome, failed, ok, warning
from v4forge.pipeline.doctor.host import Host

ELSEWHERE = "SCRATCH=<a folder on a local disk>"
# Of Python's own, these change nothing of what runs.
HARMLESS = ("PYTHON", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX", "PYTHONFAULTHANDLER")


@contextmanager
def _one_command() -> Iterator[None]:
    """Makes a variable that is wrong an error whose hint is one command."""
    try:
        yield
    except UserError as error:
        variable, equals, _ = error.fact.partition("=")
        if not equals or "unset" not in error.hint:
            raise
        raise UserError(error.fact, f"unset {variable}") from None


def proxies(host: Host) -> Outcome:
    """Every proxy that is named can be one."""
    with _one_command():
        found = Network(host.environment).proxies()
    return ok(", ".join(map(str, found)) or "none is set")


def certificates(host: Host) -> Outcome:
    """What certificates are judged by can be read."""
    network = Network(host.environment)
    with _one_command():
        network.context()
    named = [f"{name}={':'.join(map(str, paths))}" for name, paths in network.authorities().items()]
    return ok(", ".join(named) or "certifi's authorities")


def ranks(host: Host) -> Outcome:
    """Nobody but torchrun has set a place among ranks; gloo's network interface is here."""
    launched.check_interface(host.environment)
    try:
        launched.place(host.environment)
    except UserError as error:
        return failed(error.fact, f"unset {launched.MARK}")
    if line := launched.ignored(host.environment):
        names = " ".join(name for name in launched.TELLING if host.environment.get(name))
        return warning(line.partition(": not of torchrun")[0] + ": not of torchrun, ignored", f"unset {names}")
    return ok("no variable of ranks is set")


def python_variables(host: Host) -> Outcome:
    """Python takes modules from its environment and the checkout alone."""
    names = [name for name in host.environment if name.startswith("PYTHON") and name not in HARMLESS]
    # make and the stages set it to the checkout for what they start.
    names = [name for name in names if host.environment[name] != str(checkout.ROOT)]
    if names:
        shown = ", ".join(f"{name}={host.environment[name]}" for name in sorted(names))
        return warning(f"{shown}: make leaves it out, python -m … does not", f"unset {' '.join(sorted(names))}")
    return ok("nothing changes what Python imports")


def host_name(_: Host) -> Outcome:
    """The machine's own name leads to an address."""
    name = socket.gethostname()
    if launched.resolves(name):
        return ok(f"{name} resolves")
    fact = f"{name}, this machine's own name, does not resolve: our ranks meet at 127.0.0.1, other programs may hang"
    return warning(fact, f"sudo sh -c 'echo 127.0.1.1 {name} >>/etc/hosts'")


def revision(_: Host) -> Outcome:
    """git tells the revision that a run notes."""
    found = checkout.told("--untracked-files=no")
    if found.revision is None:
        fix = "sudo apt-get install git" if "not installed" in found.why else f"git -C {checkout.ROOT} status"
        return warning(f"a run will not note its revision: {found.why}", fix)
    return ok(f"commit {found.revision[:12]}{'-dirty' if found.revision.endswith('-dirty') else ''}")


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def links(host: Host) -> Outcome:
    """The file system of the work folder makes hard links, which postprocess uses in the place of copies."""
    with tempfile.TemporaryDirectory(prefix=".v4forge-", dir=_existing(host.work)) as folder:
        (source := Path(folder, "source")).write_bytes(b"x")
        if can_link(source, Path(folder, "other")):
            return ok(f"{host.work} takes hard links")
    fact = f"{host.work} takes no hard links: postprocess copies the layers, which takes their bytes once more"
    return warning(fact, host.make("doctor", ELSEWHERE))


def locks(host: Host) -> Outcome:
    """The file system of the work folder has locks, by which a second run is refused."""
    with tempfile.TemporaryFile(dir=_existing(host.work)) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            why = os.strerror(error.errno or errno.ENOLCK)
            fact = f"the file system of {host.work} has no locks: {why}"
            return failed(fact, host.make("doctor", ELSEWHERE))
    return ok(f"{host.work} has locks")
