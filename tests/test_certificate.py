"""verify on artifacts that are damaged in one way each: the check that is for it fails and names the damage."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import calibrate_arguments, run_here, write_corpus, write_source
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from v4forge import certificate, codec
from v4forge.checkpoint import INDEX, Checkpoint, write_index, write_shard
from v4forge.stamps import Digests

Tensors = dict[str, Tensor]
EXPERT = "layers.1.ffn.experts.2.w3"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `source`, `artifact` and `artifact-rtn`."""
    base = tmp_path_factory.mktemp("pristine")
    source, corpus = write_source(base / "source"), write_corpus(base / "corpus.txt")
    for method, suffix in (("gptq", ""), ("rtn", "-rtn")):
        work, out = base / f"layers{suffix}", base / f"artifact{suffix}"
        assert run_here("calibrate", *calibrate_arguments(source, work, corpus), "--method", method) == 0
        assert run_here("postprocess", "--source", source, "--work", work, "--out", out) == 0
    return base


@dataclass(frozen=True)
class Artifact:
    """A copy of the artifact, to be damaged, and the source that it was made from."""

    folder: Path
    source: Path

    def edit(self, change: Callable[[Tensors], None]) -> None:
        """Applies `change` to the tensors of each shard, and makes the index agree with the result."""
        weight_map, total = {}, 0
        for path in sorted(self.folder.glob("*.safetensors")):
            tensors, before = load_file(path), load_file(path)
            change(tensors)
            if tensors.keys() != before.keys() or any(not same(tensors[n], before[n]) for n in before):
                with safe_open(path, framework="pt") as file:
                    metadata = file.metadata()
                write_shard(path, tensors, metadata)
            weight_map |= dict.fromkeys(tensors, path.name)
            total += sum(t.numel() * t.element_size() for t in tensors.values())
        write_index(self.folder, weight_map, total)
        self.seal()

    def replace(self, name: str, change: Callable[[Tensor], Tensor]) -> None:
        self.edit(lambda tensors: tensors.update({name: change(tensors[name])} if name in tensors else {}))

    def configure(self, change: Callable[[dict[str, Any]], object]) -> None:
        path = self.folder / "config.json"
        raw = json.loads(path.read_text())
        change(raw)
        path.write_text(json.dumps(raw))
        self.seal()

    def seal(self) -> None:
        """Makes manifest.json and SHA256SUMS agree with the files, as someone who hides a damage would."""
        unsummed = ("SHA256SUMS", "certificate.json", "README.md")
        manifest = json.loads((self.folder / "manifest.json").read_text())
        for name in manifest["files"]:
            if (self.folder / name).exists():
                manifest["files"][name]["sha256"] = sha256(self.folder / name)
        (self.folder / "manifest.json").write_text(json.dumps(manifest))
        paths = sorted(p for p in self.folder.iterdir() if p.name not in unsummed)
        (self.folder / "SHA256SUMS").write_text("".join(f"{sha256(p)}  {p.name}\n" for p in paths))

    def failed(self, with_source: bool = True) -> dict[str, str]:
        """check -> its failures."""
        artifact = Checkpoint(self.folder, form="artifact")
        source = Checkpoint(self.source) if with_source else None
        checks = certificate.verify(artifact, source, Digests(self.folder.parent / "digests.json"))
        names = [name for name, _, needs_source in certificate.CHECKS if with_source or not needs_source]
        assert [check.name for check in checks] == names
        return {check.name: check.detail for check in checks if not check.ok}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and raw(a).equal(raw(b))


def raw(t: Tensor) -> Tensor:
    return t.contiguous().view(-1).view(torch.uint8)


@pytest.fixture
def artifact(pristine: Path, tmp_path: Path) -> Artifact:
    return Artifact(Path(shutil.copytree(pristine / "artifact", tmp_path / "artifact")), pristine / "source")


def flipped(t: Tensor) -> Tensor:
    """With the sign of one value changed: the byte stays a valid value of any format."""
    changed = raw(t.clone())
    changed[len(changed) // 2 | t.element_size() - 1] ^= 0x80
    return changed.view(t.dtype).view(t.shape)


def poisoned(t: Tensor) -> Tensor:
    changed = t.clone()
    changed.view(-1)[3] = float("nan")
    return changed


def dropped(prefix: str) -> Callable[[Artifact], None]:
    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.startswith(prefix)]:
            del tensors[name]

    return lambda artifact: artifact.edit(change)


def renamed(old: str, new: str) -> Callable[[Artifact], None]:
    return lambda artifact: artifact.edit(
        lambda tensors: tensors.update({new: tensors.pop(old)} if old in tensors else {})
    )


def packed_mtp(artifact: Artifact) -> None:
    """The MTP block's expert as a quantizer with broad targets would have left it."""
    name = "mtp.0.ffn.experts.0.w1"

    def change(tensors: Tensors) -> None:
        if tensors.pop(f"{name}.weight", None) is not None:
            tensors[f"{name}.weight_packed"] = torch.zeros(128, 16, dtype=torch.int32)
            tensors[f"{name}.weight_scale"] = torch.ones(128, 1, dtype=torch.bfloat16)
            tensors[f"{name}.weight_shape"] = torch.tensor([128, 128])

    artifact.edit(change)


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Artifact], None]:
    return lambda artifact: artifact.replace(name, change)


def configured(change: Callable[[dict[str, Any]], object]) -> Callable[[Artifact], None]:
    return lambda artifact: artifact.configure(change)


def unanchored(raw: dict[str, Any]) -> None:
    """The published artifact's targets, which reach into the MTP block under vLLM's name for it."""
    groups = raw["quantization_config"]["config_groups"]
    groups["attention"]["targets"] = [r"re:.*attn\.(wq_a|wq_b|wkv|wo_a|wo_b|fused_wqa_wkv)$"]
    groups["experts"]["targets"] = [r"re:.*ffn\.experts\.\d+\.(w1|w2|w3|gate_proj|up_proj|down_proj)$"]


def without_probe_name(raw: dict[str, Any]) -> None:
    group = raw["quantization_config"]["config_groups"]["experts"]
    group["targets"] = [group["targets"][0].replace("|gate_proj|up_proj|down_proj", "")]


def no_expression(raw: dict[str, Any]) -> None:
    raw["quantization_config"]["config_groups"]["experts"]["targets"] = ["re:layers.("]


def weightless(raw: dict[str, Any]) -> None:
    raw["quantization_config"]["config_groups"]["experts"]["weights"] = None


def eight_bits(raw: dict[str, Any]) -> None:
    raw["quantization_config"]["config_groups"]["experts"]["weights"]["num_bits"] = 8


def extra_file(artifact: Artifact) -> None:
    (artifact.folder / "notes.txt").write_text("left behind")


def stale_sums(artifact: Artifact) -> None:
    (artifact.folder / "generation_config.json").write_text("{}")


def missing_file(artifact: Artifact) -> None:
    (artifact.folder / "generation_config.json").unlink()


def unlisted(artifact: Artifact) -> None:
    path = artifact.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"]["config.json"]
    path.write_text(json.dumps(manifest))
    artifact.seal()


# what was done -> (how, the check, what it must name)
def rounded_layer(artifact: Artifact) -> None:
    """Layer 1's experts from the round-to-nearest artifact of the same source."""
    other = Checkpoint(artifact.source.parent / "artifact-rtn", form="artifact")
    theirs = {n: other.raw(n) for n in other.weight_map if n.startswith("layers.1.ffn.experts.")}
    artifact.edit(lambda tensors: tensors.update({n: t for n, t in theirs.items() if n in tensors}))


DAMAGES: dict[str, tuple[Callable[[Artifact], None], str, str]] = {
    "an FP8 weight's byte": (
        changed("layers.1.attn.wq_a.weight", flipped),
        "passed through",
        "layers.1.attn.wq_a.weight",
    ),
    "an FP8 scale": (
        changed("layers.1.attn.wkv.weight_scale", lambda t: t * 2),
        "passed through",
        "layers.1.attn.wkv.weight_scale",
    ),
    "an FP8 scale that is no power of two": (
        changed("layers.1.attn.wkv.weight_scale", lambda t: t * 1.5),
        "finite",
        "layers.1.attn.wkv.weight",
    ),
    "a routing table": (
        changed("layers.0.ffn.gate.tid2eid", lambda t: t.flip(1)),
        "passed through",
        "layers.0.ffn.gate.tid2eid",
    ),
    "a routing table out of range": (
        changed("layers.0.ffn.gate.tid2eid", lambda t: t + 1),
        "finite",
        "layers.0.ffn.gate.tid2eid routes to expert 4",
    ),
    "an MTP weight": (changed("mtp.0.attn.wo_b.weight", flipped), "passed through", "mtp.0.attn.wo_b.weight"),
    "F32 rounded": (changed("layers.2.attn.attn_sink", Tensor.bfloat16), "tensors", "layers.2.attn.attn_sink is BF16"),
    "F32 rounded and widened": (
        changed("layers.2.hc_ffn_base", lambda t: t.bfloat16().float()),
        "passed through",
        "layers.2.hc_ffn_base",
    ),
    "the head in BF16": (changed("head.weight", Tensor.bfloat16), "tensors", "head.weight is BF16"),
    "a dtype of no such file": (changed("norm.weight", Tensor.double), "tensors", "norm.weight is F64"),
    "a shape": (changed("layers.0.ffn_norm.weight", lambda t: t[:64].clone()), "tensors", "layers.0.ffn_norm.weight"),
    "an MTP tensor": (dropped("mtp.0.hnorm.weight"), "tensors", "mtp.0.hnorm.weight is missing (C2"),
    "the MTP block": (dropped("mtp."), "tensors", "(C2"),
    "an expert": (dropped("layers.2.ffn.experts.3."), "tensors", "layers.2.ffn.experts.3.w1.weight_packed is missing"),
    "a name": (
        renamed("layers.0.attn.wq_a.weight_scale", "layers.0.attn.wq_a.weight_scale_inv"),
        "tensors",
        "layers.0.attn.wq_a.weight_scale_inv is not part of the layout",
    ),
    "a packed MTP expert": (packed_mtp, "mtp untouched", "mtp.0.ffn.experts.0.w1.weight_packed"),
    "a packed MTP expert, by layout": (packed_mtp, "tensors", "weight_packed is not part of the layout (C10"),
    "a zeroed expert": (
        # what stock tooling saves for an expert that no token reached: every code 0, stored as 8
        changed(f"{EXPERT}.weight_packed", lambda t: torch.full_like(t, 0x88888888 - (1 << 32))),
        "expert codes",
        f"{EXPERT}.weight uses 1 of 16 codes",
    ),
    "a zeroed expert, by value": (
        changed(f"{EXPERT}.weight_packed", lambda t: torch.full_like(t, 0x88888888 - (1 << 32))),
        "expert errors",
        f"{EXPERT}.weight: relative error 1.000",
    ),
    "exchanged rows": (changed(f"{EXPERT}.weight_packed", lambda t: t.roll(1, 0)), "expert errors", f"{EXPERT}.weight"),
    "a NaN scale": (changed(f"{EXPERT}.weight_scale", poisoned), "expert codes", f"{EXPERT}.weight: weight_scale"),
    "a NaN scale, by value": (changed(f"{EXPERT}.weight_scale", poisoned), "expert errors", f"{EXPERT}.weight"),
    "a group's scale doubled": (
        changed(f"{EXPERT}.weight_scale", lambda t: t.index_put((torch.tensor(5), torch.tensor(0)), t[5, 0] * 2)),
        "expert slopes",
        f"{EXPERT}.weight: a group is ",
    ),
    "a row of another size": (
        changed(f"{EXPERT}.weight_scale", lambda t: t.index_put((torch.tensor(9),), t[9] / 2)),
        "expert slopes",
        f"{EXPERT}.weight: a group is 0.5",
    ),
    "one layer rounded to nearest": (
        rounded_layer,
        "rounding",
        "layer 1 was quantized by round-to-nearest (0.00% of its codes are not the nearest ones), GPTQ expected",
    ),
    "a negative scale": (
        changed(f"{EXPERT}.weight_scale", lambda t: -t),
        "expert codes",
        f"{EXPERT}.weight: weight_scale is not finite and positive",
    ),
    "a stated shape": (
        changed(f"{EXPERT}.weight_shape", lambda t: t // 2),
        "expert codes",
        f"{EXPERT}.weight: weight_shape says [64, 64]",
    ),
    "NaN in BF16": (changed("mtp.0.ffn.gate.weight", poisoned), "finite", "mtp.0.ffn.gate.weight holds NaN or Inf"),
    "the head's alias": (changed("mtp.0.head.weight", flipped), "aliases", "mtp.0.head.weight is not head.weight"),
    "the embedding's alias": (changed("mtp.0.emb.tok_emb.weight", flipped), "aliases", "mtp.0.emb.tok_emb.weight"),
    "unanchored targets": (configured(unanchored), "config resolves", "model.layers.3.attn.wq_a resolves to"),
    "a probe name": (configured(without_probe_name), "config resolves", "model.layers.0.ffn.experts.0.gate_proj"),
    "8-bit experts": (configured(eight_bits), "config resolves", "resolves to ('int', 8, 'group')"),
    "a target that is no expression": (configured(no_expression), "config resolves", "config.json"),
    "a group without weights": (configured(weightless), "config resolves", "resolves to None"),
    "no quantization_config": (
        configured(lambda raw: raw.pop("quantization_config")),
        "config resolves",
        "config.json",
    ),
    "topk_method removed": (configured(lambda raw: raw.pop("topk_method")), "config kept", "topk_method is None"),
    "a setting": (configured(lambda raw: raw.update(rope_theta=1)), "config kept", "rope_theta is 1, the source has"),
    "other targets": (configured(unanchored), "config kept", "quantization_config is not the recipe's"),
    "an extra file": (extra_file, "checksums", "notes.txt"),
    "stale sums": (stale_sums, "checksums", "generation_config.json has sha256"),
    "a missing file": (missing_file, "checksums", "generation_config.json is listed in SHA256SUMS but missing"),
    "a manifest without a file": (unlisted, "checksums", "manifest.json does not describe config.json"),
    "no sums": (lambda a: (a.folder / "SHA256SUMS").unlink(), "checksums", "SHA256SUMS is missing"),
    "sums of nonsense": (lambda a: (a.folder / "SHA256SUMS").write_bytes(b"\xff\xfe"), "checksums", "SHA256SUMS is"),  # type: ignore[func-returns-value]
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damage_fails_its_check_and_is_named(artifact: Artifact, what: str) -> None:
    damage, check, named = DAMAGES[what]
    damage(artifact)
    failed = artifact.failed()
    assert check in failed, failed
    assert named in failed[check]
    if check != "checksums":
        assert "checksums" not in failed, failed["checksums"]


def test_every_check_fails_on_some_damage() -> None:
    assert {check for _, check, _ in DAMAGES.values()} == {name for name, _, _ in certificate.CHECKS}


def test_resealing_alone_is_no_damage(artifact: Artifact) -> None:
    artifact.edit(lambda tensors: None)
    assert artifact.failed() == {}
    assert artifact.failed(with_source=False) == {}


def test_structural_damage_shows_without_the_source(artifact: Artifact) -> None:
    artifact.replace(f"{EXPERT}.weight_packed", torch.zeros_like)
    artifact.replace("layers.2.attn.attn_sink", Tensor.bfloat16)
    assert {"tensors", "expert codes"} <= artifact.failed(with_source=False).keys()


@pytest.mark.parametrize("which", ["artifact", "artifact-rtn"])
def test_an_undamaged_artifact_passes_and_its_certificate_names_the_sums(
    pristine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], which: str
) -> None:
    folder = Path(shutil.copytree(pristine / which, tmp_path / which))
    assert run_here("verify", "--artifact", folder, "--source", pristine / "source") == 0
    assert capsys.readouterr().out.rstrip().endswith("certificate: ok")
    written = json.loads((folder / "certificate.json").read_text())
    assert written["ok"] is True
    assert written["sums_sha256"] == sha256(folder / "SHA256SUMS")
    assert [check["name"] for check in written["checks"]] == [name for name, _, _ in certificate.CHECKS]
    assert all(check["ok"] and check["detail"] for check in written["checks"])


def test_the_program_exits_1_and_writes_what_failed(artifact: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("verify", "--artifact", artifact.folder, "--source", artifact.source) == 0
    artifact.replace(f"{EXPERT}.weight_packed", torch.zeros_like)
    assert run_here("verify", "--artifact", artifact.folder, "--source", artifact.source) == 1
    assert f"certificate: FAILED (3 of {len(certificate.CHECKS)} checks)" in capsys.readouterr().out
    written = json.loads((artifact.folder / "certificate.json").read_text())
    assert written["ok"] is False
    failed = {check["name"]: check["detail"] for check in written["checks"] if not check["ok"]}
    assert failed.keys() == {"expert codes", "expert errors", "expert slopes"}
    assert all(EXPERT in detail for detail in failed.values())


def test_only_the_first_failures_of_a_check_are_spelled_out(artifact: Artifact) -> None:
    dropped("mtp.")(artifact)
    detail = artifact.failed()["tensors"]
    assert detail.count("is missing") == certificate.SHOWN
    missing = sum(name.startswith("mtp.") for name in json.loads((artifact.folder / INDEX).read_text())["weight_map"])
    assert missing == 0
    assert " … and " in detail


def test_an_artifact_of_another_source_fails(artifact: Artifact, tmp_path: Path) -> None:
    other = Artifact(artifact.folder, write_source(tmp_path / "other", seed=1))
    assert other.failed().keys() == {"passed through", "expert errors", "expert slopes"}


@pytest.mark.parametrize(("which", "method"), [("artifact", "gptq"), ("artifact-rtn", "rtn")])
def test_the_method_is_told_from_the_codes(
    pristine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], which: str, method: str
) -> None:
    folder = Path(shutil.copytree(pristine / which, tmp_path / which))
    for expected in ("gptq", "rtn"):
        options = ("--artifact", folder, "--source", pristine / "source", "--expect", expected)
        assert run_here("verify", *options) == (0 if expected == method else 1)
    said = " ".join(capsys.readouterr().out.split())
    assert f"was quantized by {certificate.METHODS[method]}" in said


def test_an_expected_method_needs_the_source(pristine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("verify", "--artifact", pristine / "artifact", "--expect", "gptq") == 2
    assert "only with --source" in capsys.readouterr().err


def swapped_nibbles(weight: Tensor, scale: Tensor) -> Tensor:
    byte = weight.view(torch.uint8)
    return codec.decode_fp4((byte >> 4 | byte << 4).view(torch.int8), scale)


FAULTS: dict[str, tuple[str, Callable[..., Tensor], str]] = {
    "nibbles swapped": ("fp4", swapped_nibbles, "mtp.0.ffn.experts.0.w1.weight differs from the source"),
    "an FP8 scale off by 2": (
        "fp8",
        lambda weight, scale: 2 * codec.decode_fp8(weight, scale),
        "layers.1.attn.indexer.wq_b.weight differs from the source",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_postprocess_s_own_decoding_is_seen(
    pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    fmt, decode, named = FAULTS[fault]
    out = tmp_path / "artifact"
    work = Path(shutil.copytree(pristine / "layers", tmp_path / "layers"))
    with monkeypatch.context() as patched:
        patched.setitem(codec.FORMATS, fmt, replace(codec.FORMATS[fmt], decode=decode))
        if fmt == "fp8":  # lies in the layer files, which calibrate writes
            shutil.rmtree(work)
            arguments = calibrate_arguments(pristine / "source", work, pristine / "corpus.txt")
            assert run_here("calibrate", *arguments, "--method", "rtn") == 0
        assert run_here("postprocess", "--source", pristine / "source", "--work", work, "--out", out) == 0
    failed = Artifact(out, pristine / "source").failed()
    assert named in failed["passed through"]
