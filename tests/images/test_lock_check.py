"""Nothing in the checkout disagrees with versions.env, and each way to disagree is found with file and line."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from v4forge import checkout
from v4forge.errors import UserError
from v4forge.images import lock_check, locks

COMMIT = "0123456789abcdef" * 2 + "01234567"
DIGEST = "0123456789abcdef" * 4
REFERENCE = f"registry.example:5000/forge/calib@sha256:{DIGEST}"
CPU_HASH = "ab" * 32

VERSIONS = f"""# pins
TORCH_VERSION=7.1.3
TORCH_CPU_SHA256_CP311_X86_64={CPU_HASH}
SERVE_TORCH_VERSION=97.2.0
LM_EVAL_VERSION=0.44
DOCKER_VERSION=9.8.7
BASE_IMAGE=nvidia/cuda:99.0.2-devel@sha256:{DIGEST[::-1]}
SOURCE_COMMIT={COMMIT[::-1]}
"""
IMAGES_LOCK = "".join(
    f"{image}_IMAGE=\n{image}_IMAGE_ID=\n{image}_PROVENANCE_SHA256=\n" for image in ("CALIB", "SERVE")
)


def locked(*requirements: str, extra: str = "") -> str:
    hashes = [f"--hash=sha256:{DIGEST}", *([f"--hash=sha256:{extra}"] if extra else [])]
    return locks.dump({requirement: hashes for requirement in requirements}, "x.in")


GOOD = {
    "versions.env": VERSIONS,
    "images.lock": IMAGES_LOCK,
    "docker/requirements-calib.in": "# names\ntorch\n",
    "docker/requirements-host.in": "docker # to run images\n",
    "docker/requirements-dev.in": "",
    "docker/requirements-docs.in": "",
    "docker/requirements-docs.txt": "",
    "docker/requirements-serve.in": "torch\nlm-eval[api]\n",
    "docker/requirements-serve-build.in": "",
    "docker/requirements-serve-build.txt": "",
    "docker/requirements-serve-cpu.in": "torch\n",
    "docker/requirements-serve-cpu.txt": locked("torch==7.1.3", extra=CPU_HASH),
    "docker/requirements-calib.txt": locked("torch==7.1.3", extra=CPU_HASH),
    "docker/requirements-cuda.txt": locked("nvidia-cublas==13.1"),
    "docker/requirements-host.txt": locked("docker==9.8.7"),
    "docker/requirements-dev.txt": locked("pytest==1"),
    "docker/requirements-serve.txt": locked(
        "torch==97.2.0",
        "lm-eval==0.44",
        "setuptools==80 ; python_full_version < '3.12'",
        "setuptools==81 ; python_full_version >= '3.12'",
    ),
    "Dockerfile.calib": "ARG BASE_IMAGE\nFROM ${BASE_IMAGE} AS system\nARG LANE=cpu\n"
    "RUN --mount=type=bind,from=system,target=/x true\nFROM system\nCOPY --from=system /a /b\n",
    "compose.yaml": "services:\n  serve:\n    image: ${SERVE_IMAGE:?make pull}\n  x:\n    image: '${A:-${B}}'  # why\n",
    ".github/workflows/ci.yml": f"      - uses: actions/checkout@{COMMIT} # v7.0.1\n      - uses: ./local\n",
    "README.md": "With torch 7.1 here, torch 97.2 there. As measured with\ntorch\n6.5 <!-- history -->. Docker 20.10. "
    "pytorch 3.1, torch 8 GB\n",
}


def facts(changes: dict[str, str | None]) -> list[str]:
    """The facts about GOOD with other texts for some files; None removes one."""
    files = {name: text for name, text in (GOOD | changes).items() if text is not None}
    return lock_check.problems(lock_check.Project(files))


def test_the_checkout_agrees_with_its_pins() -> None:
    try:
        project = lock_check.read()
    except UserError as error:
        pytest.skip(str(error))
    assert lock_check.problems(project) == []


def test_a_project_that_agrees_has_no_facts() -> None:
    assert facts({}) == []


BAD: tuple[tuple[str, str | None, str], ...] = (
    # pins_in_locks
    (
        "docker/requirements-calib.in",
        "# names\ntorch==7.1.4\n",
        "requirements-calib.in:2: 'torch==7.1.4' is not a pack",
    ),
    ("docker/requirements-dev.in", "\nnowhere\n", "requirements-dev.in:2: versions.env has no NOWHERE_VERSION"),
    ("docker/requirements-calib.txt", locked("torch==7.1.2", extra=CPU_HASH), "requirements-calib.in:2: docker/req"),
    ("docker/requirements-serve.txt", locked("torch==7.1.3", "lm-eval==0.44"), "has no torch==97.2.0, which SERVE_T"),
    ("docker/requirements-host.in", None, "docker/requirements-host.in:1: is missing"),
    # locks_are_whole
    ("docker/requirements-cuda.txt", None, "docker/requirements-cuda.txt:1: is missing"),
    ("docker/requirements-dev.txt", "# c\npytest==1\n", "requirements-dev.txt:2: pytest is locked without a hash"),
    ("docker/requirements-dev.txt", "pytest==1 \\\n    --hash=md5:1\n", "pytest is locked without a hash"),
    ("docker/requirements-dev.txt", locked("pytest"), "requirements-dev.txt:2: 'pytest' is not name==version"),
    ("docker/requirements-dev.txt", locked("torch==7.1.3", extra=CPU_HASH), "dev.txt:2: torch is locked twice"),
    ("docker/requirements-dev.txt", locked("pytest==1", "pytest==2"), "dev.txt:4: pytest is locked twice"),
    ("docker/requirements-dev.txt", "--find-links /opt/x\n" + locked("pytest==1"), "dev.txt:1: '--find-links' ties"),
    ("docker/requirements-calib.txt", locked("torch==7.1.3"), "calib.txt:2: torch lacks 1 hashes of TORCH_CPU_SHA256"),
    ("docker/requirements-serve-cpu.txt", locked("torch==7.1.3"), "serve-cpu.txt:2: torch lacks 1 hashes of TORCH_CPU"),
    ("docker/requirements-cuda.txt", locked("numpy==1"), "cuda.txt:2: numpy belongs into the other of calib and cuda"),
    # pins_elsewhere
    ("tests/test_x.py", "a\nb = '7.1.3'\n", "tests/test_x.py:2: 7.1.3 is TORCH_VERSION of versions.env"),
    ("anything", f"x{COMMIT[::-1]}, {COMMIT[::-1]}", f"anything:1: {COMMIT[::-1]} is SOURCE_COMMIT of versions.env"),
    ("pyproject.toml", f"{DIGEST[::-1]}", "pyproject.toml:1:"),
    # literals
    (
        "Dockerfile.serve",
        "RUN \\\n  pip install 'vllm[bench]==0.33'\n",
        "Dockerfile.serve:2: vllm[bench]==0.33 is a ver",
    ),
    ("docs/a.md", f"\n\ncommit {COMMIT}.", "docs/a.md:3: 0123456789abcdef0123456789abcdef01234567 is a commit"),
    ("scripts/x.py", f"IMAGE = 'x@sha256:{DIGEST}'\n", "scripts/x.py:1: sha256:0123456789abcdef"),
    ("docker/steps/x", "pip install uv==1\n", "docker/steps/x:1: uv==1 is a version"),
    # dockerfile_arguments
    ("Dockerfile.serve", "ARG A \\\n  LM_EVAL_VERSION=0.44\n", "Dockerfile.serve:1: ARG LM_EVAL_VERSION has a default"),
    ("Dockerfile.serve", "\nARG LM_EVA_VERSION\n", "Dockerfile.serve:2: ARG LM_EVA_VERSION is no key"),
    # dockerfile_images
    ("Dockerfile.serve", "FROM nvidia/cuda:1 AS x\n", "Dockerfile.serve:1: image nvidia/cuda:1 is written out"),
    ("Dockerfile.serve", "FROM scratch\nCOPY --from=uv:1 /uv /\n", "Dockerfile.serve:2: image uv:1 is written out"),
    ("Dockerfile.serve", "FROM cuda-${LANE} AS x\n", "Dockerfile.serve:1: image cuda-${LANE} is written out"),
    ("Dockerfile.serve", "# syntax=docker/dockerfile:1\n", "Dockerfile.serve:1: a syntax line"),
    ("Dockerfile.serve", "FROM ${BASE:-debian}\n", "Dockerfile.serve:1: image ${BASE:-debian} is written out"),
    # compose_images
    ("compose.yaml", "services:\n  a:\n    image: prom/prometheus:v3\n", "compose.yaml:3: image prom/prometheus:v3 is"),
    ("compose.yaml", "  image: ${A:-vllm:1}\n", "compose.yaml:1: image ${A:-vllm:1} is written out"),
    # images_lock
    ("images.lock", None, "images.lock:1: is missing"),
    ("images.lock", IMAGES_LOCK.replace("SERVE_IMAGE_ID=\n", ""), "images.lock:1: has no SERVE_IMAGE_ID"),
    ("images.lock", IMAGES_LOCK + "B=\n", "images.lock:7: B is unknown"),
    ("images.lock", IMAGES_LOCK.replace("CALIB_IMAGE=", "CALIB_IMAGE=a/b:latest"), "images.lock:1: CALIB_IMAGE is not"),
    (
        "images.lock",
        IMAGES_LOCK.replace("CALIB_IMAGE=", f"CALIB_IMAGE={REFERENCE}"),
        "images.lock:2: CALIB_IMAGE_ID is em",
    ),
    # versions_in_prose
    ("README.md", "\nwith torch 6.5 it", "README.md:2: torch 6.5, but versions.env has 7.1.3 and 97.2.0"),
    ("docs/a.md", "`torch`\n6.5", "docs/a.md:1: torch 6.5, but"),
    ("README.md", "docker-py 2.1", "README.md:1: docker-py 2.1, but versions.env has 9.8.7"),
    ("docs/a.md", "LM Eval version 0.4", "docs/a.md:1: lm-eval 0.4, but"),
    ("docs/a.md", "torch>=7.11", "docs/a.md:1: torch 7.11, but"),
    # workflow_actions
    (".github/workflows/x.yml", "\n- uses: actions/checkout@v7\n", ".github/workflows/x.yml:2: actions/checkout@v7 is"),
    (".github/workflows/x.yml", f"- uses: actions/checkout@{COMMIT}\n", ".github/workflows/x.yml:1:"),
)


@pytest.mark.parametrize(("name", "text", "fact"), BAD, ids=[f"{name}: {fact[-40:]}" for name, _, fact in BAD])
def test_a_disagreement_is_found_with_its_file_and_line(name: str, text: str | None, fact: str) -> None:
    assert any(fact in found for found in facts({name: text})), facts({name: text})


def test_every_check_is_shown_to_find_something() -> None:
    found = {
        check.__name__
        for check in lock_check.CHECKS
        for name, text, _ in BAD
        if list(check(lock_check.Project({k: v for k, v in (GOOD | {name: text}).items() if v is not None})))
    }
    assert found == {check.__name__ for check in lock_check.CHECKS}


def test_an_image_that_was_pushed_agrees() -> None:
    pushed = IMAGES_LOCK.replace("CALIB_IMAGE=", f"CALIB_IMAGE={REFERENCE}")
    pushed = pushed.replace("CALIB_IMAGE_ID=", f"CALIB_IMAGE_ID=sha256:{DIGEST}")
    pushed = pushed.replace("CALIB_PROVENANCE_SHA256=", f"CALIB_PROVENANCE_SHA256={DIGEST}")
    assert facts({"images.lock": pushed}) == []


def test_what_git_ignores_is_not_read(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    for name, text in {".gitignore": "built\n", "kept": "", "built": "", "gone": ""}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "link").symlink_to("kept")
    git("add", ".")
    (tmp_path / "gone").unlink()
    (tmp_path / "new").write_text("")
    assert checkout.names(tmp_path) == [".gitignore", "kept", "new"]


def test_a_folder_without_git_is_a_fact_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a git checkout"):
        checkout.names(tmp_path)
