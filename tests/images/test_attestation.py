"""Provenance says what an image was made of and nothing of who made it; a signature is the right key's or none."""

from __future__ import annotations

import getpass
import hashlib
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from v4forge.errors import UserError
from v4forge.images import attestation

IMAGE = "sha256:" + "a" * 64


def statement(commands: Sequence[Sequence[str]] = (), **parameters: str) -> dict[str, Any]:
    dependencies = [
        attestation.revision("v4forge", "c" * 40),
        attestation.image("debian:bookworm", "sha256:" + "b" * 64),
    ]
    return attestation.provenance("v4forge-calib", IMAGE, parameters, dependencies, commands, {"docker": "1"}, b"sbom")


def test_a_statement_has_the_form_of_slsa_provenance() -> None:
    value = statement(LANE="cpu")
    assert value["_type"] == "https://in-toto.io/Statement/v1"
    assert value["predicateType"] == "https://slsa.dev/provenance/v1"
    assert value["subject"] == [{"name": "v4forge-calib", "digest": {"sha256": "a" * 64}}]
    definition, run = value["predicate"]["buildDefinition"], value["predicate"]["runDetails"]
    assert definition["externalParameters"] == {"LANE": "cpu"}
    assert [item["name"] for item in definition["resolvedDependencies"]] == ["debian:bookworm", "v4forge"]
    assert run["builder"] == {"id": "urn:v4forge:make-images", "version": {"docker": "1"}}
    assert attestation.byproducts(attestation.encoded(value)) == {"sbom": hashlib.sha256(b"sbom").hexdigest()}


def test_a_file_is_named_by_its_digest(tmp_path: Path) -> None:
    (tmp_path / "lock.txt").write_bytes(b"torch")
    named = attestation.file(tmp_path / "lock.txt", "docker/lock.txt")
    assert named == {"name": "docker/lock.txt", "digest": {"sha256": hashlib.sha256(b"torch").hexdigest()}}


def test_the_same_inputs_give_the_same_bytes_in_any_order() -> None:
    one = attestation.encoded(statement(A="1", B="2"))
    assert one == attestation.encoded(statement(B="2", A="1"))
    for name in (platform.node(), getpass.getuser(), str(Path.home())):
        assert name.encode() not in one


@pytest.mark.parametrize(
    ("argument", "shown"),
    [
        ("--secret=id=ca,src=/etc/ssl/corp.pem", "--secret=id=ca"),
        ("id=pip,src=/home/me/pip.conf", "id=pip"),
        ("id=token,env=MY_TOKEN,type=env", "id=token,type=env"),
        ("APT_SNAPSHOT=https://me:pw@mirror.example/debian", "APT_SNAPSHOT=https://mirror.example/debian"),
        ("/home/me/v4forge/Dockerfile.calib", "Dockerfile.calib"),
        ("--iidfile=/tmp/me/iid", "--iidfile=iid"),
        ("SOURCE_DATE_EPOCH=1", "SOURCE_DATE_EPOCH=1"),
        ("--tag=v4forge-calib:local", "--tag=v4forge-calib:local"),
    ],
)
def test_what_belongs_to_a_machine_or_user_is_left_out_of_commands(argument: str, shown: str) -> None:
    value = statement([["docker", "build", argument]], ARGUMENT=argument)
    definition = value["predicate"]["buildDefinition"]
    assert definition["internalParameters"]["commands"] == [["docker", "build", shown]]
    assert definition["externalParameters"] == {"ARGUMENT": shown}


def test_the_manifests_digest_becomes_one_more_subject_and_only_once() -> None:
    manifest = "sha256:" + "d" * 64
    once = attestation.with_subject(attestation.encoded(statement()), "r.example/calib", manifest)
    assert attestation.subjects(once) == {IMAGE, manifest}
    assert attestation.with_subject(once, "r.example/calib", manifest) == once


@given(st.binary() | st.recursive(st.none() | st.text() | st.integers(), st.lists).map(json.dumps).map(str.encode))
def test_anything_else_is_no_statement(content: bytes) -> None:
    with pytest.raises(UserError, match="not an in-toto statement"):
        attestation.subjects(content)
