"""target: what answers at an address, and which artifact, machine and versions a measurement is of."""

from __future__ import annotations

import hashlib
import json
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from v4forge import checkout
from v4forge.bench import served_model
from v4forge.errors import UserError
from v4forge.serving.deployment import Deployment

MODELS = {"data": [{"id": "m", "root": "/nowhere", "max_model_len": 4096}]}


@pytest.fixture
def pages() -> dict[str, Any]:
    return {"/v1/models": MODELS, "/version": {"version": "9.9"}, "/metrics": ""}


@pytest.fixture
def url(pages: dict[str, Any]) -> Iterator[str]:
    """A server of these pages: JSON, or text as it is."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = pages.get(self.path)
            body = (page if isinstance(page, str) else json.dumps(page)).encode()
            self.send_response(404 if page is None else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            return None

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


PASSED = {"name": "tensors", "ok": True, "detail": ""}


CONFIG = '{"num_hidden_layers": 43, "hidden_size": 4096, "n_routed_experts": 256}'
LISTED = {"config.json": {"sha256": hashlib.sha256(CONFIG.encode()).hexdigest(), "bytes": len(CONFIG)}}
MANIFEST = json.dumps({"files": LISTED})
SUMS = "".join(
    f"{hashlib.sha256(text.encode()).hexdigest()}  {name}\n"
    for name, text in (("config.json", CONFIG), ("manifest.json", MANIFEST))
)
SUMS_SHA256 = hashlib.sha256(SUMS.encode()).hexdigest()


def artifact(folder: Path, **certificate: Any) -> Path:
    for name, text in {"config.json": CONFIG, "manifest.json": MANIFEST, "SHA256SUMS": SUMS}.items():
        (folder / name).write_text(text)
    if certificate:
        (folder / "certificate.json").write_text(json.dumps({"checks": [PASSED], **certificate}))
    return folder


def test_a_server_is_asked_what_it_serves(url: str) -> None:
    found = served_model.look(f"{url}/v1/")
    assert (found.url, found.model) == (url, "m")
    assert {name: found.facts[name] for name in ("max_model_len", "vllm", "replicas", "artifact", "image")} == {
        "max_model_len": 4096,
        "vllm": "9.9",
        "replicas": None,
        "artifact": None,
        "image": None,
    }


def test_a_server_without_version_is_measured_all_the_same(url: str, pages: dict[str, Any]) -> None:
    del pages["/version"]
    assert served_model.look(url).facts["vllm"] is None


def test_what_is_no_model_server_is_told(url: str, pages: dict[str, Any]) -> None:
    pages["/v1/models"] = {"data": []}
    with pytest.raises(UserError, match="/v1/models answered in another form"):
        served_model.look(url)
    with pytest.raises(UserError, match="refused"):
        served_model.look("http://127.0.0.1:9")


def test_the_key_is_in_no_text_of_a_target(url: str) -> None:
    assert "sesame" not in repr(served_model.look(url, "sesame"))


def test_a_server_is_idle_when_no_replica_runs_or_waits(url: str, pages: dict[str, Any]) -> None:
    assert served_model.look(url).idle()
    pages["/metrics"] = 'vllm:num_requests_waiting{engine="0"} 1.0\n'
    busy = served_model.look(url)
    assert not busy.idle()
    with pytest.raises(UserError, match="other requests run at"):
        busy.wait_until_idle(limit_s=0.1)


def test_a_deployment_is_told_as_what_it_starts_will_be(tmp_path: Path) -> None:
    deployment = Deployment(str(tmp_path), str(artifact(tmp_path)), "host", "cpu", port=1234, overrides={"a": "b"})
    told = served_model.planned(deployment, "9.9", {})
    assert told["url"] == "http://127.0.0.1:1234" and told["artifact"]["folder"] == str(tmp_path)
    assert isinstance(told["max_model_len"], int) and told["drafts"] is None and told["options"] == {}


@pytest.mark.parametrize(
    ("certificate", "verdict"),
    [
        ({}, "missing"),
        ({"ok": True, "sums_sha256": SUMS_SHA256}, "ok"),
        ({"ok": False, "sums_sha256": SUMS_SHA256}, "failed"),
        ({"ok": True, "sums_sha256": "of another one"}, "stale"),
        ({"ok": True, "sums_sha256": SUMS_SHA256, "checks": []}, "failed"),
    ],
)
def test_the_artifact_is_told_by_its_sums_and_what_verify_said(
    tmp_path: Path, certificate: dict[str, Any], verdict: str
) -> None:
    found = served_model.artifact_facts(artifact(tmp_path, **certificate))
    assert found and found["certificate"] == verdict and found["num_hidden_layers"] == 43
    assert found["sums_sha256"] == SUMS_SHA256
    assert served_model.artifact_facts(tmp_path / "none") is None


def test_an_artifact_that_is_not_whole_is_told_as_changed(tmp_path: Path) -> None:
    folder = artifact(tmp_path, ok=True, sums_sha256=SUMS_SHA256)
    (folder / "model-00002.safetensors").write_bytes(b"of another run")
    found = served_model.artifact_facts(folder)
    assert found and found["certificate"] == "changed"


def test_the_served_folder_is_the_artifact_where_it_is_here(tmp_path: Path, url: str, pages: dict[str, Any]) -> None:
    pages["/v1/models"] = {"data": [{"id": "m", "root": str(artifact(tmp_path)), "max_model_len": 8}]}
    assert served_model.look(url).facts["artifact"]["folder"] == str(tmp_path)


def test_the_machine_and_the_commit_are_told() -> None:
    machine = served_model.machine()
    assert machine["cpus"] >= 1 and machine["memory_gib"] > 1 and machine["cpu"]
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=checkout.ROOT
    ).stdout.strip()
    assert (served_model.versions()["v4forge"] or "").removesuffix("-dirty") == head


def test_files_and_values_have_digests(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert served_model.sha256_of(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
    assert served_model.sha256_of({"b": 1, "a": 2}) == served_model.sha256_of({"a": 2, "b": 1})


@pytest.mark.parametrize(
    "form",
    [
        "{url}",
        "{host}",
        " {host}/v1 ",
        "{url}/v1/chat/completions",
        "{host}/v1/completions/",
        "{url}//",
        "{url}/v1/models",
    ],
)
def test_an_address_is_taken_however_people_write_it(url: str, form: str) -> None:
    assert served_model.look(form.format(url=url, host=url.partition("://")[2])).url == url


@pytest.mark.parametrize("given", ["", "http://", "ftp://a:1", "http://a:b", "a b", "http://[::1", "me:pw@host:1"])
def test_an_address_that_is_none_is_named(given: str) -> None:
    with pytest.raises(UserError) as found:
        served_model.look(given)
    assert "make bench" in found.value.hint and "pw" not in found.value.fact


def test_of_several_models_the_user_chooses(url: str, pages: dict[str, Any]) -> None:
    two = [{"id": "a", "max_model_len": 1}, {"id": "b", "max_model_len": 2}]
    pages["/v1/models"] = {"data": two}
    with pytest.raises(UserError, match="serves several models: a, b") as found:
        served_model.look(url)
    assert found.value.hint.endswith("MODEL=a")
    assert served_model.look(url, model="b").facts["max_model_len"] == 2
    with pytest.raises(UserError, match="serves no c, but a, b"):
        served_model.look(url, model="c")
    pages["/v1/models"] = {"data": [each | {"root": "/same"} for each in two]}  # two names of one
    assert served_model.look(url).model == "a"
