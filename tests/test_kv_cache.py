"""The KV manager inside vLLM's own KVCacheManager and block pool, without an engine."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.request import Request

from vllm_longctx import kv_cache
from vllm_longctx.attention.selection import cdiv
from vllm_longctx.geometry import Geometry
from vllm_longctx.kv_cache import LambdaSpec

BS = 4
CHUNK = 12
FULL = FullAttentionSpec(block_size=BS, num_kv_heads=1, head_size=8, dtype=torch.float32)
names = itertools.count()


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    kv_cache.register()
    init_none_hash(sha256)


def new_manager(n_global: int, n_local: int, num_blocks: int) -> KVCacheManager:
    spec = LambdaSpec.from_attention_spec(FULL, Geometry(n_global, n_local, n_local))
    config = KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)])
    return KVCacheManager(config, 10_000, BS, BS, max_in_flight_tokens=CHUNK)


def new_request(tokens: list[int]) -> Request:
    hasher = get_request_block_hasher(BS, sha256)
    return Request(f"r{next(names)}", tokens, SamplingParams(max_tokens=5), None, block_hasher=hasher)


def prefill(manager: KVCacheManager, request: Request) -> tuple[int, int]:
    """Run a request's prompt in chunks. Returns (tokens hit in the prefix cache, most live blocks at once)."""
    blocks, hit, _ = manager.get_computed_blocks(request)
    peak, computed, adopted = 0, hit, blocks
    while computed < request.num_tokens:
        new = min(CHUNK, request.num_tokens - computed)
        first = request.num_computed_tokens == 0
        allocated = manager.allocate_slots(
            request, new, hit if first else 0, adopted if first else None, full_sequence_must_fit=first
        )
        assert allocated is not None, "no room"
        computed += new
        request.num_computed_tokens = computed
        peak = max(peak, len(live(manager, request)))
    return hit, peak


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
def test_a_hit_holds_what_its_next_query_sees(n_global: int, n_local: int, common: int, other: int, noise: int) -> None:
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
    needed = lambda_manager.get_num_blocks_to_allocate(again.request_id, 300, blocks.blocks[0], 200, 200, 300, True)
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


def test_a_request_that_does_not_fit_is_not_admitted() -> None:
    manager = new_manager(n_global=2, n_local=8, num_blocks=8)
    assert manager.allocate_slots(new_request(list(range(500))), CHUNK, full_sequence_must_fit=True) is not None
    assert manager.allocate_slots(new_request(list(range(500, 999))), CHUNK, full_sequence_must_fit=True) is None


def test_a_layer_with_a_window_of_its_own_is_refused() -> None:
    window = SlidingWindowSpec(block_size=BS, num_kv_heads=1, head_size=8, dtype=torch.float32, sliding_window=8)
    with pytest.raises(TypeError, match="cannot give"):
        LambdaSpec.from_attention_spec(window, Geometry(2, 8, 8))
