"""Which KV blocks a step's queries read: tables over blocks in place plus a few scratch blocks.

A query past the window sees [first tokens | last tokens]. The stock kernel reads one table per request and
lets every query see its last `sliding_window` entries, so a decode step needs one kernel call per layer if
those entries are exactly the G + N visible keys, in whatever order. The blocks inside the window stay where
they are. In front of them stand scratch blocks, which hold the window's ragged head (the tokens of the block
the window has begun to leave) and, right up against it, the first tokens, turned to the distance they must be
seen at:

    the text       | first |   ...  freed  ...   |....head| block | block | tail..|
    the table              |   hole  first head  | block | block | tail..|
                            scratch blocks ------  in place ---------------

With `sliding_window` = G + N the hole is masked. In steady state only the scratch blocks and the sequence
length change.

Tables are small and built in every step, so they are built in numpy, whose calls cost a fifth of torch's.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.utils.math_utils import cdiv

from vllm_longctx.geometry import Geometry

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class ScratchLayout:
    """A KV cache group's scratch blocks, which stand behind the pool's blocks in every layer's KV cache.

    first_block: id of the first one. blocks_per_row: for one request. rows: requests that can have some in
        one step.
    """

    first_block: int
    blocks_per_row: int
    rows: int

    @property
    def num_blocks(self) -> int:
        return self.blocks_per_row * self.rows

    @classmethod
    def plan(
        cls,
        geometry: Geometry,
        block_size: int,
        num_blocks: int,
        max_num_seqs: int,
        alibi: bool = False,
    ) -> "ScratchLayout":
        """Room for the first tokens and a ragged head, for every request whose window can be in the pool at
        once.

        A window shorter than a block has no block in place; without first tokens the kernel masks the head by
        itself. ALiBi's bias comes from places in the table, where first tokens can stand at in-cache
        distances only.
        """
        beyond_kernel = alibi and geometry.distances == "relative"
        if (
            geometry.n_local is None
            or geometry.n_global == 0
            or geometry.n_local < block_size
            or beyond_kernel
        ):
            return cls(num_blocks, 0, 0)
        blocks_per_row = cdiv(geometry.n_global + block_size - 1, block_size)
        windows_in_pool = cdiv(num_blocks, geometry.n_local // block_size)
        return cls(num_blocks, blocks_per_row, min(max_num_seqs, windows_in_pool))


@dataclass(frozen=True)
class SinkMoves:
    """Where a step's scratch blocks get their contents.

    All int64; R requests past their window, G first tokens.

    edge_blocks, edge_scratch [R]: the block the window has begun to leave, and the scratch block it is copied
    to. edge_lens [R]: how many of its last tokens the window still holds; the copies of first tokens
    overwrite the others. first_blocks [R, blocks]: the blocks of the first tokens. target_slots [R, G]: slot
    (block * block_size + offset) in scratch of each first token's copy. turn_by [R, G]: positions each copied
    key is turned on by.
    """

    edge_blocks: Ints
    edge_scratch: Ints
    edge_lens: Ints
    first_blocks: Ints
    target_slots: Ints
    turn_by: Tensor


@dataclass(frozen=True)
class Steady:
    """What must hold for the next step's tables to be these, shifted by one: every request has gone on by one
    token.

    lens [R] now; blocks [R, C]: entries of the block table at `columns` that the tables were made from;
    steps: how many more until a window or a tail enters another block.
    """

    lens: Ints
    columns: Ints
    blocks: Ints
    steps: int


@dataclass(frozen=True)
class KernelTables:
    """What the stock kernel is given. block_table int32 [rows, blocks], seq_lens int32 [rows]."""

    block_table: Tensor
    seq_lens: Tensor
    moves: SinkMoves | None
    steady: Steady | None = None


def next_tables(
    last: KernelTables, block_table: Tensor, seq_lens: Tensor, query_lens: Tensor
) -> KernelTables | None:
    """`kernel_tables` of the step after `last`, at a quarter of the cost; None where they are not just
    shifted by one.
    """
    steady, moves = last.steady, last.moves
    if steady is None or moves is None or steady.steps == 0 or len(steady.lens) != len(seq_lens):
        return None
    lens = steady.lens + 1
    if (seq_lens.numpy() != lens).any() or (query_lens.numpy() != 1).any():
        return None
    if (np.take_along_axis(block_table.numpy(), steady.columns, 1) != steady.blocks).any():
        return None
    shifted = SinkMoves(
        moves.edge_blocks,
        moves.edge_scratch,
        moves.edge_lens - 1,
        moves.first_blocks,
        moves.target_slots + 1,
        moves.turn_by + 1,
    )
    steady = Steady(lens, steady.columns, steady.blocks, steady.steps - 1)
    return KernelTables(last.block_table, last.seq_lens + 1, shifted, steady)


def kernel_tables(
    geometry: Geometry,
    block_size: int,
    scratch: ScratchLayout,
    block_table: Tensor,
    seq_lens: Tensor,
    query_lens: Tensor,
) -> KernelTables:
    """Tables for requests that one kernel call can serve.

    block_table [rows, blocks], seq_lens, query_lens [rows], ints on the CPU: as vLLM gives them. With first
    tokens, a request with more than one query must not reach past the window; without, any may. At most
    `scratch.rows` requests may be past it.
    """
    start_positions = geometry.window_start((seq_lens - query_lens).long())
    start, lens, blocks = start_positions.numpy(), seq_lens.numpy(), block_table.numpy()
    if geometry.n_global == 0:
        head, in_scratch = start // block_size, np.zeros_like(start)
    else:
        head = -(-start // block_size)
        in_scratch = np.minimum(head, scratch.blocks_per_row)
    first = head - in_scratch
    end = -(-lens // block_size)
    columns = np.arange((end - first).max())
    source = np.minimum(first[:, None] + columns, end[:, None] - 1)
    table = np.take_along_axis(blocks, source, 1)
    compact_lens = torch.from_numpy((lens - first * block_size).astype(np.int32))

    past = in_scratch.nonzero()[0]
    if len(past) == 0:
        return KernelTables(torch.from_numpy(table), compact_lens, None)
    row_scratch = scratch.first_block + np.arange(len(past)) * scratch.blocks_per_row
    scratch_first = row_scratch + scratch.blocks_per_row - in_scratch[past]
    for column in range(min(scratch.blocks_per_row, len(columns))):
        in_front = column < in_scratch[past]
        table[past[in_front], column] = (scratch_first + column)[in_front]

    start, first, head = start[past], first[past], head[past]
    # In the text, the copies stand right before the window; where it begins less than G tokens into it, at
    # its beginning.
    position = np.maximum(start - geometry.n_global, 0)
    sinks = np.arange(geometry.n_global)
    target = ((scratch_first - first) * block_size + position)[:, None] + sinks
    if position.min() == 0:
        # A first token still inside the window has no copy: it goes where nobody looks, to a scratch block
        # not in the table.
        target = np.where(sinks < start[:, None], target, row_scratch[:, None] * block_size)
    queries = torch.from_numpy(lens[past].astype(np.int64)) - 1
    moves = SinkMoves(
        edge_blocks=blocks[past, head - 1],
        edge_scratch=row_scratch + scratch.blocks_per_row - 1,
        edge_lens=head * block_size - start,
        first_blocks=blocks[past, : cdiv(geometry.n_global, block_size)],
        target_slots=target,
        turn_by=geometry.unseen_distance(queries, torch.from_numpy(sinks), torch.from_numpy(start)),
    )
    steady = None
    # While first tokens leave the window or come to the ceiling, their copies do not just move on together.
    if len(past) == len(lens) and (query_lens == 1).all() and position.min() > 0 and moves.turn_by.min() > 0:
        steps = min(moves.edge_lens.min(), (end * block_size - lens).min())
        first_columns = np.broadcast_to(np.arange(moves.first_blocks.shape[1]), moves.first_blocks.shape)
        used = np.concatenate((first_columns, head[:, None] - 1, source), 1)
        steady = Steady(lens.copy(), used, np.take_along_axis(blocks, used, 1), int(steps))
    return KernelTables(torch.from_numpy(table), compact_lens, moves, steady)
