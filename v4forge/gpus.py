"""The GPUs of this machine, as nvidia-smi tells: which of them form pairs, and whether they can serve the artifact."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from v4forge.errors import UserError

GPU_FIELDS = "index,name,uuid,memory.total,memory.used,driver_version,compute_cap"
PROCESS_FIELDS = "gpu_uuid,pid,process_name,used_memory"
LIMIT_S = 60.0  # without the persistence daemon, nvidia-smi wakes every GPU first
MIB, GIB = 2**20, 2**30

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

Pair = tuple[int, int]
Smi = Callable[[Sequence[str]], str]


@dataclass(frozen=True)
class Gpu:
    index: int  # nvidia-smi's, in the order of PCI buses
    name: str
    uuid: str
    memory_bytes: int
    used_bytes: int
    driver: str
    compute: tuple[int, int]  # capability, major and minor

    def __str__(self) -> str:
        return f"GPU {self.index} ({self.name})"


@dataclass(frozen=True)
class Process:
    """A program that has memory on a GPU."""

    uuid: str
    pid: int
    name: str


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


def nvidia_smi(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """What nvidia-smi prints, in this process's environment or another. Raises UserError where there is none, or it
    fails."""
    words = ["nvidia-smi", *arguments]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S, errors="replace", env=environment)
    except FileNotFoundError:
        raise UserError("there is no nvidia-smi: this machine has no NVIDIA driver", SMI_HINT) from None
    except PermissionError:
        raise UserError("nvidia-smi may not be run by this user", "ls -l $(which nvidia-smi)") from None
    except subprocess.TimeoutExpired:
        raise UserError(
            f"nvidia-smi did not answer within {LIMIT_S:.0f} s", "a GPU hangs? sudo dmesg | grep -i xid"
        ) from None
    if done.returncode:
        said = (done.stdout.strip() or done.stderr.strip() or "nothing").splitlines()[0]
        raise UserError(f"nvidia-smi failed with {done.returncode}: {said}", SMI_HINT)
    return done.stdout


def gpus(smi: Smi = nvidia_smi) -> list[Gpu]:
    """The machine's GPUs. Raises UserError where there are none."""
    found = parse_gpus(smi([f"--query-gpu={GPU_FIELDS}", "--format=csv,noheader,nounits"]))
    if not found:
        raise UserError("nvidia-smi lists no GPU", SMI_HINT)
    return found


def processes(smi: Smi = nvidia_smi) -> list[Process]:
    """The programs on the machine's GPUs; none are listed in a container."""
    return parse_processes(smi([f"--query-compute-apps={PROCESS_FIELDS}", "--format=csv,noheader,nounits"]))


def topology(smi: Smi = nvidia_smi) -> Topology:
    return parse_topology(smi(["topo", "-m"]))


def parse_gpus(text: str) -> list[Gpu]:
    """GPU_FIELDS by comma, a GPU a line, memory in MiB. Raises UserError naming a line that says something else."""
    found = []
    for line in filter(str.strip, text.splitlines()):
        try:
            index, name, uuid, memory, used, driver, compute = (word.strip() for word in line.split(","))
            major, minor = compute.split(".")
            found.append(
                Gpu(int(index), name, uuid, int(memory) * MIB, int(used) * MIB, driver, (int(major), int(minor)))
            )
        except ValueError:
            raise UserError(
                f"nvidia-smi says of a GPU: {line.strip()!r}, not {GPU_FIELDS}",
                f"nvidia-smi --query-gpu={GPU_FIELDS} --format=csv has to answer with numbers",
            ) from None
    return sorted(found, key=lambda gpu: gpu.index)


def parse_processes(text: str) -> list[Process]:
    """PROCESS_FIELDS by comma, a program a line; a program's name may hold commas."""
    matches = (re.fullmatch(r"\s*(GPU-[^,\s]+)\s*,\s*(\d+)\s*,\s*(.*?)\s*,[^,]*", line) for line in text.splitlines())
    return [Process(match[1], int(match[2]), match[3]) for match in matches if match]


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


def check_can_serve(
    gpus: Sequence[Gpu],
    tensor_parallel: int,
    artifact_bytes: int,
    memory_utilization: float,
    driver_min: str,
    programs: Sequence[Process] = (),
    replicas: int = 1,
) -> list[str]:
    """What may be wrong with serving on these GPUs, a line each. Raises UserError for what is.

    gpus: the ones to serve on; driver_min: CUDA_DRIVER_MIN of versions.env; programs: what `processes` found.
    """
    needed = tensor_parallel * replicas
    if len(gpus) < needed:
        fewer = len(gpus) // tensor_parallel
        raise UserError(
            f"{replicas} replicas of {tensor_parallel} GPUs need {needed}, there are {len(gpus)}",
            f"make serve REPLICAS={fewer}" if fewer else "serve on a machine with more GPUs: nvidia-smi -L lists them",
        )
    for gpu in gpus:
        if gpu.compute < HOPPER:
            raise UserError(
                f"{gpu} has compute capability {_dotted(gpu.compute)}; DeepGEMM and FP8 by blocks need"
                f" {_dotted(HOPPER)}, Hopper",
                "serve on H100, H200 or newer; DEVICES= leaves a GPU out",
            )
        if _version(gpu.driver) < _version(driver_min):
            raise UserError(
                f"the NVIDIA driver is {gpu.driver}; the image's CUDA needs {driver_min} or newer",
                f"install driver {driver_min} or newer and restart the machine; nvidia-smi shows it",
            )
    room = min(gpu.memory_bytes for gpu in gpus) * memory_utilization
    if room * tensor_parallel < artifact_bytes:
        enough = next((n for n in (2, 4, 8) if n > tensor_parallel and room * n >= artifact_bytes), 0)
        raise UserError(
            f"the artifact is {_gib(artifact_bytes)}; {tensor_parallel} of these GPUs hold"
            f" {_gib(room * tensor_parallel)} at a memory utilization of {memory_utilization:.2f}",
            f'make serve SET="tensor-parallel-size={enough}"' if enough else "serve on GPUs with more memory",
        )
    for gpu in gpus:
        if gpu.used_bytes > IDLE_BYTES:
            names = [f"{each.name} (process {each.pid})" for each in programs if each.uuid == gpu.uuid]
            by = ", ".join(names) or "a program that nvidia-smi does not list"
            raise UserError(
                f"{gpu} is in use: {_gib(gpu.used_bytes)} by {by}",
                "end it, or leave the GPU out with DEVICES=; replicas of ours: make serve-stop",
            )
    newer = [str(gpu) for gpu in gpus if gpu.compute >= BLACKWELL]
    return [f"not verified on compute capability {_dotted(BLACKWELL)} and newer: {', '.join(newer)}"] if newer else []


def _version(text: str) -> tuple[int, ...]:
    """Its numbers. Raises UserError for a driver that does not tell its version."""
    if not re.fullmatch(r"\d+(\.\d+)*", text):
        raise UserError(f"nvidia-smi says that the driver's version is {text!r}", SMI_HINT)
    return tuple(map(int, text.split(".")))


def _dotted(compute: tuple[int, int]) -> str:
    return f"{compute[0]}.{compute[1]}"


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
