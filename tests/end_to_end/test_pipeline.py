"""calibrate, postprocess, verify and dequant as programs, on checkpoints of two forms, against decoders of our own."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from programs import (
    FORMS,
    assert_shards_are_whole,
    calibrate_arguments,
    contents,
    run_here,
    run_module,
    temporaries,
    write_corpus,
    write_source,
)
from safetensors.torch import load_file
from torch import Tensor

from v4forge.checkpoint import layout
from v4forge.checkpoint.codec import spec_of
from v4forge.checkpoint.layout import Config

SAMPLES = {"small": 12, "other": 24}  # x 64 tokens: most experts see more tokens than their width, some fewer


@dataclass(frozen=True)
class Run:
    """The folders of one run of all stages, and what the programs printed."""

    form: str
    source: Path
    folder: Path
    printed: dict[str, str]

    @property
    def config(self) -> Config:
        return layout.load_config(self.source)

    def calibrate_arguments(self) -> list[str]:
        corpus = self.source.parent / "corpus.txt"
        return calibrate_arguments(self.source, self.folder / "layers", corpus, SAMPLES[self.form])


def said_here(stage: str, *arguments: object) -> str:
    """As run_module, in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert run_here(stage, *arguments) == 0
    return said.getvalue()


@pytest.fixture(scope="module", params=FORMS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Every stage as `python -m scripts.<stage>`; of the second form in this process, which imports once."""
    base = tmp_path_factory.mktemp(request.param)
    made = Run(request.param, write_source(base / "source", request.param), base / "scratch", {})
    write_corpus(base / "corpus.txt")
    work, artifact = made.folder / "layers", made.folder / "artifact"
    program = run_module if request.param == "small" else said_here
    made.printed["calibrate"] = program("calibrate", *made.calibrate_arguments())
    made.printed["postprocess"] = program("postprocess", "--source", made.source, "--work", work, "--out", artifact)
    made.printed["verify"] = program("verify", "--source", made.source, "--artifact", artifact)
    run_here("card", "--work", made.folder, "--artifact", artifact)
    run_here("dequant", "--source", made.source, "--out", made.folder / "dequant")
    return made


def stored_in(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, read by safetensors alone, through its index."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = {shard: load_file(folder / shard) for shard in set(index["weight_map"].values())}
    tensors = {name: shards[shard][name] for name, shard in index["weight_map"].items()}
    assert len(tensors) == sum(map(len, shards.values()))
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    return tensors


# Decoders that share nothing with v4forge.checkpoint.codec: tables, filled from the formats' definitions, in float64.
def e4m3(byte: int) -> float:
    sign, exponent, mantissa = -1.0 if byte & 128 else 1.0, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
FP8 = np.array([e4m3(byte) for byte in range(256)])
E8M0 = np.array([2.0 ** (byte - 127) for byte in range(255)] + [np.nan])


def decoded(weight: Tensor, scale: Tensor) -> np.ndarray:
    """An upstream FP4 (I8) or FP8 weight in float64."""
    byte, factor = weight.view(torch.uint8).numpy(), E8M0[scale.view(torch.uint8).numpy()]
    if weight.dtype == torch.int8:
        values = np.empty((byte.shape[0], byte.shape[1] * 2))
        values[:, 0::2], values[:, 1::2] = FP4[byte & 15], FP4[byte >> 4]
        return values * factor.repeat(32, 1)
    rows, columns = byte.shape
    return FP8[byte] * factor.repeat(128, 0)[:rows].repeat(128, 1)[:, :columns]


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def assert_decoded(found: Tensor, upstream: dict[str, Tensor], name: str) -> None:
    """`found` is what upstream's `name` stands for, exactly: a quantized weight in BF16, any other tensor unchanged."""
    scale = upstream.get(name.removesuffix("weight") + "scale") if name.endswith(".weight") else None
    if scale is None:
        assert (found.dtype, found.shape) == (upstream[name].dtype, upstream[name].shape), name
        assert bits(found) == bits(upstream[name]), name
    else:
        assert found.dtype == torch.bfloat16, name
        assert np.array_equal(found.double().numpy(), decoded(upstream[name], scale)), name


def test_the_programs_end_with_an_ok_certificate(run: Run) -> None:
    assert run.printed["verify"].rstrip().endswith("certificate: ok")
    artifact = run.folder / "artifact"
    certificate = json.loads((artifact / "certificate.json").read_text())
    assert certificate["ok"] is True
    assert all(check["ok"] for check in certificate["checks"])
    assert certificate["sums_sha256"] == hashlib.sha256((artifact / "SHA256SUMS").read_bytes()).hexdigest()


def test_a_second_run_in_other_folders_gives_the_same_bytes(run: Run, tmp_path: Path) -> None:
    again = Run(run.form, run.source, tmp_path / "elsewhere" / "deeper", {})
    artifact = again.folder / "artifact"
    assert run_here("calibrate", *again.calibrate_arguments()) == 0
    work = again.folder / "layers"
    assert run_here("postprocess", "--source", run.source, "--work", work, "--out", artifact) == 0
    assert run_here("verify", "--source", run.source, "--artifact", artifact) == 0
    assert run_here("card", "--work", again.folder, "--artifact", artifact) == 0
    for folder in ("layers", "artifact"):
        first, second = contents(run.folder / folder), contents(again.folder / folder)
        assert list(first) == list(second)
        assert {name for name in first if first[name] != second[name]} <= {"run.json"}  # seconds and memory


@pytest.fixture
def times(run: Run) -> Iterator[None]:
    """Checks that no file of the run is written during a test."""

    def written() -> dict[Path, tuple[int, int]]:
        files = [p for p in run.folder.rglob("*") if p.is_file() and p.parent.name != ".stamps"]
        return {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in files if p.name != "fingerprint.json"}

    before = written()
    yield
    assert written() == before


@pytest.mark.usefixtures("times")
def test_a_finished_calibration_has_nothing_to_do(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("calibrate", *run.calibrate_arguments()) == 0
    layers = run.config.num_hidden_layers
    assert f"{layers} layers, {layers} finished" in capsys.readouterr().out


@pytest.mark.usefixtures("times")
def test_a_dry_run_writes_nothing(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = run.calibrate_arguments()
    arguments[arguments.index("--work") + 1] = str(tmp_path / "new" / "layers")
    assert run_here("calibrate", *arguments, "--dry-run") == 0
    assert f"{run.config.num_hidden_layers} layers, 0 finished" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not (tmp_path / "new" / "layers").exists()


def test_the_artifact_holds_exactly_the_layout(run: Run) -> None:
    stored = stored_in(run.folder / "artifact")
    expected = layout.artifact(run.config)
    found = {name: spec_of(t) for name, t in stored.items()}
    assert found == expected


def test_the_artifact_folder_is_flat_and_complete(run: Run) -> None:
    shards = run.config.num_hidden_layers + 2
    assert set(contents(run.folder / "artifact")) == {
        *(f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)),
        *("model.safetensors.index.json", "config.json", "generation_config.json"),
        *("tokenizer.json", "tokenizer_config.json"),
        *("manifest.json", "SHA256SUMS", "certificate.json", "README.md", "run.json"),
    }
    assert not temporaries(run.folder)
    assert_shards_are_whole(run.folder)


def test_layer_files_are_linked_and_not_copied(run: Run) -> None:
    shards = sorted((run.folder / "artifact").glob("*.safetensors"))
    for layer in run.config.layers:
        assert (run.folder / "layers" / f"layer-{layer:03}.safetensors").samefile(shards[layer])


def test_sums_and_manifest_describe_the_files_and_no_folder(run: Run) -> None:
    files = contents(run.folder / "artifact")
    sums = {name: digest for digest, name in (line.split("  ") for line in files["SHA256SUMS"].decode().splitlines())}
    covered = files.keys() - {"SHA256SUMS", "certificate.json", "README.md", "run.json"}
    assert sums == {name: hashlib.sha256(files[name]).hexdigest() for name in covered}
    manifest = json.loads(files["manifest.json"])
    listed = {name: (entry["sha256"], entry["bytes"]) for name, entry in manifest["files"].items()}
    assert listed == {name: (sums[name], len(files[name])) for name in covered - {"manifest.json"}}
    for name, entry in manifest["source"]["files"].items():
        assert entry["sha256"] == hashlib.sha256((run.source / name).read_bytes()).hexdigest()
    for name, content in files.items():
        if name.endswith(".json"):
            assert str(run.folder.parent) not in content.decode(), name


def test_everything_but_the_routed_experts_is_its_source_exactly(run: Run) -> None:
    upstream, stored = stored_in(run.source), stored_in(run.folder / "artifact")
    through = f32 = mtp = 0
    for name, tensor in stored.items():
        if name.endswith((".weight_scale", ".weight_packed", ".weight_shape")):
            continue
        if tensor.dtype == torch.float8_e4m3fn:
            scale = upstream[name.removesuffix("weight") + "scale"]
            assert bits(tensor) == bits(upstream[name])
            kept = stored[name + "_scale"]
            assert kept.dtype == torch.float32
            assert np.array_equal(kept.double().numpy(), E8M0[scale.view(torch.uint8).numpy()])
            through += 1
        elif name in ("head.weight", "mtp.0.head.weight"):
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor.double(), upstream["head.weight"].double())
        else:
            assert_decoded(tensor, upstream, "embed.weight" if name == "mtp.0.emb.tok_emb.weight" else name)
            f32 += tensor.dtype == torch.float32
            mtp += name.startswith("mtp.")
    assert through == 5 * run.config.num_hidden_layers
    assert f32 == sum(t.dtype == torch.float32 for t in upstream.values())
    assert mtp + 1 == sum(n.startswith("mtp.") for n in stored)


def test_mtp_weights_are_bf16_and_not_quantized(run: Run) -> None:
    stored = stored_in(run.folder / "artifact")
    kinds = {t.dtype for n, t in stored.items() if re.fullmatch(r"mtp\.0\.(attn|ffn\.(shared_)?experts)\..*w.*", n)}
    assert kinds == {torch.bfloat16}


def test_gptq_loses_less_than_round_to_nearest_where_tokens_were_enough(run: Run) -> None:
    config = run.config
    compared = skipped = 0
    for layer in config.layers:
        report = json.loads((run.folder / "layers" / f"layer-{layer:03}.json").read_text())
        few = {note["expert"]: note["tokens"] for note in report["blended"]}
        for which in ("w1", "w2", "w3"):
            width = config.moe_intermediate_size if which == "w2" else config.hidden_size
            losses = report["error"][which]
            for expert, tokens in enumerate(report["tokens"]):
                if tokens >= width:
                    assert losses["gptq"][expert] < losses["rtn"][expert], (layer, expert, which)
                    compared += 1
                else:
                    assert few[expert] == tokens
                    skipped += 1
    assert compared > skipped


def test_dequant_keeps_the_names_and_every_value(run: Run) -> None:
    upstream, plain = stored_in(run.source), stored_in(run.folder / "dequant")
    assert set(plain) == {name for name in upstream if not name.endswith(".scale")}
    for name, tensor in plain.items():
        assert_decoded(tensor, upstream, name)


def test_dequants_config_says_that_nothing_is_quantized(run: Run) -> None:
    upstream = json.loads((run.source / "config.json").read_text())
    plain = json.loads((run.folder / "dequant" / "config.json").read_text())
    assert "quantization_config" not in plain
    changed = {k for k in upstream.keys() | plain.keys() if upstream.get(k) != plain.get(k)}
    assert changed <= {"quantization_config", "expert_dtype", "torch_dtype"}
    assert (run.folder / "dequant" / "tokenizer.json").is_file()
