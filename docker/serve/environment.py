"""Installs docker/requirements-serve.txt: into /opt/venv, in the RUN steps of Dockerfile.serve, or for a host without
containers (`make env-serve`). Standard library only.

python3 environment.py lock          all of it but vLLM, which the lane brings; and CUDA_HOME
python3 environment.py wheel SHA256  vLLM's release, by the hash of its wheel
python3 environment.py file WHEEL    vLLM as built in the source lane
python3 environment.py fits          whether all that is installed fits together
python3 environment.py host DIR      all that into DIR: vLLM's release, with the patches and the plugin of patches/vllm
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
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
PATCHES = ROOT / "patches" / "vllm"
PLUGIN = PATCHES / "plugin"
KINDS = (".patch", ".py", ".toml", "")
WHEELS_ONLY = "--only-binary=:all:"


def pip(into: Path, *arguments: str | Path) -> None:
    command: list[str | Path] = [
        into / "bin/python",
        "-m",
        "pip",
        "install",
        "-q",
        "--disable-pip-version-check",
        "--no-deps",
    ]
    if subprocess.run([*command, "--no-compile", "--no-cache-dir", "--retries", "15", *arguments]).returncode:
        raise UserError("pip could not install what the lock names (above)", "check the network and pip's settings")


def pip_locked(into: Path, lock: Lock, *options: str) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(locks.dump(lock, "requirements-serve.in"))
        file.flush()
        pip(into, "--require-hashes", *options, "-r", file.name)


def install_lock(into: Path, lock: Lock) -> None:
    venv.create(into, with_pip=True, symlinks=True)
    sources = locks.part(lock, lambda name: name in locks.FROM_SOURCE)
    pip_locked(into, locks.part(lock, lambda name: name not in (*locks.FROM_SOURCE, "vllm")), WHEELS_ONLY)
    pip_locked(into, sources, "--no-binary=:all:", "--no-build-isolation")
    link_cuda(into)


def link_cuda(into: Path) -> None:
    """CUDA_HOME in the form of an installed toolkit: the packages have no lib64 and no names for the linker."""
    (toolkit,) = into.glob("lib/python3.*/site-packages/nvidia/cu*/bin/nvcc")
    home = toolkit.parents[1]
    (into / "cuda").symlink_to(os.path.relpath(home, into))
    (home / "lib64").symlink_to("lib")
    for library in (home / "lib").glob("lib*.so.*"):
        name = home / "lib" / re.sub(r"\.so\..*", ".so", library.name)
        if not name.exists():
            name.symlink_to(library.name)


def install_release(into: Path, lock: Lock, sha256: str) -> None:
    ((line, hashes),) = locks.part(lock, lambda name: name == "vllm").items()
    stated = f"--hash=sha256:{sha256}"
    if stated not in hashes:
        raise UserError(f"the lock knows no wheel of {line} with sha256 {sha256}", "make image-lock")
    pip_locked(into, {line: [stated]}, WHEELS_ONLY)


def misfits(said: Iterable[str], overridden: Iterable[str]) -> list[str]:
    """The lines of `pip check` that are not about a package that requirements-serve.in overrides, with its reason."""
    known = "|".join(map(re.escape, overridden))
    return [line for line in said if not re.search(rf"has requirement (?:{known or '(?!)'})[^\w-]", line)]


def check_fits(into: Path) -> None:
    done = subprocess.run([into / "bin/python", "-m", "pip", "check"], capture_output=True, text=True)
    if done.returncode:
        text = (ROOT / locks.in_file("serve")).read_text(encoding="utf-8")
        if found := misfits(done.stdout.splitlines(), locks.overrides(text)):
            raise UserError(found[0], "make lock")


def build_for_host(into: Path, lock: Lock) -> None:
    """The environment of a host, anew; nothing where it is that of these locks, patches, plugin and interpreter."""
    # Not for the image, whose steps have this file and the modules above alone.
    from scripts.env import clear
    from v4forge import pins
    from v4forge.images import patches

    wanted, stamp = content_hash(), into / "lock.sha256"
    if stamp.is_file() and stamp.read_text() == wanted:
        print(f"env: {into.name} is up to date")
        return
    print(f"env: building {into.name} with Python {platform.python_version()}, about 10 GB", flush=True)
    clear(into)
    install_lock(into, lock)
    print("env: installing vllm", flush=True)
    install_release(into, lock, pins.read()["VLLM_WHEEL_SHA256"])
    (packages,) = into.glob("lib/python3.*/site-packages")
    print(f"env: {len(patches.apply(patches.series('vllm'), packages))} files of vllm are patched", flush=True)
    with tempfile.TemporaryDirectory() as copy:  # pip builds where the source is
        plugin = shutil.copytree(PLUGIN, Path(copy) / "plugin")
        pip(into, "--no-index", "--no-build-isolation", plugin)
    check_fits(into)
    stamp.write_text(wanted)
    print(f"env: {into.name} is ready")


def content_hash() -> str:
    """sha256 over what the environment of a host is made from."""
    digest = hashlib.sha256(f"{platform.python_version()} {platform.machine()}".encode())
    made_from = [
        ROOT / locks.lock_file("serve"),
        *sorted(each for each in PATCHES.rglob("*") if each.is_file() and each.suffix in KINDS),
    ]
    for path in made_from:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def main() -> None:
    command, *arguments = sys.argv[1:]
    lock = locks.parse((ROOT / locks.lock_file("serve")).read_text(encoding="utf-8"))
    if command == "lock":
        install_lock(VENV, lock)
    elif command == "wheel":
        install_release(VENV, lock, *arguments)
    elif command == "file":
        pip(VENV, "--no-index", *arguments)
    elif command == "fits":
        check_fits(VENV)
    elif command == "host":
        build_for_host(Path(*arguments).absolute(), lock)


if __name__ == "__main__":
    run_main(main)
