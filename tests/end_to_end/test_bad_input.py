"""What a program says to bad input: one line `error:` with the tensor or file, one line `hint:`; nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import (
    calibrate_arguments,
    contents,
    run_here,
    write_corpus,
    write_source,
)
from safetensors.torch import load_file
from synthetic import Tensors, edit

from v4forge.checkpoint import layout
from v4forge.checkpoint.reader import INDEX, Checkpoint
from v4forge.checkpoint.writer import write_shard
from v4forge.errors import UserError

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1234\n"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@dataclass(frozen=True)
class Ready:
    """A good source, its corpus, its calibration and its artifact."""

    base: Path

    @property
    def source(self) -> Path:
        return self.base / "source"

    @property
    def corpus(self) -> Path:
        return self.base / "corpus.txt"

    @property
    def work(self) -> Path:
        return self.base / "layers"

    @property
    def artifact(self) -> Path:
        return self.base / "artifact"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Ready:
    made = Ready(tmp_path_factory.mktemp("ready"))
    write_source(made.source)
    write_corpus(made.corpus)
    assert run_here("calibrate", *calibrate_arguments(made.source, made.work, made.corpus, samples=4)) == 0
    out = ("--out", made.artifact)
    assert run_here("postprocess", "--source", made.source, "--work", made.work, *out) == 0
    return made


@pytest.fixture
def ready(pristine: Ready, tmp_path: Path) -> Ready:
    """A copy of it, to be damaged."""
    return Ready(Path(shutil.copytree(pristine.base, tmp_path / "ready")))


def removed(prefix: str) -> Callable[[Path], None]:
    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.startswith(prefix)]:
            del tensors[name]

    return lambda source: edit(source, change)


def added(name: str) -> Callable[[Path], None]:
    return lambda source: edit(
        source, lambda tensors: tensors.update({name: torch.zeros(2)} if "embed.weight" in tensors else {})
    )


def poisoned(name: str, value: float, dtype: torch.dtype | None = None) -> Callable[[Path], None]:
    """The last element of a tensor becomes `value`, as raw bytes if a dtype is given."""

    def change(tensors: Tensors) -> None:
        if name in tensors:
            flat = tensors[name].view(-1)
            (flat.view(dtype) if dtype else flat)[-1] = value

    return lambda source: edit(source, change)


def truncated(shard: str) -> Callable[[Path], None]:
    return lambda source: (source / shard).write_bytes((source / shard).read_bytes()[:-1])  # type: ignore[func-returns-value]


def without(file: str) -> Callable[[Path], None]:
    return lambda source: (source / file).unlink()


def containing(file: str, text: str) -> Callable[[Path], None]:
    return lambda source: (source / file).write_text(text)  # type: ignore[func-returns-value]


def configured(**changes: Any) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        path = source / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def refusal(capsys: pytest.CaptureFixture[str], stage: str, *arguments: object) -> str:
    """Runs the program, which has to refuse -> the fact, without `error: `."""
    capsys.readouterr()
    assert run_here(stage, *arguments) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2, lines
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("hint: ")
    assert len(lines[1]) > len("hint: ")
    return lines[0].removeprefix("error: ")


# (what is wrong, how it gets so, what the error names); {source} stands for the folder
SOURCES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing scale": (removed("layers.1.attn.wq_a.scale"), "no tensor layers.1.attn.wq_a.scale in {source}"),
    "truncated shard": (truncated(SHARDS[1]), "shard {source}/" + SHARDS[1] + " is truncated"),
    "missing shard": (without(SHARDS[0]), "shard {source}/" + SHARDS[0] + " is missing"),
    "NaN": (poisoned("layers.0.ffn.gate.weight", float("nan")), "layers.0.ffn.gate.weight holds NaN or Inf"),
    "Inf": (poisoned("layers.0.attn_norm.weight", float("inf")), "layers.0.attn_norm.weight holds NaN or Inf"),
    "NaN in FP8": (poisoned("layers.0.attn.wkv.weight", 0x7F, torch.uint8), "layers.0.attn.wkv.weight: the E4M3"),
    "E8M0 NaN": (
        poisoned("layers.0.ffn.experts.1.w2.scale", 255, torch.uint8),
        "layers.0.ffn.experts.1.w2.weight: E8M0 scale byte 255 (NaN)",
    ),
    "E8M0 too small": (
        poisoned("layers.0.attn.wq_b.scale", 1, torch.uint8),
        "layers.0.attn.wq_b.weight: E8M0 scale byte 1",
    ),
    "expert number too large": (
        poisoned("layers.0.ffn.gate.tid2eid", 4),
        "layers.0.ffn.gate.tid2eid routes to expert 4, there are 0 to 3",
    ),
    "expert number negative": (
        poisoned("layers.0.ffn.gate.tid2eid", -1),
        "layers.0.ffn.gate.tid2eid routes to expert -1, there are 0 to 3",
    ),
    "unknown tensor": (added("layers.0.attn.extra.weight"), "holds layers.0.attn.extra.weight, which DeepSeek-V4"),
    "missing MTP": (removed("mtp."), "the MTP block is missing: no tensor mtp.0."),
    "V4.1": (
        configured(model_type="deepseek_v41", architectures=["DeepseekV41ForCausalLM"]),
        "{source}/config.json: model_type 'deepseek_v41'",
    ),
    "-0731": (
        configured(compress_ratios=[0, 4, 128, 0, 0, 0], num_nextn_predict_layers=1),
        "{source}/config.json: compress_ratios has 6 entries for 3 layers",
    ),
    "Base": (configured(expert_dtype="fp8"), "{source}/config.json: expert_dtype is 'fp8', that is the Base release"),
    "no limit": (configured(swiglu_limit=None), "{source}/config.json: swiglu_limit is None"),
    "another score": (configured(scoring_func="softmax"), "{source}/config.json: scoring_func is 'softmax'"),
    "another rope": (
        configured(rope_scaling={"type": "linear", "factor": 2}),
        "{source}/config.json: no 'rope_scaling.original_max_position_embeddings'",
    ),
    "layer types": (configured(layer_types=["full_attention"]), "{source}/config.json: 'layer_types' is a setting of"),
    "numbers as text": (configured(rms_norm_eps="1e-6"), "{source}/config.json: rms_norm_eps is '1e-6'"),
    "tied": (configured(tie_word_embeddings=True), "{source}/config.json: tie_word_embeddings is True"),
    "two shared experts": (configured(n_shared_experts=2), "{source}/config.json: n_shared_experts is 2"),
    "another activation": (configured(hidden_act="gelu"), "{source}/config.json: hidden_act is 'gelu'"),
    "biases": (configured(attention_bias=True), "{source}/config.json: attention_bias is True"),
    "eight heads of keys": (configured(num_key_value_heads=8), "{source}/config.json: num_key_value_heads is 8"),
    "a pointer as a shard": (containing(SHARDS[0], POINTER), "{source}/" + SHARDS[0] + " is a git-LFS pointer"),
    "a pointer as the tokenizer": (
        containing("tokenizer.json", POINTER),
        "{source}/tokenizer.json is a git-LFS pointer",
    ),
    "a pointer as the index": (containing(INDEX, POINTER), "{source}/" + INDEX + " is a git-LFS pointer"),
    "a pointer as the config": (containing("config.json", POINTER), "{source}/config.json is a git-LFS pointer"),
    "3 MTP blocks": (configured(num_nextn_predict_layers=3), "{source}/config.json: num_nextn_predict_layers is 3"),
    "odd hidden size": (configured(hidden_size=200), "{source}/config.json: hidden_size 200 is not divisible by 128"),
    "config of another checkpoint": (configured(q_lora_rank=128), "layers.0.attn.q_norm.weight is BF16 [160]"),
    "no config": (without("config.json"), "{source}/config.json does not exist"),
    "config is a list": (containing("config.json", "[]"), "{source}/config.json: not an object"),
    "no index": (without(INDEX), "{source}/" + INDEX + " does not exist"),
    "index is a list": (
        containing(INDEX, '{"weight_map": ["a"]}'),
        "{source}/" + INDEX + " is not a safetensors index",
    ),
    "no tokenizer": (without("tokenizer.json"), "{source}/tokenizer.json is missing"),
    "no folder": (shutil.rmtree, "{source}/" + INDEX + " does not exist"),
}


@pytest.mark.parametrize("stage", ["calibrate", "dequant"])
@pytest.mark.parametrize("what", SOURCES)
def test_a_bad_source_is_refused_by_name(
    ready: Ready, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str, stage: str
) -> None:
    damage, fact = SOURCES[what]
    damage(ready.source)
    out = tmp_path / "out"
    arguments = (
        calibrate_arguments(ready.source, out, ready.corpus, samples=4)
        if stage == "calibrate"
        else ["--source", ready.source, "--out", out]
    )
    assert fact.format(source=ready.source) in refusal(capsys, stage, *arguments)
    # calibrate has claimed the folder by then, where the fault lies in a layer's values
    assert contents(out).keys() <= {"fingerprint.json"}


@pytest.mark.parametrize("stage", ["calibrate", "dequant", "postprocess", "verify"])
def test_a_source_that_is_a_file_is_refused(
    ready: Ready, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    outputs: dict[str, tuple[object, ...]] = {
        "calibrate": ("--work", tmp_path / "out", "--corpus", ready.corpus),
        "dequant": ("--out", tmp_path / "out"),
        "postprocess": ("--work", ready.work, "--out", tmp_path / "out"),
        "verify": ("--artifact", ready.artifact),
    }
    assert f"{file}/{INDEX} does not exist" in refusal(capsys, stage, "--source", file, *outputs[stage])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", ["calibrate", "dequant", "postprocess"])
def test_an_output_that_cannot_be_a_folder_is_refused(
    ready: Ready, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    arguments: dict[str, list[Any]] = {
        "calibrate": calibrate_arguments(ready.source, file, ready.corpus, samples=4),
        "dequant": ["--source", ready.source, "--out", file],
        "postprocess": ["--source", ready.source, "--work", ready.work, "--out", file],
    }
    assert f"cannot make the folder {file}" in refusal(capsys, stage, *arguments[stage])
    assert file.read_text() == "mine"


CORPORA: dict[str, tuple[str | None, str]] = {
    "missing.txt": (None, "the corpus {corpus} does not exist"),
    "empty.txt": ("\n", "{corpus} holds no document"),
    "small.txt": ("a few words", "holds 5 tokens, and 4 samples of 64 need 256"),
    "broken.jsonl": ('{"text": "fine"}\n{"text": \n', "{corpus}:2: not JSON"),
    "foreign.jsonl": ('{"prompt": "x"}\n', "{corpus}:1: neither a text nor messages"),
    "half.jsonl": ('{"text": "fine"}\n{"text": "\\ud83d"}\n', "{corpus}:2: half of a UTF-16 pair"),
    "digits.jsonl": ('{"text": ' + "9" * 5000 + "}", "{corpus}:1: not JSON"),
    "call.jsonl": (
        '{"messages": [{"role": "user", "content": "x"}, {"role": "tool", "tool_call_id": [1]}]}',
        "{corpus}:1: message 1: tool_call_id is not a string",
    ),
    "pointer.txt": (POINTER, "{corpus} is a git-LFS pointer"),
    "broken.txt.gz": ("no gzip", "{corpus} is not gzip"),
    "book.pdf": ("text", "the corpus {corpus} is neither .jsonl nor .txt"),
}


@pytest.mark.parametrize("name", CORPORA)
def test_a_bad_corpus_is_refused_by_name(
    pristine: Ready, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    text, fact = CORPORA[name]
    corpus, out = tmp_path / name, tmp_path / "out"
    if text is not None:
        corpus.write_text(text)
    arguments = calibrate_arguments(pristine.source, out, corpus, samples=4)
    said = refusal(capsys, "calibrate", *arguments)
    assert fact.format(corpus=corpus).split(" tokens")[-1] in said
    assert not out.exists()


def test_a_work_folder_of_another_run_is_refused_and_says_what_differs(
    ready: Ready, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(ready.work)
    arguments = calibrate_arguments(ready.source, ready.work, ready.corpus, samples=4)
    for changed, names in (
        (["--seed", "7"], ["corpus.documents", "corpus.sha256"]),
        (["--dampening", "0.1"], ["settings.dampening"]),
        (["--method", "rtn"], ["corpus", "settings.method"]),
    ):
        said = refusal(capsys, "calibrate", *arguments, *changed)
        assert said.startswith(f"{ready.work} holds layers of another run: ")
        assert all(name in said for name in names), said
    assert contents(ready.work) == before


def test_a_work_folder_of_another_source_is_refused(ready: Ready, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(ready.work)
    configured(swiglu_limit=9.0)(ready.source)
    said = refusal(capsys, "calibrate", *calibrate_arguments(ready.source, ready.work, ready.corpus, samples=4))
    assert said == f"{ready.work} holds layers of another run: source.config.json differ"
    assert contents(ready.work) == before


def test_on_mismatch_move_moves_the_old_layers_aside(ready: Ready, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(ready.work)
    arguments = calibrate_arguments(ready.source, ready.work, ready.corpus, samples=4)
    assert run_here("calibrate", *arguments, "--dampening", "0.1", "--on-mismatch", "move") == 0
    aside = ready.work.with_name("layers.old-1")
    assert f"moved the layers of another run (settings.dampening differ) to {aside}" in capsys.readouterr().out
    assert contents(aside) == before
    after = contents(ready.work)
    assert after.keys() == before.keys()
    assert after["layer-000.safetensors"] != before["layer-000.safetensors"]


def damaged_layer(work: Path) -> None:
    path = work / "layer-002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def foreign_layer(work: Path) -> None:
    path = work / "layer-002.safetensors"
    write_shard(path, load_file(path), {"fingerprint": "another"})


LAYERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no calibration": (shutil.rmtree, "{work} holds no calibration"),
    "missing layer": (without("layer-001.safetensors"), "{work}/layer-001.safetensors is missing or of another run"),
    "missing report": (without("layer-001.json"), "{work}/layer-001.safetensors is missing or of another run"),
    "truncated layer": (damaged_layer, "{work}/layer-002.safetensors is missing or of another run"),
    "layer of another run": (foreign_layer, "{work}/layer-002.safetensors is missing or of another run"),
}


@pytest.mark.parametrize("what", LAYERS)
def test_postprocess_refuses_an_unfinished_calibration(
    ready: Ready, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    damage, fact = LAYERS[what]
    damage(ready.work)
    before = contents(ready.artifact)
    folders = ("--source", ready.source, "--work", ready.work, "--out", ready.artifact)
    assert refusal(capsys, "postprocess", *folders).startswith(fact.format(work=ready.work))
    assert contents(ready.artifact) == before


def test_postprocess_refuses_another_source(ready: Ready, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_source(tmp_path / "other", seed=1)
    out = tmp_path / "out"
    said = refusal(capsys, "postprocess", "--source", other, "--work", ready.work, "--out", out)
    assert said == f"{other} is not the source that {ready.work} was calibrated on"
    assert not out.exists()


def test_postprocess_refuses_a_source_without_tokenizer(ready: Ready, capsys: pytest.CaptureFixture[str]) -> None:
    (ready.source / "tokenizer_config.json").unlink()
    folders = ("--source", ready.source, "--work", ready.work, "--out", ready.base / "out")
    assert refusal(capsys, "postprocess", *folders) == f"{ready.source}/tokenizer_config.json is missing"
    assert not (ready.base / "out").exists()


def test_a_fault_in_the_mtp_block_stops_calibrate_before_the_first_layer(
    ready: Ready, capsys: pytest.CaptureFixture[str]
) -> None:
    poisoned("mtp.0.enorm.weight", float("nan"))(ready.source)
    work = ready.base / "layers2"
    said = refusal(capsys, "calibrate", *calibrate_arguments(ready.source, work, ready.corpus, samples=4))
    assert said == "mtp.0.enorm.weight holds NaN or Inf"
    assert not list(work.glob("layer-*"))


@pytest.mark.parametrize("stage", ["dequant", "postprocess"])
@pytest.mark.parametrize("place", ["source", "work", "foreign"])
def test_no_stage_overwrites_or_removes_files_that_are_not_its_own(
    ready: Ready, capsys: pytest.CaptureFixture[str], stage: str, place: str
) -> None:
    foreign = ready.base / "foreign"
    foreign.mkdir()
    (foreign / "model-00001-of-00009.safetensors").write_text("mine")
    (foreign / "thesis.odt").write_text("mine")
    out = {"source": ready.source, "work": ready.work, "foreign": foreign}[place]
    before = contents(ready.base)
    inputs = ["--source", ready.source] + (["--work", ready.work] if stage == "postprocess" else [])
    said = refusal(capsys, stage, *inputs, "--out", out)
    assert str(out) in said
    assert {n: c for n, c in contents(ready.base).items() if not n.startswith(".stamps/")} == {
        n: c for n, c in before.items() if not n.startswith(".stamps/")
    }


def test_shards_of_an_earlier_form_do_not_stay_in_the_artifact(ready: Ready) -> None:
    (ready.artifact / "model-00001-of-00009.safetensors").write_text("from a run with more layers")
    (ready.artifact / "chat_template.jinja").write_text("which the source no longer has")
    folders = ("--source", ready.source, "--work", ready.work, "--out", ready.artifact)
    assert run_here("postprocess", *folders) == 0
    assert not {"model-00001-of-00009.safetensors", "chat_template.jinja"} & contents(ready.artifact).keys()
    assert run_here("verify", "--artifact", ready.artifact, "--source", ready.source) == 0


def test_verify_refuses_a_folder_that_is_not_there(ready: Ready, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, "verify", "--artifact", ready.base / "nowhere", "--source", ready.source)
    assert said == f"{ready.base / 'nowhere'} does not exist"


def test_verify_certifies_a_broken_artifact_as_broken(ready: Ready, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("verify", "--artifact", ready.artifact) == 0
    (ready.artifact / "config.json").unlink()
    assert run_here("verify", "--artifact", ready.artifact, "--source", ready.source) == 1
    assert "config.json does not exist" in " ".join(capsys.readouterr().out.split())
    assert json.loads((ready.artifact / "certificate.json").read_text())["ok"] is False


@pytest.mark.parametrize(
    ("stage", "arguments"),
    [
        ("calibrate", []),
        ("calibrate", ["--source", "a"]),
        ("calibrate", ["--source", "a", "--work", "b", "--samples", "many"]),
        ("calibrate", ["--source", "a", "--work", "b", "--method", "awq"]),
        ("calibrate", ["--source", "a", "--work", "b", "--wrok", "c"]),
        ("calibrate", ["--source", "a", "--work", "b", "--micro-batch-tokens", "0"]),
        ("calibrate", ["--source", "a", "--work", "b", "--threads", "-2"]),
        ("calibrate", ["--source", "a", "--work", "b", "--dampening", "nan"]),
        ("calibrate", ["--source", "a", "--work", "b", "--device", "gpu"]),
        ("calibrate", ["--source", "a", "--work", "b", "--device", "cuda:99"]),
        ("postprocess", ["--source", "a", "--work", "b"]),
        ("dequant", ["--out", "b"]),
        ("verify", ["--source", "a"]),
    ],
)
def test_wrong_usage_is_two_lines_and_2(capsys: pytest.CaptureFixture[str], stage: str, arguments: list[str]) -> None:
    assert run_here(stage, *arguments) == 2
    fact, hint = capsys.readouterr().err.splitlines()
    assert fact.startswith("error: ") and hint == f"hint: python -m scripts.{stage} --help"


@pytest.mark.parametrize("arguments", [["--samples", "0"], ["--seq-len", "-1"]])
def test_nothing_to_calibrate_on_is_refused(
    pristine: Ready, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    out = tmp_path / "out"
    refusal(capsys, "calibrate", *calibrate_arguments(pristine.source, out, pristine.corpus), *arguments)
    assert not out.exists()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bool, torch.int16, torch.float8_e5m2, torch.float16])
def test_a_dtype_that_no_such_file_uses_is_named(ready: Ready, dtype: torch.dtype) -> None:
    name = "layers.0.attn_norm.weight"
    edit(ready.source, lambda tensors: tensors.update({name: tensors[name].to(dtype)} if name in tensors else {}))
    source = Checkpoint(ready.source)
    for attempt in (lambda: source.validate(layout.upstream(source.config)), lambda: source.load(name, (128,))):
        with pytest.raises(UserError, match=rf"{name} is \w+ \[128\], config.json asks for BF16 \[128\]"):
            attempt()
