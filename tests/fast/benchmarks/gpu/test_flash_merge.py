"""What benchmarks/gpu gives FlashAttention to compute Λ attention, without a GPU: a stand-in in torch, vLLM's
own merge.
"""

from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu import checks, flash_merge, report
from gpu.kernels import BLOCK_SIZE
from gpu.models import GIB, TINY_GQA
from gpu.run_all import CPU, Setting
from torch import Tensor

QUICK = Setting(CPU, 6 * GIB)
SMALL = replace(TINY_GQA, trained=64)


def flash(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None, window_size: Any = (-1, -1), **told: Any
) -> Any:
    """vLLM's flash_attn_varlen_func, its masks aligned to the last query and key; log-sum-exp inf where there
    are no keys.
    """
    rows, lens = [*pairwise(told["cu_seqlens_q"].tolist())], told["seqused_k"].tolist()
    assert told["max_seqlen_q"] == max(b - a for a, b in rows) and told["max_seqlen_k"] == max(lens)
    out, lse = torch.empty_like(q).zero_() if out is None else out, torch.full(q.shape[1::-1], torch.inf)
    for (first, end), table, keys in zip(rows, told["block_table"].long(), lens, strict=True):
        key, value = (
            c[table].flatten(0, 1)[:keys].repeat_interleave(q.shape[1] // k.shape[2], 1).double()
            for c in (k, v)
        )
        distance = torch.arange(keys - end + first, keys)[:, None] - torch.arange(keys)
        hidden = (distance < 0) & told["causal"] | (distance > window_size[0]) & (window_size[0] >= 0)
        scores = torch.einsum("thd,jhd->htj", q[first:end].double(), key) * told["softmax_scale"]
        if keys:
            lse[:, first:end] = (scores := scores.masked_fill(hidden, -torch.inf)).logsumexp(-1)
            out[first:end] = torch.einsum("htj,jhd->thd", scores.softmax(-1), value)
    return out, lse


@pytest.mark.parametrize(
    ("length", "queries"), [(50, 1), (1000, 1), (68, 1), (50, 20), (1000, 40), (64, 30), (80, 30), (100, 100)]
)
def test_two_calls_and_a_merge_are_lambda_attention(length: int, queries: int) -> None:
    """Inside the window, past it, and where it leaves the first tokens behind one by one."""
    run = partial(flash_merge.run_flash, flash)
    assert checks.lambda_error(SMALL, torch.float32, length, queries, run) < 1e-5


@pytest.mark.parametrize("length", [70, 380])
def test_a_batch_is_as_its_requests_alone(length: int) -> None:
    """Each from its own blocks, and of those from the window's first on."""
    caches, query = torch.randn(40, BLOCK_SIZE, 2, 128).chunk(2, -1), torch.randn(3 * 20, 8, 64)
    table, together, alone = (
        torch.randperm(40)[:36].view(3, 12).int(),
        torch.empty_like(query),
        torch.empty_like(query),
    )
    way = flash_merge.FlashLambda(flash, SMALL, caches, table, length, 20)
    way(query, together)
    assert torch.equal(way.near.keywords["block_table"], table[:, max(length - 20 - 63, 0) // BLOCK_SIZE :])
    for row, q, out in zip(table.split(1), query.split(20), alone.split(20), strict=True):
        flash_merge.FlashLambda(flash, SMALL, caches, row, length, 20)(q, out)
    torch.testing.assert_close(together, alone)


@pytest.mark.usefixtures("interpretable", "one_thread")
def test_the_stage_runs_as_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_merge, "vllms_flash", lambda: flash)
    planned = [
        row
        for row in flash_merge.flash_merge_plan(QUICK)
        if row["shape"] == TINY_GQA.name and row.get("batch", 1) == 1
    ]
    rows = [{**row, "length": 200, **({"queries": 16} if "queries" in row else {})} for row in planned]
    assert len(rows) == 2
    record = report.Record(tmp_path / "a.json")
    flash_merge.flash_merge(record, rows, QUICK)
    for row in record.rows:
        faster = report.readable(row, None)["FlashAttention + LSE merge, × our kernel"]
        assert faster == row["longctx_ms"] / row["flash_merge_ms"] > 0 and row["error_to_tolerance"] < 1
