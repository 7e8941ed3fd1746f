"""What is measured: which model answers at an address, on which machine, from which artifact and image."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from v4forge import artifact_folder, checkout
from v4forge.errors import UserError
from v4forge.files import read_json
from v4forge.images import containers
from v4forge.machine import facts
from v4forge.serving import client, metrics
from v4forge.serving.client import Endpoint, ask
from v4forge.serving.deployment import Deployment
from v4forge.serving.metrics import Counts
from v4forge.units import GIB

PACKAGES = ("torch", "transformers")
SETTLE_S = 5.0  # in which requests leave the queue whose client has left
BETWEEN_S = 0.05


@dataclass(frozen=True)
class Target:
    """An endpoint that is measured. `endpoints` are its replicas, each by itself, or the address where those are not
    known; `facts` is what the result file says of it."""

    url: str
    model: str
    endpoints: list[Endpoint]
    facts: dict[str, Any]
    key: str = field(default="", repr=False)

    @property
    def endpoint(self) -> Endpoint:
        """Where requests are sent: the address itself."""
        return Endpoint(0, self.url, self.key, pinned=False)

    def counts(self) -> Counts:
        """The counters of all replicas, added up. Raises UserError when one does not answer."""
        return metrics.total(client.metrics(each).counts for each in self.endpoints)

    def idle(self) -> bool:
        """Whether no request runs or waits, as far as the replicas tell."""
        readings = [client.metrics(each) for each in self.endpoints]
        return not any((each.running or 0) + (each.waiting or 0) for each in readings)

    def wait_until_idle(self, limit_s: float = SETTLE_S) -> None:
        """Raises UserError when requests of other clients run or wait there, which would be measured too."""
        end_s = time.monotonic() + limit_s
        while not self.idle():
            if time.monotonic() > end_s:
                fact = f"other requests run at {self.url}, and would be measured too"
                raise UserError(fact, "stop the other clients, then run the same command again")
            time.sleep(BETWEEN_S)


def look(url: str, key: str = "", folder: Path | None = None, artifact: Path | None = None, model: str = "") -> Target:
    """The model served at `url`, http://host:port; `model` says which, where there are several.

    folder: where its deployment is kept, if it is one of `make serve` on this machine; artifact: what it serves, where
    the server does not tell or this machine has it elsewhere. Raises UserError when nothing OpenAI-like answers.
    """
    url = client.address(url)
    at = Endpoint(0, url, key, pinned=False)
    with client.form_of(f"{url}/v1/models"):
        served = client.chosen(url, ask(at, "/v1/models")["data"], model)
        model, root, length = str(served["id"]), str(served.get("root") or ""), served.get("max_model_len")
    deployment = Deployment.load(folder) if folder else None
    if deployment and deployment.url != url:
        deployment = None
    place = artifact or (Path(deployment.artifact) if deployment else Path(root) if root else None)
    facts = {
        "url": url,
        "model": model,
        "max_model_len": length,
        "vllm": _version(deployment.endpoints[0] if deployment else at),
        "artifact": artifact_facts(place) if place else None,
        **_facts(deployment),
    }
    return Target(url, model, deployment.endpoints if deployment else [at], facts, key)


def planned(deployment: Deployment, vllm: str, options: Mapping[str, str]) -> dict[str, Any]:
    """What look() will say of servers that a bench is about to start, one after the other, with other drafts each.

    vllm: its version; options: the operator's settings, without the drafts.
    """
    return {
        "url": deployment.url,
        "model": deployment.serving.model,
        "max_model_len": deployment.serving.max_model_len,
        "vllm": vllm,
        "artifact": artifact_facts(Path(deployment.artifact)),
        **_facts(deployment),
        "drafts": None,
        "options": dict(options),
    }


def _facts(deployment: Deployment | None) -> dict[str, Any]:
    """What a deployment is; nothing where it is not known."""
    return {
        "replicas": deployment.replicas if deployment else None,
        "tensor_parallel": deployment.serving.tensor_parallel if deployment else None,
        "drafts": deployment.serving.drafts if deployment else None,
        "profile": deployment.profile if deployment else None,
        "backend": deployment.backend if deployment else None,
        "options": deployment.overrides if deployment else None,
        "image": _image(deployment),
    }


def artifact_facts(folder: Path) -> dict[str, Any] | None:
    """Which artifact is in a folder, and what verify said of it; None where the folder cannot be read here.

    `certificate` is ok, failed, stale (of other files), changed (a file is missing, cut, other or too many) or missing.
    """
    if not (folder / "config.json").is_file():
        return None
    shape = read_json(folder / "config.json")
    return {
        "folder": str(folder),
        "sums_sha256": artifact_folder.sums_sha256(folder),
        "config_sha256": sha256_of(folder / "config.json"),
        "certificate": artifact_folder.certificate_state(folder).verdict,
        **{name: shape.get(name) for name in ("num_hidden_layers", "hidden_size", "n_routed_experts")},
    }


def _version(at: Endpoint) -> str | None:
    """What the server calls itself at /version, which the router shows to this machine only."""
    try:
        return str(ask(at, "/version")["version"])
    except (UserError, KeyError, TypeError):
        return None


def _image(deployment: Deployment | None) -> dict[str, Any] | None:
    """The image that a deployment runs in."""
    if not deployment or deployment.runtime != "docker":
        return None
    found = containers.connect().client.images.get(deployment.image_id or deployment.image)
    digests: Iterable[str] = found.attrs.get("RepoDigests") or ()
    return {"reference": deployment.image, "id": found.id, "digests": sorted(digests)}


def machine() -> dict[str, Any]:
    """This machine as result files have it: GPUs and driver, processor, memory."""
    found = facts()
    return {
        **{name: found[name] for name in ("gpus", "driver", "cpu")},
        "cpus": found["cores"],
        "memory_gib": round(found["memory_bytes"] / GIB, 1),
    }


def versions(target: Mapping[str, Any] | None = None) -> dict[str, str | None]:
    """What measured: this checkout, Python; and the server's vLLM, as `target` tells."""
    return {
        "v4forge": checkout.revision("--untracked-files=no"),
        "python": platform.python_version(),
        "vllm": (target or {}).get("vllm"),
        **{package: _installed(package) for package in PACKAGES},
    }


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def sha256_of(value: Any) -> str:
    """The sha256 of a file's bytes, or of a value as JSON with sorted keys; in hex."""
    data = value.read_bytes() if isinstance(value, Path) else json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()
