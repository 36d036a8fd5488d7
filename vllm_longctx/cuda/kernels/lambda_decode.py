"""Λ decode on the GPU: one query per request, over the paged KV cache, its keys split among programs
(Flash-Decoding).

A program reads a share of [first tokens | window] of one request and one KV head, for the whole group of
query heads. The window is a sliding one, or begins where the request's stepped one has begun. A second kernel
joins the shares by their log-sum-exps. Grids depend on shapes and constants only, so that a CUDA graph can
hold them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_longctx.cuda.kernels import lambda_tile
from vllm_longctx.cuda.kernels.lambda_tile import Launch, Turn, View

MAX_SPLITS = 64
PROGRAMS_PER_SM = 4
SHARE = 64  # keys; a share of the work is no less than two such tiles


def decode_launch(head_size: int, element_size: int, group: int) -> Launch:
    """element_size: bytes of the queries' dtype. group: query heads of a KV head."""
    rows = max(16, triton.next_power_of_2(group))
    if element_size > 2:
        return Launch(rows, 32, 8, 3)
    # Half of the stages go to looking up block ids: five keep two tiles of keys and values on their way.
    return Launch(rows, 64 if head_size <= 128 else 32, 4 if rows <= 32 else 8, 5)


def num_sms(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def decode_splits(view: View, rows: int, kv_heads: int, num_sms: int, max_seq_len: int) -> int:
    """Programs among which to split a row's keys, so that `rows` rows fill the device.

    num_sms: its multiprocessors. max_seq_len: the longest text possible, which bounds the keys where the
        window does not.
    """
    tiles = triton.cdiv(min(view.geometry.n_global + view.window, max_seq_len), SHARE)
    wanted = min(triton.cdiv(PROGRAMS_PER_SM * num_sms, max(rows * kv_heads, 1)), MAX_SPLITS)
    return triton.cdiv(tiles, max(triton.cdiv(tiles, wanted), 2))


def decode_workspace(rows: int, heads: int, head_size: int, splits: int, device: torch.device) -> Tensor:
    """Room for the shares of `rows` rows: float32, flat.

    Serves every call of no more rows * splits; keeps nothing.
    """
    return torch.empty(rows * splits * heads * (head_size + 1), dtype=torch.float32, device=device)


def lambda_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    turn: Turn,
    key_turn: Turn,
    view: View,
    scale: float,
    out: Tensor,
    workspace: Tensor,
    splits: int,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    lse: Tensor | None = None,
    launch: Launch | None = None,
    starts: Tensor | None = None,
    branch: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Attention of the last token of each row, whose key is in the cache.

    query, out [rows, heads, head_size]. block_table int32 [rows, columns]; seq_lens int32 [rows], with the
    token itself; a row of 0 is padding, and its output is zero. turn: [rows, rotary_dim / 2]. workspace:
    `decode_workspace`; splits: `decode_splits`. starts int32 [rows]: of stepped windows, for a view without
    any window. branch: as in `stepped_attention`, with scales of 1. The rest as in `lambda_attention`. Raises
    ValueError for tensors of other strides or shapes, or a workspace too small.
    """
    rows, heads, head_size = query.shape
    kv_heads = key_cache.shape[2]
    if rows == 0:
        return
    group = heads // kv_heads
    launch = launch or decode_launch(head_size, query.element_size(), group)
    shares = rows * heads * splits
    if splits > 1 and workspace.numel() < shares * (head_size + 1):
        raise ValueError(
            f"the workspace has {workspace.numel()} elements, {shares * (head_size + 1)} are needed"
        )
    partial, partial_lse = workspace[: shares * head_size], workspace[shares * head_size :]
    out_lse = lambda_tile.lse_arguments(lse, (rows, heads), query)
    further, further_lse = branch or (None, None)
    constants = lambda_tile.view_constants(view, head_size, key_cache.shape[1])
    _decode[(rows, kv_heads, splits)](
        query,
        key_cache,
        value_cache,
        out,
        out_lse,
        partial,
        partial_lse,
        block_table,
        seq_lens,
        starts,
        *lambda_tile.turn_arguments(view, turn, key_turn, rows, query),
        query if view.alibi_slopes is None else view.alibi_slopes,
        lambda_tile.sinks_argument(view.sinks, heads),
        further,
        further_lse,
        *lambda_tile.view_arguments(view, scale * k_scale, v_scale),
        *lambda_tile.stride_arguments(query, out, block_table, key_cache, value_cache),
        GROUP=group,
        SPLIT=splits > 1,
        WRITE_LSE=lse is not None,
        **launch.arguments(),
        **constants,
    )
    if splits > 1:
        _merge[(rows, heads)](
            partial,
            partial_lse,
            out,
            out_lse,
            out.stride(0),
            out.stride(1),
            splits,
            HEAD_SIZE=head_size,
            PADDED_HEAD=constants["PADDED_HEAD"],
            WRITE_LSE=lse is not None,
            PADDED_SPLITS=triton.next_power_of_2(splits),
            num_warps=4,
        )


@triton.jit(do_not_specialize=["seq_lens", "starts"])  # of any alignment
def _decode(
    query_ptr, key_cache, value_cache, out_ptr, lse, partial, partial_lse, block_table, seq_lens, starts,
    cos, sin, key_cos, key_sin, alibi_slopes, sinks, further, further_lse,
    n_global, n_local, ceiling, scale, soft_cap, v_scale,
    stride_query, stride_query_head, stride_out, stride_out_head,
    stride_table, stride_block, stride_slot, stride_head,
    GROUP: tl.constexpr, SPLIT: tl.constexpr, WRITE_LSE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    HEAD_SIZE: tl.constexpr, PADDED_HEAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, FIRST_KEYS: tl.constexpr,
    ROTARY_DIM: tl.constexpr, IS_NEOX: tl.constexpr, TURN_QUERIES: tl.constexpr, TURN_KEYS: tl.constexpr,
    BOTH_PRODUCTS: tl.constexpr, IN_CACHE: tl.constexpr, ALIBI: tl.constexpr, SOFT_CAP: tl.constexpr,
):  # fmt: skip
    """Writes its share, partial [rows, heads, splits, HEAD_SIZE] and its lse in base 2; the whole to `out`
    without SPLIT.
    """
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    seq_len = tl.load(seq_lens + row)
    if starts is not None:
        window_start = tl.minimum(tl.load(starts + row), seq_len)
    else:
        window_start = tl.maximum(seq_len - n_local, 0)
    first_end = tl.minimum(window_start, n_global)
    first_tiles = tl.cdiv(first_end, FIRST_KEYS)
    tiles = tl.cdiv(first_tiles + tl.cdiv(seq_len - window_start, KEYS), splits)  # of this share

    m = tl.arange(0, ROWS)
    d = tl.arange(0, PADDED_HEAD)
    heads, active = kv_head * GROUP + m, m < GROUP
    mask = active[:, None] & (d < HEAD_SIZE)[None, :]
    query, pointers = lambda_tile.load_queries(
        query_ptr, row, heads, mask, d, stride_query, stride_query_head
    )
    positions = tl.zeros((ROWS,), tl.int32) + (seq_len - 1)
    slopes = lambda_tile.load_slopes(alibi_slopes, heads, active, ALIBI)
    cache = lambda_tile.cache_of(
        key_cache, value_cache, block_table, row, kv_head,
        stride_table, stride_block, stride_slot, stride_head,
    )  # fmt: skip
    of_first_share = m < tl.where(split == 0, GROUP, 0)
    softmax = lambda_tile.further_seen(
        lambda_tile.nothing_seen(ROWS, PADDED_HEAD), further, further_lse,
        row, heads, mask & of_first_share[:, None], of_first_share, d, tl.num_programs(1) * GROUP, HEAD_SIZE,
    )  # fmt: skip
    softmax = lambda_tile.sinks_seen(softmax, sinks, heads, of_first_share)

    begin = split * tiles
    if begin < first_tiles:
        turned_query = query
        if TURN_QUERIES:
            vectors = tl.zeros((ROWS,), tl.int64) + row
            turned_query = lambda_tile.load_turned(
                pointers, query, mask, cos, sin, vectors, d, ROTARY_DIM, IS_NEOX
            )
        softmax = lambda_tile.attend_first(
            query, turned_query, positions, slopes, softmax, cache, key_cos, key_sin,
            begin * FIRST_KEYS, tl.minimum((begin + tiles) * FIRST_KEYS, first_end),
            n_global, n_local, ceiling, scale, soft_cap,
            HEAD_SIZE, PADDED_HEAD, BLOCK_SIZE, FIRST_KEYS, ROTARY_DIM, IS_NEOX,
            TURN_QUERIES, TURN_KEYS, BOTH_PRODUCTS, IN_CACHE, ALIBI, SOFT_CAP,
        )  # fmt: skip
    softmax = lambda_tile.attend_window(
        query, positions, slopes, softmax, cache,
        window_start + tl.maximum(begin - first_tiles, 0) * KEYS,
        tl.minimum(window_start + tl.maximum(begin + tiles - first_tiles, 0) * KEYS, seq_len),
        n_local, scale, soft_cap,
        KEYS, True, HEAD_SIZE, PADDED_HEAD, BLOCK_SIZE, ALIBI, SOFT_CAP,
    )  # fmt: skip

    acc = softmax.acc * (v_scale / tl.where(softmax.total > 0, softmax.total, 1.0))[:, None]
    if SPLIT:
        shares = (row * (tl.num_programs(1) * GROUP) + heads) * splits + split
        tl.store(partial + shares[:, None] * HEAD_SIZE + d[None, :], acc, mask=mask)
        tl.store(partial_lse + shares, lambda_tile.log_sum_exp(softmax.top, softmax.total), mask=active)
    else:
        lambda_tile.store_output(out_ptr, acc, row, heads, mask, d, stride_out, stride_out_head)
        if WRITE_LSE:
            lambda_tile.store_lse(lse, softmax, row, heads, active, GROUP)


@triton.jit(do_not_specialize=["splits"])
def _merge(
    partial,
    partial_lse,
    out_ptr,
    lse,
    stride_out,
    stride_out_head,
    splits,
    HEAD_SIZE: tl.constexpr,
    PADDED_HEAD: tl.constexpr,
    WRITE_LSE: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    s = tl.arange(0, PADDED_SPLITS)
    d = tl.arange(0, PADDED_HEAD)
    shares = (row * tl.num_programs(1) + head) * splits + s
    own = tl.load(partial_lse + shares, mask=s < splits, other=float("-inf"))
    top = tl.max(own, 0)
    weights = tl.exp2(own - tl.where(top == float("-inf"), 0.0, top))
    mask = (s < splits)[:, None] & (d < HEAD_SIZE)[None, :]
    values = tl.load(partial + shares[:, None] * HEAD_SIZE + d[None, :], mask=mask, other=0.0)
    total = tl.sum(weights, 0)
    merged = tl.sum(values * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    out_pointers = out_ptr + row * stride_out + head * stride_out_head + d
    tl.store(out_pointers, merged.to(out_ptr.dtype.element_ty), mask=d < HEAD_SIZE)
    if WRITE_LSE:
        tl.store(
            lse + row * tl.num_programs(1) + head, lambda_tile.log_sum_exp(top, total) * 0.6931471805599453
        )
