"""Writes the hash locks in docker/ from versions.env and the .in files there (`make lock`). Needs the package index.

  requirements-calib.txt  the calibration environment, for Python 3.11 and 3.12; torch with the hashes of both builds
  requirements-cuda.txt   what the CUDA build of torch needs besides; a CPU environment leaves it out
  requirements-dev.txt    tests and lint, on top of requirements-calib.txt

Standard library only: it runs before the environment exists.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from v4forge import pins
from v4forge.errors import UserError, run_main

DOCKER = Path(__file__).resolve().parents[1] / "docker"
HEADER = "# Written by `make lock` from versions.env and {source}. Do not edit.\n"
# The platforms and interpreters that we build for; others would only add markers.
ENVIRONMENTS = """[tool.uv]
environments = [
    "sys_platform == 'linux' and platform_machine == 'x86_64' and python_full_version < '3.13'",
    "sys_platform == 'linux' and platform_machine == 'aarch64' and python_full_version < '3.13'",
]
"""
# nvidia-ml-py is no part of CUDA: pure Python bindings that llmcompressor imports everywhere.
CUDA_PACKAGE = re.compile(r"cuda-.+|nvidia-(?!ml-py$).+")

Lock = dict[str, list[str]]


def names(path: Path) -> list[str]:
    """The package names of an .in file."""
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def key_of(package: str) -> str:
    return package.upper().replace("-", "_") + "_VERSION"


def constraints(packages: list[str]) -> str:
    """`name==version` lines for packages; raises UserError for one that versions.env does not pin."""
    lines = []
    for package in packages:
        version = pins.read().get(key_of(package))
        if not version:
            raise UserError(f"versions.env has no {key_of(package)}", f"add {key_of(package)}=… to versions.env")
        lines.append(f"{package}=={version}\n")
    return "".join(lines)


def parse(text: str) -> Lock:
    """Requirement line -> its hashes, in the form that uv writes."""
    lock: Lock = {}
    current = ""
    for line in text.splitlines():
        line = line.rstrip("\\ ")
        if line.startswith("    --hash="):
            lock[current].append(line.strip())
        elif line and not line.startswith("#"):
            current = line
            lock[current] = []
    return lock


def package_of(requirement: str) -> str:
    return requirement.split("==")[0]


def dump(lock: Lock, source: str) -> str:
    body = (" \\\n    ".join([requirement, *sorted(hashes)]) + "\n" for requirement, hashes in sorted(lock.items()))
    return HEADER.format(source=source) + "".join(body)


def compile_lock(uv: Path, inputs: list[Path], bounds: str, work: Path) -> Lock:
    """The resolution of the .in files under the constraints `bounds`, by uv, from the package index alone."""
    constraint_file = work / "constraints.txt"
    constraint_file.write_text(bounds, encoding="utf-8")
    (work / "pyproject.toml").write_text(ENVIRONMENTS, encoding="utf-8")
    # The operator's index settings must not decide what the committed lock holds.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("UV_", "PIP_"))}
    environment["XDG_CONFIG_HOME"] = str(work)
    command: list[str | Path] = [uv, "pip", "compile", "--quiet", "--universal", "--python-version", "3.11"]
    command += ["--system-certs", "--fork-strategy", "fewest"]
    command += ["--exclude-newer", pins.read()["LOCK_DATE"], "--generate-hashes", "--no-header", "--no-annotate"]
    command += ["--constraint", constraint_file, *inputs]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise UserError("the pins of versions.env do not resolve together (above)", "change them and run: make lock")
    # Every package of one environment carries that environment's marker; said once (here) it needs no repetition.
    everywhere = re.compile(r" ; python_full_version < '3\.13' and \(\([^()]*\) or \([^()]*\)\)$")
    return {everywhere.sub("", line): hashes for line, hashes in parse(done.stdout).items()}


def install_uv(work: Path) -> Path:
    venv.create(work / "uv", with_pip=True)
    version = pins.read()["UV_VERSION"]
    command: list[str | Path] = [work / "uv/bin/python", "-m", "pip", "install", "-qq", "--no-deps", f"uv=={version}"]
    if subprocess.run(command).returncode:
        raise UserError(f"pip could not install uv {version} (above)", "check the network and run: make lock")
    return work / "uv/bin/uv"


def main() -> None:
    argparse.ArgumentParser(
        prog="python -m scripts.lock", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    calib_in, dev_in = DOCKER / "requirements-calib.in", DOCKER / "requirements-dev.in"
    with tempfile.TemporaryDirectory() as folder:
        uv = install_uv(Path(folder))
        calib = compile_lock(uv, [calib_in], constraints(names(calib_in)), Path(folder))
        bounds = "".join(f"{requirement}\n" for requirement in calib) + constraints(names(dev_in))
        dev = compile_lock(uv, [dev_in], bounds, Path(folder))

    cuda = {line: hashes for line, hashes in calib.items() if CUDA_PACKAGE.fullmatch(package_of(line))}
    calib = {line: hashes for line, hashes in calib.items() if line not in cuda}
    taken = {package_of(requirement) for requirement in calib}
    dev = {requirement: hashes for requirement, hashes in dev.items() if package_of(requirement) not in taken}
    (torch,) = (line for line in calib if package_of(line) == "torch")
    calib[torch] += [
        f"--hash=sha256:{value}" for key, value in pins.read().items() if key.startswith("TORCH_CPU_SHA256_")
    ]
    for name, lock, source in (
        ("requirements-calib.txt", calib, "requirements-calib.in"),
        ("requirements-cuda.txt", cuda, "requirements-calib.in"),
        ("requirements-dev.txt", dev, "requirements-dev.in"),
    ):
        (DOCKER / name).write_text(dump(lock, source), encoding="utf-8")
        print(f"lock: docker/{name}, {len(lock)} packages")


if __name__ == "__main__":
    run_main(main)
