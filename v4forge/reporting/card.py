"""The model card of an artifact: README.md, written from its manifest, certificate and run.json and from the benches.

Everything on it is read from a file; what no file tells is "not measured". The same inputs give the same text.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from v4forge import artifact_folder
from v4forge.artifact_folder import CERTIFICATE, MANIFEST, RUN
from v4forge.bench import published_figures
from v4forge.bench.results import command_of
from v4forge.bench.standing import FLASH
from v4forge.bench.terms import spelled_out
from v4forge.checkpoint import layout
from v4forge.checkpoint.recipe import named_layers
from v4forge.files import understood
from v4forge.quantization.manifest import method_of
from v4forge.reporting import card_tables, prediction, published_comparison, run_record, run_sections, tables
from v4forge.reporting.benches import BENCHES
from v4forge.reporting.beside import Beside
from v4forge.reporting.card_subject import Subject
from v4forge.reporting.rendering import rendered
from v4forge.reporting.tables import Json, Table, plain
from v4forge.serving import settings
from v4forge.units import decimal_size
from v4forge.verification.tolerances import REPLAY_LOSS_OFF

OWN_CODE = "v4forge_vllm"  # a setting that names it works in the serve image only
NAMED = "served-model-name"


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
        "changed": "These are not all the files that the certificate is of: one is missing, cut, other or too many.",
        "failed": f"The certificate says FAILED: {', '.join(subject.standing.failed) or 'it cannot be read'}.",
    }[subject.standing.verdict]


def limits(subject: Subject) -> Iterator[str]:
    """What was not measured or checked, and what a figure does not say; a sentence each."""
    certificate = subject.certificate or {}
    if subject.standing.verdict == "ok":
        for name, why in certificate.get("not_run", {}).items():
            yield f"Check “{name}”: not run, {why}."
    deep = certificate.get("deep")
    if not deep:
        yield f"Prediction beside the source, on the same tokens: not measured ({prediction.COMMAND})."
    elif len(deep["models"]) == 2:  # the source and the artifact
        yield f"Round-to-nearest on the same tokens: not measured ({prediction.COMMAND} --beside DIR)."
    for name, bench in BENCHES.items():
        other = f"; {subject.others[name]}" if name in subject.others else ""
        if name not in subject.benches:
            yield f"{bench.TITLE}: not measured ({command_of(name)}{other})."
            continue
        worth = subject.benches[name].worth
        for mark in worth.marks:
            yield f"{bench.TITLE}: {mark}."
        if not worth.complete:
            yield f"{bench.TITLE}: unfinished."
    if subject.size != FLASH:
        yield "This is not DeepSeek-V4-Flash: nothing here is comparable with figures of it."
    elif not subject.repo:
        yield "The source was not fetched from a repository: whose weights these are, only the hashes say."
    if not any(told.result["machine"].get("gpus") for told in subject.benches.values()):
        yield "On a GPU: nothing was measured of these files."


def calibration(subject: Subject) -> list[str]:
    """What the experts' codes come from, in sentences."""
    made = subject.manifest["calibration"]
    if "from" in made:
        return [f"Not known here: {plain(str(made['from']))}; `{MANIFEST}` lists the files."]
    settings = made["settings"]
    if settings["method"] != "gptq":
        return ["None: round-to-nearest."]
    text = made["corpus"]
    origin = text["origin"]
    where = f"a file with sha256 {_code(origin.get('file_sha256'))}"
    if "repo" in origin:
        where = f"{plain(origin['repo'])}, {plain(origin['split'])}, revision {_code(origin['revision'])}"
    versions = ", ".join(f"{plain(name)} {plain(version)}" for name, version in made["versions"].items())
    whose = "those routed to it" if settings["experts"] == "routed" else "all"
    return [
        f"{text['samples']:,} x {text['seq_len']:,} tokens, packed from {len(text['documents']):,} of "
        f"{origin.get('documents', 0):,} documents of {where}, seed {text['seed']}; `{MANIFEST}` lists which.",
        f"{method_of(made)} with static activation order, scales {settings['scales']}, dampening "
        f"{settings['dampening']}; the tokens of an expert's Hessian are {whose}. On {plain(str(made['hardware']))}; "
        f"{versions}.",
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
    """Ours beside the published figures, prediction, then the benches; those that there are."""
    made = published_comparison.pipeline(_seconds(subject.run), subject.manifest)
    found = []
    if subject.size == FLASH:
        found += [_by_conditions(published_comparison.table(subject.benches, made), 3), _sources()]
    deep = (subject.certificate or {}).get("deep")
    if deep and subject.standing.verdict in ("ok", "failed"):
        found.append(tables.markdown_titled(prediction.table(deep), 3))
    benches = [subject.benches[name].section for name in BENCHES if name in subject.benches]
    if subject.beside:
        found.insert(0, _beside(subject.beside))
    if found or benches:
        found.insert(0, f"{plain(spelled_out())}\n")
    return found + [tables.markdown_section(section, 3) for section in benches]


def _beside(found: Beside) -> str:
    """The verdict, the table, what to be careful of."""
    said = f"### {plain(found.title)}\n\n{plain(found.verdict[0].upper() + found.verdict[1:])}.\n"
    careful = "".join(f"- {plain(line)}\n" for line in found.said)
    return "\n".join([said, tables.markdown_table(found.table), f"{plain(found.table.note)}\n", careful])


def _by_conditions(table: Table, level: int) -> str:
    """A table for each row that heads others: Markdown's cells are too narrow for the conditions that it tells."""
    groups: list[Table] = []
    for row in table.rows:
        if len(row) == 1:
            groups.append(Table(table.name, row[0].text, table.columns, [], row[0].note))
        else:
            groups[-1] = replace(groups[-1], rows=[*groups[-1].rows, row])
    parts = [f"{'#' * level} {plain(table.title)}\n\n{plain(table.note)}\n"]
    for group in groups:
        heading = f"{'#' * (level + 1)} {plain(group.title)}\n\n{plain(group.note)}\n"
        parts += [heading, tables.markdown_table(group)]
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
    lines = [f"- {plain(place)}: {plain('; '.join(titles))}" for place, titles in places.items()]
    return "\n".join(["<details><summary>Where the published figures are from</summary>\n", *lines, "\n</details>\n"])


def _losses(rows: Sequence[card_tables.LayerLoss]) -> str:
    """A table by layer; of many layers a summary, and the table folded."""
    if not rows:
        return ""
    if len(rows) <= card_tables.LAYERS_SHOWN:
        return tables.markdown_titled(card_tables.losses_by_layer(rows), 3)
    folded = tables.markdown_table(card_tables.losses_by_layer(rows))
    summary = tables.markdown_titled(card_tables.losses_by_attention(rows), 3)
    return f"{summary}\n<details><summary>All {len(rows)} layers</summary>\n\n{folded}\n</details>\n"


def render(subject: Subject) -> str:
    """The card's text."""
    chosen = settings.serving()
    manifest, run = subject.manifest, subject.run
    text = rendered(
        "model_card.md.j2",
        escape=False,
        subject=subject,
        front_matter=front_matter(subject),
        warning=warning(subject),
        tensors=len(layout.artifact(subject.config)),
        size=decimal_size(subject.bytes, least="bytes"),
        kept=named_layers(subject.config.fp4_layers) if subject.config.fp4_layers else "",
        recipe=tables.markdown_table(card_tables.precision(manifest, card_tables.bytes_by_kind(subject.config))),
        checks=_checks(subject),
        sections=_sections(subject),
        limits=list(limits(subject)),
        calibration=calibration(subject),
        losses=_losses(card_tables.losses(manifest, subject.config)),
        serve=serve_command(subject),
        replica_gpus=chosen.tensor_parallel,
        hardware=tables.markdown_titled(
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
    return f"{tables.markdown_table(table)}\n{plain(table.note)}\n"


def _checks(subject: Subject) -> str:
    if subject.certificate is None:
        return ""
    return tables.markdown_table(run_sections.certificate_table(artifact_folder.verdict(subject.certificate)))


def text(subject: Subject) -> str:
    """The card, with what the work folder's reports hold of the artifact. Raises UserError for a file of another form,
    each looked at once by itself, so that it is named."""
    files: dict[str, tuple[str, Callable[[], object]]] = {
        MANIFEST: (
            "make postprocess",
            lambda: (card_tables.losses(subject.manifest, subject.config), calibration(subject)),
        ),
        RUN: ("make card", lambda: (card_tables.stages(subject.run), list(card_tables.peaks(subject.run)))),
    }
    if subject.certificate is not None:
        files[CERTIFICATE] = ("make verify", lambda: (warning(subject), _checks(subject)))
    for name, (hint, look) in files.items():
        understood(subject.folder / name, hint, look)
    return understood(subject.folder / MANIFEST, "make postprocess", lambda: render(subject))
