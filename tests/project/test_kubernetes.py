"""docs/serving.md and docs/kubernetes: objects that Kubernetes takes, with the project's settings, image and guard."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import certified_artifact
import kubernetes_validate
import pytest
import yaml
from keys import keypair

from v4forge import certified, pins
from v4forge.images import lock_check, locks
from v4forge.serving import settings

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs/kubernetes"
DOC = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
LIST = yaml.safe_load((FOLDER / "replicas.yaml").read_text(encoding="utf-8"))
OBJECTS: list[dict[str, Any]] = [
    yaml.safe_load((FOLDER / "artifact.yaml").read_text(encoding="utf-8")),
    *LIST["items"],
]
VALUES = yaml.safe_load((FOLDER / "values.yaml").read_text(encoding="utf-8"))
ENGINE = VALUES["servingEngineSpec"]
MODEL = ENGINE["modelSpec"][0]
PRODUCTION = settings.serving(settings.PRODUCTION)
KEYS = "/keys/keys"
LOAD_S = 45 * 60
DIGEST = "ab" * 32
IMAGE = f"registry.example/v4forge/serve@sha256:{DIGEST}"


def of_kind(kind: str) -> dict[str, Any]:
    (found,) = [item for item in OBJECTS if item["kind"] == kind]
    return found


STATEFUL_SET = of_kind("StatefulSet")["spec"]
POD = STATEFUL_SET["template"]["spec"]
(REPLICA,) = POD["containers"]
(GUARD,) = POD["initContainers"]


def arguments(finish_s: int) -> list[str]:
    """The settings of production, but for how long a stopped replica may take to finish."""
    return settings.serving(settings.PRODUCTION, overrides={"shutdown-timeout": str(finish_s)}).arguments(
        "/artifact", 8000
    )


def plain(env: list[dict[str, Any]]) -> dict[str, str]:
    """The variables that are written out."""
    return {item["name"]: item["value"] for item in env if "value" in item}


def options(words: list[str]) -> set[tuple[str, ...]]:
    """A command line's options, each with its value."""
    return {tuple(option.split("\n")) for option in re.split(r"\n(?=--)", "\n".join(words))}


@pytest.mark.parametrize("version", ["1.29", kubernetes_validate.latest_version()])
@pytest.mark.parametrize("item", OBJECTS, ids=lambda item: f"{item['kind']} {item['metadata']['name']}")
def test_kubernetes_takes_every_object_and_knows_every_field(item: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(item, version, strict=True)


def test_a_field_that_kubernetes_does_not_know_is_refused() -> None:
    misspelt = json.loads(json.dumps(of_kind("StatefulSet")))
    misspelt["spec"]["template"]["spec"]["containers"][0]["startupProbes"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(misspelt, kubernetes_validate.latest_version(), strict=True)


def variables(replicas: int) -> dict[str, str]:
    """What a replica has in its environment: the settings', and what it has to know of who gets in."""
    return PRODUCTION.variables("/cache") | {"API_KEY_FILE": KEYS, "REPLICAS": str(replicas)}


def test_a_replica_is_told_what_the_production_profile_says() -> None:
    assert REPLICA["command"] == ["replica"]
    assert REPLICA["args"] == arguments(finish_s=300)
    assert plain(REPLICA["env"]) == variables(STATEFUL_SET["replicas"])


def test_the_chart_tells_a_replica_the_same() -> None:
    """The chart writes `serve <modelURL> --host --port`, and the words of two of its own settings."""
    written = MODEL["vllmConfig"]
    own = [MODEL["modelURL"], "--host", "0.0.0.0", "--port", "8000"]
    own += ["--tensor-parallel-size", str(written["tensorParallelSize"])]
    own += ["--enable-prefix-caching" if written["enablePrefixCaching"] else "--no-enable-prefix-caching"]
    assert options(own + written["extraArgs"]) == options(arguments(finish_s=25))
    assert plain(MODEL["env"]) == variables(MODEL["replicaCount"])


def test_a_replica_gets_the_gpus_that_it_splits_the_model_over() -> None:
    gpus = PRODUCTION.tensor_parallel
    assert REPLICA["resources"]["limits"]["nvidia.com/gpu"] == gpus == MODEL["requestGPU"]
    assert REPLICA["resources"]["requests"]["nvidia.com/gpu"] == gpus


@pytest.mark.parametrize("probe", [REPLICA["startupProbe"], ENGINE["startupProbe"]], ids=["objects", "chart"])
def test_the_first_answer_may_take_as_long_as_the_image_says(probe: dict[str, Any]) -> None:
    assert probe["periodSeconds"] * probe["failureThreshold"] >= LOAD_S
    assert "--start-period=45m" in (ROOT / "Dockerfile.serve").read_text(encoding="utf-8")


def test_a_stopped_replica_has_the_time_to_finish_its_requests() -> None:
    leave = int(REPLICA["lifecycle"]["preStop"]["exec"]["command"][1])
    finish = int(REPLICA["args"][REPLICA["args"].index("--shutdown-timeout") + 1])
    assert leave + finish < POD["terminationGracePeriodSeconds"]


def test_nothing_runs_as_root_or_may_become_it() -> None:
    for pod in (POD["securityContext"], ENGINE["securityContext"]):
        assert pod["runAsNonRoot"] is True
        assert pod["runAsUser"] == pod["runAsGroup"] == pod["fsGroup"] == 10000
    containers = [REPLICA["securityContext"], GUARD["securityContext"], ENGINE["containerSecurityContext"]]
    for container in containers:
        assert container["allowPrivilegeEscalation"] is False
        assert container["capabilities"] == {"drop": ["ALL"]}
    assert "USER 10000:10000" in (ROOT / "Dockerfile.serve").read_text(encoding="utf-8")


def test_the_artifact_is_mounted_read_only() -> None:
    claim = of_kind("PersistentVolumeClaim")["metadata"]["name"]
    for volumes, mounts in (
        (POD["volumes"], [*REPLICA["volumeMounts"], *GUARD["volumeMounts"]]),
        (MODEL["extraVolumes"], [*MODEL["extraVolumeMounts"], *MODEL["initContainer"]["extraVolumeMounts"]]),
    ):
        (volume,) = [volume for volume in volumes if volume["name"] == "artifact"]
        assert volume["persistentVolumeClaim"] == {"claimName": claim, "readOnly": True}
        assert all(mount["readOnly"] is True for mount in mounts if mount["name"] == "artifact")


def test_the_keys_come_from_a_secret_that_no_file_holds() -> None:
    for volumes, mounts in (
        (POD["volumes"], REPLICA["volumeMounts"]),
        (MODEL["extraVolumes"], MODEL["extraVolumeMounts"]),
    ):
        (secret,) = [volume["secret"] for volume in volumes if volume["name"] == "keys"]
        (mount,) = [mount for mount in mounts if mount["name"] == "keys"]
        assert "subPath" not in mount and mount["readOnly"] is True  # a changed Secret arrives
        assert secret["defaultMode"] == 0o440 and POD["securityContext"]["fsGroup"]  # who serves may read it
        folder, entry = str(mount["mountPath"]), Path(KEYS).name
        assert f"{folder}/{entry}" == KEYS
        assert f"kubectl create secret generic {secret['secretName']} --from-file={entry}=" in DOC
    router = VALUES["routerSpec"]["vllmApiKey"]
    assert router["secretName"] == secret["secretName"] and f"--from-file={router['secretKey']}=" in DOC
    assert "vllmApiKey" not in ENGINE and not [item for item in REPLICA["env"] if "API_KEY" in item["name"]][1:]
    assert not [item for item in OBJECTS if item["kind"] == "Secret"]


def test_every_service_finds_the_replicas() -> None:
    labels = STATEFUL_SET["template"]["metadata"]["labels"]
    services = [item for item in OBJECTS if item["kind"] == "Service"]
    assert all(service["spec"]["selector"].items() <= labels.items() for service in services)
    assert STATEFUL_SET["serviceName"] in {service["metadata"]["name"] for service in services}
    ports = {port["name"] for port in REPLICA["ports"]}
    assert all(port["targetPort"] in ports for service in services for port in service["spec"]["ports"])


def test_the_document_says_what_each_profile_is_for() -> None:
    rows = dict(re.findall(r"^\| `([a-z-]+)` \| ([^|]+) \|$", DOC, flags=re.MULTILINE))
    assert {name: rows.get(name) for name in settings.profiles()} == settings.profiles()


# Stand-ins for a cluster: both keep what they are given.
PROGRAMS = {
    "kubectl": "cat >applied",
    "helm": 'echo "$@" >arguments; while [ "$1" != --values ]; do shift; done; cp "$2" applied',
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    shutil.copytree(FOLDER, tmp_path / "docs/kubernetes")
    shutil.copy(ROOT / "versions.env", tmp_path)
    (tmp_path / "scratch").mkdir()
    for name, program in PROGRAMS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{program}\n", encoding="utf-8")
        path.chmod(0o755)
    return tmp_path


def run_documented(name: str, checkout: Path) -> subprocess.CompletedProcess[str]:
    """The command of docs/serving.md that reads the file, in the checkout."""
    (block,) = [text for text in re.findall(r"(?:^ {4}.*\n)+", DOC, flags=re.MULTILINE) if f"/{name}" in text]
    path = f"{checkout}/bin:/usr/bin:/bin"
    environment = {"PATH": path}
    return subprocess.run(
        ["sh", "-c", block], cwd=checkout, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )


def test_the_documents_command_takes_the_keys_and_the_routers_own(checkout: Path) -> None:
    (checkout / "api-keys.txt").write_text("ann:open\nrouter:sesame\n", encoding="utf-8")
    (checkout / "bin/kubectl").write_text('#!/bin/sh\necho "$@" >>asked; [ "$1" = apply ] || cat >>applied\n')
    done = run_documented("artifact.yaml", checkout)
    assert done.returncode == 0, done.stderr
    assert (checkout / "applied").read_text(encoding="utf-8") == "sesame"
    assert "--from-file=keys=api-keys.txt" in (checkout / "asked").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["replicas.yaml", "values.yaml"])
def test_the_documents_command_puts_the_locked_image_in(name: str, checkout: Path) -> None:
    (checkout / "images.lock").write_text(f"SERVE_IMAGE={IMAGE}\n", encoding="utf-8")
    done = run_documented(name, checkout)
    assert done.returncode == 0, done.stderr
    applied = (checkout / "applied").read_text(encoding="utf-8")
    images = re.findall(r" image: (\S+)", applied)
    if name == "values.yaml":
        model = yaml.safe_load(applied)["servingEngineSpec"]["modelSpec"][0]
        images.append(f"{model['repository']}:{model['tag']}")
        assert f"--version {pins.read()['VLLM_STACK_VERSION']} " in (checkout / "arguments").read_text(encoding="utf-8")
    assert images == [IMAGE, IMAGE]


@pytest.mark.parametrize("name", ["replicas.yaml", "values.yaml"])
def test_without_a_pushed_image_the_command_says_so_and_applies_nothing(name: str, checkout: Path) -> None:
    (checkout / "images.lock").write_text("SERVE_IMAGE=\n", encoding="utf-8")
    done = run_documented(name, checkout)
    assert done.returncode != 0
    assert "SERVE_IMAGE: is empty: make push" in done.stderr
    assert not (checkout / "applied").exists()


def test_no_image_is_written_out() -> None:
    for file in FOLDER.iterdir():
        text = file.read_text(encoding="utf-8")
        assert not lock_check.IMAGE_FORMS["IMAGE"].search(text)
        assert set(re.findall(r"image: (\S+)", text)) <= {"SERVE_IMAGE", "SERVE_IMAGE_NAME:SERVE_IMAGE_DIGEST"}


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return certified_artifact.write(tmp_path / "work")


def guard(artifact: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The init container's command, on a folder of this machine in the place of each that it mounts."""
    places = {"/artifact": str(artifact), "/cache/certified.json": str(artifact.parent / "cache/certified.json")}
    python, *words = [places.get(word, word) for word in GUARD["command"]]
    assert python == "python" and set(places) <= set(GUARD["command"])
    return subprocess.run([sys.executable, *words, *options], cwd=ROOT, capture_output=True, text=True)


def test_the_guard_lets_a_certified_artifact_pass_and_writes_only_into_its_cache(artifact: Path) -> None:
    before = sorted(artifact.parent.rglob("*"))
    done = guard(artifact)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("certified: 11 files, 0.2 MB, by content")
    added = {path.name for path in artifact.parent.rglob("*") if path not in before and not path.name.startswith(".")}
    assert added == {"cache", "certified.json"}


def without_certificate(artifact: Path) -> None:
    (artifact / "certificate.json").unlink()


def empty(artifact: Path) -> None:
    (artifact / "certificate.json").write_bytes(b"")


def of_nothing(artifact: Path) -> None:
    (artifact / "certificate.json").write_text("{}", encoding="utf-8")


def failed(artifact: Path) -> None:
    certified_artifact.seal(artifact, ok=False)


def other_files(artifact: Path) -> None:
    (artifact / "SHA256SUMS").write_text("11  model.safetensors\n", encoding="utf-8")


def cut(artifact: Path) -> None:
    path = artifact / "model-00002-of-00005.safetensors"
    path.write_bytes(path.read_bytes()[:20_000])


def missing(artifact: Path) -> None:
    (artifact / "model-00002-of-00005.safetensors").unlink()


def overwritten(artifact: Path) -> None:
    with open(artifact / "model-00002-of-00005.safetensors", "r+b") as file:
        file.seek(20_000)
        file.write(b"other")


@pytest.mark.parametrize(
    "spoil", [without_certificate, empty, of_nothing, failed, other_files, cut, missing, overwritten]
)
def test_the_guard_refuses_another_artifact(spoil: Any, artifact: Path) -> None:
    spoil(artifact)
    done = guard(artifact)
    assert done.returncode == 1
    error, hint = done.stderr.splitlines()
    assert error.startswith("error: ") and hint.startswith("hint: python -m scripts.verify --artifact ")


def test_the_guards_program_is_in_the_image_and_needs_nothing_that_it_lacks(artifact: Path) -> None:
    assert "cp -R --parents LICENSE docker/serve/settings.toml models scripts v4forge" in (
        ROOT / "Dockerfile.serve"
    ).read_text(encoding="utf-8")
    here, there = (
        locks.parse((ROOT / locks.lock_file(name)).read_text(encoding="utf-8")) for name in ("host", "serve")
    )
    lacking = {locks.package_of(line) for line in here} - {locks.package_of(line) for line in there}
    absent = sorted(
        module
        for module, packages in packages_distributions().items()
        if all(name.lower().replace("_", "-") in lacking for name in packages)
    )
    assert "securesystemslib" in absent
    private, public = keypair(artifact.parent)
    certified.sign(artifact, private)
    program = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({absent}))
runpy.run_module("scripts.certified", run_name="__main__")
"""
    words = [sys.executable, "-c", program, "check", str(artifact), "--verify-key", str(public)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"signed by {public}" in done.stdout


def test_the_chart_has_the_same_guard() -> None:
    assert MODEL["initContainer"]["command"] == GUARD["command"]
    mounts = {mount["name"]: mount["mountPath"] for mount in MODEL["initContainer"]["extraVolumeMounts"]}
    assert mounts == {mount["name"]: mount["mountPath"] for mount in GUARD["volumeMounts"]}
