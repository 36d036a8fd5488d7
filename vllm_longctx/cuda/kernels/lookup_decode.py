"""The lookup of decodes: what `lookup` computes, in a few launches that a CUDA graph can hold.

Grids and shapes depend on the number of rows, the width of the block table and constants only. How long each
memory is, programs read on the device: the blocks of a row are shared out among as many programs as the graph
has for it. A program keeps a list of its best blocks, so no workspace grows with the memory. A second kernel
merges the lists; a third scores the keys of the best blocks; the second one takes the best of these, to which
a last one attends.

Which blocks and keys are best is the rule of `lookup`, whose packed numbers are sorted here in programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from vllm.utils.math_utils import cdiv

from vllm_longctx.cuda.kernels import lambda_tile
from vllm_longctx.cuda.kernels.lambda_decode import MAX_SPLITS, PROGRAMS_PER_SM
from vllm_longctx.cuda.kernels.lookup import (
    Memories,
    attend,
    best_of_blocks,
    blocks_per_step,
    is_wide,
    key_scores,
    most_blocks,
    pack,
    score_of,
    tiles,
    widened,
)
from vllm_longctx.engine.lookup import SCANNED

LIST = 64  # blocks: the shortest list of a program, which is sorted once for so many blocks that it reads
MAX_LIST = 1024  # blocks or keys that a program can sort
MAX_IN_TURN = 8192  # blocks of all heads of a KV head
PART = 512  # packed numbers that are merged at once, at least
TURNED_HEADS = 16  # of a program
NEVER = tl.constexpr(2**63 - 1)


def fits(columns: int, block_size: int, group: int, k: int, share: float | None) -> bool:
    """Whether this lookup takes place in a program's registers. group: query heads of a KV head.

    Else it is `lookup.attend_best`'s, which asks the host how long memories are.
    """
    count = most_blocks(columns, block_size, group, k, share, SCANNED)
    return max(count, k) <= MAX_LIST and (share is None or count * group <= MAX_IN_TURN)


def lookup_splits(columns: int, rows: int, kv_heads: int, num_sms: int) -> int:
    """Programs among which to split a row's blocks, so that `rows` rows fill the device."""
    wanted = min(cdiv(PROGRAMS_PER_SM * num_sms, max(rows * kv_heads, 1)), MAX_SPLITS)
    return max(min(wanted, cdiv(columns, LIST)), 1)


def attend_best_decode(
    query: Tensor,
    memories: Memories,
    k: int,
    scale: float,
    splits: int,
    share: float | None = None,
    counts: Tensor | None = None,
    soft_cap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """As `lookup.attend_best`, of one query for each row: output float32 [rows, heads, d], log-sum-exp [rows,
    heads].

    query [rows, heads, d]. memories: with `longest` None. splits: `lookup_splits`. counts: with a share, how
    many blocks each row reads (`lookup.block_counts`). Only where the lookup `fits`.
    """
    rows, heads, d = query.shape
    output = torch.empty(rows, 1, heads, d, dtype=torch.float32, device=query.device)
    lse = torch.empty(rows, 1, heads, dtype=torch.float32, device=query.device)
    group, bs = heads // memories.kv_heads, memories.block_size
    count = most_blocks(memories.num_columns, bs, group, k, share, SCANNED)
    needed = max(count * bs, 2 * splits * _list(count))
    for of_rows, _ in tiles(query[:, None], needed):
        part, q = memories.rows(of_rows), query[of_rows]
        columns = _best_columns(q, part, count, splits, share is not None)
        if share is not None:
            assert counts is not None
            columns = in_turn(columns, part.kv_heads, counts[of_rows])
        best = highest(key_scores(q[:, None], part, columns[:, None]), k)
        attend(best, part, scale, soft_cap, output[of_rows], lse[of_rows])
    return output[:, 0], lse[:, 0]


def turned(query: Tensor, cos: Tensor, sin: Tensor, is_neox: bool) -> Tensor:
    """query [rows, heads, d], each row's turned by its angles: cos, sin float32 [rows, rotary_dim / 2].

    As `rotary.Rotary.rotate`.
    """
    rows, heads, d = query.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    _turn_kernel[(rows, cdiv(heads, TURNED_HEADS))](
        query,
        out,
        cos,
        sin,
        *query.stride()[:2],
        *out.stride()[:2],
        heads,
        HEAD_SIZE=d,
        PADDED_HEAD=triton.next_power_of_2(d),
        ROTARY_DIM=2 * cos.shape[-1],
        IS_NEOX=is_neox,
        HEADS=TURNED_HEADS,
    )
    return out


def highest(packed: Tensor, k: int, places: bool = False) -> Tensor:
    """The k highest of packed numbers [..., n], best first: int64 [..., k].

    Where there are fewer, the rest is none. places: their places instead, -1 for none.
    """
    n, count = packed.shape[-1], max(triton.next_power_of_2(k), 16)
    out = torch.empty(*packed.shape[:-1], k, dtype=torch.int64, device=packed.device)
    _highest_kernel[(out[..., 0].numel(),)](
        packed.contiguous(),
        out,
        n,
        k,
        COUNT=count,
        PART=max(count, PART),
        PLACES=places,
    )
    return out


def in_turn(columns: Tensor, kv_heads: int, counts: Tensor) -> Tensor:
    """`lookup.in_turn` in one launch: columns [rows, heads, n], -1 for none -> [rows, kv_heads, n]."""
    rows, heads, n = columns.shape
    group = heads // kv_heads
    out = torch.empty(rows, kv_heads, n, dtype=torch.int64, device=columns.device)
    turns = max(triton.next_power_of_2(n * group), 16)
    warps = max(turns // 256, 8)  # eight numbers of a thread: a sort of more takes long to compile
    _in_turn_kernel[(rows, kv_heads)](columns, counts, out, n, GROUP=group, TURNS=turns, num_warps=warps)
    return out


def _list(count: int) -> int:
    return max(triton.next_power_of_2(count), LIST)


def _best_columns(query: Tensor, memories: Memories, count: int, splits: int, coded: bool) -> Tensor:
    """The columns with the best keys, or the highest bounds, best first, -1 for none: int64 [rows, heads,
    count].
    """
    rows, heads, _ = query.shape
    kv_heads, constants = memories.kv_heads, memories.constants(heads)
    keys, steps = memories.key_cache, query  # unused
    if coded:
        assert memories.summaries is not None
        keys, steps = memories.summaries.codes, memories.summaries.steps
    # The programs' lists, and for each as many blocks that were read since it was sorted.
    lists = torch.empty(2, rows, heads, splits, _list(count), dtype=torch.int64, device=query.device)
    _best_blocks_kernel[(rows, kv_heads, splits)](
        query,
        keys,
        steps,
        memories.block_table,
        memories.begins,
        memories.ends,
        lists,
        lists.stride(0),
        *query.stride()[:2],
        *keys.stride()[:3],
        memories.block_table.stride(0),
        TILE=max(16, triton.next_power_of_2(constants["GROUP"])),
        BLOCKS=min(blocks_per_step(constants, query.element_size()), _list(count)),
        COUNT=_list(count),
        CODED=coded,
        WIDE=is_wide(query, memories),
        num_stages=2,
        **constants,
    )
    return highest(lists[0].flatten(2), count, places=True)


@triton.jit
def _none(COUNT: tl.constexpr):
    """Packed numbers that are none: -inf, at place 0."""
    return pack(tl.full((COUNT,), float("-inf"), tl.float32), tl.zeros((COUNT,), tl.int32))


@triton.jit(do_not_specialize=["block_table", "begins", "ends"])
def _best_blocks_kernel(
    query, keys, steps, block_table, begins, ends, lists, fresh,
    query_row, query_head, key_block, key_token, key_head, table_row,
    GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    BLOCKS: tl.constexpr, COUNT: tl.constexpr, CODED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A share of a row's blocks, for a KV head's heads: the COUNT best of each, into its list.

    Scores of blocks stand `fresh` elements behind the list, until there are COUNT of them.
    """
    row, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    split, splits = tl.program_id(2), tl.num_programs(2)
    m, dims = tl.arange(0, TILE), tl.arange(0, D_PAD)
    head = kv_head * GROUP + m
    q = tl.load(
        query + row * query_row + head[:, None] * query_head + dims[None, :],
        mask=(m < GROUP)[:, None] & (dims < D)[None, :],
        other=0.0,
    )
    q, margin, begin, end = widened(
        q, tl.load(begins + row), tl.load(ends + row), BLOCK=BLOCK, CODED=CODED, WIDE=WIDE
    )
    first = begin // BLOCK
    count = tl.maximum(tl.cdiv(end, BLOCK) - first, 0)
    count = tl.where(end > begin, count, 0)
    share = tl.cdiv(count, splits)
    start = first + split * share
    stop = tl.minimum(start + share, first + count)

    of_head = splits.to(tl.int64) * COUNT
    mine = lists + (row * tl.num_programs(1) + kv_head) * GROUP * of_head + split * COUNT
    number = tl.arange(0, COUNT)
    for other in range(GROUP):
        tl.store(mine + other * of_head + number, _none(COUNT))
    table = block_table + row * table_row
    to = mine + fresh + m[:, None] * of_head + tl.arange(0, BLOCKS)[None, :]
    both = tl.arange(0, 2 * COUNT)
    for chunk in range(start, stop, COUNT):
        chunk_end = tl.minimum(chunk + COUNT, stop)
        for column in range(chunk, chunk_end, BLOCKS):
            packed = best_of_blocks(
                q, margin, keys, steps, table, kv_head, tl.num_programs(1), column, chunk_end, begin, end,
                key_block, key_token, key_head, D, D_PAD, BLOCK, BLOCKS, CODED,
            )  # fmt: skip
            tl.store(to + (column - chunk), packed, mask=(m < GROUP)[:, None])
        # Other threads of the program read what these have written, before they write over it.
        tl.debug_barrier()
        there = both < COUNT + chunk_end - chunk
        places = both // COUNT * fresh + both % COUNT
        for other in range(GROUP):
            known = tl.load(mine + other * of_head + places, mask=there, other=0)
            known = tl.where(there, known, _none(2 * COUNT))
            tl.debug_barrier()
            tl.store(mine + other * of_head + number, tl.topk(known, COUNT))
        tl.debug_barrier()


@triton.jit
def _highest_of(packed, begin, n, PART: tl.constexpr, COUNT: tl.constexpr):
    number = begin + tl.arange(0, PART)
    found = tl.load(packed + number, mask=number < n, other=0)
    return tl.topk(tl.where(number < n, found, _none(PART)), COUNT)


@triton.jit(do_not_specialize=["n", "count"])
def _highest_kernel(
    packed, out, n, count, COUNT: tl.constexpr, PART: tl.constexpr, PLACES: tl.constexpr
):  # fmt: skip
    which = tl.program_id(0).to(tl.int64)
    mine = packed + which * n
    best = _highest_of(mine, 0, n, PART, COUNT)
    for begin in range(PART, n, PART):
        both = tl.join(best, _highest_of(mine, begin, n, PART, COUNT))
        best = tl.topk(tl.reshape(both, (2 * COUNT,)), COUNT)
    if PLACES:
        best = tl.where(score_of(best) > float("-inf"), 0xFFFFFFFF - (best & 0xFFFFFFFF), -1)
    number = tl.arange(0, COUNT)
    tl.store(out + which * count + number, best, mask=number < count)


@triton.jit(do_not_specialize=["counts", "n"])
def _in_turn_kernel(columns, counts, out, n, GROUP: tl.constexpr, TURNS: tl.constexpr):
    """Sorted by column, then turn, each column's first turn is known; sorted by turn, who comes first."""
    row, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    which = row * tl.num_programs(1) + kv_head
    turn = tl.arange(0, TURNS)
    column = tl.load(
        columns + (which * GROUP + turn % GROUP) * n + turn // GROUP, mask=turn < n * GROUP, other=-1
    )
    by_column = tl.sort(tl.where(column >= 0, (column << 32) + turn, NEVER))
    before = tl.gather(by_column, tl.maximum(turn - 1, 0), 0)
    is_first = (turn == 0) | (by_column >> 32 != before >> 32)
    by_turn = ((by_column & 0xFFFFFFFF) << 32) + (by_column >> 32)
    chosen = tl.sort(tl.where(is_first & (by_column < NEVER), by_turn, NEVER))
    wanted = (turn < tl.load(counts + row)) & (chosen < NEVER)
    tl.store(out + which * n + turn, tl.where(wanted, chosen & 0xFFFFFFFF, -1), mask=turn < n)


@triton.jit
def _turn_kernel(
    query, out, cos, sin, query_row, query_head, out_row, out_head, num_heads,
    HEAD_SIZE: tl.constexpr, PADDED_HEAD: tl.constexpr, ROTARY_DIM: tl.constexpr, IS_NEOX: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    heads, d = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, PADDED_HEAD)
    mask = (heads < num_heads)[:, None] & (d < HEAD_SIZE)[None, :]
    x, pointers = lambda_tile.load_queries(query, row, heads, mask, d, query_row, query_head)
    vectors = tl.zeros((HEADS,), tl.int64) + row
    x = lambda_tile.load_turned(pointers, x, mask, cos, sin, vectors, d, ROTARY_DIM, IS_NEOX)
    lambda_tile.store_output(out, x, row, heads, mask, d, out_row, out_head)
