"""Stepped windows in vLLM's CPU engine: the stock kernel over a table that begins where a request's pass
begins.

Keys are rotated by their positions in the text and RoPE is relative, so a pass needs no new positions: its
entries of the KV cache are counted from its first computed token on, tables and slots are shifted, and the
stock kernel runs as ever.
"""

from copy import copy
from typing import Any

import torch
from vllm.utils.math_utils import cdiv
from vllm.v1.attention.backend import AttentionImpl, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from vllm_longctx.cpu.rows import StepRows, WindowRow
from vllm_longctx.engine.layers import LayerSite


class WindowBackend(CPUAttentionBackend):
    """vLLM's CPU backend with stepped windows, for layers that are vLLM's own."""

    @staticmethod
    def get_builder_cls() -> type["WindowMetadataBuilder"]:
        return WindowMetadataBuilder

    @classmethod
    def make_layer(cls, site: LayerSite) -> AttentionImpl[Any]:
        return site.layer.impl


class WindowMetadataBuilder(CPUAttentionMetadataBuilder):
    rows: StepRows

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CPUAttentionMetadata:
        m = common_attn_metadata
        if self.rows.windows:
            m = shifted(m, self.rows.windows, self.block_size)
        return super().build(common_prefix_len, m, fast_build)


def shifted(
    m: CommonAttentionMetadata, windows: tuple[WindowRow, ...], block_size: int
) -> CommonAttentionMetadata:
    """Tables, sequence lengths and slots of the rows in `windows`, counted from their first position.

    Slots are changed in place: the same tensor says where the step's keys and values are written.
    """
    first = torch.zeros_like(m.seq_lens)
    for w in windows:
        first[w.row] = w.first
    m = from_blocks(m, first // block_size, m.seq_lens - first, block_size)
    for w in windows:
        begin, end = m.query_start_loc[w.row : w.row + 2].tolist()
        length = int(m.seq_lens[w.row])
        entries = torch.arange(length - (end - begin), length)
        blocks = m.block_table_tensor[w.row][entries // block_size]
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
