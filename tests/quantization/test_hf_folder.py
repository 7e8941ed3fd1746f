"""Real saves of llm-compressor: recognized, told what is wrong with them, and repaired without touching a code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_artifact import save
from programs import Death, ForkServer, contents, run_here
from safetensors.torch import load_file
from synthetic import TINY, Tensors, edit
from torch import Tensor

from v4forge.checkpoint import layout
from v4forge.checkpoint.reader import INDEX, Checkpoint
from v4forge.checkpoint.recipe import rule_for
from v4forge.checkpoint.writer import write_index, write_shard
from v4forge.files import read_json
from v4forge.quantization.hf_folder import opened, recognized
from v4forge.quantization.postprocess import SHARD
from v4forge.reporting import card, card_subject

SINGLE = "model.safetensors"
REPAIRABLE = ("hybrid", "gptq", "hf")
# How each real save calls an expert's w1, w2 and w3, as found by looking.
EXPERTS = {
    "hybrid": ("model.layers.{}.ffn.experts.{}.", ("wgate", "down_proj", "up_proj")),
    "gptq": ("model.layers.{}.ffn.experts.{}.", ("w1", "w2", "w3")),
    "hf": ("model.layers.{}.mlp.experts.{}.", ("gate_proj", "down_proj", "up_proj")),
}
MATRIX = "model.layers.1.ffn.experts.2.up_proj"  # of the hybrid save


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Path:
    """Holds a folder for each of hf_artifact.FORMS, and `fixed-<form>` for each that can be repaired."""
    base = tmp_path_factory.mktemp("saves")
    save(TINY, base, pytestconfig.cache)
    for form in REPAIRABLE:
        assert run_here("postprocess", *repairing(base / form, base / f"fixed-{form}")) == 0
    return base


@pytest.fixture
def hybrid(saves: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saves / "hybrid", tmp_path / "hybrid"))


def repairing(folder: Path, out: Path) -> list[Any]:
    return ["--source", TINY, "--from-hf", folder, "--out", out]


def everything(folder: Path) -> Tensors:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def same(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))
    )


def configure(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    raw = json.loads((folder / "config.json").read_text())
    change(raw)
    (folder / "config.json").write_text(json.dumps(raw))


def said_of(folder: Path) -> str:
    found = recognized(folder)
    assert found
    return "\n".join(found.problems(Checkpoint(TINY)))


@pytest.mark.parametrize(("form", "naming"), [("hybrid", "hybrid"), ("gptq", "hybrid"), ("hf", "own")])
def test_a_real_save_is_recognized_and_each_of_its_faults_is_named(saves: Path, form: str, naming: str) -> None:
    source = Checkpoint(TINY)
    mtp = sum(name.startswith("mtp.") and not name.endswith(".scale") for name in source.weight_map)
    f32 = [n for n in source.weight_map if source.spec(n).dtype == "F32" and not n.startswith("mtp.")]
    attention = sum(rule_for(n).kind == "attention projections" for n, _ in layout.parameters(source.config))
    prefix, (gate, _, _) = EXPERTS[form]
    expected = [
        f"saved by llm-compressor through transformers, with transformers' {naming}",
        f"layers.0.ffn.experts.0.w1.weight_packed is called {prefix.format(0, 0)}{gate}.weight_packed",
        f"{mtp} tensors of the MTP block missing, which transformers drops when it loads (C2)",
        "2 tensors missing that repeat head and embedding in the MTP block (C14)",
        f"{len(f32)} tensors of F32 rounded to BF16 (C13)",
        f"{2 * attention} tensors of attention that are not upstream's FP8 bytes but dequantized",
        f"{attention} tensors of scales: attention was quantized anew",
        "resolves to None, expected ('int', 4, 'group') (N4",
        "settings are not the source's: expert_dtype",
        f"to repair it: python -m scripts.postprocess --source {TINY} --from-hf {saves / form} --out",
    ]
    absent = {
        "hybrid": ["quantized anew", "'int', 4"],
        "gptq": ["but dequantized", "'int', 4"],
        "hf": ["but dequantized", "C13", "'int', 4"],
    }
    said = said_of(saves / form)
    for fact in expected:
        assert (fact in said) == (not any(part in fact for part in absent[form])), f"{fact} in\n{said}"
    assert "no layout" not in said, "every name of a real save is understood"
    assert len(said.splitlines()) <= 11


def test_without_a_source_the_folder_s_own_config_says_what_must_be_there(saves: Path) -> None:
    found = recognized(saves / "hf")
    assert found and "(C2)" in "\n".join(found.problems()) and "--source DIR" in found.problems()[-1]


def test_a_config_that_transformers_wrote_needs_the_source_s(hybrid: Path) -> None:
    configure(hybrid, lambda raw: raw.pop("compress_ratios"))  # it writes layer_types instead
    found = recognized(hybrid)
    assert found and found.problems()[-1].startswith("pass --source")
    assert "compress_ratios" in said_of(hybrid)


@pytest.mark.parametrize("form", REPAIRABLE)
def test_a_repaired_save_passes_verify_with_its_codes_untouched(saves: Path, form: str) -> None:
    fixed, theirs = saves / f"fixed-{form}", everything(saves / form)
    method = "gptq" if form == "gptq" else "rtn"
    assert run_here("verify", "--artifact", fixed, "--source", TINY, "--expect", method) == 0
    ours, (prefix, names) = everything(fixed), EXPERTS[form]
    config = layout.load_config(TINY)
    compared = 0
    for layer in config.layers:
        for expert in range(config.n_routed_experts):
            for which, name in zip(("w1", "w2", "w3"), names, strict=True):
                for part in ("weight_packed", "weight_scale", "weight_shape"):
                    found = ours[f"layers.{layer}.ffn.experts.{expert}.{which}.{part}"]
                    assert same(found, theirs[f"{prefix.format(layer, expert)}{name}.{part}"])
                    compared += 1
    assert compared == sum("experts" in name and "shared" not in name for name in theirs)
    assert recognized(fixed) is None


@pytest.mark.parametrize("form", REPAIRABLE)
def test_every_name_stands_for_the_tensor_that_it_is_taken_for(saves: Path, form: str) -> None:
    """By value: what the save did not round is the source's."""
    theirs, ours = opened(saves / form), everything(saves / f"fixed-{form}")
    used = {name: theirs.stored(name) for name in ours}
    assert set(used.values()) - {None} == theirs.weight_map.keys()
    alike = [n for n, t in used.items() if t and torch.equal(ours[n].float(), theirs.read(t).float())]
    rounded = [n for n, t in used.items() if t and n not in alike]
    assert len(alike) > 340
    assert all(".attn.w" in n or rule_for(n).source == "f32" for n in rounded), rounded


def test_the_manifest_and_the_card_say_where_the_experts_are_from(saves: Path) -> None:
    fixed = saves / "fixed-hf"
    calibration = read_json(fixed / "manifest.json")["calibration"]
    assert calibration["from"].startswith("routed experts saved by llm-compressor through transformers")
    shards = {path.name for path in (saves / "hf").glob("*.safetensors")}
    assert len(shards) > 1 and calibration["files"].keys() == shards | {INDEX, "config.json"}
    assert calibration["from"] in card.text(card_subject.gathered(saves / "none", fixed))


def without(part: str) -> Callable[[Tensors], None]:
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if part in name].clear()


def with_part(part: str, make: Callable[[Tensors], Tensor]) -> Callable[[Path], None]:
    return edited(lambda tensors: tensors.update({f"{MATRIX}.{part}": make(tensors)}))


def edited(change: Callable[[Tensors], object]) -> Callable[[Path], None]:
    """A change of the tensors of the one shard, which then has an index."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / SINGLE)
        change(tensors)
        write_shard(folder / SINGLE, tensors)

    return apply


def restated(key: str, value: Any) -> Callable[[Path], None]:
    return lambda folder: configure(
        folder, lambda raw: raw["quantization_config"]["config_groups"]["group_0"]["weights"].update({key: value})
    )


def escaping(folder: Path) -> None:
    shutil.copyfile(folder / SINGLE, folder.parent / "outside.safetensors")
    write_index(folder, dict.fromkeys(load_file(folder / SINGLE), "../outside.safetensors"), 0)


def lost_shard(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    write_index(folder, {n: "other.safetensors" if n.startswith(MATRIX) else SINGLE for n in tensors}, 0)


def inexact(tensors: Tensors) -> Tensor:
    return tensors[f"{MATRIX}.weight_scale"].float() * (1 + 2**-12)


SCALE, PACKED = f"{MATRIX}.weight_scale", f"{MATRIX}.weight_packed"
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "zero points": (
        with_part("weight_zero_point", lambda _: torch.zeros(32, 2, dtype=torch.int32)),
        f"{MATRIX}.weight_zero_point says that the matrix is asymmetric",
    ),
    "a permutation": (
        with_part("weight_g_idx", lambda _: torch.arange(256, dtype=torch.int32) // 128),
        f"{MATRIX}.weight_g_idx says that the matrix is permuted (actorder 'group')",
    ),
    "8 bits": (
        with_part("weight_packed", lambda t: t[PACKED].repeat(1, 2)),
        f"{PACKED} is I32 [256, 64], INT4 in groups of 128 is I32 [256, 32]",
    ),
    "groups of 64": (
        with_part("weight_scale", lambda t: t[SCALE].repeat(1, 2)),
        f"{SCALE} is BF16 [256, 4], INT4 in groups of 128 is BF16 [256, 2]",
    ),
    "a scheme of 8 bits": (restated("num_bits", 8), "config.json states num_bits 8 for the experts' weights"),
    "a scheme of channels": (restated("strategy", "channel"), "config.json states strategy channel"),
    "an F32 scale that BF16 cannot hold": (
        with_part("weight_scale", inexact),
        f"{SCALE} is F32 and not exact in BF16",
    ),
    "an F16 scale that BF16 cannot hold": (
        with_part("weight_scale", lambda t: inexact(t).to(torch.float16) + 2**-15),
        f"{SCALE} is F16 and not exact in BF16",
    ),
    "a matrix without scale": (edited(without(SCALE)), f"{SCALE} is missing"),
    "a missing expert": (edited(without(MATRIX)), "layers.1.ffn.experts.2.w3.weight is not in "),
    "an expert twice": (
        edited(lambda t: t.update({n.replace("ffn", "mlp"): t[n].clone() for n in list(t) if n.startswith(MATRIX)})),
        "layers.1.ffn.experts.2.w3.weight is 2 times in ",
    ),
    "another shape": (
        with_part("weight_shape", lambda _: torch.tensor([256, 128])),
        f"{MATRIX}.weight_shape is [256, 128], config.json asks for [256, 256]",
    ),
    "experts that are not quantized": (
        edited(lambda t: (without(MATRIX)(t), t.update({f"{MATRIX}.weight": torch.zeros(256, 256)}))),
        f"{MATRIX}.weight says that the matrix is not quantized",
    ),
    "a missing shard": (lost_shard, "shard {folder}/other.safetensors is missing or damaged: no file"),
    "a truncated file": (
        lambda folder: (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-1]),
        "{folder}/" + SINGLE + " is not a list of safetensors in its folder",
    ),
    "an index that leaves the folder": (escaping, "{folder}/" + INDEX + " is not a list of safetensors"),
    "no folder": (shutil.rmtree, "{folder} holds neither " + INDEX + " nor " + SINGLE),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_artifact_cannot_hold_is_refused_before_anything_is_written(
    hybrid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    damage, fact = REFUSED[what]
    damage(hybrid)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert run_here("postprocess", *repairing(hybrid, tmp_path / "out")) == 1
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: " + fact.format(folder=hybrid)) and hint.startswith("hint: ")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    if (found := recognized(hybrid)) and "weight_shape" not in fact and "not exact" not in fact:  # those need reading
        assert found.problems(Checkpoint(TINY))[-1].startswith(f"cannot be repaired: {fact.format(folder=hybrid)}")


def test_a_real_asymmetric_save_is_refused(saves: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "96 tensors of experts in another form: asymmetric" in said_of(saves / "asymmetric")
    assert run_here("postprocess", *repairing(saves / "asymmetric", tmp_path / "out")) == 1
    assert "weight_zero_point says that the matrix is asymmetric" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_scale_in_f32_that_bf16_holds_is_kept(saves: Path, hybrid: Path, tmp_path: Path) -> None:
    with_part("weight_scale", lambda t: t[SCALE].float())(hybrid)
    assert run_here("postprocess", *repairing(hybrid, tmp_path / "out")) == 0
    found, wanted = everything(tmp_path / "out"), everything(saves / "fixed-hybrid")
    assert found.keys() == wanted.keys() and all(same(found[n], wanted[n]) for n in wanted)


def test_what_only_values_tell_is_left_to_verify(
    hybrid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As experts that no calibration token reached: all codes alike."""
    with_part("weight_packed", lambda t: torch.full_like(t[PACKED], -0x77777778))(hybrid)
    with_part("weight_scale", lambda t: t[SCALE].fill_(float("nan")))(hybrid)
    assert run_here("postprocess", *repairing(hybrid, tmp_path / "out")) == 0
    assert run_here("verify", "--artifact", tmp_path / "out") == 1
    assert "layers.1.ffn.experts.2.w3" in capsys.readouterr().out


def test_quantized_mtp_experts_are_named_and_left_behind(saves: Path, hybrid: Path, tmp_path: Path) -> None:
    def attach(tensors: Tensors) -> None:
        tensors |= {
            n.replace("model.layers.0", "mtp.0"): t.clone() for n, t in tensors.items() if "layers.0.ffn.experts" in n
        }

    edited(attach)(hybrid)
    groups: dict[str, Any] = {"targets": [r"re:.*experts.*\.(w1|w2|w3|gate_proj|up_proj|down_proj)$"]}
    configure(hybrid, lambda raw: raw["quantization_config"]["config_groups"]["group_0"].update(groups))
    said = said_of(hybrid)
    assert "72 tensors of the MTP block quantized (C10): mtp.0.ffn.experts.0.down_proj.weight_packed" in said
    assert "(C10: targets reach into the MTP block)" in said
    assert run_here("postprocess", *repairing(hybrid, tmp_path / "out")) == 0
    assert everything(tmp_path / "out").keys() == everything(saves / "fixed-hybrid").keys()


def test_an_artifact_with_our_names_can_be_repaired_too(saves: Path, tmp_path: Path) -> None:
    """Of someone who renamed the tensors but dropped the MTP block."""
    folder = Path(shutil.copytree(saves / "fixed-gptq", tmp_path / "renamed"))
    edit(folder, without("mtp."))
    assert recognized(folder) is None
    assert run_here("postprocess", *repairing(folder, tmp_path / "out")) == 0
    assert run_here("verify", "--artifact", tmp_path / "out", "--source", TINY, "--expect", "gptq") == 0


@pytest.mark.slow
def test_killed_in_a_layer_and_run_again_gives_the_same_bytes(
    saves: Path, tmp_path: Path, fork_server: ForkServer
) -> None:
    out = tmp_path / "out"
    arguments = [str(each) for each in repairing(saves / "hf", out)]
    assert fork_server.run("postprocess", arguments, tmp_path / "log", Death("half", count=250)) == -9
    shards = sorted(path for path in out.iterdir() if SHARD.fullmatch(path.name))
    assert 1 <= len(shards) < 4 and not (out / "SHA256SUMS").exists()
    kept = {path: path.stat().st_ino for path in shards}
    assert run_here("postprocess", *repairing(saves / "hf", out)) == 0
    assert {path: path.stat().st_ino for path in shards} == kept, "finished layers stay"
    wanted = contents(saves / "fixed-hf")
    assert contents(out) == {name: content for name, content in wanted.items() if name != "certificate.json"}


NESTED = "[" * 100_000
GARBAGE: dict[str, Callable[[Path], object]] = {
    "an index of nonsense": lambda folder: (folder / INDEX).write_text('{"weight_map": [3]}'),
    "an index of numbers": lambda folder: (folder / INDEX).write_text('{"weight_map": {"a": 3}}'),
    "a deep index": lambda folder: (folder / INDEX).write_text(NESTED),
    "an index that is a folder": lambda folder: ((folder / SINGLE).unlink(), (folder / INDEX).mkdir()),
    "a shard that is a folder": lambda folder: ((folder / SINGLE).unlink(), (folder / SINGLE).mkdir()),
    "another model": lambda folder: configure(folder, lambda raw: raw.update(model_type="llama")),
    "an empty file": lambda folder: (folder / SINGLE).write_bytes(b""),
    "nothing": shutil.rmtree,
    "an index that leaves the folder": escaping,
}


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_is_nobody_s(hybrid: Path, what: str) -> None:
    GARBAGE[what](hybrid)
    assert recognized(hybrid) is None


def test_a_pickle_is_not_loaded(hybrid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = tmp_path / "loaded"
    (hybrid / SINGLE).write_bytes(f"cposix\nsystem\n(S'touch {told}'\ntR.".encode())
    write_index(hybrid, {MATRIX + ".weight_packed": SINGLE}, 0)
    found = recognized(hybrid)
    assert found and "is missing or damaged" in found.problems(Checkpoint(TINY))[1]
    assert run_here("postprocess", *repairing(hybrid, tmp_path / "out")) == 1
    assert not told.exists()


def test_names_of_an_untrusted_folder_stay_on_their_line(hybrid: Path) -> None:
    edited(lambda tensors: tensors.update({"a\n\x1b[31mcertificate: ok" + "x" * 999: torch.zeros(1)}))(hybrid)
    line = next(line for line in said_of(hybrid).splitlines() if "no layout" in line)
    assert "\x1b" not in line and len(line) < 300


def test_ours_and_upstream_s_folders_are_not_foreign(saves: Path) -> None:
    assert recognized(TINY) is recognized(saves / "bf16") is recognized(saves / "fixed-gptq") is None


@pytest.mark.parametrize("origin", [[], ["--work", "w", "--from-hf", "f"]])
def test_postprocess_takes_a_calibration_or_a_foreign_folder(
    capsys: pytest.CaptureFixture[str], origin: list[str]
) -> None:
    assert run_here("postprocess", "--source", "s", "--out", "o", *origin) == 2
    assert "--from-hf" in capsys.readouterr().err


def test_the_foreign_folder_is_not_written_into(hybrid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(hybrid)
    assert run_here("postprocess", *repairing(hybrid, hybrid)) == 1
    assert "is an input" in capsys.readouterr().err
    assert contents(hybrid) == before
