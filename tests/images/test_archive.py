"""What `docker save` writes is read in either form, and two images' differences are named file by file."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
import tracemalloc
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytest

from v4forge.errors import UserError
from v4forge.images import archive as image_archive
from v4forge.images.archive import Saved, read
from v4forge.images.diff import differences

Member = tuple[tarfile.TarInfo, bytes]
LAYOUTS = ("docker", "oci", "oci gzip")


def member(name: str, content: bytes = b"", **fields: Any) -> Member:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mtime = len(content), 1_700_000_000
    for key, value in fields.items():
        setattr(entry, key, value)
    return entry, content


def tar(members: Iterable[Member]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for entry, content in members:
            archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def config_of(layers: Sequence[bytes], **more: Any) -> bytes:
    history = [{"created_by": f"RUN step {index}"} for index in range(len(layers))]
    history.insert(1, {"created_by": "ENV A=1", "empty_layer": True})  # type: ignore[dict-item]
    rootfs = {"type": "layers", "diff_ids": [f"sha256:{digest(layer)}" for layer in layers]}
    return json.dumps({"config": {"Env": ["A=1"]}, "history": history, "rootfs": rootfs, **more}).encode()


def archive(layers: Sequence[bytes], config: bytes, layout: str = "docker") -> bytes:
    """What docker writes: `<id>/layer.tar` and the config by its digest, or blobs of the OCI layout."""
    if layout == "docker":
        names = [f"{index:064x}/layer.tar" for index in range(len(layers))]
        stored, config_name = list(layers), f"{digest(config)}.json"
    else:
        stored = [gzip.compress(layer) for layer in layers] if layout == "oci gzip" else list(layers)
        names = [f"blobs/sha256/{digest(layer)}" for layer in stored]
        config_name = f"blobs/sha256/{digest(config)}"
    manifest = json.dumps([{"Config": config_name, "RepoTags": None, "Layers": names}]).encode()
    files = [*zip(names, stored, strict=True), (config_name, config), ("manifest.json", manifest)]
    return tar(member(name, content) for name, content in files)


def saved(layers: Sequence[Sequence[Member]], layout: str = "docker", **config: Any) -> Saved:
    contents = [tar(members) for members in layers]
    return read_bytes(archive(contents, config_of(contents, **config), layout))


def read_bytes(content: bytes) -> Saved:
    return read(lambda: iter([content[:700], content[700:]]))


FILES = (
    member("opt", type=tarfile.DIRTYPE, mode=0o755),
    member("opt/a.txt", b"one\ntwo\n", mode=0o644, uid=7, gid=8),
    member("opt/link", type=tarfile.SYMTYPE, linkname="a.txt"),
    member("opt/hard", type=tarfile.LNKTYPE, linkname="opt/a.txt"),
    member("dev/null", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_id_layers_steps_and_files(layout: str) -> None:
    contents = [tar(FILES), tar([member("b", b"12345")])]
    config = config_of(contents)
    image = read_bytes(archive(contents, config, layout))
    assert image.id == f"sha256:{digest(config)}"
    assert [layer.diff_id for layer in image.layers] == [f"sha256:{digest(content)}" for content in contents]
    assert [layer.created_by for layer in image.layers] == ["RUN step 0", "RUN step 1"]
    assert [layer.bytes for layer in image.layers] == [8, 5]
    files = image.layers[0].files
    assert list(files) == ["/opt", "/opt/a.txt", "/opt/link", "/opt/hard", "/dev/null"]
    assert files["/opt/a.txt"] == image_archive.Entry("file", 0o644, 7, 8, 8, 1_700_000_000, digest(b"one\ntwo\n"))
    assert [(file.type, file.content) for file in files.values()][2:] == [
        ("symlink", "a.txt"),
        ("hardlink", "opt/a.txt"),
        ("character device", "1:3"),
    ]


def test_a_layer_that_docker_stored_once_and_linked_is_found() -> None:
    layer = tar([member("a", b"a")])
    config = config_of([layer, layer])
    manifest = json.dumps([{"Config": "c.json", "Layers": ["one/layer.tar", "two/layer.tar"]}]).encode()
    link = member("two/layer.tar", type=tarfile.SYMTYPE, linkname="../one/layer.tar")
    parts = [member("one/layer.tar", layer), link, member("c.json", config), member("manifest.json", manifest)]
    assert [list(layer.files) for layer in read_bytes(tar(parts)).layers] == [["/a"], ["/a"]]


def test_an_empty_layer_and_an_image_without_history_are_read() -> None:
    layer = tar([])
    config = json.dumps({"rootfs": {"diff_ids": [f"sha256:{digest(layer)}"]}}).encode()
    (only,) = read_bytes(archive([layer], config, "oci")).layers
    assert (only.files, only.created_by) == ({}, "")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no tar at all" * 100,
        tar([member("manifest.json", b"[]")]),
        tar([member("manifest.json", b"[{}, {}]")]),
        tar([member("manifest.json", b'[{"Config": "missing.json", "Layers": []}]')]),
        archive([tar(FILES)], config_of([tar(FILES)]))[:3000],
    ],
)
def test_what_is_not_a_whole_archive_of_one_image_is_refused(content: bytes) -> None:
    with pytest.raises(UserError, match="not a whole archive of one image"):
        read_bytes(content)


def test_a_layer_other_than_the_configs_is_refused() -> None:
    with pytest.raises(UserError, match="not those that its config names"):
        read_bytes(archive([tar(FILES)], config_of([tar(FILES[:2])])))


def test_zstd_is_refused_with_what_to_do() -> None:
    with pytest.raises(UserError, match="blobs/sha256/x is packed with zstd"):
        read_bytes(tar([member("blobs/sha256/x", b"\x28\xb5\x2f\xfd" + b"x" * 600)]))


def test_no_layer_is_held_in_memory() -> None:
    """A layer of 96 MB, generated while it is read."""
    size, block = 96 << 20, 1 << 20
    inner = tarfile.TarInfo("zeros")
    inner.size = size
    padding = bytes(1024)
    whole = hashlib.sha256(inner.tobuf())
    for _ in range(size // block):
        whole.update(bytes(block))
    whole.update(padding)
    config = json.dumps({"rootfs": {"diff_ids": [f"sha256:{whole.hexdigest()}"]}}).encode()
    manifest = json.dumps([{"Config": "c.json", "Layers": ["l/layer.tar"]}]).encode()
    outer = tarfile.TarInfo("l/layer.tar")
    outer.size = 512 + size + len(padding)

    def stream() -> Iterator[bytes]:
        yield outer.tobuf() + inner.tobuf()
        for _ in range(size // block):
            yield bytes(block)
        yield padding + tar([member("c.json", config), member("manifest.json", manifest)])

    tracemalloc.start()
    image = read(stream)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert image.layers[0].bytes == size
    assert peak < 12 << 20


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_images_have_no_differences(layout: str) -> None:
    assert differences(saved([FILES], layout), saved([FILES])) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"mode": 0o600}, "/opt/a.txt: mode 0o644 and 0o600"),
        ({"uid": 0}, "/opt/a.txt: uid 7 and 0"),
        ({"gid": 0}, "/opt/a.txt: gid 8 and 0"),
        ({"mtime": 1_700_000_001}, "/opt/a.txt: mtime 1700000000 and 1700000001"),
        ({"uname": "root"}, "/opt/a.txt: extra  and owner=root:"),
        ({"pax_headers": {"SCHILY.xattr.user.x": "y"}}, "/opt/a.txt: extra  and SCHILY.xattr.user.x=y"),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_changed_header_is_named(change: dict[str, Any], expected: str, layout: str) -> None:
    other = member("opt/a.txt", b"one\ntwo\n", **{"mode": 0o644, "uid": 7, "gid": 8, **change})
    lines = differences(saved([FILES], layout), saved([(FILES[0], other, *FILES[2:])], layout))
    assert lines == ["layer 0 (RUN step 0): 0 files added, 0 removed, 1 changed", f"  {expected}"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_changed_text_is_shown_at_its_first_line(layout: str) -> None:
    other = member("opt/a.txt", b"one\n2\n", mode=0o644, uid=7, gid=8)
    _, line = differences(saved([FILES], layout), saved([(FILES[0], other, *FILES[2:])], layout))
    assert line.startswith("  /opt/a.txt: size 8 and 6, content ")
    assert line.endswith("; line 2: 'two' and '2'")


def test_changed_bytes_that_are_no_text_are_not_shown() -> None:
    contents = (b"\xff\x00", b"\xff\x01")
    one, other = ([member("x", content)] for content in contents)
    _, line = differences(saved([one]), saved([other]))
    assert line == "  /x: content {}… and {}…".format(*(digest(content)[:39] for content in contents))


def test_added_and_removed_files_links_and_types_are_named() -> None:
    one = [member("gone", b"1"), member("link", type=tarfile.SYMTYPE, linkname="x"), member("kind", b"")]
    other = [
        member("link", type=tarfile.SYMTYPE, linkname="y"),
        member("kind", type=tarfile.DIRTYPE),
        member("new", b"1"),
    ]
    assert differences(saved([one]), saved([other])) == [
        "layer 0 (RUN step 0): 1 files added, 1 removed, 2 changed",
        "  /gone: removed",
        f"  /kind: type file and directory, content {digest(b'')[:39]}… and ",
        "  /link: content x and y",
        "  /new: added",
    ]


def test_the_same_files_in_another_order_are_said_to_be_that() -> None:
    one = [member("a"), member("b")]
    (line,) = differences(saved([one]), saved([one[::-1]]))
    assert line == "layer 0 (RUN step 0): the same files in another order, first /a and /b"


def test_other_padding_is_said_to_be_that() -> None:
    layer = tar(FILES)
    images = [read_bytes(archive([content], config_of([content]))) for content in (layer, layer + bytes(10240))]
    (line,) = differences(*images)
    assert line.endswith("the same files in the same order; the archives' headers or padding differ")


def test_the_config_is_compared_value_by_value() -> None:
    one = saved([FILES], created="2020", config={"Env": ["A=1", "B=2"], "Labels": {"x": "1"}})
    other = saved([FILES], created="2021", config={"Env": ["A=1"], "Labels": {"x": "2"}})
    assert differences(one, other) == [
        "config config.Env[1]: 'B=2' and None",
        "config config.Labels.x: '1' and '2'",
        "config created: '2020' and '2021'",
    ]


def test_a_layer_that_only_one_image_has_is_named() -> None:
    lines = differences(saved([FILES]), saved([FILES, [member("more")]]))
    assert "a layer only in the second: RUN step 1" in lines


def test_no_more_files_than_asked_for_are_listed_and_the_rest_is_counted() -> None:
    one, other = ([member(f"f{index}", content) for index in range(9)] for content in (b"1", b"2"))
    lines = differences(saved([one, one]), saved([other, other]), limit=4)
    assert sum(line.startswith("  /f") for line in lines) == 4
    assert lines[-1] == "and 14 more files"


def test_sizes_are_summed_and_held_against_the_budget() -> None:
    layers = [(100 << 20, "ADD base"), (924 << 20, "RUN pip install")]
    assert image_archive.size_report(layers, 2) == [
        " size, MiB   layer",
        "     100.0   ADD base",
        "     924.0   RUN pip install",
        "   1,024.0   together, 50% of 2 GiB",
    ]
    with pytest.raises(UserError, match=r"has 1\.00 GiB, its budget is 0\.5 GiB; .* 0\.90 GiB: RUN pip install"):
        image_archive.size_report(layers, 0.5)


@pytest.mark.parametrize(
    ("created_by", "shown"),
    [
        ("", "imported"),
        (
            "RUN |2 A=x B=/bin/y /bin/sh -euc apt-get install python3 # buildkit",
            "RUN apt-get install python3 # buildkit",
        ),
        ("/bin/sh -c #(nop)  USER 1000", "USER 1000"),
        ("/bin/sh -euc make", "make"),
        ("COPY v4forge /opt # buildkit", "COPY v4forge /opt # buildkit"),
        ("RUN /bin/sh -c " + "x" * 200, "RUN " + "x" * 95 + "…"),
    ],
)
def test_a_step_is_shown_by_its_command(created_by: str, shown: str) -> None:
    assert image_archive.step_of(created_by) == shown
