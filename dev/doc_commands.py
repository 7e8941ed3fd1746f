"""The commands, links and variables that README.md and docs/ name, and how `make docs-check` treats each command.

RULES says of every command how it is run: as it is, dry, or only looked up. A command that no rule covers is a
fault, so that none stands on a page untried. Nothing is run here; dev.doc_runs does that.
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline, backtick, image, link
from markdown_it.token import Token

from v4forge import makefile

RUN, DRY, USAGE, SYNTAX = "run", "dry run", "usage", "syntax"

# What a line of a block begins with when the block holds commands and not what something printed.
PROGRAMS = re.compile(
    r"(?:[A-Z]+=\S+ )*"
    r"(make|v4forge|pip|python|torchrun|curl|kubectl|helm|sed|tr|git|docker|sudo|export|nvidia-smi|\.|\.ci/run|\.venv[\w-]*/bin/\w+)"
    r"(?=\s|$)"
)
# What a quotation in the text begins with when it is one.
QUOTED = re.compile(r"(?:[A-Z]+=\S+ )*(?:make|v4forge(?= )|pip(?= )|python|torchrun|\.ci/run|\.venv[\w-]*/bin/python)")
COMMENT = re.compile(r"\s+# .*$|\s+#$")
VARIABLE = re.compile(r"^([A-Z][A-Z_]*)=")
# A part of a command that stands for something of the reader's.
PLACEHOLDER = re.compile(r"<[a-z0-9 ./-]+>|…|\bDIR\b|\bFOLDER\b|\bKEY=VALUE\b")


@dataclass(frozen=True)
class Command:
    """A command where it stands: a page relative to the checkout, a line, the text on one line."""

    page: str
    line: int
    text: str


@dataclass(frozen=True)
class Rule:
    """Commands that match `pattern` are treated so. `edits`: (pattern, replacement) that make the dry form of it.

    `says`: what it may end with instead of exit code 0, as a pattern of its output: where this machine lacks what the
    command looks for, and says so. `beside`: it neither needs nor changes what another command makes, so that it may
    run beside any.
    """

    how: str
    pattern: str
    why: str = ""
    edits: tuple[tuple[str, str], ...] = ()
    says: str = ""
    beside: bool = False


@dataclass(frozen=True)
class Step:
    """A command with its rule and what is run for it; `rule` is None where no rule covers it."""

    command: Command
    rule: Rule | None
    run: str

    @property
    def how(self) -> str:
        return self.rule.how if self.rule else "no rule"

    @property
    def beside(self) -> bool:
        """Whether it may run beside any other. What is only looked up may."""
        return self.how in (USAGE, SYNTAX) or (self.rule is not None and self.rule.beside)


# What stands for placeholders: paths of the tiny artifact, in this order.
VALUES = (
    (r"(?<![\w./])/scratch\b", "scratch"),
    (r"CORPUS=<file>", "CORPUS=models/tiny/heldout.txt"),
    (r"<owner>/<name>@<commit>,split=<split>,column=<column>", f"some/rows@{'8' * 40},split=train,column=messages"),
    (r"FROM=<folder>", "FROM=models/tiny"),
    (r"SOURCE=<folder>", "SOURCE=models/tiny"),
    (r"SCRATCH=<folder>", "SCRATCH=scratch/other"),
    (r"DATASETS=<folder>", "DATASETS=scratch/datasets"),
    (r"--artifact DIR", "--artifact scratch/tiny/artifact"),
    (r"--source DIR", "--source models/tiny"),
    (r"REPO=<org>/<name>", "REPO=v4forge/tiny"),
    (r"MANIFEST=<[\w.]+>", "MANIFEST=scratch/tiny/artifact/manifest.json"),
    (r"REGISTRY=<\w+>/<\w+>", "REGISTRY=127.0.0.1:5000/v4forge"),
    (r"<stage>", "calibrate"),
    (r"^v4forge serve-print ", "python -m scripts.serve print "),
    (r"^v4forge inspect\b", "python -m scripts.inspect_checkpoint"),
    (r"^v4forge (\w+)", r"python -m scripts.\1"),  # tests/project/test_package.py holds one to the other
    (r"^v4forge ", "python -m scripts "),
    (r"^((?:[A-Z]+=\S+ )*)python ", r"\1.venv/bin/python "),
)

STAGES = "demo|artifact|fetch|dequant|calibrate|postprocess|verify|card|peer"
ELSEWHERE = r"(?=.*(?:PROFILE=flash|RUNTIME=docker|GPUS=|DEVICES=|CORPUS=|RECIPE=))"
AGAIN = r"(?=.*SCRATCH=scratch/(?:changed|other))"
TINY = (r" PROFILE=flash\b", "")  # the same about what is here
SHORT = (r"^(make demo(?!.* DEEP=).*)$", r"\1 DEEP=1024")  # soak has the demo's own, in the image
FEW = (r"^(?!.*SAMPLES=)(.*)$", r"\1 SAMPLES=8")  # the same in less time: make test has the demo's 64
PRINTED = (r"^make serve(?:-print)?(?= |$)", "make serve-print")
MADE = makefile.read()
UNREAD = (rf" (?:{'|'.join(sorted(MADE.reads('serve') - MADE.reads('serve-print')))})=\S+", "")  # of a start alone
CHOSEN = (r"^(?!.*(?:DEVICES|BACKEND)=)(.*)$", r"\1 DEVICES=0,1,2,3")  # GPUs by name are not looked for
TOO_SMALL = r"(?m)^error: .* are missing$"

# The first that matches the whole command, with placeholders filled in.
RULES = (
    Rule(DRY, rf"make (?:{STAGES}){ELSEWHERE} .*", "GPUs, docker, a download or another text", ((r"$", " DRY_RUN=1"),)),
    Rule(DRY, rf"make (?:{STAGES}){AGAIN} .*", "the same work in another folder", ((r"$", " DRY_RUN=1"),)),
    Rule(DRY, r"make peer", "tests/verification/test_engines.py runs it", ((r"$", " DRY_RUN=1"),)),
    Rule(DRY, r"make verify SIGN_KEY=\S+", "a key", ((r"SIGN_KEY=\S+", "SAMPLES=8"),)),
    Rule(RUN, rf"make (?:{STAGES}|why)(?: .*)?", "with few samples", (SHORT, FEW)),
    Rule(DRY, r"make certified(?: .*)?", "an artifact or a key of others", ((r" (?:ARTIFACT|VERIFY_KEY)=\S+", ""),)),
    Rule(RUN, r"make reproduce(?: .*)?"),
    Rule(RUN, r"make (?:help(?:-[a-z]+)?|lock-check)", beside=True),
    Rule(RUN, r"make plan(?: .*)?", says=TOO_SMALL, beside=True),
    Rule(RUN, r"make doctor(?: .*)?", says=r"(?m)^doctor: PROFILE=\w+ cannot run here yet", beside=True),
    Rule(RUN, r"make status(?: .*)?", says=r"error: nothing has run in"),
    Rule(RUN, r"make report(?! .*flash)(?: .*)?"),
    Rule(DRY, r"make report .*", "an artifact of Flash", (TINY,)),
    Rule(
        DRY, r"make release-check(?: .*)?", "an artifact of Flash", (TINY,), r"release-check: \d+ of \d+ checks FAILED"
    ),
    Rule(
        *(DRY, r"make publish(?: .*)?", "a repository on the hub"),
        edits=(TINY, (r" CONFIRM=1", ""), (r"publish$", "publish REPO=v4forge/tiny")),
    ),
    Rule(DRY, r"make serve(?:-print)?(?: .*)?", "GPUs, or a vLLM", (PRINTED, UNREAD, TINY, CHOSEN)),
    Rule(DRY, r'make bench-\w+ .*WITH="[^"]*".*', "a server", ((r'WITH="', 'WITH="--dry-run '), TINY)),
    Rule(DRY, r"make bench-\w+(?: .*)?", "a server", ((r"( WITH=--dry-run)?$", " WITH=--dry-run"), TINY)),
    Rule(USAGE, r"make (?:images|pull|push|shell|image-reproduce|test-images)(?: .*)?", "docker, a registry"),
    Rule(
        USAGE,
        r"make (?:chat|serve-(?:status|logs|reload|stop|pairs)|bench|compare)(?: .*)?",
        "what is served or was measured",
    ),
    Rule(SYNTAX, r"pip install .*", "a package index"),
    Rule(USAGE, r"make (?:env|env-serve|env-serve-cpu|docs|lock|image-lock)(?: .*)?", "a package index"),
    Rule(USAGE, r"make (?:ci|soak|lint|test|test-serve|docs-check|clean)(?: .*)?", "minutes, or itself"),
    Rule(USAGE, r".*-m (?:scripts|dev|benchmarks)\.\w+(?: [a-z]+)?.*….*", "it is not written out"),
    Rule(RUN, r"\S*python -m scripts(?:\.\w+)?(?: \w+)* --help", beside=True),
    Rule(RUN, r"\S*python -m scripts\.plan .*", says=TOO_SMALL, beside=True),
    Rule(RUN, r"\S*python -m scripts\.inspect_checkpoint models/tiny", beside=True),
    Rule(RUN, r"\S*python -m scripts\.calibrate .*"),
    Rule(DRY, r"\S*python -m scripts\.verify .*", "half a minute", ((r"--deep \d+", "--deep 512"),)),
    Rule(RUN, r"\S*python -m scripts\.postprocess (?!.*--from-hf).*"),
    Rule(RUN, r"\S*python -m scripts\.patch list \w+", beside=True),
    Rule(USAGE, r"\S*python -m (?:scripts|dev|benchmarks)\.\w+(?: .*)?", "a GPU, a server, or another tool's artifact"),
    # The page has to be what it writes.
    Rule(
        RUN,
        r"PYTHONPATH=\. \S*python tests/support/corruptions\.py ?> ?docs/verify\.md",
        edits=((r"$", " && git diff --exit-code docs/"),),
    ),
    Rule(USAGE, r"PYTHONPATH=\. \S*python tests/support/corruptions\.py", "the same, which is run above"),
    Rule(USAGE, r"\.venv\S*/bin/python docs/upstream/\w+\.py.*", "tests/project/test_upstream.py runs each"),
    Rule(DRY, r"\.ci/run(?: soak)?", "a machine of its own", ((r"^", "bash -n "),)),
    Rule(
        SYNTAX,
        r"(?:curl|sed|tr|kubectl|\.|\.venv/bin/hf|sudo|docker|export|nvidia-smi) .*",
        "a server, a cluster, root or a GPU",
    ),
)


def _with_line(rule: Callable[[StateInline, bool], bool]) -> Callable[[StateInline, bool], bool]:
    """The rule, which also notes how many lines of its text come before what it finds; markdown-it only knows a
    paragraph's first."""

    def noting(state: StateInline, silent: bool) -> bool:
        start, made = state.pos, len(state.tokens)
        found = rule(state, silent)
        for token in state.tokens[made:]:
            token.meta.setdefault("lines", state.src.count("\n", 0, start))
        return found

    return noting


MARKDOWN = MarkdownIt("commonmark").enable("table")
for _name, _rule in (("backticks", backtick), ("link", link), ("image", image)):
    MARKDOWN.inline.ruler.at(_name, _with_line(_rule))


def inline(text: str, *kinds: str) -> Iterator[tuple[int, Token]]:
    """(line number, token) of what stands in a page's text, not in its blocks: code_inline, link_open, image."""
    for outer in MARKDOWN.parse(text):
        for token in outer.children or ():
            if token.type in kinds and outer.map:
                yield outer.map[0] + 1 + token.meta["lines"], token


def blocks(text: str) -> Iterator[list[tuple[int, str]]]:
    """The fenced and indented blocks of a page, cut at empty lines: (line number, line without indentation)."""
    for token in MARKDOWN.parse(text):
        if token.type not in ("fence", "code_block") or not token.map:
            continue
        lines = enumerate(token.content.splitlines(), start=token.map[0] + 1 + (token.type == "fence"))
        for written, block in itertools.groupby(lines, key=lambda line: bool(line[1].strip())):
            if written:
                yield [(number, line.strip()) for number, line in block]


def in_block(block: list[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """The commands of a block that holds commands, continued lines joined; nothing of one that shows an output."""
    if not PROGRAMS.match(block[0][1]):
        return
    started, parts = 0, []
    for number, line in block:
        started = started or number
        parts.append(COMMENT.sub("", line).removesuffix("\\").strip())
        if not line.endswith(("\\", "&&", "|")):
            yield started, " ".join(parts)
            started, parts = 0, []


def commands(page: str, text: str) -> list[Command]:
    """Every command of a page, in blocks and in the text, in the order of its lines."""
    found = [Command(page, number, line) for block in blocks(text) for number, line in in_block(block)]
    for number, token in inline(text, "code_inline"):
        words = " ".join(token.content.split())
        if QUOTED.match(words) and (" " in words or words == ".ci/run"):
            found.append(Command(page, number, words))
    return sorted(found, key=lambda command: command.line)


def parts(text: str) -> list[str]:
    """A line's commands one by one: `make a b X=1` is two, `make a || make b` as well; others stay whole."""
    pieces = re.split(r" (?:\|\||&&) ", text)
    if not all(re.match(r"make |\S*python ", piece) for piece in pieces):
        return [text]
    single = []
    for piece in pieces:
        words = shlex.split(piece) if piece.startswith("make ") else []
        targets = [word for word in words[1:] if re.fullmatch(r"[a-z][a-z-]*", word)]
        if len(targets) < 2:
            single.append(piece)
            continue
        rest = [shlex.quote(word) for word in words[1:] if word not in targets]
        single += [" ".join(["make", target, *rest]) for target in targets]
    return single


def steps(command: Command) -> list[Step]:
    """What is done for a command of a page."""
    found = []
    for text in parts(command.text):
        filled = text
        for pattern, value in VALUES:
            filled = re.sub(pattern, value, filled)
        rule = next((rule for rule in RULES if re.fullmatch(rule.pattern, filled)), None)
        for pattern, replacement in rule.edits if rule else ():
            filled = re.sub(pattern, replacement, filled, count=1)
        found.append(Step(command, rule, filled))
    return found


def unfilled(step: Step) -> list[str]:
    """The placeholders that are left in what would be run."""
    return PLACEHOLDER.findall(step.run) if step.how in (RUN, DRY) else []


def variables(text: str) -> set[str]:
    """The variables that a make command sets."""
    if not text.startswith("make "):
        return set()
    return {match[1] for word in shlex.split(text) if (match := VARIABLE.match(word))}


def links(text: str) -> Iterator[tuple[int, str]]:
    """(line, target) of every link and picture of a page, anchors and addresses included."""
    for number, token in inline(text, "link_open", "image"):
        yield number, str(token.attrs.get("href") or token.attrs["src"])


def anchors(text: str) -> set[str]:
    """What a link may name after # on a page: its headings, as GitHub writes them."""
    tokens = MARKDOWN.parse(text)
    headings = [after.content for token, after in itertools.pairwise(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def pages(root: Path) -> list[Path]:
    """README.md and the pages of docs/, those that a program writes too."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]
