"""Stepped windows in vLLM's CPU engine: the stock kernel over a table that begins where a request's pass begins.

Keys are rotated by their positions in the text and RoPE is relative, so a pass needs no new positions: its entries of the KV
cache are counted from its first computed token on, tables and slots are shifted, and the stock kernel runs as ever.
"""

from copy import copy
from dataclasses import dataclass

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from vllm_longctx.cpu.kernels.tables import cdiv


@dataclass(frozen=True)
class PassRow:
    """row: of the step's batch. first: the first position that this pass computed, its oldest key; of a window, its start."""

    row: int
    first: int


class SteppedBackend(CPUAttentionBackend):
    """vLLM's CPU backend with stepped windows. Chosen per layer by `vllm_longctx.cpu.worker`, with a spec of its own."""

    @staticmethod
    def get_builder_cls() -> type["SteppedMetadataBuilder"]:
        return SteppedMetadataBuilder


class SteppedMetadataBuilder(CPUAttentionMetadataBuilder):
    passes: tuple[PassRow, ...] = ()  # of the step to come, set by the worker
    seconds = 0.0  # as `LambdaMetadataBuilder`'s; nothing is selected here

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CPUAttentionMetadata:
        m = common_attn_metadata
        if self.passes:
            m = shifted(m, self.passes, self.block_size)
        return super().build(common_prefix_len, m, fast_build)


def shifted(m: CommonAttentionMetadata, passes: tuple[PassRow, ...], block_size: int) -> CommonAttentionMetadata:
    """Tables, sequence lengths and slots of the rows in `passes`, counted from the first position of their pass.

    Slots are changed in place: the same tensor says where the step's keys and values are written.
    """
    first = torch.zeros_like(m.seq_lens)
    for p in passes:
        first[p.row] = p.first
    m = from_blocks(m, first // block_size, m.seq_lens - first, block_size)
    for p in passes:
        begin, end = m.query_start_loc[p.row : p.row + 2].tolist()
        length = int(m.seq_lens[p.row])
        entries = torch.arange(length - (end - begin), length)
        blocks = m.block_table_tensor[p.row][entries // block_size]
        m.slot_mapping[begin:end] = blocks * block_size + entries % block_size
    return m


def from_blocks(
    m: CommonAttentionMetadata, first_blocks: torch.Tensor, seq_lens: torch.Tensor, block_size: int
) -> CommonAttentionMetadata:
    """Tables that begin at the block first_blocks [rows] of each row and hold seq_lens [rows] entries."""
    table = m.block_table_tensor
    columns = first_blocks[:, None] + torch.arange(cdiv(int(seq_lens.max()), block_size))
    m = copy(m)
    m.seq_lens = seq_lens
    m.block_table_tensor = table.gather(1, columns.clamp_max(table.shape[1] - 1).long())
    return m
