"""Λ attention as two calls of vLLM's FlashAttention merged by log-sum-exp, beside our kernels: would it be
faster?

Only measured, no part of the product. The window's call gets the block table from its first block on, and a
sliding window; the other one queries turned to the ceiling and the first keys turned to no rotation, in
blocks that each request would keep.
"""

from functools import partial
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any

import torch
import triton
from gpu import kernels
from gpu.checks import ROUNDINGS, lambda_error
from gpu.kernels import (
    BLOCK_SIZE,
    Flash,
    Plan,
    Pool,
    integers,
    milliseconds,
    of_name,
    randn,
    turns,
    view_of,
    vllms_flash,
)
from gpu.models import GIB, N_GLOBAL, Shape
from torch import Tensor

if TYPE_CHECKING:
    from gpu.report import Record
    from gpu.run_all import Setting


def flash_merge_plan(setting: "Setting") -> Plan:
    """At one length, far past the window: there neither way's cost depends on it."""
    both = [*kernels.decode_plan(setting), *kernels.prefill_plan(setting)]
    return [row for row in both if row["length"] == (131072 if setting.cuda else 4096)]


def flash_merge(record: "Record", plan: Plan, setting: "Setting") -> None:
    """Milliseconds of both, in rows with `batch` of decodes.

    Raises RuntimeError at the end if FlashAttention's way errs.
    """
    flash, wrong, tolerated = vllms_flash(), [], ROUNDINGS * torch.finfo(kernels.DTYPE).eps
    for row in plan:
        shape, length, batch, queries = (
            of_name(setting, row["shape"]),
            row["length"],
            row.get("batch", 1),
            row.get("queries", 1),
        )
        run, few = partial(run_flash, flash), min(queries, shape.trained // 4)
        lengths = (
            shape.trained + few // 2 + 4,
            4 * shape.trained,
        )  # first tokens leave the window one by one; all have
        error = max(lambda_error(shape, kernels.DTYPE, n, few, run) for n in lengths)
        wrong += [] if error <= tolerated else [row]
        pool, query = Pool.of(shape, setting.cuda), randn(batch * queries, shape.heads, shape.head_size)
        tables, out = (
            pool.tables(length, batch, 2 if row.get("bytes", GIB) >= GIB else 8),
            torch.empty_like(query),
        )
        ours: Any = kernels.lambda_decode_time if "batch" in row else kernels.lambda_prefill_time
        found = ours(pool, query, length, tables, shape)
        found = found if "batch" in row else {"longctx_ms": found}
        ways = [FlashLambda(flash, shape, pool.slots_first, table, length, queries) for table in tables]
        theirs = milliseconds([partial(way, query, out) for way in ways])
        record.add(**row, error_to_tolerance=error / tolerated, **found, flash_merge_ms=theirs)
    if wrong:
        raise RuntimeError(
            f"FlashAttention and a merge give other numbers in {len(wrong)} of {len(plan)} rows: {wrong[0]}"
        )


def run_flash(flash: Flash, shape: Shape, query: Tensor, cache: Tensor, table: Tensor, length: int) -> Tensor:
    """As `checks.run_lambda`. No NaN: FlashAttention multiplies values that nobody sees by zero."""
    out = torch.empty_like(query)
    FlashLambda(flash, shape, cache.nan_to_num().chunk(2, -1), table, length, len(query))(query, out)
    return out


class FlashLambda:
    """Of requests of equal `length`, the last `queries` of each; what is made here is the same in all layers,
    but first keys.

    caches: keys and values [num_blocks, BLOCK_SIZE, kv_heads, head_size]. table int32 [requests, columns].
    """

    def __init__(
        self, flash: Flash, shape: Shape, caches: tuple[Tensor, ...], table: Tensor, length: int, queries: int
    ):
        view, n_local, rows = view_of(shape), shape.trained, len(table)
        assert (
            view.ceiling <= n_local
        )  # else some first keys are behind the window, but not at the ceiling yet
        self.flash, self.head_size = (
            partial(flash, softmax_scale=shape.scale, return_softmax_lse=True),
            shape.head_size,
        )
        first = max(length - queries - n_local + 1, 0) // BLOCK_SIZE
        lens, keys = [queries] * rows, [length - first * BLOCK_SIZE] * rows
        sides = {"causal": True, "window_size": [n_local - 1, 0]}
        self.near = self._call(caches, table[:, first:].contiguous(), lens, keys, **sides)
        at = torch.arange(length - queries, length, device=table.device)
        seen = (at - n_local + 1).clamp(0, N_GLOBAL).tolist()  # first keys that the window has left behind
        self.far, self.tokens = None, torch.arange(rows * queries, device=table.device)
        if not any(seen):
            return
        by_query, by_key = (
            torch.cat(turn, -1).to(caches[0].dtype) for turn in turns(shape, view, at.cpu().repeat(rows))
        )
        self.turn, blocks = by_query, table[:, : triton.cdiv(N_GLOBAL, BLOCK_SIZE)].long()
        kept = torch.cat(
            [cache[blocks] for cache in caches], -1
        )  # [rows, blocks, BLOCK_SIZE, kv_heads, 2 * head_size]
        keys_kept = kept.flatten(1, 2)[:, :N_GLOBAL, :, : self.head_size]
        keys_kept.copy_(
            turned(
                keys_kept.flatten(0, 1), self.tokens.new_tensor([*range(N_GLOBAL)] * rows), by_key
            ).view_as(keys_kept)
        )
        # Queries that see equally many are a row of their own.
        counts, lens = (
            [x[i] for x in ((n, len([*same])) for n, same in groupby(seen))] * rows for i in (0, 1)
        )
        numbers = torch.arange(blocks.numel(), dtype=torch.int32, device=table.device).view_as(blocks)
        own = numbers.repeat_interleave(len(counts) // rows, 0)
        self.far = self._call(kept.flatten(0, 1).chunk(2, -1), own, lens, counts, causal=False)

    def _call(self, caches: Any, table: Tensor, lens: list[int], keys: list[int], **kwargs: Any) -> Flash:
        starts, longest = (
            integers([0, *accumulate(lens)]),
            {"max_seqlen_q": max(lens), "max_seqlen_k": max(keys)},
        )
        where = {"cu_seqlens_q": starts, "seqused_k": integers(keys), "block_table": table, **longest}
        return partial(self.flash, k=caches[0], v=caches[1], **where, **kwargs)

    def __call__(self, query: Tensor, out: Tensor) -> None:
        from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

        if self.far is None:
            self.near(q=query, out=out)
            return
        near, far = self.near(q=query), self.far(q=turned(query, self.tokens, self.turn))
        merge_attn_states(out, *far, *near)


def turned(x: Tensor, rows: Tensor, turn: Tensor) -> Tensor:
    """x [n, heads, head_size] by vLLM's operator; turn [any, head_size]: cosines and sines, of x's `rows`
    int64 [n].
    """
    from vllm import _custom_ops as ops

    result = x.clone(memory_format=torch.contiguous_format)
    ops.rotary_embedding(rows, result.flatten(1), None, x.shape[2], turn, True)
    return result
