"""Publishes a verified artifact on the hub: shards, index, config, tokenizer, card, certificate, manifest, checksums.

    python -m scripts.publish --artifact scratch/tiny/artifact --repo ORG/NAME          says what it would do
    python -m scripts.publish --artifact scratch/tiny/artifact --repo ORG/NAME --yes    does it

Refuses an artifact whose certificate is missing, stale or failing, whose files are not those of SHA256SUMS, that has no
card, or that holds files of others. All files appear in one commit; afterwards the hub is asked for the hash of each.
After a break the same command goes on. HF_ENDPOINT, HF_TOKEN and `hf auth login` are honoured.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from v4forge import artifact_folder, certified
from v4forge.artifact_folder import CARD
from v4forge.digests import Digests, cache_of
from v4forge.errors import UserError, run_main
from v4forge.hub import publication
from v4forge.hub.publication import Member
from v4forge.pipeline import make_hints
from v4forge.units import MB

from . import certified as certified_options
from .cli import parser_for, say, steps

if TYPE_CHECKING:
    from v4forge.hub.upload import Found, Repository

MAIN = "main"


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_for("publish", __doc__)
    parser.add_argument("--artifact", type=Path, required=True, metavar="DIR", help="scratch/<profile>/artifact")
    parser.add_argument(
        "--repo", required=True, metavar="ORG/NAME", help="repository on the hub; made where it is missing"
    )
    parser.add_argument("--revision", default=MAIN, metavar="BRANCH", help="default: %(default)s")
    parser.add_argument("--private", action="store_true", help="for a repository that only its owners see")
    certified_options.add_key(parser)
    parser.add_argument("--yes", action="store_true", help="upload; without it nothing is changed anywhere")
    args = parser.parse_args(argv)

    from v4forge.hub.upload import Repository

    options = ["--artifact", str(args.artifact), "--repo", args.repo, "--yes"]
    options += ["--revision", args.revision] if args.revision != MAIN else []
    again = shlex.join(["python", "-m", "scripts.publish", *options, *(["--private"] if args.private else [])])
    repository = Repository(args.repo, args.revision, again)
    found = checked(args.artifact)
    if args.verify_key:
        certified.check_signature(args.artifact, args.verify_key)
    return upload(args, repository, found) if args.yes else rehearse(args, repository, found)


def checked(artifact: Path) -> list[Member]:
    """The files to publish, hashed where no earlier stage has done so. Raises UserError for what is not fit for it."""
    try:
        return _checked(artifact)
    except UserError as error:
        raise UserError(error.fact, make_hints.for_work(error.hint, artifact.parent)) from None


def _checked(artifact: Path) -> list[Member]:
    digests = Digests(cache_of(artifact.parent))
    size = sum(path.stat().st_size for path in publication.unread(artifact, digests)) // MB
    if not size:
        return publication.members(artifact, digests)
    with steps("checksums", size, "MB") as advance:
        return publication.members(artifact, digests, lambda read, name: advance(read // MB, name))


def rehearse(args: argparse.Namespace, repository: Repository, found: list[Member]) -> int:
    """Says what an upload would do."""
    try:
        user, there = repository.user(), repository.look()
    except UserError as error:
        show(found, None)
        say(f"publish: {error.fact}; what it has is not known")
        say(f"publish: nothing was changed; next: {error.hint}")
        return 0
    refuse(args, repository, there)
    show(found, there)
    visible = "private" if args.private or there.private else "public"
    state = "is there" if there.private is not None else "would be made"
    say(f"publish: {repository.address} {state}, {visible}; branch {repository.branch}; as {user or 'nobody'}")
    if others := sorted(there.files.keys() - {member.name for member in found} - {".gitattributes"}):
        say(f"publish: it holds {len(others)} other files, which stay: {', '.join(others[:5])}")
    if left_out := artifact_folder.certificate_state(args.artifact).not_run:
        say(f"publish: checks that verify did not make: {', '.join(left_out)}")
    if user is None:
        from v4forge.hub.upload import LOGIN

        say(f"publish: there is no token; before the upload: {LOGIN}")
    size = sum(member.size for member, state in publication.states(found, there.files) if state != "there")
    next_step = f"nothing was changed; to upload {size:,} bytes: {repository.again}"
    say(f"publish: {next_step if size else 'all of it is there already'}")
    return 0


def upload(args: argparse.Namespace, repository: Repository, found: list[Member]) -> int:
    """Uploads what the hub has not, and reads back what it has."""
    if repository.user() is None:
        from v4forge.hub.upload import LOGIN

        raise UserError("there is no token to publish with", LOGIN)
    there = repository.look()
    refuse(args, repository, there)
    if not there.commit:
        repository.create(args.private)
    lacking = [member for member, state in publication.states(found, there.files) if state != "there"]
    commit = there.commit
    if lacking:
        with steps("publish", round(megabytes(lacking)), "MB", resumes=True) as advance:
            sums = artifact_folder.sums_sha256(args.artifact)
            message = f"Artifact with SHA256SUMS {sums}"
            commit = repository.upload(lacking, message, lambda sent, name: advance(sent // MB, name))
        say(f"publish: {counted(lacking)} sent")
    read_back(repository, found, commit)
    say(f"publish: the hub has the {counted(found)} as they are here")
    say(f"{repository.address}/tree/{commit}")
    return 0


def read_back(repository: Repository, found: list[Member], commit: str) -> None:
    """Raises UserError unless the hub has every file of the commit with the hash that it has here."""
    there = repository.look(commit)
    wrong = [(member.name, state) for member, state in publication.states(found, there.files) if state != "there"]
    if wrong:
        name, state = wrong[0]
        more = f", and {len(wrong) - 1} more files" if len(wrong) > 1 else ""
        what = "lacks" if state == "new" else "has other bytes for"
        raise UserError(f"{repository.address} {what} {name} at {commit}{more}", f"upload again: {repository.again}")


def refuse(args: argparse.Namespace, repository: Repository, there: Found) -> None:
    """Raises UserError for what the hub would not take, and where --private, a promise about who sees the files, would
    be broken: a repository that is there keeps its own setting."""
    if args.private and there.private is False:
        raise UserError(
            f"{repository.address} is public already", "another --repo, or make it private on the hub first"
        )
    repository.check_card((args.artifact / CARD).read_text(encoding="utf-8"))


def show(found: list[Member], there: Found | None) -> None:
    """The files, their sizes, and what the hub has of them."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=True)
    states = list(publication.states(found, there.files if there else {}))
    table.add_column("file", footer=f"{len(found)} files", no_wrap=True)
    table.add_column("bytes", footer=f"{sum(member.size for member in found):,}", justify="right")
    table.add_column("sha256")
    table.add_column("on the hub")
    for member, state in states:
        shown = {"new": "", "changed": "other bytes", "there": "the same"}[state] if there else "?"
        table.add_row(member.name, f"{member.size:,}", member.sha256[:12], shown)
    Console(highlight=False).print(table)


def megabytes(some: Sequence[Member]) -> float:
    return sum(member.size for member in some) / MB


def counted(some: Sequence[Member]) -> str:
    return f"{len(some)} files, {megabytes(some):,.1f} MB,"


if __name__ == "__main__":
    run_main(main)
