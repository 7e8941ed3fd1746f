"""The hash locks in docker/: which there are, what goes into each, and their text form. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from v4forge.errors import UserError

HEADER = "# Written by `make lock` from versions.env and {source}. Do not edit.\n"
# nvidia-ml-py is no part of CUDA: pure Python bindings that llmcompressor imports everywhere.
CUDA_PACKAGE = re.compile(r"cuda-.+|nvidia-(?!ml-py$).+")
# Published as source only; of pure Python, and built with the setuptools of the lock.
FROM_SOURCE = ("rouge-score", "sqlitedict", "word2number")
# A line of an .in file: a package, perhaps with extras. Its version is in versions.env.
IN_LINE = re.compile(r"([a-z0-9-]+)(\[[a-z0-9-]+(?:,[a-z0-9-]+)*\])?")

# What torch's CUDA build asks for, and what vLLM asks for to read pictures, sound and films.
TORCH_CUDA = (
    *("triton", "cuda-bindings", "cuda-toolkit", "nvidia-cudnn-cu13", "nvidia-cusparselt-cu13", "nvidia-nccl-cu13"),
    "nvidia-nvshmem-cu13",
)
TORCH_KIN = ("torchvision", "torchaudio", "torchcodec")
# What Intel's OpenMP asks for on some platforms alone, and for no CPU.
INTEL_GPU = ("intel-cmplr-lib-ur",)

Lock = dict[str, list[str]]  # requirement `name==version[ ; marker]` -> its `--hash=sha256:…` options


@dataclass(frozen=True)
class Source:
    """docker/requirements-<name>.in, and how it becomes locks.

    `on`: the sources in whose environment it is installed; it takes their versions and leaves out their packages.
    `prefix`: a pin whose key starts with it goes before the general one. `cuda`: the lock that takes the CUDA packages.
    `machines`: what it is locked for; another one would only add markers. `without`: packages that are never installed,
    whatever asks for them.
    """

    name: str
    on: tuple[str, ...] = ()
    prefix: str = ""
    cuda: str = ""
    machines: tuple[str, ...] = ("x86_64", "aarch64")
    without: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        return in_file(self.name)

    @property
    def locks(self) -> tuple[str, ...]:
        return (self.name, self.cuda) if self.cuda else (self.name,)

    def split(self, lock: Lock) -> dict[str, Lock]:
        """The lock of this source as the files that it is written to, by name."""
        parts: dict[str, Lock] = {name: {} for name in self.locks}
        for requirement, hashes in lock.items():
            is_cuda = self.cuda and CUDA_PACKAGE.fullmatch(package_of(requirement))
            parts[self.cuda if is_cuda else self.name][requirement] = hashes
        return parts

    def key(self, package: str, pins: Mapping[str, str]) -> str:
        """The key of versions.env that pins a package of this source."""
        key = package.upper().replace("-", "_") + "_VERSION"
        return self.prefix + key if self.prefix + key in pins else key

    def cpu_torch_key(self, pins: Mapping[str, str]) -> str:
        """What the keys of the hashes of its torch's CPU builds start with: they go with the version's key."""
        return self.key("torch", pins).removesuffix("VERSION") + "CPU_SHA256_"

    def cpu_torch_hashes(self, pins: Mapping[str, str]) -> list[str]:
        """What its torch is locked with besides: the CPU builds, which the package index does not list."""
        start = self.cpu_torch_key(pins)
        return [f"--hash=sha256:{value}" for key, value in pins.items() if key.startswith(start) and value]


# In the order of resolution. The calibration environment, the host's programs on top of it, tests and lint on top of
# both, the site of docs/ and its notebook on top of these; serving is an environment of its own, with the CUDA build of
# torch and for the machines that have an H200; serve-build is what builds vLLM from source in it. serve-cpu is vLLM
# built for the CPU, on the CPU build of torch: the package index's torch would bring the CUDA packages, and it has no
# CPU build of torchvision and its kin.
SOURCES = (
    Source("calib", cuda="cuda"),
    Source("host", on=("calib",)),
    Source("dev", on=("calib", "host")),
    Source("docs", on=("calib", "host", "dev")),
    Source("serve", prefix="SERVE_", machines=("x86_64",)),
    Source("serve-build", on=("serve",), machines=("x86_64",)),
    Source("serve-cpu", prefix="SERVE_CPU_", machines=("x86_64",), without=(*TORCH_CUDA, *TORCH_KIN, *INTEL_GPU)),
)


def source_of(name: str) -> Source:
    """The source of the lock `name`."""
    return next(source for source in SOURCES if name in source.locks)


def in_file(name: str) -> str:
    return f"docker/requirements-{name}.in"


def lock_file(name: str) -> str:
    return f"docker/requirements-{name}.txt"


def entries(text: str) -> dict[int, str]:
    """The lines of an .in file that name a package, by line number; comments and blank lines are left out."""
    lines = {number: line.split("#")[0].strip() for number, line in enumerate(text.splitlines(), start=1)}
    return {number: line for number, line in lines.items() if line}


def overrides(text: str) -> list[str]:
    """The packages of an .in file whose pin holds against what another package asks for: `name # override: <why>`."""
    return re.findall(r"^([a-z0-9-]+)[^#\n]*# override: \S", text, flags=re.M)


def package_of(requirement: str) -> str:
    """The name in `name[extras]==version ; marker`."""
    return re.split(r"[\[=; ]", requirement, maxsplit=1)[0]


def version_of(requirement: str) -> str:
    return requirement.split(" ;")[0].partition("==")[2]


def parse(text: str) -> Lock:
    """A lock's text, in the form that uv writes and `dump` too."""
    lock: Lock = {}
    current = ""
    for line in text.splitlines():
        line = line.rstrip("\\ ")
        if line.startswith("    --hash=") and current:
            lock[current].append(line.strip())
        elif line and not line.startswith("#"):
            current = line
            lock[current] = []
    return lock


def part(lock: Lock, wanted: Callable[[str], bool]) -> Lock:
    """The lines of the packages that are wanted."""
    return {line: hashes for line, hashes in lock.items() if wanted(package_of(line))}


def dump(lock: Lock, source: str) -> str:
    body = (" \\\n    ".join([requirement, *sorted(hashes)]) + "\n" for requirement, hashes in sorted(lock.items()))
    return HEADER.format(source=source) + "".join(body)


def constraints(source: Source, text: str, pins: Mapping[str, str]) -> list[str]:
    """`name==version` for what the .in file's text names; UserError for a package that versions.env does not pin."""
    lines = []
    for entry in entries(text).values():
        package = package_of(entry)
        key = source.key(package, pins)
        if not pins.get(key):
            raise UserError(f"versions.env has no {key}, which {source.path} asks for", f"add {key}=… to versions.env")
        lines.append(f"{package}=={pins[key]}")
    return lines
