"""README.md and docs/: every command has a rule, every link leads somewhere, and what they name exists."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dev import doc_commands, doc_runs
from dev.doc_commands import DRY, RUN, SYNTAX, USAGE, Command
from v4forge import makefile
from v4forge.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in doc_commands.pages(ROOT)}
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(" ".join(re.findall(r"^([a-z][a-z -]*):", MAKEFILE, flags=re.MULTILINE)).split())
VARIABLES = set(re.findall(r"^([A-Z][A-Z_]*) :?=", MAKEFILE, flags=re.MULTILINE))
COMMANDS = [command for page, text in PAGES.items() for command in doc_commands.commands(page, text)]
STEPS = [step for command in COMMANDS for step in doc_commands.steps(command)]


def told(text: str) -> list[str]:
    return [command.text for command in doc_commands.commands("page.md", text)]


def treated(text: str) -> list[tuple[str, str]]:
    return [(step.how, step.run) for step in doc_commands.steps(Command("page.md", 1, text))]


def test_every_command_of_every_page_is_covered_by_a_rule() -> None:
    lacking = [f"{s.command.page}:{s.command.line}: {s.command.text}" for s in STEPS if s.rule is None]
    assert lacking == []


def test_no_placeholder_is_left_in_what_is_run() -> None:
    left = [(step.command, doc_commands.unfilled(step)) for step in STEPS if doc_commands.unfilled(step)]
    assert left == []


def test_every_target_and_variable_named_is_in_the_makefile() -> None:
    for step in STEPS:
        if step.run.startswith("make "):
            words = step.run.split()
            assert words[1] in TARGETS, step.command
            assert doc_commands.variables(step.run) <= VARIABLES, step.command


def test_the_tests_that_a_command_names_are_there() -> None:
    named = [path for step in STEPS for path in re.findall(r"\bTESTS=\"?([^\"\s]+)", step.run)]
    assert len(named) > 2
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_make_understands_every_command_that_is_run() -> None:
    for step in STEPS:
        if step.run.startswith("make ") and step.how in (RUN, DRY):
            words = shlex.split(step.run.partition(" && ")[0])[1:]
            goals, given = ([word for word in words if ("=" in word) == is_set] for is_set in (False, True))
            assert makefile.fault(doc_commands.MADE, goals, makefile.parsed(given)) is None, step


def test_every_variable_in_a_table_is_in_the_makefile() -> None:
    of_the_environment = {"APT_SOURCES", "API_KEY"}
    for page, text in PAGES.items():
        for row in re.findall(r"^\| ((?:`[A-Z][A-Z_]*`(?:, |; )?)+) \|", text, flags=re.MULTILINE):
            named = set(re.findall(r"`([A-Z_]+)`", row))
            assert named <= VARIABLES | of_the_environment, page


def test_every_link_leads_to_a_file_and_a_heading() -> None:
    for page, text in PAGES.items():
        for line, target in doc_commands.links(text):
            if "://" in target:
                continue
            name, _, anchor = target.partition("#")
            path = (ROOT / page).parent / name if name else ROOT / page
            assert path.exists(), f"{page}:{line}: {target}"
            if anchor:
                assert anchor in doc_commands.anchors(path.read_text(encoding="utf-8")), f"{page}:{line}: {target}"


def test_every_symptom_is_something_that_a_program_says() -> None:
    files = [path for folder in ("v4forge", "scripts", "patches") for path in (ROOT / folder).rglob("*.py")]
    joined = re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text(encoding="utf-8") for path in files))
    source = re.sub(r"\s+", " ", joined)
    rows = [line for line in PAGES["docs/troubleshooting.md"].splitlines() if line.startswith("| ")]
    symptoms = [symptom for row in rows for symptom in re.findall(r"`([^`]+)`", row.split("|")[1])]
    said_by_others = {"Killed"}
    assert len(symptoms) > 40
    assert [symptom for symptom in symptoms if symptom not in source and symptom not in said_by_others] == []


def test_commands_are_found_in_blocks_and_in_the_text_but_not_in_outputs() -> None:
    text = """\
Run `make demo`, or `make` alone.

    make artifact PROFILE=flash    # a comment
    python -m scripts.plan \\
        --profile flash

    demo: done
    make nothing of it

1. A step:

       make card

```
make fetch
```
`python -m scripts.verify
--deep 8` ends it.
"""
    assert told(text) == [
        "make demo",
        "make artifact PROFILE=flash",
        "python -m scripts.plan --profile flash",
        "make card",
        "make fetch",
        "python -m scripts.verify --deep 8",
    ]


def test_what_stands_in_a_paragraph_is_told_with_its_own_line() -> None:
    text = "Begin: `make\ndemo` and [a\nlink](a.md), `make card`\nthen ![p](p.png) `make fetch`.\n"
    assert [(each.line, each.text) for each in doc_commands.commands("p.md", text)] == [
        (1, "make demo"),
        (3, "make card"),
        (4, "make fetch"),
    ]
    assert list(doc_commands.links(text)) == [(2, "a.md"), (4, "p.png")]


def test_a_block_holds_neither_links_nor_headings() -> None:
    text = (
        "# A page\n\n```\n# a comment\n[x](y.md)\n```\n\n    # another [x](z.md)\n\n| a |\n|---|\n| [b](c.md#d-e) |\n"
    )
    assert list(doc_commands.links(text)) == [(12, "c.md#d-e")]
    assert doc_commands.anchors(text) == {"a-page"}


def test_a_line_of_several_commands_is_taken_apart() -> None:
    assert doc_commands.parts("make card report PROFILE=flash") == [
        "make card PROFILE=flash",
        "make report PROFILE=flash",
    ]
    assert doc_commands.parts("make pull || make images") == ["make pull", "make images"]
    assert doc_commands.parts(". ./a && sed b") == [". ./a && sed b"]


@pytest.mark.parametrize(
    ("command", "how", "run"),
    [
        ("make demo", RUN, "make demo DEEP=1024 SAMPLES=8"),
        ("make artifact PROFILE=flash GPUS=8", DRY, "make artifact PROFILE=flash GPUS=8 DRY_RUN=1"),
        ("make serve PROFILE=flash", DRY, "make serve-print DEVICES=0,1,2,3"),
        ("make serve-print BACKEND=cpu", DRY, "make serve-print BACKEND=cpu"),
        ("make serve-status", USAGE, "make serve-status"),
        ("make publish REPO=<org>/<name> CONFIRM=1", DRY, "make publish REPO=v4forge/tiny"),
        ('make bench-draft WITH="--a 1"', DRY, 'make bench-draft WITH="--dry-run --a 1"'),
        ("curl http://127.0.0.1:8000", SYNTAX, "curl http://127.0.0.1:8000"),
    ],
)
def test_what_cannot_run_here_is_run_dry(command: str, how: str, run: str) -> None:
    assert treated(command) == [(how, run)]


def test_nothing_that_uploads_or_asks_for_a_gpu_is_run_as_it_is() -> None:
    for step in STEPS:
        if step.how == RUN:
            assert not re.search(r"CONFIRM=|--yes|PROFILE=flash(?!.*plan)|RUNTIME=docker", step.run) or re.match(
                r"make (plan|doctor|status) ", step.run
            ), step.run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> doc_runs.Runs:
    """Runs in a folder that looks like a checkout to the commands of these tests."""
    copy = tmp_path_factory.mktemp("copy")
    (copy / ".venv" / "bin").mkdir(parents=True)
    (copy / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (copy / "scripts").mkdir()
    (copy / "scripts" / "x.py").write_text(
        "import argparse\np = argparse.ArgumentParser()\np.add_argument('--known')\np.parse_args()\n"
    )
    makefile = """\
help:
\t@echo several words; exit 0
why:
\t@echo 'error: it broke' >&2; exit 1
doctor:
\t@echo 'doctor: PROFILE=tiny cannot run here yet'; exit 1
status:
\t@printf 'Traceback (most recent call last):\\n'
pull:
\t@.venv/bin/python -m scripts.x --known 1
push:
\t@.venv/bin/python -m scripts.x --unknown 1
"""
    (copy / "Makefile").write_text(makefile)
    return doc_runs.Runs(copy)


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("make help", ""),
        ("make why", "exit code 2, error: it broke"),
        ("make doctor", ""),
        ("make status", "exit code 0, Traceback (most recent call last):"),
        ("make pull", ""),
        ("make push", "scripts.x has no option --unknown"),
        ("make card X=<a thing>", "<a thing> stands for nothing: VALUES in dev/doc_commands.py"),
        ("make nothing", "no rule of dev/doc_commands.py covers it"),
        (". ./a && 'b", "exit code 2, "),
        (".venv/bin/python docs/upstream/nothing.py …", "there is no docs/upstream/nothing.py"),
    ],
)
def test_what_is_wrong_with_a_command_is_said(runs: doc_runs.Runs, command: str, fault: str) -> None:
    outcomes = [outcome for step in doc_commands.steps(Command("p.md", 1, command)) for outcome in [runs.outcome(step)]]
    said = outcomes[0].fault.splitlines()[0] if outcomes[0].fault else ""
    assert said == fault or (fault.endswith(", ") and said.startswith(fault))


def test_a_command_is_run_once_and_the_second_line_says_so(runs: doc_runs.Runs) -> None:
    again = doc_runs.Runs(runs.copy)
    lines = [outcome.line() for outcome in again.pages({"p.md": "`make help` `make pull`\n\n`make help`\n"})]
    assert ["as line 1" in line for line in lines] == [False, False, True]


def test_a_copy_has_what_git_has_and_is_clean(tmp_path: Path) -> None:
    for words in (["init", "-q"], ["config", "user.email", "a@b"], ["config", "user.name", "a"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    (tmp_path / ".gitignore").write_text("ignored\n.venv/\n")
    (tmp_path / ".venv").mkdir()
    for name in ("ignored", "new.txt"):
        (tmp_path / name).write_text(name)
    with doc_runs.copied(tmp_path) as copy:
        assert sorted(path.name for path in copy.iterdir()) == [".git", ".gitignore", ".venv", "new.txt"]
        status = subprocess.run(["git", "status", "--porcelain"], cwd=copy, capture_output=True, text=True)
        assert status.stdout == ""
    assert not copy.exists()


def test_outside_of_a_checkout_that_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a git checkout"), doc_runs.copied(tmp_path):
        pass


def test_every_test_that_a_page_names_is_there() -> None:
    files = [path for path in (ROOT / "tests").rglob("*.py") if path.name != Path(__file__).name]
    known = set(re.findall(r"def (test_\w+)", "\n".join(path.read_text(encoding="utf-8") for path in files)))
    named = {name for text in PAGES.values() for name in re.findall(r"`(test_\w+…?)`", text)}
    assert len(named) > 20
    absent = [name for name in named if not any(each.startswith(name.rstrip("…")) for each in known)]
    assert [name for name in absent if name.endswith("…") or name not in known] == []
