"""Attention over stepped windows on the GPU, and over what a lookup found before them, in one softmax.

Each row of a batch sees the keys since the start of its window, through the request's own block table:
nothing is shifted. The online softmax begins where the other branch ended, so merging costs no pass of its
own.
"""

import triton
import triton.language as tl
from torch import Tensor

from vllm_longctx.cuda.kernels import lambda_tile
from vllm_longctx.cuda.kernels.lambda_attention import prefill_launch, tile_of, tile_rows


def stepped_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    starts: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    max_query_len: int,
    scale: float,
    out: Tensor,
    branch: tuple[Tensor, Tensor] | None = None,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> None:
    """Attention of the last query_start_loc[r + 1] - query_start_loc[r] tokens of each row r to its keys from
    starts[r] on.

    starts int32 [rows]: positions, none behind a row's first query. branch: output float32 [tokens, heads,
    head_size] and log-sum-exp float32 [tokens, heads] of further keys, contiguous; -inf where there are none;
    without the sinks. soft_cap, sinks, alibi_slopes: as in `View`. The rest as in `lambda_attention`.

    A row is one program for each tile of its queries and KV head. `lambda_decode` splits the keys of rows of
    one token among many.
    """
    tokens, heads, head_size = query.shape
    kv_heads, rows = key_cache.shape[2], len(seq_lens)
    if tokens == 0 or rows == 0:
        return
    group = heads // kv_heads
    launch = prefill_launch(head_size, query.element_size(), group, max_query_len)
    per_tile = launch.rows // group
    further, further_lse = branch or (None, None)
    # Each row wastes less than a tile: this many programs are enough whatever the rows' lengths.
    _stepped[(tokens // per_tile + rows, kv_heads)](
        query,
        key_cache,
        value_cache,
        out,
        block_table,
        starts,
        seq_lens,
        query_start_loc,
        further,
        further_lse,
        lambda_tile.sinks_argument(sinks, heads),
        query if alibi_slopes is None else alibi_slopes,
        rows,
        scale if soft_cap else scale * lambda_tile.LOG2_E,
        *lambda_tile.stride_arguments(query, out, block_table, key_cache, value_cache),
        GROUP=group,
        TOKENS=per_tile,
        ALIBI=alibi_slopes is not None,
        SOFT_CAP=soft_cap,
        UNSEEN=lambda_tile.UNBOUNDED,
        **launch.arguments(),
        **lambda_tile.cache_constants(head_size, key_cache.shape[1]),
    )


# What changes from step to step must not ask for another compilation.
@triton.jit(do_not_specialize=["rows", "block_table", "starts", "seq_lens", "query_start_loc"])
def _stepped(
    query_ptr, key_cache, value_cache, out_ptr, block_table, starts, seq_lens, query_start_loc,
    further, further_lse, sinks, alibi_slopes, rows, scale,
    stride_query, stride_query_head, stride_out, stride_out_head,
    stride_table, stride_block, stride_slot, stride_head,
    GROUP: tl.constexpr, TOKENS: tl.constexpr, ALIBI: tl.constexpr, SOFT_CAP: tl.constexpr,
    UNSEEN: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    HEAD_SIZE: tl.constexpr, PADDED_HEAD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
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
    query, _ = lambda_tile.load_queries(query_ptr, token, heads, mask, d, stride_query, stride_query_head)
    slopes = lambda_tile.load_slopes(alibi_slopes, heads, active, ALIBI)
    softmax = lambda_tile.further_seen(
        lambda_tile.nothing_seen(ROWS, PADDED_HEAD), further, further_lse,
        token, heads, mask, active, d, tl.num_programs(1) * GROUP, HEAD_SIZE,
    )  # fmt: skip
    softmax = lambda_tile.sinks_seen(softmax, sinks, heads, active)

    positions = seq_len - query_len + in_row
    first_query = seq_len - query_len + tile_begin
    end = seq_len - query_len + tl.minimum(tile_begin + TOKENS, query_len)
    begin = tl.load(starts + row)
    # All queries see the whole tiles before the first of them.
    whole_end = begin + (first_query + 1 - begin) // KEYS * KEYS
    cache = lambda_tile.cache_of(
        key_cache, value_cache, block_table, row, kv_head,
        stride_table, stride_block, stride_slot, stride_head,
    )  # fmt: skip
    softmax = lambda_tile.attend_window(
        query, positions, slopes, softmax, cache, begin, whole_end, UNSEEN, scale, SOFT_CAP,
        KEYS, False, HEAD_SIZE, PADDED_HEAD, BLOCK_SIZE, ALIBI, SOFT_CAP > 0,
    )  # fmt: skip
    softmax = lambda_tile.attend_window(
        query, positions, slopes, softmax, cache, whole_end, end, UNSEEN, scale, SOFT_CAP,
        KEYS, True, HEAD_SIZE, PADDED_HEAD, BLOCK_SIZE, ALIBI, SOFT_CAP > 0,
    )  # fmt: skip
    acc = softmax.acc / tl.where(softmax.total > 0, softmax.total, 1.0)[:, None]
    lambda_tile.store_output(out_ptr, acc, token, heads, mask, d, stride_out, stride_out_head)
