"""Stages in containers as a user runs them: scripts.stage, docker-py, a real daemon."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from docker.client import DockerClient
from staged import Project, left

from v4forge.errors import UserError, run_main
from v4forge.images import containers
from v4forge.images.containers import Engine
from v4forge.images.jobs import RUN_LABEL, Job
from v4forge.pipeline import run_state

pytestmark = pytest.mark.images


def lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What the user reads on stderr; an error is a fact and a command."""
    return done.stderr.splitlines()


def test_a_stage_runs_once_in_a_container_and_then_is_up_to_date(project: Project) -> None:
    task = "import sys; print('out', flush=True); print('err', file=sys.stderr)"
    done = project.run(task)
    assert (done.returncode, done.stderr) == (0, "err\n")
    first, second, last = done.stdout.splitlines()
    assert (first, second) == ("calibrate: the task", "out")
    assert re.fullmatch(r"calibrate: done in \d+\.\d s", last)
    assert project.run(task, DOCKER_HOST="unix:///nowhere").stdout == "calibrate: up to date\n"


def test_a_failed_stage_ends_with_its_code_and_runs_again(project: Project) -> None:
    assert project.run("raise SystemExit(7)").returncode == 7
    assert project.run("raise SystemExit(7)").returncode == 7


def test_a_job_of_minutes_may_be_silent_for_longer_than_a_request_may_take(
    project: Project, engine: Engine, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    client = DockerClient.from_env(timeout=10)
    job = Job(
        project.image, ["sh", "-c", "sleep 12; echo done"], project.folder / "scratch", name="v4forge-test-silent"
    )
    job.work.mkdir()
    assert containers.run(replace(engine, client=client), job) == 0
    assert capfdbinary.readouterr().out == b"done\n"


def test_output_comes_as_it_is_printed(project: Project) -> None:
    runner = project.start("import time; print('alive'); time.sleep(60)")
    runner.send_signal(signal.SIGTERM)  # start() has read the line of a program that still runs
    assert runner.wait(20) == 128 + signal.SIGTERM


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 128 + 15), (signal.SIGHUP, 129)])
def test_a_signal_reaches_the_program_and_the_runner_ends_as_on_the_host(
    project: Project, number: signal.Signals, code: int
) -> None:
    runner = project.start(
        f"""
        import signal, time
        def end(number, frame):
            (work / "signal").write_text(str(number))
            raise SystemExit({code})
        signal.signal({int(number)}, end)
        print("alive")
        time.sleep(60)
        """
    )
    runner.send_signal(number)
    assert runner.wait(20) == code
    assert (project.work / "layers/signal").read_text() == str(int(number))


def test_a_second_ctrl_c_ends_a_program_that_ignores_the_first(project: Project) -> None:
    runner = project.start(
        """
        import signal, time
        signal.signal(signal.SIGINT, lambda *_: print("ignored"))
        print("alive")
        while True: time.sleep(1)
        """
    )
    runner.send_signal(signal.SIGINT)
    assert runner.stdout and runner.stdout.readline() == "ignored\n"
    runner.send_signal(signal.SIGINT)
    assert runner.wait(20) == 130


def test_a_reader_that_goes_away_ends_the_container(project: Project, engine: Engine) -> None:
    runner = project.start("import time\nprint('alive')\nwhile True: print('more'); time.sleep(0.1)")
    assert runner.stdout
    runner.stdout.close()
    assert runner.wait(20) != 0


def test_a_killed_runner_takes_its_container_along(project: Project, engine: Engine) -> None:
    runner = project.start("import time; print('alive'); time.sleep(600)")
    runner.kill()
    runner.wait()
    end = time.monotonic() + 60
    while run_state.lives(project.work, ["calibrate"]):
        assert time.monotonic() < end
        time.sleep(0.05)
    (name,) = left(engine, project.folder)
    assert engine.client.containers.get(name).wait(timeout=60)["StatusCode"] == 128 + signal.SIGTERM
    assert project.run("").returncode == 0


def test_a_container_that_outlives_its_runner_keeps_others_out_until_its_end(project: Project, engine: Engine) -> None:
    runner = project.start(
        "import signal, time; signal.signal(15, lambda *_: print('told', flush=True)); print('alive'); time.sleep(600)"
    )
    runner.kill()
    (name,) = left(engine, project.folder)
    container = engine.client.containers.get(name)
    assert b"told" in next(line for line in container.logs(stream=True, follow=True) if b"told" in line)
    assert run_state.lives(project.work, ["calibrate"])
    done = project.run("")
    assert done.returncode == 1 and lines(done)[0] == "error: another run is writing to " + str(project.work)
    container.kill()
    container.wait(timeout=60)
    assert project.run("").returncode == 0


def test_where_no_lock_is_seen_the_container_of_a_killed_run_is_named(project: Project, engine: Engine) -> None:
    labels = {RUN_LABEL: str(project.work)}
    left_over = engine.client.containers.run(
        project.image, ["-c", "import time; time.sleep(600)"], entrypoint="python", labels=labels, detach=True
    )
    done = project.run("")
    assert done.returncode == 1
    assert lines(done)[0].startswith(f"error: {left_over.name}, of a run that was killed, still writes to")
    assert lines(done)[1] == f"hint: wait for it, or: docker stop {left_over.name}"
    left_over.kill()
    assert project.run("").returncode == 0


def test_the_source_cannot_be_written_even_inside_the_work_folder(project: Project) -> None:
    done = project.run(
        """
        import os
        for path in (source / "new", source / "task.py"):
            try:
                path.open("a")
                raise SystemExit(f"{path} was opened")
            except OSError as error:
                print(error.strerror)
        os.link(work / "layer-00.safetensors", work.parent / "linked")
        """,
    )
    assert done.stdout.splitlines()[1:3] == ["Read-only file system"] * 2
    assert (project.work / "linked").samefile(project.work / "layers/layer-00.safetensors")

    inside = project.work / "upstream"
    (project.folder / "source").rename(inside)
    project.work.joinpath("linked").unlink()
    (inside / "config.json").write_text("another source")
    command = project.command(source=str(inside))
    again = subprocess.run(command, cwd=project.folder, env=project.environment(), capture_output=True, text=True)
    assert again.stderr == ""
    assert again.stdout.count("Read-only file system") == 2


def test_a_source_of_symbolic_links_is_read_as_the_hub_keeps_it(project: Project) -> None:
    (project.folder / "blobs").mkdir()
    (project.folder / "blobs/digest").write_text("tensor")
    (project.folder / "source/model.safetensors").symlink_to("../blobs/digest")
    done = project.run("print((source / 'model.safetensors').read_text())")
    assert "tensor" in done.stdout


def test_a_stage_that_downloads_nothing_has_no_network(project: Project) -> None:
    task = """
        import os, socket
        print(sorted(os.listdir("/sys/class/net")), os.environ.get("HF_TOKEN"), os.environ.get("https_proxy"))
        print(socket.getnameinfo(("::ffff:127.0.0.1", 80), socket.NI_NAMEREQD)[0], socket.gethostname())
    """
    secret = {"HF_TOKEN": "hf_secret", "https_proxy": "http://proxy:1"}
    closed = project.run(task, **secret)
    assert closed.stdout.splitlines()[1:3] == ["['lo'] None None", "localhost localhost"]
    opened = project.run(
        'import os; print(sorted(os.listdir("/sys/class/net")), os.environ["HF_TOKEN"], os.environ["https_proxy"])',
        name="fetch-like",
        **secret,
    )
    assert opened.stdout.splitlines()[1] == f"{sorted(os.listdir('/sys/class/net'))} hf_secret http://proxy:1"
    assert "hf_secret" not in (project.work / "reports/run.json").read_text()


def test_a_download_trusts_the_certificates_that_the_caller_trusts(project: Project) -> None:
    bundle = project.folder / "company.pem"
    bundle.write_text("certificates")
    task = "import os; print(open(os.environ['SSL_CERT_FILE']).read(), open(os.environ['REQUESTS_CA_BUNDLE']).read())"
    done = project.run(task, name="fetch-like", SSL_CERT_FILE=str(bundle))
    assert done.stdout.splitlines()[1] == "certificates certificates"


def as_user(uid: int, work: Callable[[], None]) -> str:
    """What `work` prints in a child process of that user, who may use docker; tracebacks too."""
    docker_group = Path("/var/run/docker.sock").stat().st_gid
    inward, outward = os.pipe()
    if (pid := os.fork()) == 0:
        code = 1
        try:
            os.dup2(outward, 1)
            os.dup2(outward, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            os.setgroups([docker_group, 54321])
            os.setgid(uid)
            os.setuid(uid)
            run_main(work)
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            sys.stdout.flush()
            os._exit(code)
    os.close(outward)
    with os.fdopen(inward) as printed:
        text = printed.read()
    os.waitpid(pid, 0)
    return text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user; every other test runs as one then")
def test_files_belong_to_the_caller_whatever_the_caller(image: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = Path("/tmp") / tmp_path_factory.mktemp("of-the-user").name
    folder.mkdir()
    try:
        os.chown(folder, 12345, 12345)
        script = f"id -u; id -g; id -G; touch {folder}/made && touch $HOME/made && touch /tmp/made"
        job = Job(image, ["sh", "-c", script], folder, name="v4forge-test-user", environment={"HOME": "/tmp"})
        printed = as_user(12345, lambda: containers.run(containers.connect(), job) and None)
        assert printed.split()[:2] == ["12345", "12345"]
        assert "54321" in printed.split()[2:]
        made = (folder / "made").stat()
        assert (made.st_uid, made.st_gid) == (12345, 12345)
    finally:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def test_a_missing_image_is_named_with_the_commands_that_bring_it(project: Project) -> None:
    done = project.run("", V4FORGE_IMAGE_CALIB="v4forge-nowhere:local")
    assert done.returncode == 1
    assert lines(done) == ["error: the image v4forge-nowhere:local is not here", "hint: make images, or make pull"]
    assert done.stdout == "", "nothing is announced that cannot begin"


def test_an_image_of_other_code_is_refused(project: Project, make_image: Callable[..., str]) -> None:
    other = make_image(code="0" * 64)
    done = project.run("", V4FORGE_IMAGE_CALIB=other)
    assert lines(done) == [f"error: the image {other} holds other code than this checkout", "hint: make images"]


def test_a_folder_that_the_daemon_does_not_see_is_named(project: Project, engine: Engine) -> None:
    job = Job(project.image, ["true"], project.folder / "gone", name="v4forge-test-gone")
    with pytest.raises(UserError, match=f"does not see a folder of yours.*{project.folder}/gone"):
        containers.run(engine, job)


def test_a_gpu_image_without_the_runtime_says_so_and_can_do_without(
    project: Project, make_image: Callable[..., str]
) -> None:
    cuda = make_image(lane="cuda")
    done = project.run("", V4FORGE_IMAGE_CALIB=cuda)
    assert lines(done)[0] == "error: the docker daemon has no NVIDIA runtime, which GPUs need"
    assert "DEVICES=-1" in lines(done)[1]
    assert project.run("", V4FORGE_IMAGE_CALIB=cuda, CUDA_VISIBLE_DEVICES="-1").returncode == 0


class Line:
    """A socket that leads to docker's until it is cut."""

    def __init__(self, path: Path) -> None:
        self.ends: list[socket.socket] = []
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                here, _ = self.listener.accept()
                there = socket.socket(socket.AF_UNIX)
                there.connect("/var/run/docker.sock")
                self.ends += [here, there]
                for pair in ((here, there), (there, here)):
                    threading.Thread(target=self._copy, args=pair, daemon=True).start()

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        for end in (self.listener, *self.ends):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self.listener.close()


def test_a_daemon_that_goes_away_is_an_error_and_what_it_left_is_removed_later(
    project: Project, engine: Engine
) -> None:
    path = project.folder / "docker.sock"
    line = Line(path)
    runner = project.start("import time; print('alive'); time.sleep(60)", DOCKER_HOST=f"unix://{path}")
    line.cut()
    assert runner.wait(20) == 1
    assert runner.stdout
    fact, hint = runner.stdout.read().splitlines()
    assert fact.startswith("error: the docker daemon is gone: ")
    assert re.match(r"hint: .*sudo (systemctl status docker|service docker status), then run the same again", hint)
    (name,) = left(engine, project.folder)
    engine.client.containers.get(name).wait(timeout=60)  # it ends with its runner
    assert project.run("").returncode == 0
