"""The scratch blocks of the CPU backend: filled once per step, for all layers, before the forward.

What stands in them (see `selection`) was computed in earlier steps. Ragged heads and first tokens are fetched
only when they changed: a cached copy is good until its block is written again, and every write of the engine
shows in a slot mapping.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.utils.math_utils import cdiv

from vllm_longctx.cpu.kernels.tables import Ints, ScratchLayout, SinkMoves
from vllm_longctx.rotary import Rotary


@functools.cache
def packed_order(block_size: int, head_size: int, dtype: torch.dtype, isa: str) -> tuple[Tensor, Tensor]:
    """How the CPU kernel packs a block: for keys and for values, the place of element [offset, dim] in its
    flat block.

    Each int64 [block_size, head_size]. The order depends on the instruction set and is not documented, so it
    is learned by writing numbered elements; digits in base 256 are exact in every dtype.
    """
    number = torch.arange(block_size * head_size).view(block_size, 1, head_size)
    places = []
    for which in (0, 1):
        packed = torch.zeros(block_size * head_size, dtype=torch.long)
        for digit in (1, 256, 65536):
            x = (number // digit % 256).to(dtype)
            key_cache, value_cache = torch.zeros(1, 1, 2 * block_size, head_size, dtype=dtype).chunk(2, dim=2)
            ops.cpu_attn_reshape_and_cache(x, x, key_cache, value_cache, torch.arange(block_size), isa)
            packed += (key_cache, value_cache)[which].flatten().long() * digit
        place = torch.empty_like(packed)
        place[packed] = torch.arange(len(packed))
        if not torch.equal(packed[place], torch.arange(len(packed))):
            raise RuntimeError(f"the CPU kernel's block layout for {dtype} and {isa!r} is not a permutation")
        places.append(place.view(block_size, head_size))
    return places[0], places[1]


def unpack(pages: Tensor, places: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Packed blocks [n, kv_heads, block_size, 2 * head_size] -> keys, values [n * block_size, kv_heads,
    head_size].
    """
    blocks, kv_heads = pages.shape[:2]
    block_size, head_size = places[0].shape
    halves = pages.reshape(blocks, kv_heads, 2, block_size * head_size)

    def rows(which: int) -> Tensor:
        flat = halves[:, :, which].index_select(-1, places[which].flatten())
        return flat.view(blocks, kv_heads, block_size, head_size).transpose(1, 2).flatten(0, 1)

    return rows(0), rows(1)


class Scratch:
    """The scratch blocks of layers that are alike: of one KV cache group, with one rotation.

    cache: The memory that all layers' KV caches are in, by block, [blocks, kv_heads, block_size, 2 *
        head_size].
    layer_first: The place there of each layer's first block.
    """

    def __init__(
        self,
        layout: ScratchLayout,
        cache: Tensor,
        layer_first: Sequence[int],
        n_global: int,
        places: tuple[Tensor, Tensor],
        rotary: Rotary | None,
        isa: str,
    ):
        self.layout, self.cache, self.places, self.rotary, self.isa = layout, cache, places, rotary, isa
        _, kv_heads, self.block_size, width = cache.shape
        self.kernel_cache = as_kernel_caches(cache)
        num_layers = len(layer_first)
        self.layer_base = np.array(layer_first)[:, None]
        self.layer_slots = self.layer_base[..., None] * self.block_size
        rows = layout.rows
        self.first_keys = torch.empty(num_layers, rows, n_global, kv_heads, width // 2, dtype=cache.dtype)
        self.first_values = torch.empty_like(self.first_keys)
        self.first_blocks = np.full((rows, cdiv(n_global, self.block_size)), -1)
        self.edge_blocks = np.full(rows, -1)
        self.edge_lens = np.zeros(rows, np.int64)
        self.is_written = np.zeros(
            layout.first_block + 1, np.bool_
        )  # by block; the last one stands for -1, no block

    def forget_written(self, slot_mapping: Tensor) -> None:
        """Drop copies of blocks that the coming forward writes. slot_mapping int64 [tokens]."""
        written = slot_mapping.numpy() // self.block_size
        self.is_written[written] = True
        self.edge_blocks[self.is_written[self.edge_blocks]] = -1
        self.first_blocks[self.is_written[self.first_blocks].any(1)] = -1
        self.is_written[written] = False

    def fill(self, moves: SinkMoves) -> None:
        rows = len(moves.edge_blocks)
        changed = (self.edge_blocks[:rows] != moves.edge_blocks) | (self.edge_lens[:rows] < moves.edge_lens)
        if changed.any():
            self._copy_edges(moves, changed.nonzero()[0])
        self.edge_lens[:rows] = moves.edge_lens
        changed = (self.first_blocks[:rows] != moves.first_blocks).any(1)
        if changed.any():
            self._clear(changed.nonzero()[0])
            self._fetch_first(moves, changed.nonzero()[0])
        keys = self.first_keys[:, :rows]
        if self.rotary is not None:
            keys = self.rotary.turn(keys, moves.turn_by[..., None])
        values = self.first_values[:, :rows]
        slots = torch.from_numpy((self.layer_slots + moves.target_slots).ravel())
        ops.cpu_attn_reshape_and_cache(
            keys.flatten(0, 2), values.flatten(0, 2), *self.kernel_cache, slots, self.isa
        )

    def _clear(self, rows: Ints) -> None:
        """All but the edge, which is copied whole: the kernel multiplies slots that it does not show by zero,
        not NaN away.
        """
        layout = self.layout
        blocks = (
            layout.first_block + rows[:, None] * layout.blocks_per_row + np.arange(layout.blocks_per_row - 1)
        )
        self.cache[(self.layer_base[..., None] + blocks).ravel()] = 0

    def _copy_edges(self, moves: SinkMoves, rows: Ints) -> None:
        source, target = moves.edge_blocks[rows], moves.edge_scratch[rows]
        self.cache[(self.layer_base + target).ravel()] = self.cache[(self.layer_base + source).ravel()]
        self.edge_blocks[rows] = source

    def _fetch_first(self, moves: SinkMoves, rows: Ints) -> None:
        blocks = moves.first_blocks[rows]
        keys, values = unpack(self.cache[(self.layer_base[..., None] + blocks).ravel()], self.places)
        n_global = self.first_keys.shape[2]
        shape = (len(self.layer_base), len(rows), -1, *self.first_keys.shape[3:])
        self.first_keys[:, rows] = keys.view(shape)[:, :, :n_global]
        self.first_values[:, rows] = values.view(shape)[:, :, :n_global]
        self.first_blocks[rows] = blocks


def as_kernel_caches(cache: Tensor) -> tuple[Tensor, Tensor]:
    """[blocks, kv_heads, block_size, 2 * d] as the kernel takes it: keys and values [blocks, kv_heads,
    block_size, d].
    """
    keys, values = cache.view(*cache.shape[:2], 2 * cache.shape[2], cache.shape[3] // 2).chunk(2, dim=2)
    return keys, values


def extend(cache: Tensor, num_blocks: int) -> Tensor:
    """A view of a layer's cache over `num_blocks` blocks, past the last one that vLLM knows of."""
    return cache.as_strided((num_blocks, *cache.shape[1:]), cache.stride())
