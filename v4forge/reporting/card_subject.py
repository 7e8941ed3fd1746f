"""What a model card is written from: manifest, certificate and run.json of an artifact, and what was measured of it.

A measurement counts only when it says that it is of this artifact, by the digest of SHA256SUMS.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from v4forge import artifact_folder, files
from v4forge.artifact_folder import CERTIFICATE, FORMAT, MANIFEST, RUN
from v4forge.bench import results
from v4forge.bench.standing import FLASH
from v4forge.checkpoint import layout
from v4forge.checkpoint.layout import Config
from v4forge.errors import UserError
from v4forge.reporting import run_record
from v4forge.reporting.benches import BENCHES, Told, told
from v4forge.reporting.beside import Beside, beside
from v4forge.reporting.tables import Json

# What a licence file begins with -> the hub's identifier.
LICENSES = {"MIT License": "mit", "Apache License": "apache-2.0"}


@dataclass(frozen=True)
class Subject:
    """What a card is written from."""

    folder: Path  # of the artifact
    manifest: Json
    config: Config
    run: Json
    certificate: Json | None
    standing: artifact_folder.CertificateState
    benches: dict[str, Told]  # measured on this artifact
    beside: Beside | None  # what was measured beside another checkpoint
    others: dict[str, str]  # bench -> why its newest result is not of this artifact
    license: str

    @property
    def repo(self) -> str:
        return str(self.manifest["source"].get("repo") or "")

    @property
    def bytes(self) -> int:
        return sum(entry["bytes"] for entry in self.shards)

    @property
    def shards(self) -> list[Json]:
        return [entry for name, entry in self.manifest["files"].items() if name.endswith(".safetensors")]

    @property
    def size(self) -> dict[str, int]:
        return {name: getattr(self.config, name) for name in FLASH}

    @property
    def title(self) -> str:
        """Named after the repository that the source was fetched from; by its dimensions where it was not."""
        shape = f"DeepSeek-V4 of {self.config.num_hidden_layers} layers, hidden size {self.config.hidden_size},"
        return f"{self.repo.rpartition('/')[2] or shape} W4A16-FP8-MTP"


def require(artifact: Path) -> None:
    """Raises UserError where there is no artifact to write a card of."""
    if not (artifact / MANIFEST).is_file():
        raise UserError(f"{artifact / MANIFEST} does not exist", "make postprocess")


def gathered(work: Path, artifact: Path) -> Subject:
    """Reads everything that there is. Raises UserError where manifest or config.json are missing, or a file is not
    what it must be."""
    manifest = files.read(artifact / MANIFEST, "make postprocess")
    if manifest.get("format") != FORMAT:
        fact = f"{artifact / MANIFEST} has format {manifest.get('format')!r}, this version reads {FORMAT}"
        raise UserError(fact, "make postprocess")
    certificate = None
    if (artifact / CERTIFICATE).is_file():
        certificate = files.read(artifact / CERTIFICATE, "make verify")
    sums = artifact_folder.sums_sha256(artifact)
    measured: dict[str, Json] = {}
    others: dict[str, str] = {}
    for bench, result in results.newest(work / "reports", BENCHES, sums).items():
        whose = result.sums
        if whose == sums:
            measured[bench] = _without_place(result.content)
        else:
            others[bench] = f"{result.path.name} is of {'another artifact' if whose else 'an unknown artifact'}"
    benches = told(measured)
    baseline = results.newest(work / "reports" / results.BASELINE, BENCHES)
    run = files.read(artifact / RUN, "make card") if (artifact / RUN).is_file() else {}
    stands, config = artifact_folder.certificate_state(artifact), layout.load_config(artifact, "artifact")
    return Subject(
        *(artifact, manifest, config, run, certificate, stands),
        benches=benches,
        beside=beside(benches, told({bench: each.content for bench, each in baseline.items()})),
        others=others,
        license=license_of(artifact),
    )


def _without_place(result: Json) -> Json:
    """A bench's result that does not tell where on its machine the artifact lay."""
    target = dict(result["target"])
    folder = Path(str(target["artifact"].get("folder") or ""))
    if folder.name != "artifact" or not folder.parent.name:
        return result
    place = re.compile(rf"(?<![\w./-]){re.escape(str(folder.parent))}(?=/|\s|$)")
    target["artifact"] = target["artifact"] | {"folder": f"{run_record.WORK}/{folder.name}"}
    commands = [place.sub(lambda _: run_record.WORK, str(command)) for command in result["commands"]]
    return {**result, "target": target, "commands": commands}


def license_of(artifact: Path) -> str:
    """The hub's identifier for the licence file that came with the source: other, where it is none of LICENSES, and
    unknown without one."""
    path = artifact / "LICENSE"
    if not path.is_file():
        return "unknown"
    head = path.read_text(encoding="utf-8", errors="replace")[:400]
    return next((name for words, name in LICENSES.items() if words in head), "other")
