"""What kernels must move and compute, against counts by hand."""

import pytest
from gpu import costs, kernels, report
from gpu.costs import Cost
from gpu.models import GIB, GQA_8B, LLAMA_2_7B, TINY_GQA
from gpu.report import FULL
from gpu.run_all import Setting


def test_bytes_or_operations_take_the_time() -> None:
    assert Cost(3 * 10**12, 1).seconds(3e12) == 1
    assert Cost(1, int(2 * costs.OPERATIONS_PER_S)).seconds(3e12) == pytest.approx(2)
    assert Cost(1, 2) + Cost(3, 4) == Cost(4, 6)


def test_a_decode_moves_its_keys_once_and_its_shares_twice() -> None:
    one = costs.decode(GQA_8B, 1, 4096, 1)
    keys, table, both = 4096 * 8 * 128 * 2 * 2, 128 * 8 * 4, 2 * 32 * 128 * 2
    assert one == Cost(keys + table + both, 4 * 8 * 16 * 128 * 4096)
    assert costs.decode(GQA_8B, 1, 4096, 32).moved_bytes == one.moved_bytes + 2 * 32 * 32 * 129 * 4
    assert costs.decode(GQA_8B, 16, 4096, 1) == Cost(16 * one.moved_bytes, 16 * one.operations)


def test_a_prompts_chunk_computes_its_tiles_and_reads_its_window_once() -> None:
    tokens, trained = 64, TINY_GQA.trained  # a tile has 32 queries of 4 heads
    inside = costs.prefill(TINY_GQA, tokens, tokens)
    assert inside.operations == 4 * 2 * 128 * 64 * (64 + 64)
    beyond = costs.prefill(TINY_GQA, 4096, tokens)
    # Each tile sees 32 + 511 keys, in tiles of 64, and one tile of first tokens.
    assert beyond.operations == 4 * 2 * 128 * 64 * 2 * (576 + 16)
    both = 2 * tokens * 8 * 64 * 2
    assert beyond.moved_bytes == (trained - 1 + tokens + 10) * TINY_GQA.layer_kv_bytes + both


def test_summaries_are_half_of_the_keys_that_a_lookup_reads() -> None:
    exact, blocks = (costs.lookup(GQA_8B, 1 << 20, 64, n) for n in (None, 3276))
    keys = (1 << 20) * 8 * 128 * 2
    assert keys < exact.moved_bytes < 1.2 * keys
    assert keys / 2 < blocks.moved_bytes < 0.9 * keys


def test_every_decode_of_the_plan_could_reach_its_goal() -> None:
    """Else it would be missed by arithmetic."""
    copy = 2.5e12
    for row in kernels.decode_plan(Setting(FULL, 79 * GIB)):
        shape = next(s for s in (LLAMA_2_7B, GQA_8B) if s.name == row["shape"])
        seen = min(row["length"], shape.window)
        cost = costs.decode(shape, row["batch"], seen, 32 if row["batch"] == 1 else 2)
        shown = report.readable(
            {
                **row,
                "splits": 2,
                "longctx_ms": 1.0,
                "moved_bytes": cost.moved_bytes,
                "operations": cost.operations,
            },
            copy,
        )
        assert 0.8 < shown["of_copy_possible"] < 1 and shown["possible_ms"] > 0
        assert "moved_bytes" not in shown
