"""Images of a real daemon: read as docker saves them, and asked what they are made of."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from docker import DockerClient

from v4forge.errors import UserError
from v4forge.images import archive, diff, sbom
from v4forge.images.containers import Engine

pytestmark = pytest.mark.images

EPOCH = 1_700_000_000


@pytest.fixture(scope="module")
def client(engine: Engine) -> DockerClient:
    return engine.client


@pytest.fixture
def make_image(client: DockerClient) -> Iterator[Callable[..., str]]:
    """Imports an image of one layer with these files and gives its ID; all are gone after the test."""
    made: list[str] = []

    def make(**files: str) -> str:
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for name, content in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content.encode()))
        answer = client.api.import_image_from_data(archive.getvalue(), changes=["ENV A=1"])
        made.append(json.loads(answer.splitlines()[-1])["status"])
        return made[-1]

    yield make
    for image in made:
        client.api.remove_image(image, force=True)


def test_what_the_daemon_says_of_an_image_is_what_its_archive_holds(
    client: DockerClient, make_image: Callable[..., str]
) -> None:
    image = make_image(a="12345", b="1")
    saved = archive.of_daemon(client, image)
    known = client.images.get(image).attrs
    assert saved.id == image
    assert [layer.diff_id for layer in saved.layers] == known["RootFS"]["Layers"]
    assert saved.layers[0].bytes == known["Size"] == 6
    assert archive.layer_sizes(client, image) == [(6, "")]


def test_two_images_are_compared_down_to_the_line(client: DockerClient, make_image: Callable[..., str]) -> None:
    one, other = make_image(a="x\ny\n", b="1"), make_image(a="x\nz\n", c="1")
    lines = diff.differences(*(archive.of_daemon(client, image) for image in (one, other)))
    files = [line for line in lines if not line.startswith("config ")]
    assert files[0] == "layer 0 (imported): 1 files added, 1 removed, 1 changed"
    assert files[1].startswith("  /a: content ")
    assert files[1].endswith("; line 2: 'y' and 'z'")
    assert files[2:] == ["  /b: removed", "  /c: added"]


def test_an_image_that_is_not_there_is_named(client: DockerClient) -> None:
    with pytest.raises(UserError, match="there is no image v4forge-test:none"):
        archive.of_daemon(client, "v4forge-test:none")
    with pytest.raises(UserError, match="there is no image v4forge-test:none"):
        sbom.sbom(client, "v4forge-test:none", "v4forge-test", "", EPOCH)


def test_an_image_without_a_shell_gets_a_document_that_says_so(
    client: DockerClient, make_image: Callable[..., str]
) -> None:
    before = {container.id for container in client.containers.list(all=True)}
    image = make_image(a="1")
    document = json.loads(sbom.sbom(client, image, "v4forge-test", "", EPOCH))
    notes = [item["value"] for item in document["metadata"]["properties"]]
    assert notes == ["no packages listed: the image has no shell to ask"]
    assert not [item for item in client.containers.list(all=True) if item.id not in before and item.image.id == image]


def test_debians_packages_are_listed_the_same_each_time(client: DockerClient, base_image: str) -> None:
    contents = {sbom.sbom(client, base_image, "v4forge-test", "debian:test", EPOCH) for _ in range(4)}
    assert len(contents) == 1
    text = contents.pop().decode()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    components = {item["name"]: item for item in json.loads(text)["components"]}
    listed = client.containers.run(base_image, ["dpkg-query", "-W"], remove=True).decode().splitlines()
    packages = [name.split(":")[0] for name, _ in (line.split("\t") for line in listed)]
    assert set(packages) < set(components)
    assert components["libc6"]["purl"].startswith("pkg:deb/debian/libc6@")
    assert components["debian:test"]["type"] == "container"
