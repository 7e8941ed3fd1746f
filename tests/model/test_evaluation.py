"""model.evaluation: several checkpoints in one pass against each by itself, and figures against their definitions."""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import mpmath
import pytest
import torch
from programs import FORMS
from rich.console import Console
from synthetic import edit, write_checkpoint
from torch import Tensor

from v4forge.checkpoint.prefetch import Reader
from v4forge.checkpoint.reader import Checkpoint
from v4forge.errors import UserError
from v4forge.intervals import quantile
from v4forge.model import deepseek_v4, drafts, evaluation, experts, forward
from v4forge.model import mtp as model_mtp
from v4forge.model.evaluation import Quality, compare, divergence
from v4forge.profiling import Watch, seconds
from v4forge.quantization import calibrate, layer_files
from v4forge.quantization.postprocess import assemble

CPU = torch.device("cpu")
FORM = FORMS["other"]
SEQUENCES, SEQ_LEN = 5, 150  # more than one sliding window


@dataclass
class Case:
    """A source, its round-to-nearest artifact, another source of the same form, and what `compare` says of them."""

    models: list[Checkpoint]
    tokens: Tensor
    watch: Watch
    steps: list[tuple[int, str]]
    qualities: list[Quality]
    judged: list[tuple[Tensor, Tensor, Tensor]]  # drafts, choices and text of each model's micro-batches


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("evaluation")
    for seed in (0, 1):
        config = write_checkpoint(folder / f"source-{seed}", seed=seed, **FORM)
    source = Checkpoint(folder / "source-0")
    settings = layer_files.Settings(method="rtn")
    digests = layer_files.source_digests(source.directory, source.shard_names, folder / ".stamps" / "digests.json")
    mark = layer_files.fingerprint(digests, None, settings, CPU)
    layer_files.claim(folder / "layers", mark, "refuse", print)
    calibrate.calibrate(source, None, folder / "layers", settings, mark, CPU)
    assemble(source, folder / "layers", folder / "artifact")
    models = [source, Checkpoint(folder / "artifact", form="artifact"), Checkpoint(folder / "source-1")]
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(config.vocab_size, (SEQUENCES, SEQ_LEN), generator=generator)
    watch, steps, judged = Watch(CPU), [], []

    def recorded(*arguments: Tensor) -> drafts.Counts:
        judged.append(arguments)
        return judge(*arguments)

    judge = drafts.judge
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(evaluation.FORWARD_TOKENS, "cpu", 2 * SEQ_LEN)  # micro-batches of 2, 2 and 1
        patch.setattr(forward, "GROUP_BYTES", 600_000)  # a few experts at a time
        patch.setattr(drafts, "judge", recorded)
        qualities = compare(models, tokens, CPU, lambda done, what: steps.append((done, what)), watch)
    return Case(models, tokens, watch, steps, qualities, judged)


@torch.no_grad()
def alone(checkpoint: Checkpoint, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [batch, seq, vocab] f32 and first drafts [batch, seq - 1] of one model, whole layers loaded one by one."""
    weights, config = deepseek_v4.Weights(checkpoint, CPU), deepseek_v4.hf_config(checkpoint.config)
    rotary, root = deepseek_v4.Rotary(config, CPU, torch.bfloat16), deepseek_v4.load_root(weights, config)
    streams = deepseek_v4.embed(root, config, tokens)
    for index in checkpoint.config.layers:
        streams = deepseek_v4.run_layer(deepseek_v4.load_layer(weights, config, index), streams, rotary.context(tokens))
    mtp, following = model_mtp.load_mtp(weights, config), rotary.context(tokens[:, 1:])
    drafted = mtp(streams[:, :-1], root.embed[following.input_ids], following)
    return root.final(streams, root.head), mtp.head(drafted, root.head).argmax(-1)


def log_softmax(logits: Tensor) -> Tensor:
    shifted = logits.double() - logits.double().amax(-1, keepdim=True)
    return shifted - shifted.exp().sum(-1, keepdim=True).log()


def assert_near(found: Tensor, wanted: Tensor, rtol: float, atol: float) -> None:
    """All but one token in a hundred, of which rounding may make a near tie of experts another choice."""
    assert float(torch.isclose(found, wanted, rtol=rtol, atol=atol).double().mean()) > 0.99


def test_one_pass_gives_what_each_model_gives_alone(case: Case) -> None:
    """Up to BF16 rounding, where a product has another number of rows."""
    reference, _ = alone(case.models[0], case.tokens)
    for number, (checkpoint, quality) in enumerate(zip(case.models, case.qualities, strict=True)):
        logits, drafted = alone(checkpoint, case.tokens)
        ours, first = log_softmax(logits)[:, :-1], log_softmax(reference)[:, :-1]
        nll = -ours.gather(2, case.tokens[:, 1:, None])[..., 0]
        assert_near(quality.nll, nll, rtol=0, atol=0.05)
        assert quality.perplexity == pytest.approx(math.exp(float(nll.mean())), rel=2e-3)
        kl = (first.exp() * (first - ours)).sum(-1)
        assert_near(quality.kl, kl, rtol=0.1, atol=2e-3)
        assert float(quality.kl.mean()) == pytest.approx(float(kl.mean()), rel=0.02, abs=1e-12)
        agrees = logits.argmax(-1) == reference.argmax(-1)
        assert float((quality.agrees != agrees[:, :-1]).double().mean()) < 0.02
        drafts_made, choices, texts, _ = zip(*case.judged[3 * number : 3 * number + 3], strict=True)
        assert torch.equal(torch.cat(texts), case.tokens)
        assert float((torch.cat(choices) != logits.argmax(-1)).double().mean()) < 0.02
        assert float((torch.cat(drafts_made, 1)[0] != drafted).double().mean()) < 0.02
        assert quality.judged[0].tolist() == [SEQ_LEN - 1] * SEQUENCES


def test_the_artifact_is_closer_to_its_source_than_another_model(case: Case) -> None:
    source, artifact, other = case.qualities
    assert (source.kl == 0).all() and (source.agrees == 1).all()
    assert 0 < 10 * artifact.kl.mean() < other.kl.mean()
    assert evaluation.agreement(other).high < evaluation.agreement(artifact).low < 1


def test_sequences_of_any_lengths_keep_their_places(case: Case) -> None:
    lengths = [40, 150, 5, 40, 150]
    found = compare(case.models[:2], [row[:n] for row, n in zip(case.tokens, lengths, strict=True)], CPU)[1]
    assert found.tokens == sum(lengths) - len(lengths)
    assert found.nll.isfinite().sum(1).tolist() == [n - 1 for n in lengths]
    for row, n in enumerate(lengths):  # what precedes decides: the same text is as likely in a longer sequence
        for name in ("nll", "kl"):
            whole = getattr(case.qualities[1], name)
            torch.testing.assert_close(getattr(found, name)[row, : n - 1], whole[row, : n - 1], rtol=0.1, atol=0.05)
    assert found.judged[0].tolist() == [n - 1 for n in lengths]


def test_each_layer_has_spans_and_progress_reaches_its_end(case: Case) -> None:
    count = len(case.models[0].config.layers)
    for index in range(count):
        assert {"read", "decode", "attention", "experts"} == set(seconds(case.watch.spans(index)))
    assert {"head", "drafts"} <= set(seconds(case.watch.spans(count)))
    assert [done for done, _ in case.steps] == list(range(evaluation.step_count(case.models)))


@pytest.mark.parametrize(
    ("weight", "where"),
    [
        ("layers.1.ffn_norm.weight", "layer 1"),
        ("norm.weight", "the head"),
        ("mtp.0.enorm.weight", "the MTP block"),
    ],
)
def test_a_model_that_leaves_the_finite_numbers_is_named_with_the_place(
    case: Case, tmp_path: Path, weight: str, where: str
) -> None:
    write_checkpoint(tmp_path / "broken", **FORM)

    def enlarge(tensors: dict[str, Tensor]) -> None:
        if weight in tensors:
            tensors[weight] = torch.full_like(tensors[weight], 3e38)

    edit(tmp_path / "broken", enlarge)
    with pytest.raises(UserError, match=f"^{where} of .*broken puts out NaN or Inf"):
        compare([case.models[0], Checkpoint(tmp_path / "broken")], case.tokens[:2, :20], CPU)


@pytest.mark.parametrize("prefix", ["layers.2.", "mtp.0."])
@pytest.mark.parametrize("which", [0, 1], ids=["source", "artifact"])
def test_experts_decoded_together_are_those_decoded_one_by_one(case: Case, prefix: str, which: int) -> None:
    checkpoint, numbers = case.models[which], range(3, 8)
    with Reader(checkpoint, [(0, experts.stored_order(checkpoint, prefix, numbers))], 0, CPU, Watch(CPU)) as reader:
        gate_up, down = experts.decoded(checkpoint, prefix, numbers, next(reader))
    inner, hidden = checkpoint.config.moe_intermediate_size, checkpoint.config.hidden_size
    for i, e in enumerate(numbers):
        w1, w3 = (checkpoint.load(f"{prefix}ffn.experts.{e}.{w}.weight", (inner, hidden)) for w in ("w1", "w3"))
        assert torch.equal(gate_up[i], torch.cat((w1, w3)))
        assert torch.equal(down[i], checkpoint.load(f"{prefix}ffn.experts.{e}.w2.weight", (hidden, inner)))


@pytest.mark.parametrize("name", ["layers.1.ffn.experts.7.w2.weight_scale", "mtp.0.ffn.experts.3.w1.weight"])
def test_an_expert_that_does_not_decode_is_named(case: Case, tmp_path: Path, name: str) -> None:
    for path in case.models[1].directory.glob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())

    def spoil(tensors: dict[str, Tensor]) -> None:
        if name in tensors:
            tensors[name][0, 0] = math.nan

    edit(tmp_path, spoil)
    with pytest.raises(UserError, match=rf"{name.rpartition('.')[0]}.weight holds NaN or Inf"):
        compare([Checkpoint(tmp_path, form="artifact")], case.tokens[:1, :20], CPU)


def test_models_that_do_not_belong_together_are_refused(case: Case, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, **FORM | {"vocab_size": 96})
    with pytest.raises(UserError, match=r"vocab_size 1024, .* has 96"):
        compare([case.models[0], Checkpoint(tmp_path)], case.tokens, CPU)
    with pytest.raises(UserError, match="fewer than 5 tokens"):
        compare(case.models[:1], case.tokens[:, :4], CPU)


@pytest.mark.parametrize("size", [1e-7, 1e-3, 1.0, 30.0])
def test_divergence_keeps_its_digits_however_small(size: float) -> None:
    generator = torch.Generator().manual_seed(2)
    p, q = 5 * torch.randn(2, 40, generator=generator, dtype=torch.float64)
    q = p + size * q
    with mpmath.workdps(60):
        both = [[mpmath.mpf(x) for x in each.tolist()] for each in (p, q)]
        logs = [[x - mpmath.log(sum(map(mpmath.exp, each))) for x in each] for each in both]
        exact = sum(mpmath.exp(a) * (a - b) for a, b in zip(*logs, strict=True))
    found = float(divergence(p.log_softmax(-1), q.log_softmax(-1)))
    assert found == pytest.approx(float(exact), rel=1e-9, abs=1e-15)


def counted(judged: list[list[int]], accepted: list[list[int]]) -> Quality:
    values = torch.arange(12, dtype=torch.float64).view(2, 6) / 10
    return Quality(values, values, values, torch.tensor(judged), torch.tensor(accepted))


def test_drafts_accepted_a_step_are_the_sum_of_the_chances_to_get_that_far() -> None:
    quality = counted([[10, 30], [10, 10], [5, 0]], [[6, 24], [5, 5], [1, 0]])
    assert quality.mtp_acceptance == 0.75
    assert quality.accepted_per_step(1).value == pytest.approx(0.75)
    assert quality.accepted_per_step(3).value == pytest.approx(0.75 + 0.75 * 0.5 + 0.75 * 0.5 * 0.2)
    rates = [each["acceptance_rate"]["value"] for each in evaluation.figures([quality], ["x"])["models"]["x"]["drafts"]]
    assert rates == pytest.approx([0.75, (0.75 + 0.375) / 2, (0.75 + 0.375 + 0.075) / 3])


def test_what_follows_a_draft_that_is_never_accepted_adds_nothing() -> None:
    never = counted([[9, 9], [0, 0], [0, 0]], [[0, 0], [0, 0], [0, 0]])
    assert never.accepted_per_step(3).value == 0
    lost = counted([[9, 9], [0, 0]], [[4, 0], [0, 0]])  # the text never went on with what was accepted
    assert math.isnan(lost.accepted_per_step(2).value)
    figures = json.dumps(evaluation.figures([lost], ["x"]), allow_nan=False)
    assert json.loads(figures)["models"]["x"]["drafts"][1]["acceptance_rate"]["value"] is None
    evaluation.table([lost], ["x"])


def test_the_change_of_perplexity_is_paired(case: Case) -> None:
    source, artifact, _ = case.qualities
    change = evaluation.perplexity_change(artifact, source)
    assert change.value == pytest.approx(100 * (artifact.perplexity / source.perplexity - 1))
    each = 100 * (torch.exp((artifact.nll - source.nll).mean(1)) - 1)
    half = quantile(SEQUENCES - 1) * float(each.std()) / math.sqrt(SEQUENCES)
    assert (change.high - change.low) / 2 == pytest.approx(half, rel=0.02)
    alone = evaluation.mean(artifact.nll).interval()
    assert change.high - change.low < 100 * (alone.high - alone.low), "pairing takes the text's own spread away"


def test_the_percentile_is_a_value_that_the_share_does_not_exceed() -> None:
    values = torch.tensor([[3.0, math.nan, 1.0], [2.0, 5.0, 4.0]])
    assert [evaluation.percentile(values, level) for level in (0.2, 0.21, 0.8, 0.99)] == [1, 2, 4, 5]


def test_figures_are_json_and_the_table_shows_them(case: Case) -> None:
    names = ["source", "artifact", "other"]
    figures = json.loads(json.dumps(evaluation.figures(case.qualities, names), allow_nan=False))
    assert figures["tokens"] == SEQUENCES * (SEQ_LEN - 1) and figures["seq_len"] == SEQ_LEN
    assert list(figures["models"]) == names
    artifact = figures["models"]["artifact"]
    assert artifact["kl_nats"]["mean"]["low"] < artifact["kl_nats"]["mean"]["value"] < artifact["kl_nats"]["p99"]
    console = Console(width=160, file=io.StringIO())
    console.print(evaluation.table(case.qualities, names))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for value in (f"{artifact['perplexity']['value']:.3f} (", f"{artifact['top1_agreement']['value']:.1%} ("):
        assert value in shown


def test_one_sequence_has_figures_without_intervals(case: Case) -> None:
    pieces = {name: value[:1] for name, value in vars(case.qualities[1]).items() if value.shape[0] == SEQUENCES}
    counts = {name: getattr(case.qualities[1], name)[:, :1] for name in ("judged", "accepted")}
    one = replace(case.qualities[1], **pieces | counts)
    found = json.loads(json.dumps(evaluation.figures([one, one]), allow_nan=False))["models"]["artifact"]
    assert found["perplexity"]["low"] is None and found["drafts"][0]["acceptance_rate"]["high"] is None
