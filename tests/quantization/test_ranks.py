"""One run of several processes: the bytes of a run of one, collectives and dispatch, and what a rank's death does."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from ports import free_port
from programs import (
    ROOT,
    ForkServer,
    Place,
    calibrate_arguments,
    contents,
    temporaries,
    write_corpus,
    write_source,
)
from synthetic import TINY, Tensors, edit
from torch import Tensor

from v4forge.errors import UserError
from v4forge.model import distributed, rendezvous
from v4forge.model.distributed import Ranks
from v4forge.model.expert_dispatch import Dispatch

CPU = torch.device("cpu")
ENDS_WITHIN_S = 60
ANOTHER = "error: another rank of this run has ended\nhint: "
MODES = {
    "routed": [],
    "all experts": ["--calibrate-all-experts"],
    "round to nearest": ["--method", "rtn"],
}


@dataclass(frozen=True)
class Shop:
    """Two sources, and the fork server. `source`: layer 0's table never routes to expert 3, layer 1's router never to
    expert 0, and four ranks cannot share its six experts evenly. models/tiny: the embedded model."""

    base: Path
    server: ForkServer

    @property
    def source(self) -> Path:
        return self.base / "source"

    @property
    def log(self) -> Path:
        return self.base / "log.txt"

    def arguments(self, work: Path, *more: str) -> list[str]:
        """20 samples in micro-batches of 8 are three: of four ranks, rank 0 gets none."""
        made = calibrate_arguments(self.source, work, self.base / "corpus.txt", samples=20)
        return [*made, "--micro-batch-tokens", "512", "--keep-every", "1", *more]

    def tiny_arguments(self, work: Path) -> list[str]:
        made = calibrate_arguments(TINY, work, TINY / "calibration.jsonl", samples=20)
        return [*made, "--micro-batch-tokens", "512", "--keep-every", "2"]

    def logs(self, size: int) -> list[str]:
        return [self.log.with_name(f"{self.log.name}.{rank}").read_text() for rank in range(size)]

    def run(self, arguments: list[str], size: int = 0) -> None:
        """A run that has to succeed: without torchrun's variables, or of `size` ranks."""
        if size:
            assert self.server.run_ranks(size, "calibrate", arguments, self.log) == [0] * size, self.logs(size)
        else:
            assert self.server.run("calibrate", arguments, self.log) == 0, self.log.read_text()

    def calm(self, mode: str) -> dict[str, bytes]:
        """What one process makes."""
        work = self.base / mode
        if not work.exists():
            self.run(self.arguments(work, *MODES[mode]))
        return contents(work)

    def calm_tiny(self) -> dict[str, bytes]:
        work = self.base / "tiny"
        if not work.exists():
            self.run(self.tiny_arguments(work))
        return contents(work)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> Shop:
    base = tmp_path_factory.mktemp("ranks")
    write_source(base / "source", compress_ratios=[0, 4, 128, 4, 0], n_routed_experts=6)

    def change(tensors: Tensors) -> None:
        if (table := tensors.get("layers.0.ffn.gate.tid2eid")) is not None:
            table[:] = torch.tensor([0, 1])
            table[::2] = torch.tensor([4, 5])
            table[::3] = torch.tensor([2, 0])
        if (bias := tensors.get("layers.1.ffn.gate.bias")) is not None:
            bias[0] = -100

    edit(base / "source", change)
    write_corpus(base / "corpus.txt")
    return Shop(base, fork_server)


def assert_same(found: dict[str, bytes], wanted: dict[str, bytes]) -> None:
    assert sorted(found) == sorted(wanted)
    assert [name for name in wanted if found[name] != wanted[name]] == []


@pytest.mark.parametrize(
    ("mode", "size"),
    [*(("routed", size) for size in (1, 2, 3, 4)), ("all experts", 2), ("all experts", 4), ("round to nearest", 3)],
)
def test_the_number_of_ranks_changes_no_byte(shop: Shop, tmp_path: Path, size: int, mode: str) -> None:
    work = tmp_path / "layers"
    shop.run(shop.arguments(work, *MODES[mode]), size)
    assert_same(contents(work), shop.calm(mode))


def test_experts_that_no_rank_reaches_are_calibrated_on_the_tokens_of_the_others(shop: Shop) -> None:
    files = shop.calm("routed")
    for layer, expert in ((0, 3), (1, 0)):
        report = json.loads(files[f"layer-{layer:03}.json"])
        assert report["tokens"][expert] == 0
        assert {"expert": expert, "tokens": 0, "inputs": "w1, w3, w2"} in report["blended"]
        assert 0 < report["error"]["w1"]["gptq"][expert] < 0.01


def torchrun(size: int, arguments: list[str], threads: int, output: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    launcher = ("torch.distributed.run", "--nproc-per-node", str(size), "--master-port", str(free_port()))
    command = [sys.executable, "-m", *launcher, "-m", "scripts.calibrate", *arguments]
    with open(output, "wb") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)


def test_a_run_killed_on_2_ranks_ends_on_1_and_on_4_with_the_same_bytes(shop: Shop, tmp_path: Path) -> None:
    work = tmp_path / "layers"
    until = (work / "layer-000.safetensors").exists
    statuses = shop.server.run_ranks(2, "calibrate", shop.arguments(work), shop.log, until=until)
    assert statuses == [-signal.SIGKILL] * 2
    assert not (work / "layer-003.safetensors").exists()
    assert (work / "streams").is_dir()
    shutil.copytree(work, tmp_path / "copy")
    for folder, size in ((work, 0), (tmp_path / "copy", 4)):
        shop.run(shop.arguments(folder), size)
        assert_same(contents(folder), shop.calm("routed"))


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_when_a_rank_is_killed_the_others_say_so_and_end(shop: Shop, tmp_path: Path, victim: int) -> None:
    work = tmp_path / "layers"
    killed_at = []

    def until() -> bool:
        if (work / "layer-000.safetensors").exists():
            killed_at.append(time.monotonic())
        return bool(killed_at)

    statuses = shop.server.run_ranks(3, "calibrate", shop.arguments(work), shop.log, until=until, victims=[victim])
    assert time.monotonic() - killed_at[0] < ENDS_WITHIN_S
    assert statuses == [-signal.SIGKILL if rank == victim else 1 for rank in range(3)], shop.logs(3)
    for rank, said in enumerate(shop.logs(3)):
        if rank != victim:
            assert ANOTHER in said and "Traceback" not in said, said
    assert not (work / "layer-003.safetensors").exists()


def workers(launcher: int) -> dict[int, int]:
    """rank -> process id of a torchrun's programs."""
    found = {}
    for process in Path("/proc").iterdir():
        try:
            stat, environment = (process / "stat").read_text(), (process / "environ").read_bytes()
        except OSError:  # it is no process, or it has ended
            continue
        if int(stat.rpartition(")")[2].split()[1]) == launcher:
            variables = dict(entry.partition(b"=")[::2] for entry in environment.split(b"\0"))
            if b"RANK" in variables:
                found[int(variables[b"RANK"])] = int(process.name)
    return found


def test_torchrun_ends_when_a_rank_is_killed_and_the_next_one_gives_the_same_bytes(shop: Shop, tmp_path: Path) -> None:
    """Two ranks with four threads in the environment, then with one: which changes nothing either."""
    work, output = tmp_path / "layers", tmp_path / "output.txt"
    launched = torchrun(2, shop.tiny_arguments(work), 4, output)
    try:
        while not (work / "layer-000.safetensors").exists():
            assert launched.poll() is None, output.read_text()
            time.sleep(0.01)
        pids = workers(launched.pid)
        assert sorted(pids) == [0, 1]
        killed_at = time.monotonic()
        os.kill(pids[1], signal.SIGKILL)
        assert launched.wait(ENDS_WITHIN_S) != 0
        assert time.monotonic() - killed_at < ENDS_WITHIN_S
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values())
    finally:
        launched.kill()
    assert not (work / "layer-003.safetensors").exists()
    assert torchrun(2, shop.tiny_arguments(work), 1, output).wait(240) == 0, output.read_text()
    assert_same(contents(work), shop.calm_tiny())
    said = output.read_text()
    assert re.findall(r"4 layers, [123] finished; .*; 2 ranks, cpu", said)
    assert said.count("layer 3: ") == 1


# A program that starts one of ours as torchrun does, and waits for it.
LAUNCHER = """
import os, subprocess, sys
program = "import os, time, v4forge; print(os.getpid(), flush=True); time.sleep(600)"
subprocess.run([sys.executable, "-c", program], env=os.environ | {"TORCHELASTIC_RUN_ID": "a run"})
"""


def test_a_rank_ends_with_the_torchrun_that_is_killed() -> None:
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    rank = int(launcher.stdout.readline())
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    end = time.monotonic() + ENDS_WITHIN_S
    while Path(f"/proc/{rank}").exists() and "\nState:\tZ" not in Path(f"/proc/{rank}/status").read_text():
        assert time.monotonic() < end
        time.sleep(0.01)
    launcher.stdout.close()


def test_a_fault_that_one_rank_finds_is_named_and_ends_all(shop: Shop, tmp_path: Path) -> None:
    source = Path(shutil.copytree(shop.source, tmp_path / "source"))
    name = "layers.1.ffn.experts.3.w2.scale"

    def poison(tensors: Tensors) -> None:
        if name in tensors:
            tensors[name].view(torch.uint8).view(-1)[-1] = 255

    edit(source, poison)
    arguments = shop.arguments(tmp_path / "layers")
    arguments[arguments.index("--source") + 1] = str(source)
    assert shop.server.run_ranks(2, "calibrate", arguments, shop.log) == [1, 1]
    first, second = shop.logs(2)
    assert "error: layers.1.ffn.experts.3.w2.weight: E8M0 scale byte 255 (NaN)" in second
    assert ANOTHER in first
    assert not (tmp_path / "layers" / "layer-001.safetensors").exists()
    assert not temporaries(tmp_path)


def test_a_refusal_of_rank_0_ends_all(shop: Shop, tmp_path: Path) -> None:
    work = tmp_path / "layers"
    shop.run(shop.arguments(work, *MODES["round to nearest"]))
    before = contents(work)
    assert shop.server.run_ranks(2, "calibrate", shop.arguments(work), shop.log) == [1, 1]
    first, second = shop.logs(2)
    assert f"error: {work} holds layers of another run: " in first
    assert ANOTHER in second
    assert contents(work) == before


@pytest.mark.parametrize("size", range(1, 9))
def test_the_shares_of_the_ranks_are_everything_in_order_and_even(size: int) -> None:
    for count in range(40):
        shares = [Ranks(rank, size).share(count) for rank in range(size)]
        assert [i for share in shares for i in share] == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        assert [Ranks(0, size).share(count, rank) for rank in range(size)] == shares


def test_one_rank_needs_no_process_group() -> None:
    alone, rows = Ranks(), torch.arange(6).view(3, 2)
    assert (alone.gather("x"), alone.told("y")) == (["x"], "y")
    assert torch.equal(alone.exchange([rows], [3])[0], rows)
    assert torch.equal(alone.everyones(rows, [3]), rows)
    assert torch.equal(alone.ordered_sum(iter(rows), rows[0]), rows.sum(0))
    alone.barrier()


# What follows runs in three processes, which the fork server starts.


def check_gather(_: str) -> None:
    with distributed.joined(CPU) as (place, device):
        assert (place.size, device) == (3, CPU)
        assert place.gather((place.rank, "x" * place.rank)) == [(0, ""), (1, "x"), (2, "xx")]
        assert place.told("told" if place.rank == 0 else None) == "told"
        assert place.told([None, 1] if place.rank == 0 else None) == [None, 1]


def check_told_after(_: str) -> None:
    """Rank 0 works for longer than any collective may take."""
    distributed.TIMEOUT, distributed.PULSE_S = timedelta(seconds=2), 0.2

    def work() -> str:
        time.sleep(5)
        return "done"

    with distributed.joined(CPU) as (place, _):
        assert place.told_after(work) == "done"
        assert place.gather(place.rank) == [0, 1, 2]


def check_barrier(folder: str) -> None:
    flag = Path(folder) / "flag"
    with distributed.joined(CPU) as (place, _):
        if place.rank == 1:
            time.sleep(0.3)
            flag.write_text("here")
        place.barrier()
        assert flag.exists()


def check_exchange(_: str) -> None:
    def sent(sender: int, receiver: int, dtype: torch.dtype) -> Tensor:
        """Another number of rows for every pair, none for some; no two values alike."""
        count = (2 * sender + receiver) % 4
        return (torch.arange(count * 5).view(count, 5) + 20 * sender + 60 * receiver).to(dtype)

    with distributed.joined(CPU) as (place, _):
        for dtype in (torch.bfloat16, torch.float32, torch.int64):
            rows = [sent(place.rank, receiver, dtype) for receiver in range(3)]
            wanted = [sent(sender, place.rank, dtype) for sender in range(3)]
            found = place.exchange(rows, [len(part) for part in wanted])
            for one, other in zip(found, wanted, strict=True):
                assert one.dtype == dtype and torch.equal(one, other)
        transposed = [torch.arange(6).view(2, 3).T for _ in range(3)]
        assert all(torch.equal(part, transposed[0]) for part in place.exchange(transposed, [3] * 3))
        none = [torch.empty(0, 5)] * 3
        assert [part.shape for part in place.exchange(none, [0] * 3)] == [(0, 5)] * 3
        own = torch.full((3 * place.rank, 2), place.rank)
        assert torch.equal(place.everyones(own, [0, 3, 6]), torch.tensor([1] * 3 + [2] * 6).unsqueeze(1).expand(-1, 2))


def check_ordered_sum(_: str) -> None:
    generator = torch.Generator().manual_seed(1)
    terms = torch.randn(9, 40, 7, generator=generator) * torch.logspace(-4, 4, 9).view(-1, 1, 1)
    terms = terms[torch.randperm(9, generator=generator)]
    wanted = torch.zeros(40, 7)
    for term in terms:
        wanted += term
    assert not torch.equal(terms.flip(0).sum(0), wanted)  # another order gives other bits
    with distributed.joined(CPU) as (place, _):
        for splits in ((4, 0, 5), (0, 8, 1), (9, 0, 0), (0, 0, 9), (3, 3, 3)):
            own = terms.split(splits)[place.rank]
            assert torch.equal(place.ordered_sum(iter(own), torch.empty(40, 7)), wanted)


def routed_plainly(x: Tensor, indices: Tensor, expert: int) -> Tensor:
    """The rows of x that choose an expert, in order."""
    return x[[token for token in range(len(x)) if expert in indices[token].tolist()]]


def output_of(expert: int, rows: Tensor) -> Tensor:
    return rows * (expert + 1) + torch.arange(len(rows)).unsqueeze(1).to(rows.dtype) / 8


def check_dispatch(_: str) -> None:
    cases = [  # tokens of each rank, experts, experts a step
        ((5, 9, 4), 7, 2),
        ((5, 0, 9), 5, 1),
        ((0, 0, 6), 4, 16),
        ((0, 3, 0), 2, 1),
        ((11, 8, 13), 3, 16),
    ]
    with distributed.joined(CPU) as (place, _):
        for seed, case in enumerate(cases):
            dispatch_like_one_process(place, *case, seed)


def dispatch_like_one_process(place: Ranks, tokens: tuple[int, ...], experts: int, batch: int, seed: int) -> None:
    width, top_k = 6, 2
    generator = torch.Generator().manual_seed(seed)
    everything = torch.randn(sum(tokens), width, generator=generator).bfloat16()
    chosen = torch.rand(sum(tokens), experts, generator=generator)
    chosen[:, experts // 2] -= 2 * (experts > 2)  # an expert that no token reaches
    indices = chosen.topk(top_k).indices
    wanted = torch.empty(sum(tokens), top_k, width, dtype=torch.bfloat16)
    for e in range(experts):
        wanted[indices == e] = output_of(e, routed_plainly(everything, indices, e))
    x, own_indices = (t.split(tokens)[place.rank] for t in (everything, indices))
    dispatch = Dispatch(place, x, own_indices, experts)
    assert dispatch.tokens == sum(tokens)
    assert dispatch.counts == torch.bincount(indices.flatten(), minlength=experts).tolist()
    assert torch.equal(dispatch.everything(), everything)
    for count in (1, 4, 7, 100):
        assert torch.equal(dispatch.sample(count), everything[:: max(1, sum(tokens) // count)])
    shares = [place.share(experts, rank) for rank in range(place.size)]
    for start in range(0, max(map(len, shares)), batch):
        step = [share[start : start + batch] for share in shares]
        own = step[place.rank]
        rows = dispatch.rows(step)
        assert len(rows) == len(own)
        for e, part in zip(own, rows, strict=True):
            assert torch.equal(part, routed_plainly(everything, indices, e))
        dispatch.give_back([output_of(e, part) for e, part in zip(own, rows, strict=True)])
    assert torch.equal(dispatch.routed, wanted.split(tokens)[place.rank].flatten(0, 1))


def test_one_process_dispatches_to_itself() -> None:
    dispatch_like_one_process(Ranks(), (13,), 5, 2, seed=9)


CHECKS = [check_gather, check_told_after, check_barrier, check_exchange, check_ordered_sum, check_dispatch]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_three_processes_agree_with_one(shop: Shop, tmp_path: Path, check: Sequence) -> None:
    statuses = shop.server.run_ranks(3, f"tests.quantization.test_ranks:{check.__name__}", [str(tmp_path)], shop.log)
    assert statuses == [0, 0, 0], "\n".join(shop.logs(3))


def test_what_a_pod_leaves_is_ignored_with_a_line(shop: Shop, tmp_path: Path) -> None:
    """Others than these: tests/ground/test_launched.py."""
    left = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "10.255.255.1", "MASTER_PORT": "29500"}
    command = [sys.executable, "-m", "scripts.calibrate", *shop.tiny_arguments(tmp_path / "work"), "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | left, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"WORLD_SIZE={left['WORLD_SIZE']}" in done.stderr and "ignored" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_machine_whose_name_does_not_resolve_is_met_at_its_own_address(shop: Shop, tmp_path: Path) -> None:
    arguments = [*shop.tiny_arguments(tmp_path / "work"), "--dry-run"]
    started = time.monotonic()
    statuses = shop.server.run_ranks(2, "calibrate", arguments, shop.log, address="no-such-host.invalid")
    assert statuses == [0, 0], shop.logs(2)
    assert time.monotonic() - started < ENDS_WITHIN_S
    assert "MASTER_ADDR=no-such-host.invalid does not resolve" in shop.logs(2)[0]


def wait_alone(folder: str) -> None:
    """One of two ranks, the other of which does not come."""
    rendezvous.JOIN_LIMIT_S, rendezvous.TOLD_S = 3.0, 1.0
    try:
        with distributed.joined(CPU):
            pass
    except UserError as error:
        Path(folder, f"said.{os.environ['RANK']}").write_text(str(error))


@pytest.mark.parametrize(("rank", "absent"), [(0, 1), (1, 0)])
def test_a_rank_that_waits_says_for_whom_and_gives_up(shop: Shop, tmp_path: Path, rank: int, absent: int) -> None:
    log = tmp_path / "log"
    place = Place(rank, 2, free_port())
    pid = shop.server.start(f"tests.quantization.test_ranks:{wait_alone.__name__}", [str(tmp_path)], log, place=place)
    assert shop.server.reap(pid) == 0, log.read_text()
    assert re.search(rf"rank {rank} waits for rank {absent} of 2 at 127\.0\.0\.1:\d+ \(\d+ s\)", log.read_text())
    assert f"rank {absent} of 2 did not come to 127.0.0.1:" in (tmp_path / f"said.{rank}").read_text()


def come_late(_folder: str) -> None:
    """The second of two ranks comes late to a collective."""
    rendezvous.PULSE_S, rendezvous.PATIENCE_S = 0.2, 0.5
    with distributed.joined(CPU) as (place, _):
        if place.rank:
            time.sleep(3)
        assert place.gather(place.rank) == [0, 1]


def test_a_rank_that_waits_in_a_run_says_for_whom(shop: Shop, tmp_path: Path) -> None:
    function = f"tests.quantization.test_ranks:{come_late.__name__}"
    assert shop.server.run_ranks(2, function, [str(tmp_path)], shop.log) == [0, 0], shop.logs(2)
    assert "rank 0 waits for rank 1 (" in shop.logs(2)[0] and "waits for" not in shop.logs(2)[1]
