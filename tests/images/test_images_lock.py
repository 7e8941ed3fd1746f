"""images.lock: what push writes is what pull reads, and anything else is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from v4forge.errors import UserError
from v4forge.images import definitions, registry
from v4forge.images.registry import Locked

ENTRY = Locked("r.example:5000/a/calib@sha256:" + "1" * 64, "sha256:" + "2" * 64, "3" * 64)


def test_the_committed_lock_is_what_push_writes(tmp_path: Path) -> None:
    again = tmp_path / "images.lock"
    for name in definitions.IMAGES:
        registry.write_lock(name, registry.locked(name), again)
    assert again.read_text(encoding="utf-8") == definitions.LOCK.read_text(encoding="utf-8")


def test_what_is_written_is_read_and_the_other_images_lines_stay(tmp_path: Path) -> None:
    lock = tmp_path / "images.lock"
    other = Locked(ENTRY.reference, ENTRY.image_id)
    for name, entry in (("calib", ENTRY), ("serve", other)):
        registry.write_lock(name, entry, lock)
    assert (registry.locked("calib", lock), registry.locked("serve", lock)) == (ENTRY, other)


def test_an_image_without_lines_was_never_pushed(tmp_path: Path) -> None:
    assert registry.locked("calib", tmp_path / "none") == Locked()
    (tmp_path / "images.lock").write_text("SERVE_IMAGE=\n", encoding="utf-8")
    assert registry.locked("calib", tmp_path / "images.lock") == Locked()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("CALIB_IMAGE", ""),
        ("CALIB_IMAGE", "r.example/calib:latest"),
        ("CALIB_IMAGE", "r.example/calib@sha256:12"),
        ("CALIB_IMAGE_ID", ""),
        ("CALIB_IMAGE_ID", "1" * 64),
        ("CALIB_PROVENANCE_SHA256", "sha256:" + "3" * 64),
    ],
)
def test_a_value_that_push_does_not_write_is_named(tmp_path: Path, key: str, value: str) -> None:
    lock = tmp_path / "images.lock"
    registry.write_lock("calib", ENTRY, lock)
    lines = [line for line in lock.read_text(encoding="utf-8").splitlines() if not line.startswith(f"{key}=")]
    lock.write_text("\n".join([*lines, f"{key}={value}"]) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=rf"images\.lock: {key}={value} is not what `make push` writes"):
        registry.locked("calib", lock)


@pytest.mark.parametrize(
    ("message", "fact"),
    [
        ('Get "https://r.example/v2/": dial tcp: connection refused', "r.example cannot be reached"),
        ("unauthorized: authentication required", "r.example does not let us in"),
        ("denied: requested access to the resource is denied", "r.example does not let us in"),
        ("filesystem layer verification failed for digest sha256:12", "gives other bytes"),
        ("manifest for r.example/x@sha256:1 not found: manifest unknown", "does not have r.example/x whole"),
        ("write /var/lib/docker/tmp/x: no space left on device", "the disk of the docker daemon is full"),
        ("http: server gave HTTP response to HTTPS client", "speaks plain HTTP"),
        ("the moon is in the wrong phase", "docker says of r.example/x: the moon is in the wrong phase"),
    ],
)
def test_a_daemons_error_becomes_a_fact(message: str, fact: str) -> None:
    assert fact in registry.reason(message, "r.example/x").fact


def test_a_transfer_is_followed_and_ends_with_the_registrys_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = {"id": "0123456789ab"}
    events = [
        {"status": "The push refers to repository [r.example/x]"},
        {"status": "Preparing", "progressDetail": {}, **layer},
        {"status": "Pushing", "progressDetail": {"current": 1_500_000, "total": 3_000_000}, **layer},
        {"status": "Layer already exists", "progressDetail": {}, "id": "ffffffffffff"},
        {"status": "Pushed", "progressDetail": {}, **layer},
        {"progressDetail": {}, "aux": {"Tag": "t", "Digest": ENTRY.image_id, "Size": 528}},
    ]
    monkeypatch.setattr(registry, "SAID_EVERY_S", 0.0)
    said: list[str] = []
    assert registry.transfer(events, "push", "r.example/x", said.append) == ENTRY.image_id
    assert said[1:4] == [
        "push: 0 of 1 layer, 2 of 3 MB",
        "push: 1 of 2 layers, 2 of 3 MB",
        "push: 2 of 2 layers, 2 of 3 MB",
    ]
    assert said[4] == "push: 2 layers in 0 s"
