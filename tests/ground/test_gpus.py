"""v4forge.gpus on what nvidia-smi printed on real machines, as their owners published it in bug reports.

topo-8xh100: NVIDIA/nccl#1264; topo-4xh100: NVIDIA/nccl#1617; topo-8xb200-one-unlinked: vllm-project/vllm#16336 without
its network cards; topo-8x4090: NVIDIA/go-gpuallocator#17; topo-8xpcie-no-numa: lattice/quda#669; topo-2xa800-unknown:
vllm-project/vllm#19607; topo-5xpcie and topo-2xrtx3090: noonghunna/club-3090#46 and #178. topo-2xh200-vm: two GPUs
of a VM that this project was tried on, as on a terminal.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from v4forge import gpus
from v4forge.checkout import ROOT
from v4forge.errors import UserError
from v4forge.gpus import GIB, Gpu, Process, Topology

DATA = ROOT / "tests/data"
NEEDED = "580.60.1"  # a driver, for tests
H200 = Gpu(0, "NVIDIA H200", "GPU-0", 143771 * 2**20, 4 * 2**20, "580.60.2", (9, 0))
ARTIFACT = int(170.4e9)


def topology(name: str) -> Topology:
    return gpus.parse_topology((DATA / f"topo-{name}.txt").read_text())


def machine(count: int, **changes: object) -> list[Gpu]:
    return [replace(H200, index=i, uuid=f"GPU-{i}", **changes) for i in range(count)]


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


def test_gpus_are_read_in_their_order() -> None:
    text = "1, NVIDIA H200, GPU-b, 143771, 512, 580.60.2, 9.0\n0, NVIDIA B200, GPU-a, 183359, 0, 580.60.2, 10.0\n"
    first, second = gpus.parse_gpus(text)
    assert (first.index, first.compute, second.used_bytes) == (0, (10, 0), 512 * 2**20)
    assert second.memory_bytes == 143771 * 2**20


@pytest.mark.parametrize("line", ["0, NVIDIA GB10, GPU-a, [N/A], [N/A], 580.60.2, 12.1", "garbage", "0,1,2,3,4,5,6,7"])
def test_a_gpu_that_does_not_tell_its_memory_is_named(line: str) -> None:
    with pytest.raises(UserError) as caught:
        gpus.parse_gpus(line)
    assert line in caught.value.fact


def test_programs_on_a_gpu_are_read_whatever_they_are_called() -> None:
    text = "GPU-a, 4242, /opt/my, app/python3, 1024\nGPU-b, 7, [Not Found], [N/A]\n\nNo running processes found\n"
    assert gpus.parse_processes(text) == [
        Process("GPU-a", 4242, "/opt/my, app/python3"),
        Process("GPU-b", 7, "[Not Found]"),
    ]


def test_idle_h200s_can_serve_flash() -> None:
    assert gpus.check_can_serve(machine(8), 2, ARTIFACT, 0.8, NEEDED, replicas=4) == []


def test_a_newer_generation_is_told_as_not_verified() -> None:
    (warning,) = gpus.check_can_serve(machine(2, compute=(10, 0)), 2, ARTIFACT, 0.8, NEEDED)
    assert "10.0" in warning and "GPU 1" in warning


REFUSED = {
    "an older generation": (dict(compute=(8, 0), name="NVIDIA A100"), "GPU 0 (NVIDIA A100) has compute capability 8.0"),
    "an older driver": (dict(driver="580.59.99"), f"the NVIDIA driver is 580.59.99; the image's CUDA needs {NEEDED}"),
    "a driver without a number": (dict(driver="[N/A]"), "the driver's version is '[N/A]'"),
    "too little memory": (dict(memory_bytes=80 * GIB), "the artifact is 158.7 GiB; 2 of these GPUs hold 128.0 GiB"),
    "a GPU in use": (dict(used_bytes=40 * GIB), "GPU 0 (NVIDIA H200) is in use: 40.0 GiB by python3 (process 12)"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_gpus_that_cannot_serve_are_refused_with_the_fact(why: str) -> None:
    changes, fact = REFUSED[why]
    with pytest.raises(UserError) as caught:
        gpus.check_can_serve(machine(2, **changes), 2, ARTIFACT, 0.8, NEEDED, [Process("GPU-0", 12, "python3")])
    assert fact in caught.value.fact and caught.value.hint


@pytest.mark.parametrize("driver", ["580.60.1", "580.60.01", "580.100", "581.1.1"])
def test_drivers_are_compared_by_number(driver: str) -> None:
    assert gpus.check_can_serve(machine(2, driver=driver), 2, ARTIFACT, 0.8, NEEDED) == []


def test_a_smaller_gpu_is_told_how_many_of_it_hold_the_artifact() -> None:
    with pytest.raises(UserError, match="tensor-parallel-size=4"):
        gpus.check_can_serve(machine(8, memory_bytes=80 * GIB), 2, ARTIFACT, 0.8, NEEDED)
    with pytest.raises(UserError, match="more memory"):
        gpus.check_can_serve(machine(8, memory_bytes=16 * GIB), 2, ARTIFACT, 0.8, NEEDED)


def test_too_few_gpus_are_told_for_how_many_replicas_they_are_enough() -> None:
    with pytest.raises(UserError, match=r"4 replicas of 2 GPUs need 8, there are 5 \(hint: make serve REPLICAS=2\)"):
        gpus.check_can_serve(machine(5), 2, ARTIFACT, 0.8, NEEDED, replicas=4)
    with pytest.raises(UserError, match="need 2, there are 1"):
        gpus.check_can_serve(machine(1), 2, ARTIFACT, 0.8, NEEDED)


def test_a_machine_without_a_driver_is_told_of_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"no NVIDIA driver.*BACKEND=cpu"):
        gpus.gpus()


# Bodies of a program in nvidia-smi's place -> the fact.
FAILING = {
    "echo 'NVIDIA-SMI has failed because it could not reach the driver.'; exit 9": "failed with 9: NVIDIA-SMI",
    "echo 'Unknown error' >&2; exit 255": "failed with 255: Unknown error",
    "exit 6": "failed with 6: nothing",
    "true": "lists no GPU",
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
        gpus.gpus()
    assert FAILING[body] in caught.value.fact


def test_a_matrix_that_is_missing_is_told() -> None:
    with pytest.raises(UserError, match="no matrix"):
        gpus.parse_topology("Legend:\n\n  X    = Self\n")
