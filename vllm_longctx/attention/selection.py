"""Which KV blocks a step's queries read: tables over blocks in place plus a few scratch blocks.

A query past the window sees [first tokens | last tokens]. The stock kernel reads one table per request and lets every query
see its last `sliding_window` entries, so a decode step needs one kernel call per layer if those entries are exactly the
G + N visible keys, in whatever order. The blocks inside the window stay where they are. In front of them stand scratch
blocks, which hold the window's ragged head (the tokens of the block the window has begun to leave) and, right up against
it, the first tokens, turned to the distance they must be seen at:

    the text       | first |   ...  freed  ...   |....head| block | block | tail..|
    the table              |   hole  first head  | block | block | tail..|
                            scratch blocks ------  in place ---------------

With `sliding_window` = G + N the hole is masked. In steady state only the scratch blocks and the sequence length change.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_longctx.geometry import Geometry


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class ScratchLayout:
    """Scratch blocks stand right behind the pool's blocks in every layer's KV cache.

    first_block: id of the first one. blocks_per_row: for one request. rows: requests that can have some in one step.
    """

    first_block: int
    blocks_per_row: int
    rows: int

    @property
    def num_blocks(self) -> int:
        return self.blocks_per_row * self.rows

    @classmethod
    def plan(
        cls, geometry: Geometry, block_size: int, num_blocks: int, max_num_seqs: int, alibi: bool = False
    ) -> "ScratchLayout":
        """Room for the first tokens and a ragged head, for every request whose window can be in the pool at once.

        A window shorter than a block has no block in place; without first tokens the kernel masks the head by itself.
        ALiBi's bias comes from places in the table, where first tokens can stand at in-cache distances only.
        """
        beyond_kernel = alibi and geometry.distances == "relative"
        if geometry.n_local is None or geometry.n_global == 0 or geometry.n_local < block_size or beyond_kernel:
            return cls(num_blocks, 0, 0)
        blocks_per_row = cdiv(geometry.n_global + block_size - 1, block_size)
        windows_in_pool = cdiv(num_blocks, geometry.n_local // block_size)
        return cls(num_blocks, blocks_per_row, min(max_num_seqs, windows_in_pool))


@dataclass(frozen=True)
class SinkMoves:
    """Where a step's scratch blocks get their contents. All int64; R requests past their window, G first tokens.

    edge_blocks, edge_scratch [R]: the block the window has begun to leave, and the scratch block it is copied to.
    edge_lens [R]: how many of its last tokens the window still holds; the copies of first tokens overwrite the others.
    first_blocks [R, blocks]: the blocks of the first tokens.
    target_slots [R, G]: slot (block * block_size + offset) in scratch of each first token's copy.
    turn_by [R, G]: positions each copied key is turned on by.
    """

    edge_blocks: Tensor
    edge_scratch: Tensor
    edge_lens: Tensor
    first_blocks: Tensor
    target_slots: Tensor
    turn_by: Tensor


@dataclass(frozen=True)
class KernelTables:
    """What the stock kernel is given. block_table int32 [rows, blocks], seq_lens int32 [rows]."""

    block_table: Tensor
    seq_lens: Tensor
    moves: SinkMoves | None


def kernel_tables(
    geometry: Geometry,
    block_size: int,
    scratch: ScratchLayout,
    block_table: Tensor,
    seq_lens: Tensor,
    query_lens: Tensor,
) -> KernelTables:
    """Tables for requests that one kernel call can serve.

    block_table [rows, blocks], seq_lens, query_lens [rows]: as vLLM gives them. With first tokens, a request with more than
    one query must not reach past the window; without, any may. At most `scratch.rows` requests may be past it.
    """
    seq_lens, query_lens = seq_lens.long(), query_lens.long()
    start = geometry.window_start(seq_lens - query_lens)
    if geometry.n_global == 0:
        head, in_scratch = start // block_size, torch.zeros_like(start)
    else:
        head = (start + block_size - 1) // block_size
        in_scratch = head.clamp_max(scratch.blocks_per_row)
    first = head - in_scratch
    length = (seq_lens + block_size - 1) // block_size - first
    columns = torch.arange(int(length.max()))
    source = torch.minimum(first[:, None] + columns, (first + length - 1)[:, None])
    table = block_table.gather(1, source)
    compact_lens = (seq_lens - first * block_size).int()

    past = in_scratch.nonzero().squeeze(1)
    if len(past) == 0:
        return KernelTables(table, compact_lens, None)
    row_scratch = scratch.first_block + torch.arange(len(past)) * scratch.blocks_per_row
    scratch_first = row_scratch + scratch.blocks_per_row - in_scratch[past]
    in_front = columns < in_scratch[past, None]
    table[past] = torch.where(in_front, scratch_first[:, None] + columns, table[past].long()).int()

    start, first, head = start[past], first[past], head[past]
    sinks = torch.arange(geometry.n_global)
    position = start[:, None] - start.clamp_max(geometry.n_global)[:, None] + sinks  # in the text, right before the window
    offset = position - first[:, None] * block_size
    target = scratch_first[:, None] * block_size + offset
    # A first token still inside the window has no copy: it goes where nobody looks, to a scratch block not in the table.
    target = torch.where(position < start[:, None], target, row_scratch[:, None] * block_size)
    moves = SinkMoves(
        edge_blocks=block_table[past, head - 1].long(),
        edge_scratch=row_scratch + scratch.blocks_per_row - 1,
        edge_lens=head * block_size - start,
        first_blocks=block_table[past, : cdiv(geometry.n_global, block_size)].long(),
        target_slots=target,
        turn_by=geometry.unseen_distance(seq_lens[past] - 1, sinks, start),
    )
    return KernelTables(table, compact_lens, moves)
