"""The GPUs of this machine, and which of them form pairs.

NVIDIA's management library (NVML) tells of each; how they are joined, `nvidia-smi topo` does, in words that people
know. Both number GPUs in the order of PCI buses, whatever CUDA_VISIBLE_DEVICES says.
"""

from __future__ import annotations

import re
import subprocess
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from v4forge.errors import UserError
from v4forge.units import GIB

LIMIT_S = 60.0  # without the persistence daemon, who asks first wakes every GPU

HOPPER = (9, 0)
BLACKWELL = (10, 0)
# A GPU that nobody uses shows up to half a GiB of the driver's own.
IDLE_BYTES = GIB

# How far apart two GPUs are that no NVLink joins, as nvidia-smi calls it. The steps are small but for the last one,
# which crosses the sockets' interconnect.
DISTANCES = {"PIX": 1, "PXB": 2, "PHB": 3, "NODE": 4, "SYS": 8}
MEANINGS = {
    "PIX": "one PCIe switch",
    "PXB": "several PCIe switches",
    "PHB": "a PCIe host bridge",
    "NODE": "host bridges of one NUMA node",
    "SYS": "the interconnect between NUMA nodes",
}
SMI_HINT = "install NVIDIA's driver, then: nvidia-smi; without a GPU: make serve PROFILE=tiny RUNTIME=host BACKEND=cpu"
HANGS_HINT = "a GPU hangs? sudo dmesg | grep -i xid"

Pair = tuple[int, int]
Smi = Callable[[Sequence[str]], str]
Nvml = Any  # the module pynvml, which has no types
Library = Callable[[], Nvml]
T = TypeVar("T")


@dataclass(frozen=True)
class Gpu:
    index: int
    name: str
    uuid: str
    memory_bytes: int
    used_bytes: int
    driver: str
    compute: tuple[int, int]  # capability, major and minor
    sliced: bool = False  # by MIG

    def __str__(self) -> str:
        return f"GPU {self.index} ({self.name})"


@dataclass(frozen=True)
class Process:
    """A program that has memory on a GPU."""

    uuid: str
    pid: int
    name: str
    used_bytes: int | None = None  # None where the driver does not tell


@dataclass(frozen=True)
class Topology:
    """`links`: (lower, higher index) -> how two GPUs are joined; `numa`: index -> NUMA node, "" where unknown."""

    links: dict[Pair, str]
    numa: dict[int, str]

    def nvlinks(self, pair: Pair) -> int:
        match = re.fullmatch(r"NV(\d+)", self.links.get(pair, ""))
        return int(match[1]) if match else 0

    def distance(self, pair: Pair) -> int:
        """Smaller is better: minus the number of NVLinks, or by DISTANCES."""
        return -self.nvlinks(pair) or DISTANCES.get(self.links.get(pair, ""), DISTANCES["SYS"])

    def apart(self, pair: Pair) -> bool:
        """Whether the two are known to be on different NUMA nodes."""
        one, other = (self.numa.get(gpu, "") for gpu in pair)
        return bool(one and other) and one != other


class NoDriver(UserError):
    """This machine has no NVIDIA driver, as far as this program can tell; `lacks`: what it has not."""

    def __init__(self, lacks: str) -> None:
        super().__init__(f"there is no {lacks}: this machine has no NVIDIA driver", SMI_HINT)
        self.lacks = lacks


def nvidia_smi(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """What nvidia-smi prints, in this process's environment or another. Raises UserError where there is none, or it
    fails."""
    words = ["nvidia-smi", *arguments]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S, errors="replace", env=environment)
    except FileNotFoundError:
        raise NoDriver("nvidia-smi") from None
    except PermissionError:
        raise UserError("nvidia-smi may not be run by this user", "ls -l $(which nvidia-smi)") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"nvidia-smi did not answer within {LIMIT_S:.0f} s", HANGS_HINT) from None
    if done.returncode:
        said = (done.stdout.strip() or done.stderr.strip() or "nothing").splitlines()[0]
        raise UserError(f"nvidia-smi failed with {done.returncode}: {said}", SMI_HINT)
    return done.stdout


def library() -> Nvml:
    """NVML as Python has it. Raises NoDriver where that is not installed."""
    try:
        import pynvml
    except ImportError:
        raise NoDriver("pynvml") from None
    return pynvml


def asked(question: Callable[[Nvml], T], load: Library = library) -> T:
    """The answer to a question that is put to NVML. Raises NoDriver where there is none, and UserError where it fails
    or does not answer in time."""
    nvml = load()
    answer: Future[T] = Future()

    def ask() -> None:
        try:
            nvml.nvmlInit()
            try:
                found = question(nvml)
            finally:
                with suppress(nvml.NVMLError):
                    nvml.nvmlShutdown()
            answer.set_result(found)
        except BaseException as error:
            answer.set_exception(error)

    # A thread, and a daemon's: what asks a GPU that hangs may wait in the kernel for ever.
    threading.Thread(target=ask, daemon=True).start()
    try:
        return answer.result(LIMIT_S)
    except TimeoutError:
        raise UserError(f"NVML did not answer within {LIMIT_S:.0f} s", HANGS_HINT) from None
    except nvml.NVMLError_LibraryNotFound:
        raise NoDriver("libnvidia-ml.so.1") from None
    except nvml.NVMLError as error:
        raise UserError(f"NVML failed: {error}", SMI_HINT) from None


def gpus(load: Library = library) -> list[Gpu]:
    """The machine's GPUs. Raises UserError where there are none."""

    def every(nvml: Nvml) -> list[Gpu]:
        driver = nvml.nvmlSystemGetDriverVersion()
        return [_gpu(nvml, index, driver) for index in range(nvml.nvmlDeviceGetCount())]

    if not (found := asked(every, load)):
        raise UserError("NVML lists no GPU", SMI_HINT)
    return found


def _gpu(nvml: Nvml, index: int, driver: str) -> Gpu:
    """Raises UserError naming a GPU that does not answer."""
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        name, uuid = nvml.nvmlDeviceGetName(handle), nvml.nvmlDeviceGetUUID(handle)
        compute = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    except nvml.NVMLError as error:
        raise UserError(f"NVML says of GPU {index}: {error}", SMI_HINT) from None
    try:
        memory = _memory(nvml, handle)
    except nvml.NVMLError as error:
        raise UserError(f"GPU {index} ({name}) does not tell its memory: {error}", "nvidia-smi -q -d MEMORY") from None
    return Gpu(index, name, uuid, memory.total, memory.used, driver, compute, _sliced(nvml, handle))


def _sliced(nvml: Nvml, handle: Any) -> bool:
    """Whether MIG divides it; most kinds of GPUs have no such mode."""
    with suppress(nvml.NVMLError):
        return bool(nvml.nvmlDeviceGetMigMode(handle)[0] == nvml.NVML_DEVICE_MIG_ENABLE)
    return False


def _memory(nvml: Nvml, handle: Any) -> Any:
    """Its `total` and `used` bytes, as nvidia-smi shows them."""
    try:
        return nvml.nvmlDeviceGetMemoryInfo(handle, nvml.nvmlMemory_v2)
    except nvml.NVMLError_FunctionNotFound:  # drivers before 510 count what they keep for themselves as used
        return nvml.nvmlDeviceGetMemoryInfo(handle)


def processes(load: Library = library) -> list[Process]:
    """The programs on the machine's GPUs; none are listed in a container."""

    def every(nvml: Nvml) -> list[Process]:
        found = []
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            uuid = nvml.nvmlDeviceGetUUID(handle)
            with suppress(nvml.NVMLError):  # of a sliced GPU only root is told
                for each in nvml.nvmlDeviceGetComputeRunningProcesses_v3(handle):
                    found.append(Process(uuid, each.pid, _program(nvml, each.pid), each.usedGpuMemory))
        return found

    return asked(every, load)


def _program(nvml: Nvml, pid: int) -> str:
    try:
        return str(nvml.nvmlSystemGetProcessName(pid))
    except UnicodeDecodeError as error:
        return str(error.object, errors="replace")
    except nvml.NVMLError as error:
        return f"[{error}]"  # [Not Found] is a process of another container


def topology(smi: Smi = nvidia_smi) -> Topology:
    return parse_topology(smi(["topo", "-m"]))


def parse_topology(text: str) -> Topology:
    """`nvidia-smi topo -m`: a matrix of GPUs and network cards, then CPUs and NUMA nodes where the driver knows them.

    A host whose firmware has no NUMA nodes leaves those empty or says N/A. Raises UserError without a matrix.
    """
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()  # on a terminal the header is underlined
    header = next((line for line in lines if re.match(r"\s+GPU\d+\s", line + " ")), "")
    columns = re.split(r"CPU Affinity|NUMA", header)[0].split()
    links: dict[Pair, str] = {}
    numa: dict[int, str] = {}
    for line in lines:
        name, *words = line.split() or [""]
        if not re.fullmatch(r"GPU\d+", name) or line == header or len(words) < len(columns):
            continue
        row = int(name[3:])
        for column, link in zip(columns, words, strict=False):
            if re.fullmatch(r"GPU\d+", column) and row < (other := int(column[3:])):
                links[row, other] = link
        rest = words[len(columns) :]
        # The first word is the CPUs'; a node that is left out leaves N/A, of the GPU's own memory, in its place.
        numa[row] = rest[1] if len(rest) > 1 and rest[1] != "N/A" else ""
    if not numa:
        raise UserError(
            "nvidia-smi topo -m prints no matrix of GPUs", "nvidia-smi topo -m; DEVICES=0,1 says which to use"
        )
    return Topology(links, numa)


def pairs(topology: Topology, among: Collection[int] | None = None) -> list[Pair]:
    """Disjoint pairs of GPUs, as many as there are, `among`: of these only.

    Of all ways to pair them the one of the smallest sum of distances: so an NVLink is never left unused for a better
    PCIe path elsewhere, and no pair is left with the sockets' interconnect because another took the one near GPU.
    Then the one with the fewest pairs over two NUMA nodes, then the one of neighbours: 0,1 2,3 … where all are alike.
    """
    chosen = tuple(sorted(topology.numa if among is None else set(among)))

    @cache
    def best(left: tuple[int, ...]) -> tuple[int, int, tuple[Pair, ...]]:
        if len(left) < 2:
            return 0, 0, ()
        first, rest = left[0], left[1:]
        ways: list[tuple[int, int, tuple[Pair, ...], tuple[int, ...]]] = []
        if len(left) % 2:
            ways.append((0, 0, (), rest))
        for i, second in enumerate(rest):
            pair = first, second
            ways.append((topology.distance(pair), topology.apart(pair), (pair,), rest[:i] + rest[i + 1 :]))
        joined = []
        for distance, apart, taken, remaining in ways:
            more = best(remaining)
            joined.append((distance + more[0], apart + more[1], taken + more[2]))
        return min(joined)

    return list(best(chosen)[2])


def explain(topology: Topology, chosen: Sequence[Pair]) -> list[str]:
    """A line a pair: its replica, the GPUs, how they are joined, where they are."""
    lines = []
    for replica, pair in enumerate(chosen):
        link, count = topology.links.get(pair, "?"), topology.nvlinks(pair)
        meaning = f"{count} NVLinks each" if count else MEANINGS.get(link, "unknown to this program")
        nodes = sorted({topology.numa.get(gpu, "") or "unknown" for gpu in pair})
        where = f"NUMA node{'s' * (len(nodes) > 1)} {' and '.join(nodes)}"
        lines.append(f"replica {replica}   GPU {pair[0]},{pair[1]:<4}  {link:<5} {meaning:<36} {where}")
    return lines
