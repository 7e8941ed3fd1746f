"""Pins set to other values, and every lock resolved again for them: what `make lock` and `make image-lock` write.

A hash in versions.env that belongs to a wheel follows the wheel's version, read from its package index. Needs the
package index. Standard library only: it runs before the environment exists.
"""

from __future__ import annotations

import fnmatch
import html
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
import venv
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from v4forge import pins
from v4forge.checkout import ROOT
from v4forge.errors import UserError
from v4forge.files import atomic_path
from v4forge.images import locks
from v4forge.images.locks import Lock, Source


@dataclass(frozen=True)
class Wheel:
    """A pinned hash that follows the version of a package in a lock: `key` is a pattern, `file` a glob of the wheel.

    Named groups of `key` and {version} fill the glob; `page` is the package's page in the form of PEP 503.
    """

    key: str
    package: str
    lock: str
    page: str
    file: str


WHEELS = (
    Wheel(
        key=r"TORCH_CPU_SHA256_(?P<tag>CP\d+)_(?P<machine>[A-Z0-9_]+)",
        package="torch",
        lock="calib",
        page="https://download.pytorch.org/whl/cpu/torch/",
        file="torch-{version}+cpu-{tag}-{tag}-*linux*_{machine}.whl",
    ),
    Wheel(
        key=r"VLLM_WHEEL_SHA256",
        package="vllm",
        lock="serve",
        page="https://pypi.org/simple/vllm/",
        file="vllm-{version}-cp*-manylinux*_x86_64.whl",
    ),
)

# What no index states, and a new value of the key on the left asks for.
TOGETHER = {
    "VLLM_VERSION": ("VLLM_COMMIT", "DEEPGEMM_COMMIT"),
    "FLASH_REPO": ("FLASH_REVISION",),
    "CORPUS_REPO": ("CORPUS_REVISION",),
}


def check_together(values: Mapping[str, str], given: Mapping[str, str]) -> None:
    """Raises UserError where a pin is given another value without the pins that go with it."""
    for key in TOGETHER.keys() & given.keys():
        lacking = [other for other in TOGETHER[key] if other in values and other not in given]
        if lacking and given[key] != values[key]:
            pairs = [f"{name}={value}" for name, value in given.items()] + [f"{name}=…" for name in lacking]
            raise UserError(
                f"{key} changes and {' and '.join(lacking)} would not", f'make image-lock SET="{" ".join(pairs)}"'
            )


def with_values(text: str, values: Mapping[str, str]) -> str:
    """The text of versions.env with other values for keys that it has; UserError for one that it lacks."""
    for key, value in values.items():
        line = f"{key}={value}".replace("\\", r"\\")
        text, count = re.subn(rf"^{re.escape(key)}=.*$", line, text, flags=re.M)
        if not count:
            raise UserError(f"versions.env has no {key}", f"add a line {key}={value} to versions.env")
    pins.parse(text, pins.FILE.name)
    return text


def with_pins(text: str, given: Mapping[str, str], old: Mapping[str, Lock]) -> str:
    """The text of versions.env with the pins that are given, and the hashes of wheels that follow them. `old`: the
    locks by file name. Raises UserError where that cannot be."""
    changed = with_values(text, given)
    check_together(pins.parse(text, pins.FILE.name), given)
    return with_values(changed, wheel_hashes(pins.parse(changed, pins.FILE.name), given, old))


def page_hashes(page: str, text: str) -> dict[str, str]:
    """File name -> sha256 in hex, for the links of a package's index page that carry one."""
    found = {}
    for link in re.findall(r"""<a\s[^>]*?href=["']([^"']+)["']""", text):
        url, _, fragment = html.unescape(link).partition("#")
        if fragment.startswith("sha256="):
            found[urllib.parse.unquote(url).rsplit("/", 1)[-1]] = fragment.removeprefix("sha256=")
    return found


def read_page(page: str) -> str:
    request = urllib.request.Request(page, headers={"Accept": "text/html"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode("utf-8")


def wheel_hashes(values: Mapping[str, str], given: Mapping[str, str], old: Mapping[str, Lock]) -> dict[str, str]:
    """The hashes of wheels whose version the old locks, by file name, do not have, as the wheel's index states them."""
    found = {}
    for wheel in WHEELS:
        keys = [match for key in values if key not in given and (match := re.fullmatch(wheel.key, key))]
        source = locks.source_of(wheel.lock)
        version = values.get(source.key(wheel.package, values), "")
        lines = old[locks.lock_file(wheel.lock)]
        locked = {locks.version_of(line) for line in lines if locks.package_of(line) == wheel.package}
        if not keys or version in locked:
            continue
        command = " ".join([f"{key}={value}" for key, value in given.items()] + [f"{match.string}=…" for match in keys])
        hint = f'give what it would say: make image-lock SET="{command}"'
        try:
            hashes = page_hashes(wheel.page, read_page(wheel.page))
        except (OSError, ValueError) as error:
            raise UserError(f"{wheel.page} cannot be read: {error}", hint) from None
        for match in keys:
            groups = {name: text.lower() for name, text in match.groupdict().items()}
            glob = wheel.file.format(version=version, **groups)
            sums = {value for name, value in hashes.items() if fnmatch.fnmatchcase(name, glob)}
            if len(sums) != 1:
                raise UserError(f"{wheel.page} lists {len(sums)} files {glob}", hint)
            (found[match.string],) = sums
    return found


def compile_lock(uv: Path, source: Source, text: str, bounds: list[str], date: str, work: Path) -> Lock:
    """The resolution of an .in file's text under the constraints `bounds`, by uv, from the package index alone."""
    python = "python_full_version < '3.13' and implementation_name == 'cpython'"
    python += " and platform_python_implementation == 'CPython' and sys_platform == 'linux'"
    forced = [line for line in bounds if locks.package_of(line) in locks.overrides(text)]
    settings = {
        "environments": [f"{python} and platform_machine == '{machine}'" for machine in source.machines],
        "override-dependencies": [*forced, *(f"{name}; sys_platform == 'never'" for name in source.without)],
    }
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
    (work / "pyproject.toml").write_text(f"[tool.uv]\n{lines}", encoding="utf-8")
    (work / "constraints.txt").write_text("".join(f"{line}\n" for line in bounds), encoding="utf-8")
    (work / "requirements.in").write_text(text, encoding="utf-8")
    # The operator's index settings must not decide what the committed lock holds.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("UV_", "PIP_"))}
    environment["XDG_CONFIG_HOME"] = str(work)
    command: list[str | Path] = [uv, "pip", "compile", "--quiet", "--universal", "--python-version", "3.11"]
    command += ["--system-certs", "--fork-strategy", "fewest"]
    command += ["--exclude-newer", date, "--generate-hashes", "--no-header", "--no-annotate"]
    command += ["--constraint", "constraints.txt", "requirements.in"]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise UserError(f"the pins for {source.path} do not resolve together (above)", "change them and run: make lock")
    # Most packages carry the marker of the whole environment; said once (here) it needs no repetition.
    lock = locks.parse(done.stdout)
    ((everywhere, _),) = Counter(line.partition(" ; ")[2] for line in lock).most_common(1)
    return {line.removesuffix(f" ; {everywhere}"): hashes for line, hashes in lock.items()}


def install_uv(version: str, work: Path) -> Path:
    venv.create(work / "uv", with_pip=True)
    command: list[str | Path] = [work / "uv/bin/python", "-m", "pip", "install", "-qq", "--no-deps", f"uv=={version}"]
    if subprocess.run(command).returncode:
        raise UserError(f"pip could not install uv {version} (above)", "check the network and run: make lock")
    return work / "uv/bin/uv"


def resolve(values: Mapping[str, str], say: Callable[[str], None]) -> dict[str, str]:
    """The text of every lock, by file name, for the pins `values`. say: told of each source before its turn."""
    inputs = {source.name: (ROOT / source.path).read_text(encoding="utf-8") for source in locks.SOURCES}
    wanted = {source.name: locks.constraints(source, inputs[source.name], values) for source in locks.SOURCES}
    resolved: dict[str, Lock] = {}
    texts = {}
    with tempfile.TemporaryDirectory() as folder:
        uv = install_uv(values["UV_VERSION"], Path(folder))
        for source in locks.SOURCES:
            say(f"lock: resolving {source.path}")
            below = [line for name in source.on for line in resolved[name]]
            bounds = below + wanted[source.name]
            lock = compile_lock(uv, source, inputs[source.name], bounds, values["LOCK_DATE"], Path(folder))
            taken = {locks.package_of(line) for line in below}
            lock = {line: hashes for line, hashes in lock.items() if locks.package_of(line) not in taken}
            for line in lock:
                if locks.package_of(line) == "torch":
                    lock[line] += source.cpu_torch_hashes(values)
            resolved[source.name] = lock
            for name, part in source.split(lock).items():
                texts[locks.lock_file(name)] = locks.dump(part, Path(source.path).name)
    return texts


def write_all(texts: Mapping[str, str]) -> None:
    """Writes files below ROOT; each gets its name only after all of them are whole on the disk."""
    with ExitStack() as stack:
        for name, text in texts.items():
            stack.enter_context(atomic_path(ROOT / name)).write_text(text, encoding="utf-8")
