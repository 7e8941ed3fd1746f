"""v4forge.pipeline.stamps and scripts.stage, with programs that take milliseconds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from scripts import stage
from v4forge import pins
from v4forge.digests import Digests
from v4forge.errors import UserError
from v4forge.pipeline import stamps
from v4forge.pipeline.runner import Runner
from v4forge.pipeline.stages import FILES, STAGES, Stage
from v4forge.pipeline.stamps import Files

# Copies the source and appends the sample count, so that its output depends on an input, a setting and its code.
PROGRAM = """
import argparse
from pathlib import Path
from v4forge.helper import SUFFIX
parser = argparse.ArgumentParser()
parser.add_argument("--source", type=Path)
parser.add_argument("--work", type=Path)
parser.add_argument("--samples")
args = parser.parse_args()
args.work.mkdir(parents=True, exist_ok=True)
text = (args.source / "config.json").read_text()
assert "broken" not in text
(args.work / "layer-00.safetensors").write_text(text + args.samples + SUFFIX)
with open("runs.txt", "a") as file:
    file.write("run ")
"""

TABLE = {
    "calibrate": Stage(
        program="scripts.fake",
        does="copying {samples} times",
        arguments=("--source", "{source}", "--work", "{work}/layers", "--samples", "{samples}"),
        inputs=("source",),
        outputs=("layers",),
        settings=("samples",),
        pins=("TORCH_VERSION",),
    ),
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with one stage program, a module that it imports and one that it does not, and a source."""
    for name, text in {
        "scripts/fake.py": PROGRAM,
        "v4forge/__init__.py": "",
        "v4forge/helper.py": "from v4forge import deeper\nSUFFIX = deeper.END\n",
        "v4forge/deeper.py": "END = '!'\n",
        "v4forge/unrelated.py": "",
        "source/config.json": "{}",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(project: Path, action: str, *options: str) -> int:
    argv = [action, "calibrate", "--source", "source", *options]
    return stage.main(argv, table=TABLE, root=project)


def runs(project: Path) -> int:
    path = project / "runs.txt"
    return len(path.read_text().split()) if path.exists() else 0


def why(project: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    capsys.readouterr()
    call(project, "why", *options)
    return capsys.readouterr().out.strip()


def test_a_stage_runs_once_and_then_is_up_to_date(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert why(project, capsys) == "calibrate would run: it has not run yet"
    call(project, "run")
    assert "calibrate: copying 64 times\ncalibrate: done in " in capsys.readouterr().out
    call(project, "run")
    assert capsys.readouterr().out == "calibrate: up to date\n"
    assert runs(project) == 1
    assert why(project, capsys) == "calibrate is up to date"


def test_a_whole_that_has_nothing_to_do_says_so_in_one_line(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(project, "run", "--title", "demo")
    capsys.readouterr()
    call(project, "run", "--title", "demo")
    assert capsys.readouterr().out == "demo: nothing to do, everything is up to date\n"


def test_why_names_the_setting_that_changed(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(project, "run")
    assert why(project, capsys, "--samples", "8") == "calibrate would run: setting samples was 64, is 8"
    assert why(project, capsys, "--seq-len", "8") == "calibrate is up to date", "calibrate does not depend on it"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("source/config.json", "input source/config.json changed"),
        ("scripts/fake.py", "code scripts/fake.py changed"),
        ("v4forge/deeper.py", "code v4forge/deeper.py changed"),
        ("scratch/tiny/layers/layer-00.safetensors", "output layers/layer-00.safetensors changed"),
    ],
)
def test_why_names_the_file_that_changed(
    project: Path, capsys: pytest.CaptureFixture[str], path: str, reason: str
) -> None:
    call(project, "run")
    with (project / path).open("a") as file:
        file.write("\n")
    assert why(project, capsys) == f"calibrate would run: {reason}"
    call(project, "run")
    assert runs(project) == 2
    assert why(project, capsys) == "calibrate is up to date"


def test_why_names_a_pin_that_changed(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pins, "read", lambda: {"TORCH_VERSION": "1"})
    call(project, "run")
    monkeypatch.setattr(pins, "read", lambda: {"TORCH_VERSION": "2"})
    assert why(project, capsys) == "calibrate would run: pin TORCH_VERSION was 1, is 2"


def test_a_missing_output_is_made_again(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(project, "run")
    (project / "scratch/tiny/layers/layer-00.safetensors").unlink()
    assert why(project, capsys) == "calibrate would run: output layers/layer-00.safetensors missing"


def test_times_and_unrelated_code_are_no_reason_to_run(project: Path) -> None:
    call(project, "run")
    (project / "v4forge/unrelated.py").write_text("x = 1\n")
    os.utime(project / "source/config.json", ns=(1, 1))
    os.utime(project / "scripts/fake.py", ns=(1, 1))
    call(project, "run")
    assert runs(project) == 1


def test_files_that_a_later_stage_adds_are_no_reason_to_run(project: Path) -> None:
    call(project, "run")
    (project / "scratch/tiny/layers/card.md").write_text("later")
    call(project, "run")
    assert runs(project) == 1


def test_going_back_to_the_settings_of_the_outputs_needs_no_run(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(project, "run")
    assert "was 64, is 8" in why(project, capsys, "--samples", "8")
    call(project, "run")
    assert runs(project) == 1


def test_a_stage_that_fails_leaves_no_stamp_and_ends_with_its_code(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "source/config.json").write_text("broken")
    assert call(project, "run") == 1
    assert why(project, capsys) == "calibrate would run: it has not run yet"


def test_a_missing_source_is_an_error_with_a_hint(project: Path) -> None:
    shutil.rmtree(project / "source")
    with pytest.raises(UserError, match="calibrate needs source"):
        call(project, "run")


def test_run_json_holds_seconds_and_command_of_the_last_run(project: Path) -> None:
    call(project, "run")
    call(project, "run", "--samples", "8")
    entry = json.loads((project / "scratch/tiny/reports/run.json").read_text())["calibrate"]
    assert entry["elapsed_s"] > 0
    assert entry["command"].endswith("-m scripts.fake --source source --work scratch/tiny/layers --samples 8")


def test_threads_may_learn_and_ask_at_once(tmp_path: Path) -> None:
    digests = Digests(tmp_path / "digests.json")
    paths = [tmp_path / f"file {number}" for number in range(400)]
    for path in paths:
        path.write_text(path.name)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(digests.of, [path]) for path in paths[:200]]
            learnt = [pool.submit(digests.learn, path, "learnt") for path in paths[200:]]
            saved = [pool.submit(digests.save) for _ in range(20)]
            for job in (*asked, *learnt, *saved):
                job.result()
    finally:
        sys.setswitchinterval(before)
    digests.save()
    known = Digests(tmp_path / "digests.json")
    assert all(known.known(path) is not None for path in paths)


def test_a_checkout_whose_revision_git_does_not_tell_is_named(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / ".git").write_text("of something else\n")
    call(project, "run")
    assert "the revision of this checkout is not known, and not noted: fatal:" in capsys.readouterr().out


def test_a_second_run_in_the_same_folder_is_refused_while_a_stage_lives(project: Path) -> None:
    (project / "scripts/fake.py").write_text("import time\nprint('alive', flush=True)\ntime.sleep(60)\n")
    code = (
        f"import sys; sys.path[:0] = [{str(stage.ROOT)!r}, {str(stage.ROOT / 'tests/support')!r}]\n"
        "from pathlib import Path; from scripts import stage; from tests.pipeline.test_stamps import TABLE\n"
        f"sys.exit(stage.main(['run', 'calibrate', '--source', 'source'], table=TABLE, root=Path({str(project)!r})))"
    )
    runner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert runner.stdout is not None
        assert "alive" in [runner.stdout.readline().strip() for _ in range(2)]
        with pytest.raises(UserError, match="another run is writing to scratch/tiny"):
            call(project, "run")
        runner.terminate()
        assert runner.wait(10) == 128 + 15, "the signal reaches the stage and the runner ends with its code"
    finally:
        runner.kill()


def test_digests_are_read_from_the_cache_while_size_time_and_inode_agree(tmp_path: Path) -> None:
    big, link, cache = tmp_path / "big", tmp_path / "link", tmp_path / "digests.json"
    big.write_bytes(b"1" * 1000)
    status = big.stat()
    digests = Digests(cache)
    first = digests.of([big])[big]
    digests.save()

    with big.open("r+b") as file:
        file.write(b"2")
    os.utime(big, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert Digests(cache).of([big])[big] == first, "same size, time and inode: not read again"
    link.hardlink_to(big)
    assert Digests(cache).of([link])[link] == first, "a hard link is the same file"
    os.utime(big, ns=(0, time.time_ns()))
    assert Digests(cache).of([big])[big] != first


def test_code_closure_follows_every_form_of_import(tmp_path: Path) -> None:
    for name, text in {
        "scripts/go.py": "import os\nimport v4forge.a\ndef f():\n    from v4forge import b\n",
        "v4forge/__init__.py": "",
        "v4forge/a.py": "from . import c\n",
        "v4forge/b.py": "from v4forge.pack import part\n",
        "v4forge/c.py": "from .d import thing\n",
        "v4forge/d.py": "import v4forge.a\n",
        "v4forge/pack/__init__.py": "from .inner import x\n",
        "v4forge/pack/inner.py": "",
        "v4forge/pack/part.py": "from ..e import y\n",
        "v4forge/e.py": "",
        "v4forge/unused.py": "",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = {path.relative_to(tmp_path).as_posix() for path in stamps.code_closure("scripts.go", tmp_path)}
    names = ("__init__", "a", "b", "c", "d", "e", "pack/__init__", "pack/inner", "pack/part")
    assert found == {"scripts/go.py", *(f"v4forge/{name}.py" for name in names)}


def test_hidden_partial_and_excluded_files_do_not_count(tmp_path: Path) -> None:
    for name in ("a", "b.tmp", ".hidden", ".cache/x", "deep/c", "certificate.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert list(Files("out", tmp_path, ("certificate.json",)).members()) == ["out/a", "out/deep/c"]


def test_every_stage_names_known_files_settings_and_pins() -> None:
    known = stage.settings_of(stage.parse(["run", "fetch"], list(STAGES)))
    for name, spec in STAGES.items():
        assert {*spec.inputs, *spec.outputs} <= FILES.keys(), name
        assert set(spec.settings) <= known.keys(), name
        assert set(spec.pins) <= pins.read().keys(), name
        assert set(spec.after) <= STAGES.keys(), name
        assert Runner(known, STAGES, stage.ROOT).command(name)[1:3] == ["-m", spec.program]
