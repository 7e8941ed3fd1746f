"""A bill of materials is valid CycloneDX, complete for what the image was asked, and the same bytes each time."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from v4forge.images import sbom

IMAGE = "sha256:" + "a" * 64
EPOCH = 1_700_000_000


def probed() -> list[dict[str, Any]]:
    """What the probe says of this very environment."""
    command = [sys.executable, "-I", "-B", "-c", sbom.PYTHON_PROBE]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def written(components: list[Any], notes: tuple[str, ...] = ()) -> dict[str, Any]:
    content = sbom.document("v4forge-calib", IMAGE, components, notes, EPOCH)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(content.decode()) is None
    return json.loads(content)


def test_the_probe_lists_every_distribution_with_its_version() -> None:
    found = {item["name"]: item["version"] for item in probed()}
    assert found == {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}


def test_a_document_of_this_environment_is_valid_and_the_same_each_time() -> None:
    items = probed()
    forwards, backwards = ([sbom.python_component(item) for item in order] for order in (items, items[::-1]))
    arguments = ("v4forge-calib", IMAGE)
    assert sbom.document(*arguments, forwards, (), EPOCH) == sbom.document(*arguments, backwards, (), EPOCH)
    document = written(forwards)
    assert len(document["components"]) == len(items)
    assert document["metadata"]["component"]["version"] == IMAGE
    assert document["metadata"]["timestamp"] == "2023-11-14T22:13:20+00:00"
    licensed = [item["name"] for item in document["components"] if "licenses" in item]
    assert len(licensed) > 0.8 * len(items)


def test_torchs_variant_is_stated() -> None:
    item = {"name": "torch", "version": "1.0+cpu", "expression": "", "licence": "BSD-3-Clause", "classifiers": []}
    for cuda, variant in (("", "cpu"), ("13.0", "cuda 13.0")):
        (component,) = written([sbom.python_component({**item, "cuda": cuda})])["components"]
        assert component["properties"] == [{"name": "v4forge:torch", "value": variant}]
        assert component["purl"] == "pkg:pypi/torch@1.0%2Bcpu"
    (torch,) = [item for item in probed() if item["name"] == "torch"]
    assert bool(torch["cuda"]) == ("+cpu" not in torch["version"])


@pytest.mark.parametrize(
    ("licence", "classifiers", "expected"),
    [
        ("MIT", [], [{"license": {"id": "MIT"}}]),
        ("MIT AND Apache-2.0", [], [{"expression": "MIT AND Apache-2.0"}]),
        ("our own terms", [], [{"license": {"name": "our own terms"}}]),
        ("x" * 500, ["License :: OSI Approved :: MIT License"], [{"license": {"name": "MIT License"}}]),
        ("", [], None),
        ("", ["License :: A", "License :: B"], [{"license": {"name": "A"}}, {"license": {"name": "B"}}]),
    ],
)
def test_a_licence_is_what_the_package_states(licence: str, classifiers: list[str], expected: Any) -> None:
    item = {"name": "a-package", "version": "1", "expression": "", "licence": licence, "classifiers": classifiers}
    (component,) = written([sbom.python_component(item)])["components"]
    assert component.get("licenses") == expected


def test_a_licence_expression_is_kept_however_long() -> None:
    expression = " AND ".join(["Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "MIT", "ISC", "Zlib", "0BSD"])
    item = {"name": "torch", "version": "1", "expression": expression, "licence": "BSD", "classifiers": []}
    (component,) = written([sbom.python_component(item)])["components"]
    assert component["licenses"] == [{"expression": expression}]


def test_debian_packages_carry_version_architecture_source_and_licences() -> None:
    listed = "installed\tlibc6\t2.36-9+deb12u1\tamd64\tglibc\ndeinstall\told\t1\tall\told\n"
    copyright_files = "/usr/share/doc/libc6/copyright:License: LGPL-2.1+\n/usr/share/doc/libc6/copyright:License:\n"
    (fields,) = sbom.debian_packages(listed)
    licences = sbom.debian_licences(copyright_files)
    (component,) = written([sbom.debian_component(fields, "debian", "12", licences)])["components"]
    assert component["purl"] == "pkg:deb/debian/libc6@2.36-9%2Bdeb12u1?arch=amd64&distro=debian-12"
    assert component["properties"] == [{"name": "v4forge:source-package", "value": "glibc"}]
    assert component["licenses"] == [{"license": {"id": "LGPL-2.1+"}}]


@pytest.mark.parametrize(
    ("reference", "name", "version", "repository"),
    [
        (f"r.example:5000/a/debian:12@{IMAGE}", "r.example:5000/a/debian:12", IMAGE, "r.example:5000/a/debian"),
        (f"r.example:5000/debian@{IMAGE}", "r.example:5000/debian", IMAGE, "r.example:5000/debian"),
        ("debian:local", "debian:local", None, None),
    ],
)
def test_the_base_image_is_named_by_its_digest(reference: str, name: str, version: Any, repository: Any) -> None:
    (component,) = written([sbom.base_component(reference)])["components"]
    assert (component["name"], component.get("version")) == (name, version)
    expected = f"pkg:oci/debian@{IMAGE}?repository_url={repository}" if repository else None
    assert component.get("purl") == expected


def test_what_could_not_be_listed_is_noted() -> None:
    document = written([], ("no packages listed: the image has no shell to ask",))
    notes = [item["value"] for item in document["metadata"]["properties"]]
    assert notes == ["no packages listed: the image has no shell to ask"]
