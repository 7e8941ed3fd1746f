"""The state of GPUs as their driver tells it: slices, memory errors, the fabric that joins them."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import byref
from dataclasses import dataclass
from typing import Any

from v4forge import gpus
from v4forge.gpus import Library, Nvml

# nvmlGpuFabricState_t in nvidia-smi's words; 0 is for a GPU that no fabric joins to others.
FABRIC_STATES = {1: "Not Started", 2: "In Progress", 3: "Completed"}


@dataclass(frozen=True)
class GpuState:
    """None for what the driver does not tell, or the card does not have."""

    sliced: bool | None  # by MIG
    ecc: bool | None
    uncorrected: int | None  # ECC errors since the last reset
    uncorrected_ever: int | None
    retiring: bool | None  # pages that a reset takes out of use, on cards before Ampere
    remapping: bool | None  # rows that a reset takes out of use, since Ampere
    remap_failed: bool | None
    fabric: str | None  # of FABRIC_STATES


def states(load: Library = gpus.library) -> dict[int, GpuState]:
    """Every GPU's state by its index. Raises UserError where NVML cannot be asked."""
    return gpus.asked(lambda nvml: {i: _state(nvml, i) for i in range(nvml.nvmlDeviceGetCount())}, load)


def _state(nvml: Nvml, index: int) -> GpuState:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)

    def told(ask: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return ask(handle, *arguments)
        except nvml.NVMLError:
            return None

    mig, ecc = told(nvml.nvmlDeviceGetMigMode), told(nvml.nvmlDeviceGetEccMode)
    retiring = told(nvml.nvmlDeviceGetRetiredPagesPendingStatus)
    remapped = told(nvml.nvmlDeviceGetRemappedRows)  # corrected, uncorrected, pending, failed
    uncorrected = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED
    fabric = nvml.c_nvmlGpuFabricInfoV_t()
    has_fabric = told(nvml.nvmlDeviceGetGpuFabricInfoV, byref(fabric)) is not None
    return GpuState(
        sliced=mig and mig[0] == nvml.NVML_DEVICE_MIG_ENABLE,
        ecc=ecc and ecc[0] == nvml.NVML_FEATURE_ENABLED,
        uncorrected=told(nvml.nvmlDeviceGetTotalEccErrors, uncorrected, nvml.NVML_VOLATILE_ECC),
        uncorrected_ever=told(nvml.nvmlDeviceGetTotalEccErrors, uncorrected, nvml.NVML_AGGREGATE_ECC),
        retiring=None if retiring is None else bool(retiring),
        remapping=remapped and bool(remapped[2]),
        remap_failed=remapped and bool(remapped[3]),
        fabric=FABRIC_STATES.get(fabric.state) if has_fabric else None,
    )
