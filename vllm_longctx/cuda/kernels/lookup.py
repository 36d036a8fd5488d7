"""The memory's lookup in Triton: what `cpu.kernels.retrieval` computes, for a batch, on the device, through
the block tables.

The k best keys stand in the k blocks with the best maxima, so nothing as long as the memory is ever sorted.
One kernel writes every block's best product, or the bound that its summary gives; torch.topk takes the best
blocks, span by span of the text; a second kernel scores just their keys; a third attends to the best of
these. Workspaces are bounded (`WORKSPACE`), whatever the memory and the number of queries, and nothing is
read back to the host. But the host must know how long memories may be: `lookup_decode` does without.

Scores and places are packed in one int64 as in `engine.lookup`, so equal products go to the earlier key here
too.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from vllm.utils.math_utils import cdiv

from vllm_longctx.cuda.kernels.lambda_tile import tanh_of_ratio
from vllm_longctx.engine.lookup import LEVELS, SCANNED, place_of

WORKSPACE = 1 << 24  # packed scores of a call: 128 MiB
QUERY_TILE = 128  # queries of a row looked up at once


@dataclass(frozen=True)
class Summaries:
    """One layer's keys in 7 bits, by block id: every key is code * step up to step / 2.

    As `cpu.kernels.retrieval.Codes`.

    codes int8 [num_blocks, block_size, kv_heads, head_size]; steps float32 [num_blocks, kv_heads].
    """

    codes: Tensor
    steps: Tensor

    @classmethod
    def like(cls, key_cache: Tensor) -> "Summaries":
        """For a cache [num_blocks, block_size, kv_heads, head_size]."""
        num_blocks, _, kv_heads, _ = key_cache.shape
        codes = torch.zeros(key_cache.shape, dtype=torch.int8, device=key_cache.device)
        return cls(codes, torch.zeros(num_blocks, kv_heads, device=key_cache.device))

    @staticmethod
    def nbytes(num_blocks: int, block_size: int, kv_heads: int, head_size: int) -> int:
        return num_blocks * kv_heads * (block_size * head_size + 4)

    def summarise(self, key_cache: Tensor, blocks: Tensor, filled: Tensor) -> None:
        """Write the codes of blocks, int64 [n], whose first `filled` keys, int64 [n], are there."""
        keys = key_cache[blocks].float()
        missing = torch.arange(keys.shape[1], device=keys.device) >= filled[:, None]
        keys = keys.masked_fill(missing[:, :, None, None], 0)
        steps = keys.abs().amax((1, 3)) / LEVELS
        self.codes[blocks] = (keys / steps.clamp_min(1e-30)[:, None, :, None]).round().to(torch.int8)
        self.steps[blocks] = steps


@dataclass(frozen=True)
class Memories:
    """In one layer, of each row of a batch the tokens begins .. ends - 1 of its text; none if ends <= begins.

    key_cache, value_cache [num_blocks, block_size, kv_heads, head_size], any strides but 1 in the last
    dimension; block_size a power of two of at least 16. block_table int32 [rows, columns]; begins, ends int32
    [rows]. longest: a host's upper bound of ends; None for what the block table has room for. summaries: of
    the layer, those of the memories' blocks up to date; only `best_blocks` needs them.
    """

    key_cache: Tensor
    value_cache: Tensor
    block_table: Tensor
    begins: Tensor
    ends: Tensor
    longest: int | None
    summaries: Summaries | None = None

    @property
    def block_size(self) -> int:
        return self.key_cache.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.key_cache.shape[2]

    @property
    def num_columns(self) -> int:
        """Of the block table, so many hold the longest memory; at least one."""
        width = self.block_table.shape[1]
        return width if self.longest is None else max(min(cdiv(self.longest, self.block_size), width), 1)

    def constants(self, heads: int) -> dict[str, int]:
        """Of a kernel's specialisation. heads: of the queries."""
        d = self.key_cache.shape[3]
        padded = max(triton.next_power_of_2(d), 16)
        return {"GROUP": heads // self.kv_heads, "D": d, "D_PAD": padded, "BLOCK": self.block_size}

    def rows(self, rows: slice) -> "Memories":
        return replace(
            self, block_table=self.block_table[rows], begins=self.begins[rows], ends=self.ends[rows]
        )


def attend_best(
    query: Tensor,
    memories: Memories,
    k: int,
    scale: float,
    share: float | None = None,
    soft_cap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention over each query and head's k best keys: output float32 [rows, T, heads, d], log-sum-exp
    [rows, T, heads].

    query [rows, T, heads, d], fp16, bf16 or fp32: T of each row, turned to the distance at which its memory
    is seen. share: of a memory's blocks to read (`best_blocks`), or None to find the best keys exactly.
    soft_cap: of the scores, as in `lambda_tile.View`; it does not change which keys are best. Zeros and -inf
    for an empty memory.
    """
    rows, length, heads, d = query.shape
    output = torch.empty(rows, length, heads, d, dtype=torch.float32, device=query.device)
    lse = torch.empty(rows, length, heads, dtype=torch.float32, device=query.device)
    blocks = _most_blocks(query, memories, k, share, SCANNED)
    for of_rows, tokens in tiles(query, blocks * memories.block_size):
        part, q = memories.rows(of_rows), query[of_rows, tokens]
        best = top_k(q, part, k) if share is None else best_blocks(q, part, k, share, SCANNED)
        attend(best, part, scale, soft_cap, output[of_rows, tokens], lse[of_rows, tokens])
    return output, lse


def top_k(query: Tensor, memories: Memories, k: int) -> Tensor:
    """The k keys with the highest q·k of each query and head, best first: packed, int64 [rows, T, heads, at
    most k].

    query as in `attend_best`. `unpack` tells products and positions; -inf where there are fewer keys.
    """
    best = _best_blocks(query, memories, k, None)
    return _highest(key_scores(query, memories, place_of(best)), k)


def best_blocks(query: Tensor, memories: Memories, k: int, share: float, least: int) -> Tensor:
    """As `top_k`, in the blocks with the highest bounds, which are chosen as in
    `cpu.kernels.retrieval.best_blocks`.

    A memory of at most k keys is read whole.

    The bound of a block is step * (max q·code + |q|/2) with |.| for the sum of absolutes: no key of it has a
    higher product, up to the last bits of products. Codes are exact in every float type, so a query need not
    be coded.
    """
    group = query.shape[2] // memories.kv_heads
    best = _best_blocks(query, memories, _most_blocks(query, memories, k, share, least), memories.summaries)
    counts = block_counts(memories.begins, memories.ends, memories.block_size, group, k, share, least)
    return _highest(key_scores(query, memories, in_turn(place_of(best), memories.kv_heads, counts)), k)


def block_counts(
    begins: Tensor, ends: Tensor, block_size: int, group: int, k: int, share: float, least: int
) -> Tensor:
    """How many blocks each row's KV heads read: int64 [rows]. group: query heads of a KV head.

    begins, ends: as in `Memories`. A memory of at most k keys is read whole.
    """
    lengths = ((ends + block_size - 1) // block_size - begins // block_size).clamp_min(0)
    counts = (lengths.double() * share).long().clamp_min(least).clamp_max(2 * group * k).minimum(lengths)
    return torch.where(ends - begins <= k, lengths, counts)


def unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Products float32 and positions in the text int64 of packed keys."""
    bits = (packed >> 32).int()
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32), place_of(packed)


def most_blocks(columns: int, block_size: int, group: int, k: int, share: float | None, least: int) -> int:
    """The host's upper bound of the blocks whose keys are scored singly, of `columns`; with a share, of
    `block_counts`.
    """
    if share is None:
        return min(k, columns)
    whole = cdiv(k, block_size) + 1  # of a memory of at most k keys
    return min(max(min(max(int(columns * share), least), 2 * group * k), whole), columns)


def _most_blocks(query: Tensor, memories: Memories, k: int, share: float | None, least: int) -> int:
    group = query.shape[2] // memories.kv_heads
    return most_blocks(memories.num_columns, memories.block_size, group, k, share, least)


def tiles(query: Tensor, keys: int) -> Iterator[tuple[slice, slice]]:
    """Rows and tokens that fit into the workspace together, with so many keys scored singly for each head."""
    rows, length, heads, _ = query.shape
    per_tile = max(1, WORKSPACE // (heads * keys))
    tokens = min(length, per_tile, QUERY_TILE)
    at_once = max(1, per_tile // tokens)
    for row in range(0, rows, at_once):
        for token in range(0, length, tokens):
            yield slice(row, row + at_once), slice(token, token + tokens)


def _best_blocks(query: Tensor, memories: Memories, count: int, summaries: Summaries | None) -> Tensor:
    """The blocks with the best keys, or the highest bounds if there are summaries: packed, [rows, T, heads,
    at most count].
    """
    rows, length, heads, _ = query.shape
    n = memories.num_columns
    span = max(count, WORKSPACE // (rows * length * heads))
    best = torch.empty(rows, length, heads, 0, dtype=torch.int64, device=query.device)
    for first in range(0, n, span):
        found = _highest(_block_scores(query, memories, first, min(span, n - first), summaries), count)
        best = _highest(torch.cat((best, found), -1), count) if first else found
    return best


def _block_scores(
    query: Tensor, memories: Memories, first: int, count: int, summaries: Summaries | None
) -> Tensor:
    """Of the blocks in `count` columns from `first` on the best product or bound.

    Packed, [rows, T, heads, count].
    """
    rows, length, heads, _ = query.shape
    kv_heads, constants = memories.kv_heads, memories.constants(heads)
    keys = memories.key_cache if summaries is None else summaries.codes
    steps = query if summaries is None else summaries.steps  # unused if None
    group, item = constants["GROUP"], query.element_size()
    tile = 16 if length * group <= 16 or item > 2 else 64
    per_step, steps_of_program = blocks_per_step(constants, item), 8
    out = torch.empty(rows, length, heads, count, dtype=torch.int64, device=query.device)
    grid = (cdiv(length * group, tile) * cdiv(count, per_step * steps_of_program), kv_heads, rows)
    _block_scores_kernel[grid](
        query,
        keys,
        steps,
        memories.block_table,
        memories.begins,
        memories.ends,
        out,
        *query.stride()[:3],
        *keys.stride()[:3],
        memories.block_table.stride(0),
        length,
        first,
        count,
        TILE=tile,
        BLOCKS=per_step,
        STEPS=steps_of_program,
        CODED=summaries is not None,
        WIDE=is_wide(query, memories),
        num_stages=2,
        **constants,
    )
    return out


def blocks_per_step(constants: dict[str, int], element_size: int) -> int:
    """So many a program scores at once. element_size: bytes of the queries' dtype."""
    keys = 128 if constants["D_PAD"] * element_size <= 256 else 64
    return max(keys // constants["BLOCK"], 1)


def key_scores(query: Tensor, memories: Memories, columns: Tensor) -> Tensor:
    """Of all keys of blocks, int64 [rows, T, heads or kv_heads, n] of the block table's columns, -1 for none:
    packed, [rows, T, heads, n * block_size].
    """
    rows, length, heads, _ = query.shape
    sets, n = columns.shape[2:]
    columns, bs, per_step = columns.contiguous(), memories.block_size, max(64, memories.block_size)
    out = torch.empty(rows, length, heads, n * bs, dtype=torch.int64, device=query.device)
    _key_scores_kernel[(rows * length, sets, cdiv(n * bs, per_step))](
        query,
        memories.key_cache,
        memories.block_table,
        columns,
        memories.begins,
        memories.ends,
        out,
        *query.stride()[:3],
        *memories.key_cache.stride()[:3],
        memories.block_table.stride(0),
        length,
        n,
        SHARING=heads // sets,
        KEYS=per_step,
        **memories.constants(heads),
    )
    return out


def attend(
    best: Tensor, memories: Memories, scale: float, soft_cap: float, output: Tensor, lse: Tensor
) -> None:
    """Attention over packed keys [rows, T, heads, n], best first, into output [rows, T, heads, d] and lse
    [rows, T, heads].
    """
    rows, length, heads, n = best.shape
    _attend_kernel[(rows * length, heads)](
        best.contiguous(),
        memories.value_cache,
        memories.block_table,
        output,
        lse,
        *memories.value_cache.stride()[:3],
        memories.block_table.stride(0),
        *output.stride()[:2],
        *lse.stride()[:2],
        length,
        n,
        scale,
        KEYS=32,
        SOFT_CAP=soft_cap,
        **memories.constants(heads),
    )


def in_turn(columns: Tensor, kv_heads: int, counts: Tensor) -> Tensor:
    """Blocks that the heads of a KV head choose one after the other, none twice: [rows, T, kv_heads, n], -1
    for none.

    columns int64 [rows, T, heads, n], each head's best first. counts int64 [rows]: as many are chosen.
    """
    n = columns.shape[-1]
    order = columns.unflatten(2, (kv_heads, -1)).transpose(3, 4).flatten(3)
    never = order.shape[-1]
    ranked = (order * never + torch.arange(never, device=order.device)).sort(-1).values
    is_new = torch.ones_like(ranked, dtype=torch.bool)
    is_new[..., 1:] = (ranked // never).diff() != 0
    turns = (ranked % never).masked_fill(~is_new, never).topk(n, largest=False).values
    chosen = order.gather(-1, turns.clamp_max(never - 1))
    unwanted = torch.arange(n, device=order.device) >= counts[:, None, None, None]
    return chosen.masked_fill(unwanted | (turns == never), -1)


def _highest(packed: Tensor, k: int) -> Tensor:
    return packed.topk(min(k, packed.shape[-1]), -1).values


def is_wide(query: Tensor, memories: Memories) -> bool:
    """Whether products are taken in float32: of types that differ, and of bfloat16 where Triton's interpreter
    does it.

    The interpreter multiplies with numpy, which takes bfloat16's bits for integers.
    """
    is_interpreted = query.device.type == "cpu"
    return query.dtype != memories.key_cache.dtype or (is_interpreted and query.dtype == torch.bfloat16)


@triton.jit
def pack(scores, places):
    """As `engine.lookup.pack`."""
    bits = tl.where(scores == 0, 0.0, scores).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) + (0xFFFFFFFF - places.to(tl.int64))


@triton.jit
def score_of(packed):
    ordered = (packed >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def widened(q, begin, end, BLOCK: tl.constexpr, CODED: tl.constexpr, WIDE: tl.constexpr):
    """Queries [TILE, D_PAD] as they are multiplied, half of their sums of absolutes, and the memory.

    CODED: with bounds, which are of whole blocks.
    """
    margin = tl.zeros((q.shape[0],), tl.float32)
    if CODED:
        margin = tl.sum(tl.abs(q.to(tl.float32)), 1) / 2
        end = tl.where(end > begin, (end + BLOCK - 1) // BLOCK * BLOCK, begin)
        begin = begin // BLOCK * BLOCK
    if WIDE:
        q = q.to(tl.float32)
    return q, margin, begin, end


@triton.jit
def best_of_blocks(
    q, margin, keys, steps, table, kv_head, kv_heads, first, last, begin, end, key_block, key_token, key_head,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, CODED: tl.constexpr,
):  # fmt: skip
    """Of BLOCKS columns from `first` on, before `last`, the best product or bound: packed [TILE, BLOCKS].

    q, margin, begin, end: from `widened`.
    """
    dims, key = tl.arange(0, D_PAD), tl.arange(0, BLOCKS * BLOCK)
    column = first + key // BLOCK
    position = column * BLOCK + key % BLOCK
    visible = (position >= begin) & (position < end) & (column < last)
    block = tl.load(table + column, mask=visible, other=0).to(tl.int64)
    k = tl.load(
        keys + (block * key_block + key % BLOCK * key_token + kv_head * key_head)[None, :] + dims[:, None],
        mask=visible[None, :] & (dims[:, None] < D),
        other=0,
    )
    products = tl.dot(q, k.to(q.dtype), input_precision="ieee")
    products = tl.where(visible[None, :], products, float("-inf"))
    best = tl.max(tl.reshape(products, (q.shape[0], BLOCKS, BLOCK)), 2)
    column = first + tl.arange(0, BLOCKS)
    if CODED:
        visible = (column * BLOCK >= begin) & (column * BLOCK < end) & (column < last)
        block = tl.load(table + column, mask=visible, other=0).to(tl.int64)
        width = tl.load(steps + block * kv_heads + kv_head, mask=visible, other=1.0)
        best = (best + margin[:, None]) * width[None, :]
    return pack(best, column[None, :])


# What changes from step to step must not ask for another compilation.
@triton.jit(do_not_specialize=["block_table", "begins", "ends", "length", "first", "count"])
def _block_scores_kernel(
    query, keys, steps, block_table, begins, ends, out,
    query_row, query_token, query_head, key_block, key_token, key_head, table_row, length, first, count,
    GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    BLOCKS: tl.constexpr, STEPS: tl.constexpr, CODED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """TILE queries (of a KV head's heads) with STEPS times BLOCKS blocks.

    Tiles of queries that share keys run side by side.
    """
    num_tiles = tl.cdiv(length * GROUP, TILE)
    kv_head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    of_tile = tl.program_id(0) % num_tiles * TILE + tl.arange(0, TILE)
    token = of_tile // GROUP
    head = kv_head * GROUP + of_tile % GROUP
    is_query = token < length
    dims = tl.arange(0, D_PAD)
    q = tl.load(
        query + row * query_row + token[:, None] * query_token + head[:, None] * query_head + dims[None, :],
        mask=is_query[:, None] & (dims[None, :] < D),
        other=0.0,
    )
    q, margin, begin, end = widened(q, tl.load(begins + row), tl.load(ends + row), BLOCK, CODED, WIDE)
    table = block_table + row * table_row
    to = out + ((row * length + token) * (tl.num_programs(1) * GROUP) + head) * count
    start = tl.program_id(0) // num_tiles * (STEPS * BLOCKS)
    for step in range(tl.minimum(STEPS, tl.cdiv(count - start, BLOCKS))):
        number = start + step * BLOCKS + tl.arange(0, BLOCKS)
        packed = best_of_blocks(
            q, margin, keys, steps, table, kv_head, tl.num_programs(1), first + start + step * BLOCKS,
            first + count, begin, end, key_block, key_token, key_head, D, D_PAD, BLOCK, BLOCKS, CODED,
        )  # fmt: skip
        tl.store(to[:, None] + number[None, :], packed, mask=is_query[:, None] & (number < count)[None, :])


@triton.jit(do_not_specialize=["block_table", "begins", "ends", "length", "num_columns"])
def _key_scores_kernel(
    query, keys, block_table, columns, begins, ends, out,
    query_row, query_token, query_head, key_block, key_token, key_head, table_row, length, num_columns,
    SHARING: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """One token of SHARING heads with KEYS keys of the blocks that these heads chose."""
    which = tl.program_id(0).to(tl.int64)
    row, token = which // length, which % length
    first_head = tl.program_id(1) * SHARING
    kv_head = (first_head // GROUP).to(tl.int64)
    num_heads = tl.num_programs(1) * SHARING
    key = tl.program_id(2) * KEYS + tl.arange(0, KEYS)
    is_key = key < num_columns * BLOCK
    chosen = columns + (which * tl.num_programs(1) + tl.program_id(1)) * num_columns
    column = tl.load(chosen + key // BLOCK, mask=is_key, other=-1)
    position = column * BLOCK + key % BLOCK
    visible = (column >= 0) & (position >= tl.load(begins + row)) & (position < tl.load(ends + row))
    block = tl.load(block_table + row * table_row + column, mask=visible, other=0).to(tl.int64)
    dims = tl.arange(0, D_PAD)
    k = tl.load(
        keys + (block * key_block + key % BLOCK * key_token + kv_head * key_head)[:, None] + dims[None, :],
        mask=visible[:, None] & (dims[None, :] < D),
        other=0.0,
    ).to(tl.float32)
    for head in range(first_head, first_head + SHARING):
        q = tl.load(
            query + row * query_row + token * query_token + head * query_head + dims, mask=dims < D, other=0.0
        )
        scores = tl.where(visible, tl.sum(k * q.to(tl.float32)[None, :], 1), float("-inf"))
        to = out + (which * num_heads + head) * num_columns * BLOCK
        tl.store(to + key, pack(scores, tl.maximum(position, 0)), mask=is_key)


@triton.jit(do_not_specialize=["block_table", "length", "num_best"])
def _attend_kernel(
    best, values, block_table, out, lse,
    value_block, value_token, value_head, table_row, out_row, out_token, lse_row, lse_token, length, num_best,
    scale,
    GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    SOFT_CAP: tl.constexpr,
):  # fmt: skip
    """One token of one head."""
    which = tl.program_id(0).to(tl.int64)
    row, token, head = which // length, which % length, tl.program_id(1)
    mine = best + (which * tl.num_programs(1) + head) * num_best
    values += (head // GROUP).to(tl.int64) * value_head
    dims = tl.arange(0, D_PAD)
    highest = score_of(tl.load(mine)) * scale
    if SOFT_CAP > 0:
        highest = SOFT_CAP * tanh_of_ratio(highest, SOFT_CAP)
    highest = tl.maximum(highest, -3.4e38)  # finite without keys too
    total = 0.0
    sums = tl.zeros((D_PAD,), tl.float32)
    for begin in range(0, num_best, KEYS):
        number = begin + tl.arange(0, KEYS)
        packed = tl.load(mine + number, mask=number < num_best, other=0)
        scores = tl.where(number < num_best, score_of(packed) * scale, float("-inf"))
        there = scores > float("-inf")
        if SOFT_CAP > 0:
            scores = tl.where(there, SOFT_CAP * tanh_of_ratio(scores, SOFT_CAP), float("-inf"))
        position = tl.where(there, 0xFFFFFFFF - (packed & 0xFFFFFFFF), 0)
        weights = tl.exp(scores - highest)
        block = tl.load(block_table + row * table_row + position // BLOCK, mask=there, other=0).to(tl.int64)
        v = tl.load(
            values + (block * value_block + position % BLOCK * value_token)[:, None] + dims[None, :],
            mask=there[:, None] & (dims[None, :] < D),
            other=0.0,
        ).to(tl.float32)
        sums += tl.sum(weights[:, None] * v, 0)
        total += tl.sum(weights, 0)
    safe = tl.where(total > 0, total, 1.0)
    to = out + row * out_row + token * out_token + head * D
    tl.store(to + dims, sums / safe, mask=dims < D)
    tl.store(
        lse + row * lse_row + token * lse_token + head,
        tl.where(total > 0, highest + tl.log(safe), float("-inf")),
    )
