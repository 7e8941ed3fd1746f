"""v4forge.certified and v4forge.contents: which folders are what was certified, and which bytes are read for it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import certified_artifact
import pytest
from certified_artifact import sha256_of
from keys import keypair

from v4forge import artifact_folder, certified, contents, digests
from v4forge.certified import CONTENTS, SIZES
from v4forge.checkout import ROOT
from v4forge.contents import Memory
from v4forge.digests import Digests
from v4forge.errors import UserError

SECOND = "model-00002-of-00005.safetensors"


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return certified_artifact.write(tmp_path / "work")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read whole."""
    names: list[str] = []
    real = digests.file_sha256

    def noting(path: Path, *more: Any) -> str:
        names.append(path.name)
        return real(path, *more)

    monkeypatch.setattr(digests, "file_sha256", noting)
    return names


def refused(artifact: Path, level: str = SIZES, **more: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        certified.check(artifact, "make verify", level, **more)
    assert "\n" not in caught.value.fact and caught.value.hint
    return caught.value


def passes(artifact: Path, level: str = CONTENTS, **more: Any) -> None:
    assert certified.check(artifact, "make verify", level, **more).verdict == "ok"


def rewrite(path: Path, at: int = 20_000, text: bytes = b"other") -> None:
    """Overwrites bytes in place."""
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(text)


def cut(artifact: Path) -> None:
    os.truncate(artifact / SECOND, 20_000)


def missing(artifact: Path) -> None:
    (artifact / SECOND).unlink()


def emptied(artifact: Path) -> None:
    (artifact / SECOND).write_bytes(b"")


def longer(artifact: Path) -> None:
    with open(artifact / SECOND, "ab") as file:
        file.write(b"x")


def swapped_with_another_size(artifact: Path) -> None:
    shutil.copyfile(artifact / "model-00003-of-00005.safetensors", artifact / SECOND)


def a_folder(artifact: Path) -> None:
    missing(artifact)
    (artifact / SECOND).mkdir()


def a_pipe(artifact: Path) -> None:
    missing(artifact)
    os.mkfifo(artifact / SECOND)


def a_link_to_nothing(artifact: Path) -> None:
    missing(artifact)
    (artifact / SECOND).symlink_to("../blobs/gone")


def a_link_to_itself(artifact: Path) -> None:
    missing(artifact)
    (artifact / SECOND).symlink_to(SECOND)


def another_config(artifact: Path) -> None:
    rewrite(artifact / "config.json", 2, b"N")


def another_shard(artifact: Path) -> None:
    (artifact / "model-extra.safetensors").write_bytes(b"x")


def another_folder(artifact: Path) -> None:
    (artifact / "additional_chat_templates").mkdir()


def another_template(artifact: Path) -> None:
    (artifact / "chat_template.jinja").write_text("{}")


def no_sums(artifact: Path) -> None:
    (artifact / "SHA256SUMS").unlink()
    change(artifact, "certificate.json", sums_sha256=None)


def change(artifact: Path, name: str, **changes: Any) -> None:
    path = artifact / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


SEEN_BY_SIZE: dict[Callable[[Path], None], str] = {
    cut: "has 20,000 bytes where 40,002 were certified",
    missing: "cannot be read: No such file",
    emptied: "has 0 bytes where 40,002 were certified",
    longer: "has 40,003 bytes where 40,002 were certified",
    swapped_with_another_size: "has 40,003 bytes",
    a_folder: "is no file",
    a_pipe: "is no file",
    a_link_to_nothing: "a link to ../blobs/gone, cannot be read: No such file",
    a_link_to_itself: "cannot be read: Too many levels of symbolic links",
    another_config: "config.json has other bytes than SHA256SUMS says",
    another_shard: "model-extra.safetensors is none of the files that manifest.json lists",
    another_folder: "additional_chat_templates is none of the files",
    another_template: "chat_template.jinja is none of the files",
    no_sums: "SHA256SUMS is missing or damaged",
}


@pytest.mark.parametrize("spoil", SEEN_BY_SIZE, ids=lambda spoil: spoil.__name__)
def test_what_names_and_sizes_tell_is_refused_at_either_level_and_no_shard_is_read(
    spoil: Callable[[Path], None], artifact: Path, reads: list[str]
) -> None:
    passes(artifact, SIZES)
    spoil(artifact)
    for level in (SIZES, CONTENTS):
        assert SEEN_BY_SIZE[spoil] in refused(artifact, level).fact
    assert artifact_folder.certificate_state(artifact).verdict == "changed"
    assert reads == []


def overwritten(artifact: Path) -> None:
    rewrite(artifact / SECOND)


def overwritten_with_its_time(artifact: Path) -> None:
    before = (artifact / SECOND).stat()
    rewrite(artifact / SECOND)
    os.utime(artifact / SECOND, ns=(before.st_atime_ns, before.st_mtime_ns))


def swapped(artifact: Path) -> None:
    """For one of another run: as long, with the time of the one before."""
    before = (artifact / SECOND).stat()
    (artifact / SECOND).unlink()
    (artifact / SECOND).write_bytes(os.urandom(before.st_size))
    os.utime(artifact / SECOND, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("spoil", [overwritten, overwritten_with_its_time, swapped], ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize("before", ["seen", "never seen"])
def test_other_bytes_of_the_same_size_are_refused_by_contents(
    spoil: Callable[[Path], None], before: str, artifact: Path, reads: list[str]
) -> None:
    if before == "seen":
        passes(artifact)
    reads.clear()
    spoil(artifact)
    passes(artifact, SIZES)
    assert refused(artifact, CONTENTS).fact.endswith(f"{SECOND} has other bytes than SHA256SUMS says")
    assert reads == [SECOND] if before == "seen" else SECOND in reads
    reads.clear()
    refused(artifact, CONTENTS)
    assert reads == [], "what is known to be wrong is read again"


ODD_MANIFESTS: dict[str, tuple[str, str]] = {
    "nothing": ("", "is not JSON"),
    "no JSON": ("{", "is not JSON"),
    "deep": ("[" * 100_000, "is not JSON"),
    "a list": ("[]", "holds no JSON object"),
    "{}": ("{}", "names no files"),
    "no files": ('{"files": {}}', "names no files"),
    "files of a list": ('{"files": ["config.json"]}', "names no files"),
    "above": ('{"files": {"../x": {"sha256": "0", "bytes": 1}}}', "lists '../x', which is no name of a file"),
    "parent": ('{"files": {"..": {"sha256": "0", "bytes": 1}}}', "lists '..', which is no name of a file"),
    "itself": ('{"files": {".": {"sha256": "0", "bytes": 1}}}', "lists '.', which is no name of a file"),
    "absolute": ('{"files": {"/etc/passwd": {"sha256": "0", "bytes": 1}}}', "lists '/etc/passwd', which is no name"),
    "below": ('{"files": {"a/b": {"sha256": "0", "bytes": 1}}}', "lists 'a/b', which is no name"),
    "without a name": ('{"files": {"": {"sha256": "0", "bytes": 1}}}', "lists '', which is no name"),
    "a NUL": ('{"files": {"a\\u0000b": {"sha256": "0", "bytes": 1}}}', "which is no name"),
    "no entry": ('{"files": {"config.json": null}}', "does not say how many bytes config.json has"),
    "no size": ('{"files": {"config.json": {"sha256": "0"}}}', "does not say how many bytes config.json has"),
    "a size of text": ('{"files": {"config.json": {"sha256": "0", "bytes": "9"}}}', "does not say how many bytes"),
    "a size of truth": ('{"files": {"config.json": {"sha256": "0", "bytes": true}}}', "does not say how many bytes"),
    "a negative size": ('{"files": {"config.json": {"sha256": "0", "bytes": -1}}}', "does not say how many bytes"),
    "other digests": ('{"files": {"config.json": {"sha256": "0", "bytes": 1}}}', "do not say the same of"),
}


@pytest.mark.parametrize("how", ODD_MANIFESTS)
def test_a_manifest_of_another_form_is_refused_in_one_line(how: str, artifact: Path) -> None:
    text, fact = ODD_MANIFESTS[how]
    (artifact / "manifest.json").write_text(text)
    assert fact in refused(artifact).fact
    certified_artifact.seal(artifact)  # also where somebody has written sums and certificate over it
    assert fact in refused(artifact).fact
    assert fact in certified.all_changes(artifact)[0].fact


@pytest.mark.parametrize("line", ["0" * 64 + "  ..", "0" * 64 + "  ../x", "0" * 64 + "  ", "Z" * 64 + "  a", "0  a"])
def test_sums_of_another_form_are_refused_in_one_line(line: str, artifact: Path) -> None:
    (artifact / "SHA256SUMS").write_text(line + "\n")
    change(artifact, "certificate.json", sums_sha256=sha256_of(artifact / "SHA256SUMS"))
    assert "has a line that is no checksum" in refused(artifact).fact


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "null", "\x00", '{"ok": true, "checks": [1]}', '{"ok": true, "checks": 1}']
)
def test_a_certificate_of_another_form_has_failed(text: str, artifact: Path) -> None:
    (artifact / "certificate.json").write_text(text)
    assert "certificate.json says that it failed" in refused(artifact).fact


def test_what_is_no_part_of_an_artifact_does_not_matter(artifact: Path) -> None:
    for name in (".git", ".cache", "lost+found"):
        (artifact / name).mkdir()
    (artifact / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (artifact / "README.md").write_text("# Another card\n")
    passes(artifact)


def test_each_byte_is_read_once(artifact: Path, reads: list[str]) -> None:
    passes(artifact)
    assert len(reads) == len(set(reads)) == 11
    reads.clear()
    passes(artifact)
    assert reads == []
    os.utime(artifact / SECOND)
    passes(artifact)
    assert reads == [SECOND]


def test_what_a_stage_has_read_is_not_read_again_and_what_it_remembers_is_known_by_more(
    artifact: Path, reads: list[str]
) -> None:
    known = Digests(artifact.parent / ".stamps/digests.json")
    known.of([artifact / name for name in artifact_folder.entries(artifact)])
    known.save()
    reads.clear()
    passes(artifact)
    assert reads == []
    overwritten_with_its_time(artifact)  # which the stamp cannot see
    assert SECOND in refused(artifact, CONTENTS).fact
    assert reads == [SECOND]


def test_verify_leaves_what_it_has_read(artifact: Path, reads: list[str]) -> None:
    known = Digests(artifact.parent / "elsewhere.json")
    known.of([artifact / name for name in artifact_folder.entries(artifact)])
    certified.remember(artifact, known)
    reads.clear()
    passes(artifact)
    assert reads == []


@pytest.mark.parametrize("keep_times", [True, False])
def test_a_copy_is_read_once_whatever_times_it_has(keep_times: bool, artifact: Path, reads: list[str]) -> None:
    passes(artifact)
    copy = shutil.copytree(
        artifact, artifact.parent / "copy/artifact", copy_function=shutil.copy2 if keep_times else shutil.copyfile
    )
    reads.clear()
    passes(copy)
    assert len(reads) == 11
    passes(copy)
    passes(artifact)
    assert len(reads) == 11
    rewrite(copy / SECOND)
    assert SECOND in refused(copy, CONTENTS).fact


def test_a_link_to_the_folder_is_the_folder(artifact: Path, tmp_path: Path, reads: list[str]) -> None:
    passes(artifact)
    (tmp_path / "here").symlink_to(artifact)
    reads.clear()
    passes(tmp_path / "here")
    assert reads == []
    assert not (tmp_path / ".stamps").exists()
    rewrite(artifact / SECOND)
    assert SECOND in refused(tmp_path / "here", CONTENTS).fact


def test_shards_may_be_links_as_in_the_hubs_cache(artifact: Path, reads: list[str]) -> None:
    blobs = artifact.parent / "blobs"
    blobs.mkdir()
    for path in list(artifact.iterdir()):
        blob = path.rename(blobs / sha256_of(path))
        path.symlink_to(os.path.relpath(blob, artifact))
    passes(artifact)
    reads.clear()
    passes(artifact)
    assert reads == []
    blob = (artifact / SECOND).resolve()
    rewrite(blob)
    assert SECOND in refused(artifact, CONTENTS).fact
    blob.unlink()
    assert "a link to ../blobs/" in refused(artifact).fact


def test_what_was_read_before_an_interruption_is_not_read_again(
    artifact: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "HASH_THREADS", 1)
    learn, learnt = Memory.learn, []

    def interrupted(self: Memory, found: Any) -> None:
        learn(self, found)
        learnt.extend(found)
        if len(learnt) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Memory, "learn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        certified.check(artifact, "make verify")
    monkeypatch.setattr(Memory, "learn", learn)
    reads.clear()
    passes(artifact)
    assert sorted(reads + learnt) == sorted(artifact_folder.entries(artifact))


def test_a_killed_process_leaves_nothing_that_the_next_one_stumbles_over(artifact: Path) -> None:
    program = """
import os, sys
from pathlib import Path
from v4forge import certified, contents
learn = contents.Memory.learn
def killed(self, found):
    learn(self, found)
    os.kill(os.getpid(), 9)
contents.Memory.learn = killed
certified.check(Path(sys.argv[1]), "")
"""
    done = subprocess.run([sys.executable, "-c", program, artifact], cwd=ROOT)
    assert done.returncode == -9
    passes(artifact)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"FOLDER": 1}', '{"FOLDER": {"NAME": [1, 2]}}', '{"FOLDER": {"NAME": "x"}}']
)
def test_a_memory_of_another_form_counts_as_none(text: str, artifact: Path, reads: list[str]) -> None:
    for name in ("contents.json", "digests.json"):
        path = artifact.parent / ".stamps" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text.replace("FOLDER", str(artifact)).replace("NAME", SECOND))
    passes(artifact)
    assert len(reads) == 11
    passes(artifact)
    assert len(reads) == 11


def test_of_two_at_once_the_second_waits_and_reads_nothing(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Path] = []
    real = digests.file_sha256

    def slow(path: Path, *more: Any) -> str:
        reads.append(path)
        time.sleep(0.02)
        return real(path, *more)

    monkeypatch.setattr(digests, "file_sha256", slow)
    threads = [threading.Thread(target=passes, args=(artifact,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reads) == 11


def test_where_nothing_can_be_written_beside_it_the_users_cache_remembers(
    artifact: Path, tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    access = os.access
    closed = (artifact.parent, artifact.parent / ".stamps")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) not in closed and access(path, mode))
    passes(artifact)
    passes(artifact)
    assert len(reads) == 11
    assert (tmp_path / "cache/v4forge/contents.json").is_file() and not (artifact.parent / ".stamps").exists()
    monkeypatch.setattr(os, "access", lambda *_: False)
    passes(artifact)
    assert len(reads) == 22, "nothing could be remembered, and nothing was wrong"


def test_a_memory_that_cannot_be_written_is_no_error(artifact: Path, reads: list[str]) -> None:
    (artifact.parent / ".stamps").write_text("a file in the place of the folder")
    passes(artifact)
    assert len(reads) == 11


def test_a_file_that_changes_while_it_is_read_is_not_taken_for_whole(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = digests.file_sha256

    def meanwhile(path: Path, *more: Any) -> str:
        found = real(path, *more)
        if path.name == SECOND:
            rewrite(path)
        return found

    monkeypatch.setattr(digests, "file_sha256", meanwhile)
    assert f"{SECOND} changed while it was read" in refused(artifact, CONTENTS).fact


def test_all_that_differs_is_told_and_all_of_it_is_read(artifact: Path, reads: list[str]) -> None:
    passes(artifact)
    reads.clear()
    assert certified.all_changes(artifact) == []
    assert len(reads) == 11
    cut(artifact)
    rewrite(artifact / "model-00004-of-00005.safetensors")
    another_shard(artifact)
    (artifact / "LICENSE").unlink()
    told = [Path(change.fact.split()[0]).name for change in certified.all_changes(artifact)]
    assert told == ["LICENSE", SECOND, "model-extra.safetensors", "model-00004-of-00005.safetensors"]


def test_a_signed_certificate_is_of_its_key_and_of_these_files_alone(artifact: Path, tmp_path: Path) -> None:
    private, public = keypair(tmp_path)
    _, other = keypair(tmp_path, "ecdsa")
    passes(artifact)
    assert "is not signed: there is no certificate.sig.json" in refused(artifact, key=public).fact
    certified.sign(artifact, private)
    passes(artifact, key=public)
    assert "is not signed by the key" in refused(artifact, key=other).fact
    # Whoever changes a shard can make sums and a certificate that fit; not the signature.
    rewrite(artifact / SECOND)
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["files"][SECOND]["sha256"] = sha256_of(artifact / SECOND)
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    certified_artifact.seal(artifact)
    passes(artifact)
    assert "is of another certificate than certificate.json" in refused(artifact, key=public).fact
    for text in ("", "{}", "[]"):
        (artifact / "certificate.sig.json").write_text(text)
        assert "is not signed by the key" in refused(artifact, key=public).fact


def test_what_does_not_pass_is_not_signed(artifact: Path, tmp_path: Path) -> None:
    private, _ = keypair(tmp_path)
    cut(artifact)
    with pytest.raises(UserError, match="has 20,000 bytes"):
        certified.sign(artifact, private)
    assert not (artifact / "certificate.sig.json").exists()
