"""Λ attention of a mixed batch on the GPU: chunks of prompts and single decoded tokens together, over the
paged KV cache.

A program takes a tile of queries of one request and one KV head. It reads the first tokens and the windows of
its queries through the request's block table, and nothing else: the cost of a query is O(n_global + n_local)
at any length of the text.
"""

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from vllm_longctx.cuda.kernels import lambda_tile
from vllm_longctx.cuda.kernels.lambda_tile import Launch, Turn, View


def prefill_launch(head_size: int, element_size: int, group: int, max_query_len: int) -> Launch:
    """element_size: bytes of the queries' dtype. group: query heads of a KV head."""
    if element_size > 2:
        launch = Launch(32, 16, 8, 3)
    elif max_query_len * group <= 16:
        launch = Launch(16, 64 if head_size <= 128 else 32, 4, 5)
    elif head_size > 128:
        launch = Launch(64, 32, 8, 3)
    else:
        launch = Launch(128, 64, 8, 5)
    return replace(launch, rows=max(launch.rows, triton.next_power_of_2(group)))


def lambda_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    max_query_len: int,
    turn: Turn,
    key_turn: Turn,
    view: View,
    scale: float,
    out: Tensor,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    lse: Tensor | None = None,
    launch: Launch | None = None,
) -> None:
    """Attention of the last query_start_loc[r + 1] - query_start_loc[r] tokens of each row r, whose keys are
    in the cache.

    query, out [tokens, heads, head_size]: float16, bfloat16 or float32; the last dimension contiguous. Tokens
        behind the last row's are left as they are in `out`. key_cache, value_cache [num_blocks, block_size,
        kv_heads, head_size]: halves of one tensor, of the query's dtype or float8. block_table int32 [rows,
        columns]: blocks between the first tokens and the windows may be null. seq_lens int32 [rows]: with the
        step's tokens; 0 for padding. query_start_loc int32 [rows + 1]. max_query_len: a bound on the tokens
        of a row; it chooses the tile only. turn: cos and sin float32 [tokens, rotary_dim / 2] of
        `view.query_turn`; key_turn: [n_global, rotary_dim / 2] of `view.key_turn`. None where those are None.
        Neither has the attention factor. lse: takes the scores' log-sum-exp, float32 [tokens, heads], by
        which to join this attention to one over other keys; the view's sinks are in it. scale: of the scores.
        k_scale, v_scale: what the cache's keys and values are to be multiplied by. Raises ValueError for
        tensors of other strides or shapes.
    """
    tokens, heads, head_size = query.shape
    kv_heads, rows = key_cache.shape[2], len(seq_lens)
    if tokens == 0 or rows == 0:
        return
    group = heads // kv_heads
    launch = launch or prefill_launch(head_size, query.element_size(), group, max_query_len)
    per_tile = launch.rows // group
    # Each row wastes less than a tile: this many programs are enough whatever the rows' lengths.
    _prefill[(tokens // per_tile + rows, kv_heads)](
        query,
        key_cache,
        value_cache,
        out,
        lambda_tile.lse_arguments(lse, (tokens, heads), query),
        block_table,
        seq_lens,
        query_start_loc,
        *lambda_tile.turn_arguments(view, turn, key_turn, tokens, query),
        query if view.alibi_slopes is None else view.alibi_slopes,
        lambda_tile.sinks_argument(view.sinks, heads),
        rows,
        *lambda_tile.view_arguments(view, scale * k_scale, v_scale),
        *lambda_tile.stride_arguments(query, out, block_table, key_cache, value_cache),
        GROUP=group,
        TOKENS=per_tile,
        WRITE_LSE=lse is not None,
        **launch.arguments(),
        **lambda_tile.view_constants(view, head_size, key_cache.shape[1]),
    )


@triton.jit
def tile_of(query_start_loc, tile, rows, TOKENS: tl.constexpr):
    """The row a tile belongs to, its first token and length, and where in it the tile begins, which may be
    behind its end.

    Row r begins with tile query_start_loc[r] // TOKENS + r.
    """
    low = tile * 0
    high = low + rows
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_start_loc + middle) // TOKENS + middle <= tile:
            low = middle + 1
        else:
            high = middle
    row = low - 1
    row_begin = tl.load(query_start_loc + row)
    query_len = tl.load(query_start_loc + row + 1) - row_begin
    return row, row_begin, query_len, (tile - (row_begin // TOKENS + row)) * TOKENS


@triton.jit
def tile_rows(m, tile_begin, query_len, kv_head, GROUP: tl.constexpr, TOKENS: tl.constexpr):
    """Of the (query, head) pairs m of a tile: the query's place in its row, the head, and whether there is
    the pair.
    """
    in_row = tile_begin + m // GROUP
    return in_row, kv_head * GROUP + m % GROUP, (m < TOKENS * GROUP) & (in_row < query_len)


@triton.jit
def attend_windows(
    query, positions, slopes, softmax, cache, first_query, last_query, n_local, scale, soft_cap,
    KEYS: tl.constexpr, HEAD_SIZE: tl.constexpr, PADDED_HEAD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ALIBI: tl.constexpr, SOFT_CAP: tl.constexpr,
):  # fmt: skip
    """The windows of a tile's queries, first_query .. last_query.

    Keys before the last query's window are not seen by all queries, nor are those behind the first query.
    Between them are whole tiles without a mask.
    """
    begin = tl.maximum(first_query - n_local + 1, 0)
    end = last_query + 1
    last_start = tl.maximum(last_query - n_local + 1, 0)
    left_end = tl.minimum(begin + tl.cdiv(last_start - begin, KEYS) * KEYS, end)
    middle_end = tl.maximum(begin + (first_query + 1 - begin) // KEYS * KEYS, left_end)
    softmax = lambda_tile.attend_window(
        query, positions, slopes, softmax, cache, begin, left_end, n_local, scale, soft_cap,
        KEYS, True, HEAD_SIZE, PADDED_HEAD, BLOCK_SIZE, ALIBI, SOFT_CAP,
    )  # fmt: skip
    softmax = lambda_tile.attend_window(
        query, positions, slopes, softmax, cache, left_end, middle_end, n_local, scale, soft_cap,
        KEYS, False, HEAD_SIZE, PADDED_HEAD, BLOCK_SIZE, ALIBI, SOFT_CAP,
    )  # fmt: skip
    return lambda_tile.attend_window(
        query, positions, slopes, softmax, cache, middle_end, end, n_local, scale, soft_cap,
        KEYS, True, HEAD_SIZE, PADDED_HEAD, BLOCK_SIZE, ALIBI, SOFT_CAP,
    )  # fmt: skip


# What changes from step to step must not ask for another compilation.
@triton.jit(do_not_specialize=["rows", "seq_lens", "query_start_loc"])
def _prefill(
    query_ptr, key_cache, value_cache, out_ptr, lse, block_table, seq_lens, query_start_loc,
    cos, sin, key_cos, key_sin, alibi_slopes, sinks, rows,
    n_global, n_local, ceiling, scale, soft_cap, v_scale,
    stride_query, stride_query_head, stride_out, stride_out_head,
    stride_table, stride_block, stride_slot, stride_head,
    GROUP: tl.constexpr, TOKENS: tl.constexpr, WRITE_LSE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
    HEAD_SIZE: tl.constexpr, PADDED_HEAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, FIRST_KEYS: tl.constexpr,
    ROTARY_DIM: tl.constexpr, IS_NEOX: tl.constexpr, TURN_QUERIES: tl.constexpr, TURN_KEYS: tl.constexpr,
    BOTH_PRODUCTS: tl.constexpr, IN_CACHE: tl.constexpr, ALIBI: tl.constexpr, SOFT_CAP: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(1)
    row, row_begin, query_len, tile_begin = tile_of(query_start_loc, tl.program_id(0), rows, TOKENS)
    seq_len = tl.load(seq_lens + row)
    if tile_begin >= query_len or seq_len == 0:
        return

    m = tl.arange(0, ROWS)
    d = tl.arange(0, PADDED_HEAD)
    in_row, heads, active = tile_rows(m, tile_begin, query_len, kv_head, GROUP, TOKENS)
    mask = active[:, None] & (d < HEAD_SIZE)[None, :]
    token = (row_begin + in_row).to(tl.int64)
    query, pointers = lambda_tile.load_queries(
        query_ptr, token, heads, mask, d, stride_query, stride_query_head
    )
    context = seq_len - query_len
    positions = context + in_row
    first_query = context + tile_begin
    last_query = context + tl.minimum(tile_begin + TOKENS, query_len) - 1
    slopes = lambda_tile.load_slopes(alibi_slopes, heads, active, ALIBI)
    cache = lambda_tile.cache_of(
        key_cache, value_cache, block_table, row, kv_head,
        stride_table, stride_block, stride_slot, stride_head,
    )  # fmt: skip
    softmax = lambda_tile.sinks_seen(lambda_tile.nothing_seen(ROWS, PADDED_HEAD), sinks, heads, active)

    first_end = tl.minimum(tl.maximum(last_query - n_local + 1, 0), n_global)
    if first_end > 0:
        turned_query = query
        if TURN_QUERIES:
            turned_query = lambda_tile.load_turned(
                pointers, query, mask, cos, sin, token, d, ROTARY_DIM, IS_NEOX
            )
        softmax = lambda_tile.attend_first(
            query, turned_query, positions, slopes, softmax, cache, key_cos, key_sin,
            0, first_end, n_global, n_local, ceiling, scale, soft_cap,
            HEAD_SIZE, PADDED_HEAD, BLOCK_SIZE, FIRST_KEYS, ROTARY_DIM, IS_NEOX,
            TURN_QUERIES, TURN_KEYS, BOTH_PRODUCTS, IN_CACHE, ALIBI, SOFT_CAP,
        )  # fmt: skip

    softmax = attend_windows(
        query, positions, slopes, softmax, cache, first_query, last_query, n_local, scale, soft_cap,
        KEYS, HEAD_SIZE, PADDED_HEAD, BLOCK_SIZE, ALIBI, SOFT_CAP,
    )  # fmt: skip
    acc = softmax.acc * (v_scale / tl.where(softmax.total > 0, softmax.total, 1.0))[:, None]
    lambda_tile.store_output(out_ptr, acc, token, heads, mask, d, stride_out, stride_out_head)
    if WRITE_LSE:
        lambda_tile.store_lse(lse, softmax, token, heads, active, GROUP)
