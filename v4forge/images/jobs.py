"""What a program in a container is and may see, as data; and the same as docker-py's arguments and as a docker command.

Folders of the host have the same path in the container, so that arguments, messages and hints need no translation and
hard links work. A program sees the folder it writes to, what it reads, and no network unless it downloads.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from docker.types import DeviceRequest, Mount, Ulimit

from v4forge.errors import UserError
from v4forge.network import Network

RUN_LABEL = "io.v4forge.run"  # the folder that a run's container writes to

# Nothing is mounted over these, above them or below them.
SYSTEM = ("/bin", "/boot", "/etc", "/lib", "/lib64", "/proc", "/sbin", "/sys", "/usr")
# Nothing is mounted over these or above them.
OCCUPIED = ("/dev/shm", "/home/v4forge", "/opt/v4forge", "/opt/venv", "/run/v4forge", "/tmp")

# Of the caller's environment, for programs that download.
ONLINE = (
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "HF_HUB_DOWNLOAD_TIMEOUT",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "NO_PROXY",
)
CA_VARIABLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
CA_FILE = "/run/v4forge/ca.pem"

# A program beside what waits for a lock, which a killed holder leaves. It takes the lock then, until the program has
# ended, so that nobody else begins meanwhile. Where locks of the host are not seen (gVisor), it is free at once, and
# the program runs alone.
BESIDE_A_LOCK = """
(flock -sn "$0" true || flock "$0" sh -c "kill $$; sleep 30; kill -9 $$") 2>/dev/null &
exec "$@"
"""

# NCCL registers memory with network cards, which memlock limits.
ULIMITS = (Ulimit(name="memlock", soft=-1, hard=-1), Ulimit(name="stack", soft=64 << 20, hard=64 << 20))


@dataclass(frozen=True)
class Job:
    """A program in an image: it writes to the folder `work`, and reads the files and folders `reads`.

    A run has a name; a shell has none. `gpus` says how many it needs, DEVICES which. `lock` is a locked file in `work`,
    with whose holder the program ends, however that ends.
    """

    image: str
    command: Sequence[str]
    work: Path
    reads: Sequence[Path] = ()
    gpus: int = 0
    online: bool = False
    name: str = ""
    beside: str = ""  # what it is, where it may run beside another job of the same folder
    environment: Mapping[str, str] = field(default_factory=dict)
    lock: Path | None = None

    @property
    def words(self) -> list[str]:
        """What the container runs: the command, and what ends it."""
        watched = ["sh", "-c", BESIDE_A_LOCK, str(self.lock.absolute())] if self.lock else []
        return [*watched, *self.command]

    @property
    def run(self) -> str:
        """The value of RUN_LABEL, which one running container has at a time."""
        return f"{self.work.absolute()}{self.beside and '#' + self.beside}"


def mounts(job: Job) -> list[Mount]:
    """The job's files and folders, each once. Raises UserError for one that would hide a part of the image."""
    work = job.work.absolute()
    readable = {path.absolute(): path for path in job.reads}
    for target in (work, *readable):
        _check_hides_nothing(target)
    linked = {target: source for path in readable for target, source in _linked_folders(path).items()}
    for target in linked:
        _check_hides_nothing(target)
    readable = {target: source for target, source in linked.items() if not target.is_relative_to(work)} | readable
    targets = [path for path in readable if not any(parent in readable for parent in path.parents)]
    chosen = [(work, work, False), *((target, readable[target], True) for target in targets)]
    if job.online and (ca := _ca_file()):
        chosen.append((Path(CA_FILE), ca, True))
    return [Mount(str(target), str(source.absolute()), "bind", read_only) for target, source, read_only in chosen]


def _linked_folders(folder: Path) -> dict[Path, Path]:
    """path in a container -> folder of the host: where the symbolic links in `folder` lead, as in the hub's cache."""
    links = [path for path in folder.iterdir() if path.is_symlink()] if folder.is_dir() else []
    return {Path(os.path.normpath(link.parent / link.readlink())).parent: link.resolve().parent for link in links}


def _check_hides_nothing(target: Path) -> None:
    hidden = [place for place in (*SYSTEM, *OCCUPIED) if Path(place).is_relative_to(target)]
    hidden += [place for place in SYSTEM if target.is_relative_to(place)]
    if hidden:
        hint = "choose other folders: make … SCRATCH=<folder> SOURCE=<folder>, or run without docker: RUNTIME=host"
        raise UserError(f"{target} cannot be seen in a container, it would hide {hidden[0]} of the image", hint)


def _ca_file() -> Path | None:
    return Network().authority_file()


def environment(job: Job) -> dict[str, str]:
    """The program's variables besides the image's: its own and, if it downloads, the caller's for that."""
    passed = {"PYTHONUNBUFFERED": "1"}  # its lines are shown as they come
    passed |= {"TERM": os.environ["TERM"]} if os.environ.get("TERM") else {}
    if job.online:
        from huggingface_hub import get_token

        passed |= {"HF_TOKEN": token} if (token := get_token()) else {}
        names = (*ONLINE, *map(str.lower, ONLINE))
        passed |= {name: os.environ[name] for name in names if os.environ.get(name)}
        passed |= dict.fromkeys(CA_VARIABLES, CA_FILE) if _ca_file() else {}
    return passed | dict(job.environment)


def device_requests(gpus: int) -> list[DeviceRequest]:
    """The GPUs that CUDA_VISIBLE_DEVICES names, which DEVICES sets, else any `gpus`. -1 and nothing name none."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if gpus == 0 or chosen in ("", "-1"):
        return []
    if chosen is None:
        return [DeviceRequest(count=gpus, capabilities=[["gpu"]])]
    ids = [name.strip() for name in chosen.split(",")]
    if len(ids) < gpus:
        raise UserError(f"GPUS={gpus}, but DEVICES={chosen} names {len(ids)}", f"make … GPUS={gpus}, without DEVICES")
    return [DeviceRequest(device_ids=ids, capabilities=[["gpu"]])]


def options(job: Job, security: AbstractSet[str], ulimits: Sequence[Ulimit] = ULIMITS) -> dict[str, Any]:
    """The job as docker-py's arguments, besides image and command, for a daemon with these security options."""
    rootless = "rootless" in security
    shared = os.statvfs("/dev/shm")
    chosen = {
        "name": job.name,
        "labels": {RUN_LABEL: job.run} if job.name else {},
        # An image's own entry point would come first.
        "entrypoint": job.words[:1],
        # Rootless, the caller is the container's root, and the caller's other groups have no number there.
        "user": "0:0" if rootless else f"{os.getuid()}:{os.getgid()}",
        "group_add": [] if rootless else [str(group) for group in os.getgroups()],
        "environment": environment(job),
        "mounts": mounts(job),
        # The host's shared memory, for NCCL; rootless, that namespace is not ours to mount, and as much memory does.
        "ipc_mode": "private" if rootless else "host",
        "shm_size": shared.f_blocks * shared.f_frsize if rootless else 0,
        "network_mode": "host" if job.online else "none",
        # The one name that resolves without a network: where torchrun's processes meet, over mapped addresses too.
        "hostname": "" if job.online else "localhost",
        "extra_hosts": {} if job.online else {"localhost": "::ffff:127.0.0.1"},
        "userns_mode": "host" if "userns" in security else "",
        # The other way, relabelling, would rewrite an attribute of every file of the caller's.
        "security_opt": ["label=disable"] if "selinux" in security else [],
        "ulimits": list(ulimits),
        "device_requests": device_requests(job.gpus),
        "init": True,
    }
    return {name: value for name, value in chosen.items() if value}


# docker-py's argument -> the flag and its values, one flag each.
FLAGS: dict[str, tuple[str, Any]] = {
    "entrypoint": ("--entrypoint", lambda words: words),
    "user": ("--user", lambda user: [user]),
    "group_add": ("--group-add", lambda groups: groups),
    "environment": ("--env", list),  # by name: the values are not for those who list processes
    "mounts": ("--mount", lambda found: map(_mount_fields, found)),
    "ipc_mode": ("--ipc", lambda mode: [mode]),
    "shm_size": ("--shm-size", lambda size: [size]),
    "network_mode": ("--network", lambda mode: [mode]),
    "hostname": ("--hostname", lambda name: [name]),
    "extra_hosts": ("--add-host", lambda hosts: [f"{name}:{address}" for name, address in hosts.items()]),
    "userns_mode": ("--userns", lambda mode: [mode]),
    "security_opt": ("--security-opt", lambda found: found),
    "device_requests": ("--gpus", lambda found: map(_device_fields, found)),
    "init": ("--init", lambda init: [str(init).lower()]),
}


def command_line(job: Job, security: AbstractSet[str], *flags: str) -> list[str]:
    """The job as a docker command that removes its container, with more flags. It raises no limits: a daemon that may
    not do that would refuse."""
    chosen = options(job, security, ulimits=())
    words = [f"{FLAGS[name][0]}={value}" for name in chosen for value in FLAGS[name][1](chosen[name])]
    return ["docker", "run", "--rm", *flags, *words, job.image, *job.words[1:]]


def _mount_fields(mount: Mount) -> str:
    fields = ["type=bind", f"source={mount['Source']}", f"target={mount['Target']}"]
    return _csv([*fields, "readonly"] if mount["ReadOnly"] else fields)


def _device_fields(request: DeviceRequest) -> str:
    return _csv([f"device={','.join(request.device_ids)}"]) if request.device_ids else str(request.count)


def _csv(fields: Sequence[str]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(fields)
    return line.getvalue()
