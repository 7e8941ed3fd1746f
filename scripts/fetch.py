"""Downloads the upstream checkpoint at the revision that versions.env pins. Run it again to resume."""

from __future__ import annotations

import re
from pathlib import Path

from scripts.cli import parser_for
from v4forge import pins
from v4forge.errors import UserError, run_main


def fetch(repo: str, revision: str, out: Path, workers: int) -> None:
    """Fills `out` with the files of a hub repository at a commit. Raises UserError when that is not possible."""
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    again = "check the network and run again, it resumes: make fetch PROFILE=flash"
    try:
        snapshot_download(repo, revision=revision, local_dir=out, max_workers=workers)
    except RevisionNotFoundError:
        raise UserError(f"{repo} has no revision {revision}", "correct FLASH_REVISION in versions.env") from None
    except RepositoryNotFoundError:
        raise UserError(f"{repo} is not on the hub, or not for you", "hf auth login, or correct FLASH_REPO") from None
    except HfHubHTTPError as error:
        raise UserError(f"the hub refused {repo}: {str(error).splitlines()[0]}", again) from None
    except (OSError, httpx.HTTPError) as error:
        raise UserError(f"{repo} could not be downloaded: {error}", again) from None


def main() -> None:
    parser = parser_for("fetch", __doc__, epilog="Needs 160 GB on disk. HF_TOKEN and HF_ENDPOINT are honoured.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--repo", default=pins.read()["FLASH_REPO"], help="hub repository (default: %(default)s)")
    parser.add_argument(
        "--revision", default=pins.read()["FLASH_REVISION"], help="commit, 40 hex digits (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, default=8, help="files at a time (default: %(default)s)")
    args = parser.parse_args()
    if not re.fullmatch(r"[0-9a-f]{40}", args.revision):
        shown = args.revision or "none"
        raise UserError(f"the revision is not a commit: {shown}", "set FLASH_REVISION in versions.env to 40 hex digits")
    fetch(args.repo, args.revision, args.out, args.workers)


if __name__ == "__main__":
    run_main(main)
