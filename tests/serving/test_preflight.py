"""The guard of the GPUs: which can serve an artifact, and what is wrong with the others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import certified_artifact
import nvml_stand_in
import pytest
from keys import keypair
from nvml_stand_in import Card, NvmlLibrary, Program

from v4forge import certified
from v4forge.errors import UserError
from v4forge.gpus import Gpu, Process
from v4forge.serving import preflight
from v4forge.serving.deployment import Deployment
from v4forge.serving.preflight import Proof
from v4forge.units import GIB

NEEDED = "580.60.1"  # a driver, for tests
H200 = Gpu(0, "NVIDIA H200", "GPU-0", 143771 * 2**20, 4 * 2**20, "580.60.2", (9, 0))
ARTIFACT = int(170.4e9)


def machine(count: int, **changes: object) -> list[Gpu]:
    return [replace(H200, index=i, uuid=f"GPU-{i}", **changes) for i in range(count)]


def test_idle_h200s_can_serve_flash() -> None:
    assert preflight.check_can_serve(machine(8), 2, ARTIFACT, 0.8, NEEDED, replicas=4) == []


def test_a_newer_generation_is_told_as_not_verified() -> None:
    (warning,) = preflight.check_can_serve(machine(2, compute=(10, 0)), 2, ARTIFACT, 0.8, NEEDED)
    assert "10.0" in warning and "GPU 1" in warning


REFUSED = {
    "an older generation": (dict(compute=(8, 0), name="NVIDIA A100"), "GPU 0 (NVIDIA A100) has compute capability 8.0"),
    "an older driver": (dict(driver="580.59.99"), f"the NVIDIA driver is 580.59.99; the image's CUDA needs {NEEDED}"),
    "a driver without a number": (dict(driver="[N/A]"), "the driver's version is '[N/A]'"),
    "too little memory": (dict(memory_bytes=80 * GIB), "the artifact is 158.7 GiB; 2 of these GPUs hold 128.0 GiB"),
    "a sliced GPU": (dict(sliced=True), "GPU 0 (NVIDIA H200) is sliced by MIG"),
    "a GPU in use": (dict(used_bytes=40 * GIB), "GPU 0 (NVIDIA H200) is in use: 40.0 GiB by python3 (process 12)"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_gpus_that_cannot_serve_are_refused_with_the_fact(why: str) -> None:
    changes, fact = REFUSED[why]
    with pytest.raises(UserError) as caught:
        preflight.check_can_serve(machine(2, **changes), 2, ARTIFACT, 0.8, NEEDED, [Process("GPU-0", 12, "python3")])
    assert fact in caught.value.fact and caught.value.hint


@pytest.mark.parametrize("driver", ["580.60.1", "580.60.01", "580.100", "581.1.1"])
def test_drivers_are_compared_by_number(driver: str) -> None:
    assert preflight.check_can_serve(machine(2, driver=driver), 2, ARTIFACT, 0.8, NEEDED) == []


def test_a_smaller_gpu_is_told_how_many_of_it_hold_the_artifact() -> None:
    with pytest.raises(UserError, match="make serve TP=4"):
        preflight.check_can_serve(machine(8, memory_bytes=80 * GIB), 2, ARTIFACT, 0.8, NEEDED)
    with pytest.raises(UserError, match="more memory"):
        preflight.check_can_serve(machine(8, memory_bytes=16 * GIB), 2, ARTIFACT, 0.8, NEEDED)
    with pytest.raises(UserError, match="more of these GPUs"):
        preflight.check_can_serve(machine(2, memory_bytes=80 * GIB), 2, ARTIFACT, 0.8, NEEDED)
    assert preflight.check_can_serve(machine(8, memory_bytes=80 * GIB), 4, ARTIFACT, 0.8, NEEDED, replicas=2) == []


def test_too_few_gpus_are_told_for_how_many_replicas_they_are_enough() -> None:
    with pytest.raises(UserError, match=r"4 replicas of 2 GPUs need 8, there are 5 \(hint: make serve REPLICAS=2\)"):
        preflight.check_can_serve(machine(5), 2, ARTIFACT, 0.8, NEEDED, replicas=4)
    with pytest.raises(UserError, match="need 2, there are 1"):
        preflight.check_can_serve(machine(1), 2, ARTIFACT, 0.8, NEEDED)


def guarded(folder: Path, devices: list[list[str]]) -> None:
    """The guard, on an artifact of no bytes."""
    preflight.check_gpus(
        Deployment(folder=str(folder), artifact=str(folder), runtime="docker", backend="cuda", gpus=devices)
    )


def test_the_guard_asks_the_library_for_the_gpus_of_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = Card("GPU-2", used_bytes=40 * GIB, programs=[Program(12, b"python3", 40 * GIB)])
    nvml_stand_in.put(monkeypatch, NvmlLibrary([Card("GPU-0"), Card("GPU-1"), used]))
    guarded(tmp_path, [["0", "1"]])
    guarded(tmp_path, [["GPU-0", "GPU-1"]])
    with pytest.raises(UserError, match=r"GPU 1 \(NVIDIA H200\) is sliced by MIG"):
        nvml_stand_in.put(monkeypatch, NvmlLibrary([Card("GPU-0"), Card("GPU-1", mig=True)]))
        guarded(tmp_path, [["GPU-0", "GPU-1"]])
    nvml_stand_in.put(monkeypatch, NvmlLibrary([Card("GPU-0"), Card("GPU-1"), used]))
    with pytest.raises(UserError, match=r"GPU 2 \(NVIDIA H200\) is in use: 40\.0 GiB by python3 \(process 12\)"):
        guarded(tmp_path, [["0", "2"]])
    with pytest.raises(UserError, match="there is no GPU 7"):
        guarded(tmp_path, [["0", "7"]])


def test_the_guard_of_a_machine_without_a_driver_tells_of_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml_stand_in.put(monkeypatch, None)
    with pytest.raises(UserError, match=r"no NVIDIA driver.*BACKEND=cpu"):
        guarded(tmp_path, [["0", "1"]])


def spoilt(work: Path) -> Deployment:
    """Of an artifact of which bytes were overwritten."""
    artifact = certified_artifact.write(work)
    with open(artifact / "model-00001-of-00005.safetensors", "r+b") as file:
        file.write(b"other")
    return Deployment(folder=str(work / "serve"), artifact=str(artifact), runtime="host", backend="cpu", port=1)


def test_an_artifact_of_other_bytes_is_refused_unless_only_sizes_are_asked_for(tmp_path: Path) -> None:
    deployment = spoilt(tmp_path / "work")
    with pytest.raises(UserError, match=r"model-00001-of-00005\.safetensors has other bytes") as caught:
        preflight.check_certificate(deployment, Proof())
    assert caught.value.hint.endswith("or serve it all the same: make serve ALLOW=certificate")
    preflight.check_certificate(deployment, Proof(certified.SIZES))


def test_what_is_allowed_to_be_another_artifact_is_not_read(tmp_path: Path) -> None:
    deployment, said = spoilt(tmp_path / "work"), []
    preflight.check(deployment, ["certificate", "ports"], said.append)
    assert not (tmp_path / "work/.stamps").exists()
    Path(deployment.artifact, "model-00002-of-00005.safetensors").unlink()
    preflight.check(deployment, ["certificate", "ports"], said.append)
    assert "serve: allowed by ALLOW=certificate: " in said[0] and "cannot be read" in said[0]


def test_a_certificate_must_be_signed_where_there_is_a_key(tmp_path: Path) -> None:
    artifact = certified_artifact.write(tmp_path / "work")
    private, public = keypair(tmp_path)
    deployment = Deployment(folder=str(tmp_path), artifact=str(artifact), runtime="host", backend="cpu")
    with pytest.raises(UserError, match="is not signed"):
        preflight.check_certificate(deployment, Proof(key=public))
    certified.sign(artifact, private)
    preflight.check_certificate(deployment, Proof(key=public))
