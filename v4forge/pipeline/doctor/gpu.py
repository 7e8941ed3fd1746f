"""The doctor's checks of GPUs: driver, fabric, memory, health, and whether two of them can talk to each other."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass

from v4forge import gpus, pins
from v4forge.errors import UserError
from v4forge.gpus import BLACKWELL, GIB, HOPPER, IDLE_BYTES, Gpu
from v4forge.pipeline import requirements
from v4forge.pipeline.doctor.host import (
    Host,
    NotChecked,
    Result,
    failed,
    listed,
    named_gpus,
    numbers,
    ok,
    table,
    warning,
)

PAIR = 2
CUDA_LIMIT_S, NCCL_LIMIT_S = 60.0, 150.0
NVIDIA, BRIDGE, DISPLAYS = "0x10de", "0x0680", ("0x0300", "0x0302")
MOST_GPUS = 8
YES = ("Yes", "1")

# What nvidia-smi says when it fails -> the command.
SMI_FAILURES = (
    ("version mismatch", "sudo reboot"),
    ("couldn't communicate", "sudo modprobe nvidia"),
    ("is lost", "sudo reboot"),
    ("requires reset", "sudo nvidia-smi --gpu-reset"),
)
KERNEL_LOG = "sudo dmesg | grep -iE 'nvrm|xid'"
REBUILD = "rm -r .venv && make env"

# cuInit's codes -> what is wrong, the command. https://docs.nvidia.com/cuda/cuda-driver-api, CUresult
CUDA_FAILURES = {
    100: ("no device that this user may open", "ls -l /dev/nvidia*"),
    802: (
        "system not yet initialized: nvidia-fabricmanager does not run, or is of another version than the driver",
        "sudo systemctl restart nvidia-fabricmanager",
    ),
    803: ("the driver's library is of another version than its kernel module", "sudo reboot"),
    804: ("a compatibility library of CUDA comes before the driver's own", "unset LD_LIBRARY_PATH"),
    999: ("unknown error: often the module nvidia-uvm is not loaded", "sudo nvidia-modprobe -u -c=0"),
}

# In a process of its own: a library that crashes must not take the doctor with it.
CUDA_PROBE = """
import ctypes, json
cuda = ctypes.CDLL("libcuda.so.1")
version, count = ctypes.c_int(), ctypes.c_int()
cuda.cuDriverGetVersion(ctypes.byref(version))
code = cuda.cuInit(0)
if code == 0:
    code = cuda.cuDeviceGetCount(ctypes.byref(count))
print(json.dumps([code, version.value, count.value]))
"""

# What NCCL or torch says -> the command.
NCCL_FAILURES = (
    ("/dev/shm", "sudo mount -o remount,size=16G /dev/shm"),
    ("No space left on device", "sudo mount -o remount,size=16G /dev/shm"),
    ("system not yet initialized", "sudo systemctl restart nvidia-fabricmanager"),
    ("out of memory", "nvidia-smi --query-compute-apps=pid,name,used_memory --format=csv"),
)
ALL_REDUCE = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PAIR), "-m", "scripts.all_reduce")
# Multicast over NVSwitch: where a machine's fabric is not set up for it, NCCL hangs or fails on its first use.
NCCL_ENVIRONMENT = {"NCCL_NVLS_ENABLE": "0", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Cuda:
    """What the driver's library says: cuInit's code, its CUDA version as 1000 * major + 10 * minor, devices."""

    code: int
    version: int
    devices: int

    @property
    def dotted(self) -> str:
        return f"{self.version // 1000}.{self.version % 1000 // 10}"


def driver(host: Host) -> Result:
    """There is a driver, and it is new enough for the serve image's CUDA."""
    minimum, install = pins.read()["CUDA_DRIVER_MIN"], _install()
    if not host.which("nvidia-smi"):
        if host.read("/proc/driver/nvidia/version"):
            branch = next(iter(numbers(_module_version(host))), "")
            fact = "the kernel has NVIDIA's driver, but there is no nvidia-smi"
            return host.needed(fact, f"sudo apt-get install nvidia-utils-{branch}-server")
        if _pci(host, DISPLAYS):
            return host.needed("there is an NVIDIA GPU, but no driver", install)
        if host.full_size:
            return failed("there is no NVIDIA GPU here; run it on a machine that has some", "lspci -d 10de:")
        return warning("no NVIDIA GPU here: PROFILE=tiny runs on the CPU", "make demo")
    try:
        found = host.gpus()
    except UserError as error:
        fix = next((command for text, command in SMI_FAILURES if text in error.fact), KERNEL_LOG)
        return host.needed(error.fact, fix)
    version = found[0].driver
    if not numbers(version):
        return host.needed(f"nvidia-smi does not tell the driver's version, but {version!r}", "nvidia-smi")
    if numbers(version) < numbers(minimum):
        return host.needed(f"driver {version}: the serve image's CUDA needs {minimum} or newer", install)
    return ok(f"driver {version}; the serve image's CUDA needs {minimum} or newer")


def _install() -> str:
    """A driver of the branch that the serve image's CUDA came with."""
    return f"sudo apt-get install nvidia-driver-{pins.read()['CUDA_DRIVER_MIN'].split('.')[0]}-server && sudo reboot"


def _module_version(host: Host) -> str:
    match = re.search(r"Kernel Module\D*([\d.]+)", host.read("/proc/driver/nvidia/version"))
    return match[1] if match else ""


def _pci(host: Host, classes: tuple[str, ...]) -> int:
    """How many PCI devices of NVIDIA's are of these classes."""
    count = 0
    for device in host.path("/sys/bus/pci/devices").glob("*"):
        name = f"/sys/bus/pci/devices/{device.name}"
        count += host.read(f"{name}/vendor").strip() == NVIDIA and host.read(f"{name}/class").startswith(classes)
    return count


def starts(host: Host) -> Cuda:
    """What the driver's library says. Raises UserError where it cannot be asked."""

    def ask() -> Cuda:
        ran = host.python("-c", CUDA_PROBE, limit_s=CUDA_LIMIT_S)
        if ran.code:
            last = (ran.err.strip() or "it crashed").splitlines()[-1]
            raise UserError(f"libcuda.so.1 cannot be used: {last}", "ldconfig -p | grep libcuda.so.1")
        return Cuda(*json.loads(ran.out))

    return host.once("cuda", ask)


def cuda(host: Host) -> Result:
    """CUDA starts: the driver's library, the devices and the fabric answer."""
    host.some_gpus()
    found = starts(host)
    if found.code:
        what, fix = CUDA_FAILURES.get(found.code, ("see cuInit in NVIDIA's list of CUresult", "sudo dmesg | tail"))
        return host.needed(f"CUDA error {found.code}: {what}", fix)
    return ok(f"CUDA {found.dotted} of the driver starts and sees {_counted(found.devices)}")


def torch_build(host: Host) -> Result:
    """This environment's torch has CUDA, and the driver knows it."""
    host.some_gpus()
    if host.torch_cuda is None:
        fact = "torch is a build for the CPU, and there is a GPU"
        return failed(fact, REBUILD) if host.full_size and host.chosen_runtime == "host" else warning(fact, REBUILD)
    ours, drivers = numbers(host.torch_cuda), numbers(starts(host).dotted)
    fact = f"torch is built for CUDA {host.torch_cuda}, the driver has {starts(host).dotted}"
    if drivers[:1] < ours[:1]:
        return host.needed(fact, _install())
    return ok(fact) if drivers >= ours else warning(f"{fact}: what it compiles at run time may fail", _install())


def fabric_manager(host: Host) -> Result:
    """Where NVSwitches join the GPUs, their manager runs, in the driver's version."""
    found = host.some_gpus()
    states = host.query("fabric.state,fabric.status")
    told = sorted({row["fabric.state"] for row in states if row["fabric.state"] not in ("", "Not Supported")})
    switches = _pci(host, (BRIDGE,))
    if not told and not switches:
        return ok("no NVSwitch here: none is needed")
    version, release = _manager_version(host), found[0].driver
    running = _manager_runs(host)
    code = starts(host).code
    up = code == 0 and told in ([], ["Completed"])
    judged = warning if up else host.needed
    install = f"sudo apt-get install 'nvidia-fabricmanager-{release.split('.')[0]}={release}*'"
    if version and version != release:
        fact = f"nvidia-fabricmanager is {version}, the driver {release}: they have to be the same"
        return judged(fact, f"{install} && sudo systemctl restart nvidia-fabricmanager")
    if not up:
        state = f"the fabric is {listed(told)}" if told else f"CUDA error {code}"
        judged = host.needed if code else warning  # one GPU may do without its neighbours
        if not running:
            start = "sudo systemctl enable --now nvidia-fabricmanager"
            if not version:
                return judged(f"{state}: nvidia-fabricmanager is not installed", f"{install} && {start}")
            return judged(f"{state}: nvidia-fabricmanager does not run", start)
        fact = f"{state}, though nvidia-fabricmanager runs"
        return judged(fact, "sudo systemctl restart nvidia-fabricmanager")
    outside = "nvidia-fabricmanager runs outside of this VM or container"
    shown = f"nvidia-fabricmanager {version}".strip() if running else outside
    return ok(f"the fabric is up; {shown}")


def _manager_version(host: Host) -> str:
    ran = host.command(["nv-fabricmanager", "--version"])
    match = re.search(r"\d+\.[\d.]*\d", ran.out + ran.err) if ran else None
    return match[0] if match else ""


def _manager_runs(host: Host) -> bool:
    active = host.command(["systemctl", "is-active", "nvidia-fabricmanager"])
    if active and active.said == "active":
        return True
    names = (host.read(f"/proc/{each.name}/comm").strip() for each in host.path("/proc").glob("[0-9]*"))
    return any(name.startswith("nv-fabricmanage") for name in names)  # the kernel keeps 15 characters


def models(host: Host) -> Result:
    """As many GPUs as asked for, of one model, whole."""
    found = host.some_gpus()
    if gone := sorted(host.devices() - {gpu.index for gpu in found}):
        here = [str(gpu.index) for gpu in found]
        return host.needed(f"{named_gpus(gone)} of DEVICES is not here", _only(host, "doctor", here))
    names = sorted({gpu.name for gpu in found})
    shown = f"{len(found)} x {' and '.join(names)}, {min(g.memory_bytes for g in found) / GIB:.1f} GiB each"
    if len(found) < host.gpus_wanted:
        return host.needed(f"{shown}; GPUS={host.gpus_wanted} asks for more", host.make("doctor", f"GPUS={len(found)}"))
    modes = {row["index"]: row["mig.mode.current"] for row in host.query("index,mig.mode.current")}
    if sliced := [str(gpu.index) for gpu in found if modes.get(str(gpu.index)) == "Enabled"]:
        whole = f"sudo nvidia-smi -i {','.join(sliced)} -mig 0"
        return host.needed(f"{named_gpus(sliced)}: the memory is sliced by MIG", whole)
    if len(names) > 1:
        first = [str(gpu.index) for gpu in found if gpu.name == found[0].name]
        fact = f"{shown}: the ranks of a run wait for the slowest"
        return warning(fact, _only(host, "doctor", first))
    return ok(shown)


def _only(host: Host, target: str, indexes: list[str]) -> str:
    """The make command on these GPUs only, on fewer than wanted where they are."""
    fewer = [f"GPUS={len(indexes)}"] if len(indexes) < host.gpus_wanted else []
    return host.make(target, f"DEVICES={','.join(indexes)}", *fewer)


def capability(host: Host) -> Result:
    """Compute capability: Hopper serves; newer ones were not tried."""
    found = host.some_gpus()
    lowest, highest = min(gpu.compute for gpu in found), max(gpu.compute for gpu in found)
    shown = ".".join(map(str, lowest))
    if lowest < HOPPER:
        fact = f"compute capability {shown}: DeepGEMM and FP8 by blocks, which serving needs, begin with 9.0, on H100"
        return host.needed(fact, "nvidia-smi -L")
    if highest >= BLACKWELL:
        fact = f"compute capability {'.'.join(map(str, highest))}: nothing was verified on it"
        return warning(fact, "make test TESTS='-m gpu'")
    return ok(f"compute capability {shown}")


def memory(host: Host) -> Result:
    """A GPU's memory holds its share of the calibration tokens."""
    found = host.some_gpus()
    config, seq_len = host.config(), host.tokens[1]
    smallest = min(gpu.memory_bytes for gpu in found)

    def need(processes: int) -> int:
        return requirements.gpu_bytes(config, host.share(processes), seq_len)

    verb = "needs" if host.gpus_wanted == 1 else "need"
    each = f"{need(host.gpus_wanted) / GIB:.1f}{' each' * (host.gpus_wanted > 1)}"
    fact = f"{smallest / GIB:.1f} GiB; {_counted(host.gpus_wanted)} {verb} {each}"
    if need(host.gpus_wanted) <= smallest:
        return ok(fact)
    enough = next((n for n in range(host.gpus_wanted, len(found) + 1) if need(n) <= smallest), 0)
    fits = next((n for n in range(host.tokens[0], 0, -1) if requirements.gpu_bytes(config, n, seq_len) <= smallest), 0)
    smaller = f"SAMPLES={fits * host.gpus_wanted}" if fits else "DEVICES=<GPUs with more memory>"
    return host.needed(fact, host.make("artifact", f"GPUS={enough}" if enough else smaller))


def health(host: Host) -> Result:
    """ECC: no uncorrected error since the driver started, no row or page that waits to be taken out of use."""
    found = host.some_gpus()
    whole = [str(gpu.index) for gpu in found]

    def those(field: str, *values: str) -> list[str]:
        """The GPUs whose field has one of the values; without values, a number above 0."""
        rows = [row for row in host.query(f"index,{field}") if row["index"] in whole]
        return [row["index"] for row in rows if (row[field] in values if values else numbers(row[field]) > (0,))]

    remapped = [(gpu, row) for gpu in found for row in _remapped(host) if row["gpu_uuid"] == gpu.uuid]
    if broken := [str(gpu.index) for gpu, row in remapped if row["remapped_rows.failure"] in YES]:
        fact = f"{named_gpus(broken)}: a broken row of the memory could not be remapped; the GPU is to be replaced"
        others = [index for index in whole if index not in broken]
        return failed(fact, _only(host, "doctor", others) if others else "nvidia-smi -q -d ROW_REMAPPER")
    pending = [str(gpu.index) for gpu, row in remapped if row["remapped_rows.pending"] in YES]
    pending += those("retired_pages.pending", *YES)
    errors = those("ecc.errors.uncorrected.volatile.total")
    if pending or errors:
        what = "memory that a reset takes out of use" if pending else "uncorrected ECC errors since the last reset"
        reset = f"sudo nvidia-smi --gpu-reset -i {','.join(pending or errors)}"
        return failed(f"{named_gpus(pending or errors)}: {what}", reset)
    if not (on := those("ecc.mode.current", "Enabled")):
        return warning("no GPU works with ECC: a flipped bit would go unseen", "sudo nvidia-smi -e 1 && sudo reboot")
    if without := [index for index in whole if index not in on]:
        fact = f"{named_gpus(without)}: without ECC, a flipped bit would go unseen"
        return warning(fact, f"sudo nvidia-smi -i {','.join(without)} -e 1 && sudo reboot")
    if old := those("ecc.errors.uncorrected.aggregate.total"):
        fact = f"{named_gpus(old)}: uncorrected ECC errors at some time, none since the last reset"
        return warning(fact, f"nvidia-smi -q -d ECC -i {','.join(old)}")
    return ok("on; no uncorrected error, nothing waits for a reset")


def _remapped(host: Host) -> list[dict[str, str]]:
    fields = "gpu_uuid,remapped_rows.pending,remapped_rows.failure"
    try:
        return table(fields, host.smi([f"--query-remapped-rows={fields}", "--format=csv,noheader,nounits"]))
    except UserError:
        return []


def idle(host: Host) -> Result:
    """Nobody else uses the GPUs, or enough of them are free."""
    found = host.some_gpus()
    used = [gpu for gpu in found if gpu.used_bytes > IDLE_BYTES]
    if not used:
        return ok(f"{_counted(len(found))} idle")
    programs = gpus.processes(host.smi)
    shown = [f"GPU {gpu.index} ({gpu.used_bytes / GIB:.1f} GiB{_by(gpu, programs)})" for gpu in used]
    fact = f"in use: {listed(shown)}"
    free = [str(gpu.index) for gpu in found if gpu not in used]
    if len(free) >= host.gpus_wanted:
        return warning(fact, _only(host, "artifact", free))
    pids = sorted({each.pid for each in programs if each.uuid in {gpu.uuid for gpu in used}})
    return host.needed(fact, f"sudo kill {' '.join(map(str, pids))}" if pids else "sudo fuser -v /dev/nvidia*")


def _by(gpu: Gpu, programs: list[gpus.Process]) -> str:
    names = [f"{each.name} {each.pid}" for each in programs if each.uuid == gpu.uuid]
    return f", {listed(names, 2)}" if names else ""


def links(host: Host) -> Result:
    """The pairs that serve at TP=2 are joined by NVLink, all of them alike."""
    found = host.some_gpus()
    if len(found) < PAIR:
        raise NotChecked("one GPU: a replica that serves takes two (TP=2)", "nvidia-smi topo -m")
    topology = host.topology()
    chosen = gpus.pairs(topology, [gpu.index for gpu in found])
    joined = [f"{a} and {b} by {_joined(topology, (a, b))}" for a, b in chosen]
    fact = f"for TP=2, GPUs {listed(joined, MOST_GPUS)}"
    widths = [topology.nvlinks(pair) for pair in chosen]
    if min(widths) == 0:
        return warning(f"{fact}: without NVLink a pair serves slower", "nvidia-smi nvlink --status")
    if min(widths) < max(widths):
        return warning(f"{fact}: some have lost links", "nvidia-smi nvlink --status")
    return ok(fact)


def _joined(topology: gpus.Topology, pair: gpus.Pair) -> str:
    link, count = topology.links.get(pair, "?"), topology.nvlinks(pair)
    return f"{count} NVLinks" if count else gpus.MEANINGS.get(link, link)


def all_reduce(host: Host) -> Result:
    """Two processes on two GPUs add their numbers with NCCL."""
    found = host.some_gpus()
    if len(found) < PAIR:
        raise NotChecked("one GPU: NCCL has nobody to talk to", "nvidia-smi -L")
    if host.torch_cuda is None:
        raise NotChecked("torch is a build for the CPU", REBUILD, "torch")
    first, second = gpus.pairs(host.topology(), [gpu.index for gpu in found])[0]
    pair = named_gpus((first, second))
    chosen = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": f"{first},{second}"}
    variables = NCCL_ENVIRONMENT | chosen
    command = " ".join(["NCCL_DEBUG=INFO", *(f"{name}={value}" for name, value in variables.items())])
    again = f"{command} {sys.executable} {' '.join(ALL_REDUCE)}"
    try:
        ran = host.python(*ALL_REDUCE, limit_s=NCCL_LIMIT_S, added=variables)
    except UserError:
        return host.needed(f"{pair}: NCCL's all-reduce did not end within {NCCL_LIMIT_S:.0f} s", again)
    told = re.search(r"^all-reduce: (.+)$", ran.out, flags=re.M)
    if ran.code == 0 and told:
        return ok(f"{pair}: {told[1]}")
    said = ran.out + ran.err
    fix = next((command for text, command in NCCL_FAILURES if text in said), again)
    return host.needed(f"{pair}: {_cause(said)}", fix)


def _cause(said: str) -> str:
    """The line in torchrun's output that says most."""
    lines = [line.strip() for line in said.splitlines()]
    for pattern in (r"^error: (.+)", r"(nccl\w*Error.*|Last error:.*)", r"((?:\w+\.)*\w*Error: .+)"):
        if found := [match[1] for line in lines if (match := re.search(pattern, line))]:
            return found[0][:300]
    return "the all-reduce failed and did not say why"


def _counted(count: int) -> str:
    return f"{count} GPU{'s' * (count != 1)}"
