"""v4forge.gpus: what NVIDIA's library tells, by a stand-in, and how GPUs are joined, on what nvidia-smi printed on real
machines, as their owners published it in bug reports.

topo-8xh100: NVIDIA/nccl#1264; topo-4xh100: NVIDIA/nccl#1617; topo-8xb200-one-unlinked: vllm-project/vllm#16336 without
its network cards; topo-8x4090: NVIDIA/go-gpuallocator#17; topo-8xpcie-no-numa: lattice/quda#669; topo-2xa800-unknown:
vllm-project/vllm#19607; topo-5xpcie and topo-2xrtx3090: noonghunna/club-3090#46 and #178. topo-2xh200-vm: two GPUs
of a VM that this project was tried on, as on a terminal.
"""

from __future__ import annotations

import itertools
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import nvml_stand_in
import pynvml
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nvml_stand_in import MIB, Card, NvmlLibrary, Program

from v4forge import gpus
from v4forge.checkout import ROOT
from v4forge.errors import UserError
from v4forge.gpus import Gpu, NoDriver, Process, Topology
from v4forge.units import GIB

DATA = ROOT / "tests/data"


def topology(name: str) -> Topology:
    return gpus.parse_topology((DATA / f"topo-{name}.txt").read_text())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("8xh100", [(0, 1), (2, 3), (4, 5), (6, 7)]),
        ("4xh100", [(0, 1), (2, 3)]),
        ("8xb200-one-unlinked", [(0, 1), (2, 3), (4, 5), (6, 7)]),
        ("8x4090", [(0, 1), (2, 3), (4, 5), (6, 7)]),
        ("8xpcie-no-numa", [(0, 1), (2, 3), (4, 5), (6, 7)]),
        ("5xpcie", [(1, 2), (3, 4)]),
        ("2xa800-unknown", [(0, 1)]),
        ("2xrtx3090", [(0, 1)]),
        ("2xh200-vm", [(0, 1)]),
    ],
)
def test_pairs_of_published_machines(name: str, expected: list[tuple[int, int]]) -> None:
    assert gpus.pairs(topology(name)) == expected


def test_links_and_numa_nodes_are_read_beside_network_cards() -> None:
    found = topology("8xh100")
    assert set(found.links) == set(itertools.combinations(range(8), 2)) and set(found.links.values()) == {"NV18"}
    assert found.numa == {i: "0" if i < 4 else "1" for i in range(8)}


@pytest.mark.parametrize(
    ("name", "numa"),
    [
        ("8xpcie-no-numa", dict.fromkeys(range(8), "")),
        ("2xa800-unknown", {0: "", 1: ""}),
        ("2xrtx3090", {0: "", 1: "1"}),
        ("4xh100", {0: "3", 1: "1", 2: "7", 3: "5"}),
    ],
)
def test_a_numa_node_that_the_driver_does_not_know_is_unknown(name: str, numa: dict[int, str]) -> None:
    assert topology(name).numa == numa


def test_a_header_that_is_underlined_on_a_terminal_is_read() -> None:
    text = (DATA / "topo-2xrtx3090.txt").read_text()
    header, *rows = text.splitlines()
    assert gpus.parse_topology("\n".join((f"\t\x1b[4m{header[1:]}\x1b[0m", *rows))) == topology("2xrtx3090")


def test_pairs_keep_to_a_numa_node_where_all_links_are_alike() -> None:
    found = topology("8x4090")
    crossed = replace(found, numa={gpu: str(gpu % 2) for gpu in range(8)})
    assert gpus.pairs(crossed) == [(0, 2), (1, 3), (4, 6), (5, 7)]


def test_an_nvlink_bridge_wins_over_the_better_pcie_paths_beside_it() -> None:
    links = dict.fromkeys(itertools.combinations(range(4), 2), "PIX") | {(0, 3): "NV12", (1, 2): "SYS"}
    assert gpus.pairs(Topology(links, dict.fromkeys(range(4), "0"))) == [(0, 3), (1, 2)]


def test_no_pair_is_left_with_the_sockets_interconnect_because_another_took_the_near_gpu() -> None:
    links = dict.fromkeys(itertools.combinations(range(4), 2), "SYS") | {(0, 1): "PHB", (1, 2): "PIX", (2, 3): "PHB"}
    assert gpus.pairs(Topology(links, dict.fromkeys(range(4), ""))) == [(0, 1), (2, 3)]


def test_pairs_are_taken_among_the_gpus_that_were_asked_for() -> None:
    assert gpus.pairs(topology("8xh100"), among={6, 1, 3}) == [(1, 3)]
    assert gpus.pairs(topology("8xh100"), among=[5]) == []


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    count = draw(st.integers(0, 7))
    link = st.sampled_from(["NV1", "NV4", "NV18", *gpus.DISTANCES, "?"])
    links = {pair: draw(link) for pair in itertools.combinations(range(count), 2)}
    return Topology(links, {gpu: draw(st.sampled_from(["", "0", "1"])) for gpu in range(count)})


@given(topologies())
def test_pairs_are_disjoint_as_many_as_there_are_and_none_are_nearer(found: Topology) -> None:
    chosen = gpus.pairs(found)
    count = len(found.numa)
    assert len(chosen) == count // 2 and len({gpu for pair in chosen for gpu in pair}) == 2 * len(chosen)
    orders = itertools.permutations(range(count))
    ways = {tuple(sorted(tuple(sorted(order[i : i + 2])) for i in range(0, count - 1, 2))) for order in orders}
    assert sum(map(found.distance, chosen)) == min(sum(map(found.distance, way)) for way in ways)


def test_the_table_says_how_a_pair_is_joined_and_where() -> None:
    found = topology("5xpcie")
    first, second = gpus.explain(found, [(1, 2), (0, 3)])
    assert first.split("  ")[0] == "replica 0" and "GPU 1,2" in first and "PHB" in first and first.endswith("node 0")
    assert "SYS" in second and second.endswith("NUMA nodes 0 and 1")
    assert "18 NVLinks each" in gpus.explain(topology("8xh100"), [(0, 1)])[0]
    assert gpus.explain(topology("2xa800-unknown"), [(0, 1)])[0].endswith("NUMA node unknown")


def test_gpus_are_read_in_their_order_with_what_the_driver_keeps_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [
        Card("GPU-a", "NVIDIA B200", memory_bytes=183359 * MIB, used_bytes=0, compute=(10, 0)),
        Card("GPU-b", used_bytes=512 * MIB, reserved_bytes=600 * MIB),
    ]
    nvml_stand_in.put(monkeypatch, NvmlLibrary(cards, driver="580.60.2"))
    assert gpus.gpus() == [
        Gpu(0, "NVIDIA B200", "GPU-a", 183359 * MIB, 0, "580.60.2", (10, 0)),
        Gpu(1, "NVIDIA H200", "GPU-b", 143771 * MIB, 512 * MIB, "580.60.2", (9, 0)),
    ]


def test_a_driver_that_does_not_tell_what_it_keeps_counts_it_as_used(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [Card("GPU-0", used_bytes=4 * MIB, reserved_bytes=600 * MIB)]
    nvml_stand_in.put(monkeypatch, NvmlLibrary(cards, unknown=["nvmlDeviceGetMemoryInfo_v2"]))
    assert [(gpu.memory_bytes, gpu.used_bytes) for gpu in gpus.gpus()] == [(143771 * MIB, 604 * MIB)]


def test_a_gpu_that_does_not_tell_its_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml_stand_in.put(monkeypatch, NvmlLibrary([Card("GPU-a", "NVIDIA GB10", memory_bytes=None, compute=(12, 1))]))
    with pytest.raises(UserError, match=r"GPU 0 \(NVIDIA GB10\) does not tell its memory: Not Supported"):
        gpus.gpus()


def test_a_gpu_that_is_lost_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    library = NvmlLibrary([Card("GPU-0"), Card("GPU-1", error=pynvml.NVML_ERROR_GPU_IS_LOST)])
    nvml_stand_in.put(monkeypatch, library)
    with pytest.raises(UserError, match="of GPU 1: GPU is lost"):
        gpus.gpus()
    assert library.open == 0


def test_programs_on_a_gpu_are_read_whatever_they_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [
        Card("GPU-a", programs=[Program(4242, b"/opt/my, app/python3", GIB), Program(43, b"caf\xe9", 1)]),
        Card("GPU-b", programs=[Program(7, None, None)]),
        Card("GPU-c"),
    ]
    nvml_stand_in.put(monkeypatch, NvmlLibrary(cards))
    assert gpus.processes() == [
        Process("GPU-a", 4242, "/opt/my, app/python3", GIB),
        Process("GPU-a", 43, "caf\ufffd", 1),
        Process("GPU-b", 7, "[Not Found]", None),
    ]


def test_a_gpu_whose_programs_are_not_told_hides_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    sliced = Card("GPU-a", programs=[Program(1, b"x", 1)], listing=pynvml.NVML_ERROR_NO_PERMISSION)
    nvml_stand_in.put(monkeypatch, NvmlLibrary([sliced, Card("GPU-b", programs=[Program(2, b"y", 1)])]))
    assert gpus.processes() == [Process("GPU-b", 2, "y", 1)]


def test_a_machine_without_a_driver_is_told_of_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    nvml_stand_in.put(monkeypatch, None)
    for ask, lacks in ((gpus.gpus, "libnvidia-ml"), (gpus.processes, "libnvidia-ml"), (gpus.topology, "nvidia-smi")):
        with pytest.raises(NoDriver, match=rf"there is no {lacks}.*no NVIDIA driver.*BACKEND=cpu"):
            ask()


def test_a_place_without_pynvml_has_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(NoDriver, match=r"no pynvml: this machine has no NVIDIA driver.*BACKEND=cpu"):
        gpus.gpus()


@pytest.mark.parametrize(
    ("error", "fact"),
    [
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "NVML failed: RM has detected an NVML/RM version mismatch"),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "NVML failed: Driver Not Loaded"),
        (pynvml.NVML_ERROR_NO_PERMISSION, "NVML failed: Insufficient Permissions"),
    ],
)
def test_a_library_that_fails_is_quoted(error: int, fact: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml_stand_in.put(monkeypatch, NvmlLibrary([Card("GPU-0")], error=error))
    with pytest.raises(UserError) as caught:
        gpus.gpus()
    assert fact in caught.value.fact and caught.value.hint


def test_a_driver_that_lists_no_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml_stand_in.put(monkeypatch, NvmlLibrary([]))
    with pytest.raises(UserError, match="lists no GPU"):
        gpus.gpus()


def test_a_library_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    library = NvmlLibrary([Card("GPU-0")])
    library.hangs = threading.Event()
    nvml_stand_in.put(monkeypatch, library)
    monkeypatch.setattr(gpus, "LIMIT_S", 0.2)
    with pytest.raises(UserError, match="did not answer within"):
        gpus.gpus()
    library.hangs.set()


def test_several_may_ask_at_once_and_the_library_is_closed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    library = NvmlLibrary([Card("GPU-0")])
    nvml_stand_in.put(monkeypatch, library)
    with ThreadPoolExecutor(4) as pool:
        assert len({str(found) for found in pool.map(lambda _: gpus.gpus(), range(20))}) == 1
    assert library.open == 0


# Bodies of a program in nvidia-smi's place -> the fact.
FAILING = {
    "echo 'NVIDIA-SMI has failed because it could not reach the driver.'; exit 9": "failed with 9: NVIDIA-SMI",
    "echo 'Unknown error' >&2; exit 255": "failed with 255: Unknown error",
    "exit 6": "failed with 6: nothing",
    "true": "no matrix of GPUs",
    "exec sleep 30": "did not answer within",
}


@pytest.mark.parametrize("body", FAILING)
def test_an_nvidia_smi_that_fails_is_quoted(body: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(gpus, "LIMIT_S", 2.0)
    with pytest.raises(UserError) as caught:
        gpus.topology()
    assert FAILING[body] in caught.value.fact


def test_a_matrix_that_is_missing_is_told() -> None:
    with pytest.raises(UserError, match="no matrix"):
        gpus.parse_topology("Legend:\n\n  X    = Self\n")
