"""What pyproject.toml leaves to versions.env: the package's version, the day of the locks as of the images;
and the versions of what it needs, from the locked one to the end of its major one."""

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
PINS = dict(re.findall(r"^([A-Z0-9_]+)=(\S+)$", (ROOT / "versions.env").read_text(encoding="utf-8"), re.MULTILINE))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
GROUPS = PROJECT["tool"]["v4forge"]["dependencies"]


def requirement(name: str) -> str:
    """A package as pip is asked for it: by its name alone where another package's lock decides."""
    pin = PINS.get(f"{name.upper().replace('-', '_')}_VERSION")
    return f"{name}>={pin},<{int(pin.split('.')[0]) + 1}" if pin else name


setup(
    version=PINS["LOCK_DATE"].replace("-", "."),
    install_requires=[requirement(name) for name in GROUPS["base"]],
    extras_require={group: [requirement(name) for name in names] for group, names in GROUPS.items() if group != "base"},
)
