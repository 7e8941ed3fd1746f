"""What locks, Dockerfiles, compose files, workflows and docs may say of a version: nothing but what versions.env says.

Each check is a function from the checkout's text to facts, `file:line: <what disagrees>`. Offline, in a second.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from v4forge import checkout, pins
from v4forge.images import definitions, locks

PINS = pins.FILE.name
IMAGES_LOCK = definitions.LOCK.name
# Generated from versions.env, or a record of how something was made.
GENERATED = re.compile(r"versions\.env|images\.lock|docker/requirements-.*\.txt|models/.*|benchmarks/results/.*")
DOCKERFILES = re.compile(r"Dockerfile(\..+)?|.+/Dockerfile(\..+)?")
COMPOSE = re.compile(r"compose[^/]*\.ya?ml|docker/(.+/)?compose[^/]*\.ya?ml")
WORKFLOWS = re.compile(r"\.github/workflows/.+\.ya?ml")
DOCS = re.compile(r"README\.md|docs/.*\.md|patches/.*\.md")
CODE = re.compile(r"Makefile|\.ci/.+|docker/(?!requirements-).+|(scripts|v4forge|dev|benchmarks)/.+\.py")
# A line of a doc that tells what was measured or was so once, and stays true after a bump.
HISTORY = "<!-- history -->"

# The parts of a pin's value that occur nowhere by chance: long versions, commits, digests, a snapshot's time.
TELLING = re.compile(r"(?<![\w.])\d+(?:\.\d+){2,}[\w.+]*|[0-9a-f]{40,}|\d{8}T\d{6}Z")
HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}")
IMAGE_FORMS = {
    "IMAGE": re.compile(r"(?!.*://)[^\s@]+/[^\s@:]+@sha256:[0-9a-f]{64}"),
    "IMAGE_ID": re.compile(r"sha256:[0-9a-f]{64}"),
    "PROVENANCE_SHA256": re.compile(r"[0-9a-f]{64}"),
}
# Keys of versions.env end so; an ARG that does and is not there is a slip of the pen.
PIN_NAME = re.compile(r"[A-Z0-9_]+_(VERSION|COMMIT|REVISION|SHA256|SNAPSHOT)")
# What a pinned package is called in prose, where that is not its name on the index.
PROSE = {"docker": "docker-py"}


@dataclass(frozen=True)
class Project:
    """The text of the project's files by name relative to its root."""

    files: dict[str, str]

    @cached_property
    def pins(self) -> dict[str, str]:
        return pins.parse(self.files[PINS], PINS)

    def named(self, *patterns: re.Pattern[str]) -> dict[str, str]:
        """The hand-edited files whose name one of the patterns matches."""
        return {
            name: text
            for name, text in self.files.items()
            if not GENERATED.fullmatch(name) and any(pattern.fullmatch(name) for pattern in patterns)
        }

    def lock(self, name: str) -> locks.Lock:
        return locks.parse(self.files.get(locks.lock_file(name), ""))


Check = Callable[[Project], Iterator[str]]


def read(root: Path = checkout.ROOT) -> Project:
    """The text files of the checkout at `root`."""
    files = {}
    for name in checkout.names(root):
        try:
            files[name] = (root / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):
            continue
    return Project(files)


def line_of(text: str, offset: int) -> int:
    return text.count("\n", 0, offset) + 1


def line_starting(text: str, start: str) -> int:
    """The number of the first line that begins with `start`; 1 where none does."""
    return next((number for number, line in enumerate(text.splitlines(), 1) if line.startswith(start)), 1)


def instructions(text: str) -> Iterator[tuple[int, str]]:
    """The instructions of a Dockerfile with their first line's number; continued lines are joined."""
    started, parts = 0, []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("#") or not line.strip():
            continue
        started = started or number
        parts.append(line.rstrip("\\ "))
        if not line.rstrip().endswith("\\"):
            yield started, " ".join(parts).strip()
            started, parts = 0, []


def pins_in_locks(project: Project) -> Iterator[str]:
    """Every line of an .in file is a package, with a pin, at whose version it is locked."""
    for source in locks.SOURCES:
        if source.path not in project.files:
            yield f"{source.path}:1: is missing"
        locked = {line.split(" ;")[0] for name in (*source.on, *source.locks) for line in project.lock(name)}
        for number, entry in locks.entries(project.files.get(source.path, "")).items():
            where = f"{source.path}:{number}"
            if not locks.IN_LINE.fullmatch(entry):
                yield f"{where}: {entry!r} is not a package's name; versions belong in {PINS}"
                continue
            package = locks.package_of(entry)
            key = source.key(package, project.pins)
            version = project.pins.get(key)
            if not version:
                yield f"{where}: {PINS} has no {key}"
            elif f"{package}=={version}" not in locked:
                yield f"{where}: {locks.lock_file(source.name)} has no {package}=={version}, which {key} asks for"


def locks_are_whole(project: Project) -> Iterator[str]:
    """Each lock is there, pins every line by hash, names no address, and repeats no package of what it is put on."""
    for source in locks.SOURCES:
        below = {locks.package_of(line) for name in source.on for line in project.lock(name)}
        for name in source.locks:
            path = locks.lock_file(name)
            if path not in project.files:
                yield f"{path}:1: is missing"
            text = project.files.get(path, "")
            for match in re.finditer(r"://|--index-url|--find-links|file:|(?<!\w)/(opt|root|home|tmp)/", text):
                yield f"{path}:{line_of(text, match.start())}: {match.group()!r} ties the lock to a machine"
            seen: set[str] = set()
            for line, hashes in project.lock(name).items():
                where = f"{path}:{line_starting(text, line)}"
                package, marker = locks.package_of(line), " ; " in line
                if not re.fullmatch(r"[a-z0-9-]+==[^\s;=]+( ; .+)?", line):
                    yield f"{where}: {line!r} is not name==version"
                if not hashes or not all(HASH.fullmatch(value) for value in hashes):
                    yield f"{where}: {package} is locked without a hash"
                if package in below or (package in seen and not marker):
                    yield f"{where}: {package} is locked twice"
                if source.cuda and (locks.CUDA_PACKAGE.fullmatch(package) is not None) != (name == source.cuda):
                    yield f"{where}: {package} belongs into the other of {' and '.join(source.locks)}"
                if package == "torch" and (lacking := set(source.cpu_torch_hashes(project.pins)) - set(hashes)):
                    yield f"{where}: torch lacks {len(lacking)} hashes of {source.cpu_torch_key(project.pins)}*"
                seen.add(package)


def pins_elsewhere(project: Project) -> Iterator[str]:
    """No pin's version, commit or digest is written in another hand-edited file."""
    keys = {part: key for key, value in project.pins.items() for part in TELLING.findall(value)}
    if not keys:
        return
    pattern = re.compile(rf"(?<![\w.])(?:{'|'.join(map(re.escape, keys))})(?![\w]|\.\d)")
    for name, text in project.named(re.compile(".*")).items():
        for match in pattern.finditer(text):
            yield f"{name}:{line_of(text, match.start())}: {match.group()} is {keys[match.group()]} of {PINS}"


def literals(project: Project) -> Iterator[str]:
    """What builds, runs and documents the project names no package version, commit or digest of its own."""
    forms = (
        (r"(?<![\w-])[A-Za-z0-9][\w.-]*(\[[\w,-]+\])?==\d[\w.+]*", "a version"),
        (r"(?<![\w@])[0-9a-f]{40}(?!\w)", "a commit"),
        (r"sha256:[0-9a-f]{64}(?!\w)", "a digest"),
    )
    for name, text in project.named(DOCKERFILES, COMPOSE, WORKFLOWS, DOCS, CODE).items():
        for pattern, what in forms:
            for match in re.finditer(pattern, text):
                yield f"{name}:{line_of(text, match.start())}: {match.group()[:60]} is {what}; it belongs in {PINS}"


def dockerfile_arguments(project: Project) -> Iterator[str]:
    """An ARG named like a pin is one, and takes its value from the build, not from a default."""
    for name, text in project.named(DOCKERFILES).items():
        for number, instruction in instructions(text):
            if not instruction.startswith("ARG "):
                continue
            for argument in instruction.split()[1:]:
                key, equals, _ = argument.partition("=")
                if key in project.pins and equals:
                    yield f"{name}:{number}: ARG {key} has a default; its value is in {PINS}"
                elif PIN_NAME.fullmatch(key) and key not in project.pins:
                    yield f"{name}:{number}: ARG {key} is no key of {PINS}"


def dockerfile_images(project: Project) -> Iterator[str]:
    """Every image in a Dockerfile is an argument or an earlier stage, whose name may end in one."""
    for name, text in project.named(DOCKERFILES).items():
        if match := re.search(r"^#\s*syntax\s*=", text, flags=re.M | re.I):
            yield f"{name}:{line_of(text, match.start())}: a syntax line takes an image from the network"
        stages = {"scratch"}
        for number, instruction in instructions(text):
            used = re.findall(r"(?:--from=|,from=)([^\s,]+)", instruction)
            if match := re.match(r"FROM\s+(?:--\S+\s+)*(\S+)(?:\s+AS\s+(\S+))?", instruction, flags=re.I):
                used = [match[1]]
            for image in used:
                start, variable, _ = image.partition("$")
                known = image.isdigit() or image in stages or re.fullmatch(r"\$\{?\w+\}?", image)
                if not known and not (start and variable and any(stage.startswith(start) for stage in stages)):
                    yield f"{name}:{number}: image {image} is written out; make it an ARG of {PINS}"
            if match and match[2]:
                stages.add(match[2])


def compose_images(project: Project) -> Iterator[str]:
    """Every `image:` of a compose file is a variable, with no default written out."""
    for name, text in project.named(COMPOSE).items():
        for match in re.finditer(r"""^\s*image:\s*["']?([^"'#\n]+?)["']?\s*(?:#.*)?$""", text, flags=re.M):
            rest, count = match[1], 1
            while count:  # variables may nest as defaults; the text of ${NAME:?text} is a message
                rest, count = re.subn(r"\$\{\w+(?::?\?[^${}]*|:?-<>)?\}", "<>", rest)
            if rest != "<>":
                yield f"{name}:{line_of(text, match.start(1))}: image {match[1]} is written out; make it a variable"


def images_lock(project: Project) -> Iterator[str]:
    """images.lock has its keys for each image, well-formed or empty; one that was pushed has reference and ID."""
    if IMAGES_LOCK not in project.files:
        yield f"{IMAGES_LOCK}:1: is missing"
        return
    text = project.files[IMAGES_LOCK]
    values = pins.parse(text, IMAGES_LOCK)
    known: set[str] = set()
    for image in definitions.IMAGES:
        row = {name: f"{image.upper()}_{name}" for name in IMAGE_FORMS}
        known |= set(row.values())
        pushed = any(values.get(key) for key in row.values())
        # A registry may take no documents.
        optional = row["PROVENANCE_SHA256"]
        for name, key in row.items():
            value = values.get(key)
            where = f"{IMAGES_LOCK}:{line_starting(text, f'{key}=')}"
            if value is None:
                yield f"{where}: has no {key}"
            elif value and not IMAGE_FORMS[name].fullmatch(value):
                yield f"{where}: {key} is not of the form {IMAGE_FORMS[name].pattern}: {value}"
            elif pushed and not value and key != optional:
                yield f"{where}: {key} is empty, and others of {image} are not"
    for key in values.keys() - known:
        yield f"{IMAGES_LOCK}:{line_starting(text, f'{key}=')}: {key} is unknown"


def versions_in_prose(project: Project) -> Iterator[str]:
    """A doc that names a pinned package with a version names the pinned one, or its line says that it is history."""
    versions: dict[str, set[str]] = {}
    prefixes = "|".join(sorted((source.prefix for source in locks.SOURCES if source.prefix), key=len, reverse=True))
    for key, value in project.pins.items():
        if key.endswith("_VERSION") and value:
            package = re.sub(rf"^(?:{prefixes})", "", key).removesuffix("_VERSION").lower().replace("_", "-")
            versions.setdefault(PROSE.get(package, package), set()).add(value)
    names = "|".join(package.replace("-", "[-_. ]?") for package in sorted(versions, key=len, reverse=True))
    pattern = re.compile(rf"(?<![\w/-])`?({names})`?(?:\s+|==|>=|-)(?:version\s+)?v?(\d+(?:\.\d+)+)", flags=re.I)
    by_letters = {package.replace("-", ""): package for package in versions}
    for name, text in project.named(DOCS).items():
        for match in pattern.finditer(text):
            package = by_letters[re.sub(r"[-_. ]", "", match[1]).lower()]
            first, last = line_of(text, match.start()), line_of(text, match.end())
            if any(HISTORY in line for line in text.splitlines()[first - 1 : last]):
                continue
            if not any(f"{version}.".startswith(f"{match[2]}.") for version in versions[package]):
                pinned = " and ".join(sorted(versions[package]))
                yield f"{name}:{first}: {package} {match[2]}, but {PINS} has {pinned}; of the past: end it {HISTORY}"


def workflow_actions(project: Project) -> Iterator[str]:
    """Every action of a workflow is pinned by commit, with its release in a comment."""
    for name, text in project.named(WORKFLOWS).items():
        for match in re.finditer(r"^\s*-?\s*uses:\s*(.+)$", text, flags=re.M):
            action = match[1].strip()
            if not re.fullmatch(r"\./\S+|[\w.-]+/[\w./-]+@[0-9a-f]{40} +# v\d+(\.\d+)*", action):
                yield f"{name}:{line_of(text, match.start(1))}: {action} is not <action>@<commit>  # v<release>"


CHECKS: tuple[Check, ...] = (
    pins_in_locks,
    locks_are_whole,
    pins_elsewhere,
    literals,
    dockerfile_arguments,
    dockerfile_images,
    compose_images,
    images_lock,
    versions_in_prose,
    workflow_actions,
)


def problems(project: Project) -> list[str]:
    """What disagrees, as `file:line: fact`, by check."""
    return [fact for check in CHECKS for fact in check(project)]
