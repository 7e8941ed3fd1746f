"""Whether a checkout, its images and an artifact are one release: each check a fact, or what is wrong and a command."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from v4forge import artifact_folder, certified, checkout
from v4forge.artifact_folder import CARD, MANIFEST, RUN
from v4forge.bench import results
from v4forge.bench.results import Result
from v4forge.digests import Digests, cache_of
from v4forge.errors import UserError
from v4forge.files import read, understood
from v4forge.hub import publication
from v4forge.images import definitions, lock_check, registry
from v4forge.images.oci import Repository
from v4forge.outcomes import Outcome, failed, ok
from v4forge.pipeline import make_hints
from v4forge.reporting import card, card_subject, gather
from v4forge.reporting.benches import BENCHES
from v4forge.verification import reproduce

LOSSES = "layers.error"  # of the layers that were quantized
# What manifest.json says at least, by dotted name, beside what a replay asks for; "layers" stands for each of them.
STATED = (
    *("recipe.rules", "source.files", "files"),
    *(f"calibration.corpus.{name}" for name in ("sha256", "origin", "documents", "samples", "seq_len", "seed")),
    *("calibration.settings", "calibration.versions", "calibration.hardware", "calibration.code"),
    *(LOSSES, "layers.tokens", "layers.codes"),
)
# What run.json says of each of these stages, the last by either name.
STAGES, DEEP = ("calibrate", "postprocess", "verify"), ("calibrate", "postprocess", "verify-deep")
NOTED = ("elapsed_s", "started", "command", "machine")


@dataclass(frozen=True)
class Release:
    """What is released: the checkout at `root` with its images.lock, and what the work folder holds."""

    work: Path
    root: Path = checkout.ROOT
    lock: Path = definitions.LOCK
    key: Path | None = None  # who must have signed the certificate

    @cached_property
    def artifact(self) -> Path:
        """Raises UserError where there is none."""
        folder = self.work / "artifact"
        if not (folder / "config.json").is_file():
            raise UserError(f"there is no artifact in {folder}", "make artifact")
        return folder

    @property
    def sums(self) -> str | None:
        return artifact_folder.sums_sha256(self.artifact)


def tree(release: Release) -> str:
    commit = checkout.revision(root=release.root)
    if commit is None:
        raise UserError(f"{release.root} is no git checkout", "git clone the repository, and work there")
    if commit.endswith("-dirty"):
        raise UserError(f"{release.root} has changes that no commit holds", "git status")
    return f"commit {commit[:12]}"


def locks(release: Release) -> str:
    project = lock_check.read(release.root)
    if problems := lock_check.problems(project):
        raise UserError(f"{problems[0]}; {len(problems)} such lines", "make lock-check")
    return f"{len(project.pins)} pins, {len(project.files)} files"


def image(release: Release, name: str) -> str:
    entry = registry.locked(name, release.lock)
    push = f"make images IMAGE={name} && make push IMAGE={name} REGISTRY=<registry>, and commit {release.lock.name}"
    if not entry.reference:
        raise UserError(f"{release.lock.name} has no digest: it was never pushed", push)
    place, digest = entry.reference.split("@")
    remote = Repository(place)
    registry.check(name, entry, remote, registry.present(remote, digest))
    if registry.labels_of(remote, entry.image_id).get("io.v4forge.code") != definitions.code_sha256(release.root):
        raise UserError(f"{entry.reference} holds other code than this checkout", push)
    return entry.reference


def certificate(release: Release) -> str:
    found = certified.check(release.artifact, "make verify", certified.SIZES, release.key)
    return found.fact + (f"; not run: {', '.join(found.not_run)}" if found.not_run else "")


def checksums(release: Release) -> str:
    found = publication.members(release.artifact, Digests(cache_of(release.work)))
    return f"{len(found)} files, {sum(member.size for member in found):,} bytes; SHA256SUMS {str(release.sums)[:12]}"


def manifest(release: Release) -> str:
    path = release.artifact / MANIFEST
    return understood(path, "make postprocess", lambda: _complete(path))


def _complete(path: Path) -> str:
    content = reproduce.load(path).content
    quantized = [layer for layer in content["layers"] if layer.get("stored", "int4") == "int4"]
    for name in STATED:
        looked_at = {"layers": quantized} if name == LOSSES and quantized else content
        if not all(_values(looked_at, name.split("."))):
            raise UserError(f"{path} does not say {name}", "make postprocess")
    stated = artifact_folder.stated_sums(path.parent, "make postprocess")
    listed = {name: entry.get("sha256") for name, entry in content["files"].items()}
    for name in sorted(stated.keys() | listed.keys() - {MANIFEST}):
        if name != MANIFEST and stated.get(name) != listed.get(name):
            raise UserError(f"{path} and SHA256SUMS do not say the same of {name}", "make postprocess")
    source = content["source"]
    origin = f"{source['repo']} at {source['revision'][:12]}" if source.get("repo") else "a source that was not fetched"
    return f"{len(content['layers'])} layers of {origin}"


def _values(content: Any, path: list[str]) -> Iterator[bool]:
    """Whether there is something at a path, for each of the entries of a list on the way; nothing counts as missing."""
    if not path:
        yield content not in (None, "", [], {})
    elif isinstance(content, list):
        yield bool(content)
        for each in content:
            yield from _values(each, path)
    else:
        yield from _values(content.get(path[0]) if isinstance(content, Mapping) else None, path[1:])


def run_record(release: Release) -> str:
    path = release.artifact / RUN
    return understood(path, "make card", lambda: _noted(path))


def _noted(path: Path) -> str:
    stages = read(path, "make card").get("stages")
    noted = stages if isinstance(stages, Mapping) else {}
    made = DEEP if DEEP[-1] in noted else STAGES
    for stage in made:
        for name in NOTED:
            if not all(_values(noted, [stage, name])):
                raise UserError(f"{path} does not say {name} of {stage}", f"make {stage} card")
    seconds = sum(noted[stage]["elapsed_s"] for stage in made)
    where = {str(noted[stage].get("image") or "the host")[:19] for stage in made}
    return f"{', '.join(made)}: {seconds:,.0f} s in their last runs, on {' and '.join(sorted(where))}"


def benches(release: Release) -> str:
    sums = artifact_folder.sums_sha256(release.work / "artifact")
    found = results.newest(release.work / "reports", BENCHES, sums)
    for bench, result in found.items():
        again = results.again(result.path, bench)
        measured = understood(result.path, again, partial(_measured, result))
        if measured != sums:
            whose = "another artifact" if measured else "an artifact that it does not name"
            raise UserError(f"{result.path} is of {whose}", again)
    missing = [bench for bench in BENCHES if bench not in found]
    return ", ".join(
        [*(result.path.name for result in found.values()), *(f"{bench} not measured" for bench in missing)]
    )


def _measured(result: Result) -> str | None:
    """The artifact that was measured, by its sums."""
    found: str | None = (result.content["target"].get("artifact") or {}).get("sums_sha256")
    return found


def report(release: Release) -> str:
    inputs, _ = gather.gathered(release.work)
    page, tables = release.work / gather.PAGE, release.work / gather.MARKDOWN
    for path in (page, tables):
        if not path.is_file():
            raise UserError(f"{path} does not exist", "make report")
    if tables.read_bytes() != gather.markdown(inputs).encode():
        raise UserError(f"{tables} is not what the reports say now", "make report")
    return f"{page.name}, {tables.name}"


def model_card(release: Release) -> str:
    path = release.artifact / CARD
    if not path.is_file():
        raise UserError(f"{path} does not exist", "make card")
    if path.read_bytes() != card.text(card_subject.gathered(release.work, release.artifact)).encode():
        raise UserError(f"{path} is not what manifest, certificate and reports say now", "make card")
    return path.name


CHECKS: Mapping[str, Callable[[Release], str]] = {
    "git tree": tree,
    "locks": locks,
    **{f"{name} image": partial(image, name=name) for name in definitions.IMAGES},
    "certificate": certificate,
    "checksums": checksums,
    "manifest": manifest,
    "run": run_record,
    "benches": benches,
    "report": report,
    "card": model_card,
}


def rows(release: Release, progress: Callable[[int, str], None] = lambda _done, _name: None) -> list[Outcome]:
    """What all checks found, in their order; one that fails keeps none of the others from being made."""
    found: list[Outcome] = []
    for name, check in CHECKS.items():
        progress(len(found), name)
        try:
            found.append(ok(check(release), name))
        except UserError as error:
            found.append(failed(error.fact, make_hints.for_work(error.hint, release.work), name))
    progress(len(found), "done")
    return found
