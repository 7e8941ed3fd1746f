"""What can go wrong on a machine, checked before anything runs: a table of checks, each with a fact and a fix.

The checks run side by side, each in its time. One that breaks has failed: it never takes the others with it.
"""

from __future__ import annotations

import queue
import re
import shlex
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from v4forge.errors import UserError, keep_traceback, summary
from v4forge.outcomes import FAILED, NOT_CHECKED, WARNING, NotChecked, Outcome, failed, not_checked
from v4forge.pipeline.doctor import containers as of_containers
from v4forge.pipeline.doctor import disk as of_disk
from v4forge.pipeline.doctor import driver as of_driver
from v4forge.pipeline.doctor import environment as of_environment
from v4forge.pipeline.doctor import gpu as of_gpu
from v4forge.pipeline.doctor import network as of_network
from v4forge.pipeline.doctor import system as of_system
from v4forge.pipeline.doctor.host import Host
from v4forge.units import counted

GROUPS = ("GPU", "containers", "disk", "system", "network")
LIMIT_S, LONG_S = 45.0, 120.0
SHORTEST_SECRET = 6  # what is shorter stands in other words by chance

# Of a check that could not be made: what the embedded model, or a run without docker, can do without.
SEVERITY: dict[str, Callable[[Host, str, str], Outcome]] = {"GPU": Host.needed, "containers": of_containers.missing}


@dataclass(frozen=True)
class Check:
    """`alone`: after all others, because they would disturb what it measures."""

    name: str
    group: str
    function: Callable[[Host], Outcome]
    limit_s: float = LIMIT_S
    alone: bool = False


# NVML wakes every GPU first where no daemon keeps them awake: the first that asks waits for a minute.
CHECKS = (
    Check("driver", "GPU", of_driver.driver, LONG_S),
    Check("CUDA", "GPU", of_driver.cuda, LONG_S),
    Check("torch", "GPU", of_driver.torch_build, LONG_S),
    Check("fabric manager", "GPU", of_driver.fabric_manager, LONG_S),
    Check("GPUs", "GPU", of_gpu.models, LONG_S),
    Check("capability", "GPU", of_gpu.capability, LONG_S),
    Check("GPU memory", "GPU", of_gpu.memory, LONG_S),
    Check("ECC", "GPU", of_gpu.health, LONG_S),
    Check("in use", "GPU", of_gpu.idle, LONG_S),
    Check("NVLink", "GPU", of_gpu.links, LONG_S),
    Check("all-reduce", "GPU", of_gpu.all_reduce, of_gpu.NCCL_LIMIT_S + LONG_S),
    Check("docker", "containers", of_containers.daemon),
    Check("compose", "containers", of_containers.compose_program),
    Check("image builder", "containers", of_containers.builder),
    Check("NVIDIA toolkit", "containers", of_containers.toolkit, LONG_S),
    Check("calib image", "containers", partial(of_containers.image, name="calib")),
    Check("serve image", "containers", partial(of_containers.image, name="serve")),
    Check("container: GPUs", "containers", of_containers.sees_gpus, LONG_S),
    Check("container: files", "containers", of_containers.writes, LONG_S),
    Check("container: nvcc", "containers", of_containers.compiler, LONG_S),
    Check("scratch", "disk", of_disk.writable),
    Check("hard links", "disk", of_environment.links),
    Check("locks", "disk", of_environment.locks),
    *(Check(f"space: {stage}", "disk", partial(of_disk.space, stage=stage)) for stage in of_disk.STAGES),
    Check("space: images", "disk", of_disk.images),
    Check("speed", "disk", of_disk.speed, LONG_S, alone=True),
    Check("memory", "system", of_system.host_memory),
    Check("/dev/shm", "system", of_system.shared_memory),
    *(Check(name, "system", partial(of_system.limit, name=name)) for name in of_system.LIMITS),
    Check("Python", "system", of_system.python),
    Check("Python variables", "system", of_environment.python_variables),
    Check("ranks", "system", of_environment.ranks),
    Check("revision", "system", of_environment.revision),
    Check("serve on host", "system", of_system.serving),
    Check("host name", "network", of_environment.host_name),
    Check("proxies", "network", of_environment.proxies),
    Check("certificates", "network", of_environment.certificates),
    Check("hub", "network", of_network.hub),
    Check("token", "network", of_network.token),
    Check("clock", "network", of_network.clock),
)


def run(
    host: Host, checks: Sequence[Check] = CHECKS, progress: Callable[[int, str], None] = lambda _done, _doing: None
) -> list[Outcome]:
    """An outcome a check, in their order; `progress` is told how many are finished, and which are not."""
    found: dict[str, Outcome] = {}

    def tell(running: Sequence[str]) -> None:
        progress(len(found), ", ".join(running))

    together = [check for check in checks if not check.alone]
    for group in (together, *([check] for check in checks if check.alone)):
        _run_together(host, group, found, tell)
    return [_as_the_first(found[check.name], found) for check in checks]


def _as_the_first(outcome: Outcome, found: Mapping[str, Outcome]) -> Outcome:
    """One that waits for another check has its fix."""
    first = found.get(outcome.after)
    return replace(outcome, fix=first.fix) if first and first.fix else outcome


def _run_together(
    host: Host, checks: Sequence[Check], found: dict[str, Outcome], tell: Callable[[Sequence[str]], None]
) -> None:
    """Runs checks in threads, until each has ended or has used up its time."""
    ended: queue.SimpleQueue[tuple[Check, Outcome]] = queue.SimpleQueue()
    started = time.monotonic()
    for check in checks:
        # A daemon's thread: the program may end while one hangs in the kernel.
        threading.Thread(target=lambda check=check: ended.put((check, judge(host, check))), daemon=True).start()
    waiting = {check.name: check for check in checks}
    while waiting:
        tell(list(waiting))
        left_s = min(check.limit_s for check in waiting.values()) - (time.monotonic() - started)
        try:
            check, outcome = ended.get(timeout=min(1.0, max(0.0, left_s)))
        except queue.Empty:
            late = [each for each in waiting.values() if time.monotonic() - started >= each.limit_s]
            answers = [(each, _late(each)) for each in late]
        else:
            answers = [(check, outcome)] if check.name in waiting else []
        for check, outcome in answers:
            del waiting[check.name]
            found[check.name] = replace(_redacted(host, outcome), name=check.name)
    tell([])


def _failed(_host: Host, fact: str, fix: str) -> Outcome:
    return failed(fact, fix)


def _late(check: Check) -> Outcome:
    fact = f"no answer within {check.limit_s:.0f} s: a disk, a GPU or the network hangs"
    return failed(fact, "sudo dmesg --level err,warn | tail")


def judge(host: Host, check: Check) -> Outcome:
    """What a check found; an error that a user can act on is a failure, one of ours too, and neither is raised."""
    try:
        return check.function(host)
    except NotChecked as why:
        return not_checked(why)
    except UserError as error:
        return SEVERITY.get(check.group, _failed)(host, error.fact, error.hint)
    except Exception as error:  # a check that breaks must not hide the others
        kept = keep_traceback(error)
        show = f"cat {shlex.quote(str(kept))}" if kept else host.make("doctor")
        return failed(f"the check itself broke: {summary(error)}", show)


def _redacted(host: Host, outcome: Outcome) -> Outcome:
    """Its fact on one line, and its fix, without a secret that an address or another program's message brought in."""
    secrets = [of_network.held_token(host), *map(_password, host.environment.values())]
    texts = []
    for text in (" ".join(outcome.fact.split()), outcome.fix):
        text = re.sub(r"(?<=://)[^/\s@]+(?=@)", "…", text)
        for secret in secrets:
            text = text.replace(secret, "…") if len(secret) >= SHORTEST_SECRET else text
        texts.append(text)
    return replace(outcome, fact=texts[0], fix=texts[1])


def _password(url: str) -> str:
    match = re.match(r"\w+://[^/\s@]*?:([^/\s@]+)@", url)
    return match[1] if match else ""


def told(outcome: Outcome) -> Outcome:
    """As the doctor's table and JSON tell it: what could not be checked is a warning that says so."""
    if outcome.status != NOT_CHECKED:
        return outcome
    return replace(outcome, status=WARNING, fact=f"{NOT_CHECKED}: {outcome.fact}")


def verdict(host: Host, outcomes: Sequence[Outcome]) -> str:
    """One line: may the run begin?"""
    failures = [outcome.name for outcome in outcomes if outcome.status == FAILED]
    warnings, unchecked = (sum(outcome.status == status for outcome in outcomes) for status in (WARNING, NOT_CHECKED))
    counts = f"{counted(warnings, 'warnings')}, {unchecked} not checked"
    if failures:
        names = f"{counted(len(failures), 'checks')} failed: {', '.join(failures)}"
        return f"doctor: PROFILE={host.profile} cannot run here yet; {names}; {counts}"
    return f"doctor: PROFILE={host.profile} can run here; {counts}"
