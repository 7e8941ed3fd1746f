"""What a program loads before it works: seconds of torch and transformers are for those that compute, once they do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from v4forge.checkout import ROOT

HEAVY = ("torch", "transformers", "compressed_tensors", "datasets", "matplotlib", "scipy", "playwright")
PROGRAMS = sorted(
    path.stem for path in (ROOT / "scripts").glob("*.py") if "__main__" in path.read_text(encoding="utf-8")
)
BENCHES = ("speed", "draft", "quality", "tools")
# Each line of stdin is a program with its words, run as by `python -m`; says how it ended and what of HEAVY is loaded.
RUN = f"""
import contextlib, io, runpy, sys
for line in sys.stdin.read().splitlines():
    sys.argv = line.split(chr(9))
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            runpy.run_module("scripts." + sys.argv[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    print(line, code, *[name for name in {HEAVY} if name in sys.modules], sep=chr(9))
"""
# Layers of each attention kind and the MTP block, made and run.
PROBE = """
import sys
import torch
from v4forge.checkpoint import vllm_schemes
from v4forge.checkpoint.reader import Checkpoint
from v4forge.model import deepseek_v4, mtp
from v4forge.quantization import gptq
print(len(sys.modules))
source = Checkpoint("models/tiny")
weights, config = deepseek_v4.Weights(source, torch.device("cpu")), deepseek_v4.hf_config(source.config)
root = deepseek_v4.load_root(weights, config)
tokens = torch.arange(256)[None]
context = deepseek_v4.Rotary(config, weights.device, weights.dtype).context(tokens)
streams = deepseek_v4.embed(root, config, tokens)
for number in source.config.layers:
    streams = deepseek_v4.run_layer(deepseek_v4.load_layer(weights, config, number), streams, context)
mtp.load_mtp(weights, config)(streams, root.embed[tokens], context)
print(*[name for name in sys.argv[1:] if name in sys.modules])
"""
WHOLE_MODELS = ("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "sympy", "scipy.optimize")


def run(*command_lines: tuple[str, ...]) -> list[list[str]]:
    """The programs one after the other, in one process -> of each its exit code and what is loaded by then."""
    lines = ["\t".join(words) for words in command_lines]
    done = subprocess.run([sys.executable, "-c", RUN], cwd=ROOT, input="\n".join(lines), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert [line.startswith(f"{words}\t") for line, words in zip(told, lines, strict=True)] == [True] * len(lines)
    return [line.removeprefix(f"{words}\t").split("\t") for line, words in zip(told, lines, strict=True)]


def test_help_and_a_wrong_argument_load_nothing_heavy() -> None:
    commands = [(name, "--help") for name in PROGRAMS] + [("bench", bench, "--help") for bench in BENCHES]
    assert len(PROGRAMS) > 20
    for command, found in zip(commands, run(*commands), strict=True):
        assert found == ["0"], command
    for command, found in zip(commands, run(*[(*words[:-1], "--no-such-option") for words in commands]), strict=True):
        assert found == ["2"], command


def test_what_computes_nothing_needs_no_torch(tmp_path: Path) -> None:
    commands = [
        ("plan", "--profile", "flash", "--gpus", "8"),
        ("inspect_checkpoint", "models/tiny"),
        ("status", "--work", str(tmp_path)),
        ("stage", "why", "verify", "--scratch", str(tmp_path)),
        ("stage", "run", "calibrate", "verify", "--dry-run", "--scratch", str(tmp_path)),
        ("publish", "--artifact", str(tmp_path), "--repo", "a/b"),
        ("replay", f"{tmp_path}/manifest.json"),
        ("card", "--work", str(tmp_path), "--artifact", str(tmp_path)),
        ("report", "--work", str(tmp_path)),
        ("compare", str(tmp_path), str(tmp_path)),
        ("doctor", "--work", str(tmp_path)),
    ]
    for command, (_, *loaded) in zip(commands, run(*commands), strict=True):
        assert not {"torch", "transformers", "compressed_tensors"} & set(loaded), command


def test_layers_come_and_run_without_what_only_whole_models_need() -> None:
    done = subprocess.run([sys.executable, "-c", PROBE, *WHOLE_MODELS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, *loaded = done.stdout.split()
    assert loaded == []
    assert int(count) < 2600  # 2,180; 3,390 when transformers is imported as usual


LAZY = """
import sys
import v4forge.model.deepseek_v4
from transformers import masking_utils, modeling_utils
from v4forge.lean_imports import _Name
marked = modeling_utils.PreTrainedModel.can_record_outputs.fget
names = [masking_utils.TransformGetItemToIndex, modeling_utils.flex_attention_forward]
assert all(type(name) is _Name for name in names)
assert "torch._dynamo" not in sys.modules

with masking_utils.TransformGetItemToIndex():  # a class, called
    pass
from torch._dynamo import trace_rules
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex as real
assert isinstance(real(), masking_utils.TransformGetItemToIndex)
class Own(masking_utils.TransformGetItemToIndex):
    pass
assert issubclass(Own, real)
assert trace_rules.is_callable_allowed(marked)  # what was marked before torch._dynamo was there
"""


def test_what_is_left_for_later_is_the_real_thing_then() -> None:
    done = subprocess.run([sys.executable, "-c", LAZY], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


WANTS_MORE = """
import sys
from v4forge import lean_imports
lean_imports.LAZY += ("scipy.optimize",)
with lean_imports.lean("wants_more"):
    import wants_more
assert wants_more.find_root.__module__ == "scipy.optimize.elementwise" or callable(wants_more.find_root)
assert not any(isinstance(module, lean_imports._StandIn) for module in sys.modules.values())
"""


def test_a_package_that_wants_more_than_names_is_imported_as_usual(tmp_path: Path) -> None:
    """As scikit-learn does, which transformers imports where it is installed, of scipy.optimize."""
    (tmp_path / "wants_more.py").write_text("from scipy.optimize.elementwise import find_root\n")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    done = subprocess.run([sys.executable, "-c", WANTS_MORE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
