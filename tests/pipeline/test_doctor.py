"""pipeline.doctor.checks and scripts.doctor: a table of checks, run side by side, none of which takes the others
with it."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path

import nvml_stand_in
import pytest
from doctored import Machine
from nvml_stand_in import Card, NvmlLibrary
from programs import run_here
from rich.console import Console

from scripts import doctor as program
from v4forge.errors import UserError
from v4forge.outcomes import FAILED, NOT_CHECKED, OK, WARNING, NotChecked, Outcome, ok, warning
from v4forge.pipeline import disk_speed
from v4forge.pipeline.disk_speed import Speed
from v4forge.pipeline.doctor import checks as doctor_checks
from v4forge.pipeline.doctor import host as doctor_host
from v4forge.pipeline.doctor.checks import GROUPS, Check
from v4forge.pipeline.doctor.host import Host

TOKEN = "hf_abcdefghijklmnop"


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Machine(tmp_path, gpus=0).host("tiny", {"HF_TOKEN": TOKEN, "HTTPS_PROXY": "http://me:hunter22@proxy:1"})


def raising(error: Exception) -> Check:
    def check(_host: Host) -> Outcome:
        raise error

    return Check("it", "system", check)


def test_the_table_has_each_name_once_and_known_groups() -> None:
    names = [check.name for check in doctor_checks.CHECKS]
    assert len(set(names)) == len(names)
    assert [*dict.fromkeys(check.group for check in doctor_checks.CHECKS)] == list(GROUPS)


def test_an_error_of_the_user_is_a_failed_row_with_its_command(host: Host) -> None:
    (row,) = doctor_checks.run(host, [raising(UserError("the fact", "the command"))])
    assert (row.status, row.fact, row.fix) == (FAILED, "the fact", "the command")


def test_a_check_that_breaks_is_a_failed_row_that_shows_its_traceback(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (row,) = doctor_checks.run(host, [raising(KeyError("x"))])
    assert row.status == FAILED and "the check itself broke: KeyError: 'x'" in row.fact
    kept = Path(row.fix.removeprefix("cat "))
    assert "KeyError: 'x'" in kept.read_text() and kept.parent == Path("scratch/logs")


def test_what_cannot_be_checked_is_a_warning_that_says_so(host: Host) -> None:
    (outcome,) = doctor_checks.run(host, [raising(NotChecked("no docker here", "apt-get install docker.io"))])
    assert (outcome.status, outcome.fact) == (NOT_CHECKED, "no docker here")
    row = doctor_checks.told(outcome)
    assert (row.status, row.fact, row.fix) == (WARNING, "not checked: no docker here", "apt-get install docker.io")


def test_a_check_that_hangs_fails_in_its_time_and_the_others_go_on(host: Host) -> None:
    never = threading.Event()
    hangs = Check("hangs", "system", lambda _: ok(str(never.wait(30))), limit_s=0.2)
    started = time.monotonic()
    late, other = doctor_checks.run(host, [hangs, Check("other", "system", lambda _: ok("well"))])
    never.set()
    assert time.monotonic() - started < 10
    assert late.status == FAILED and "no answer within" in late.fact and other.status == OK


def test_checks_run_side_by_side_and_those_alone_after_them(host: Host) -> None:
    meet = threading.Barrier(2, timeout=10)
    ended: list[str] = []

    def together(_host: Host) -> Outcome:
        meet.wait()
        ended.append("together")
        return ok("")

    alone = Check("alone", "disk", lambda _: ok(str(len(ended))), alone=True)
    rows = doctor_checks.run(host, [alone, Check("a", "disk", together), Check("b", "disk", together)])
    assert [row.name for row in rows] == ["alone", "a", "b"] and rows[0].fact == "2"


def test_progress_says_what_is_waited_for(host: Host) -> None:
    said: list[tuple[int, str]] = []
    doctor_checks.run(host, [Check("slow", "disk", lambda _: ok(""))], lambda done, doing: said.append((done, doing)))
    assert said[0] == (0, "slow") and said[-1] == (1, "")


def test_no_secret_is_told(host: Host) -> None:
    fact = f"the proxy at http://me:hunter22@proxy:1 refused {TOKEN}, hunter22"
    (row,) = doctor_checks.run(host, [Check("it", "network", lambda _: warning(fact, f"export HF_TOKEN={TOKEN}"))])
    assert row.fact == "the proxy at http://…@proxy:1 refused …, …" and row.fix == "export HF_TOKEN=…"


def test_what_several_checks_ask_is_asked_once(host: Host) -> None:
    asked: list[int] = []

    def fails() -> int:
        asked.append(1)
        raise UserError("no", "yes")

    for _ in range(2):
        with pytest.raises(UserError):
            host.once("it", fails)
    assert asked == [1]


def test_the_verdict_is_one_line(host: Host) -> None:
    rows = [
        Outcome("a", OK, ""),
        Outcome("b", WARNING, "w"),
        Outcome("c", NOT_CHECKED, "x"),
    ]
    assert doctor_checks.verdict(host, rows) == "doctor: PROFILE=tiny can run here; 1 warning, 1 not checked"
    rows.append(Outcome("d", FAILED, "", ""))
    assert "cannot run here yet; 1 check failed: d;" in doctor_checks.verdict(host, rows)


def test_the_table_groups_and_merges_and_only_what_is_not_ok_has_a_fix() -> None:
    rows = [
        Outcome("driver", WARNING, "none", "get one"),
        Outcome("CUDA", OK, "starts", ""),
        Outcome("ECC", WARNING, "none", "get one"),
        Outcome("scratch", OK, "is yours", ""),
    ]
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(program.shown(rows))
    text = console.export_text()
    assert "driver, ECC" in text and text.count("none") == 1
    assert [line.plain for line in program.fixes(rows)] == ["warning: driver, ECC", "    get one"]


def test_a_fix_of_several_checks_is_said_once_and_failures_come_first() -> None:
    rows = [
        Outcome("fetch", WARNING, "slow", "other disk"),
        Outcome("space a", FAILED, "1 GB missing", "larger disk"),
        Outcome("hub", FAILED, "away", "mirror"),
        Outcome("space b", FAILED, "2 GB missing", "larger disk"),
        Outcome("token", WARNING, "not checked", "mirror"),
    ]
    assert [line.plain.strip() for line in program.fixes(rows)] == [
        *(
            "failed: space a, space b",
            "larger disk",
            "failed: hub, and 1 more",
            "mirror",
            "warning: fetch",
            "other disk",
        ),
    ]


def test_what_waits_for_another_check_names_it_and_has_its_fix(host: Host) -> None:
    def waits(_host: Host) -> Outcome:
        raise NotChecked("no docker daemon answers here", "something else", "docker")

    checks = [Check("files", "containers", waits), Check("docker", "containers", lambda _: warning("gone", "start it"))]
    row = doctor_checks.told(doctor_checks.run(host, checks)[0])
    assert (row.fact, row.fix) == ("not checked: no docker daemon answers here, see docker", "start it")


def test_the_check_that_another_waits_for_is_in_the_table() -> None:
    names = {check.name for check in doctor_checks.CHECKS}
    sources = Path(doctor_checks.__file__).parent.glob("*.py")
    waited = {name for file in sources for name in re.findall(r'NotChecked\([^\n]*, "([\w ]+)"\)', file.read_text())}
    assert {"docker", "driver", "hub"} <= (waited & names)


def test_a_command_keeps_what_the_run_was_asked_for(tmp_path: Path) -> None:
    asked = Host(tmp_path / "my disk/flash", "flash", gpus_wanted=8, samples=96, environment={})
    kept = f"make artifact PROFILE=flash SCRATCH='{tmp_path}/my disk'"
    assert asked.make("artifact", "DEVICES=0,1", "GPUS=2") == f"{kept} SAMPLES=96 DEVICES=0,1 GPUS=2"
    assert asked.make("artifact", "SCRATCH=/x") == "make artifact PROFILE=flash GPUS=8 SAMPLES=96 SCRATCH=/x"
    chosen = Host(doctor_host.ROOT / "scratch/tiny", runtime="host", environment={"CUDA_VISIBLE_DEVICES": "2,3"})
    assert chosen.make("demo") == "make demo DEVICES=2,3"


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The whole program on a machine with neither GPU, docker nor network; the disk is not measured."""
    monkeypatch.setattr(disk_speed, "measure", lambda _folder: Speed(1e9, 1e9))
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nobody.sock")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    nvml_stand_in.put(monkeypatch, None)
    monkeypatch.setattr(doctor_host, "torch_cuda", lambda: None)
    return tmp_path / "scratch/tiny"


def test_tiny_runs_without_gpu_docker_and_network(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("doctor", "--work", bare, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert list(said) == ["checks"] and len(said["checks"]) == len(doctor_checks.CHECKS)
    for row in said["checks"]:
        assert list(row) == ["name", "status", "fact", "fix"] and row["status"] in (OK, WARNING)
        assert bool(row["fix"]) == (row["status"] != OK), row
    assert TOKEN not in json.dumps(said)


@pytest.mark.parametrize("profile", ["tiny", "flash"])
def test_a_fix_begins_with_a_command(bare: Path, profile: str, capsys: pytest.CaptureFixture[str]) -> None:
    run_here("doctor", "--work", bare.parent / profile, "--profile", profile, "--json")
    rows = json.loads(capsys.readouterr().out)["checks"]
    assert not [row for row in rows if "itself broke" in row["fact"]]
    fixes = [row["fix"] for row in rows if row["fix"]]
    assert fixes and {fix.split()[0] for fix in fixes} <= {
        "make",
        "sudo",
        "export",
        "unset",
        "nvidia-smi",
        "lspci",
        "free",
        "ps",
    }
    assert not any("; " in fix or ", or " in fix or "…" in fix for fix in fixes), fixes


def test_flash_without_a_gpu_fails_and_says_why(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("doctor", "--work", bare, "--profile", "flash") == 1
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("doctor: PROFILE=flash cannot run here yet") and "driver" in last and "docker" in last


def test_the_program_asks_the_library_for_gpus(
    bare: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nvml_stand_in.put(monkeypatch, NvmlLibrary([Card("GPU-0"), Card("GPU-1", ecc=False)]))
    run_here("doctor", "--work", bare, "--json")
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["checks"]}
    assert rows["GPUs"]["fact"] == "2 x NVIDIA H200, 140.4 GiB each" and rows["in use"]["fact"] == "2 GPUs idle"
    assert (rows["ECC"]["status"], rows["ECC"]["fix"]) == (WARNING, "sudo nvidia-smi -i 1 -e 1 && sudo reboot")
