"""Installs docker/requirements-serve.txt into /opt/venv, in the RUN steps of Dockerfile.serve. Standard library only.

python3 environment.py lock          all of it but vLLM, which the lane brings; and CUDA_HOME
python3 environment.py wheel SHA256  vLLM's release, by the hash of its wheel
python3 environment.py file WHEEL    vLLM as built in the source lane
python3 environment.py fits          whether all that is installed fits together
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterable
from pathlib import Path

from v4forge.errors import UserError, run_main
from v4forge.images import locks
from v4forge.images.locks import Lock

ROOT = Path(__file__).resolve().parents[2]
VENV = Path("/opt/venv")
CUDA_HOME = VENV / "cuda"
WHEELS_ONLY = "--only-binary=:all:"


def pip(*arguments: str | Path) -> None:
    command: list[str | Path] = [
        VENV / "bin/python",
        "-m",
        "pip",
        "install",
        "-q",
        "--disable-pip-version-check",
        "--no-deps",
    ]
    if subprocess.run([*command, "--no-compile", "--no-cache-dir", "--retries", "15", *arguments]).returncode:
        raise UserError("pip could not install what the lock names (above)", "check the network and pip's settings")


def pip_locked(lock: Lock, *options: str) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(locks.dump(lock, "requirements-serve.in"))
        file.flush()
        pip("--require-hashes", *options, "-r", file.name)


def install_lock(lock: Lock) -> None:
    venv.create(VENV, with_pip=True, symlinks=True)
    pip_locked(locks.part(lock, lambda name: name not in (*locks.FROM_SOURCE, "vllm")), WHEELS_ONLY)
    pip_locked(locks.part(lock, lambda name: name in locks.FROM_SOURCE), "--no-binary=:all:", "--no-build-isolation")
    link_cuda()


def link_cuda() -> None:
    """CUDA_HOME in the form of an installed toolkit: the packages have no lib64 and no names for the linker."""
    (toolkit,) = VENV.glob("lib/python3.*/site-packages/nvidia/cu*/bin/nvcc")
    home = toolkit.parents[1]
    CUDA_HOME.symlink_to(os.path.relpath(home, VENV))
    (home / "lib64").symlink_to("lib")
    for library in (home / "lib").glob("lib*.so.*"):
        name = home / "lib" / re.sub(r"\.so\..*", ".so", library.name)
        if not name.exists():
            name.symlink_to(library.name)


def install_release(lock: Lock, sha256: str) -> None:
    ((line, hashes),) = locks.part(lock, lambda name: name == "vllm").items()
    stated = f"--hash=sha256:{sha256}"
    if stated not in hashes:
        raise UserError(f"the lock knows no wheel of {line} with sha256 {sha256}", "make image-lock")
    pip_locked({line: [stated]}, WHEELS_ONLY)


def misfits(said: Iterable[str], overridden: Iterable[str]) -> list[str]:
    """The lines of `pip check` that are not about a package that requirements-serve.in overrides, with its reason."""
    known = "|".join(map(re.escape, overridden))
    return [line for line in said if not re.search(rf"has requirement (?:{known or '(?!)'})[^\w-]", line)]


def check_fits() -> None:
    done = subprocess.run([VENV / "bin/python", "-m", "pip", "check"], capture_output=True, text=True)
    if done.returncode:
        text = (ROOT / locks.in_file("serve")).read_text(encoding="utf-8")
        if found := misfits(done.stdout.splitlines(), locks.overrides(text)):
            raise UserError(found[0], "make lock")


def main() -> None:
    command, *arguments = sys.argv[1:]
    lock = locks.parse((ROOT / locks.lock_file("serve")).read_text(encoding="utf-8"))
    if command == "lock":
        install_lock(lock)
    elif command == "wheel":
        install_release(lock, *arguments)
    elif command == "file":
        pip("--no-index", *arguments)
    elif command == "fits":
        check_fits()


if __name__ == "__main__":
    run_main(main)
