"""Hints as their reader can follow them: commands of make with what make was given, services as they are started here,
and in an installed package, which has no Makefile, the command v4forge."""

from __future__ import annotations

import importlib
import itertools
import re
from pathlib import Path

from v4forge import makefile

# pyproject.toml names both; the folder is of a package that pip has installed.
INSTALLED_SCRIPTS, INSTALLED = "v4forge_scripts", (Path(__file__).parent / "checkout_files").is_dir()
PROGRAM = re.compile(r"(?:\.venv/bin/)?python -m scripts\.(\w+)")
# A command of make, and no other thing that is made: its goals, or … for those that were given, words after them, and
# what it sets.
MAKE = re.compile(
    rf"\bmake (?!(?:{'|'.join(makefile.PROSE)})\b)(…|[a-z][a-z-]*(?: [a-z][a-z-]*)*)((?: [A-Z_]+={makefile.VALUE})*)"
)
OF_A_CHECKOUT = "(make: in a checkout of v4forge)"
SERVICE = re.compile(r"(?<!container: )(?<!sudo )(?:sudo )?systemctl (start|stop|status|restart|enable --now) ([\w-]+)")
SYSTEMD = Path("/run/systemd/system")  # sd_booted(3)
SERVICES = Path("/etc/init.d")


def told(hint: str) -> str:
    """The hint for this machine and this way of having v4forge."""
    if "systemctl" in hint and not SYSTEMD.is_dir():
        hint = SERVICE.sub(_service, hint)
    return as_called(_of_package(hint) if INSTALLED else makefile.completed(hint))


def _service(found: re.Match[str]) -> str:
    """A command of systemd where another one keeps services, or none does, as in a container."""
    verb, name = found[1].replace("enable --now", "start"), found[2]
    return f"sudo service {name} {verb}" if (SERVICES / name).exists() else f"on the host of this container: {found[0]}"


def as_called(text: str) -> str:
    """The text with the programs that it names as its reader can call them: an installed package, whose scripts/ are
    called v4forge_scripts, has them as the command v4forge."""
    if not INSTALLED:
        return text
    text = PROGRAM.sub(lambda found: f"v4forge {found[1].removesuffix('_checkpoint').replace('_', '-')}", text)
    return text.replace("-m scripts.", f"-m {INSTALLED_SCRIPTS}.")  # for torchrun


def _of_package(hint: str) -> str:
    """The hint with the programs of a package instead of make's goals; what it lacks is named as a checkout's."""
    hint = MAKE.sub(_programs, hint)
    return f"{hint} {OF_A_CHECKOUT}" if MAKE.search(hint) and OF_A_CHECKOUT not in hint else hint


def _programs(found: re.Match[str]) -> str:
    """A command of make as those of the package with the same names, where it has all of them."""
    programs = importlib.import_module(f"{INSTALLED_SCRIPTS}.__main__").PROGRAMS
    words = found[1].split()
    named = list(itertools.takewhile(lambda word: word in programs and not programs[word].checkout, words))
    rest = words[len(named) :]
    if not named or (rest and rest[0] in programs):
        return found[0]
    return " ".join([" && ".join(f"v4forge {name} …" for name in named), *rest])
