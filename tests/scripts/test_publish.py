"""scripts.publish and a local server that takes uploads as the hub does: what is refused, sent, resumed, read back."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import certified_artifact
import pytest
from hub_stand_in import Fault, Repo, serving, sha256_of
from hub_uploads import EMPTY, Break, UploadHub
from huggingface_hub import constants
from huggingface_hub.utils import _http
from keys import keypair

from scripts import publish
from v4forge import certified
from v4forge.errors import UserError

TOKEN = "hf_SecretOfTheTests"
REPO = "org/tiny"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    """The hub, as the caller's environment names it, with a token that may write to org."""
    stand_in = UploadHub(users={TOKEN: "alice"}, writers={TOKEN: {"org"}})
    monkeypatch.setenv("HF_ENDPOINT", stand_in.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patient = SimpleNamespace(**vars(time) | {"sleep": lambda _seconds: None})  # between the library's own attempts
    monkeypatch.setattr(_http, "time", patient)
    with serving(stand_in):
        yield stand_in


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("made")
    certified_artifact.write(work)
    return work


@pytest.fixture
def artifact(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "tiny")
    for shard in sorted((tmp_path / "tiny/layers").iterdir()):
        number = int(shard.stem.split("-")[1])
        linked = tmp_path / "tiny/artifact" / f"model-{number:05}-of-{certified_artifact.SHARDS:05}.safetensors"
        linked.unlink()
        os.link(shard, linked)
    return tmp_path / "tiny/artifact"


def run(artifact: Path, *options: str) -> int:
    return publish.main(["--artifact", str(artifact), "--repo", REPO, *options])


def refused(artifact: Path, *options: str) -> UserError:
    with pytest.raises(UserError) as error:
        run(artifact, *options)
    return error.value


def local(artifact: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in artifact.iterdir()}


def held(hub: UploadHub, branch: str = "main") -> dict[str, bytes]:
    """What a download of the branch would give, but for what the hub puts there itself."""
    repo = hub.repos[REPO]
    return {name: content for name, content in repo.commits[repo.branches[branch]].items() if name not in EMPTY}


def test_a_dry_run_says_what_an_upload_would_do_and_changes_nothing(
    hub: UploadHub, artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same, other = "model-00002-of-00005.safetensors", "config.json"
    hub.repos[REPO] = Repo.of({same: (artifact / same).read_bytes(), other: b"{}", "old.bin": b"x", **EMPTY})
    assert run(artifact) == 0
    printed = capsys.readouterr().out
    rows = {line.split()[0]: line for line in printed.splitlines() if line.strip()}
    assert rows[same].rstrip().endswith("the same") and rows[other].rstrip().endswith("other bytes")
    assert f"{hub.url}/{REPO} is there, public; branch main; as alice" in printed
    assert "it holds 1 other files, which stay: old.bin" in printed
    assert "--yes" in printed.splitlines()[-1]
    assert hub.changes == []


def test_a_dry_run_needs_neither_token_nor_network(
    hub: UploadHub, artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert run(artifact) == 0
    assert "would be made, public; branch main; as nobody" in (said := capsys.readouterr().out)
    assert "there is no token" in said and hub.changes == []
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert run(artifact) == 0
    assert "what it has is not known" in capsys.readouterr().out


@pytest.mark.parametrize("part_bytes", [1 << 40, 16_384], ids=["in one piece", "in parts"])
def test_an_artifact_appears_whole_in_one_commit_and_is_read_back(
    hub: UploadHub, artifact: Path, part_bytes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.part_bytes = part_bytes
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in artifact.iterdir()}
    assert run(artifact, "--yes") == 0
    assert held(hub) == local(artifact)
    repo = hub.repos[REPO]
    assert len(repo.commits) == 2 and not repo.private
    assert capsys.readouterr().out.splitlines()[-1] == f"{hub.url}/{REPO}/tree/{repo.branches['main']}"
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in artifact.iterdir()} == before
    assert not any("authorization" in each.headers for each in hub.asked(r"^/lfs/", "PUT"))


def test_what_is_there_already_is_not_sent_again(hub: UploadHub, artifact: Path) -> None:
    assert run(artifact, "--yes") == 0
    hub.requests.clear()
    assert run(artifact, "--yes") == 0
    assert run(artifact) == 0
    assert hub.changes == []
    (artifact / "README.md").write_text("---\nlicense: mit\n---\n# Another card\n")
    assert run(artifact, "--yes") == 0
    assert hub.uploads == [] and held(hub) == local(artifact)


def test_a_connection_that_breaks_is_said_and_the_same_command_sends_the_rest(
    hub: UploadHub, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("v4forge.hub.upload.AT_A_TIME", 1)
    shards = sorted(artifact.glob("*.safetensors"), key=lambda path: -path.stat().st_size)
    third = certified_artifact.sha256_of(shards[2])
    hub.breaks = [Break(third, after_bytes=10_000, times=100)]
    error = refused(artifact, "--yes")
    assert "did not take all of org/tiny" in error.fact
    assert error.hint.endswith(f"go on: python -m scripts.publish --artifact {artifact} --repo {REPO} --yes")
    assert held(hub) == {}, "half an artifact can be downloaded"
    sent = [certified_artifact.sha256_of(shard) for shard in shards[:2]]
    assert hub.uploads == sent
    hub.breaks = []
    assert run(artifact, "--yes") == 0
    assert hub.uploads == [*sent, *(certified_artifact.sha256_of(shard) for shard in shards[2:])]
    assert held(hub) == local(artifact)


def test_a_short_break_is_passed_over(hub: UploadHub, artifact: Path) -> None:
    hub.breaks = [Break("/lfs/", after_bytes=100, times=2)]
    hub.faults = [Fault("/lfs/", "PUT", times=1, status=503)]
    assert run(artifact, "--yes") == 0
    assert held(hub) == local(artifact)


def test_bytes_that_the_hub_has_otherwise_are_named(hub: UploadHub, artifact: Path) -> None:
    shard = "model-00003-of-00005.safetensors"
    hub.spoils = {certified_artifact.sha256_of(artifact / shard)}
    error = refused(artifact, "--yes")
    assert f"{hub.url}/{REPO} has other bytes for {shard} at " in error.fact and "upload again" in error.hint


def test_a_file_that_the_commit_lacks_is_named(hub: UploadHub, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EMPTY, ".gitattributes", b"")
    commit = UploadHub.commit

    def forgetful(self: UploadHub, call: object, repo: str, revision: str) -> None:
        call.logged.body = b"\n".join(  # type: ignore[attr-defined]
            line
            for line in call.logged.body.splitlines()  # type: ignore[attr-defined]
            if b"tokenizer.json" not in line
        )
        commit(self, call, repo, revision)  # type: ignore[arg-type]

    monkeypatch.setattr(UploadHub, "commit", forgetful)
    assert "lacks tokenizer.json at " in refused(artifact, "--yes").fact


def without_certificate(artifact: Path) -> None:
    (artifact / "certificate.json").unlink()


def with_failed_check(artifact: Path) -> None:
    certified_artifact.seal(artifact, checks=[{"name": "aliases", "ok": False, "detail": ""}])


def with_stale_certificate(artifact: Path) -> None:
    certificate = (artifact / "certificate.json").read_text()
    (artifact / "LICENSE").write_text("another\n")
    certified_artifact.seal(artifact)
    (artifact / "certificate.json").write_text(certificate)


def with_other_bytes(artifact: Path) -> None:
    shard = artifact / "model-00001-of-00005.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")


def without_shard(artifact: Path) -> None:
    (artifact / "model-00001-of-00005.safetensors").unlink()


def with_cut_shard(artifact: Path) -> None:
    os.truncate(artifact / "model-00001-of-00005.safetensors", 20_000)


def with_odd_manifest(artifact: Path) -> None:
    (artifact / "manifest.json").write_text("{}")
    certified_artifact.seal(artifact)


def without_card(artifact: Path) -> None:
    (artifact / "README.md").unlink()


def with_notes(artifact: Path) -> None:
    (artifact / "notes.txt").write_text("mine")


def with_folder(artifact: Path) -> None:
    (artifact / "original").mkdir()


def with_damaged_sums(artifact: Path) -> None:
    (artifact / "SHA256SUMS").write_text("0  ../../x\n")
    sums = certified_artifact.sha256_of(artifact / "SHA256SUMS")
    certificate = json.loads((artifact / "certificate.json").read_text()) | {"sums_sha256": sums}
    (artifact / "certificate.json").write_text(json.dumps(certificate))


def empty(artifact: Path) -> None:
    (artifact / "config.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "fact", "hint"),
    [
        (without_certificate, "has no certificate.json: verify has not seen it", "make verify"),
        (with_failed_check, "says that it failed: aliases", "make verify"),
        (with_stale_certificate, "is of another artifact than the one beside it", "make verify"),
        (with_other_bytes, "00001-of-00005.safetensors is not the file that SHA256SUMS names", "make postprocess"),
        (without_shard, "has no model-00001-of-00005.safetensors", "make postprocess"),
        (with_cut_shard, "has 20,000 bytes where 40,001 were certified", "make postprocess"),
        (with_odd_manifest, "manifest.json names no files", "make postprocess"),
        (without_card, "has no README.md", "make card"),
        (with_notes, "notes.txt was written by no run of ours", "mv "),
        (with_folder, "original was written by no run of ours", "mv "),
        (with_damaged_sums, "has a line that is no checksum", "make postprocess"),
        (empty, "there is no artifact in ", "make artifact"),
    ],
)
def test_what_is_not_a_verified_artifact_is_refused_in_a_dry_run_too(
    hub: UploadHub, artifact: Path, spoil: Callable[[Path], None], fact: str, hint: str
) -> None:
    spoil(artifact)
    for options in ([], ["--yes"]):
        error = refused(artifact, *options)
        assert fact in error.fact and error.hint.startswith(hint)
    assert hub.requests == []


def test_what_helps_says_for_which_folder(artifact: Path) -> None:
    flash = artifact.parent.rename(artifact.parent.with_name("flash")) / "artifact"
    without_certificate(flash)
    assert refused(flash).hint == f"make verify PROFILE=flash SCRATCH={flash.parents[1]}"


@pytest.mark.parametrize(
    ("name", "fact"),
    [
        ("tiny", "does not say whose repository"),
        ("a/b/c", "is no name of a repository"),
        ("org/ti--ny", "is no name of a repository"),
        ("", "is no name of a repository"),
    ],
)
def test_a_name_that_is_none_is_refused(artifact: Path, name: str, fact: str) -> None:
    with pytest.raises(UserError, match=fact) as error:
        publish.main(["--artifact", str(artifact), "--repo", name])
    assert error.value.hint.startswith("make publish REPO=")


def test_without_a_token_nothing_is_uploaded(hub: UploadHub, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    error = refused(artifact, "--yes")
    assert error.fact == "there is no token to publish with" and "hf auth login" in error.hint
    assert hub.changes == []


def test_a_token_that_may_not_write_there_is_said(hub: UploadHub, artifact: Path) -> None:
    hub.writers = {}
    error = refused(artifact, "--yes")
    assert "the token may not write there" in error.fact and "a token that may write" in error.hint
    hub.repos[REPO] = Repo.of(EMPTY)
    assert "the token may not write there" in refused(artifact, "--yes").fact


def test_a_token_that_nobody_knows_is_said(hub: UploadHub, artifact: Path) -> None:
    hub.users = {}
    assert refused(artifact, "--yes").fact == f"{hub.url} does not know the token"


def test_a_card_that_the_hub_does_not_take_is_said_before_anything_is_sent(hub: UploadHub, artifact: Path) -> None:
    hub.yaml_errors = ['"license" must be one of those']
    for options in ([], ["--yes"]):
        error = refused(artifact, *options)
        assert error.fact.endswith('does not take README.md: "license" must be one of those')
    assert hub.changes == []


def test_a_private_repository_is_made_private_and_a_public_one_does_not_become_it(
    hub: UploadHub, artifact: Path
) -> None:
    assert run(artifact, "--private", "--yes") == 0
    assert hub.repos[REPO].private and held(hub) == local(artifact)
    assert run(artifact, "--yes") == 0
    hub.repos[REPO].private = False
    for options in (["--private"], ["--private", "--yes"]):
        assert "is public already" in refused(artifact, *options).fact


def test_a_branch_of_its_own_is_made(hub: UploadHub, artifact: Path) -> None:
    hub.repos[REPO] = Repo.of(EMPTY)
    assert run(artifact, "--revision", "v2") == 0
    hub.breaks = [Break("/lfs/", times=100)]
    assert refused(artifact, "--revision", "v2", "--yes").hint.endswith(f"--repo {REPO} --yes --revision v2")
    hub.breaks = []
    assert run(artifact, "--revision", "v2", "--yes") == 0
    assert held(hub, "v2") == local(artifact) and held(hub) == {}


def test_neither_token_nor_signed_addresses_are_ever_printed(
    hub: UploadHub, artifact: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.echo = True
    said = []
    assert run(artifact) == 0
    hub.breaks = [Break("/lfs/", times=100)]
    said.append(str(refused(artifact, "--yes")))
    hub.breaks = []
    hub.faults = [Fault("/lfs/", "PUT", times=100, status=500)]
    said.append(str(refused(artifact, "--yes")))
    hub.faults = []
    monkeypatch.setattr(UploadHub, "commit", lambda self, call, **_: self.refuse(call, 400, "not so"))
    said.append(str(refused(artifact, "--yes")))
    assert "not so: Bearer <token>" in said[-1]
    hub.writers = {}
    said.append(str(refused(artifact, "--yes")))
    hub.users = {}
    said.append(str(refused(artifact, "--yes")))
    output = capfd.readouterr()
    for text in (*said, output.out, output.err):
        assert TOKEN not in text and "5ec2e7" not in text


def test_digests_that_an_earlier_stage_made_are_not_made_again(
    hub: UploadHub, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(artifact) == 0
    for reader in ("v4forge.digests.file_sha256", "huggingface_hub.lfs.sha_fileobj"):
        monkeypatch.setattr(reader, lambda path: pytest.fail(f"{path} was read again"))
    assert run(artifact, "--yes") == 0
    assert sha256_of((artifact / "LICENSE").read_bytes()) in (artifact.parent / ".stamps/digests.json").read_text()


def test_a_signature_is_asked_for_and_goes_with_the_certificate(hub: UploadHub, artifact: Path, tmp_path: Path) -> None:
    private, public = keypair(tmp_path)
    assert "is not signed" in refused(artifact, "--verify-key", str(public)).fact
    certified.sign(artifact, private)
    assert run(artifact, "--yes", "--verify-key", str(public)) == 0
    assert held(hub) == local(artifact) and "certificate.sig.json" in held(hub)
