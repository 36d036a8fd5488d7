"""Scratch blocks over time: rows change hands, blocks are shared and written again, and no stale copy is ever
read.
"""

import random

import torch
from vllm import _custom_ops as ops

from vllm_longctx.cpu.kernels.scratch import Scratch, packed_order, unpack
from vllm_longctx.cpu.kernels.tables import ScratchLayout, kernel_tables
from vllm_longctx.geometry import Geometry
from vllm_longctx.rotary import Rotary, inverse_frequencies

BS, D, KV_HEADS, LAYERS, ISA = 32, 32, 2, 2, "vec"
GEOMETRY = Geometry(5, 70, 60)


def test_each_step_reads_what_its_own_table_says() -> None:
    random.seed(1)
    rotary = Rotary(D, D, True, inverse_frequencies(D, {"rope_theta": 100.0}))
    places = packed_order(BS, D, torch.float32, ISA)
    layout = ScratchLayout.plan(GEOMETRY, BS, num_blocks=24, max_num_seqs=3)
    blocks = layout.first_block + layout.num_blocks
    cache = torch.zeros(LAYERS * blocks, KV_HEADS, BS, 2 * D)
    scratch = Scratch(layout, cache, [0, blocks], GEOMETRY.n_global, places, rotary, ISA)
    layer_slots = torch.arange(LAYERS)[:, None] * blocks * BS

    def write(slots: torch.Tensor) -> None:
        """The forward's own writes, seen by `forget_written` as in a real step."""
        scratch.forget_written(slots)
        rows = torch.randn(2, LAYERS * len(slots), KV_HEADS, D)
        key_cache, value_cache = cache.view(len(cache), KV_HEADS, 2 * BS, D).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(
            rows[0], rows[1], key_cache, value_cache, (layer_slots + slots).flatten(), ISA
        )

    write(torch.arange(1, 24 * BS))
    shared = random.sample(range(1, 24), 6)
    for _ in range(200):
        if random.random() < 0.3:  # a block changes hands and is written by its new owner
            block = random.choice(shared)
            write(torch.arange(block * BS, (block + 1) * BS))
        rows = random.randint(1, 3)
        table = torch.tensor(
            [shared if random.random() < 0.8 else random.sample(range(1, 24), 6) for _ in range(rows)]
        ).int()
        lengths = torch.tensor([random.randint(71, 6 * BS) for _ in range(rows)])
        tables = kernel_tables(GEOMETRY, BS, layout, table, lengths, torch.ones(rows, dtype=torch.long))
        assert tables.moves is not None
        scratch.fill(tables.moves)
        for row in range(rows):
            check_row(cache, blocks, places, rotary, table[row], int(lengths[row]), tables, row)


def test_nan_of_a_row_before_does_not_stay() -> None:
    """The kernel reads whole blocks: those of the row that a text gets hold nothing of the text that had it
    before.
    """
    rotary = Rotary(D, D, True, inverse_frequencies(D, {"rope_theta": 100.0}))
    layout = ScratchLayout.plan(GEOMETRY, BS, num_blocks=24, max_num_seqs=3)
    blocks = layout.first_block + layout.num_blocks
    cache = torch.randn(LAYERS * blocks, KV_HEADS, BS, 2 * D)
    places = packed_order(BS, D, torch.float32, ISA)
    scratch = Scratch(layout, cache, [0, blocks], GEOMETRY.n_global, places, rotary, ISA)
    for layer in range(LAYERS):
        cache[layer * blocks + 1 : layer * blocks + 7] = torch.nan
    for first, length in [(1, 104), (1, 130), (10, 127), (10, 128)]:
        table = torch.arange(first, first + 6, dtype=torch.int32)[None]
        tables = kernel_tables(
            GEOMETRY, BS, layout, table, torch.tensor([length]), torch.ones(1, dtype=torch.long)
        )
        assert tables.moves is not None
        scratch.fill(tables.moves)
        for layer in range(LAYERS):
            read = cache[layer * blocks + tables.block_table[0].long()]
            assert bool(read.isfinite().all()) == (first == 10)


def check_row(cache, blocks, places, rotary, table, length, tables, row) -> None:
    """The last G + N entries of the row's table hold the first tokens, turned, and then the window in
    place.
    """
    n_global, n_local = GEOMETRY.n_global, GEOMETRY.n_local
    for layer in range(LAYERS):
        text_keys, text_values = unpack(cache[layer * blocks + table.long()], places)
        keys, values = unpack(cache[layer * blocks + tables.block_table[row].long()], places)
        end = int(tables.seq_lens[row])
        sees = slice(end - n_global - n_local, end) if length >= n_global + n_local else slice(0, end)
        start = length - n_local
        count = min(n_global, start)
        turn = GEOMETRY.unseen_distance(
            torch.tensor([length - 1]), torch.arange(count), torch.tensor([start])
        )[0]
        expected = torch.cat((rotary.turn(text_keys[:count], turn[:, None]), text_keys[start:length]))
        assert torch.equal(keys[sees], expected)
        assert torch.equal(values[sees], torch.cat((text_values[:count], text_values[start:length])))
