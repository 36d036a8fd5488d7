"""The memory's lookup against the dense float64 reference, and what `best_blocks` promises against
`top_k`.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_longctx import reference
from vllm_longctx.cpu.kernels import retrieval
from vllm_longctx.cpu.kernels.branches import additive, attend, with_sinks
from vllm_longctx.cpu.kernels.retrieval import (
    Codes,
    Memory,
    Pages,
    Selection,
    attend_best,
    best_blocks,
    recall,
    top_k,
)
from vllm_longctx.geometry import local_branch, memory_branch
from vllm_longctx.rotary import Rotary, inverse_frequencies

pytestmark = pytest.mark.usefixtures("one_thread")
BS, D, KV_HEADS, SCALE = 8, 16, 2, 0.4
ROTARY = Rotary(D, D, True, inverse_frequencies(D, {"rope_theta": 50.0}))


def layout(kernel_order: bool) -> tuple[Tensor, Tensor]:
    """The order of the CPU kernel without AMX (keys [d, block], values [block, d]), or any other."""
    if kernel_order:
        number = torch.arange(BS * D)
        return number.view(D, BS).T, number.view(BS, D)
    return torch.randperm(BS * D).view(BS, D), torch.randperm(BS * D).view(BS, D)


def stored(key: Tensor, value: Tensor, block_table: Tensor, places: tuple[Tensor, Tensor]) -> Pages:
    """A cache that holds keys and values [S, kv_heads, D] of one text, and NaN everywhere else."""
    halves = torch.full((int(block_table.max()) + 2, key.shape[1], 2, BS * D), torch.nan, dtype=key.dtype)
    position = torch.arange(len(key))
    block = block_table[position // BS, None, None]
    for which, x in enumerate((key, value)):
        halves[
            block, torch.arange(key.shape[1])[:, None], which, places[which][position % BS].unsqueeze(1)
        ] = x
    return Pages(halves.view(*halves.shape[:2], BS, 2 * D), places)


def table(blocks: int, run: bool) -> Tensor:
    return torch.arange(3, 3 + blocks) if run else torch.randperm(2 * blocks)[:blocks]


def a_memory(
    length: int,
    run: bool = True,
    begin: int = 0,
    dtype: torch.dtype = torch.float32,
    key: Tensor | None = None,
) -> Memory:
    key = torch.randn(length, KV_HEADS, D) if key is None else key
    blocks = table(-(-length // BS), run)
    pages = stored(key.to(dtype), torch.randn(length, KV_HEADS, D).to(dtype), blocks, layout(True))
    codes = Codes.empty(len(pages.cache) + 1, KV_HEADS, BS, D)
    full = blocks[: length // BS]
    codes.summarise(pages, full)
    if length % BS:
        codes.summarise(pages, blocks[-1:], torch.tensor([length % BS]))
    return Memory(pages, blocks, begin, length, codes)


@settings(deadline=None, max_examples=60)
@given(
    group=st.sampled_from([1, 2, 4]),
    context=st.integers(1, 70),
    begin=st.integers(0, 40),
    queries=st.integers(1, 20),
    k=st.integers(1, 80),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    run=st.booleans(),
    kernel_order=st.booleans(),
    soft_cap=st.sampled_from([0.0, 1.5]),
    has_sinks=st.booleans(),
)
@example(4, 64, 0, 1, 70, torch.float32, True, True, 0.0, False)  # decode, whole blocks, every key
@example(4, 64, 0, 1, 70, torch.float32, True, True, 1.5, True)  # fewer keys than k under a cap
@example(1, 13, 13, 3, 5, torch.float32, True, True, 0.0, False)  # no memory yet
@example(1, 13, 13, 3, 5, torch.float32, True, True, 1.5, True)
def test_attention_over_the_best_keys_is_the_references(
    group: int,
    context: int,
    begin: int,
    queries: int,
    k: int,
    dtype: torch.dtype,
    run: bool,
    kernel_order: bool,
    soft_cap: float,
    has_sinks: bool,
) -> None:
    """A window that begins at `context`, and the memory from `begin` on before it."""
    torch.manual_seed(context * 100 + begin)
    begin, length = min(begin, context), context + queries
    query = torch.randn(queries, group * KV_HEADS, D)
    key, value = (torch.randn(length, KV_HEADS, D).to(dtype) for _ in range(2))
    keys, positions = torch.arange(length), torch.arange(context, length)
    start = torch.full_like(positions, context)
    local, memory = local_branch(positions, keys, start), memory_branch(positions, keys, start, k)
    memory = replace(memory, visible=memory.visible & (keys >= begin))
    sinks = torch.randn(group * KV_HEADS) if has_sinks else None
    expected = reference.attention(
        query, key, value, [local, memory], SCALE, ROTARY, soft_cap=soft_cap, sinks=sinks
    )

    q, own = ROTARY.turn(query, positions[:, None]), ROTARY.turn(key.float(), keys[:, None])
    by_head = (x.transpose(0, 1)[None] for x in (q, own[context:], value[context:].float()))
    output, lse = attend(*by_head, additive(local.visible[:, context:]), SCALE, soft_cap)
    blocks = table(-(-length // BS), run)
    stored_memory = Memory(stored(key, value, blocks, layout(kernel_order)), blocks, begin, context)
    turned = ROTARY.turn(query, (positions - context)[:, None])
    window = with_sinks((output[0].transpose(0, 1), lse[0].transpose(0, 1)), sinks)
    got = attend_best(turned, stored_memory, window, k, SCALE, soft_cap=soft_cap)

    products = torch.einsum(
        "thd,shd->ths", turned.double(), key[begin:context].double().repeat_interleave(group, 1)
    )
    ranked = products.sort(-1, descending=True).values
    clear = torch.ones(
        query.shape[:2], dtype=torch.bool
    )  # in float32 either of two almost equal keys may win
    if k < context - begin:
        clear = ranked[..., k - 1] - ranked[..., k] > 1e-5
    assert clear.float().mean() > 0.9
    assert (got - expected)[clear].abs().max() < 1e-5


def test_a_query_finds_the_same_alone_and_in_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    key = torch.randn(1100, KV_HEADS, D) * torch.randn(1100, 1, 1).exp()
    memory = a_memory(1100, run=False, begin=5, key=key)
    query = torch.randn(10, 4, D)
    for look_up in (top_k, best_blocks):
        whole = look_up(query, memory, 7, SCALE)
        monkeypatch.setattr(retrieval, "TILE", 4096)
        monkeypatch.setattr(retrieval, "QUERY_TILE", 3)
        parts = [look_up(q, memory, 7, SCALE) for q in query.split(1)] + [look_up(query, memory, 7, SCALE)]
        monkeypatch.undo()
        assert (
            parts[0].keys_read < 600
        )  # by bounds, in either way, where the chunk's `top_k` looks at every key
        for name in ("positions", "proven"):
            alone = torch.cat([getattr(p, name) for p in parts])
            assert torch.equal(alone, torch.cat([getattr(whole, name)] * 2))
        assert torch.allclose(torch.cat([p.scores for p in parts]), torch.cat([whole.scores] * 2), atol=1e-5)


def test_of_equal_keys_the_earlier_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = a_memory(300, begin=9, key=torch.ones(1, KV_HEADS, D).expand(300, -1, -1))
    for tile in (retrieval.TILE, 512):
        monkeypatch.setattr(retrieval, "TILE", tile)
        found = top_k(torch.randn(3, 4, D), memory, 20, SCALE)
        assert torch.equal(found.positions, torch.arange(9, 29).expand(3, 4, -1))


@example(5370, 0.0, 3.3515625, 3)
@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.floats(-12, 12), st.floats(0, 4), st.sampled_from([1, 3]))
def test_no_key_beats_its_blocks_bound(seed: int, log_size: float, tail: float, length: int) -> None:
    torch.manual_seed(seed)
    key = 10**log_size * torch.randn(80, KV_HEADS, D) * (tail * torch.randn(80, KV_HEADS, D)).exp()
    query = torch.randn(length, 4, D) * (tail * torch.randn(length, 4, D)).exp()
    memory = a_memory(80, run=bool(seed % 2), key=key)
    products = torch.einsum("tkgd,skd->ktgs", query.double().unflatten(1, (KV_HEADS, 2)), key.double())
    bounds = memory.codes.bounds(query, memory.blocks)
    assert bounds.shape == (KV_HEADS, length, 2, 10)
    best = products.unflatten(-1, (-1, BS)).amax(-1)
    assert (bounds >= best - 1e-6 * best.abs()).all()
    fine_step = query.abs().amax() / (127 * retrieval.FINE)
    twice_the_margin = query.abs().sum(-1).amax() + fine_step * D * 64
    loose = key.abs().amax((0, 2)) / 63 * twice_the_margin
    assert ((bounds - best).amax((1, 2, 3)) <= loose.double()).all()


@pytest.mark.parametrize("share", [0.05, 1.0])
def test_what_is_proven_is_what_top_k_finds(share: float) -> None:
    key = torch.randn(2000, KV_HEADS, D)
    key[torch.randperm(2000)[:60]] *= 3
    memory = a_memory(2000, key=key)
    query = torch.randn(30, 8, D)
    exact, found = top_k(query, memory, 6, SCALE), best_blocks(query, memory, 6, SCALE, share, least=4)
    assert found.proven.any() and (found.positions == exact.positions)[found.proven].all()
    assert (recall(found, exact)[found.proven] == 1).all()
    assert found.proven.all() == torch.equal(found.positions, exact.positions) == (share == 1)
    assert found.keys_read <= share * 2000


def test_a_block_that_filled_up_is_found_once_summarised_again() -> None:
    key = torch.randn(400, KV_HEADS, D)
    key[391] = 10.0
    blocks, query = table(50, True), torch.ones(1, 4, D)
    half_full = a_memory(388, key=key[:388])
    assert half_full.codes.bounds(query, blocks[:49]).isfinite().all()  # the rest of the last block holds NaN
    full = Memory(stored(key, key, blocks, layout(True)), blocks, 0, 400, half_full.codes)
    full.codes.summarise(full.pages, blocks[49:])
    assert not (best_blocks(query, full, 3, SCALE, least=4).positions == 391).any()
    full.codes.summarise(full.pages, blocks[48:])
    assert (best_blocks(query, full, 3, SCALE, least=4).positions[..., 0] == 391).all()


def test_recall_counts_equals_as_found() -> None:
    def selection(scores: list[float]) -> Selection:
        return Selection(torch.tensor([[scores]]), torch.zeros(1, 1, len(scores)), torch.ones(1, 1), 0)

    assert recall(selection([3.0, 1.0, 1.0, -torch.inf]), selection([3.0, 2.0, 1.0, 1.0])).item() == 0.75
    assert recall(selection([3.0, -torch.inf]), selection([3.0, -torch.inf])).item() == 1
