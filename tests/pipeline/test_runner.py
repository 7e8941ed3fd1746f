"""pipeline.runner, pipeline.background_fetch and scripts.stage: dry runs, a download beside a stage, and ends before
the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from streamed import CALIBRATE, FETCH, TABLE

from scripts import stage
from v4forge.checkpoint import incoming
from v4forge.errors import UserError
from v4forge.files import changed_json, exclusive, read_json
from v4forge.pipeline import events, run_state
from v4forge.pipeline.background_fetch import Fetch
from v4forge.pipeline.runner import LAUNCHER, Runner, StageFailed
from v4forge.pipeline.stages import Stage

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with the programs above, in which processes of ours run `scripts.stage` with this table. An estimate
    for Flash imports torch, which takes longer than the runs: only a project with a file `estimated` has one."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "v4forge").symlink_to(ROOT / "v4forge")
    (tmp_path / "scripts/fake_fetch.py").write_text(FETCH)
    (tmp_path / "scripts/fake_calibrate.py").write_text(CALIBRATE)
    (tmp_path / "scripts/cli.py").symlink_to(ROOT / "scripts/cli.py")
    (tmp_path / "scripts/stage.py").write_text(
        f"import sys; sys.path.append({str(ROOT / 'tests/support')!r})\n"
        "from importlib.util import module_from_spec, spec_from_file_location as spec_of\n"
        f"spec = spec_of('real', {str(ROOT / 'scripts/stage.py')!r}); real = module_from_spec(spec)\n"
        "spec.loader.exec_module(real)\n"
        "from pathlib import Path\n"
        "from streamed import TABLE\n"
        "from v4forge.pipeline import estimate\n"
        "if not Path('estimated').exists():\n"
        "    estimate.of_run = lambda names, *_: [estimate.StageTime(each, None, 'not asked') for each in names]\n"
        "real.run_main(lambda: real.main(table=TABLE, root=Path.cwd()))\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "scripts.stage", *words, "--profile", "flash", "--runtime", "host"]


def started(*words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "MAKEFLAGS": " -- PROFILE=flash", "MAKELEVEL": "1"}
    return subprocess.Popen(
        command("run", *words),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,  # a terminal's foreground group, which Ctrl-C reaches
    )


def wait_until(true: Callable[[], bool], what: str = "", limit_s: float = 100) -> None:
    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def wait_for(path: Path) -> None:
    wait_until(path.exists, f"{path} does not appear")


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = process.communicate(timeout=120)
    return process.returncode, said


def stages_of(project: Path) -> list[tuple[str, str]]:
    found = events.read(events.file_of(project / "scratch/flash"))
    return [
        (each["event"], each["stage"]) for each in found if each["event"] in ("start", "end", "failed", "interrupted")
    ]


def test_a_stage_that_streams_begins_while_fetch_still_downloads(project: Path) -> None:
    (project / "estimated").write_text("")
    run = started("fetch", "calibrate", "--title", "artifact")
    wait_for(project / "began")
    assert not (project / "scratch/flash/upstream/shard.safetensors").exists()
    (project / "go").write_text("")
    code, said = ended(run)
    assert code == 0, said
    assert said.index("fetch: downloading; its log is scratch/flash/logs/fetch.log") < said.index("calibrate: ")
    assert "calibrate: done in" in said
    assert stages_of(project) == [
        ("start", "fetch"),
        ("start", "calibrate"),
        ("end", "fetch"),
        ("end", "calibrate"),
    ] or (stages_of(project)[-2:] == [("end", "calibrate"), ("end", "fetch")])
    assert set(read_json(project / "scratch/flash/reports/run.json")) == {"fetch", "calibrate"}
    again = subprocess.run(
        command("run", "fetch", "calibrate", "--title", "artifact"), capture_output=True, text=True, check=True
    )
    assert again.stdout == "artifact: nothing to do, everything is up to date\n"
    (project / "scratch/flash/upstream/shard.safetensors").write_text("other bytes")
    why = subprocess.run(command("why", "calibrate"), capture_output=True, text=True, check=True).stdout
    assert "input source/shard.safetensors changed" in why, "the stamp holds what arrived after the stage had begun"


def test_a_download_that_fails_ends_the_stage_beside_it_and_its_own_error_is_shown(project: Path) -> None:
    run = started("fetch", "calibrate")
    wait_for(project / "began")
    (project / "go").write_text("the hub is gone")
    code, said = ended(run)
    assert code == 1
    assert "shard.safetensors is missing" in said
    assert "error: the hub is gone" in said
    assert not (project / "scratch/flash/.stamps/calibrate.json").exists()


def test_ctrl_c_ends_the_download_too_and_says_how_to_go_on(project: Path) -> None:
    run = started("fetch", "calibrate", "--title", "artifact")
    wait_for(project / "began")
    os.killpg(run.pid, signal.SIGINT)
    code, said = ended(run)
    assert code == 130
    assert said.rstrip().endswith("stopped; what is finished is kept. To go on: make artifact PROFILE=flash")
    assert "Traceback" not in said
    assert not incoming.live(project / "scratch/flash/upstream")
    assert ("interrupted", "calibrate") in stages_of(project)


def test_a_stage_that_needs_all_of_the_source_refuses_one_that_is_arriving(project: Path) -> None:
    with incoming.marked(project / "scratch/flash/upstream"):
        done = subprocess.run(command("run", "verify"), capture_output=True, text=True)
    assert done.returncode == 1
    assert "is still being downloaded" in done.stderr
    assert "make status PROFILE=flash" in done.stderr


def test_calibrate_of_a_second_terminal_begins_on_what_the_first_downloads(project: Path) -> None:
    fetch = started("fetch")
    wait_for(project / "scratch/flash/upstream/config.json")
    calibrate = started("calibrate")
    wait_for(project / "began")
    (project / "go").write_text("")
    assert ended(fetch)[0] == 0
    code, said = ended(calibrate)
    assert code == 0, said


def test_a_dry_run_says_what_would_run_with_why_and_how_and_writes_nothing(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["run", "fetch", "calibrate", "verify", "--profile", "flash", "--runtime", "host", "--dry-run"]
    assert stage.main(argv, TABLE, project) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "fetch: would run (it has not run yet)"
    assert lines[1] == "    python -m scripts.fake_fetch --out scratch/flash/upstream"
    assert lines[2] == "calibrate: would run (after fetch)"
    assert lines[4] == "verify: would run (after fetch)" or lines[4] == "verify: would run (after calibrate)"
    assert not (project / "scratch").exists()


def test_the_recipe_reaches_every_stage_that_has_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["run", "calibrate", "postprocess", "verify", "--dry-run", "--scratch", str(tmp_path)]
    for given, told in ((["--recipe", "mixed"], "mixed"), ([], "int4")):
        assert stage.main([*argv, *given]) == 0
        commands = [line for line in capsys.readouterr().out.splitlines() if " -m scripts." in line]
        found = {name: line for line in commands for name in ("calibrate", "postprocess", "verify") if name in line}
        assert all(f"--recipe {told}" in found[name] for name in ("calibrate", "verify")), commands


def test_a_dry_run_names_what_is_missing_and_who_makes_it(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["run", "calibrate", "--profile", "flash", "--runtime", "host", "--dry-run"]
    assert stage.main(argv, TABLE, project) == 0
    assert "calibrate: would run (it needs scratch/flash/upstream: make fetch PROFILE=flash)" in capsys.readouterr().out


def test_processes_that_change_one_json_file_lose_nothing_of_each_other(tmp_path: Path) -> None:
    path = tmp_path / "run.json"

    def change(name: str) -> None:
        for _ in range(20):
            with changed_json(path) as content:
                content[name] = content.get(name, 0) + 1

    threads = [threading.Thread(target=change, args=(name,)) for name in ("a", "b", "c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert json.loads(path.read_text()) == {"a": 20, "b": 20, "c": 20}


def test_a_run_in_a_folder_that_is_written_to_names_status(project: Path) -> None:
    with (
        exclusive(project / "scratch/flash/.stamps/lock", lambda: UserError("", "")),
        pytest.raises(UserError, match="make status PROFILE=flash"),
    ):
        stage.main(["run", "verify", "--profile", "flash", "--runtime", "host"], TABLE, project)


def ended_by(signal_name: str, name: str, project: Path, monkeypatch: pytest.MonkeyPatch) -> StageFailed:
    """How a stage ends whose program gets this signal."""
    work = project / "scratch/flash"
    run = Runner(
        {"profile": "flash", "work": str(work), "runtime": "host", "source": f"{work}/upstream"}, TABLE, project
    )
    monkeypatch.setattr(Runner, "command", lambda *_: ["sh", "-c", f"kill -{signal_name} $$"])
    monkeypatch.setattr(Runner, "launched", lambda *_: False)
    with events.told(work), pytest.raises(StageFailed) as failed:
        run._execute(name, None, 0)
    return failed.value


def test_a_download_that_ends_early_is_told_to_have_been_stopped_and_not_to_have_failed(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended_by("TERM", "fetch", project, monkeypatch)
    assert stages_of(project)[-1] == ("interrupted", "fetch")
    assert capsys.readouterr().err == ""


def test_a_program_that_was_killed_is_spoken_for(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended_by("KILL", "calibrate", project, monkeypatch).code == 128 + signal.SIGKILL
    assert capsys.readouterr().err.startswith("error: calibrate was ended by SIGKILL\nhint: sudo dmesg")
    last = events.read(events.file_of(project / "scratch/flash"))[-1]
    assert last["fact"] == "calibrate was ended by SIGKILL"


def test_a_fetch_of_another_terminal_that_has_yet_to_begin_is_waited_for(tmp_path: Path) -> None:
    lock = tmp_path / "fetch.lock"
    with exclusive(lock, lambda: UserError("", "")):
        fetch = Fetch.begin(tmp_path / "upstream", lock, tmp_path / "fetch.log", [])
        assert fetch.process is None and fetch.running()
    assert not fetch.running() and fetch.wait() == 0


def test_a_failed_download_that_has_yet_to_exit_says_why_and_a_stopped_one_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "fetch.log"
    log.write_text("error: the hub is gone\n")
    for code, said in ((1, "error: the hub is gone\n"), (130, "")):
        process = subprocess.Popen(["sh", "-c", f"sleep 0.3; exit {code}"])
        Fetch(tmp_path / "upstream", tmp_path / "lock", log, process).stop()
        assert process.returncode == code
        assert capsys.readouterr().err == said


def test_sigterm_ends_the_download_too_and_is_told(project: Path) -> None:
    run = started("fetch", "calibrate", "--title", "artifact")
    wait_for(project / "began")
    run.send_signal(signal.SIGTERM)  # of the runner alone
    code, _ = ended(run)
    assert code == 143
    assert not incoming.live(project / "scratch/flash/upstream")
    assert (
        events.read(events.file_of(project / "scratch/flash"))[-1].items() >= {"event": "run-end", "code": 143}.items()
    )


def test_a_killed_runner_takes_its_stage_and_its_download_along_and_status_says_so(project: Path) -> None:
    work = project / "scratch/flash"
    run = started("fetch", "calibrate", "--title", "artifact")
    wait_for(project / "began")
    run.kill()
    code, said = ended(run)  # once nobody holds its output any more
    assert code == -signal.SIGKILL, said
    assert not run_state.lives(work, ["calibrate"])
    wait_until(lambda: not (incoming.live(work / "upstream") or run_state.lives(work, ["fetch"])))
    told = subprocess.run(
        [sys.executable, "-m", "scripts.status", "--work", str(work)], cwd=ROOT, capture_output=True, text=True
    ).stdout
    assert f"artifact: its process {run.pid} is gone without a word" in told
    assert "what is finished is kept; it goes on with: make artifact PROFILE=flash" in told
    assert "running" not in told


def test_ranks_that_are_stopped_end_without_a_traceback_of_their_launcher(project: Path) -> None:
    (project / "rank.py").write_text("import pathlib, time\npathlib.Path('began').write_text('')\ntime.sleep(60)\n")
    words = [sys.executable, "-m", LAUNCHER[0], *LAUNCHER[1:], "2", "rank.py"]
    run = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    wait_for(project / "began")
    os.killpg(run.pid, signal.SIGINT)
    code, said = ended(run)
    assert code == 128 + signal.SIGINT
    assert "SignalException" not in said


def test_a_rank_that_is_killed_gives_the_signals_code(project: Path) -> None:
    (project / "rank.py").write_text("import os\nos.kill(os.getpid(), 9)\n")
    words = [sys.executable, "-m", LAUNCHER[0], *LAUNCHER[1:], "1", "rank.py"]
    assert subprocess.run(words, capture_output=True).returncode == 128 + signal.SIGKILL


def test_a_rank_that_fails_gives_its_code_without_a_table_of_the_launcher(project: Path) -> None:
    (project / "rank.py").write_text("import sys\nprint('error: the fact')\nsys.exit(7)\n")
    words = [sys.executable, "-m", LAUNCHER[0], *LAUNCHER[1:], "1", "rank.py"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 7
    assert "error: the fact" in done.stdout
    assert "Traceback" not in done.stderr


CHECKS = """
import sys
from pathlib import Path
out = Path(sys.argv[-1])
out.parent.mkdir(parents=True, exist_ok=True)
out.write_text("deep" if "--deep" in sys.argv else "shallow")
"""


def test_a_stage_need_not_run_where_one_that_does_all_of_it_is_up_to_date(
    project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (project / "scripts/fake_checks.py").write_text(CHECKS)
    (project / "source").mkdir()
    written = project / "scratch/tiny/artifact/certificate.json"

    def checking(*words: str, does_all_of: str = "") -> Stage:
        return Stage(
            program="scripts.fake_checks",
            does="checking",
            arguments=(*words, "{work}/artifact/certificate.json"),
            inputs=("source",),
            outputs=("artifact/certificate.json",),
            does_all_of=does_all_of,
        )

    table = {"verify": checking(), "verify-deep": checking("--deep", does_all_of="verify")}

    def run(name: str, action: str = "run") -> str:
        assert stage.main([action, name, "--source", str(project / "source")], table, project) == 0
        return capfd.readouterr().out.splitlines()[-1] + f" [{written.read_text()}]"

    (project / "source/a").write_text("one")
    assert run("verify").startswith("verify: done") and written.read_text() == "shallow"
    assert run("verify-deep").startswith("verify-deep: done") and written.read_text() == "deep"
    assert run("verify", "why") == "verify is up to date [deep]"
    assert stage.main(["run", "verify", "--source", str(project / "source")], table, project) == 0
    assert written.read_text() == "deep", "what was found over tokens is not thrown away"
    (project / "source/a").write_text("two")
    assert run("verify").startswith("verify: done") and written.read_text() == "shallow"
    assert run("verify-deep").startswith("verify-deep: done") and written.read_text() == "deep"
