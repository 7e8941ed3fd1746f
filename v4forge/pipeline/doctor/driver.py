"""The doctor's checks of NVIDIA's driver: that it is there and new enough, that CUDA starts, and the fabric with it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from v4forge import pins
from v4forge.errors import UserError
from v4forge.gpus import NoDriver
from v4forge.outcomes import Outcome, failed, ok, warning
from v4forge.pipeline.doctor.host import Host, counted_gpus, listed, numbers

CUDA_LIMIT_S = 60.0
NVIDIA, BRIDGE, DISPLAYS = "0x10de", "0x0680", ("0x0300", "0x0302")

# What NVML says when it fails -> the command.
NVML_FAILURES = (
    ("version mismatch", "sudo reboot"),
    ("Driver Not Loaded", "sudo modprobe nvidia"),
    ("is lost", "sudo reboot"),
    ("requires restart", "sudo nvidia-smi --gpu-reset"),
    ("Insufficient Permissions", "ls -l /dev/nvidia*"),
)
KERNEL_LOG = "sudo dmesg | grep -iE 'nvrm|xid'"
REBUILD = "rm -rf .venv && make env"

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


@dataclass(frozen=True)
class Cuda:
    """What the driver's library says: cuInit's code, its CUDA version as 1000 * major + 10 * minor, devices."""

    code: int
    version: int
    devices: int

    @property
    def dotted(self) -> str:
        return f"{self.version // 1000}.{self.version % 1000 // 10}"


def driver(host: Host) -> Outcome:
    """There is a driver, and it is new enough for the serve image's CUDA."""
    minimum = pins.read()["CUDA_DRIVER_MIN"]
    try:
        found = host.gpus()
    except NoDriver as error:
        return _without_driver(host, error.lacks)
    except UserError as error:
        fix = next((command for text, command in NVML_FAILURES if text in error.fact), KERNEL_LOG)
        return host.needed(error.fact, fix)
    version = found[0].driver
    if not numbers(version):
        return host.needed(f"NVML does not tell the driver's version, but {version!r}", "nvidia-smi")
    if numbers(version) < numbers(minimum):
        return host.needed(f"driver {version}: the serve image's CUDA needs {minimum} or newer", _install())
    if not host.which("nvidia-smi"):  # which tells how GPUs are joined
        return _incomplete(host, "nvidia-smi", version)
    return ok(f"driver {version}; the serve image's CUDA needs {minimum} or newer")


def _without_driver(host: Host, lacks: str) -> Outcome:
    """Whether a part of the driver, all of it, or the GPU itself is what is missing."""
    if release := _module_version(host):
        return _incomplete(host, lacks, release)
    if _pci(host, DISPLAYS):
        return host.needed("there is an NVIDIA GPU, but no driver", _install())
    if host.full_size:
        return failed("there is no NVIDIA GPU here; run it on a machine that has some", "lspci -d 10de:")
    return warning("no NVIDIA GPU here: PROFILE=tiny runs on the CPU", "make demo")


def _incomplete(host: Host, lacks: str, release: str) -> Outcome:
    """The package has nvidia-smi, and needs the one that has NVML."""
    fix = f"sudo apt-get install nvidia-utils-{release.split('.')[0]}-server"
    return host.needed(f"the kernel has NVIDIA's driver, but there is no {lacks}", fix)


def _install() -> str:
    """A driver of the branch that the serve image's CUDA came with."""
    return f"sudo apt-get install nvidia-driver-{pins.read()['CUDA_DRIVER_MIN'].split('.')[0]}-server && sudo reboot"


def _module_version(host: Host) -> str:
    match = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", host.read("/proc/driver/nvidia/version"))
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


def cuda(host: Host) -> Outcome:
    """CUDA starts: the driver's library, the devices and the fabric answer."""
    host.some_gpus()
    found = starts(host)
    if found.code:
        what, fix = CUDA_FAILURES.get(found.code, ("see cuInit in NVIDIA's list of CUresult", "sudo dmesg | tail"))
        return host.needed(f"CUDA error {found.code}: {what}", fix)
    return ok(f"CUDA {found.dotted} of the driver starts and sees {counted_gpus(found.devices)}")


def torch_build(host: Host) -> Outcome:
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


def fabric_manager(host: Host) -> Outcome:
    """Where NVSwitches join the GPUs, their manager runs, in the driver's version."""
    found = host.some_gpus()
    told = sorted({state.fabric for state in host.states().values() if state.fabric})
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
