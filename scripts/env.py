"""Builds the local environment .venv/ from the locks in docker/ (`make env`), unless it matches them already.

torch comes as the CPU build on a machine without an NVIDIA driver, where pip's settings or torch's own index offer it,
else as the CUDA build; the lock accepts both. Standard library only: it runs before the environment exists.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from v4forge.errors import UserError, run_main

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
STAMP = VENV / "lock.sha256"
LOCKS = [ROOT / "docker" / f"requirements-{name}.txt" for name in ("calib", "dev")]
CUDA_LOCK = ROOT / "docker" / "requirements-cuda.txt"
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PIP_INSTALL = ("-m", "pip", "install", "--disable-pip-version-check", "--only-binary=:all:", "--no-deps")

# Says which torch pip picked, without importing it.
NEEDS_CUDA = """
from importlib.metadata import requires
print(any(r.startswith(("nvidia", "triton", "cuda")) and "extra ==" not in r for r in requires("torch")))
"""


def content_hash() -> str:
    """sha256 over the locks and the interpreter: the environment is rebuilt when it changes."""
    digest = hashlib.sha256(f"{sys.implementation.name} {platform.python_version()} {platform.machine()}".encode())
    for lock in [*LOCKS, CUDA_LOCK]:
        if not lock.is_file():
            raise UserError(f"{lock.relative_to(ROOT)} is missing", "make lock")
        digest.update(lock.read_bytes())
    return digest.hexdigest()


def run(*command: str | Path, failed: str, hint: str) -> str:
    """Runs a command of the new environment; its stdout. Raises UserError after showing what the command said."""
    done = subprocess.run([VENV / "bin/python", *command], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.stderr.write(done.stdout)
        raise UserError(failed, hint)
    return done.stdout


def install(lock: Path) -> None:
    print(f"env: installing {lock.relative_to(ROOT)}", flush=True)
    run(
        *(*PIP_INSTALL, "-qq", "--require-hashes", "-r", lock),
        failed=f"pip could not install {lock.relative_to(ROOT)} (above)",
        hint="check the network, or point pip at a mirror (PIP_INDEX_URL, PIP_FIND_LINKS), then run: make env",
    )


def install_cpu_torch() -> None:
    """Tries for the CPU build of the locked torch, and leaves it at that: the lock's own torch comes next.

    pip has to be asked for it by its local version: among the builds that the lock accepts it prefers one whose hash an
    index states, and a find-links folder states none.
    """
    lock = LOCKS[0].read_text(encoding="utf-8")
    version, hashes = re.findall(r"^torch==(\S+)((?: \\\n    --hash=\S+)+)", lock, flags=re.M)[0]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(f"torch=={version}+cpu{hashes}\n")
        file.flush()
        for index in ([], ["--extra-index-url", TORCH_CPU_INDEX, "--retries", "0", "--timeout", "20"]):
            options = ["-qqq", "--require-hashes", *index, "-r", file.name]
            if subprocess.run([str(VENV / "bin/python"), *PIP_INSTALL, *options]).returncode == 0:
                return


def build() -> None:
    try:
        import ensurepip  # noqa: F401  (Debian ships it apart from python3, in python3-venv)
        import venv
    except ImportError:
        package = f"python3.{sys.version_info.minor}-venv"
        raise UserError(f"{sys.executable} cannot make environments", f"apt-get install {package}") from None
    print(f"env: building .venv with Python {platform.python_version()}", flush=True)
    if VENV.exists():
        shutil.rmtree(VENV)
    venv.create(VENV, with_pip=True)
    if not NVIDIA_DRIVER.exists():
        install_cpu_torch()
    for lock in LOCKS:
        install(lock)
    if run("-c", NEEDS_CUDA, failed="torch is not installed", hint="make env").strip() == "True":
        install(CUDA_LOCK)
    run("-m", "pip", "check", failed="the locks do not fit together (above)", hint="make lock && make env")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.env", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quiet", action="store_true", help="say nothing when .venv already matches the locks")
    quiet = parser.parse_args().quiet
    if not (3, 11) <= sys.version_info[:2] < (3, 13):
        raise UserError(f"Python {platform.python_version()} is not 3.11 or 3.12", "make env PYTHON=python3.11")
    wanted = content_hash()
    if STAMP.is_file() and STAMP.read_text() == wanted:
        if not quiet:
            print("env: up to date")
        return
    build()
    version = run("-c", "import torch; print(torch.__version__)", failed="torch does not import", hint="make env")
    STAMP.write_text(wanted)
    print(f"env: .venv is ready, torch {version.strip()}")


if __name__ == "__main__":
    run_main(main)
