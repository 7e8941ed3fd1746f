"""The doctor's checks of GPUs: model, memory, health, who uses them, and whether two of them can talk to each other."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence

from v4forge import gpus
from v4forge.errors import UserError
from v4forge.gpus import BLACKWELL, HOPPER, IDLE_BYTES, Gpu
from v4forge.outcomes import NotChecked, Outcome, failed, ok, warning
from v4forge.pipeline import requirements
from v4forge.pipeline.doctor.driver import REBUILD
from v4forge.pipeline.doctor.gpu_state import GpuState
from v4forge.pipeline.doctor.host import Host, listed, named_gpus
from v4forge.units import GIB, counted

PAIR = 2
NCCL_LIMIT_S = 150.0
MOST_GPUS = 8

# What NCCL or torch says -> the command.
NCCL_FAILURES = (
    ("/dev/shm", "sudo mount -o remount,size=16G /dev/shm"),
    ("No space left on device", "sudo mount -o remount,size=16G /dev/shm"),
    ("system not yet initialized", "sudo systemctl restart nvidia-fabricmanager"),
    ("out of memory", "nvidia-smi --query-compute-apps=pid,name,used_memory --format=csv"),
)
ALL_REDUCE = (
    *("-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(PAIR)),
    *("-m", "scripts.all_reduce"),
)
# Multicast over NVSwitch: where a machine's fabric is not set up for it, NCCL hangs or fails on its first use.
NCCL_ENVIRONMENT = {"NCCL_NVLS_ENABLE": "0", "OMP_NUM_THREADS": "1"}


def models(host: Host) -> Outcome:
    """As many GPUs as asked for, of one model, whole."""
    found = host.some_gpus()
    if gone := sorted(host.devices() - {gpu.index for gpu in found}):
        here = [str(gpu.index) for gpu in found]
        return host.needed(f"{named_gpus(gone)} of DEVICES is not here", _only(host, "doctor", here))
    names = sorted({gpu.name for gpu in found})
    shown = f"{len(found)} x {' and '.join(names)}, {min(g.memory_bytes for g in found) / GIB:.1f} GiB each"
    if len(found) < host.gpus_wanted:
        return host.needed(f"{shown}; GPUS={host.gpus_wanted} asks for more", host.make("doctor", f"GPUS={len(found)}"))
    if sliced := _those(host, found, lambda state: state.sliced):
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


def capability(host: Host) -> Outcome:
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


def memory(host: Host) -> Outcome:
    """A GPU's memory holds its share of the calibration tokens."""
    found = host.some_gpus()
    config, seq_len = host.config(), host.tokens[1]
    smallest = min(gpu.memory_bytes for gpu in found)

    def need(processes: int) -> int:
        return requirements.gpu_bytes(config, host.share(processes), seq_len)

    verb = "needs" if host.gpus_wanted == 1 else "need"
    each = f"{need(host.gpus_wanted) / GIB:.1f}{' each' * (host.gpus_wanted > 1)}"
    fact = f"{smallest / GIB:.1f} GiB; {counted(host.gpus_wanted, 'GPUs')} {verb} {each}"
    if need(host.gpus_wanted) <= smallest:
        return ok(fact)
    enough = next((n for n in range(host.gpus_wanted, len(found) + 1) if need(n) <= smallest), 0)
    fits = next((n for n in range(host.tokens[0], 0, -1) if requirements.gpu_bytes(config, n, seq_len) <= smallest), 0)
    shorter = (seq_len >> n for n in range(1, seq_len.bit_length()))
    short = next((s for s in shorter if requirements.gpu_bytes(config, host.share(host.gpus_wanted), s) <= smallest), 0)
    ways = {f"GPUS={enough}": enough, f"SAMPLES={fits * host.gpus_wanted}": fits, f"SEQ_LEN={short}": short}
    way = next((setting for setting, found in ways.items() if found), "DEVICES=<GPUs with more memory>")
    return host.needed(fact, host.make("artifact", way))


def health(host: Host) -> Outcome:
    """ECC: no uncorrected error since the driver started, no row or page that waits to be taken out of use."""
    found = host.some_gpus()
    whole = [str(gpu.index) for gpu in found]
    if broken := _those(host, found, lambda state: state.remap_failed):
        fact = f"{named_gpus(broken)}: a broken row of the memory could not be remapped; the GPU is to be replaced"
        others = [index for index in whole if index not in broken]
        return failed(fact, _only(host, "doctor", others) if others else "nvidia-smi -q -d ROW_REMAPPER")
    pending = _those(host, found, lambda state: state.remapping or state.retiring)
    errors = _those(host, found, lambda state: state.uncorrected)
    if pending or errors:
        what = "memory that a reset takes out of use" if pending else "uncorrected ECC errors since the last reset"
        reset = f"sudo nvidia-smi --gpu-reset -i {','.join(pending or errors)}"
        return failed(f"{named_gpus(pending or errors)}: {what}", reset)
    if not (on := _those(host, found, lambda state: state.ecc)):
        return warning("no GPU works with ECC: a flipped bit would go unseen", "sudo nvidia-smi -e 1 && sudo reboot")
    if without := [index for index in whole if index not in on]:
        fact = f"{named_gpus(without)}: without ECC, a flipped bit would go unseen"
        return warning(fact, f"sudo nvidia-smi -i {','.join(without)} -e 1 && sudo reboot")
    if old := _those(host, found, lambda state: state.uncorrected_ever):
        fact = f"{named_gpus(old)}: uncorrected ECC errors at some time, none since the last reset"
        return warning(fact, f"nvidia-smi -q -d ECC -i {','.join(old)}")
    return ok("on; no uncorrected error, nothing waits for a reset")


def _those(host: Host, among: Sequence[Gpu], true: Callable[[GpuState], object]) -> list[str]:
    """The numbers of the GPUs of whose state something is known to be true."""
    states = host.states()
    return [str(gpu.index) for gpu in among if gpu.index in states and true(states[gpu.index])]


def idle(host: Host) -> Outcome:
    """Nobody else uses the GPUs, or enough of them are free."""
    found = host.some_gpus()
    used = [gpu for gpu in found if gpu.used_bytes > IDLE_BYTES]
    if not used:
        return ok(f"{counted(len(found), 'GPUs')} idle")
    programs = gpus.processes(host.nvml)
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


def links(host: Host) -> Outcome:
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


def all_reduce(host: Host) -> Outcome:
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
