"""libnvidia-ml.so.1 in Python: NVML's C functions over a table of GPUs.

What is above it is the real pynvml, with its structures, strings and errors: a name or a field that it does not have is
found without a GPU.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pynvml as real
from pynvml import NVML_ERROR_INSUFFICIENT_SIZE, NVML_ERROR_NOT_FOUND, NVML_ERROR_NOT_SUPPORTED, NVML_SUCCESS

DRIVER = "590.44.01"
MIB = 2**20


@dataclass
class Program:
    """On a GPU; `used_bytes`: None where the driver does not tell. A name of None is a process of another container."""

    pid: int
    name: bytes | None
    used_bytes: int | None


@dataclass
class Card:
    """One healthy H200. None is for what a card does not have, of which NVML says that it is not supported."""

    uuid: str
    name: str = "NVIDIA H200"
    memory_bytes: int | None = 143771 * MIB
    used_bytes: int = 4 * MIB
    reserved_bytes: int = 600 * MIB  # the driver's own, which nvidia-smi does not count as used
    compute: tuple[int, int] = (9, 0)
    ecc: bool | None = True
    volatile: int | None = 0
    aggregate: int | None = 0
    retiring: bool | None = None
    remapped: tuple[int, int, int, int] | None = (0, 0, 0, 0)  # corrected, uncorrected, pending, failed
    mig: bool | None = False
    fabric: int | None = real.NVML_GPU_FABRIC_STATE_COMPLETED
    programs: list[Program] = field(default_factory=list)
    listing: int = NVML_SUCCESS  # of its programs
    error: int = NVML_SUCCESS  # of any question to it


class NvmlLibrary:
    """`error`: how the initialization ends; `unknown`: functions that so old a driver does not have."""

    def __init__(
        self, cards: Sequence[Card], driver: str = DRIVER, error: int = NVML_SUCCESS, unknown: Collection[str] = ()
    ) -> None:
        self.cards, self.driver, self.error, self.unknown = cards, driver, error, unknown
        self.open = 0  # initializations that were not yet ended
        self.hangs: threading.Event | None = None

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml") and name in self.unknown:
            raise AttributeError(name)
        return super().__getattribute__(name)

    def nvmlInitWithFlags(self, flags: int) -> int:
        if self.hangs:
            self.hangs.wait(30)
        self.open += self.error == NVML_SUCCESS
        return self.error

    def nvmlShutdown(self) -> int:
        self.open -= 1
        return NVML_SUCCESS

    def nvmlSystemGetDriverVersion(self, text: Any, size: Any) -> int:
        text.value = self.driver.encode()
        return NVML_SUCCESS

    def nvmlSystemGetProcessName(self, pid: Any, text: Any, size: Any) -> int:
        names = {program.pid: program.name for card in self.cards for program in card.programs}
        if (name := names.get(pid.value)) is None:
            return NVML_ERROR_NOT_FOUND
        text.value = name
        return NVML_SUCCESS

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = len(self.cards)
        return NVML_SUCCESS

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, device: Any) -> int:
        ctypes.c_void_p.from_buffer(device._obj).value = index.value + 1  # a pointer, which is never 0
        return self.cards[index.value].error

    def _card(self, device: Any) -> Card:
        return self.cards[(ctypes.c_void_p.from_buffer(device).value or 0) - 1]

    def nvmlDeviceGetName(self, device: Any, text: Any, size: Any) -> int:
        text.value = self._card(device).name.encode()
        return NVML_SUCCESS

    def nvmlDeviceGetUUID(self, device: Any, text: Any, size: Any) -> int:
        text.value = self._card(device).uuid.encode()
        return NVML_SUCCESS

    def nvmlDeviceGetCudaComputeCapability(self, device: Any, major: Any, minor: Any) -> int:
        return _tell(self._card(device).compute, major, minor)

    def nvmlDeviceGetMemoryInfo_v2(self, device: Any, memory: Any) -> int:
        card = self._card(device)
        assert memory._obj.version == ctypes.sizeof(memory._obj) | 2 << 24
        if card.memory_bytes is None:
            return NVML_ERROR_NOT_SUPPORTED
        memory._obj.total, memory._obj.used = card.memory_bytes, card.used_bytes
        memory._obj.reserved = card.reserved_bytes
        return NVML_SUCCESS

    def nvmlDeviceGetMemoryInfo(self, device: Any, memory: Any) -> int:
        card = self._card(device)
        if card.memory_bytes is None:
            return NVML_ERROR_NOT_SUPPORTED
        memory._obj.total, memory._obj.used = card.memory_bytes, card.used_bytes + card.reserved_bytes
        return NVML_SUCCESS

    def nvmlDeviceGetEccMode(self, device: Any, current: Any, pending: Any) -> int:
        ecc = self._card(device).ecc
        return _tell(None if ecc is None else (ecc, ecc), current, pending)

    def nvmlDeviceGetTotalEccErrors(self, device: Any, kind: Any, counter: Any, count: Any) -> int:
        card = self._card(device)
        assert kind.value == real.NVML_MEMORY_ERROR_TYPE_UNCORRECTED
        found = {real.NVML_VOLATILE_ECC: card.volatile, real.NVML_AGGREGATE_ECC: card.aggregate}[counter.value]
        return _tell(None if found is None else (found,), count)

    def nvmlDeviceGetRetiredPagesPendingStatus(self, device: Any, pending: Any) -> int:
        retiring = self._card(device).retiring
        return _tell(None if retiring is None else (retiring,), pending)

    def nvmlDeviceGetRemappedRows(self, device: Any, *values: Any) -> int:
        return _tell(self._card(device).remapped, *values)

    def nvmlDeviceGetMigMode(self, device: Any, current: Any, pending: Any) -> int:
        mig = self._card(device).mig
        return _tell(None if mig is None else (mig, mig), current, pending)

    def nvmlDeviceGetGpuFabricInfoV(self, device: Any, info: Any) -> int:
        fabric = self._card(device).fabric
        assert info._obj.version == ctypes.sizeof(info._obj) | 2 << 24
        if fabric is None:
            return NVML_ERROR_NOT_SUPPORTED
        info._obj.state = fabric
        return NVML_SUCCESS

    def nvmlDeviceGetComputeRunningProcesses_v3(self, device: Any, count: Any, found: Any) -> int:
        card = self._card(device)
        room, count._obj.value = count._obj.value, len(card.programs)
        if card.listing or not card.programs:
            return card.listing
        if room < len(card.programs):
            return NVML_ERROR_INSUFFICIENT_SIZE
        for place, program in zip(found, card.programs, strict=False):
            place.pid = program.pid
            place.usedGpuMemory = (
                real.NVML_VALUE_NOT_AVAILABLE_ulonglong.value if program.used_bytes is None else program.used_bytes
            )
        return NVML_SUCCESS


def _tell(values: Sequence[int] | None, *into: Any) -> int:
    if values is None:
        return NVML_ERROR_NOT_SUPPORTED
    for value, place in zip(values, into, strict=True):
        place._obj.value = value
    return NVML_SUCCESS


def pynvml(library: NvmlLibrary | None) -> ModuleType:
    """A pynvml of its own over the library; without one, as on a machine that has no driver."""
    spec = importlib.util.find_spec("pynvml")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    with patch.dict(sys.modules, {"pynvml": module}):  # it makes its errors' classes in what is there by its name
        spec.loader.exec_module(module)
    module.nvmlLib = library  # type: ignore[attr-defined]
    if library is None:
        module._LoadNvmlLibrary = _absent(module)  # type: ignore[attr-defined]
    return module


def _absent(module: ModuleType) -> Callable[[], None]:
    def load() -> None:
        raise module.NVMLError(module.NVML_ERROR_LIBRARY_NOT_FOUND)

    return load


def put(monkeypatch: Any, library: NvmlLibrary | None) -> None:
    """In the place of this machine's library, for the length of a test."""
    monkeypatch.setitem(sys.modules, "pynvml", pynvml(library))
