"""The build context, the sealing of what docker made, and what a build is told; none of it needs docker."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

from v4forge.errors import UserError
from v4forge.images import build as image_build
from v4forge.images import definitions, normalize
from v4forge.images.build import Build

CALIB = definitions.IMAGES["calib"]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A small checkout: a Dockerfile, a module, an executable step."""
    root = tmp_path / "checkout"
    for name, text in {
        "Dockerfile.calib": "ARG BASE_IMAGE\nFROM ${BASE_IMAGE}\nARG LANE\nARG TORCH_VERSION\n",
        "v4forge/a.py": "A = 1\n",
        "v4forge/b/c.py": "C = 2\n",
        "docker/steps/settle": "#!/bin/sh\n",
        "LICENSE": "",
        "versions.env": "",
        "models/x": "x",
        "scripts/s.py": "",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "docker/steps/settle").chmod(0o755)
    return root


def context(root: Path) -> bytes:
    out = io.BytesIO()
    image_build.context(root, "Dockerfile.calib", out)
    return out.getvalue()


def test_the_context_is_the_same_for_the_same_contents(checkout: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(checkout, other)
    for path in other.rglob("*"):
        path.chmod(path.stat().st_mode & 0o700)
        os.utime(path, (1, 1))
    (other / "v4forge/__pycache__").mkdir()
    (other / "v4forge/__pycache__/a.pyc").write_bytes(b"bytecode")
    (other / "v4forge/.swp").write_text("an editor's")
    (other / "notes.txt").write_text("belongs to no image")
    assert context(checkout) == context(other)
    (other / "v4forge/a.py").write_text("A = 2\n")
    assert context(checkout) != context(other)


def test_the_context_holds_a_build_and_nothing_else(checkout: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(context(checkout))) as tar:
        entries = {entry.name: entry for entry in tar}
    assert [name for name, entry in entries.items() if entry.isfile()] == [
        *("Dockerfile.calib", "LICENSE", "docker/steps/settle", "models/x", "scripts/s.py"),
        *("v4forge/a.py", "v4forge/b/c.py", "versions.env"),
    ]
    assert entries["wheels"].isdir(), "a Dockerfile mounts it, empty or not"
    assert entries["docker/steps/settle"].mode == 0o755
    assert entries["v4forge/a.py"].mode == 0o644
    assert {entry.mtime for entry in entries.values()} == {definitions.epoch()}


def build(root: Path, **settings: Any) -> Build:
    wanted = {"image": CALIB, "lane": "cpu", "base": "a-base", "apt_snapshot": "", "revision": "r", "root": root}
    return Build(**(wanted | settings))


def test_every_arg_of_the_dockerfile_gets_its_value(checkout: Path) -> None:
    given = build(checkout).arguments()
    assert list(given) == ["BASE_IMAGE", "LANE", "TORCH_VERSION"]
    assert given["BASE_IMAGE"] == "a-base"
    assert given["TORCH_VERSION"]


def test_an_arg_that_nothing_feeds_is_an_error(checkout: Path) -> None:
    (checkout / "Dockerfile.calib").write_text("ARG NO_SUCH_PIN\n")
    with pytest.raises(UserError, match="ARG NO_SUCH_PIN"):
        build(checkout).arguments()


def test_an_operator_may_set_the_args_that_there_are(checkout: Path) -> None:
    assert build(checkout, chosen={"TORCH_VERSION": "9"}).arguments()["TORCH_VERSION"] == "9"
    with pytest.raises(UserError, match="has no ARG TORCH"):
        build(checkout, chosen={"TORCH": "9"}).arguments()


def test_a_lane_that_an_image_lacks_is_an_error(checkout: Path) -> None:
    with pytest.raises(UserError, match="calib has no lane 'wheel'"):
        build(checkout, lane="wheel").arguments()


@pytest.mark.parametrize("name", definitions.IMAGES)
def test_the_real_dockerfiles_are_fed(name: str) -> None:
    image = definitions.IMAGES[name]
    for lane in image.lanes:
        given = Build(image=image, lane=lane, base="b", apt_snapshot="", revision="r").arguments()
        assert given["BASE_IMAGE"] == "b"
        assert given["SOURCE_DATE_EPOCH"] == str(definitions.epoch())


def test_an_unknown_image_is_named() -> None:
    with pytest.raises(UserError, match="there is no image 'train'"):
        definitions.get("train")


def test_pip_is_told_of_indexes_and_not_of_this_machines_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "https://pypi.example.org/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "file:///srv/simple https://more.example.org/simple")
    monkeypatch.setenv("PIP_FIND_LINKS", "/srv/wheels")
    lines = image_build.pip_settings(ca=True).splitlines()
    assert "index-url = https://pypi.example.org/simple" in lines
    assert "extra-index-url = https://more.example.org/simple" in lines
    assert "cert = /dev/shm/ca.pem" in lines
    assert "/srv" not in "".join(lines)


def docker_stub(folder: Path, script: str) -> None:
    folder.mkdir()
    (folder / "docker").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "docker").chmod(0o755)


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ('case "$1" in buildx) exit 0;; *) echo Docker version 29.0.1, build x;; esac', ["buildx", "build", "--load"]),
        ('case "$1" in buildx) exit 1;; *) echo Docker version 20.10.24, build x;; esac', ["build"]),
    ],
)
def test_a_docker_that_can_build_is_found(
    script: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docker_stub(tmp_path / "no", 'case "$1" in buildx) exit 1;; *) echo Docker version 28.2.2, build x;; esac')
    docker_stub(tmp_path / "yes", script)
    monkeypatch.setenv("PATH", f"{tmp_path / 'no'}:{tmp_path / 'yes'}:/usr/bin:/bin" if script else "")
    found = image_build.builder()
    assert found[1:] == arguments
    assert Path(found[0]).parent == tmp_path / "yes"


def test_without_docker_the_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="docker is not installed"):
        image_build.builder()
    docker_stub(tmp_path / "bin", "echo Docker version 28.2.2; [ $1 != buildx ]")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(UserError, match="cannot build with BuildKit"):
        image_build.builder()


# --- sealing


def layer(mtimes: dict[str, int], long: str = "") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, mtime in mtimes.items():
            entry = tarfile.TarInfo(name + long)
            entry.mtime, entry.size = mtime, len(name)
            tar.addfile(entry, io.BytesIO(name.encode()))
    return out.getvalue()


def saved_image(layers: list[bytes], created: str) -> io.BytesIO:
    """What `docker save` writes for these layers; the last one as a link when it is the same as the first."""
    config = {
        "architecture": "amd64",
        "os": "linux",
        "created": created,
        "docker_version": "20.10",
        "container_config": {"Hostname": "build-host"},
        "config": {"User": "10000:10000", "Env": ["A=1"], "Hostname": "", "Labels": None, "Tty": False},
        "history": [{"created": created, "created_by": "RUN it"}, {"created": "2020-01-01T00:00:00Z"}],
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(one).hexdigest()}" for one in layers]},
    }
    names = [f"id{index}/layer.tar" for index in range(len(layers))]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in (
            *zip(names, layers, strict=True),
            ("the-config.json", json.dumps(config).encode()),
            ("manifest.json", json.dumps([{"Config": "the-config.json", "Layers": names}]).encode()),
        ):
            entry = tarfile.TarInfo(name)
            if name == names[-1] and len(layers) > 1 and content == layers[0]:
                entry.type, entry.linkname = tarfile.SYMTYPE, "../id0/layer.tar"
                tar.addfile(entry)
            else:
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return out


def sealed(saved: io.BytesIO) -> tuple[dict, dict[str, bytes]]:
    """The configuration and the members of the sealed archive."""
    archive = io.BytesIO()
    normalize.write_sealed(saved, archive, "name:tag")
    archive.seek(0)
    with tarfile.open(fileobj=archive) as tar:
        members = {entry.name: tar.extractfile(entry).read() for entry in tar}
    return json.loads(members["config.json"]), members


def test_two_builds_at_different_times_have_one_sealed_form() -> None:
    early, late = definitions.epoch() - 100, definitions.epoch() + 100
    base = layer({"etc/hosts": early})
    forms = []
    for built, created in ((late, "2031-01-01T00:00:00Z"), (late + 7, "2032-01-01T00:00:00.5Z")):
        forms.append(sealed(saved_image([base, layer({"etc": built, "opt/a": early}, "/long" * 60)], created)))
    assert forms[0] == forms[1]
    config, members = forms[0]
    assert set(members) == {"config.json", "manifest.json", "1/layer.tar"}, "the engine has the layer below"
    assert config["rootfs"]["diff_ids"][0] == f"sha256:{hashlib.sha256(base).hexdigest()}"
    assert config["rootfs"]["diff_ids"][1] == f"sha256:{hashlib.sha256(members['1/layer.tar']).hexdigest()}"
    with tarfile.open(fileobj=io.BytesIO(members["1/layer.tar"])) as tar:
        assert [entry.mtime for entry in tar] == [definitions.epoch(), early]
        assert tar.extractfile(tar.getmembers()[1]).read() == b"opt/a"


def test_a_settled_image_is_sealed_without_its_layers() -> None:
    settled = layer({"a": definitions.epoch()})
    config, members = sealed(saved_image([settled, layer({"b": 0}), settled], definitions.created()))
    assert set(members) == {"config.json", "manifest.json"}
    assert len(json.loads(members["manifest.json"])[0]["Layers"]) == 3
    assert config["created"] == definitions.created()


def test_a_sealed_configuration_holds_no_trace_of_the_engine() -> None:
    config, _ = sealed(saved_image([layer({"a": 0})], "2031-01-01T00:00:00Z"))
    assert set(config) == {"architecture", "os", "created", "config", "history", "rootfs"}
    assert config["config"] == {"User": "10000:10000", "Env": ["A=1"]}
    assert [entry["created"] for entry in config["history"]] == [definitions.created(), "2020-01-01T00:00:00Z"]
