"""Patches apply to exactly what they state, all of a series or none; the plugin's guard; the scripts of the image."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType

import pytest
import torch
from recorded import unrecorded
from torch import nn

from scripts import patch as program
from v4forge.errors import UserError
from v4forge.images import locks, patches

ROOT = Path(__file__).resolve().parents[2]
SERVE = ROOT / "docker" / "serve"
BEFORE = "".join(f"line {number}\n" for number in range(12))
AFTER = BEFORE.replace("line 6", "line six")


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def diff(before: str, after: str, path: str = "package/module.py") -> str:
    lines = difflib.unified_diff(before.splitlines(True), after.splitlines(True), f"a/{path}", f"b/{path}", n=0)
    return "".join(lines)


def write_patch(
    folder: Path, name: str, before: str, after: str, path: str = "package/module.py", body: str = ""
) -> None:
    """A patch in a project's folder, and its line in the series."""
    folder.mkdir(parents=True, exist_ok=True)
    text = (
        "purpose: to say six\n  in words\nupstream: https://example.org/1\ndrop-when: it is six upstream\ncheck: six\n"
    )
    text += f"applies-to: {path} sha256:{sha256(before)}\ngives: {path} sha256:{sha256(after)}\n"
    (folder / f"{name}.patch").write_text(text + (body or diff(before, after, path)))
    with open(folder / "series", "a") as series:
        series.write(f"{name}.patch\n")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "patches" / "project"
    write_patch(folder, "six", BEFORE, AFTER)
    return folder


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """An installed distribution of two modules."""
    site = tmp_path / "site"
    for name, text in {"module": BEFORE, "other": "x = 1\n"}.items():
        (site / "package").mkdir(parents=True, exist_ok=True)
        (site / "package" / f"{name}.py").write_text(text)
    (site / "project-1.dist-info").mkdir()
    rows = [[f"package/{name}.py", *patches._entry(site / f"package/{name}.py")] for name in ("module", "other")]
    text = "".join(",".join(row) + "\n" for row in [*rows, ["project-1.dist-info/RECORD", "", ""]])
    (site / "project-1.dist-info" / "RECORD").write_text(text)
    return site


def snapshot(tree: Path) -> dict[str, bytes]:
    return {str(path.relative_to(tree)): path.read_bytes() for path in tree.rglob("*") if path.is_file()}


def series(project: Path) -> list[patches.Patch]:
    return patches.series(project.name, project.parent)


def test_metadata_is_read(project: Path) -> None:
    (six,) = series(project)
    assert (six.name, six.purpose, six.check) == ("six", "to say six in words", "six")
    assert six.before == {"package/module.py": sha256(BEFORE)}


def test_a_patch_is_applied_and_recorded(project: Path, tree: Path) -> None:
    stale = tree / "package" / "__pycache__" / "module.cpython-311.pyc"
    stale.parent.mkdir()
    stale.touch()
    assert unrecorded(tree, "project") == []
    assert patches.apply(series(project), tree) == ["package/module.py"]
    assert (tree / "package/module.py").read_text() == AFTER
    assert unrecorded(tree, "project") == []
    assert not stale.exists()
    assert {path.name for path in (tree / "package").iterdir()} == {"module.py", "other.py", "__pycache__"}


def test_a_source_checkout_needs_no_record(project: Path, tree: Path) -> None:
    (tree / "project-1.dist-info" / "RECORD").unlink()
    patches.apply(series(project), tree)
    assert (tree / "package/module.py").read_text() == AFTER


def test_a_file_that_is_linked_elsewhere_stays_as_it_is_there(project: Path, tree: Path, tmp_path: Path) -> None:
    cached = tmp_path / "cached.py"
    cached.hardlink_to(tree / "package/module.py")
    patches.apply(series(project), tree)
    assert cached.read_text() == BEFORE


def test_patches_of_one_file_follow_each_other(project: Path, tree: Path) -> None:
    last = AFTER.replace("line 2", "line two")
    write_patch(project, "two", AFTER, last)
    patches.apply(series(project), tree)
    assert (tree / "package/module.py").read_text() == last


def refused(patch_list: list[patches.Patch], tree: Path, says: str) -> None:
    before = snapshot(tree)
    with pytest.raises(UserError, match=says):
        patches.apply(patch_list, tree)
    assert snapshot(tree) == before


def test_an_applied_patch_is_refused(project: Path, tree: Path) -> None:
    patches.apply(series(project), tree)
    refused(series(project), tree, r"six is already applied to package/module\.py \(hint: leave it out: --skip six\)")


def test_a_wrong_base_is_refused(project: Path, tree: Path) -> None:
    (tree / "package/module.py").write_text(BEFORE + "more\n")
    refused(series(project), tree, r"six applies to another package/module\.py: .*drop it when it is six upstream")


def test_a_missing_file_is_refused(project: Path, tree: Path) -> None:
    (tree / "package/module.py").unlink()
    refused(series(project), tree, r"six changes package/module\.py, which .* does not have")


def test_when_a_later_patch_fails_the_earlier_ones_leave_nothing(project: Path, tree: Path) -> None:
    write_patch(project, "wrong", "other base\n", "y\n", "package/other.py")
    refused(series(project), tree, "wrong applies to another package/other.py")


@pytest.mark.parametrize(
    "body",
    [
        diff(BEFORE, AFTER).replace("@@ -7 +7 @@", "@@ -9 +9 @@"),  # an offset
        "--- a/package/module.py\n+++ b/package/module.py\n@@ -5,5 +5,5 @@\n line 4\n line five\n-line 6\n+line six\n"
        " line 7\n line 8\n",  # fuzz: one line of context is another
        diff(BEFORE, AFTER).replace("line six", "line 66"),  # not what the metadata states
    ],
)
def test_a_patch_that_would_need_a_guess_is_refused(tmp_path: Path, tree: Path, body: str) -> None:
    folder = tmp_path / "guess" / "project"
    write_patch(folder, "six", BEFORE, AFTER, body=body)
    refused(series(folder), tree, "six (does not apply as it is|makes of package/module.py)")


@pytest.mark.parametrize("field", [*patches.FIELDS, "applies-to", "gives"])
def test_a_patch_without_a_field_is_refused(project: Path, field: str) -> None:
    file = project / "six.patch"
    file.write_text(re.sub(rf"^{field}: .*\n(  .*\n)*", "", file.read_text(), flags=re.M))
    with pytest.raises(UserError, match=r"six\.patch does not state"):
        series(project)


def test_a_patch_of_a_file_outside_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "outside" / "project"
    write_patch(folder, "six", BEFORE, AFTER, "../../etc/module.py")
    with pytest.raises(UserError, match="outside of the project"):
        series(folder)


def test_a_patch_in_no_series_and_a_series_without_its_patch_are_refused(project: Path) -> None:
    (project / "series").write_text("")
    with pytest.raises(UserError, match=r"disagree about six\.patch"):
        series(project)
    (project / "series").write_text("six.patch\nseven.patch\n")
    with pytest.raises(UserError, match=r"disagree about seven\.patch"):
        series(project)


def test_a_project_without_patches_is_named_with_those_that_have_some(project: Path) -> None:
    with pytest.raises(UserError, match=r"nothing/series \(hint: projects with patches: project"):
        patches.series("nothing", project.parent)


def test_the_committed_patches_carry_few_lines_of_the_project() -> None:
    for patch in patches.series("vllm"):
        _, _, body = patch.file.read_text().partition("\n--- ")
        context = [line for line in body.splitlines() if line.startswith(" ")]
        removed = [line for line in body.splitlines() if line.startswith("-")]
        assert len(context) == 0 and len(removed) <= 10, patch.name


def test_every_committed_patch_has_its_check() -> None:
    text = (ROOT / "patches" / "vllm" / "check.py").read_text()
    for patch in patches.series("vllm"):
        assert f"\ndef {patch.check}() -> None:\n" in text, patch.name


def test_skip_leaves_patches_out_and_knows_their_names() -> None:
    names = [patch.name for patch in patches.series("vllm")]
    assert program.chosen("vllm", [""]) == patches.series("vllm")
    assert program.chosen("vllm", [" ".join(names)]) == []
    with pytest.raises(UserError, match="vllm has no patch nothing"):
        program.chosen("vllm", ["nothing"])


def test_the_program_lists_what_a_patch_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    program.main(["list", "vllm"])
    said = capsys.readouterr().out
    assert all(patch.upstream in said and patch.drop_when in said for patch in patches.series("vllm"))


def test_check_says_when_there_is_no_such_interpreter() -> None:
    with pytest.raises(UserError, match="cannot run /nowhere/python"):
        program.main(["check", "vllm", "--python", "/nowhere/python"])


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "patches" / "vllm" / "plugin"))
    yield importlib.import_module("v4forge_vllm.guard")
    for name in [name for name in sys.modules if name.startswith("v4forge_vllm")]:
        del sys.modules[name]


class Draft(nn.Module):
    """A model with a shared head; loads the parameters that it is given tensors for."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(2, bias=False), nn.Linear(2, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(x))

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> set[str]:
        return {name for name, _ in weights if name in dict(self.named_parameters())}


def tensors(*names: str) -> list[tuple[str, torch.Tensor]]:
    return [(name, torch.zeros(1)) for name in names]


def test_a_whole_load_passes_the_guard(guard: ModuleType) -> None:
    model = Draft()
    watch = guard.Guard("the draft", "layers.", 0)
    assert watch.load(model, model.load_weights, tensors("norm.weight", "head.weight")) == {
        "norm.weight",
        "head.weight",
    }
    model(torch.zeros(1, 2))


def test_a_parameter_that_nothing_fills_stops_the_load(guard: ModuleType) -> None:
    model = Draft()
    watch = guard.Guard("the draft", "layers.", 0, shared=("head",))
    with pytest.raises(guard.UninitializedWeightsError, match=r"the draft would be served .*: norm"):
        watch.load(model, model.load_weights, tensors("head.weight"))


def test_an_empty_head_stops_the_first_forward_unless_it_was_replaced(guard: ModuleType) -> None:
    for replaced in (False, True):
        model = Draft()
        watch = guard.Guard("the draft", "layers.", 0, shared=("head",))
        watch.load(model, model.load_weights, tensors("norm.weight"))
        if replaced:
            model.head = nn.Linear(2, 3, bias=False)
            model(torch.zeros(1, 2))
            assert not model._forward_pre_hooks
        else:
            with pytest.raises(guard.UninitializedWeightsError, match="head"):
                model(torch.zeros(1, 2))


def test_later_loads_may_fill_a_part(guard: ModuleType) -> None:
    model = Draft()
    watch = guard.Guard("the draft", "layers.", 0)
    watch.load(model, model.load_weights, tensors("norm.weight", "head.weight"))
    assert watch.load(model, model.load_weights, tensors("norm.weight")) == {"norm.weight"}


WHOLE = {
    *(f"layers.0.ffn.experts.{e}.{m}.{s}" for e in range(3) for m in ("w1", "w2", "w3") for s in ("weight", "scale")),
    *("layers.0.attn.wq_a.weight", "layers.0.attn.wkv.weight", "layers.0.attn.wq_b.weight"),
    *("layers.0.attn.compressor.wkv.weight", "layers.0.attn.compressor.wgate.weight"),
    *("layers.0.ffn.shared_experts.w1.weight", "layers.0.ffn.shared_experts.w2.weight"),
    "layers.0.ffn.shared_experts.w3.weight",
}
# Parameters of one tensor each: the load itself says that they are missing.
ALONE = {"layers.0.attn.wq_b.weight", "layers.0.ffn.shared_experts.w2.weight"}


def test_nothing_is_torn_in_a_whole_checkpoint(guard: ModuleType) -> None:
    assert list(guard.torn(WHOLE, 3)) == []
    assert list(guard.torn(WHOLE, 0)) == []


@pytest.mark.parametrize("missing", sorted(WHOLE - ALONE))
def test_every_tensor_of_a_fused_parameter_is_missed(guard: ModuleType, missing: str) -> None:
    assert set(guard.torn(WHOLE - {missing}, 3)) == {missing}


def test_a_missing_expert_is_missed_unless_ranks_read_their_own(guard: ModuleType) -> None:
    without = {name for name in WHOLE if ".experts.2." not in name}
    assert len(set(guard.torn(without, 3))) == 6
    assert list(guard.torn(without, 0)) == []


def environment_script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SERVE))
    return importlib.import_module("environment")


def test_only_a_stated_override_may_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    misfits = environment_script(monkeypatch).misfits
    known = "vllm 1 has requirement certifi>=3, but you have certifi 2."
    other = "vllm 1 has requirement certifi-more>=3, but you have certifi-more 2."
    assert misfits([known, other], ["certifi"]) == [other]
    assert misfits([known], []) == [known]


def test_a_host_without_containers_gets_what_the_image_has_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = environment_script(monkeypatch)
    asked: list[str] = []

    def install_lock(into: Path, lock: object) -> None:
        asked.append("lock")
        (into / "lib/python3.11/site-packages").mkdir(parents=True)

    def pip(into: Path, *arguments: str | Path) -> None:
        assert (into / "lib").is_dir()
        asked.append("release" if "--require-hashes" in arguments else Path(arguments[-1]).name)

    def apply(series: Sequence[object], tree: Path) -> list[str]:
        asked.append(f"{len(series)} patches of {tree.name}")
        return []

    monkeypatch.setattr(script, "install_lock", install_lock)
    monkeypatch.setattr(script, "pip", pip)
    monkeypatch.setattr(script, "check_fits", lambda into: asked.append("fits"))
    monkeypatch.setattr(patches, "apply", apply)
    lock = locks.parse((ROOT / locks.lock_file("serve")).read_text(encoding="utf-8"))
    for _ in range(2):
        script.build_for_host(tmp_path / ".venv-serve", lock)
    number = len(patches.series("vllm"))
    assert asked == ["lock", "release", f"{number} patches of site-packages", "plugin", "fits"]
    (tmp_path / ".venv-serve/lock.sha256").write_text("of another release")
    (tmp_path / ".venv-serve/left").touch()
    script.build_for_host(tmp_path / ".venv-serve", lock)
    assert len(asked) == 10 and not (tmp_path / ".venv-serve/left").exists()


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "protocol.file.allow=always")
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A repository with two commits on its branch and two proposed ones: good, and one that does not apply."""
    folder = tmp_path / "upstream"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main")
    git(folder, "config", "uploadpack.allowAnySHA1InWant", "true")
    git(folder, "config", "uploadpack.allowFilter", "true")
    commits: dict[str, str] = {}
    for name, parent, file, text in (
        ("first", "", "file", "1\n"),
        ("second", "", "file", "2\n"),
        ("good", "first", "new", "n\n"),
        ("clash", "first", "file", "3\n"),
    ):
        if parent:
            git(folder, "checkout", "-q", "-b", name, commits[parent])
        (folder / file).write_text(text)
        git(folder, "add", ".")
        git(folder, "commit", "-q", "-m", name)
        commits[name] = git(folder, "rev-parse", "HEAD")
    git(folder, "checkout", "-q", "main")
    return folder, commits


def fetch(repository: Path, commit: str, out: Path, *picks: str) -> subprocess.CompletedProcess[str]:
    command: list[str | Path] = [SERVE / "fetch-source", f"file://{repository}", commit, out, *picks]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("digits", [40, 9])
def test_source_is_fetched_at_its_commit_with_the_picks_on_top(
    repository: tuple[Path, dict[str, str]], tmp_path: Path, digits: int
) -> None:
    upstream, commits = repository
    found = []
    for name in ("a", "b"):
        done = fetch(upstream, commits["first"][:digits], tmp_path / name, commits["good"])
        assert done.returncode == 0, done.stderr
        assert (tmp_path / name / "file").read_text() == "1\n"
        assert (tmp_path / name / "new").read_text() == "n\n"
        found.append(git(tmp_path / name, "rev-parse", "HEAD"))
    assert found[0] == found[1]


def test_an_unknown_commit_and_a_pick_that_clashes_are_said(
    repository: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    upstream, commits = repository
    done = fetch(upstream, "0123456", tmp_path / "unknown")
    assert done.returncode == 1 and "has no commit 0123456" in done.stderr and "hint: " in done.stderr
    done = fetch(upstream, commits["second"], tmp_path / "clash", commits["clash"])
    assert done.returncode == 1 and "does not apply on" in done.stderr and "VLLM_CHERRY_PICKS" in done.stderr


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1), (None, 1)])
def test_health_is_what_the_server_says(status: int | None, code: int) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status or 0 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        if status:
            threading.Thread(target=server.handle_request, daemon=True).start()
        else:
            server.socket.close()
        environment = {"PORT": str(server.server_port), "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
        assert subprocess.run([SERVE / "health"], env=environment, capture_output=True).returncode == code
