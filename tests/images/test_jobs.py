"""What a program in a container may see, without a daemon: images.jobs, and the jobs that scripts.stage makes."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts import stage
from v4forge.errors import UserError
from v4forge.files import check_writable
from v4forge.images import containers, jobs
from v4forge.images.jobs import Job
from v4forge.pipeline.runner import Runner
from v4forge.pipeline.stages import STAGES

ROOT = Path(__file__).resolve().parents[2]


def job(work: Path, **more: object) -> Job:
    return Job("image", ["program", "--now"], work, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "folder",
    ["/", "/usr", "/usr/local/models", "/etc", "/proc/1", "/opt", "/opt/v4forge", "/opt/venv", "/home", "/dev", "/tmp"],
)
def test_a_folder_that_would_hide_a_part_of_the_image_is_refused(folder: str, tmp_path: Path) -> None:
    for made in (job(Path(folder)), job(tmp_path, reads=[Path(folder)])):
        with pytest.raises(UserError, match="it would hide") as raised:
            jobs.mounts(made)
        assert raised.value.fact.startswith(f"{folder} cannot be seen")


@pytest.mark.parametrize("folder", ["/opt/v4forge/scratch/tiny", "/dev/shm/tiny", "/tmp/tiny", "/users/a", "/tiny"])
def test_a_folder_beside_what_the_image_holds_is_mounted_at_its_own_path(folder: str) -> None:
    (mount,) = jobs.mounts(job(Path(folder)))
    assert (mount["Source"], mount["Target"], mount["ReadOnly"]) == (folder, folder, False)


def test_what_lies_below_another_read_folder_is_mounted_once(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    reads = [tmp_path / "source", tmp_path / "source/text.jsonl", tmp_path / "other.txt"]
    found = jobs.mounts(job(tmp_path / "work", reads=reads))
    targets = {mount["Target"]: mount["ReadOnly"] for mount in found}
    assert targets == {f"{tmp_path}/work": False, f"{tmp_path}/source": True, f"{tmp_path}/other.txt": True}


def test_a_download_may_run_beside_a_stage_of_the_same_folder_but_not_beside_another_download(tmp_path: Path) -> None:
    made = runner("cpu", "--scratch", str(tmp_path), profile="flash")
    labels = [jobs.options(made.job(name), frozenset())["labels"] for name in ("fetch", "calibrate", "verify")]
    fetch, calibrate, verify = (label[jobs.RUN_LABEL] for label in labels)
    assert calibrate == verify == f"{tmp_path}/flash"
    assert fetch == f"{tmp_path}/flash#fetch"


def test_a_folder_to_fetch_from_is_seen_and_spares_the_network(tmp_path: Path) -> None:
    job = runner("cpu", "--scratch", str(tmp_path), "--from", str(tmp_path / "copy"), profile="flash").job("fetch")
    assert tmp_path / "copy" in job.reads
    assert not job.online
    assert runner("cpu", "--scratch", str(tmp_path), profile="flash").job("fetch").online


def test_links_into_the_work_folder_need_no_mount(tmp_path: Path) -> None:
    (tmp_path / "upstream").mkdir()
    (tmp_path / "upstream/model").symlink_to("../model")
    found = jobs.mounts(job(tmp_path, reads=[tmp_path / "upstream"]))
    assert [mount["Target"] for mount in found] == [str(tmp_path), f"{tmp_path}/upstream"]


def test_relative_folders_are_mounted_where_the_caller_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = jobs.mounts(job(Path("work"), reads=[Path("source")]))
    assert [(mount["Source"], mount["Target"]) for mount in found] == [
        (f"{tmp_path}/{name}",) * 2 for name in ("work", "source")
    ]


# Security options of the daemon -> what the container is asked to be.
SECURITY: dict[str, dict[str, object]] = {
    "rootless": {"user": "0:0", "group_add": None, "ipc_mode": "private"},
    "selinux": {"security_opt": ["label=disable"]},
    "userns": {"userns_mode": "host"},
    "seccomp": {"user": f"{os.getuid()}:{os.getgid()}", "ipc_mode": "host", "security_opt": None, "userns_mode": None},
}


@pytest.mark.parametrize("security", SECURITY)
def test_a_container_fits_how_the_daemon_confines_it(security: str, tmp_path: Path) -> None:
    options = jobs.options(job(tmp_path), {security})
    expected = SECURITY[security]
    assert {name: options.get(name) for name in expected} == expected


def test_the_docker_command_says_what_docker_py_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    (tmp_path / "a,b").mkdir()
    made = job(tmp_path / "a,b", reads=[tmp_path / "read"], gpus=2, environment={"TOKEN": "secret"})
    words = jobs.command_line(made, {"rootless", "selinux", "userns"}, "--interactive")
    assert words[:4] == ["docker", "run", "--rm", "--interactive"]
    assert words[-2:] == ["image", "--now"]
    assert {
        *("--entrypoint=program", "--user=0:0", "--ipc=private", "--network=none", "--userns=host", "--init=true"),
        *("--security-opt=label=disable", "--env=TOKEN", '--gpus="device=0,1"', "--hostname=localhost"),
        f'--mount=type=bind,"source={tmp_path}/a,b","target={tmp_path}/a,b"',
        f"--mount=type=bind,source={tmp_path}/read,target={tmp_path}/read,readonly",
    } <= set(words)
    assert "secret" not in " ".join(words)


def test_every_option_of_a_shell_has_its_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    made = [job(tmp_path, gpus=1), job(tmp_path, online=True)]
    options = {name for one in made for name in jobs.options(one, {"rootless", "selinux", "userns"}, ())}
    assert options <= jobs.FLAGS.keys()
    assert "--gpus=1" in jobs.command_line(made[0], set())


@pytest.mark.parametrize(
    ("gpus", "devices", "count", "ids"),
    [
        (2, None, 2, []),
        (2, "4, 5", 0, ["4", "5"]),
        (1, "0,1", 0, ["0", "1"]),
        (1, "-1", None, []),
        (1, "", None, []),
        (0, "0", None, []),
    ],
)
def test_devices_pick_the_gpus_and_gpus_count_them(
    gpus: int, devices: str | None, count: int | None, ids: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if devices is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    requests = jobs.device_requests(gpus)
    assert [(request.count, request.device_ids) for request in requests] == ([] if count is None else [(count, ids)])


def test_more_gpus_than_devices_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(UserError, match="GPUS=8, but DEVICES=0,1 names 2"):
        jobs.device_requests(8)


def runner(lane: str, *options: str, profile: str = "tiny") -> Runner:
    argv = ["run", "calibrate", "--profile", profile, "--runtime", "docker", *options]
    made = Runner(stage.settings_of(stage.parse(argv, list(STAGES))), STAGES, stage.ROOT)
    made.image = containers.Image("sha256:" + "0" * 64, lane)
    return made


@pytest.mark.parametrize(
    ("name", "lane", "gpus"),
    [
        ("calibrate", "cuda", 8),
        ("rtn", "cuda", 8),
        ("verify-deep", "cuda", 1),
        ("verify", "cuda", 1),
        ("calibrate", "cpu", 0),
    ],
)
def test_stages_that_compute_ask_for_gpus_where_the_image_can_use_them(name: str, lane: str, gpus: int) -> None:
    made = runner(lane, "--gpus", "8").job(name)
    assert made.gpus == gpus
    assert ("--nproc-per-node" in made.command) == (name in ("calibrate", "rtn"))


def test_only_stages_that_download_have_a_network(tmp_path: Path) -> None:
    tiny, flash = runner("cpu"), runner("cuda", profile="flash")
    given = runner("cuda", "--corpus", str(tmp_path / "own.jsonl"), profile="flash")
    assert [name for name in STAGES if tiny.job(name).online] == ["fetch"]
    assert [name for name in STAGES if flash.job(name).online] == ["fetch", "calibrate", "rtn", "peer"]
    assert [name for name in STAGES if given.job(name).online] == ["fetch"]


def test_a_job_names_every_path_from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    made = runner("cpu", "--scratch", "somewhere").job("calibrate")
    assert made.work == ROOT / "somewhere/tiny"
    assert made.reads == [ROOT / "models/tiny", ROOT / "models/tiny/calibration.jsonl"]
    assert made.command[:5] == ["python", "-m", "scripts.calibrate", "--work", f"{ROOT}/somewhere/tiny/layers"]
    assert str(ROOT / "models/tiny") in made.command


def test_bytecode_of_one_image_is_not_read_by_another() -> None:
    one, other = runner("cpu"), runner("cpu")
    other.image = containers.Image("sha256:" + "1" * 64, "cpu")
    caches = {made.job("verify").environment["PYTHONPYCACHEPREFIX"] for made in (one, other)}
    assert len(caches) == 2


def test_a_daemon_that_is_not_there_is_an_error_of_two_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/docker.sock")
    with pytest.raises(UserError) as raised:
        containers.connect()
    assert raised.value.fact == f"no docker daemon answers at unix://{tmp_path}/docker.sock"
    assert raised.value.hint.startswith("sudo systemctl start docker")


def as_nobody(work: Callable[[], None]) -> str:
    """The error that `work` raises as a user without rights; as ourselves where we are not root."""
    inward, outward = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            work()
        except UserError as error:
            os.write(outward, f"{error.fact}\n{error.hint}".encode())
        finally:
            os._exit(0)
    os.close(outward)
    os.waitpid(pid, 0)
    with os.fdopen(inward) as said:
        return said.read()


def test_a_daemon_that_is_not_for_the_caller_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "docker.sock"
    monkeypatch.setenv("DOCKER_HOST", f"unix://{path}")
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(0)
        fact, hint = as_nobody(lambda: containers.connect() and None).splitlines()
    assert fact == f"you may not use the docker daemon at unix://{path}"
    assert "usermod -aG docker" in hint


def test_a_folder_of_somebody_else_is_said_to_be() -> None:
    def work() -> None:
        check_writable(Path("/etc/v4forge/tiny"))

    fact, hint = as_nobody(work).splitlines()
    assert fact == "you cannot write to /etc, which belongs to root"
    assert "SCRATCH=" in hint


def test_a_run_in_a_folder_of_somebody_else_begins_nothing() -> None:
    said = as_nobody(lambda: stage.main(["run", "verify", "--scratch", "/etc"]) and None)
    assert said.startswith("you cannot write to /etc, which belongs to root")
