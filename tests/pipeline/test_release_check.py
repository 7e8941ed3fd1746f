"""scripts.release_check on a work folder in which all is well, and with each thing that can be wrong with it, once."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_results
import card_inputs
import certified_artifact
import pytest
from registry_stand_in import Stored, serving

from scripts import release_check
from v4forge import artifact_folder
from v4forge.checkout import ROOT
from v4forge.images import definitions, lock_check, registry
from v4forge.images.oci import MANIFESTS, digest_of
from v4forge.images.registry import Locked
from v4forge.outcomes import Outcome
from v4forge.pipeline import release_check as release
from v4forge.pipeline.release_check import Release
from v4forge.reporting import card, card_subject, gather, page, run_record


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder as after make demo and make bench, whose parts agree."""
    work = tmp_path_factory.mktemp("made") / "tiny"
    artifact = card_inputs.write(work, card_inputs.TINY_CONFIG)
    for shard in artifact.glob("*.safetensors"):
        shard.unlink()  # of that many bytes, all of them zero
    (artifact / "model-00001-of-00001.safetensors").write_bytes(b"weights")
    content = card_inputs.manifest(card_inputs.TINY_CONFIG)
    paths = [artifact / name for name in ("config.json", "LICENSE", "model-00001-of-00001.safetensors")]
    listed = {p.name: {"sha256": certified_artifact.sha256_of(p), "bytes": p.stat().st_size} for p in paths}
    write_json(artifact / "manifest.json", content | {"files": listed})
    certified_artifact.seal(artifact)
    results = bench_results.full(tiny=True)
    for result in results:
        result["target"]["artifact"]["sums_sha256"] = artifact_folder.sums_sha256(artifact)
    bench_results.write(work / "reports", *results)
    write_texts(work)
    return work


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def change(path: Path, **changes: Any) -> None:
    write_json(path, json.loads(path.read_text()) | changes)


def write_texts(work: Path) -> None:
    """Card, run.json and report, by what writes them."""
    run_record.write(work, work / "artifact")
    (work / "artifact/README.md").write_text(card.text(card_subject.gathered(work, work / "artifact")))
    inputs, _ = gather.gathered(work)
    (work / gather.PAGE).write_text(page.page(inputs))
    (work / gather.MARKDOWN).write_text(gather.markdown(inputs))


@pytest.fixture
def work(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "tiny"))


@pytest.fixture
def server() -> Iterator[Stored]:
    with serving() as running:
        yield running


@pytest.fixture
def lock(server: Stored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """images.lock of two images that the registry has, of this checkout's code, as it was when the test began."""
    code = definitions.code_sha256()
    monkeypatch.setattr(definitions, "code_sha256", lambda _root=ROOT: code)
    for name in definitions.IMAGES:
        push(server, name, tmp_path / "images.lock")
    return tmp_path / "images.lock"


def push(server: Stored, name: str, lock: Path, **labels: str) -> None:
    said = definitions.labels(definitions.get(name), "cpu", "0" * 40) | {
        key.replace("_", "."): v for key, v in labels.items()
    }
    config = json.dumps({"config": {"Labels": said}}).encode()
    manifest = json.dumps({"schemaVersion": 2, "config": {"digest": digest_of(config)}, "layers": []}).encode()
    server.blobs[digest_of(config)] = config
    server.manifests[digest_of(manifest)] = (MANIFESTS[0], manifest)
    registry.write_lock(name, Locked(f"{server.host}/x@{digest_of(manifest)}", digest_of(config)), lock)


def row(name: str, subject: Release) -> Outcome:
    """One check of the table."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(release, "CHECKS", {name: release.CHECKS[name]})
        (found,) = release.rows(subject)
    return found


def ok(name: str, subject: Release) -> str:
    found = row(name, subject)
    assert (found.status, found.fix) == ("ok", ""), found
    return found.fact


def failed(name: str, subject: Release) -> tuple[str, str]:
    found = row(name, subject)
    assert found.status == "failed"
    return found.fact, found.fix


OF_THE_ARTIFACT = ("certificate", "checksums", "manifest", "run", "benches", "report", "card")


def test_a_release_is_one(made: Path, lock: Path, server: Stored) -> None:
    subject = Release(made, lock=lock)
    facts = {name: ok(name, subject) for name in (*OF_THE_ARTIFACT, "calib image", "serve image")}
    assert facts["certificate"] == "2 checks passed"
    assert facts["manifest"].startswith("4 layers of deepseek-ai/DeepSeek-V4-Flash at cccccccccccc")
    assert facts["benches"].count(".json") == 4 and facts["calib image"].startswith(f"{server.host}/x@sha256:")


def test_the_program_shows_a_table_or_json_and_fails_when_a_check_does(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(release, "CHECKS", {name: release.CHECKS[name] for name in ("certificate", "benches")})
    assert release_check.main(["--work", str(made)]) == 0
    assert "release-check: ok" in capsys.readouterr().out
    assert release_check.main(["--work", str(made / "none")]) == 1
    table = capsys.readouterr().out
    assert "fix: make artifact" in table and "release-check: 1 of 2 checks FAILED" in table
    assert release_check.main(["--work", str(made / "none"), "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)["checks"]
    assert all(list(row) == ["name", "status", "fact", "fix"] for row in rows)
    assert [(row["name"], row["status"], row["fix"]) for row in rows] == [
        ("certificate", "failed", "make artifact"),
        ("benches", "ok", ""),
    ]


def test_a_tree_with_changes_is_no_release(made: Path, tmp_path: Path) -> None:
    subject = Release(made, root=tmp_path / "checkout")
    subject.root.mkdir()
    assert failed("git tree", subject)[0].endswith("is no git checkout")
    git = ("git", "-C", str(subject.root), "-c", "user.name=a", "-c", "user.email=a@b")
    for command in (("init", "-q"), ("commit", "-q", "--allow-empty", "-m", "x")):
        subprocess.run([*git, *command], check=True)
    assert ok("git tree", subject).startswith("commit ")
    (subject.root / "new").touch()
    fact, fix = failed("git tree", subject)
    assert fact.endswith("has changes that no commit holds") and fix == "git status"


def test_a_document_that_disagrees_with_the_pins_is_named(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = lock_check.read()
    spoiled = replace(project, files=project.files | {"docs/x.md": "\ntorch==0.0.1\n"})
    monkeypatch.setattr(lock_check, "read", lambda _root: spoiled)
    fact, fix = failed("locks", Release(made))
    assert "docs/x.md:2: " in fact and fix == "make lock-check"


def test_an_image_that_was_never_pushed_is_said(made: Path) -> None:
    subject = Release(made, lock=made / "no.lock")
    for name in ("calib", "serve"):
        fact, fix = failed(f"{name} image", subject)
        assert "was never pushed" in fact and fix.startswith(f"make images IMAGE={name}")


def test_an_image_of_other_code_versions_or_form_is_named(made: Path, server: Stored, lock: Path) -> None:
    subject = Release(made, lock=lock)
    push(server, "calib", lock, io_v4forge_code="0" * 64)
    assert "holds other code than this checkout" in failed("calib image", subject)[0]
    push(server, "calib", lock, **{"io_v4forge_versions-sha256": "0" * 64})
    assert "has the label io.v4forge.versions-sha256=" in failed("calib image", subject)[0]
    ok("serve image", subject)
    server.manifests.clear()
    assert f"{server.host} has no {server.host}/x@sha256:" in failed("serve image", subject)[0]
    lock.write_text("SERVE_IMAGE=latest\n")
    assert "is not what `make push` writes" in failed("serve image", subject)[0]


def test_a_registry_that_does_not_answer_is_said(made: Path, tmp_path: Path) -> None:
    nowhere = Locked("127.0.0.1:9/x@sha256:" + "0" * 64, "sha256:" + "0" * 64)
    registry.write_lock("calib", nowhere, tmp_path / "images.lock")
    fact, _ = failed("calib image", Release(made, lock=tmp_path / "images.lock"))
    assert "the registry 127.0.0.1:9 cannot be reached" in fact


def without_certificate(work: Path) -> None:
    (work / "artifact/certificate.json").unlink()


def failed_certificate(work: Path) -> None:
    change(work / "artifact/certificate.json", checks=[{"name": "aliases", "ok": False, "detail": ""}])


def stale_certificate(work: Path) -> None:
    change(work / "artifact/certificate.json", sums_sha256="0" * 64)


def other_bytes(work: Path) -> None:
    (work / "artifact/model-00001-of-00001.safetensors").write_bytes(b"Weights")


def stray_file(work: Path) -> None:
    (work / "artifact/notes.txt").touch()


def no_tokens(work: Path) -> None:
    path = work / "artifact/manifest.json"
    layers = json.loads(path.read_text())["layers"]
    change(path, layers=[*layers[:-1], layers[-1] | {"tokens": []}])


def no_documents(work: Path) -> None:
    path = work / "artifact/manifest.json"
    calibration = json.loads(path.read_text())["calibration"]
    del calibration["corpus"]["documents"]
    change(path, calibration=calibration)


def odd_manifest(work: Path) -> None:
    change(work / "artifact/manifest.json", source="the hub")


def other_files(work: Path) -> None:
    path = work / "artifact/manifest.json"
    files = json.loads(path.read_text())["files"]
    change(path, files=files | {"config.json": {"sha256": "0" * 64, "bytes": 1}})


def no_run(work: Path) -> None:
    (work / "artifact/run.json").unlink()


def no_machine(work: Path) -> None:
    path = work / "artifact/run.json"
    stages = json.loads(path.read_text())["stages"]
    change(path, stages=stages | {"calibrate": stages["calibrate"] | {"machine": None}})


def bench_of_another(work: Path) -> None:
    path = next((work / "reports").glob("speed-*.json"))
    target = json.loads(path.read_text())["target"]
    change(path, target=target | {"artifact": target["artifact"] | {"sums_sha256": "0" * 64}})


def bench_of_nothing(work: Path) -> None:
    path = next((work / "reports").glob("tools-*.json"))
    change(path, target=json.loads(path.read_text())["target"] | {"artifact": None})


def torn_bench(work: Path) -> None:
    next((work / "reports").glob("draft-*.json")).write_text("{")


def no_page(work: Path) -> None:
    (work / "reports/index.html").unlink()


def later_bench(work: Path) -> None:
    next((work / "reports").glob("speed-*.json")).unlink()


def no_card(work: Path) -> None:
    (work / "artifact/README.md").unlink()


def edited_card(work: Path) -> None:
    path = work / "artifact/README.md"
    path.write_text(path.read_text() + "Even better than this.\n")


def test_a_layer_that_keeps_its_experts_has_no_loss_to_state(work: Path) -> None:
    path = work / "artifact/manifest.json"
    layers = json.loads(path.read_text())["layers"]
    for kept, facts in (({"stored": "mxfp4"}, None), ({}, "does not say layers.error")):
        change(path, layers=[{**layers[0], **kept, "error": {}}, *layers[1:]])
        certified_artifact.seal(work / "artifact")
        if facts is None:
            ok("manifest", Release(work))
        else:
            assert facts in failed("manifest", Release(work))[0]


@pytest.mark.parametrize(
    ("check", "spoil", "fact", "fix"),
    [
        ("certificate", without_certificate, "verify has not seen it", "make verify"),
        ("certificate", failed_certificate, "says that it failed: aliases", "make verify"),
        ("certificate", stale_certificate, "is of another artifact", "make verify"),
        ("checksums", other_bytes, "is not the file that SHA256SUMS names", "make postprocess"),
        ("checksums", stray_file, "was written by no run of ours", "mv "),
        ("manifest", no_tokens, "does not say layers.tokens", "make postprocess"),
        ("manifest", no_documents, "does not say calibration.corpus.documents", "make postprocess"),
        ("manifest", odd_manifest, "manifest.json does not say source.files", "make postprocess"),
        ("manifest", other_files, "do not say the same of config.json", "make postprocess"),
        ("run", no_run, "run.json does not exist", "make card"),
        ("run", no_machine, "does not say machine of calibrate", "make calibrate card"),
        ("benches", bench_of_another, "is of another artifact", "move speed-"),
        ("benches", bench_of_nothing, "is of an artifact that it does not name", "move tools-"),
        ("benches", torn_bench, "is not JSON", "pass a result file"),
        ("report", no_page, "index.html does not exist", "make report"),
        ("report", later_bench, "is not what the reports say now", "make report"),
        ("card", no_card, "README.md does not exist", "make card"),
        ("card", edited_card, "is not what manifest, certificate and reports say now", "make card"),
        ("card", later_bench, "is not what manifest, certificate and reports say now", "make card"),
    ],
)
def test_what_does_not_belong_together_is_named_with_what_corrects_it(
    work: Path, check: str, spoil: Callable[[Path], None], fact: str, fix: str
) -> None:
    spoil(work)
    found = failed(check, Release(work))
    assert fact in found[0] and found[1].startswith(fix), found


def test_what_corrects_a_folder_of_another_profile_or_place_says_which(work: Path) -> None:
    flash = work.rename(work.with_name("flash"))
    no_card(flash)
    assert failed("card", Release(flash))[1] == f"make card PROFILE=flash SCRATCH={flash.parent}"


def test_one_failure_hides_no_other(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left_out = ("git tree", "locks")
    monkeypatch.setattr(release, "CHECKS", {n: check for n, check in release.CHECKS.items() if n not in left_out})
    rows = release.rows(Release(tmp_path, lock=tmp_path / "no.lock"))
    assert [row.name for row in rows] == list(release.CHECKS)
    assert {row.name for row in rows if row.status == "ok"} == {"benches"}
