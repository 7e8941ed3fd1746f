"""The doctor's checks of GPUs and their driver, on machines whose libraries, programs and /proc are stand-ins."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pynvml
import pytest
import torch
from doctored import Machine, says
from nvml_stand_in import DRIVER, MIB, Program
from programs import run_here

from v4forge import gpus, pins
from v4forge.errors import UserError
from v4forge.outcomes import FAILED, OK, WARNING, NotChecked
from v4forge.pipeline import all_reduce
from v4forge.pipeline.doctor import driver
from v4forge.pipeline.doctor import gpu as doctor_gpu
from v4forge.pipeline.doctor.driver import Cuda
from v4forge.pipeline.doctor.host import Host, Ran, named_gpus, torch_cuda
from v4forge.units import GIB

LIBRARY = """
int cuInit(unsigned flags) { return %d; }
int cuDriverGetVersion(int *version) { *version = %d; return 0; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
"""
SWITCH = "/sys/bus/pci/devices/0000:07:00.0"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_gpus_are_called_by_name() -> None:
    assert [named_gpus(range(count)) for count in (1, 2, 3)] == ["GPU 0", "GPUs 0 and 1", "GPUs 0, 1 and 2"]


def with_cuda(host: Host, code: int = 0, version: int = 13000) -> Host:
    host.once("cuda", lambda: Cuda(code, version, 2))
    return host


def with_library(machine: Machine, code: int, version: int = 13000) -> dict[str, str]:
    """libcuda.so.1 that ends cuInit with this code -> the environment that finds it."""
    source = machine.file("/lib/cuda.c", LIBRARY % (code, version))
    subprocess.run(["cc", "-shared", "-fPIC", "-o", source.with_name("libcuda.so.1"), source], check=True)
    return {"LD_LIBRARY_PATH": str(source.parent)}


def test_a_driver_that_is_new_enough(machine: Machine) -> None:
    says(driver.driver(machine.host()), OK, f"driver {DRIVER}")


def test_a_driver_that_is_too_old_for_the_serve_image(machine: Machine) -> None:
    machine.nvml.driver = "535.104.05"
    minimum = pins.read()["CUDA_DRIVER_MIN"]
    says(driver.driver(machine.host()), FAILED, f"needs {minimum}", f"nvidia-driver-{minimum.split('.')[0]}")


def test_without_a_gpu_only_the_full_size_fails(tmp_path: Path) -> None:
    bare = Machine(tmp_path, gpus=0)
    says(driver.driver(bare.host("flash")), FAILED, "no NVIDIA GPU")
    says(driver.driver(bare.host("tiny")), WARNING, "PROFILE=tiny runs on the CPU")


def test_a_gpu_without_a_driver(tmp_path: Path) -> None:
    bare = Machine(tmp_path, gpus=0)
    bare.file("/sys/bus/pci/devices/0000:18:00.0/vendor", "0x10de\n")
    bare.file("/sys/bus/pci/devices/0000:18:00.0/class", "0x030200\n")
    says(
        driver.driver(bare.host()),
        FAILED,
        "an NVIDIA GPU, but no driver",
        "apt-get install",
    )


@pytest.mark.parametrize(
    "version",
    ["NVIDIA UNIX x86_64 Kernel Module  {}  Mon", "NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build"],
)
def test_a_driver_without_its_library(tmp_path: Path, version: str) -> None:
    bare = Machine(tmp_path, gpus=0)
    bare.file("/proc/driver/nvidia/version", f"NVRM version: {version.format(DRIVER)}\n")
    found = driver.driver(bare.host())
    says(found, FAILED, "has NVIDIA's driver, but there is no libnvidia-ml.so.1", "nvidia-utils-590-server")


def test_a_driver_without_its_program(machine: Machine) -> None:
    host = machine.host()
    (machine.bin / "nvidia-smi").unlink()
    says(driver.driver(host), FAILED, "no nvidia-smi", "nvidia-utils-590-server")
    with pytest.raises(NotChecked, match="there is no nvidia-smi, see driver"):
        doctor_gpu.links(host)


def test_a_place_without_pynvml_has_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = Machine(tmp_path, gpus=0).host("tiny", nvml=gpus.library)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    says(driver.driver(bare), WARNING, "no NVIDIA GPU here: PROFILE=tiny runs on the CPU")


@pytest.mark.parametrize(
    ("error", "said", "fix"),
    [
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "version mismatch", "sudo reboot"),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "Driver Not Loaded", "sudo modprobe nvidia"),
        (pynvml.NVML_ERROR_NO_PERMISSION, "Insufficient Permissions", "ls -l /dev/nvidia*"),
        (pynvml.NVML_ERROR_UNKNOWN, "Unknown Error", "sudo dmesg | grep"),
    ],
)
def test_a_driver_that_fails_is_told_with_its_own_fix(machine: Machine, error: int, said: str, fix: str) -> None:
    machine.nvml.error = error
    says(driver.driver(machine.host()), FAILED, said, fix)
    with pytest.raises(NotChecked, match="no GPU answers here, see driver"):
        doctor_gpu.models(machine.host())


@pytest.mark.parametrize(
    ("error", "said", "fix"),
    [
        (pynvml.NVML_ERROR_GPU_IS_LOST, "GPU 1: GPU is lost", "sudo reboot"),
        (pynvml.NVML_ERROR_RESET_REQUIRED, "GPU 1: GPU requires restart", "sudo nvidia-smi --gpu-reset"),
        (pynvml.NVML_ERROR_NO_PERMISSION, "GPU 1: Insufficient Permissions", "ls -l /dev/nvidia*"),
        (pynvml.NVML_ERROR_UNKNOWN, "GPU 1: Unknown Error", "sudo dmesg | grep"),
    ],
)
def test_a_gpu_that_does_not_answer_is_named(machine: Machine, error: int, said: str, fix: str) -> None:
    machine.gpus[1].error = error
    says(driver.driver(machine.host()), FAILED, said, fix)
    with pytest.raises(NotChecked):
        doctor_gpu.models(machine.host())


def test_a_driver_that_does_not_tell_its_version(machine: Machine) -> None:
    machine.nvml.driver = "N/A"
    says(driver.driver(machine.host()), FAILED, "does not tell the driver's version, but 'N/A'", "nvidia-smi")


def test_cuda_starts(machine: Machine) -> None:
    says(driver.cuda(machine.host(environment=with_library(machine, 0))), OK, "CUDA 13.0 of the driver")


def test_cuda_error_802_names_the_fabric_manager(machine: Machine) -> None:
    found = driver.cuda(machine.host(environment=with_library(machine, 802)))
    says(found, FAILED, "CUDA error 802: system not yet initialized", "systemctl restart nvidia-fabricmanager")


def test_a_driver_without_cudas_library(machine: Machine) -> None:
    with pytest.raises(UserError, match=r"libcuda\.so\.1 cannot be used"):
        driver.cuda(machine.host(environment={"LD_LIBRARY_PATH": str(machine.root)}))


@pytest.mark.parametrize(
    ("built", "version", "status"),
    [
        ("13.0", 13000, OK),
        ("13.0", 13010, OK),
        ("13.1", 13000, WARNING),
        ("13.0", 12080, FAILED),
        (None, 13000, WARNING),
    ],
)
def test_torch_is_built_for_a_cuda_that_the_driver_has(
    machine: Machine, built: str | None, version: int, status: str
) -> None:
    host = with_cuda(machine.host(torch_cuda=built), version=version)
    assert driver.torch_build(host).status == status


def test_the_full_size_without_docker_needs_torch_with_cuda(machine: Machine) -> None:
    says(driver.torch_build(machine.host(torch_cuda=None, runtime="host")), FAILED, "for the CPU", "make env")


def test_the_fabric_is_up(machine: Machine) -> None:
    machine.program("nv-fabricmanager", f'echo "Fabric Manager version is : {DRIVER}"')
    machine.program("systemctl", "echo active")
    says(driver.fabric_manager(with_cuda(machine.host())), OK, f"nvidia-fabricmanager {DRIVER}")


def test_a_fabric_manager_that_does_not_run(machine: Machine) -> None:
    for gpu in machine.gpus:
        gpu.fabric = pynvml.NVML_GPU_FABRIC_STATE_IN_PROGRESS
    machine.program("nv-fabricmanager", f'echo "Fabric Manager version is : {DRIVER}"')
    found = driver.fabric_manager(with_cuda(machine.host(), 802))
    says(found, FAILED, "In Progress: nvidia-fabricmanager does not run", "enable --now nvidia-fabricmanager")


def test_a_fabric_manager_that_is_not_installed(machine: Machine) -> None:
    for gpu in machine.gpus:
        gpu.fabric = pynvml.NVML_GPU_FABRIC_STATE_IN_PROGRESS
    found = driver.fabric_manager(with_cuda(machine.host(), 802))
    says(found, FAILED, "is not installed", f"apt-get install 'nvidia-fabricmanager-590={DRIVER}*' && sudo systemctl")


def test_a_fabric_that_is_managed_from_outside_of_the_vm(machine: Machine) -> None:
    says(driver.fabric_manager(with_cuda(machine.host())), OK, "runs outside of this VM or container")


def test_a_fabric_manager_of_another_version(machine: Machine) -> None:
    machine.program("nv-fabricmanager", 'echo "Fabric Manager version is : 570.133.20"')
    found = driver.fabric_manager(with_cuda(machine.host(), 802))
    says(found, FAILED, f"is 570.133.20, the driver {DRIVER}", f"nvidia-fabricmanager-590={DRIVER}*")


def test_a_fabric_that_is_down_though_its_manager_runs(machine: Machine) -> None:
    """Known by its process, where there is no systemd; and by CUDA's code, where the driver tells no state."""
    machine.nvml.unknown = ["nvmlDeviceGetGpuFabricInfoV"]
    machine.file(f"{SWITCH}/vendor", "0x10de\n")
    machine.file(f"{SWITCH}/class", "0x068000\n")
    machine.file("/proc/812/comm", "nv-fabricmanage\n")
    found = driver.fabric_manager(with_cuda(machine.host(), 802))
    says(found, FAILED, "CUDA error 802, though nvidia-fabricmanager runs", "restart")


@pytest.mark.parametrize("state", [None, pynvml.NVML_GPU_FABRIC_STATE_NOT_SUPPORTED])
def test_without_nvswitch_no_fabric_manager_is_needed(machine: Machine, state: int | None) -> None:
    for gpu in machine.gpus:
        gpu.fabric = state
    says(driver.fabric_manager(machine.host()), OK, "none is needed")


def test_gpus_are_counted_and_named(machine: Machine) -> None:
    says(doctor_gpu.models(machine.host(gpus_wanted=2)), OK, "2 x NVIDIA H200, 140.4 GiB each")
    says(doctor_gpu.models(machine.host(gpus_wanted=8)), FAILED, "GPUS=8 asks for more", "GPUS=2")


def test_devices_leaves_gpus_out(machine: Machine) -> None:
    one = {"CUDA_VISIBLE_DEVICES": "1"}
    says(doctor_gpu.models(machine.host(environment=one)), OK, "1 x NVIDIA H200")
    with pytest.raises(NotChecked, match="GPU 7 of DEVICES is not here"):
        doctor_gpu.models(machine.host(environment={"CUDA_VISIBLE_DEVICES": "7"}))


def test_one_of_devices_that_is_not_there_is_named(machine: Machine) -> None:
    host = machine.host(environment={"CUDA_VISIBLE_DEVICES": "1,7"}, gpus_wanted=2)
    says(doctor_gpu.models(host), FAILED, "GPU 7 of DEVICES is not here", "DEVICES=1 GPUS=1")


def test_gpus_of_two_models_are_a_warning(machine: Machine) -> None:
    machine.gpus[1].name = "NVIDIA H100"
    says(doctor_gpu.models(machine.host()), WARNING, "wait for the slowest", "DEVICES=0")
    assert doctor_gpu.models(machine.host(gpus_wanted=2)).fix == "make doctor PROFILE=flash DEVICES=0 GPUS=1"


def test_a_gpu_that_is_sliced(machine: Machine) -> None:
    machine.gpus[1].mig = True
    says(doctor_gpu.models(machine.host()), FAILED, "GPU 1: the memory is sliced by MIG", "sudo nvidia-smi -i 1 -mig 0")
    says(doctor_gpu.models(machine.host(environment={"CUDA_VISIBLE_DEVICES": "0"})), OK, "1 x NVIDIA H200")


@pytest.mark.parametrize(("compute", "status"), [((9, 0), OK), ((8, 0), FAILED), ((10, 0), WARNING)])
def test_hopper_serves(machine: Machine, compute: tuple[int, int], status: str) -> None:
    machine.gpus[1].compute = compute
    assert doctor_gpu.capability(machine.host()).status == status


def test_a_gpu_holds_its_share_of_the_tokens(machine: Machine) -> None:
    says(doctor_gpu.memory(machine.host()), OK, "140.4 GiB; 1 GPU need")
    for gpu in machine.gpus:
        gpu.memory_bytes = 46 * GIB
    says(doctor_gpu.memory(machine.host()), FAILED, "46.0 GiB", "make artifact PROFILE=flash GPUS=2")
    says(doctor_gpu.memory(machine.host("tiny")), OK, "46.0 GiB")


def test_a_gpu_for_which_even_all_of_them_are_too_few(machine: Machine) -> None:
    for gpu in machine.gpus:
        gpu.memory_bytes = 32 * GIB
    says(doctor_gpu.memory(machine.host()), FAILED, "32.0 GiB", "SAMPLES=")


def test_samples_too_long_for_a_gpu_are_to_be_shorter(machine: Machine) -> None:
    """Fewer of them would not help: one alone has more queries than there is memory."""
    for gpu in machine.gpus:
        gpu.memory_bytes = 46 * GIB
    host = machine.host(samples=2, seq_len=131072)
    says(doctor_gpu.memory(host), FAILED, "1 GPU needs 9", "SAMPLES=2 SEQ_LEN=65536")


def test_gpus_in_health(machine: Machine) -> None:
    says(doctor_gpu.health(machine.host()), OK, "no uncorrected error")


@pytest.mark.parametrize(
    ("field", "value", "status", "fact", "fix"),
    [
        ("volatile", 3, FAILED, "uncorrected ECC errors", "--gpu-reset -i 1"),
        ("aggregate", 3, WARNING, "at some time", "-q -d ECC -i 1"),
        ("retiring", True, FAILED, "a reset takes out of use", "--gpu-reset -i 1"),
        ("ecc", False, WARNING, "without ECC", "-i 1 -e 1"),
    ],
)
def test_what_ecc_has_counted(machine: Machine, field: str, value: int, status: str, fact: str, fix: str) -> None:
    setattr(machine.gpus[1], field, value)
    says(doctor_gpu.health(machine.host()), status, fact, fix)


def test_rows_that_wait_to_be_remapped_or_cannot_be(machine: Machine) -> None:
    machine.gpus[1].remapped = (0, 1, 1, 0)
    says(doctor_gpu.health(machine.host()), FAILED, "GPU 1: memory that a reset takes", "--gpu-reset -i 1")
    machine.gpus[1].remapped = (0, 1, 1, 1)
    says(doctor_gpu.health(machine.host()), FAILED, "GPU 1: a broken row", "DEVICES=0")


def test_a_card_without_ecc_and_a_driver_that_does_not_know_the_questions(machine: Machine) -> None:
    for gpu in machine.gpus:
        gpu.ecc = gpu.volatile = gpu.aggregate = None
    machine.nvml.unknown = ["nvmlDeviceGetRetiredPagesPendingStatus", "nvmlDeviceGetRemappedRows"]
    says(doctor_gpu.health(machine.host()), WARNING, "no GPU works with ECC")


def test_gpus_that_nobody_uses(machine: Machine) -> None:
    says(doctor_gpu.idle(machine.host()), OK, "2 GPUs idle")


def test_a_gpu_in_use_is_left_out_while_enough_are_free(machine: Machine) -> None:
    machine.gpus[0].used_bytes = 70000 * MIB
    machine.gpus[0].programs = [Program(4711, b"/usr/bin/python3", 69990 * MIB)]
    says(doctor_gpu.idle(machine.host()), WARNING, "GPU 0 (68.4 GiB, /usr/bin/python3 4711)", "DEVICES=1")
    assert "GPUS=" not in doctor_gpu.idle(machine.host()).fix
    says(doctor_gpu.idle(machine.host(gpus_wanted=2)), FAILED, "GPU 0", "sudo kill 4711")


def test_pairs_joined_by_nvlink(machine: Machine) -> None:
    says(doctor_gpu.links(machine.host()), OK, "for TP=2, GPUs 0 and 1 by 18 NVLinks")


def test_pairs_without_nvlink(machine: Machine) -> None:
    machine.topology = machine.topology.replace("NV18", "SYS")
    says(
        doctor_gpu.links(machine.host()),
        WARNING,
        "0 and 1 by the interconnect between NUMA nodes: without NVLink",
        "nvlink --status",
    )


def test_pairs_of_which_one_has_lost_links(tmp_path: Path) -> None:
    machine = Machine(tmp_path, gpus=4)
    rows = ["X NV18 SYS SYS", "NV18 X SYS SYS", "SYS SYS X NV12", "SYS SYS NV12 X"]
    lines = [f"GPU{number} {row} 0-47 0" for number, row in enumerate(rows)]
    machine.topology = "\n".join([" GPU0 GPU1 GPU2 GPU3 CPU Affinity NUMA Affinity", *lines])
    fact = "GPUs 0 and 1 by 18 NVLinks, 2 and 3 by 12 NVLinks: some have lost links"
    says(doctor_gpu.links(machine.host()), WARNING, fact, "nvlink --status")


def test_one_gpu_has_no_pair(tmp_path: Path) -> None:
    one = Machine(tmp_path, gpus=1).host()
    for check in (doctor_gpu.links, doctor_gpu.all_reduce):
        with pytest.raises(NotChecked, match="one GPU"):
            check(one)


@pytest.mark.slow
def test_two_processes_really_add(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    """With gloo, which takes NCCL's place where there is no GPU: the program and how its answer is read."""
    monkeypatch.setattr(doctor_gpu, "ALL_REDUCE", (*doctor_gpu.ALL_REDUCE, "--backend", "gloo"))
    says(doctor_gpu.all_reduce(machine.host()), OK, "GPUs 0 and 1: 64 MiB of 2 processes, right")


@pytest.mark.parametrize(
    ("said", "fact", "fix"),
    [
        ("error: the all-reduce is wrong in 9 of 16 numbers\nhint: …", "wrong in 9 of 16", "NCCL_DEBUG=INFO"),
        ("x\ntorch.distributed.DistBackendError: NCCL error in: /dev/shm/nccl-1", "DistBackendError", "remount,size"),
        ("Segmentation fault", "did not say why", "NCCL_DEBUG=INFO"),
    ],
)
def test_an_all_reduce_that_fails(
    monkeypatch: pytest.MonkeyPatch, machine: Machine, said: str, fact: str, fix: str
) -> None:
    monkeypatch.setattr(Host, "python", lambda *_, **__: Ran(1, "", said))
    says(doctor_gpu.all_reduce(machine.host()), FAILED, fact, fix)


def test_what_torch_is_built_for_is_read_without_importing_it() -> None:
    assert torch_cuda() == torch.version.cuda


def test_a_wrong_sum_is_found() -> None:
    parts = [all_reduce.numbers(rank, 1000, torch.device("cpu")) for rank in range(2)]
    all_reduce.check(parts[0] + parts[1], 2)
    for wrong in (parts[0], (parts[0] + parts[1]).roll(1)):
        with pytest.raises(UserError, match="all-reduce is wrong in"):
            all_reduce.check(wrong, 2)


def test_one_process_has_nobody_to_add_with(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert run_here("all_reduce") == 1
    assert "nobody to add with" in capsys.readouterr().err


def test_an_all_reduce_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    monkeypatch.setattr(doctor_gpu, "ALL_REDUCE", ("-c", "import time; time.sleep(60)"))
    monkeypatch.setattr(doctor_gpu, "NCCL_LIMIT_S", 0.3)
    says(doctor_gpu.all_reduce(machine.host()), FAILED, "did not end within", "NCCL_NVLS_ENABLE=0")
