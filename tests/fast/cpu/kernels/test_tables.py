"""The kernel's tables: whatever the geometry, each query sees exactly its keys, each from where it must be
turned to.
"""

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from vllm.utils.math_utils import cdiv

from vllm_longctx.cpu.kernels.tables import ScratchLayout, kernel_tables, next_tables
from vllm_longctx.geometry import Geometry, branches

BS = 8


@st.composite
def steps(draw: st.DrawFn) -> tuple[Geometry, list[int]]:
    n_local = draw(st.integers(BS, 60))
    n_global = draw(st.integers(0, min(n_local, 30)))
    in_cache = draw(st.booleans())
    ceiling = None if in_cache else draw(st.integers(1, 100))
    geometry = Geometry(n_global, n_local, ceiling, "in_cache" if in_cache else "relative")
    return geometry, draw(st.lists(st.integers(1, 300), min_size=1, max_size=5))


@settings(deadline=None, max_examples=300)
@given(steps())
def test_a_decode_sees_exactly_its_keys(step: tuple[Geometry, list[int]]) -> None:
    geometry, lengths = step
    width = max(cdiv(n, BS) for n in lengths)
    num_blocks = 1 + len(lengths) * width
    scratch = ScratchLayout.plan(geometry, BS, num_blocks, max_num_seqs=len(lengths))
    assume(geometry.n_global == 0 or sum(n > geometry.n_local for n in lengths) <= scratch.rows)
    table = torch.arange(1, num_blocks).view(len(lengths), width).int()
    # Every slot of the pool holds (row, position, turned by); scratch starts with rubbish.
    memory = {
        int(table[r, p // BS]) * BS + p % BS: (r, p, 0) for r, n in enumerate(lengths) for p in range(n)
    }
    tables = kernel_tables(geometry, BS, scratch, table, torch.tensor(lengths), torch.ones(len(lengths)))
    if tables.moves is not None:
        moves = tables.moves
        for source, target in zip(moves.edge_blocks.tolist(), moves.edge_scratch.tolist(), strict=True):
            for offset in range(BS):
                memory[target * BS + offset] = memory[source * BS + offset]
        for row in range(len(moves.target_slots)):
            for j in range(geometry.n_global):
                source = int(moves.first_blocks[row, j // BS]) * BS + j % BS
                owner, position, _ = memory[source]
                memory[int(moves.target_slots[row, j])] = owner, position, int(moves.turn_by[row, j])

    for r, n in enumerate(lengths):
        visible = min(int(tables.seq_lens[r]), geometry.n_global + geometry.n_local)
        slots = range(int(tables.seq_lens[r]) - visible, int(tables.seq_lens[r]))
        seen = {memory.get(int(tables.block_table[r, s // BS]) * BS + s % BS) for s in slots}
        query = torch.tensor([n - 1])
        expected = {
            (r, int(j), n - 1 - int(j) - int(branch.distance[0, j]))
            for branch in branches(geometry, query, torch.arange(n))
            for j in branch.visible[0].nonzero().flatten()
        }
        assert seen == expected and visible == len(expected)


@settings(deadline=None, max_examples=100)
@given(steps(), st.integers(0, 40))
def test_shifted_tables_are_those_made_anew(step: tuple[Geometry, list[int]], change_at: int) -> None:
    """Requests go on by one token a step; at some step they change places, which keeps the lengths of equal
    ones.
    """
    geometry, lengths = step
    lengths = [*lengths, lengths[0]]
    width = max(cdiv(n + 41, BS) for n in lengths)
    num_blocks = 1 + len(lengths) * width
    scratch = ScratchLayout.plan(geometry, BS, num_blocks, max_num_seqs=len(lengths))
    assume(scratch.rows == len(lengths))
    table = torch.arange(1, num_blocks).view(len(lengths), width).int()
    ones, last = torch.ones(len(lengths), dtype=torch.int32), None
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    for number in range(41):
        if number == change_at:
            table = table.flip(0)
        expected = kernel_tables(geometry, BS, scratch, table, seq_lens, ones)
        shifted = last and next_tables(last, table, seq_lens, ones)
        if shifted is not None:
            assert torch.equal(shifted.block_table, expected.block_table)
            assert torch.equal(shifted.seq_lens, expected.seq_lens)
            for ours, theirs in zip(vars(shifted.moves).values(), vars(expected.moves).values(), strict=True):
                assert (torch.as_tensor(ours) == torch.as_tensor(theirs)).all()
        assert number != change_at or shifted is None
        last = shifted or expected
        seq_lens += 1  # in place, as vLLM does


def test_a_lone_request_is_shifted_but_where_it_enters_another_block() -> None:
    geometry, scratch = Geometry(4, 4 * BS, 4 * BS), ScratchLayout(100, 2, 1)
    table, one = torch.arange(1, 41).int()[None], torch.ones(1, dtype=torch.int32)
    last, shifts = None, 0
    for length in range(100, 164):
        seq_lens = torch.tensor([length], dtype=torch.int32)
        shifted = last and next_tables(last, table, seq_lens, one)
        shifts += shifted is not None
        last = shifted or kernel_tables(geometry, BS, scratch, table, seq_lens, one)
    assert shifts >= 64 - 2 * 64 // BS


@given(st.integers(1, 60), st.integers(1, 200), st.integers(1, 50))
def test_without_first_tokens_a_chunk_keeps_every_block_its_queries_see(
    n_local: int, length: int, queries: int
) -> None:
    queries = min(queries, length)
    geometry = Geometry(0, n_local)
    table = torch.arange(1, 1 + cdiv(length, BS)).int()[None]
    scratch = ScratchLayout.plan(geometry, BS, 100, 4)
    tables = kernel_tables(geometry, BS, scratch, table, torch.tensor([length]), torch.tensor([queries]))
    first = max(length - queries - n_local + 1, 0) // BS
    assert tables.block_table[0].tolist() == table[0, first:].tolist()
    assert int(tables.seq_lens[0]) == length - first * BS


def test_scratch_is_planned_for_the_windows_that_fit_the_pool() -> None:
    geometry = Geometry(10, 4096, 4096)
    assert ScratchLayout.plan(geometry, 32, 1280, 256) == ScratchLayout(1280, 2, 10)
    assert ScratchLayout.plan(geometry, 32, 100_000, 256) == ScratchLayout(100_000, 2, 256)
    assert ScratchLayout.plan(Geometry(2, 16), 32, 100, 8).num_blocks == 0
