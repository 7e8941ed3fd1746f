"""push and pull against a real registry on loopback: what the lock does not say is refused."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from docker import DockerClient
from docker.errors import ImageNotFound
from registries import BASIC, PASSWORD, Plain, Server, guarded_by_password, guarded_by_token

from scripts.image import DOCUMENTS
from v4forge import signatures
from v4forge.errors import UserError
from v4forge.files import write_text
from v4forge.images import archive, attestation, definitions, registry
from v4forge.images.containers import Engine
from v4forge.images.oci import Repository, digest_of

pytestmark = pytest.mark.images

TAG = "v4forge-registry-test:pulled"


@dataclass
class Shop:
    """A registry, a lock and a daemon: what the tests push to and pull from."""

    client: DockerClient
    server: Server
    lock: Path
    said: list[str] = field(default_factory=list)

    @property
    def repository(self) -> str:
        return f"{self.server.host}/v4forge/calib"

    def push(self, image: str, sign_key: Path | None = None) -> registry.Locked:
        attached = documents(image)
        return registry.push(
            self.client, "calib", image, self.repository, attached, self.said.append, sign_key, self.lock
        )

    def pull(self, verify_key: Path | None = None) -> dict[str, bytes]:
        return registry.pull(self.client, "calib", TAG, self.said.append, verify_key, self.lock)

    def wipe(self, image: str) -> None:
        remove(self.client, TAG, image)

    def here(self, image: str) -> bool:
        try:
            return bool(self.client.images.get(image))
        except ImageNotFound:
            return False

    def edit(self, key: str, value: str) -> None:
        """Writes another value into the lock, as a person or a bad merge might."""
        lines = self.lock.read_text(encoding="utf-8").splitlines()
        assert any(line.startswith(f"{key}=") for line in lines)
        changed = [f"{key}={value}" if line.startswith(f"{key}=") else line for line in lines]
        self.lock.write_text("\n".join(changed) + "\n", encoding="utf-8")


def remove(client: DockerClient, *names: str) -> None:
    for name in names:
        with suppress(ImageNotFound):
            client.api.remove_image(name, force=True)


def documents(image_id: str) -> dict[str, bytes]:
    sbom = b'{"bomFormat": "CycloneDX"}\n'
    statement = attestation.provenance(
        "v4forge-calib", image_id, {"LANE": "cpu"}, [], [["true"]], {"docker": "1"}, sbom
    )
    return {"sbom": sbom, "provenance": attestation.encoded(statement)}


@pytest.fixture(scope="module")
def client(engine: Engine) -> DockerClient:
    return engine.client


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    running = Server(tmp_path)
    running.start()
    yield running
    running.stop()


@pytest.fixture
def shop(client: DockerClient, server: Server, tmp_path: Path) -> Shop:
    return Shop(client, server, tmp_path / "images.lock")


@pytest.fixture
def make_image(client: DockerClient) -> Iterator[Callable[..., str]]:
    """Makes an image of one file and gives its ID; all of them are gone after the test."""
    made: list[str] = []

    def make(content: str, tagged: bool = True, **labels: str) -> str:
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            entry = tarfile.TarInfo("hello.txt")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content.encode()))
        wanted = definitions.expected_labels("calib") | {key.replace("__", "."): value for key, value in labels.items()}
        changes = [f"LABEL {json.dumps(key)}={json.dumps(value)}" for key, value in wanted.items()]
        answer = client.api.import_image_from_data(archive.getvalue(), changes=changes)
        made.append(json.loads(answer.splitlines()[-1])["status"])
        if tagged:
            client.api.tag(made[-1], "v4forge-registry-test", f"made-{len(made)}")
        return made[-1]

    yield make
    remove(client, TAG, *made)


@pytest.fixture
def keys(tmp_path: Path) -> Callable[[str], tuple[Path, Path]]:
    def make(name: str) -> tuple[Path, Path]:
        private, public = tmp_path / f"{name}.pem", tmp_path / f"{name}.pub"
        subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", private], check=True)
        subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
        return private, public

    return make


def test_what_was_pushed_and_wiped_comes_back_by_digest(shop: Shop, make_image: Callable[..., str]) -> None:
    image = make_image("pushed and pulled")
    entry = shop.push(image)
    assert registry.locked("calib", shop.lock) == entry
    assert entry.image_id == image
    shop.wipe(image)
    assert not shop.here(image)
    back = shop.pull()
    assert shop.client.images.get(TAG).id == image
    assert back["sbom"] == documents(image)["sbom"]
    assert hashlib.sha256(back["provenance"]).hexdigest() == entry.provenance_sha256
    assert attestation.subjects(back["provenance"]) == {image, entry.reference.split("@")[1]}
    (layer,) = archive.of_daemon(shop.client, TAG).layers
    assert layer.files["/hello.txt"].content == hashlib.sha256(b"pushed and pulled").hexdigest()


def test_the_programs_push_and_pull_an_image_of_many_layers(
    shop: Shop, make_image: Callable[..., str], tmp_path: Path
) -> None:
    names = [f"layer-{number}" for number in range(5)]
    for name in names:
        (tmp_path / name).write_text(name * 100_000)
    steps = [f"FROM {make_image('the first layer')}", *(f"COPY {name} /{name}" for name in names)]
    (tmp_path / "Dockerfile").write_text("\n".join(steps))
    built, _ = shop.client.images.build(path=str(tmp_path), tag="v4forge-registry-test:built")
    for name, content in documents(built.id).items():
        write_text(tmp_path / "calib" / DOCUMENTS[name], content.decode())
    shared = ("--documents", str(tmp_path), "--lock", str(shop.lock), "--tag")
    program("push", "calib", "--to", f"{shop.server.host}/v4forge", *shared, "v4forge-registry-test:built")
    remove(shop.client, "v4forge-registry-test:built", built.id)
    assert not shop.here(built.id)
    program("pull", "calib", *shared, TAG)
    assert shop.client.images.get(TAG).id == built.id
    layers = archive.of_daemon(shop.client, TAG).layers
    assert [list(layer.files) for layer in layers[1:]] == [[f"/{name}"] for name in names]


def program(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "scripts.image", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_push_leaves_no_tag_behind_and_says_what_it_does(shop: Shop, make_image: Callable[..., str]) -> None:
    image = make_image("no tag")
    shop.push(image)
    assert not [tag for tag in shop.client.images.get(image).tags if tag.startswith(shop.server.host)]
    assert shop.said[0].startswith("push: 1 layer ")
    assert [line.split(",")[0] for line in shop.said[1:]] == ["push: sbom", "push: provenance"]


def test_an_image_without_another_tag_outlives_its_push(shop: Shop, make_image: Callable[..., str]) -> None:
    image = make_image("untagged", tagged=False)
    shop.push(image)
    assert shop.here(image)


def test_a_second_push_writes_the_same_lock_and_attaches_nothing_again(
    shop: Shop, make_image: Callable[..., str]
) -> None:
    image = make_image("twice")
    first = shop.push(image)
    text = shop.lock.read_bytes()
    assert shop.push(image) == first
    assert shop.lock.read_bytes() == text
    remote = Repository(shop.repository)
    assert len(list(remote.attached(first.reference.split("@")[1], "provenance"))) == 1


def test_an_image_that_was_never_pushed_is_refused_with_what_to_do(shop: Shop) -> None:
    with pytest.raises(UserError, match=r"the image calib was never pushed") as refused:
        shop.pull()
    assert refused.value.hint == "make images IMAGE=calib, or make push IMAGE=calib REGISTRY=<registry>"


def test_push_keeps_the_lines_of_other_images(shop: Shop, make_image: Callable[..., str]) -> None:
    other = registry.Locked("r.example/serve@sha256:" + "1" * 64, "sha256:" + "2" * 64, "3" * 64)
    registry.write_lock("serve", other, shop.lock)
    shop.push(make_image("beside another"))
    assert registry.locked("serve", shop.lock) == other


@pytest.mark.parametrize("what", ["layer", "config", "manifest"])
def test_bytes_changed_on_the_registrys_disk_are_refused(shop: Shop, make_image: Callable[..., str], what: str) -> None:
    image = make_image(f"tampered {what}")
    manifest = registry.present(Repository(shop.repository), shop.push(image).reference.split("@")[1])
    digest = {
        "layer": manifest.value["layers"][0]["digest"],
        "config": manifest.value["config"]["digest"],
        "manifest": manifest.digest,
    }[what]
    path = shop.server.blob(digest)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    shop.wipe(image)
    with pytest.raises(UserError, match="other bytes"):
        shop.pull()
    assert not shop.here(TAG)
    assert not shop.here(image)


def test_another_image_id_in_the_lock_is_refused_before_anything_is_downloaded(
    shop: Shop, make_image: Callable[..., str]
) -> None:
    image = make_image("another ID")
    shop.push(image)
    shop.wipe(image)
    shop.edit("CALIB_IMAGE_ID", "sha256:" + "0" * 64)
    with pytest.raises(UserError, match=rf"is the image {image}; images.lock says sha256:0000"):
        shop.pull()
    assert not shop.here(image)


@pytest.mark.parametrize("label", ["io.v4forge.versions-sha256", "org.opencontainers.image.title"])
def test_an_image_with_other_labels_is_refused_though_digest_and_id_agree(
    shop: Shop, make_image: Callable[..., str], label: str
) -> None:
    shop.push(make_image("right labels"))
    revision = {"org__opencontainers__image__revision": "abc123" * 6 + "abcd"}
    entry = shop.push(make_image("other labels", **{label.replace(".", "__"): "another"}, **revision))
    shop.wipe(entry.image_id)
    with pytest.raises(UserError, match=rf"has the label {label}='another'; this checkout asks for") as refused:
        shop.pull()
    assert refused.value.hint == "make images IMAGE=calib, or git checkout " + "abc123" * 6 + "abcd"
    assert not shop.here(entry.image_id)


def test_the_digest_of_another_image_in_the_lock_is_refused(shop: Shop, make_image: Callable[..., str]) -> None:
    other = shop.push(make_image("other"))
    mine = shop.push(make_image("mine"))
    shop.edit("CALIB_IMAGE", other.reference)
    with pytest.raises(UserError, match=rf"is the image {other.image_id}; images.lock says {mine.image_id}"):
        shop.pull()


def test_a_provenance_that_the_lock_does_not_name_is_refused(shop: Shop, make_image: Callable[..., str]) -> None:
    shop.push(make_image("provenance"))
    shop.edit("CALIB_PROVENANCE_SHA256", "0" * 64)
    with pytest.raises(UserError, match=r"has no provenance with the sha256 0000"):
        shop.pull()


def test_a_provenance_changed_on_the_registrys_disk_is_refused(shop: Shop, make_image: Callable[..., str]) -> None:
    entry = shop.push(make_image("changed provenance"))
    path = shop.server.blob(f"sha256:{entry.provenance_sha256}")
    path.write_bytes(path.read_bytes().replace(b"cpu", b"gpu"))
    with pytest.raises(UserError, match=r"answers other bytes for the blob"):
        shop.pull()


def test_a_provenance_on_another_image_is_refused(shop: Shop, make_image: Callable[..., str]) -> None:
    entry = shop.push(make_image("mine"))
    remote = Repository(shop.repository)
    foreign = documents("sha256:" + "7" * 64)["provenance"]
    remote.attach(registry.present(remote, entry.reference.split("@")[1]), "provenance", foreign)
    shop.edit("CALIB_PROVENANCE_SHA256", hashlib.sha256(foreign).hexdigest())
    with pytest.raises(UserError, match=r"the provenance of .* is on another image"):
        shop.pull()


def test_push_refuses_a_provenance_of_another_build(shop: Shop, make_image: Callable[..., str]) -> None:
    image = make_image("old provenance")
    with pytest.raises(UserError, match=r"the provenance is not that of sha256:"):
        registry.push(shop.client, "calib", image, shop.repository, documents("sha256:" + "1" * 64), shop.said.append)


def test_a_signed_image_passes_and_an_unsigned_or_foreign_one_does_not(
    shop: Shop, make_image: Callable[..., str], keys: Callable[[str], tuple[Path, Path]]
) -> None:
    (private, public), (foreign, _) = keys("mine"), keys("other")
    image = make_image("signed")
    shop.push(image)
    with pytest.raises(UserError, match="the image is not signed"):
        shop.pull(public)
    shop.push(image, foreign)
    with pytest.raises(UserError, match=f"the image is signed, but not by the key {public}"):
        shop.pull(public)
    assert not shop.here(TAG)
    shop.push(image, private)
    shop.pull(public)
    assert shop.client.images.get(TAG).id == image


def test_a_signature_on_another_build_by_the_right_key_is_refused(
    shop: Shop, make_image: Callable[..., str], keys: Callable[[str], tuple[Path, Path]]
) -> None:
    private, public = keys("mine")
    entry = shop.push(make_image("mine"))
    remote = Repository(shop.repository)
    elsewhere = signatures.sign(documents("sha256:" + "7" * 64)["provenance"], private)
    remote.attach(registry.present(remote, entry.reference.split("@")[1]), "signature", elsewhere)
    with pytest.raises(UserError, match="the image is signed, but not by the key"):
        shop.pull(public)


def test_a_registry_that_is_down_is_named_and_the_lock_stays(shop: Shop, make_image: Callable[..., str]) -> None:
    image = make_image("down")
    shop.push(image)
    text = shop.lock.read_bytes()
    shop.server.stop()
    started = time.monotonic()
    for step in (shop.pull, lambda: shop.push(image)):
        with pytest.raises(UserError, match=rf"the registry {shop.server.host} cannot be reached") as refused:
            step()
        assert refused.value.hint == f"check that it runs: curl {shop.server.host}/v2/"
    assert time.monotonic() - started < 10
    assert shop.lock.read_bytes() == text


def test_an_image_that_the_registry_lost_is_refused(shop: Shop, make_image: Callable[..., str]) -> None:
    shop.push(make_image("lost"))
    shutil.rmtree(shop.server.folder / "data")
    with pytest.raises(UserError, match=rf"{shop.server.host} has no {shop.repository}@sha256:"):
        shop.pull()


def test_a_missing_image_is_named(shop: Shop) -> None:
    with pytest.raises(UserError, match="there is no image v4forge-registry-test:none"):
        shop.push("v4forge-registry-test:none")


@pytest.fixture(params=[guarded_by_password, guarded_by_token])
def guarded(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    with contextmanager(request.param)(tmp_path) as settings:
        server = Server(tmp_path, settings)
        server.start()
        yield server
        server.stop()


def test_credentials_come_from_dockers_own_config_and_show_nowhere(
    guarded: Server, make_image: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = make_image("guarded")
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    with pytest.raises(UserError, match=f"{guarded.host} does not let us in") as refused:
        Shop(DockerClient.from_env(), guarded, tmp_path / "images.lock").push(image)
    assert refused.value.hint == f"docker login {guarded.host}"

    (tmp_path / "docker").mkdir()
    config = {"auths": {guarded.host: {"auth": BASIC}}}
    (tmp_path / "docker/config.json").write_text(json.dumps(config), encoding="utf-8")
    shop = Shop(DockerClient.from_env(), guarded, tmp_path / "images.lock")
    shop.push(image)
    assert len(shop.said) == 3
    shop.wipe(image)
    assert set(shop.pull()) == {"provenance", "sbom"}
    assert shop.client.images.get(TAG).id == image
    assert PASSWORD not in "".join(shop.said) + shop.lock.read_text(encoding="utf-8")


@pytest.fixture
def plain(client: DockerClient, server: Server, tmp_path: Path) -> Iterator[Shop]:
    """A shop whose registry takes no artifacts."""
    handler = type("Behind", (Plain,), {"behind": server.host})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as front:
        threading.Thread(target=front.serve_forever, kwargs={"poll_interval": 0.01}).start()
        host = f"127.0.0.1:{front.server_address[1]}"
        yield Shop(client, Server(tmp_path, host=host), tmp_path / "images.lock")
        front.shutdown()


def test_a_registry_that_takes_no_artifacts_still_takes_the_image(
    plain: Shop, make_image: Callable[..., str], keys: Callable[[str], tuple[Path, Path]]
) -> None:
    private, public = keys("mine")
    image = make_image("plain")
    with pytest.raises(UserError, match="takes no signature: 415 no artifacts here"):
        plain.push(image, private)
    assert not plain.lock.exists()
    entry = plain.push(image)
    assert plain.said[-1].endswith("takes no attached documents (415 no artifacts here); they stay files here")
    assert entry.provenance_sha256 == ""
    plain.wipe(image)
    with pytest.raises(UserError, match="the image is not signed"):
        plain.pull(public)
    assert plain.pull() == {}
    assert plain.client.images.get(TAG).id == image


def test_an_artifact_stored_beside_an_image_is_found_by_others(shop: Shop, make_image: Callable[..., str]) -> None:
    entry = shop.push(make_image("fallback tag"))
    digest = entry.reference.split("@")[1]
    url = f"http://{shop.server.host}/v2/v4forge/calib/manifests/{digest.replace(':', '-')}"
    accept = {"Accept": "application/vnd.oci.image.index.v1+json"}
    index = json.load(urllib.request.urlopen(urllib.request.Request(url, headers=accept)))
    assert {item["artifactType"] for item in index["manifests"]} == {
        "application/vnd.cyclonedx+json",
        "application/vnd.in-toto+json",
    }
    for item in index["manifests"]:
        artifact = shop.server.blob(item["digest"]).read_bytes()
        assert digest_of(artifact) == item["digest"]
        assert json.loads(artifact)["subject"]["digest"] == digest


def test_a_daemons_error_that_is_not_known_is_shown_as_it_is() -> None:
    error = registry.reason("the moon is in the wrong phase", "127.0.0.1:5000/x")
    assert error.fact == "docker says of 127.0.0.1:5000/x: the moon is in the wrong phase"
