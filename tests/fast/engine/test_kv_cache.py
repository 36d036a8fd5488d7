"""The KV manager inside vLLM's own KVCacheManager and block pool, without an engine."""

import itertools
import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.request import Request

from vllm_longctx.engine import kv_cache
from vllm_longctx.engine.sliding_kv import LambdaSpec
from vllm_longctx.geometry import Geometry

BS = 4
CHUNK = 12
FULL = FullAttentionSpec(block_size=BS, num_kv_heads=1, head_size=8, dtype=torch.float32)
names = itertools.count()
tokens_written = itertools.count(1_000_000)


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    kv_cache.register()
    init_none_hash(sha256)


def new_manager(n_global: int, n_local: int, num_blocks: int, chunk: int = CHUNK) -> KVCacheManager:
    spec = LambdaSpec.from_attention_spec(FULL, Geometry(n_global, n_local, n_local))
    config = KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)])
    return KVCacheManager(config, 1_000_000, BS, BS, max_in_flight_tokens=chunk)


def new_request(tokens: list[int]) -> Request:
    hasher = get_request_block_hasher(BS, sha256)
    return Request(f"r{next(names)}", tokens, SamplingParams(max_tokens=5), None, block_hasher=hasher)


def prefill(manager: KVCacheManager, request: Request, chunk: int = CHUNK) -> tuple[int, int]:
    """Run a request's prompt in chunks.

    Returns (tokens hit in the prefix cache, most live blocks at once).
    """
    blocks, hit, _ = manager.get_computed_blocks(request)
    peak, computed, adopted = 0, hit, blocks
    while computed < request.num_tokens:
        new = min(chunk, request.num_tokens - computed)
        first = request.num_computed_tokens == 0
        allocated = manager.allocate_slots(
            request, new, hit if first else 0, adopted if first else None, full_sequence_must_fit=first
        )
        assert allocated is not None, "no room"
        computed += new
        request.num_computed_tokens = computed
        peak = max(peak, len(live(manager, request)))
    return hit, peak


def write(manager: KVCacheManager, request: Request, tokens: list[int]) -> None:
    for token in tokens:
        request.append_output_token_ids(token)
        assert manager.allocate_slots(request, 1) is not None, "no room"
        request.num_computed_tokens += 1


def serve(
    manager: KVCacheManager, prompt: list[int], answer: int = 0, chunk: int = CHUNK
) -> tuple[int, list[int]]:
    """One request from its beginning to its end. Returns (tokens hit in the prefix cache, its whole text)."""
    request = new_request(prompt)
    hit, _ = prefill(manager, request, chunk)
    write(manager, request, [next(tokens_written) for _ in range(answer)])
    manager.free(request)
    return hit, list(request.all_token_ids)


def live(manager: KVCacheManager, request: Request) -> list[int]:
    """Indices in the block table that hold a block."""
    (blocks,) = manager.get_blocks(request.request_id).blocks
    return [index for index, block in enumerate(blocks) if not block.is_null]


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 9), st.integers(1, 30), st.integers(1, 300))
def test_live_blocks_stay_under_the_bound_at_any_length(n_global: int, n_local: int, length: int) -> None:
    bound = cdiv(n_global, BS) + cdiv(n_local - 1 + CHUNK, BS) + 1
    manager = new_manager(n_global, n_local, bound + 1)
    request = new_request(list(range(length)))
    _, peak = prefill(manager, request)
    assert peak <= bound
    needed = {
        *range(min(cdiv(n_global, BS), cdiv(length, BS))),
        *range(max(length - n_local, 0) // BS, cdiv(length, BS)),
    }
    assert needed <= set(live(manager, request))
    manager.free(request)
    assert manager.block_pool.get_num_free_blocks() == bound


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 9), st.integers(1, 30), st.integers(1, 120), st.integers(1, 120), st.integers(0, 60))
def test_a_hit_holds_what_its_next_query_sees(
    n_global: int, n_local: int, common: int, other: int, noise: int
) -> None:
    manager = new_manager(n_global, n_local, 60)
    prefix = list(range(common))
    for tokens in (prefix + [-1] * other, [-2] * noise or [-2]):
        request = new_request(tokens)
        prefill(manager, request)
        manager.free(request)
    again = new_request(prefix + [-3] * other)
    blocks, hit, _ = manager.get_computed_blocks(again)
    assert hit % BS == 0 and hit <= common
    sees = {j // BS for j in range(hit) if j < n_global or j > hit - n_local}
    assert all(not blocks.blocks[0][b].is_null for b in sees)
    if noise == 0:  # nothing was evicted: what the first request still held at its end of the prefix is hit
        assert hit >= min(common, other) // BS * BS - (n_local + CHUNK) or common + other > 59 * BS
    prefill(manager, again)
    manager.free(again)
    assert manager.block_pool.get_num_free_blocks() == 59


def test_a_long_prefix_is_hit_over_its_freed_middle() -> None:
    manager = new_manager(n_global=2, n_local=8, num_blocks=100)
    prompt = list(range(200))
    first, second = new_request(prompt), new_request([*prompt, 7])
    prefill(manager, first)
    assert live(manager, first) == [0, *range(46, 50)]
    hit, _ = prefill(manager, second)
    assert hit == 200
    assert live(manager, second) == [0, 48, 49, 50]


def test_admission_counts_what_a_hit_will_hold_not_its_null_blocks() -> None:
    """A hit of 50 table entries holds 3 blocks; the rest of the cap must still be free."""
    manager = new_manager(n_global=2, n_local=8, num_blocks=100)
    first = new_request(list(range(200)))
    prefill(manager, first)
    again = new_request([*range(200), *range(-100, 0)])
    blocks, _, _ = manager.get_computed_blocks(again)
    (lambda_manager,) = manager.coordinator.single_type_managers
    cap = lambda_manager.max_admission_blocks_per_request
    needed = lambda_manager.get_num_blocks_to_allocate(
        again.request_id, 300, blocks.blocks[0], 200, 200, 300, True
    )
    assert needed == cap - 3


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 9), st.integers(2, 30), st.integers(1, 300), st.integers(0, 60))
def test_live_and_freed_blocks_are_counted(n_global: int, n_local: int, length: int, more: int) -> None:
    manager = new_manager(n_global, n_local, 200)
    (lambda_manager,) = manager.coordinator.single_type_managers
    first, second = new_request(list(range(length))), new_request(list(range(length + more)))
    prefill(manager, first)
    assert lambda_manager.num_live_blocks(first.request_id) == len(live(manager, first))
    assert lambda_manager.take_num_freed_blocks() == cdiv(length, BS) - len(live(manager, first))
    hit, _ = prefill(manager, second)
    assert lambda_manager.num_live_blocks(second.request_id) == len(live(manager, second))
    # What it shares with the first one does not go back to the pool; what it computed and left behind does.
    own = range(hit // BS, cdiv(length + more, BS))
    assert lambda_manager.take_num_freed_blocks() == len(set(own) - set(live(manager, second)))
    for request in (first, second):
        manager.free(request)
    assert lambda_manager.take_num_freed_blocks() == 0  # those were not freed from the middle
    assert not lambda_manager._gaps


def fresh(length: int) -> list[int]:
    """A text that nobody has read."""
    return [next(tokens_written) for _ in range(length)]


def test_what_others_hit_outlives_a_long_text() -> None:
    """Before: blocks that slid out of the window of one prompt of 200,000 tokens pushed out everything else
    that was cached.
    """
    chunk = 512
    manager = new_manager(n_global=2, n_local=64, num_blocks=400, chunk=chunk)
    prefixes = [fresh(60) for _ in range(10)]
    for prefix in prefixes:
        serve(manager, prefix + fresh(9), chunk=chunk)
    serve(manager, fresh(200_000), chunk=chunk)
    assert [serve(manager, prefix + fresh(9))[0] for prefix in prefixes] == [60] * 10


def test_what_a_window_leaves_is_reused_before_anything_else_that_is_cached() -> None:
    """But behind blocks that hold nothing: in a pool with room, the middle of a text is still hit."""
    manager = new_manager(n_global=2, n_local=8, num_blocks=200)
    _, text = serve(manager, fresh(400))
    assert serve(manager, text[:200] + fresh(20))[0] == 200
    serve(manager, fresh(3000))  # needs the middle's blocks
    assert serve(manager, text[:300] + fresh(20))[0] < 300
    assert serve(manager, text[:200] + fresh(20))[0] == 200  # where a hit ended
    assert serve(manager, text[:-1] + fresh(20))[0] >= 396


@pytest.mark.parametrize("others", [0, 6])
def test_a_turn_can_be_written_again_after_its_answer(others: int) -> None:
    """Before: the window at the prompt's end was gone once the answer was longer than the window."""
    manager = new_manager(n_global=2, n_local=16, num_blocks=150)
    prompt = fresh(1000)
    _, whole = serve(manager, prompt, answer=500)
    for _ in range(others):
        serve(manager, fresh(3000), answer=100)
    assert serve(manager, prompt)[0] == 996  # again
    assert serve(manager, prompt[:-7] + fresh(30))[0] == 992  # its last words edited
    assert serve(manager, whole + fresh(30))[0] >= 1496  # the next turn


@pytest.mark.parametrize("others", [0, 6])
def test_a_whole_turn_can_be_replaced(others: int) -> None:
    """A turn longer than the window, read on from where the turn before it had ended: the window there was
    left as well.
    """
    manager = new_manager(n_global=2, n_local=16, num_blocks=200)
    _, first = serve(manager, fresh(1000), answer=50)
    hit, _ = serve(manager, first + fresh(300), answer=200)
    assert hit >= 1044
    for _ in range(others):
        serve(manager, fresh(3000), answer=100)
    assert serve(manager, first + fresh(300))[0] == hit


@pytest.mark.parametrize("answer", [0, 400])
def test_a_long_text_keeps_a_bounded_number_of_blocks_from_others(answer: int) -> None:
    n_global, n_local = 2, 16
    manager = new_manager(n_global, n_local, num_blocks=300)
    prefixes = [fresh(40) for _ in range(29)]  # 10 blocks each
    for prefix in prefixes:
        serve(manager, prefix)
    serve(manager, fresh(5000), answer=answer)
    held = cdiv(n_global, BS) + cdiv(n_local - 1 + CHUNK, BS) + 1
    kept = 2 * cdiv(n_local, BS) + 1
    lost = sum(10 - serve_hit(manager, prefix) // BS for prefix in prefixes)
    assert lost <= held + kept + 10  # the last one began to be evicted at its end


def serve_hit(manager: KVCacheManager, prompt: list[int]) -> int:
    return manager.get_computed_blocks(new_request([*prompt, -1]))[1]


@settings(deadline=None, max_examples=25)
@given(st.randoms(use_true_random=False), st.integers(0, 9), st.integers(1, 30), st.integers(12, 60))
def test_no_block_is_free_and_held(rng: random.Random, n_global: int, n_local: int, num_blocks: int) -> None:
    """Prompts with common prefixes, written on, ended and preempted in any order."""
    manager = new_manager(n_global, n_local, num_blocks)
    (lambda_manager,) = manager.coordinator.single_type_managers
    pool, texts, running = (
        manager.block_pool,
        [fresh(rng.randrange(1, 120)) for _ in range(3)],
        list[Request](),
    )
    for _ in range(80):
        if running and rng.random() < 0.6:
            request = rng.choice(running)
            new = min(rng.randrange(1, CHUNK), request.num_tokens - request.num_computed_tokens)
            if manager.allocate_slots(request, new) is None or rng.random() < 0.05:
                manager.free(request)
                running.remove(request)
                continue
            request.num_computed_tokens += new
            if request.num_computed_tokens == request.num_tokens:
                request.append_output_token_ids(rng.randrange(3))
        else:
            text = rng.choice(texts)
            request = new_request(
                text[: rng.randrange(1, len(text) + 1)] + [rng.randrange(3) for _ in range(rng.randrange(20))]
            )
            blocks, hit, _ = manager.get_computed_blocks(request)
            new = min(CHUNK, request.num_tokens - hit)
            if manager.allocate_slots(request, new, hit, blocks, full_sequence_must_fit=True) is not None:
                request.num_computed_tokens = hit + new
                running.append(request)
                if request.num_computed_tokens == request.num_tokens:
                    request.append_output_token_ids(rng.randrange(3))
        free = {block.block_id for block in pool.free_block_queue.get_all_free_blocks()}
        held = Counter(
            b.block_id for r in running for b in manager.get_blocks(r.request_id).blocks[0] if not b.is_null
        )
        assert free.isdisjoint(held) and len(free) == pool.get_num_free_blocks()
        assert len(free) + len(held) == num_blocks - 1
        assert all(pool.blocks[b].ref_cnt == held[b] for b in range(1, num_blocks))
        assert free >= set(lambda_manager._middles)
        for r in running:
            if n_local > 1:
                assert lambda_manager.num_live_blocks(r.request_id) >= len(live(manager, r))


def test_a_request_that_does_not_fit_is_not_admitted() -> None:
    manager = new_manager(n_global=2, n_local=8, num_blocks=8)
    assert (
        manager.allocate_slots(new_request(list(range(500))), CHUNK, full_sequence_must_fit=True) is not None
    )
    assert (
        manager.allocate_slots(new_request(list(range(500, 999))), CHUNK, full_sequence_must_fit=True) is None
    )


def test_a_layer_with_a_window_of_its_own_keeps_it() -> None:
    window = SlidingWindowSpec(
        block_size=BS, num_kv_heads=1, head_size=8, dtype=torch.float32, sliding_window=8
    )
    spec = LambdaSpec.from_attention_spec(window, Geometry(2, 16, 16))
    assert (spec.n_global, spec.sliding_window) == (0, 8)
