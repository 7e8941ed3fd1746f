"""Brings a deployment up, until it is ready and has passed the probe, and down: for `make serve` and the benches."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from v4forge import certified, outcomes
from v4forge.checkout import ROOT
from v4forge.errors import UserError
from v4forge.images import containers, definitions
from v4forge.outcomes import Outcome
from v4forge.serving import placement, preflight, probe, readiness, rolling, secret_files, settings
from v4forge.serving.compose import Compose
from v4forge.serving.deployment import CERTIFICATE, KEYS, Deployment, Runtime
from v4forge.serving.haproxy import Limits
from v4forge.serving.preflight import Proof
from v4forge.serving.probe import FLOOR, Expected
from v4forge.serving.supervisord import Supervised

CPU_REPLICAS = 2
# Where vllm is without docker.
PROGRAMS = {"cuda": ROOT / ".venv-serve/bin", "cpu": ROOT / ".venv-serve-cpu/bin"}
# Of vLLM's log: that the context does not fit, and which would; how many tokens the KV cache has.
FITS = re.compile(r"estimated maximum model length is (\d+)")
KV_TOKENS = re.compile(r"KV cache size: ([\d,]+) tokens")
BLOCK, LEAST_CONTEXT = 256, 4096
NOTHING = "nothing is served from {}"


@dataclass(frozen=True)
class Wanted:
    """A deployment as it is asked for. deployment_of() decides what is left open: an empty `runtime`, `devices` or
    `program`, no `replicas`, `drafts` None, no `width`, the GPUs of a replica. `overrides` are the operator's settings
    of vLLM."""

    folder: Path
    artifact: Path
    profile: str = settings.PRODUCTION
    runtime: str = ""
    backend: str = "cuda"
    replicas: int = 0
    width: int = 0
    devices: str = ""
    drafts: int | None = None
    overrides: Mapping[str, str] = field(default_factory=dict)
    bind: str = "127.0.0.1"
    port: int = 8000
    cert: str = ""
    cert_key: str = ""
    drain_s: int = 600
    waiting: int | None = None
    per_source: int = Limits.per_source
    watchdog_s: int = Deployment.watchdog_s
    metrics: bool = False
    compose: Sequence[str] = ()
    program: str = ""

    @property
    def keeper(self) -> str:
        """The runtime: what is asked for, else docker, and on a CPU the host."""
        return self.runtime or ("docker" if self.backend == "cuda" else "host")

    @property
    def programs(self) -> Path:
        """The folder of vllm's program where there is no container."""
        return Path(os.path.abspath(self.program or PROGRAMS[self.backend]))


@dataclass(frozen=True)
class Start:
    """How a deployment is started. timeout_s: until every replica is ready; min_acceptance: of first drafts, in the
    probe; allow: guards and checks of the probe that may fail; keep: leave what was started when the probe fails;
    check: how closely the artifact is compared with its certificate; verify_key: who must have signed that."""

    timeout_s: float = 2700
    min_acceptance: float = FLOOR
    allow: Sequence[str] = ()
    keep: bool = False
    check: str = certified.CONTENTS
    verify_key: Path | None = None


class Steps(Protocol):
    """Shows progress over `total` steps: what the block gets is called with steps finished, and what comes next."""

    def __call__(
        self, what: str, total: int, unit: str = "", resumes: bool = False
    ) -> AbstractContextManager[Callable[[int, str], None]]: ...


def say(line: str) -> None:
    print(line, flush=True)


def runtime_of(deployment: Deployment) -> Runtime:
    return Compose(deployment) if deployment.runtime == "docker" else Supervised(deployment)


def deployment_of(wanted: Wanted) -> Deployment:
    """What is asked for, as this machine has it. Raises UserError for what it has not."""
    overrides = dict(wanted.overrides)
    if wanted.drafts is not None:
        overrides |= {settings.DRAFTS: str(wanted.drafts), settings.DRAFT_METHOD: "mtp"}
    if wanted.width:
        overrides[settings.TENSOR_PARALLEL] = str(wanted.width)
    chosen = settings.serving(wanted.profile, wanted.backend, overrides)
    deployment = Deployment(
        folder=os.path.abspath(wanted.folder),
        artifact=os.path.abspath(wanted.artifact),
        runtime=wanted.keeper,
        backend=wanted.backend,
        profile=wanted.profile,
        overrides=overrides,
        gpus=devices(wanted, chosen.tensor_parallel),
        bind=wanted.bind.removeprefix("[").removesuffix("]"),
        port=wanted.port,
        cert=os.path.abspath(wanted.cert) if wanted.cert else "",
        cert_key=os.path.abspath(wanted.cert_key) if wanted.cert_key else "",
        drain_s=wanted.drain_s,
        waiting=wanted.waiting,
        per_source=wanted.per_source,
        watchdog_s=wanted.watchdog_s,
        metrics=wanted.metrics,
        compose=[os.path.abspath(file) for file in wanted.compose],
        model=settings.name_of(wanted.artifact),
    )
    if deployment.metrics and deployment.runtime == "host":
        raise UserError("Prometheus and Grafana run in containers", "make serve RUNTIME=docker METRICS=1")
    if deployment.runtime == "host":
        return replace(deployment, program=str(wanted.programs))
    return replace(deployment, image=definitions.resolve("serve"))


def devices(wanted: Wanted, width: int) -> list[list[str]]:
    """The GPUs of each replica; [] each on a CPU."""
    if wanted.backend == "cpu":
        return [[] for _ in range(wanted.replicas or CPU_REPLICAS)]
    return placement.placed(wanted.devices, wanted.replicas, width)


def up(deployment: Deployment, keys: str, start: Start, steps: Steps) -> Deployment:
    """Starts a deployment whose clients send one of `keys`, a file's text, "" for none, and waits until it is ready and
    has passed the probe -> as it runs. One that runs already is probed again; where it has another artifact, image or
    setting, it becomes this one replica by replica. Raises UserError where it cannot be: what was started is stopped
    then, and what ran before runs on."""
    deployment = replace(deployment, key_file=str(Path(deployment.folder) / KEYS) if keys else "")
    running = Deployment.load(Path(deployment.folder))
    if running:
        context = running.context if running.profile == deployment.profile else 0
        deployment = _identified(replace(deployment, context=context))
        rolling.check(running, deployment)
        if running.keys != keys:
            raise UserError("other replicas run already, with another key", "make serve-reload API_KEY_FILE=<file>")
        if rolling.due(running, deployment):
            return _roll(running, deployment, start, steps)
        if running.router_configuration() != deployment.router_configuration():
            deployment.save()
            runtime_of(deployment).reload()
            running = deployment
    deployment = running or _prepare(deployment, keys, start, steps)
    runtime = runtime_of(deployment)
    chosen = deployment.serving
    say(f"serve: {deployment.replicas} x TP={chosen.tensor_parallel}, k={chosen.drafts}, {deployment.artifact}")
    if not running:
        for number, group in enumerate(deployment.gpus):
            if group:
                say(f"serve: replica{number} on GPU {placement.shown(group)}")
    try:
        runtime.start()
        with steps("serve", deployment.replicas, "replicas") as progress:
            readiness.wait(runtime, start.timeout_s, progress)
        _probe(runtime, start, steps)
    except BaseException as error:  # whatever it is, what was started does not stay behind
        if start.keep or running:
            raise
        say("serve: stopping what was started (KEEP=1 leaves it)")
        bring_down(runtime)
        if not (fits := what_fits(deployment, error)):
            raise
        say(f"serve: a context of {chosen.max_model_len:,} tokens does not fit on these GPUs, {fits:,} do: once more")
        return up(replace(deployment, context=fits), keys, start, steps)
    say(f"ready: {deployment.url}, {ready_as(runtime)}")
    return deployment


def _roll(running: Deployment, deployment: Deployment, start: Start, steps: Steps) -> Deployment:
    """Makes what runs another deployment, replica by replica -> as it runs."""
    runtime = runtime_of(deployment)
    _check(runtime, start, steps, [preflight.CERTIFICATE])

    def prove(kept: Runtime, number: int) -> None:
        with steps("serve", 1, "replicas") as progress:
            readiness.wait(kept, start.timeout_s, progress, [number])
        _probe(kept, start, steps, [number])

    rolling.Roll(runtime_of, prove, say, rolling.CUT in start.allow).run(running, deployment)
    say(f"ready: {deployment.url}, {ready_as(runtime)}")
    return deployment


def what_fits(deployment: Deployment, error: BaseException) -> int:
    """The tokens of context that vLLM says would fit, in whole blocks, when it ended for want of KV cache; 0 where it
    ended otherwise, where they are few, and where the operator or a bench has chosen the context."""
    said = FITS.search(error.fact) if isinstance(error, UserError) else None
    chosen = deployment.profile != settings.PRODUCTION or settings.CONTEXT in deployment.overrides
    if said is None or chosen or deployment.context:
        return 0
    fits = int(said[1]) // BLOCK * BLOCK
    return fits if fits >= LEAST_CONTEXT else 0


def ready_as(runtime: Runtime) -> str:
    """What is served, in words: context, drafts, tokens of KV cache as the first replica's log has them, replicas."""
    deployment, chosen = runtime.deployment, runtime.deployment.serving
    kept = KV_TOKENS.findall(runtime.log(deployment.names[0]))
    parts = [
        f"{chosen.model}",
        f"context {chosen.max_model_len:,}" if chosen.max_model_len else "context as vLLM finds it",
        f"k={chosen.drafts}",
        *([f"{kept[-1]} KV tokens a replica"] if kept else []),
        f"{deployment.replicas} replica{'s' * (deployment.replicas > 1)}",
    ]
    return ", ".join(parts)


def _prepare(deployment: Deployment, keys: str, start: Start, steps: Steps) -> Deployment:
    """Writes what the processes read, after a look at whether they can run -> the deployment with its image's id."""
    secrets = _secrets(deployment, keys)
    _check(runtime_of(deployment), start, steps)
    deployment = _identified(deployment)
    _keep(deployment, secrets)
    runtime_of(deployment).write()
    deployment.save()
    return deployment


def _check(runtime: Runtime, start: Start, steps: Steps, guards: Sequence[preflight.Check] = preflight.GUARDS) -> None:
    """Raises UserError where the deployment cannot run."""
    deployment = runtime.deployment
    runtime.check()
    preflight.check(deployment, start.allow, say, Proof(start.check, start.verify_key, steps), guards)
    if isinstance(runtime, Compose):
        check_image(deployment)
        runtime.check_readable()


def _identified(deployment: Deployment) -> Deployment:
    """The deployment with the id of what its image is now: a name may become another's."""
    if not isinstance(runtime_of(deployment), Compose):
        return deployment
    return replace(deployment, image_id=containers.identity(containers.connect(), deployment.image))


def _secrets(deployment: Deployment, keys: str) -> dict[str, str]:
    """What only who serves may read, by its place in the deployment's folder: keys, where there are any, and the
    certificate as it is now."""
    secrets = {KEYS: keys + "\n"} if keys else {}
    if deployment.cert:
        secrets[CERTIFICATE] = secret_files.certificate(deployment.cert, deployment.cert_key)
    return secrets


def _keep(deployment: Deployment, secrets: Mapping[str, str]) -> None:
    for place, text in secrets.items():
        secret_files.write(Path(deployment.folder) / place, text, deployment.owner)


def reload(folder: Path, keys: str) -> None:
    """Gives what runs these keys, where they are not "", and its certificate anew, without a restart. Raises UserError
    for a deployment without keys, whose replicas would not ask for them."""
    runtime = running_in(folder)
    deployment = runtime.deployment
    if keys and not deployment.key_file:
        raise UserError("the replicas were started without a key", "make serve-stop, make serve API_KEY_FILE=<file>")
    if not keys and not deployment.cert:
        raise UserError("there is nothing to read anew", "make serve-reload API_KEY_FILE=<file>")
    _keep(deployment, _secrets(deployment, keys))
    if keys:
        say("serve: the keys are those of the file, from the next second on")
    if deployment.cert:
        runtime.reload()
        say("serve: the router has its certificate anew")


def check_image(deployment: Deployment) -> None:
    """Raises UserError unless the daemon has the image, built from the versions of this checkout."""
    labels = containers.labels(containers.connect(), deployment.image)
    for label, value in definitions.expected_labels("serve").items():
        if labels.get(label) != value:
            fact = f"the image {deployment.image} was built from other versions ({label})"
            raise UserError(fact, "make images IMAGE=serve")


def _probe(runtime: Runtime, start: Start, steps: Steps, only: Sequence[int] | None = None) -> None:
    """Asks every replica, or those in `only`. Raises UserError where a check fails that may not."""
    deployment, chosen = runtime.deployment, runtime.deployment.serving
    expected = Expected(chosen.model, chosen.drafts > 0, chosen.tensor_parallel, start.min_acceptance)
    asked = [each for each in deployment.endpoints if only is None or each.replica in only]
    with steps("probe", len(asked), "replicas") as progress:
        checks = probe.probe(asked, expected, lambda number: runtime.log(deployment.names[number]), progress)
    say("\n".join(outcomes.lines(checks)))
    failed = [check for check in checks if not check.ok and kind(check) not in start.allow]
    if failed:
        readiness.show_errors(runtime)
        hint = f"make serve-logs says more; serve all the same: make serve ALLOW={kind(failed[0])}"
        raise UserError(f"the probe failed: {failed[0].name}: {failed[0].detail}", hint)


def kind(check: Outcome) -> str:
    """What ALLOW calls it, whichever replica it is about."""
    return check.name.rpartition(": ")[2].replace(" ", "-")


def bring_down(runtime: Runtime) -> None:
    """A replica that does not answer, as one that still loads, has nothing to finish: it gets no time for that."""
    deployment = runtime.deployment
    silent = [name for number, name in enumerate(deployment.names) if not readiness.ready(deployment, number)]
    runtime.stop(say, silent)
    deployment.forget()
    for secret in (KEYS, CERTIFICATE):
        (Path(deployment.folder) / secret).unlink(missing_ok=True)


def stop(folder: Path) -> None:
    """Takes no new request, waits for those that run, stops everything that was started in a folder."""
    deployment = Deployment.left(folder)
    if deployment is None:
        say(NOTHING.format(folder))
        return
    say(f"serve: draining, for at most {deployment.drain_s} s")
    bring_down(runtime_of(deployment))
    say("serve: stopped")


def running_in(folder: Path) -> Runtime:
    """What keeps the deployment of a folder. Raises UserError where there is none."""
    deployment = Deployment.load(folder)
    if deployment is None:
        raise UserError(NOTHING.format(folder), "make serve")
    return runtime_of(deployment)
