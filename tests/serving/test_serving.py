"""Settings, deployments and what is made of them: commands, variables, configurations. Nothing is started."""

from __future__ import annotations

import argparse
import configparser
import dataclasses
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nvml_stand_in
import pytest
import yaml
from nvml_stand_in import Card, NvmlLibrary
from supervisor.options import ServerOptions

from scripts import benching, serve_options
from scripts import serve as program
from v4forge import gpus, pins
from v4forge.errors import UserError
from v4forge.images import refusals
from v4forge.serving import compose, haproxy, launch, preflight, settings
from v4forge.serving.client import PIN
from v4forge.serving.compose import Compose
from v4forge.serving.deployment import CONFIGURATION, PAGE, STATE, Deployment
from v4forge.serving.settings import DRAFT_METHOD, DRAFTS
from v4forge.serving.supervisord import Supervised

ROOT = Path(__file__).resolve().parents[2]
SERVICES = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]
TOPOLOGY = gpus.Topology({(a, b): "NV18" for b in range(8) for a in range(b)}, {n: str(n // 4) for n in range(8)})
UUIDS = [f"GPU-{letter * 8}-0000-0000-0000-000000000000" for letter in "abcdefgh"]


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host of eight GPUs, all joined alike, and a shell of no scheduler."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(gpus, "topology", lambda: TOPOLOGY)
    nvml_stand_in.put(monkeypatch, NvmlLibrary([Card(uuid) for uuid in UUIDS]))


def deployment(folder: Path, **changes: Any) -> Deployment:
    given = {"folder": str(folder), "artifact": "/a/artifact", "runtime": "docker", "image": "v4forge-serve:local"}
    return Deployment(**(given | {"gpus": [["0", "1"], ["2", "3"]]} | changes))


def asked_for(*arguments: str) -> Deployment:
    """What `make serve` would start with these options."""
    return launch.deployment_of(serve_options.wanted(program.parse(["print", *arguments])))


# --- settings


def test_the_published_profile_is_the_published_command() -> None:
    words = settings.serving().arguments("/a", 8000)
    published = "--tensor-parallel-size 2 --kv-cache-dtype fp8 --block-size 256 --max-model-len 4096"
    published += " --gpu-memory-utilization 0.8 --no-enable-prefix-caching --tokenizer-mode deepseek_v4"
    published += " --tool-call-parser deepseek_v4 --enable-auto-tool-choice --reasoning-parser deepseek_v4"
    assert published in " ".join(words)
    assert not [word for word in words if "trust" in word]
    assert settings.serving().drafts == 1


@pytest.mark.parametrize("profile", settings.profiles())
@pytest.mark.parametrize("backend", ["cuda", "cpu"])
def test_every_row_says_why_and_from_where(profile: str, backend: str) -> None:
    chosen = settings.serving(profile, backend)
    assert all(row.why and row.source for row in (*chosen.settings.values(), *chosen.environment.values()))
    assert all(settings.WORD.fullmatch(word) for word in chosen.arguments("/a", 8000))


def test_an_override_wins_over_the_profile_and_the_backend() -> None:
    chosen = settings.serving("latency", "cpu", {"max-model-len": "77", "enforce-eager": "", "new-option": "true"})
    words = " ".join(chosen.arguments("/a", 8000))
    assert "--max-model-len 77" in words and "--new-option" in words and "--enforce-eager" not in words


def test_what_is_served_for_use_is_the_production_profile_and_benches_ask_for_the_published() -> None:
    made = asked_for("--backend", "cpu")
    assert made.profile == settings.PRODUCTION == "production"
    chosen = settings.serving(made.profile)
    assert chosen.max_model_len == 65536 and chosen.value("enable-prefix-caching") is True and chosen.drafts == 3
    asked = argparse.ArgumentParser()
    benching.add_arguments(asked)
    assert asked.parse_args([]).serve_profile == settings.PUBLISHED == "published"


@pytest.mark.parametrize("drafts", [1, 2, 3, 5])
def test_drafts_that_stop_paying_are_switched_off_whatever_their_number(drafts: int) -> None:
    chosen = settings.serving("production", overrides={DRAFTS: str(drafts)})
    assert chosen.drafts == drafts and chosen.value(settings.SCHEDULE) == f"[[1,8,{drafts}],[9,256,0]]"
    given = settings.serving("production", overrides={DRAFTS: str(drafts), settings.SCHEDULE: "[[1,256,1]]"})
    assert given.value(settings.SCHEDULE) == "[[1,256,1]]"


@pytest.mark.parametrize("profile", settings.profiles())
def test_answers_say_how_many_drafts_were_accepted_where_any_are_made_but_for_the_published(profile: str) -> None:
    told = settings.serving(profile).value(settings.DRAFTS_TOLD)
    assert told == ("" if profile == settings.PUBLISHED else "summary")
    assert not settings.serving(profile, overrides={DRAFTS: "0"}).value(settings.DRAFTS_TOLD)


SIZES = '{"num_hidden_layers": %d, "hidden_size": %d, "n_routed_experts": %d}'


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (SIZES % (43, 4096, 256), "deepseek-v4-flash-w4a16"),
        ((ROOT / "models/tiny/config.json").read_text(encoding="utf-8"), "deepseek-v4-tiny-w4a16"),
        (SIZES % (61, 7168, 384), "deepseek-v4-w4a16"),
        ("{}", "deepseek-v4-flash-w4a16"),
    ],
)
def test_no_other_model_is_served_as_flash(tmp_path: Path, config: str, name: str) -> None:
    (tmp_path / "config.json").write_text(config)
    words = ["--backend", "cpu", "--artifact", str(tmp_path)]
    assert asked_for(*words).serving.model == name
    assert asked_for(*words, "--set", "served-model-name=mine").serving.model == "mine"


@pytest.mark.parametrize("off", [{DRAFTS: "0"}, {DRAFT_METHOD: ""}])
def test_without_drafts_nothing_of_speculation_is_left(off: dict[str, str]) -> None:
    chosen = settings.serving("throughput", overrides=off)
    assert chosen.drafts == 0
    assert "speculative" not in " ".join(chosen.arguments("/a", 8000))


def test_a_switch_within_a_json_option_is_a_value() -> None:
    words = settings.serving(overrides={"kernel-config.enable_jit_warmup": "false"}).arguments("/a", 8000)
    assert words[-2:] == ["--kernel-config.enable_jit_warmup", "false"]


@pytest.mark.parametrize("setting", [("max len", "1"), ("x", "a b"), ("x", "$HOME"), ("--x", "1")])
def test_what_would_not_stay_one_word_is_refused(setting: tuple[str, str]) -> None:
    with pytest.raises(UserError, match="is not an option of vllm serve and a word"):
        settings.serving(overrides=dict([setting]))


def test_an_unknown_profile_is_told_which_there_are() -> None:
    with pytest.raises(UserError) as error:
        settings.serving("fast")
    assert "latency" in error.value.hint


# --- the router


def check_by_haproxy(made: Deployment) -> None:
    """That it takes what the deployment keeps for it. Nothing where there is none: the tests that serve say so."""
    written = Path(made.folder) / CONFIGURATION
    written.parent.mkdir()
    made.write_router()
    # Where a container sees it.
    written.write_text(written.read_text().replace(f'"/{PAGE}"', f'"{made.folder}/{PAGE}"'))
    if haproxy := shutil.which("haproxy", path="/usr/sbin:/usr/bin:/usr/local/sbin"):
        done = subprocess.run([haproxy, "-c", "-f", written], capture_output=True, text=True)
        assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr


@pytest.mark.parametrize("profile", ["production", "published"])
@pytest.mark.parametrize("runtime", ["docker", "host"])
def test_haproxy_accepts_the_configuration(tmp_path: Path, runtime: str, profile: str) -> None:
    made = deployment(tmp_path, runtime=runtime, profile=profile)
    text = made.router_configuration()
    assert ("stick match" in text) == (profile == "production")
    assert text.count("use-server") == 2
    check_by_haproxy(made)


def test_clients_cannot_choose_a_replica_on_the_public_address(tmp_path: Path) -> None:
    public = deployment(tmp_path).router_configuration().split("frontend public")[1].split("frontend admin")[0]
    assert f"http-request del-header {PIN}" in public
    assert "deny status 404 unless { path_beg /v1/ }" in public


@pytest.mark.parametrize(
    ("options", "running", "waiting"),
    [
        ({"profile": "production"}, 256, 256),
        ({"profile": "latency"}, 16, 128),
        ({"profile": "published"}, 1024, 1024),
        ({"profile": "production", "waiting": 0}, 256, 0),
        ({"profile": "production", "overrides": {"max-num-seqs": "32"}}, 32, 128),
    ],
)
def test_the_router_lets_in_what_a_replica_computes_and_as_much_again(
    tmp_path: Path, options: dict[str, Any], running: int, waiting: int
) -> None:
    served = deployment(tmp_path, **options)
    assert (served.limits.running, served.limits.waiting) == (running, waiting)
    assert f"mul({running + waiting})" in served.router_configuration()


def test_without_prefix_caching_no_conversation_has_a_replica(tmp_path: Path) -> None:
    off = deployment(tmp_path, profile="production", overrides={"enable-prefix-caching": "false"})
    assert "stick match" not in off.router_configuration()


# --- deployments


def test_a_deployment_is_kept_as_it_was(tmp_path: Path) -> None:
    kept = deployment(tmp_path, overrides={"b": "1", "a": "2"}, gpus=(("0", "1"),))
    kept.save()
    assert kept.differing(Deployment.load(tmp_path) or deployment(tmp_path)) == []
    assert kept.differing(dataclasses.replace(kept, port=9)) == ["port"]
    kept.forget()
    assert Deployment.load(tmp_path) is None


def test_a_deployment_of_another_version_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / STATE).write_text('{"former": 1}')
    with pytest.raises(UserError, match="was written by another version"):
        Deployment.load(tmp_path)


def by_index(groups: Sequence[Sequence[str]]) -> list[list[int]]:
    return [[UUIDS.index(uuid) for uuid in group] for group in groups]


@pytest.mark.parametrize(
    ("arguments", "placed"),
    [
        ([], [[0, 1], [2, 3], [4, 5], [6, 7]]),
        (["--replicas", "2"], [[0, 1], [2, 3]]),
        (["--devices", "6,7,4,5"], [[6, 7], [4, 5]]),
        (["--devices", "3,1,2"], [[3, 1]]),
        (["--devices", f"{UUIDS[5]},GPU-b"], [[5, 1]]),
        (["--tp", "1"], [[n] for n in range(8)]),
        (["--tp", "4"], [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (["--tp", "8"], [[*range(8)]]),
        (["--set", "tensor-parallel-size=4", "--replicas", "1"], [[0, 1, 2, 3]]),
    ],
)
@pytest.mark.parametrize("runtime", ["docker", "host"])
@pytest.mark.usefixtures("eight")
def test_replicas_get_their_gpus_by_uuid(arguments: list[str], placed: list[list[int]], runtime: str) -> None:
    made = asked_for(*arguments, "--runtime", runtime)
    assert by_index(made.gpus) == placed and made.runtime == runtime


def test_a_group_of_four_is_of_one_numa_node(monkeypatch: pytest.MonkeyPatch, eight: None) -> None:
    crossed = dataclasses.replace(TOPOLOGY, numa={n: str(n % 2) for n in range(8)})
    monkeypatch.setattr(gpus, "topology", lambda: crossed)
    assert by_index(asked_for("--tp", "4").gpus) == [[0, 2, 4, 6], [1, 3, 5, 7]]


@pytest.mark.parametrize(
    ("visible", "placed"), [("4,5,2,3", [[2, 3], [4, 5]]), (f"{UUIDS[7]},{UUIDS[6]}", [[6, 7]]), ("3", None)]
)
def test_the_gpus_of_a_scheduler_are_all_that_is_used(
    monkeypatch: pytest.MonkeyPatch, eight: None, visible: str, placed: list[list[int]] | None
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert by_index(asked_for("--devices", "0,1").gpus) == [[0, 1]]
    if placed:
        assert by_index(asked_for().gpus) == placed
        return
    with pytest.raises(UserError, match=r"need 2, there are 1 \(hint: make serve TP=1\)"):
        asked_for()


def test_on_a_cpu_replicas_have_no_gpus_and_without_a_driver_they_have_their_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nvml_stand_in.put(monkeypatch, None)
    on_cpu = asked_for("--backend", "cpu", "--replicas", "3")
    assert on_cpu.gpus == [[], [], []] and on_cpu.runtime == "host"
    assert asked_for("--devices", "6,7,4,5").gpus == [["6", "7"], ["4", "5"]]


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (["--devices", "0,0"], "DEVICES=0,0 names a GPU twice"),
        (["--devices", f"0,{UUIDS[0]}"], f"DEVICES=0,{UUIDS[0]} names a GPU twice"),
        (["--devices", "a"], "DEVICES=a is not a list of GPUs"),
        (["--devices", "0,9"], "there is no GPU 9"),
        (["--devices", "0,GPU-"], "GPU- is the beginning of 8 GPUs' UUIDs"),
        (["--devices", "0,MIG-1c3a"], "MIG-1c3a is a slice of a GPU, by MIG; a replica takes whole ones"),
        (["--devices", "0"], "1 replicas of 2 GPUs need 2, there are 1"),
        (["--devices", "0,1,2,3", "--replicas", "3"], "3 replicas of 2 GPUs need 6, there are 4"),
        (["--tp", "3"], "a replica takes 1, 2, 4, 8 GPUs, not 3"),
        (["--set", "tensor-parallel-size=two"], "a replica takes 1, 2, 4, 8 GPUs, not two"),
        (["--backend", "cpu", "--metrics"], "Prometheus and Grafana run in containers"),
    ],
)
@pytest.mark.usefixtures("eight")
def test_what_cannot_be_is_told_with_a_hint(arguments: list[str], fact: str) -> None:
    with pytest.raises(UserError) as error:
        asked_for(*arguments)
    assert error.value.fact == fact and error.value.hint


@pytest.mark.parametrize(
    ("visible", "fact"),
    [
        ("", "CUDA_VISIBLE_DEVICES= leaves no GPU"),
        ("-1", "CUDA_VISIBLE_DEVICES=-1 leaves no GPU"),
        ("MIG-7f2e", "MIG-7f2e is a slice of a GPU, by MIG; a replica takes whole ones"),
        ("0,0", "CUDA_VISIBLE_DEVICES=0,0 names a GPU twice"),
    ],
)
def test_what_a_scheduler_gives_and_cannot_be_is_told(
    monkeypatch: pytest.MonkeyPatch, eight: None, visible: str, fact: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(UserError) as error:
        asked_for()
    assert error.value.fact == fact and "make serve DEVICES=" in error.value.hint


def test_a_hint_names_variables_that_the_makefile_has() -> None:
    known = set(re.findall(r"^([A-Z_]+) :=", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    sources = [*(ROOT / "v4forge/serving").glob("*.py"), ROOT / "v4forge/gpus.py", ROOT / "v4forge/images/refusals.py"]
    named: set[str] = set()
    for source in sources:
        for command in re.findall(r"make serve[\w-]*((?: [A-Z_]+=[^\s\"',;]*)+)", source.read_text(encoding="utf-8")):
            named |= set(re.findall(r"([A-Z_]+)=", command))
    assert {"TP", "REPLICAS", "DEVICES"} <= named <= known


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} on 127.0.0.1 is taken"):
            preflight.check_ports(deployment(tmp_path, port=port))
    with pytest.raises(UserError, match=r"cannot listen on 192\.0\.2\.1"):
        preflight.check_ports(deployment(tmp_path, port=port, bind="192.0.2.1"))


def test_a_guard_may_be_left_out_by_name_and_says_what_it_found(tmp_path: Path) -> None:
    said: list[str] = []
    nothing = deployment(tmp_path, backend="cpu", gpus=[[]])
    with pytest.raises(UserError, match="there is no artifact"):
        preflight.check(nothing, [], said.append)
    preflight.check(nothing, ["certificate"], said.append)
    assert said == ["serve: allowed by ALLOW=certificate: there is no artifact in /a/artifact"]


# --- compose


def test_every_variable_of_compose_yaml_gets_a_value(tmp_path: Path) -> None:
    text = (ROOT / "compose.yaml").read_text(encoding="utf-8")
    given = Compose(deployment(tmp_path)).variables()
    own = {"PROMETHEUS_PORT", "GRAFANA_PORT"}  # only an operator sets these
    assert set(re.findall(r"\$\{(\w+)", text)) - own <= given.keys()
    assert given["PROMETHEUS_IMAGE"] == pins.read()["PROMETHEUS_IMAGE"]


@pytest.mark.parametrize("width", settings.WIDTHS)
def test_compose_starts_the_replicas_that_fit_each_on_its_gpus(tmp_path: Path, width: int) -> None:
    groups = [UUIDS[first : first + width] for first in range(0, 8, width)]
    kept = Compose(deployment(tmp_path, gpus=groups))
    kept.check()
    placed = yaml.safe_load(kept.replicas())["services"]
    assert [asked_of(service)["device_ids"] for service in placed.values()] == groups
    profiles = {word.removeprefix("--profile=") for word in kept.command("up") if word.startswith("--profile=")}
    started = {name for name, service in SERVICES.items() if profiles.issuperset(service.get("profiles", ()))}
    assert started == {*kept.deployment.names, "router"}


def test_compose_reads_what_is_written_for_it(tmp_path: Path) -> None:
    folder = tmp_path / "with a blank"
    artifact = tmp_path / "an artifact, (1)"
    folder.mkdir()
    kept = Compose(deployment(folder, artifact=str(artifact), gpus=[UUIDS[:4], UUIDS[4:]], bind="::1"))
    kept.write()
    done = subprocess.run(kept.command("config"), capture_output=True, text=True, env=kept._environment())
    services = yaml.safe_load(done.stdout)["services"]
    assert [asked_of(services[name])["device_ids"] for name in kept.deployment.names] == [UUIDS[:4], UUIDS[4:]]
    assert "deploy" not in services["router"]
    assert services["replica1"]["command"] == kept.deployment.arguments(1)
    mounts = {each["target"]: each for each in services["replica0"]["volumes"] if "cache0" not in str(each)}
    assert {target: each["source"] for target, each in mounts.items()} == {
        str(artifact): str(artifact),
        "/keys": f"{folder}/keys",
    }
    assert all(each["read_only"] is True for each in mounts.values())
    assert re.search(r"::1\]?:8000:8000|host_ip: ::1", done.stdout)


def test_containers_have_the_groups_and_a_cache_of_who_starts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Compose(deployment(tmp_path))
    for uid, groups, added in ((1000, [1000, 50, 27], ["27", "50"]), (1000, [1000], None), (0, [0, 50], None)):
        monkeypatch.setattr(os, "getuid", lambda uid=uid: uid)
        monkeypatch.setattr(os, "getgid", lambda uid=uid: uid)
        monkeypatch.setattr(os, "getgroups", lambda groups=groups: groups)
        service = json.loads(kept.replicas())["services"]["replica0"]
        assert service.get("group_add") == added
        user = uid or 10000
        assert kept.variables()["SERVE_USER"] == f"{user}:{user}"
        assert kept.deployment.variables(0)["TRITON_CACHE_DIR"] == f"/cache/{user}/triton"


def asked_of(service: dict[str, Any]) -> dict[str, Any]:
    """The GPUs that a service of a compose file asks for."""
    (asked,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert asked["driver"] == "nvidia" and asked["capabilities"] == ["gpu"]
    return asked


def test_a_replica_shares_memory_with_nothing_else_of_the_machine() -> None:
    replicas = {name: service for name, service in SERVICES.items() if name.startswith("replica")}
    assert len(replicas) == 8
    assert all("ipc" not in service and service["shm_size"] == "16gb" for service in replicas.values())
    assert all(service["labels"] for service in SERVICES.values())


def test_no_service_has_more_rights_than_it_needs() -> None:
    for name, service in SERVICES.items():
        assert service["cap_drop"] == ["ALL"] and "no-new-privileges:true" in service["security_opt"], name
        assert service["restart"] == "unless-stopped" and service["logging"]["options"]["max-size"], name
        assert all(re.match(r"\$\{BIND:-127\.0\.0\.1\}|127\.0\.0\.1:", port) for port in service.get("ports", [])), name


def test_a_command_of_compose_comes_out_as_the_words_that_went_in(tmp_path: Path) -> None:
    chosen = deployment(tmp_path, profile="throughput", artifact="/a/folder of mine")
    (command,) = {tuple(each["command"]) for each in json.loads(Compose(chosen).replicas())["services"].values()}
    assert list(command) == chosen.arguments(0)


def test_more_replicas_than_compose_yaml_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"compose\.yaml has 8 replicas, not 9"):
        Compose(deployment(tmp_path, gpus=[["0"]] * 9)).check()


def test_what_compose_does_not_take_is_refused_before_anything_is_kept(tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text("services: {replica0: {no-such-thing: 1}}\n")
    with pytest.raises(UserError, match="docker failed"):
        Compose(deployment(tmp_path, compose=[str(tmp_path / "more.yaml")])).write()


DOCKER = """#!/bin/sh
echo "$@" >>{folder}/asked
case "$1 $2 $4" in
    "ps "*) grep -qs rm {folder}/asked || echo "container${{5##*=}}" ;;
    "network ls"*) echo net1 net2 ;;
esac
"""


@pytest.mark.parametrize(
    ("kept", "label"),
    [
        (
            '{"runtime": "docker", "port": 9, "former": 1, "gpus": [["0"]]}',
            "com.docker.compose.project=v4forge-9",
        ),
        ('{"runtime": "docker", "port": 90', "v4forge.folder={folder}"),
    ],
)
def test_a_stop_needs_no_valid_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kept: str, label: str
) -> None:
    (tmp_path / "docker").write_text(DOCKER.format(folder=tmp_path))
    (tmp_path / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / STATE).write_text(kept)
    with pytest.raises(UserError) as error:
        Deployment.load(tmp_path)
    assert error.value.hint == "make serve-stop"
    launch.stop(tmp_path)
    assert capsys.readouterr().out.splitlines()[-1] == "serve: stopped" and not (tmp_path / STATE).exists()
    asked = (tmp_path / "asked").read_text().splitlines()
    assert all(f"--filter=label={label.format(folder=tmp_path)}" in line for line in asked if " --quiet " in line)
    ends = [line for line in asked if " --quiet " not in line]
    assert ends == [
        "stop -t 600 containerrouter",
        "stop -t 0 containerreplica0",
        "stop -t 60 container",
        "rm --force container",
        "network rm net1 net2",
    ]


@pytest.mark.parametrize("refusal", refusals.OF_A_DEPLOYMENT)
def test_what_docker_refuses_is_a_fact_and_a_command(refusal: refusals.Refusal) -> None:
    error = compose._explained(f"ERROR: for replica0  Error response from daemon: {refusal.pattern} …")
    assert (error.fact, error.hint) == (refusal.fact, refusal.hint)


# --- supervisord


def test_supervisord_gets_each_process_with_its_gpus_and_drains_the_router(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path=None: f"/usr/sbin/{name}")
    config = configparser.RawConfigParser()
    config.read_string(Supervised(deployment(tmp_path, runtime="host", program="/p")).configuration())
    first, second, balancer = (config[f"program:{name}"] for name in ("replica0", "replica1", "router"))
    assert first["command"].split()[1:] == deployment(tmp_path, runtime="host").arguments(0)
    assert (
        'CUDA_VISIBLE_DEVICES="0,1"' in first["environment"] and 'CUDA_VISIBLE_DEVICES="2,3"' in second["environment"]
    )
    assert 'CUDA_DEVICE_ORDER="PCI_BUS_ID"' in first["environment"]
    assert (
        f"{tmp_path}/cache/0/triton" in first["environment"] and f"{tmp_path}/cache/1/triton" in second["environment"]
    )
    assert balancer["stopsignal"] == "USR1" and int(balancer["stopwaitsecs"]) > 600
    assert all(row["autorestart"] == "true" for row in (first, second, balancer))


def test_supervisord_reads_a_folder_with_a_blank_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path=None: f"/opt/a b/{name}")
    folder = tmp_path / "a b"
    artifact, program = f"{folder}/artifact, 100%", str(tmp_path)
    kept = Supervised(deployment(folder, runtime="host", artifact=artifact, program=program))
    kept.write()
    options = ServerOptions()
    options.realize(["-c", str(folder / "supervisord.conf")])
    processes = {process.name: process for group in options.process_group_configs for process in group.process_configs}
    assert shlex.split(processes["replica0"].command)[1:] == kept.deployment.arguments(0)
    assert shlex.split(processes["router"].command) == kept.process("router")[0]
    assert processes["replica0"].environment == kept.process("replica0")[1]
    assert processes["replica0"].stdout_logfile == f"{folder}/logs/replica0.log"
    assert " " not in processes["replica0"].environment["TORCHINDUCTOR_CACHE_DIR"]  # of which g++ is told


def test_an_environment_that_no_compiler_would_find_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b/vllm").touch()
    with pytest.raises(UserError, match="do not take the blank in"):
        Supervised(deployment(tmp_path, runtime="host", program=f"{tmp_path}/a b")).check()


@pytest.mark.parametrize("path", ['/a/"b"', "/a/$b", "/a/b #c", "/a ;b", "/a\nb", "/a\\b"])
def test_a_path_that_would_not_stay_as_it_is_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(UserError, match="special character"):
        deployment(tmp_path, artifact=path).arguments(0)


@pytest.mark.parametrize(
    ("bind", "url", "listens"),
    [
        ("::", "http://[::1]:8000", "bind [::]:8000"),
        ("::1", "http://[::1]:8000", "bind [::1]:8000"),
        ("[::1]", "http://[::1]:8000", "bind [::1]:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000", "bind 0.0.0.0:8000"),
    ],
)
def test_an_address_of_ipv6_is_written_as_one(tmp_path: Path, bind: str, url: str, listens: str) -> None:
    made = asked_for("--backend", "cpu", "--bind", bind, "--folder", str(tmp_path))
    assert made.url == url and listens in made.router_configuration()
    assert Compose(made).variables()["BIND"] == listens.removeprefix("bind ").removesuffix(":8000")
    check_by_haproxy(made)


def test_kernels_are_compiled_with_the_compiler_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path=None: f"/usr/sbin/{name}")
    kept = Supervised(deployment(tmp_path, runtime="host", program=str(tmp_path / ".venv-serve/bin")))
    assert "CUDA_HOME" not in kept.process("replica0")[1]
    (tmp_path / ".venv-serve/cuda/bin").mkdir(parents=True)
    variables = kept.process("replica0")[1]
    assert variables["CUDA_HOME"] == f"{tmp_path}/.venv-serve/cuda"
    path = variables["PATH"].split(":")
    assert (path[0], path[-1]) == (f"{tmp_path}/.venv-serve/bin", f"{tmp_path}/.venv-serve/cuda/bin")


@pytest.mark.parametrize(("backend", "build"), [("cuda", "make env-serve"), ("cpu", "make env-serve-cpu")])
def test_without_a_vllm_there_is_the_command_that_builds_one(tmp_path: Path, backend: str, build: str) -> None:
    with pytest.raises(UserError, match="there is no vllm in") as error:
        Supervised(deployment(tmp_path, runtime="host", backend=backend, program=str(tmp_path))).check()
    assert error.value.hint == build
    assert re.search(rf"^{build.split()[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)


def test_without_haproxy_there_is_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    with pytest.raises(UserError) as error:
        Supervised(deployment(tmp_path, runtime="host")).configuration()
    assert error.value.hint == "apt-get install haproxy"


def test_print_shows_the_exact_command_of_each_replica(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml_stand_in.put(monkeypatch, None)
    program.print_commands(program.parse(["--print", "--devices", "0,1,2,3", "--artifact", "/a"]))
    shown = capsys.readouterr().out
    for number, devices in enumerate(("0,1", "2,3")):
        block = shown.split(f"replica{number}:\n")[1].split("\n\n")[0]
        assert f"CUDA_VISIBLE_DEVICES={devices}" in block
        assert shlex.split(block.split("vllm serve ")[1]) == settings.serving("production").arguments("/a", 8000)


def test_the_admin_listener_is_never_public(tmp_path: Path) -> None:
    text = deployment(tmp_path, runtime="host", bind="0.0.0.0").router_configuration()
    assert "bind 0.0.0.0:8000" in text and "bind 127.0.0.1:8001" in text
    assert haproxy.Addresses("*:8000", "*:8001", []).resolver == ""


def test_the_operators_traces_endpoint_reaches_vllm() -> None:
    words = ["--set", "otlp-traces-endpoint=http://collector:4317", "enable-log-requests=true"]
    parser = argparse.ArgumentParser()
    serve_options.add_wanted(parser)
    asked = parser.parse_args(words)
    told = settings.serving(asked.serve_profile, "cuda", dict(asked.set)).arguments("/a", 8000)
    assert told[told.index("--otlp-traces-endpoint") + 1] == "http://collector:4317"
    assert "--enable-log-requests" in told
    assert "opentelemetry-sdk==" in (ROOT / "docker/requirements-serve.txt").read_text(encoding="utf-8")


def test_a_replica_knows_how_long_it_may_hang(tmp_path: Path) -> None:
    assert deployment(tmp_path).variables(0)["WATCHDOG"] == "180"
    assert dataclasses.replace(deployment(tmp_path), watchdog_s=0).variables(0)["WATCHDOG"] == "0"
