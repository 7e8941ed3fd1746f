"""The layer loop of calibration: what is to be done, which layers are visited, what is kept to resume from.

While a layer computes, the next one's bytes are read and the last one's are written. A layer file holds every tensor of
its layer in the artifact's form. A run that finds files of its own fingerprint continues behind them, from the last
hidden states that were kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from v4forge.checkpoint import layout
from v4forge.checkpoint.prefetch import Reader, done
from v4forge.checkpoint.reader import Checkpoint
from v4forge.digests import Digests, cache_of, digest_of, file_sha256
from v4forge.errors import UserError
from v4forge.files import remove_leftovers
from v4forge.model import deepseek_v4
from v4forge.model.corpus import Corpus
from v4forge.model.distributed import Ranks
from v4forge.profiling import Watch
from v4forge.quantization import hidden_states
from v4forge.quantization.layer import Layer, Run, groups_of, stored_parts
from v4forge.quantization.layer_files import Settings, finished, layer_file

READ_AHEAD_BYTES = 4 << 30
WRITE_THREADS = 2
HASH_THREADS = 2  # of files of 3 GB, which take 2 s each
CHECKED_AT_A_TIME = 48  # tensors of the MTP block


def _noop(_layer: int, _what: str) -> None:
    return None


@torch.no_grad()
def calibrate(
    source: Checkpoint,
    corpus: Corpus | None,
    work: Path,
    settings: Settings,
    mark: Mapping[str, Any],
    device: torch.device,
    ranks: Ranks = Ranks(),  # noqa: B008, it is frozen
    keep_every: int = 0,
    progress: Callable[[int, str], None] = _noop,
    log: Callable[[str], None] = lambda _line: None,
    finished_layer: Callable[[Mapping[str, Any]], None] = lambda _report: None,
    watch: Watch | None = None,
) -> None:
    """Writes every layer file that `work` lacks. `corpus` may be None for round-to-nearest, which reads none.

    Every rank of the run calls this with the same; the bytes do not depend on their number. `keep_every`: hidden states
    are kept on disk before every so manieth layer, 0 for never. `log` gets a line a layer, on rank 0, and then
    `finished_layer` its report; what it raises ends the run, and the layer stays.

    Raises UserError when the source is broken, the disk is full, a forward pass leaves the finite numbers, or another
    rank has ended.
    """
    source = source.made_by(settings.recipe)
    config, digest = source.config, digest_of(mark)
    source.validate(layout.upstream(config))
    todo = ranks.told([i for i in config.layers if not finished(work, i, digest)])
    if todo:
        corpus = None if settings.method == "rtn" else corpus
        run = Run(source, work, settings, digest, device, ranks, watch or Watch(device), progress, log, finished_layer)
        try:
            _loop(run, todo, corpus, keep_every)
        except BaseException:
            if ranks.rank == 0:
                remove_leftovers(work)
            raise
    ranks.barrier()
    if ranks.rank == 0:
        hidden_states.keep(work, [])


def _loop(run: Run, todo: list[int], corpus: Corpus | None, keep_every: int) -> None:
    """Visits the layers from the first one to do, or from the hidden states kept before it, to the last one to do."""
    source, ranks, device = run.source, run.ranks, run.device
    hf_config = deepseek_v4.hf_config(source.config)
    batches: list[Tensor] = []
    first = todo[0]
    own = range(0)
    if corpus is not None:
        everyones = corpus.tokens.split(run.settings.micro_batch(corpus.tokens.shape[1]))
        own = ranks.share(len(everyones))
        batches = [everyones[i].to(device) for i in own]
        first = ranks.told(hidden_states.latest(run.work, todo[0], len(everyones), run.digest))
    _check_mtp(run)
    weights = deepseek_v4.Weights(source, device)
    root = deepseek_v4.load_root(weights, hf_config)  # read even where it is not needed, for its checks
    if first:
        streams = [hidden_states.load(run.work, first, i, device) for i in own]
    else:
        streams = [deepseek_v4.embed(root, hf_config, batch) for batch in batches]
    del root
    rotary = deepseek_v4.Rotary(hf_config, device, weights.dtype)
    visited = [i for i in range(first, todo[-1] + 1) if corpus is not None or i in todo]
    groups = [(i, names) for i in visited for names in groups_of(run, i, i in todo)]
    with (
        Reader(source, groups, READ_AHEAD_BYTES, device, run.watch) as reader,
        ThreadPoolExecutor(WRITE_THREADS, "writer") as writer,
        _hashing(run) as hashed,
    ):
        previous: Layer | None = None
        kept: list[Future[None]] = []
        coming = [Layer(run, index, writer, index in todo) for index in visited]
        coming[0].reserve()
        for layer, following in zip_longest(coming, coming[1:]):
            index = layer.index
            if following is not None:
                following.reserve()
            attended = layer.attend(reader, hf_config, streams, batches, rotary)
            streams = layer.mix(attended, reader, float(hf_config.swiglu_limit), last=index == todo[-1])
            del attended
            if previous is not None:
                previous.publish()  # its writes had this layer's time
                hashed(previous)
            previous = layer
            if corpus is not None and keep_every and (index + 1) % keep_every == 0 and index != todo[-1]:
                done(kept)
                ranks.barrier()
                if ranks.rank == 0:
                    hidden_states.keep(run.work, [index + 1 - keep_every])
                ranks.barrier()
                kept += [layer.keep(number, batch) for number, batch in zip(own, streams, strict=True)]
        if previous is not None:
            previous.publish()
            hashed(previous)
        done(kept)


@contextmanager
def _hashing(run: Run) -> Iterator[Callable[[Layer], None]]:
    """The value has a layer's file hashed on a thread, on rank 0, while it lies in the page cache and the next layers
    compute: postprocess and verify then know its digest. At the end all are kept, however the block ends."""
    known = Digests(cache_of(run.work.parent))

    def learn(path: Path) -> None:
        with suppress(OSError):  # who wants it later reads the file, or says why not
            known.learn(path, file_sha256(path))

    def hashed(layer: Layer) -> None:
        if layer.todo and run.ranks.rank == 0:
            pool.submit(learn, layer_file(run.work, layer.index))

    try:
        with ThreadPoolExecutor(HASH_THREADS, "hash") as pool:
            yield hashed
    finally:
        with suppress(UserError):  # where nothing is remembered, who wants it reads
            known.save()


def _check_mtp(run: Run) -> None:
    """Reads and decodes the MTP block for its checks, each rank a part of it: postprocess needs it long after."""
    parameters = list(layout.mtp_parameters(run.source.config))
    own = [parameters[i] for i in run.ranks.share(len(parameters))]
    chunks = [own[i : i + CHECKED_AT_A_TIME] for i in range(0, len(own), CHECKED_AT_A_TIME)]
    groups = [[part for name, shape in chunk for part in stored_parts(name, shape)] for chunk in chunks]
    with Reader(run.source, [(-1, names) for names in groups], READ_AHEAD_BYTES, run.device, run.watch) as reader:
        for chunk, group in zip(chunks, reader, strict=False):
            view = run.source.holding(group.on(run.device).tensors())
            for name, shape in chunk:
                view.load(name, shape, run.device)
