"""The model card of an artifact: README.md, written from its manifest, certificate and run.json and from the benches.

Everything on it is read from a file; what no file tells is "not measured". A measurement counts only when it says that
it is of this artifact, by the digest of SHA256SUMS. The same inputs give the same text.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from v4forge import artifact_folder
from v4forge.artifact_folder import CERTIFICATE, FORMAT, MANIFEST, RUN
from v4forge.bench import published_figures, results
from v4forge.bench.bench_rows import FLASH, standing
from v4forge.bench.results import BENCHES
from v4forge.checkpoint import layout
from v4forge.checkpoint.layout import Config
from v4forge.errors import UserError
from v4forge.files import read, understood
from v4forge.reporting import bench_tables, card_tables, published_comparison, run_record, run_sections
from v4forge.reporting import tables as report_tables
from v4forge.reporting.tables import Table
from v4forge.serving import settings
from v4forge.verification.tolerances import REPLAY_LOSS_OFF

Json = Mapping[str, Any]

TEMPLATES = Path(__file__).parent / "templates"
EVALUATION = "evaluation.json"
OWN_CODE = "v4forge_vllm"  # a setting that names it works in the serve image only
NAMED = "served-model-name"
# What a licence file begins with -> the hub's identifier.
LICENSES = {"MIT License": "mit", "Apache License": "apache-2.0"}


@dataclass(frozen=True)
class Subject:
    """What a card is written from."""

    manifest: Json
    config: Config
    run: Json
    certificate: Json | None
    standing: artifact_folder.Standing
    evaluation: Json | None
    benches: dict[str, Json]  # measured on this artifact
    others: dict[str, str]  # bench or evaluation -> why its newest result is not of this artifact
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
    manifest = read(artifact / MANIFEST, "make postprocess")
    if manifest.get("format") != FORMAT:
        fact = f"{artifact / MANIFEST} has format {manifest.get('format')!r}, this version reads {FORMAT}"
        raise UserError(fact, "make postprocess")
    certificate = None
    if (artifact / CERTIFICATE).is_file():
        certificate = read(artifact / CERTIFICATE, "make verify")
    sums = artifact_folder.sums_sha256(artifact)
    benches: dict[str, Json] = {}
    others: dict[str, str] = {}
    for bench, result in results.newest(work / "reports").items():
        measured = (result.content["target"].get("artifact") or {}).get("sums_sha256")
        if measured == sums:
            benches[bench] = _without_place(result.content)
        else:
            others[bench] = f"{result.path.name} is of {'another artifact' if measured else 'an unknown artifact'}"
    evaluation = None
    if (path := work / "reports" / EVALUATION).is_file():
        found = read(path, "make demo")
        if found.get("sums_sha256") == sums:
            evaluation = found
        else:
            others["evaluation"] = f"{path.name} is of another artifact"
    run = read(artifact / RUN, "make card") if (artifact / RUN).is_file() else {}
    stands = artifact_folder.standing(artifact)
    config = layout.load_config(artifact)
    return Subject(manifest, config, run, certificate, stands, evaluation, benches, others, license_of(artifact))


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


def front_matter(subject: Subject) -> str:
    """The hub's metadata, as YAML; every value is JSON, which is YAML too."""
    base = {"base_model": subject.repo, "base_model_relation": "quantized"} if subject.repo else {}
    named = {"license_name": "upstream", "license_link": "LICENSE"} if subject.license == "other" else {}
    values = {
        "license": subject.license,
        **named,
        **base,
        "library_name": "vllm",
        "pipeline_tag": "text-generation",
        "tags": ["deepseek_v4", "compressed-tensors", "w4a16", "fp8", "speculative-decoding"],
    }
    return "".join(f"{name}: {json.dumps(value)}\n" for name, value in values.items())


def warning(subject: Subject) -> str:
    """What the card begins with when verify has not passed on these files; '' when it has."""
    return {
        "ok": "",
        "missing": "There is no certificate: nobody has checked these files.",
        "stale": "The certificate is of other files than these: nobody has checked them.",
        "failed": f"The certificate says FAILED: {', '.join(_failed(subject)) or 'it cannot be read'}.",
    }[subject.standing.verdict]


def _failed(subject: Subject) -> list[str]:
    found = artifact_folder.verdict(subject.certificate or {"ok": False, "checks": []})
    return [check.name for check in found.checks if not check.ok]


def limits(subject: Subject) -> Iterator[str]:
    """What was not measured or checked, and what a figure does not say; a sentence each."""
    certificate = subject.certificate or {}
    if subject.standing.verdict == "ok":
        for name, why in certificate.get("not_run", {}).items():
            yield f"Check “{name}”: not run, {why}."
    if not certificate.get("deep"):
        yield "Prediction beside the source, on the same tokens: not measured (python -m scripts.verify --deep N)."
    for bench, each in BENCHES.items():
        other = f"; {subject.others[bench]}" if bench in subject.others else ""
        if bench not in subject.benches:
            yield f"{each.title}: not measured ({each.command}{other})."
            continue
        worth = standing(subject.benches[bench])
        for mark in worth.marks:
            yield f"{each.title}: {mark}."
        if not worth.complete:
            yield f"{each.title}: unfinished."
    if "evaluation" in subject.others:
        yield f"Perplexity beside round-to-nearest: not measured ({subject.others['evaluation']})."
    if subject.size != FLASH:
        yield "This is not DeepSeek-V4-Flash: nothing here is comparable with figures of it."
    elif not subject.repo:
        yield "The source was not fetched from a repository: whose weights these are, only the hashes say."
    if not any(result["machine"].get("gpus") for result in subject.benches.values()):
        yield "On a GPU: nothing was measured of these files."


def calibration(subject: Subject) -> list[str]:
    """What the experts' codes come from, in sentences."""
    made = subject.manifest["calibration"]
    if "from" in made:
        return [f"Not known here: {report_tables.plain(str(made['from']))}; `{MANIFEST}` lists the files."]
    settings = made["settings"]
    if settings["method"] != "gptq":
        return ["None: round-to-nearest."]
    text = made["corpus"]
    origin = text["origin"]
    where = f"a file with sha256 {_code(origin.get('file_sha256'))}"
    if "repo" in origin:
        repo, split = (report_tables.plain(origin[key]) for key in ("repo", "split"))
        where = f"{repo}, {split}, revision {_code(origin['revision'])}"
    versions = ", ".join(
        f"{report_tables.plain(name)} {report_tables.plain(version)}" for name, version in made["versions"].items()
    )
    whose = "those routed to it" if settings["experts"] == "routed" else "all"
    return [
        f"{text['samples']:,} x {text['seq_len']:,} tokens, packed from {len(text['documents']):,} of "
        f"{origin.get('documents', 0):,} documents of {where}, seed {text['seed']}; `{MANIFEST}` lists which.",
        f"GPTQ with static activation order, scales {settings['scales']}, dampening {settings['dampening']}; the "
        f"tokens of an expert's Hessian are {whose}. On {report_tables.plain(str(made['hardware']))}; {versions}.",
    ]


def _code(text: object) -> str:
    """Text as code, which a backtick in it would end."""
    return f"`{str(text).replace('`', '')}`"


def serve_command(subject: Subject) -> str:
    """`vllm serve` with the settings of `make serve`, less what needs our image; an option a line."""
    chosen = settings.serving()
    names = {name for name, row in chosen.settings.items() if OWN_CODE in str(row.value)}
    if subject.size != FLASH:
        names.add(NAMED)  # it calls the model Flash
    rows = [row.words() for name, row in chosen.settings.items() if name not in names]
    lines = ["vllm serve .", *(" ".join(shlex.quote(word) for word in words) for words in rows if words)]
    return " \\\n      ".join(lines)


def reproduce_command(subject: Subject) -> str:
    """What repeats the run; '' where another tool made the codes."""
    if "from" in subject.manifest["calibration"]:
        return ""
    profile = " PROFILE=flash" if subject.size == FLASH else ""
    ranks = max((layer.get("ranks", 1) for layer in subject.run.get("layers", ())), default=1)
    gpus = f" GPUS={ranks}" if ranks > 1 else ""
    return f"make reproduce MANIFEST=<this folder>/{MANIFEST}{profile}{gpus}"


def _sections(subject: Subject) -> list[str]:
    """Ours beside the published figures, prediction, held-out text, then the benches; those that there are."""
    made = published_comparison.pipeline(_seconds(subject.run), subject.manifest)
    tables = []
    if subject.size == FLASH:
        tables += [_by_conditions(published_comparison.table(subject.benches, made), 3), _sources()]
    deep = (subject.certificate or {}).get("deep")
    if deep and subject.standing.verdict in ("ok", "failed"):
        tables.append(report_tables.markdown_titled(card_tables.prediction(deep), 3))
    if subject.evaluation:
        tables.append(report_tables.markdown_titled(run_sections.models_table(subject.evaluation), 3))
    benches = [bench_tables.section(bench, subject.benches[bench]) for bench in BENCHES if bench in subject.benches]
    return tables + [report_tables.markdown_section(section, 3) for section in benches]


def _by_conditions(table: Table, level: int) -> str:
    """A table for each row that heads others: Markdown's cells are too narrow for the conditions that it tells."""
    groups: list[Table] = []
    for row in table.rows:
        if len(row) == 1:
            groups.append(Table(table.name, row[0].text, table.columns, [], row[0].note))
        else:
            groups[-1] = replace(groups[-1], rows=[*groups[-1].rows, row])
    parts = [f"{'#' * level} {report_tables.plain(table.title)}\n\n{report_tables.plain(table.note)}\n"]
    for group in groups:
        heading = f"{'#' * (level + 1)} {report_tables.plain(group.title)}\n\n{report_tables.plain(group.note)}\n"
        parts += [heading, report_tables.markdown_table(group)]
    return "\n".join(parts)


def _seconds(run: Json) -> Json:
    """The stages that have seconds; of a calibration whose last run only finished it, what its layers computed."""
    found = {name: entry for name, entry in run_record.stages(run) if entry.get("elapsed_s") is not None}
    if made := found.get("calibrate"):
        found["calibrate"] = {**made, "elapsed_s": max(made["elapsed_s"], run_record.layers_s(run))}
    return found


def _sources() -> str:
    """Where each published figure is from, folded."""
    places: dict[str, list[str]] = {}
    for figure in published_figures.figures():
        for value in (*([figure.original] if figure.original else []), *figure.siblings):
            places.setdefault(value.source, []).append(figure.title + (f" ({value.who})" if value.who else ""))
    lines = [
        f"- {report_tables.plain(place)}: {report_tables.plain('; '.join(titles))}" for place, titles in places.items()
    ]
    return "\n".join(["<details><summary>Where the published figures are from</summary>\n", *lines, "\n</details>\n"])


def _losses(rows: Sequence[card_tables.LayerLoss]) -> str:
    """A table by layer; of many layers a summary, and the table folded."""
    if not rows:
        return ""
    if len(rows) <= card_tables.LAYERS_SHOWN:
        return report_tables.markdown_titled(card_tables.losses_by_layer(rows), 3)
    folded = report_tables.markdown_table(card_tables.losses_by_layer(rows))
    summary = report_tables.markdown_titled(card_tables.losses_by_attention(rows), 3)
    return f"{summary}\n<details><summary>All {len(rows)} layers</summary>\n\n{folded}\n</details>\n"


def render(subject: Subject) -> str:
    """The card's text."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["plain"] = report_tables.plain
    chosen = settings.serving()
    manifest, run = subject.manifest, subject.run
    text = environment.get_template("model_card.md.j2").render(
        subject=subject,
        front_matter=front_matter(subject),
        warning=warning(subject),
        tensors=len(layout.artifact(subject.config)),
        size=card_tables.size_of(subject.bytes),
        recipe=report_tables.markdown_table(card_tables.precision(manifest, card_tables.bytes_by_kind(subject.config))),
        checks=_checks(subject),
        sections=_sections(subject),
        limits=list(limits(subject)),
        calibration=calibration(subject),
        losses=_losses(card_tables.losses(manifest, subject.config)),
        serve=serve_command(subject),
        replica_gpus=chosen.tensor_parallel,
        hardware=report_tables.markdown_titled(
            card_tables.hardware(subject.bytes, float(chosen.value("gpu-memory-utilization") or 0.9)), 3
        ),
        reproduce=reproduce_command(subject),
        stages=_stages(run),
        peaks=list(card_tables.peaks(run)),
        commands=[entry["command"] for _, entry in run_record.stages(run)],
        loss_off=f"{REPLAY_LOSS_OFF:.1%}",
        revision=(run.get("stages", {}).get("calibrate") or {}).get("revision"),
    )
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def _stages(run: Json) -> str:
    if not run.get("stages"):
        return ""
    table = card_tables.stages(run)
    return f"{report_tables.markdown_table(table)}\n{report_tables.plain(table.note)}\n"


def _checks(subject: Subject) -> str:
    if subject.certificate is None:
        return ""
    return report_tables.markdown_table(run_sections.certificate_table(artifact_folder.verdict(subject.certificate)))


def text(work: Path, artifact: Path) -> str:
    """The card of an artifact, with what the work folder's reports hold of it. Raises UserError."""
    subject = gathered(work, artifact)
    files: dict[str, tuple[Path, str, Callable[[], object]]] = {
        MANIFEST: (
            artifact / MANIFEST,
            "make postprocess",
            lambda: (card_tables.losses(subject.manifest, subject.config), calibration(subject)),
        ),
        RUN: (
            artifact / RUN,
            "make card",
            lambda: (card_tables.stages(subject.run), list(card_tables.peaks(subject.run))),
        ),
    }
    if subject.certificate is not None:
        files[CERTIFICATE] = (artifact / CERTIFICATE, "make verify", lambda: (warning(subject), _checks(subject)))
    for path, hint, look in files.values():
        understood(path, hint, look)
    return understood(artifact / MANIFEST, "make postprocess", lambda: render(subject))
