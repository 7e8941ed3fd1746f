"""One decoder layer on its way through the calibration loop: attended, then quantized a few experts at a time.

Nothing holds all experts of a layer: their tokens come sorted by expert, and each expert's weights, Hessians, codes and
outputs are made from them in one go.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from v4forge.checkpoint import layout
from v4forge.checkpoint.conversion import converted
from v4forge.checkpoint.formats import Shape
from v4forge.checkpoint.prefetch import Group, Reader, done, on_host
from v4forge.checkpoint.reader import Checkpoint
from v4forge.checkpoint.recipe import rule_for
from v4forge.checkpoint.writer import SharedShard, matrix_digest
from v4forge.errors import UserError
from v4forge.files import write_json
from v4forge.model import deepseek_v4
from v4forge.model import experts as model_experts
from v4forge.model.distributed import Ranks
from v4forge.model.expert_dispatch import Dispatch
from v4forge.profiling import Watch, seconds
from v4forge.quantization import experts, gptq, hidden_states, layer_files, layer_reports

# Experts at a time. On the CPU one, whose bits then depend on nothing else.
EXPERT_BATCH = {"cuda": 32, "cpu": 1}


@dataclass(frozen=True)
class Run:
    """What one run of the loop works with."""

    source: Checkpoint
    work: Path
    settings: layer_files.Settings
    digest: str  # of the fingerprint
    device: torch.device
    ranks: Ranks
    watch: Watch
    progress: Callable[[int, str], None]
    log: Callable[[str], None]
    finished: Callable[[Mapping[str, Any]], None]  # gets the report of a layer whose file has its name, on rank 0

    def steps(self) -> list[list[range]]:
        """Which experts each rank handles in each step: steps()[i][r]."""
        count, batch = self.source.config.n_routed_experts, EXPERT_BATCH[self.device.type]
        shares = [self.ranks.share(count, r) for r in range(self.ranks.size)]
        longest = max(map(len, shares))
        return [
            [range(s.start + min(i, len(s)), s.start + min(i + batch, len(s))) for s in shares]
            for i in range(0, longest, batch)
        ]

    def own_steps(self) -> list[range]:
        return [step[self.ranks.rank] for step in self.steps()]


def stored_parts(name: str, shape: Shape) -> list[str]:
    """The names under which upstream stores a logical tensor."""
    return list(layout.stored(name, shape, rule_for(name).source))


def groups_of(run: Run, layer: int, todo: bool) -> list[list[str]]:
    """The stored tensors of a layer in the order in which they are needed: what attends, then the experts by steps."""
    shapes = dict(layout.layer_parameters(run.source.config, layer))
    frame = [
        part
        for name, shape in shapes.items()
        if not deepseek_v4.EXPERT.search(name)
        for part in stored_parts(name, shape)
    ]
    if not todo:
        return [frame]
    return [frame, *(model_experts.stored_order(run.source, f"layers.{layer}.", step) for step in run.own_steps())]


@dataclass
class Layer:
    """One layer on its way through the loop."""

    run: Run
    index: int
    writer: ThreadPoolExecutor
    todo: bool  # or is it finished, and only run again on its experts as served
    shard: SharedShard | None = None
    reserved: list[Future[None]] = field(default_factory=list)
    notes: dict[int, dict[str, Any]] = field(default_factory=dict)  # by expert of this rank
    counts: list[int] = field(default_factory=list)  # tokens by expert, of all ranks
    peak_gpu_bytes: int = 0
    writes: list[Future[None]] = field(default_factory=list)

    @property
    def kept(self) -> bool:
        """Whether the recipe keeps its experts as upstream stores them."""
        return self.index < self.run.source.config.fp4_layers

    def attend(
        self,
        reader: Reader,
        hf_config: Any,
        streams: list[Tensor],
        batches: Sequence[Tensor],
        rotary: deepseek_v4.Rotary,
    ) -> list[deepseek_v4.Attended]:
        """All but the routed experts, of this rank's micro-batches. Empties `streams`, which enter the layer."""
        run, watch = self.run, self.run.watch
        if run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(run.device)
        watch.begin(self.index)
        run.progress(self.index, "forward")
        frame = next(reader)
        with watch.compute("decode"):
            view = run.source.holding(frame.on(run.device).tensors())
            if self.todo:
                self.open(view)
            module = deepseek_v4.load_layer(deepseek_v4.Weights(view, run.device), hf_config, self.index, experts=False)
        with watch.compute("forward 1"):
            return [deepseek_v4.attend(module, streams.pop(0), rotary.context(batch)) for batch in batches]

    def mix(self, attended: list[deepseek_v4.Attended], reader: Reader, limit: float, last: bool) -> list[Tensor]:
        """The routed experts, quantized where they are not, and the streams that leave the layer; none of the last."""
        run = self.run
        routed = self.route(attended, reader, limit)
        outputs: list[Tensor] = []
        if routed is not None and not last:
            with run.watch.compute("forward 2"):
                parts = routed.split([batch.indices.numel() for batch in attended])
                for batch, part in zip(attended, parts, strict=True):
                    outputs.append(deepseek_v4.combine(batch, deepseek_v4.weighted_sum(part, batch.weights)))
                    batch.carried = batch.x  # frees the streams that have been used
        if run.device.type == "cuda":
            self.peak_gpu_bytes = torch.cuda.max_memory_allocated(run.device)
        return outputs

    def reserve(self) -> None:
        """Rank 0 starts to make the layer's file, which takes a moment: the layer before is still computing."""
        run, source = self.run, self.run.source
        if not self.todo:
            return
        specs = {
            stored: spec
            for name, shape in layout.layer_parameters(source.config, self.index)
            for stored, spec in layout.stored(name, shape, source.config.rule_for(name).artifact).items()
        }
        for name, spec in specs.items():  # an integer table keeps its source's width
            if spec.dtype == "I64" and name in source.weight_map:
                specs[name] = source.spec(name)
        self.shard = SharedShard(layer_files.layer_file(run.work, self.index), specs, {"fingerprint": run.digest})
        if run.ranks.rank == 0:
            self.reserved.append(self.writer.submit(self.shard.create))

    def open(self, source: Checkpoint) -> None:
        """Opens the layer's file, and writes this rank's part of what is not an expert's, which `source` holds."""
        run = self.run
        assert self.shard is not None
        done(self.reserved)
        run.ranks.barrier()
        self.shard.open()
        rest = [
            each
            for each in layout.layer_parameters(source.config, self.index)
            if not deepseek_v4.EXPERT.search(each[0])
        ]
        for name, shape in rest[run.ranks.rank :: run.ranks.size]:
            self._write(on_host(converted(source, name, shape)))

    def _write(self, ready: Callable[[], dict[str, Tensor]]) -> None:
        shard, watch, index = self.shard, self.run.watch, self.index
        assert shard is not None

        def job() -> None:
            tensors = ready()
            start = watch.now()
            shard.write(tensors)
            watch.add(index, "write", "write", start, sum(t.numel() * t.element_size() for t in tensors.values()))

        self.writes.append(self.writer.submit(job))

    def keep(self, number: int, streams: Tensor) -> Future[None]:
        """Starts to write a micro-batch's hidden states behind this layer."""
        run, before = self.run, self.index + 1
        ready = on_host({"streams": streams})

        def job() -> None:
            tensors = ready()
            start = run.watch.now()
            hidden_states.save(run.work, before, number, tensors["streams"], run.digest)
            run.watch.add(self.index, "hidden states", "write", start, streams.numel() * streams.element_size())

        return self.writer.submit(job)

    def route(self, attended: list[deepseek_v4.Attended], reader: Reader, limit: float) -> Tensor | None:
        """Every expert's work, step by step -> the experts' outputs [tokens * top_k, hidden], None without a corpus."""
        run, watch, config = self.run, self.run.watch, self.run.source.config
        dispatch = None
        shared: experts.Shared | None = None
        if run.settings.method == "gptq" or attended:
            with watch.compute("sort"):
                dispatch = self._dispatch(attended)
                self.counts = dispatch.counts
            if self.todo and not self.kept:
                with watch.compute("Hessian"):
                    shared = self._shared(attended, dispatch)
        for step in run.steps():
            own = step[run.ranks.rank]
            run.progress(self.index, f"experts {step[0].start}-{step[0].stop - 1}" if step[0] else "experts")
            with watch.compute("sort"):
                rows = dispatch.rows(step) if dispatch else []
            if self.todo:
                group = next(reader)
                served = self._made(own, group, rows, limit, shared) if own else None
            else:
                served = experts.read_experts(run.work, config, self.index, own, run.device) if own else None
            if dispatch is None:
                continue
            with watch.compute("forward 2"):
                outputs = []
                for i, x in enumerate(rows):
                    assert served is not None
                    outputs.append(deepseek_v4.expert(x, served[0][i], served[1][i], limit))
                dispatch.give_back(outputs)
            del rows, served, outputs
        return dispatch.routed if dispatch else None

    def _dispatch(self, attended: list[deepseek_v4.Attended]) -> Dispatch:
        run, config = self.run, self.run.source.config
        if attended:
            x = torch.cat([batch.x for batch in attended])
            indices = torch.cat([batch.indices for batch in attended])
            start = 0
            for batch in attended:  # views of the whole, so that it is there once
                batch.x = x[start : start + len(batch.x)]
                start += len(batch.x)
        else:  # a rank without samples
            x = torch.empty(0, config.hidden_size, dtype=torch.bfloat16, device=run.device)
            indices = torch.empty(0, config.num_experts_per_tok, dtype=torch.int64, device=run.device)
        return Dispatch(run.ranks, x, indices, config.n_routed_experts)

    def _shared(self, attended: list[deepseek_v4.Attended], dispatch: Dispatch) -> experts.Shared:
        """What experts share: of all tokens, or where every token goes through every expert."""
        run, config = self.run, self.run.source.config
        like = torch.empty(config.hidden_size, config.hidden_size, device=run.device)
        hessian = run.ranks.ordered_sum((gptq.gram(batch.x) for batch in attended), like) / dispatch.tokens
        if run.settings.experts == "all":
            return experts.AllTokens(hessian.unsqueeze(0), dispatch.everything())
        sample = dispatch.sample(experts.SAMPLE_FACTOR * config.moe_intermediate_size)
        return experts.Common(hessian, sample)

    def _made(
        self, own: range, group: Group, rows: list[Tensor], limit: float, shared: experts.Shared | None
    ) -> tuple[Tensor, Tensor]:
        """Starts to write some experts, quantized or as they are -> their weights as served, gate_up and down."""
        with self.run.watch.compute("decode"):
            prefix = f"layers.{self.index}."
            both = model_experts.decoded(self.run.source, prefix, own, group.on(self.run.device))
        if not self.kept:
            return self._quantized(own, *both, rows, limit, shared)
        self.notes |= {e: {} for e in own}
        stored = experts.kept(self.run.source.holding(group.tensors()), self.index, own)
        self._write(lambda: self._recorded(stored, own))
        return both

    def _quantized(
        self,
        own: range,
        gate_up: Tensor,
        down: Tensor,
        rows: list[Tensor],
        limit: float,
        shared: experts.Shared | None,
    ) -> tuple[Tensor, Tensor]:
        run, watch = self.run, self.run.watch
        h = None
        if run.settings.method == "gptq":
            assert shared is not None
            with watch.compute("Hessian"):
                h = experts.hessians(rows, gate_up, limit, shared, own)
            _refuse_nan(self.index, h)
        quantized = experts.quantize(gate_up, down, h, run.settings, own, watch)
        for i, e in enumerate(own):
            self.notes[e] = {which: {m: v[i] for m, v in by.items()} for which, by in quantized.error.items()}
        for note in h.blended if h else []:
            self.notes[note["expert"]]["blended"] = note
        for matrix in quantized.fallback:
            self.notes[int(matrix.rpartition(" ")[2])].setdefault("fallback", []).append(matrix)
        with watch.compute("pack"):
            packed = on_host(quantized.packed())
            served = quantized.gate_up.dequantized(), quantized.down.dequantized()
        self._write(lambda: self._recorded(experts.named(packed(), self.index, own), own))
        return served

    def _recorded(self, tensors: dict[str, Tensor], own: range) -> dict[str, Tensor]:
        """Notes the digest of each matrix, by which verify finds a bit that changed later."""
        for e in own:
            bases = {which: f"layers.{self.index}.ffn.experts.{e}.{which}" for which in ("w1", "w2", "w3")}
            self.notes[e]["codes"] = {
                which: matrix_digest(tensors[f"{base}.weight_packed"], tensors[f"{base}.weight_scale"])
                for which, base in bases.items()
            }
        return tensors

    def publish(self) -> None:
        """Waits until all ranks' writes are on disk, writes the report and gives the finished layer's file its name."""
        done(self.writes)
        self.run.ranks.barrier()
        if self.shard is not None:
            report = self.report()
            if report is not None:
                self.shard.publish()
            self.shard.close()
            if report is not None:
                self.run.finished(report)

    def report(self) -> dict[str, Any] | None:
        """Rank 0 writes the layer's report, before its file gets its name, and returns it."""
        run = self.run
        spent = {what: round(s, 3) for what, s in seconds(run.watch.spans(self.index)).items()}
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        told = run.ranks.gather((self.notes, {"seconds": spent, "peak_gpu": self.peak_gpu_bytes, "peak_host": host}))
        if run.ranks.rank == 0:
            notes = {e: note for each, _ in told for e, note in each.items()}
            report = layer_files.report(
                run.source.config, self.index, run.settings, run.digest, self.counts, notes, [used for _, used in told]
            )
            write_json(layer_files.layer_report(run.work, self.index), report)
            run.log(layer_reports.summary(report))
            return report
        return None


def _refuse_nan(layer: int, h: experts.Hessians) -> None:
    for each in (h.hidden, h.inner):
        if not bool(each.diagonal(dim1=-2, dim2=-1).isfinite().all()):
            raise UserError(
                f"the inputs of layer {layer}'s experts hold NaN or Inf",
                "check the source: python -m scripts.fetch --help",
            )
