"""An artifact that can be damaged, and the ways to do it: what corruptions.py makes its table of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from synthetic import TINY
from torch import Tensor

from v4forge.checkpoint import codec
from v4forge.checkpoint.reader import INDEX, Checkpoint
from v4forge.checkpoint.writer import write_index, write_shard
from v4forge.digests import Digests
from v4forge.model import evaluation, heldout
from v4forge.verification import certificate
from v4forge.verification import checks as certificate_checks

Tensors = dict[str, Tensor]
EXPERT = "layers.1.ffn.experts.2.w3"
KEPT = "layers.0.ffn.experts.2.w3"  # of a hash-routed layer, which recipe mixed leaves as it is
ZERO_CODES = 0x88888888 - (1 << 32)  # eight codes 0, as a signed word


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
        unsummed = ("SHA256SUMS", "certificate.json", "README.md", "run.json")
        manifest = json.loads((self.folder / "manifest.json").read_text())
        there = {name: entry for name, entry in manifest["files"].items() if (self.folder / name).exists()}
        manifest["files"] = {name: entry | {"sha256": sha256(self.folder / name)} for name, entry in there.items()}
        (self.folder / "manifest.json").write_text(json.dumps(manifest))
        paths = sorted(p for p in self.folder.iterdir() if p.name not in unsummed)
        (self.folder / "SHA256SUMS").write_text("".join(f"{sha256(p)}  {p.name}\n" for p in paths))

    def failed(self, with_source: bool = True, hashing: bool = True, deep: bool = False) -> dict[str, str]:
        """check -> its failures."""
        source = Checkpoint(self.source) if with_source else None
        digests = Digests(self.folder.parent / "digests.json")
        checks, not_run, _ = certificate.verify(
            self.folder, source, digests, hashing=hashing, compare=predictions if deep else None
        )
        assert {check.name for check in checks} | not_run.keys() == {row.name for row in certificate_checks.CHECKS}
        return {check.name: check.detail for check in checks if not check.ok}


Damage = Callable[[Artifact], None]


def predictions(source: Checkpoint, artifact: Checkpoint) -> list[evaluation.Quality]:
    """Both models over a thousand held-out tokens of models/tiny."""
    tokens = heldout.tokens(TINY, TINY / "heldout.txt", 8, 128, source.config.vocab_size)
    return evaluation.compare([source, artifact], tokens, torch.device("cpu"))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and raw(a).equal(raw(b))


def raw(t: Tensor) -> Tensor:
    return t.contiguous().view(-1).view(torch.uint8)


def flipped(t: Tensor) -> Tensor:
    """With the sign of one value changed: the byte stays a valid value of any format."""
    changed = raw(t.clone())
    changed[len(changed) // 2 | t.element_size() - 1] ^= 0x80
    return changed.view(t.dtype).view(t.shape)


def poisoned(t: Tensor) -> Tensor:
    changed = t.clone()
    changed.view(-1)[3] = float("nan")
    return changed


def same_for(t: Tensor, other: Tensor) -> Tensor:
    """`other` in the place of `t`, of which it must have the form."""
    assert t.dtype == other.dtype and t.shape == other.shape and not same(t, other)
    return other.clone()


def copied(target: str, origin: str) -> Damage:
    """A stored tensor overwritten with another of its form."""

    def damage(artifact: Artifact) -> None:
        other = Checkpoint(artifact.folder, form="artifact").raw(origin)
        artifact.replace(target, lambda t: same_for(t, other.to(t.dtype)))

    return damage


def copied_as(origin: str, new: str) -> Damage:
    """A tensor once more, under a name that nothing knows."""
    return lambda artifact: artifact.edit(
        lambda tensors: tensors.update({new: tensors[origin].clone()} if origin in tensors else {})
    )


def swapped(one: str, other: str, parts: tuple[str, ...] = ("weight_packed", "weight_scale")) -> Damage:
    """Two matrices exchanged, as stored."""

    def damage(artifact: Artifact) -> None:
        checkpoint = Checkpoint(artifact.folder, form="artifact")
        for part in parts:
            a, b = (checkpoint.raw(f"{name}.{part}").clone() for name in (one, other))
            artifact.replace(f"{one}.{part}", lambda t, b=b: same_for(t, b))  # type: ignore[misc]
            artifact.replace(f"{other}.{part}", lambda t, a=a: same_for(t, a))  # type: ignore[misc]

    return damage


def nibbles_swapped(t: Tensor) -> Tensor:
    byte = t.view(torch.uint8)
    return (byte >> 4 | byte << 4).view(t.dtype)


def scaled(row: int, factor: float) -> Callable[[Tensor], Tensor]:
    """One row's scale times a factor."""
    return lambda t: t.index_put((torch.tensor(row),), t[row] * factor)


def noise(share: float) -> Damage:
    """Some of all experts' codes moved by one, up or down: every matrix stays near its source."""

    def damage(artifact: Artifact) -> None:
        generator = torch.Generator().manual_seed(0)

        def moved(t: Tensor) -> Tensor:
            codes = codec.unpack_int4(t, torch.tensor([len(t), 8 * t.shape[1]]))
            chosen = torch.rand(codes.shape, generator=generator) < share
            steps = torch.randint(0, 2, codes.shape, generator=generator, dtype=torch.int8) * 2 - 1
            return codec.pack_int4((codes + steps * chosen).clamp(-8, 7))

        artifact.edit(
            lambda tensors: tensors.update({n: moved(t) for n, t in tensors.items() if n.endswith("weight_packed")})
        )

    return damage


def one_code_bit(t: Tensor) -> Tensor:
    changed = t.clone()
    changed[7, 3] ^= 1
    return changed


def lowest_bit(t: Tensor) -> Tensor:
    changed = t.clone()
    changed.view(torch.int16)[3, 0] ^= 1
    return changed


def step_up(scale: Tensor) -> Tensor:
    """One scale of E8M0 doubled."""
    changed = scale.clone()
    changed[5, 1] += 1
    return changed


def not_a_number(scale: Tensor) -> Tensor:
    """One scale of E8M0 made NaN."""
    changed = scale.clone()
    changed[5, 1] = 255
    return changed


def as_e8m0(scale: Tensor) -> Tensor:
    return scale.view(torch.float8_e8m0fnu)


def as_int4(manifest: dict[str, Any]) -> None:
    manifest["calibration"]["settings"]["recipe"] = "int4"


def wrong_shard(artifact: Artifact) -> None:
    path = artifact.folder / INDEX
    index = json.loads(path.read_text())
    shards = sorted(set(index["weight_map"].values()))
    index["weight_map"]["norm.weight"] = next(s for s in shards if s != index["weight_map"]["norm.weight"])
    path.write_text(json.dumps(index))
    artifact.seal()


def twice(artifact: Artifact) -> None:
    """A tensor of one shard in another one too."""
    first, second, *_ = sorted(artifact.folder.glob("*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    write_shard(second, load_file(second) | {name: tensor}, {"format": "pt"})
    artifact.seal()


def truncated(artifact: Artifact) -> None:
    path = min(artifact.folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-64])
    artifact.seal()


def removed(name: str) -> Damage:
    def damage(artifact: Artifact) -> None:
        (artifact.folder / name).unlink()
        artifact.seal()

    return damage


def retold(change: Callable[[dict[str, Any]], object]) -> Damage:
    """manifest.json edited, and SHA256SUMS made to agree with it."""

    def damage(artifact: Artifact) -> None:
        path = artifact.folder / "manifest.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
        artifact.seal()

    return damage


def another_tokenizer(artifact: Artifact) -> None:
    path = artifact.folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    a, b = list(vocabulary)[300:302]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    path.write_text(json.dumps(content))
    artifact.seal()


def random_like(t: Tensor) -> Tensor:
    noise = torch.randn(t.shape, generator=torch.Generator().manual_seed(0)) * t.float().std()
    return same_for(t, noise.to(t.dtype))


def dropped(prefix: str) -> Damage:
    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.startswith(prefix)]:
            del tensors[name]

    return lambda artifact: artifact.edit(change)


def renamed(old: str, new: str) -> Damage:
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


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Damage:
    return lambda artifact: artifact.replace(name, change)


def configured(change: Callable[[dict[str, Any]], object]) -> Damage:
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


def int4_targets_everywhere(raw: dict[str, Any]) -> None:
    """Recipe mixed, its INT4 group reaching into the hash-routed layer."""
    group = raw["quantization_config"]["config_groups"]["experts"]
    group["targets"] = [group["targets"][0].replace("(?:1|", "(?:0|1|")]


def without_fp4_group(raw: dict[str, Any]) -> None:
    del raw["quantization_config"]["config_groups"]["fp4_experts"]


def int4_like(artifact: Artifact) -> None:
    """The hash-routed layer's file of the usual recipe in the place of mixed's, and its config and record left."""
    other = Checkpoint(artifact.source.parent / "artifact", form="artifact")
    theirs = {n: other.raw(n) for n in other.weight_map if n.startswith("layers.0.ffn.experts.")}

    def change(tensors: Tensors) -> None:
        if any(name in tensors for name in theirs):
            tensors.update(theirs)

    artifact.edit(change)


def extra_file(artifact: Artifact) -> None:
    (artifact.folder / "notes.txt").write_text("left behind")


def stale_sums(artifact: Artifact) -> None:
    (artifact.folder / "generation_config.json").write_text("{}")


def nonsense_sums(artifact: Artifact) -> None:
    (artifact.folder / "SHA256SUMS").write_bytes(b"\xff\xfe")


def missing_file(artifact: Artifact) -> None:
    (artifact.folder / "generation_config.json").unlink()


def rounded_layer(artifact: Artifact) -> None:
    """Layer 1's experts from the round-to-nearest artifact of the same source."""
    other = Checkpoint(artifact.source.parent / "artifact-rtn", form="artifact")
    theirs = {n: other.raw(n) for n in other.weight_map if n.startswith("layers.1.ffn.experts.")}
    artifact.edit(lambda tensors: tensors.update({n: t for n, t in theirs.items() if n in tensors}))
