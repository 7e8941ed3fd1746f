"""The checks of what an artifact says of itself: SHA256SUMS, and manifest.json with its record of every matrix.

Of checks.py, which lists them; both files are as untrusted as the rest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from v4forge.artifact_folder import MANIFEST, SUMS, members
from v4forge.checkpoint.recipe import INT4
from v4forge.digests import digest_of
from v4forge.quantization.layer_files import ENGINES
from v4forge.verification.subject import Failures, Subject


def _dict(value: Any) -> dict[str, Any]:
    """A part of the manifest, which is as untrusted as the rest; {} for one of another kind."""
    return value if isinstance(value, dict) else {}


def checksums(s: Subject) -> Failures:
    """Every file has the SHA-256 of SHA256SUMS and of manifest.json, and none is unlisted."""
    try:
        lines = (s.folder / SUMS).read_text().splitlines()
    except (OSError, ValueError):
        yield f"{SUMS} is missing or damaged: run postprocess again"
        return
    stated = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    found = {path.name: digest for path, digest in s.digests.of(members(s.folder)).items()}
    for name in sorted(stated.keys() | found.keys()):
        if name not in found:
            yield f"{name} is listed in {SUMS} but missing"
        elif stated.get(name) != found[name]:
            says = stated.get(name, "nothing")[:12]
            yield f"{name} has sha256 {found[name][:12]}…, {SUMS} says {says}: changed after postprocess"
    listed = _dict(s.manifest.get("files"))
    for name in sorted((found.keys() | listed.keys()) - {MANIFEST}):
        if _dict(listed.get(name)).get("sha256", "") != found.get(name):
            yield f"{MANIFEST} does not describe {name} as it is"


def provenance(s: Subject) -> Failures:
    """manifest.json names the source, the calibration, the recipe and the engine that the layers were made with."""
    calibration, files = s.manifest.get("calibration"), _dict(_dict(s.manifest.get("source")).get("files"))
    if not isinstance(calibration, dict) or not files or any(name != Path(name).name for name in files):
        yield f"{MANIFEST} does not say what the artifact was made from: run postprocess again"
        return
    stated = {name: _dict(entry).get("sha256") for name, entry in files.items()}
    mark = digest_of({**calibration, "source": stated})
    if s.expect and (method := _dict(calibration.get("settings")).get("method", s.expect)) != s.expect:
        yield f"{MANIFEST} says that the experts were quantized with method {method!r}, {s.expect!r} expected"
    yield from _recipe(_dict(calibration.get("settings")), s)
    yield from _engine(_dict(calibration.get("settings")), _dict(calibration.get("versions")), s.engine)
    for shard in sorted({shard for name, shard in s.artifact.weight_map.items() if name.startswith("layers.")}):
        if s.artifact.metadata(shard).get("fingerprint") != mark:
            yield f"{shard} was made from another source or with other settings than {MANIFEST} states"
    if s.source is not None and s.hashing:
        folder = s.source.directory
        found = s.digests.of([folder / name for name in stated if (folder / name).is_file()])
        for name, digest in stated.items():
            if (actual := found.get(folder / name)) != digest:
                yield f"the source's {name} has sha256 {str(actual)[:12]}…, {MANIFEST} says {str(digest)[:12]}…"


def _recipe(settings: dict[str, Any], s: Subject) -> Failures:
    """By which recipe it is: the one of config.json's quantization_config, and the expected one."""
    found = settings.get("recipe", INT4)  # the only one there was, before manifests said so
    if found != s.config.recipe:
        yield f"{MANIFEST} says that the recipe was {found!r}, config.json's quantization_config is {s.config.recipe!r}"
    elif s.recipe and found != s.recipe:
        yield f"{MANIFEST} says that the recipe was {found!r}, {s.recipe!r} expected"


def _engine(settings: dict[str, Any], versions: dict[str, Any], expected: str) -> Failures:
    """Whose GPTQ it is: one that there is, the expected one, and of which version where it is not our own."""
    if settings.get("method") != "gptq":
        if expected:
            yield f"{MANIFEST} says that no engine's GPTQ made the codes, {expected} expected"
        return
    engine = settings.get("engine", ENGINES[0])  # the only one there was, before manifests said so
    if engine not in ENGINES:
        yield f"{MANIFEST} says that the engine was {engine!r}, which is none of {', '.join(ENGINES)}"
    elif expected and engine != expected:
        yield f"{MANIFEST} says that the engine was {engine}, {expected} expected"
    elif engine != ENGINES[0] and not versions.get(engine):
        yield f"{MANIFEST} does not say which version of {engine} it was"


def recorded(s: Subject) -> Failures:
    """Every expert matrix has the codes and scales that calibration recorded when it made them."""
    layers = s.manifest.get("layers")
    entries = [_dict(each) for each in layers] if isinstance(layers, list) else []
    by_layer = {str(each.get("layer")): each.get("codes") for each in entries}
    for each in (each for each in s.seen if each.digest):
        _, layer, _, _, expert, which, _ = each.name.split(".")
        try:
            stated = by_layer[layer][which][int(expert)]  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            yield f"{each.name}: {MANIFEST} has no record of it"
            continue
        if stated != each.digest:
            yield f"{each.name}: its codes and scales are {each.digest}, calibration recorded {stated}: a flipped bit?"
