"""Downloads the upstream checkpoint at the revision that versions.env pins, every file checked against the hub's own
hash; or takes it from a folder, without a network. Run it again to go on where it stopped: nothing comes twice.

Calibration may begin while it runs: it waits for a shard that is not here yet.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from v4forge import pins
from v4forge.checkpoint import incoming
from v4forge.digests import Digests, cache_of
from v4forge.errors import UserError, run_main
from v4forge.files import check_writable
from v4forge.hub import folder_source
from v4forge.hub.folder_source import FolderSource
from v4forge.hub.partial_file import path_of
from v4forge.units import MIB, decimal_size

from .cli import parser_for, steps

if TYPE_CHECKING:
    from v4forge.hub.hub_source import Hub
    from v4forge.hub.pending import Pending

FORMS = {
    "download": "a download of hf, whose hashes every file is checked against",
    "snapshot": "a snapshot of the hub's cache, whose hashes every file is checked against",
    "plain": "a plain folder: no hashes of the hub are known, only the structure is checked",
}


def shown(count: int) -> str:
    """A number of bytes, for people."""
    return decimal_size(count, least="kB")


def described(source: Hub | FolderSource) -> str:
    if isinstance(source, FolderSource):
        return f"{source.folder} ({FORMS[source.form]})"
    return f"{source.repo} at {source.revision[:12]}"


def listing_lines(pending: Pending, out: Path) -> list[str]:
    """What is there and what would come, a line a file."""
    state = {each.name: "is here" for each in pending.here}
    state |= {each.name: "is here, to be checked" for each in pending.unsure}
    state |= {each.name: "is another file here, to be replaced" for each in pending.wrong}
    lines = []
    for name, each in pending.listing.files.items():
        path = path_of(out, each)
        part = f"{shown(path.stat().st_size)} of it are here" if path.is_file() else "to come"
        lines.append(f"  {name:<44} {shown(each.bytes):>10}  {state.get(name, part)}")
    return lines


def main() -> None:
    parser = parser_for("fetch", __doc__, epilog="HF_TOKEN, HF_ENDPOINT and the proxy variables are honoured.")
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the checkpoint")
    add(
        "--from",
        dest="folder",
        type=Path,
        metavar="DIR",
        help="take it from this folder: of `hf download --local-dir`, of the hub's cache, or with plain files",
    )
    add("--repo", default=pins.read()["FLASH_REPO"], help="hub repository (default: %(default)s)")
    add("--revision", default=pins.read()["FLASH_REVISION"], help="commit, 40 hex digits (default: %(default)s)")
    add("--workers", type=int, default=8, metavar="N", help="files at a time (default: %(default)s)")
    add("--dry-run", action="store_true", help="say what would come and what is there, and stop")
    args = parser.parse_args()
    if args.workers < 1:
        parser.error("argument --workers: it must be at least 1")
    if not re.fullmatch(r"[0-9a-f]{40}", args.revision):
        given = args.revision or "none"
        raise UserError(f"the revision is not a commit: {given}", "set FLASH_REVISION in versions.env to 40 hex digits")
    if args.folder and args.folder.resolve() == args.out.resolve():
        raise UserError(f"{args.out} is both where from and where to", "choose another --out, or leave out --from")

    from v4forge.hub.fetch import Fetch
    from v4forge.hub.hub_source import Hub
    from v4forge.hub.pending import looked_over

    source: Hub | FolderSource = Hub(args.repo, args.revision)
    if args.folder:
        source = folder_source.looked_at(args.folder, args.repo, args.revision)
    digests = Digests(cache_of(args.out.parent))
    if args.dry_run:
        pending = looked_over(source, args.out, digests)
        print("\n".join([summary(source, pending), *listing_lines(pending, args.out)]))
        return
    check_writable(args.out)
    with incoming.marked(args.out) as mark_ready:
        pending = looked_over(source, args.out, digests)
        print(summary(source, pending), flush=True)
        run = Fetch(source, args.out, args.workers, digests, lambda line: print(line, flush=True))
        with steps("fetch", pending.total_bytes // MIB, "MiB", resumes=True) as progress:
            run.run(pending, progress, mark_ready)
    checked = "" if isinstance(source, FolderSource) and source.form == "plain" else ", each with the hub's hash"
    print(f"{len(pending.listing.files)} files, {shown(pending.total_bytes)}{checked}: {args.out}")


def summary(source: Hub | FolderSource, pending: Pending) -> str:
    """One line: what, how much of it is there, what is not wanted."""
    coming = sum(each.bytes for each in pending.missing)
    count = len(pending.listing.files)
    line = f"{described(source)}: {count} files, {shown(pending.total_bytes)}, of which {shown(coming)} to come"
    return f"{line}; not needed: {', '.join(pending.skipped)}" if pending.skipped else line


if __name__ == "__main__":
    run_main(main)
