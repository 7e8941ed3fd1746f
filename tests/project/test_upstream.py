"""The programs of docs/upstream/: each still finds its fault, and prints what docs/upstream.md says.

That depends on the libraries, the program and the page: what was found with the same is not looked for again.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

import once
import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "upstream.md"
FOLDER = ROOT / "docs" / "upstream"
FORKED = ROOT / "tests" / "support" / "forked.py"
SERVE_CPU = ROOT / ".venv-serve-cpu" / "bin" / "python"

# program -> the heading of its section, by the environment that has what it needs.
CALIBRATION = {
    "c2_transformers_mtp": "C2",
    "c13_transformers_fp32": "C13",
    "transformers_names": "Names",
    "llmcompressor_unreached_experts": "Unreached experts",
    "llmcompressor_torchvision": "Torchvision",
}
SERVING = {
    "c14_vllm_mtp_head": "C14",
    "n4_vllm_mtp_targets": "N4",
    "vllm_unfilled_weights": "Unfilled weights",
    "vllm_static_input_scheme": "Static input scheme",
    "vllm_stop_strings": "Stop strings",
    "vllm_cpu_expand": "Temperature",
}
# What they have imported when they start.
COMPRESSOR = ("llmcompressor.modeling.moe.linearize", "transformers.models.deepseek_v4.modeling_deepseek_v4")
VLLM = (
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors",
    "vllm.entrypoints.openai.completion.protocol",
)
Ended = Callable[[str], subprocess.CompletedProcess[str]]


def stated(heading: str) -> list[str]:
    """The lines of the first indented block below a heading of the page."""
    section = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    text = next(part for part in section if part.startswith(f"{heading}\n"))
    lines = text.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("    "))
    block = []
    for line in lines[first:]:
        if not line.startswith("    "):
            break
        block.append(line[4:])
    return block


def environment() -> dict[str, str]:
    """Without what v4forge has set: none of it belongs to these programs."""
    ours = ("PYTHONPATH", "COMPRESSED_TENSORS_LOG_DISABLED", "LLM_COMPRESSOR_LOG_DISABLED")
    return {key: value for key, value in os.environ.items() if key not in ours} | {"HF_HUB_OFFLINE": "1"}


def run(python: Path | str, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(python), str(FOLDER / f"{program}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=280)


def check(done: subprocess.CompletedProcess[str], heading: str) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.splitlines()
    block = stated(heading)
    # What loguru and Triton print before it is theirs; the last lines are the program's.
    assert said[-len(block) :] == block
    assert re.match(r"(transformers|llmcompressor|vllm) \d", said[-len(block) - 1])


def forked(python: Path | str, modules: Sequence[str], programs: Iterable[str], folder: Path) -> Ended:
    """What each program ended with: they have run in `folder`, forked from one that has `modules` imported."""
    paths = [FOLDER / f"{program}.py" for program in programs]
    command = [python, FORKED, ",".join(modules), folder, *paths]
    subprocess.run(command, env=environment(), timeout=280, check=True)

    def ended(program: str) -> subprocess.CompletedProcess[str]:
        code, out, err = ((folder / f"{program}{suffix}").read_text() for suffix in (".code", ".out", ".err"))
        return subprocess.CompletedProcess(program, int(code), out, err)

    return ended


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Ended]:
    """Runs the programs of CALIBRATION when the first is asked for."""
    return cache(lambda: forked(sys.executable, COMPRESSOR, CALIBRATION, tmp_path_factory.mktemp("calibration")))


@pytest.mark.parametrize("program", CALIBRATION)
def test_a_fault_of_the_calibration_libraries_is_as_the_page_says(
    program: str, calibration: Callable[[], Ended], pytestconfig: pytest.Config
) -> None:
    files = (ROOT / "docker/requirements-calib.txt", FOLDER / f"{program}.py", PAGE, FORKED, Path(__file__))
    determining = [sys.version.encode(), *(path.read_bytes() for path in files)]
    once.kept(
        pytestconfig.cache,
        f"upstream-{program}",
        determining,
        lambda _: check(calibration()(program), CALIBRATION[program]),
    )


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    return forked(SERVE_CPU, VLLM, SERVING, tmp_path_factory.mktemp("serving"))


@pytest.mark.serve
@pytest.mark.parametrize("program", SERVING)
def test_a_fault_of_vllm_is_as_the_page_says(program: str, serving: Ended) -> None:
    check(serving(program), SERVING[program])


@pytest.mark.soak
@pytest.mark.parametrize("program", CALIBRATION)
def test_a_program_for_calibration_imports_all_that_it_needs(program: str) -> None:
    check(run(sys.executable, program), CALIBRATION[program])


@pytest.mark.soak
@pytest.mark.serve
@pytest.mark.parametrize("program", SERVING)
def test_a_program_for_vllm_imports_all_that_it_needs(program: str) -> None:
    check(run(SERVE_CPU, program), SERVING[program])


@pytest.mark.parametrize(("asserted", "code"), [("next_n == 1 or next_n == 2", 0), ("next_n == 1 or next_n == 3", 1)])
def test_what_an_extension_asserts_is_read_from_it(asserted: str, code: int, tmp_path: Path) -> None:
    (tmp_path / "_C.so").write_bytes(b"\0ELF\0" + asserted.encode() + b"\0next_n == 1\0")
    done = run(sys.executable, "c15_deepgemm_next_n", str(tmp_path))
    assert done.stdout == f"asserted: {asserted}\n"
    assert done.returncode == code


def test_without_deepgemm_that_is_said(tmp_path: Path) -> None:
    done = run(sys.executable, "c15_deepgemm_next_n", str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "no DeepGEMM here that states which next_n it takes\n")


def test_every_program_is_on_the_page_and_stands_alone() -> None:
    page = PAGE.read_text(encoding="utf-8")
    programs = {path.stem for path in FOLDER.glob("*.py")}
    assert programs == {*CALIBRATION, *SERVING, "c15_deepgemm_next_n"}
    for program in programs:
        assert f"`{program}.py`" in page
        assert "v4forge" not in (FOLDER / f"{program}.py").read_text(encoding="utf-8")
