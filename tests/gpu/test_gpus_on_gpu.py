"""What NVML tells of real GPUs is what nvidia-smi prints of them."""

from __future__ import annotations

import re
import shutil

import pytest
import torch

from v4forge import gpus
from v4forge.pipeline.doctor import gpu_state
from v4forge.units import GIB

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not shutil.which("nvidia-smi"), reason="there is no GPU here"),
]
MIB = 2**20
# nvidia-smi's words for yes, no and no value; any other word is a number or a state.
WORDS = {"Enabled": True, "Yes": True, "Disabled": False, "No": False, "Not Supported": None}


def printed(query: str, fields: str) -> list[list[str]]:
    """nvidia-smi's rows of words."""
    text = gpus.nvidia_smi([f"--query-{query}={fields}", "--format=csv,noheader,nounits"])
    return [[word.strip() for word in line.split(",")] for line in text.splitlines() if line.strip()]


def value(word: str) -> bool | int | str | None:
    if re.fullmatch(r"\[.*\]|N/A", word):
        return None
    return WORDS[word] if word in WORDS else int(word) if word.isdigit() else word


def test_each_gpu_is_as_nvidia_smi_prints_it() -> None:
    rows = printed("gpu", "index,name,uuid,driver_version,compute_cap,memory.total,memory.used")
    found = gpus.gpus()
    assert [[str(g.index), g.name, g.uuid, g.driver, ".".join(map(str, g.compute))] for g in found] == [
        row[:5] for row in rows
    ]
    for gpu, row in zip(found, rows, strict=True):
        assert gpu.memory_bytes / MIB == pytest.approx(int(row[5]), abs=1)
        assert gpu.used_bytes / MIB == pytest.approx(int(row[6]), abs=256), "with what the driver keeps for itself?"


def test_each_state_is_as_nvidia_smi_prints_it() -> None:
    fields = {
        "sliced": "mig.mode.current",
        "ecc": "ecc.mode.current",
        "uncorrected": "ecc.errors.uncorrected.volatile.total",
        "uncorrected_ever": "ecc.errors.uncorrected.aggregate.total",
        "retiring": "retired_pages.pending",
        "fabric": "fabric.state",
    }
    rows = printed("gpu", ",".join(fields.values()))
    found = gpu_state.states()
    print(*(f"GPU {index}: {state}" for index, state in found.items()), sep="\n")
    for (index, state), row in zip(found.items(), rows, strict=True):
        said = {name: value(word) for name, word in zip(fields, row, strict=True)}
        assert {name: getattr(state, name) for name in fields} == said, f"GPU {index}"


def test_rows_that_were_remapped_are_as_nvidia_smi_prints_them() -> None:
    rows = printed("remapped-rows", "gpu_uuid,remapped_rows.pending,remapped_rows.failure")
    said = {row[0]: [bool(flag) if (flag := value(word)) is not None else None for word in row[1:]] for row in rows}
    states, found = gpu_state.states(), gpus.gpus()
    assert {gpu.uuid: [states[gpu.index].remapping, states[gpu.index].remap_failed] for gpu in found} == said


def test_programs_are_those_that_nvidia_smi_lists() -> None:
    """This one with them, unless it is in a container, of which neither lists any."""
    held = torch.zeros(GIB, dtype=torch.uint8, device="cuda")
    rows = printed("compute-apps", "gpu_uuid,pid,process_name,used_memory")
    found = gpus.processes()
    assert sorted([each.uuid, str(each.pid), each.name] for each in found) == sorted(row[:3] for row in rows)
    for each in found:
        (word,) = (row[3] for row in rows if row[:2] == [each.uuid, str(each.pid)])
        used = None if each.used_bytes is None else each.used_bytes // MIB
        assert used == pytest.approx(value(word), abs=1)
    assert held.numel() == GIB


def test_numbers_are_nvidia_smis_and_pairs_cover_them() -> None:
    found = [gpu.index for gpu in gpus.gpus()]
    assert len(re.findall(r"^GPU \d+:", gpus.nvidia_smi(["-L"]), flags=re.M)) == len(found)
    assert sorted(gpus.topology().numa) == found
