"""The Triton kernels that prepare attention's metadata, in torch. Arguments are those of the kernel, in its order.

Strides are not used: the tensors carry them. Nothing here is on the path of a token's arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PAD = -1


def nothing(*_: Any, **__: Any) -> None:
    """For what no layer reads on a CPU: its attention finds the window's slots by itself."""


def token_requests(query_start_loc: Tensor, output: Tensor, requests: int, mapped: int, tokens: int, **_: Any) -> None:
    """output[t] = the request that token t belongs to; 0 from `mapped` on."""
    positions = torch.arange(mapped, dtype=query_start_loc.dtype)
    output[:mapped] = torch.searchsorted(query_start_loc[1 : requests + 1], positions, right=True).clamp(
        max=requests - 1
    )
    output[mapped:tokens] = 0


def compressed_slots(
    output: Tensor,
    slots: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    _: int,
    block_size: int,
    __: int,
    ___: int,
    ratio: int,
    *____: Any,
) -> None:
    """output[t] = the slot of the compressed state that token t completes, or PAD."""
    starts = query_start_loc.tolist()
    for request, length in enumerate(seq_lens[: len(starts) - 1].tolist()):
        first, end = starts[request], starts[request + 1]
        positions = torch.arange(length - (end - first), length)
        done = ((positions + 1) % ratio == 0) & (slots[first:end] != PAD)
        states = positions // ratio
        blocks = block_table[request].long()[(states // block_size).clamp(0, block_table.shape[1] - 1)]
        output[first:end] = torch.where(done, blocks * block_size + states % block_size, PAD)


def uniform_decode(
    seq_lens: Tensor,
    output_lens: Tensor,
    block_table: Tensor,
    _: int,
    output_table: Tensor,
    __: int,
    decode_lens: Tensor,
    width: int,
    *___: Any,
    **____: Any,
) -> None:
    """`width` tokens of each request as rows of their own: how much each sees, and its request's blocks."""
    tokens = len(seq_lens) * width
    seen = seq_lens[:, None] - width + 1 + torch.arange(width)
    output_lens[:tokens] = seen.clamp(min=0).flatten()
    blocks = min(block_table.shape[1], output_table.shape[1])
    output_table[:tokens, :blocks] = block_table[:, :blocks].repeat_interleave(width, dim=0)
    decode_lens[:tokens] = 1


def prefill_chunk(
    query_start_loc: Tensor,
    seq_lens: Tensor,
    cumulative: Tensor,
    row_starts: Tensor,
    token_requests: Tensor,
    first_keys: Tensor,
    last_keys: Tensor,
    start: int,
    stop: int,
    _: int,
    __: int,
    ___: int,
    ____: int,
    ratio: int,
) -> None:
    """Where each token's compressed keys begin and end among those of the chunk, and the request of each key.

    Who has no key yet begins no later than the last key: on a CPU the request of a token is found by that.
    """
    starts, keys, rows = query_start_loc.tolist(), cumulative.tolist(), row_starts.tolist()
    for request, length in enumerate(seq_lens[: len(starts) - 1].tolist()):
        begin, end = starts[request], starts[request + 1]
        tokens = torch.arange(max(begin, start), max(min(end, stop), max(begin, start)))
        first = min(rows[request], max(rows[-1] - 1, 0))
        first_keys[tokens - start] = first
        seen = (length - (end - begin) + 1 + tokens - begin) // ratio
        last_keys[tokens - start] = (first + seen).to(last_keys.dtype)
        token_requests[keys[request] : keys[request + 1]] = request


SWA = "vllm.v1.attention.backends.mla.sparse_swa"
INDEXER = "vllm.v1.attention.backends.mla.indexer"
KERNELS = {
    f"{SWA}.ComputePrefillMetadataKernel.kernel": nothing,
    f"{SWA}.ComputeSWAIndicesAndLensKernel.kernel": nothing,
    f"{INDEXER}.PrepareUniformDecodeKernel.kernel": uniform_decode,
    f"{INDEXER}.BuildPrefillChunkMetadataKernel.kernel": prefill_chunk,
    "vllm.v1.attention.backends.mla.compressor_utils.CompressedSlotMappingKernel.kernel": compressed_slots,
    "vllm.v1.attention.ops.metadata._token_request_mapping_kernel": token_requests,
}


def expand(
    output: Tensor, values: Tensor, cumulative: Tensor, replace_from: float, replace_to: float, *_: Any, **__: Any
) -> None:
    """output[t] = the value (temperature, top k or p) of the request that draft token t belongs to.

    vLLM's own for the CPU takes every value for an integer, and loses its result where `output` is not one: with drafts
    the temperature is then whatever was in memory.
    """
    counts = cumulative.diff(prepend=cumulative.new_zeros(1)).long()
    expanded = torch.where(values == replace_from, replace_to, values).repeat_interleave(counts)
    output[: len(expanded)] = expanded.to(output.dtype)


def complete_tile_schedule() -> None:
    """Adds the two kinds of layer that the CPU's builder leaves out, and its caller asks for."""
    from vllm.models.deepseek_v4.cpu.cpu_mla import DeepseekV4CPUSparseSWAMetadataBuilder
    from vllm.v1.attention.backends.mla import sparse_swa

    kinds = [value for name, value in vars(sparse_swa).items() if name.startswith("_LAYER_TYPE_")]
    DeepseekV4CPUSparseSWAMetadataBuilder.build_tile_scheduler = lambda self, num_decode_tokens: dict.fromkeys(kinds)


def skip_prompts_without_keys() -> None:
    """Where no prompt of a step has a compressed key yet there is no chunk of them, and the indexer on a CPU, which
    asks for one, ends the engine: it is to look at the decoding requests alone."""
    from vllm.models.deepseek_v4.cpu.cpu_mla import DeepseekV4CPUIndexerMetadataBuilder

    theirs = DeepseekV4CPUIndexerMetadataBuilder.build

    def build(self: Any, *arguments: Any, **options: Any) -> Any:
        metadata = theirs(self, *arguments, **options)
        if metadata.prefill is not None and not metadata.prefill.chunks:
            metadata.num_prefills = 0
        return metadata

    DeepseekV4CPUIndexerMetadataBuilder.build = build
