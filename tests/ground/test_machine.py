"""machine: what this machine is, and that processors of one name are told apart."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import nvml_stand_in
import pytest
from nvml_stand_in import Card, NvmlLibrary

from v4forge import machine

CPUINFO = "processor\t: 0\ncpu family\t: 6\nmodel\t\t: {model}\nmodel name\t: A Processor\nstepping\t: 1\n\n"
ARM = "processor\t: 0\nBogoMIPS\t: 100\nCPU implementer\t: 0x41\nCPU part\t: 0xd4f\n\n"


def written(folder: Path, text: str) -> Path:
    (folder / "cpuinfo").write_text(text)
    return folder / "cpuinfo"


def test_the_processors_name_is_the_one_that_its_maker_gave(tmp_path: Path) -> None:
    assert machine.cpu_model(written(tmp_path, CPUINFO.format(model=85))) == "A Processor"
    assert machine.cpu_model(tmp_path / "absent") == platform.machine()


def test_two_processors_of_one_name_have_another_identity(tmp_path: Path) -> None:
    one, other = (machine.cpu_identity(written(tmp_path, CPUINFO.format(model=model))) for model in (85, 143))
    assert one == "A Processor, cpu family 6, model 85, stepping 1" != other


def test_a_processor_without_a_name_is_told_by_its_part(tmp_path: Path) -> None:
    assert machine.cpu_identity(written(tmp_path, ARM)).endswith("CPU implementer 0x41, CPU part 0xd4f")


def test_the_facts_name_gpus_and_driver_where_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml_stand_in.put(monkeypatch, NvmlLibrary([Card("GPU-0"), Card("GPU-1")], driver="580.1"))
    facts = machine.facts()
    assert (facts["gpus"], facts["driver"]) == (["NVIDIA H200"] * 2, "580.1")
    assert facts["cores"] == os.cpu_count() and facts["memory_bytes"] > 2**30 and facts["kernel"]


def test_a_machine_without_a_driver_has_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml_stand_in.put(monkeypatch, None)
    assert (machine.facts()["gpus"], machine.facts()["driver"]) == ([], None)


def test_a_place_without_pynvml_has_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert (machine.facts()["gpus"], machine.facts()["driver"]) == ([], None)
