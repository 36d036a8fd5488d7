"""KV cache of Λ attention, of stepped windows and of memory: which blocks live, which are freed, what prefix
caching may reuse.

A request keeps the blocks of its first tokens and of its window; the blocks between are freed, their places
in the block table taken by the null block. A prefix-cache hit therefore needs the first tokens' blocks and
one window of blocks at its end, with null blocks between, just as vLLM's sliding-window manager does without
the first tokens.

Under stepped windows (Temp-LoRA without Λ attention) requests that adapt live in passes: a new pass gives all
blocks back and starts with null blocks up to its window. The KV of a request that adapts is its own: prefix
caching never sees it.

In Focused Transformers memory layers keep all blocks, the others those of the window. How a prompt is cut
into windows depends on its length near its end only, so a prefix-cache hit ends where a window begins that
both requests have, or inside of the first window, where nothing depends on windows yet.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from vllm.config import CacheConfig, VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import (
    BlockHashList,
    BlockHashWithGroupId,
    KVCacheBlock,
    resolve_block_hashes,
)
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from vllm_longctx.geometry import Geometry, SteppedWindows
from vllm_longctx.models.properties import model_dtype
from vllm_longctx.modes import Role
from vllm_longctx.settings import Settings, active_settings

NO_ROOM = 1 << 62  # blocks
FP8 = ("fp8", "fp8_e4m3")  # dtypes of the KV cache
OPEN = 1 << 16  # added to a group's id in the prefix cache: its blocks while the first window is open


@dataclass(frozen=True, kw_only=True)
class LambdaSpec(SlidingWindowSpec):
    """KV of one layer under Λ attention; `sliding_window` is n_local.

    A SlidingWindowSpec, because vLLM caps admission by the real need for these only: as a FullAttentionSpec,
    a prompt longer than the pool would wait for ever, and `FullAttentionSpec.merge` would absorb Λ layers
    silently.
    """

    n_global: int

    @classmethod
    def from_attention_spec(cls, spec: AttentionSpec, geometry: Geometry) -> "LambdaSpec":
        """The spec of the same layer under `geometry`, or under the window that the model gives it."""
        if isinstance(spec, SlidingWindowSpec):
            geometry = Geometry(0, spec.sliding_window)
        assert geometry.n_local is not None
        common = {f.name: getattr(spec, f.name) for f in fields(AttentionSpec) if f.init}
        return cls(**common, sliding_window=geometry.n_local, n_global=geometry.n_global)

    @property
    def first_blocks(self) -> int:
        return cdiv(self.n_global, self.block_size)

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """Most blocks one request holds at once: first tokens, the last N - 1, tokens in flight, and one
        ragged block.
        """
        return max_blocks_per_request(
            Geometry(self.n_global, self.sliding_window), self.block_size, max_in_flight_tokens, max_model_len
        )

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(
            isinstance(s, LambdaSpec)
            and (s.n_global, s.sliding_window) == (self.n_global, self.sliding_window)
            for s in kv_cache_specs.values()
        )


def max_blocks_per_request(
    geometry: Geometry, block_size: int, max_in_flight_tokens: int, max_model_len: int
) -> int:
    """Most blocks a request under `geometry` holds at once; arguments but block_size in tokens."""
    assert geometry.n_local is not None
    recent = cdiv(min(geometry.n_local - 1 + max_in_flight_tokens, max_model_len), block_size) + 1
    return min(cdiv(geometry.n_global, block_size) + recent, cdiv(max_model_len, block_size))


class PrivateRequests(SingleTypeKVCacheManager):
    """Requests that adapt: their blocks are never published, and `most_blocks` is what each holds at once."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.most_blocks: dict[str, int] = {}

    def most_blocks_of(self, window_tokens: int) -> int:
        """Blocks that a request holds at once, at most. window_tokens: of its passes, if it has any."""
        raise NotImplementedError

    def make_private(self, request_id: str, most_blocks: int) -> None:
        self.most_blocks[request_id] = most_blocks

    def forget(self, request_id: str) -> None:
        self.most_blocks.pop(request_id, None)

    def cache_blocks(self, request: Request, *args: Any, **kwargs: Any) -> None:
        if request.request_id not in self.most_blocks:
            super().cache_blocks(request, *args, **kwargs)


class LambdaManager(PrivateRequests):
    """Frees the middle of every request in its group, and has the pool hand out these blocks before others
    that are cached.

    A hit needs a window of blocks at its end. So of what slides out of a window, the last blocks of a prompt
    and those where a hit ended are worth keeping: who writes a turn of a chat again, or edits it, is hit
    there.
    """

    kv_cache_spec: LambdaSpec

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._gaps: dict[str, int] = {}  # null blocks in the table of each request that has any
        self._num_freed_blocks = 0
        self._hits: dict[str, int] = {}  # tokens that each running request found in the prefix cache
        # Free and cached, but not worth keeping; the oldest first. With the hash, since other groups use the
        # same pool.
        self._middles: dict[int, tuple[KVCacheBlock, BlockHashWithGroupId]] = {}

    def most_blocks_of(self, window_tokens: int) -> int:
        assert self.max_admission_blocks_per_request is not None
        return self.max_admission_blocks_per_request

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        """None: the callers in the base class take what is skipped to be a prefix."""
        return 0

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free the blocks between the first tokens and the window of the next query."""
        first, end = self._unseen_blocks(processed_computed_tokens, num_prompt_tokens)
        gap = self._gaps.get(request_id, 0)
        if end - first <= gap:  # most steps: the window is still in the same block
            return
        kept = self._kept_blocks(self._hits.get(request_id, 0), num_prompt_tokens or 0)
        table = self.req_to_blocks[request_id]
        leaving = [
            table[b]
            for b in range(first + gap, min(end, len(table)))
            if not any(b in blocks for blocks in kept)
        ]
        free = self.block_pool.get_num_free_blocks()
        self._remove_blocks_in_range(request_id, first, end)
        self._num_freed_blocks += self.block_pool.get_num_free_blocks() - free
        self._gaps[request_id] = end - first
        # Null blocks and those without a hash never match, and the pool hands the latter out first by itself.
        self._middles |= {
            b.block_id: (b, b.block_hash) for b in leaving if b.block_hash is not None and b.ref_cnt == 0
        }

    def _kept_blocks(self, hit: int, prompt: int) -> tuple[range, range]:
        """Blocks worth keeping once the window has left them: of the window of a hit, and of the prompt's
        last two.

        Two, so that a prompt which differs in its last n_local tokens only is hit where it begins to. hit,
            prompt: in tokens.
        """
        spec, bs = self.kv_cache_spec, self.block_size
        return (
            range(_first_window_block(spec, hit), hit // bs),
            range(_first_window_block(spec, prompt - 1 - spec.sliding_window), prompt // bs),
        )

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        *args: Any,
    ) -> None:
        super().add_local_computed_blocks(request_id, new_computed_blocks, num_local_computed_tokens, *args)
        self._hits[request_id] = num_local_computed_tokens
        for block in new_computed_blocks:
            self._middles.pop(block.block_id, None)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, *args: Any) -> list[KVCacheBlock]:
        if self._middles:
            self._bring_to_front(cdiv(num_tokens, self.block_size) - len(self.req_to_blocks[request_id]))
        return super().allocate_new_blocks(request_id, num_tokens, *args)

    def _bring_to_front(self, num_blocks: int) -> None:
        """Of the free blocks that the pool would hand out next, put those worth keeping behind middles, as
        far as these go.
        """
        if num_blocks <= 0:
            return
        queue, middles = self.block_pool.free_block_queue, self._middles
        front = queue.popleft_n(min(num_blocks, queue.num_free_blocks))
        kept = [block for block in front if block.block_hash is not None and block.block_id not in middles]
        chosen = [block for block in front if block.block_hash is None or block.block_id in middles]
        for block in chosen:
            middles.pop(block.block_id, None)
        while len(chosen) < len(front) and middles:
            block, block_hash = middles.pop(next(iter(middles)))
            if block.ref_cnt == 0 and block.block_hash == block_hash:
                queue.remove(block)
                chosen.append(block)
        queue.prepend_n(kept)
        queue.prepend_n(chosen)

    def _unseen_blocks(self, computed_tokens: int, num_prompt_tokens: int | None) -> tuple[int, int]:
        """(first, end): the blocks that the query at position `computed_tokens` and all later ones do not
        see.
        """
        return self.kv_cache_spec.first_blocks, _first_window_block(self.kv_cache_spec, computed_tokens)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self._gaps.pop(request_id, None)
        self._hits.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    def num_live_blocks(self, request_id: str) -> int:
        """Blocks a running request holds. O(1): its table may have tens of thousands of null blocks.

        With n_local = 1, the last block of a prefix-cache hit is left out for one step.
        """
        return len(self.req_to_blocks[request_id]) - self._gaps.get(request_id, 0)

    def take_num_freed_blocks(self) -> int:
        """Blocks that went back to the pool from running requests since the last call; shared ones go with
        the last holder.
        """
        freed, self._num_freed_blocks = self._num_freed_blocks, 0
        return freed

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """As the base class, but null blocks of a hit do not count against the cap: they hold no memory."""
        cap = self.max_admission_blocks_per_request
        if not apply_admission_cap or cap is None or request_id in self.num_cached_block:
            return super().get_num_blocks_to_allocate(
                request_id,
                num_tokens,
                new_computed_blocks,
                total_computed_tokens,
                num_local_computed_tokens,
                num_tokens_main_model,
                apply_admission_cap,
                prefill_end,
            )
        hit = sum(not block.is_null for block in new_computed_blocks)
        missing = cdiv(num_tokens, self.block_size) - len(new_computed_blocks)
        return max(min(hit + missing, cap) - hit, 0) + self._get_num_evictable_blocks(new_computed_blocks)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """The longest prefix whose first blocks and whose last window of blocks are all cached.

        Searched from the right: a missing block rules out every end whose window holds it.
        """
        assert isinstance(kv_cache_spec, LambdaSpec) and not drop_eagle_block
        assert dcp_world_size == pcp_world_size == 1
        bs = kv_cache_spec.block_size
        hashes = resolve_block_hashes(
            block_hashes,
            block_pool.hash_block_size,
            bs,
            supports_fine_grained_hash_lookup=cls.supports_fine_grained_hash_lookup,
            alignment_tokens=alignment_tokens,
        )
        cached: dict[int, list[KVCacheBlock]] = {}

        def is_cached(index: int) -> bool:
            if index not in cached:
                block = block_pool.get_cached_block(hashes[index], kv_cache_group_ids)
                if not block:
                    return False
                cached[index] = block
            return True

        end = max_length // bs
        first_blocks = kv_cache_spec.first_blocks
        first_missing = next((b for b in range(min(first_blocks, end)) if not is_cached(b)), None)
        end = end if first_missing is None else first_missing
        window = range(0)
        while end > 0:
            if end * bs % alignment_tokens:
                end -= 1
                continue
            # A window of one token sees no cached block; the last block still tells whether this is the same
            # text.
            window = range(min(_first_window_block(kv_cache_spec, end * bs), end - 1), end)
            missing = next((b for b in reversed(window) if not is_cached(b)), None)
            if missing is None:
                break
            end = missing
        live = {*range(min(first_blocks, end)), *window} if end else set()
        return tuple(
            [cached[b][group] if b in live else block_pool.null_block for b in range(end)]
            for group in range(len(kv_cache_group_ids))
        ), end * bs


def _first_window_block(spec: LambdaSpec, computed_tokens: int) -> int:
    """Index of the first block that the query at position `computed_tokens` sees through its window."""
    return max(computed_tokens - spec.sliding_window + 1 - spec.extra_retained_tokens, 0) // spec.block_size


def full_attention_fields(spec: AttentionSpec) -> dict[str, Any]:
    """Of a spec that keeps all KV. A layer with a window of its own keeps it as if it had none."""
    common = {f.name: getattr(spec, f.name) for f in fields(AttentionSpec) if f.init}
    if isinstance(spec, FullAttentionSpec):
        common |= {f.name: getattr(spec, f.name) for f in fields(FullAttentionSpec) if f.init}
    return common


@dataclass(frozen=True, kw_only=True)
class SteppedSpec(FullAttentionSpec):
    """KV of one layer under stepped windows.

    most_tokens: the longest live context of any request, in tokens.
    """

    most_tokens: int

    @classmethod
    def from_attention_spec(cls, spec: AttentionSpec, most_tokens: int) -> "SteppedSpec":
        return cls(**full_attention_fields(spec), most_tokens=most_tokens)

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        return cdiv(self.most_tokens, self.block_size) * self.page_size_bytes

    @classmethod
    def merge(cls, specs: list["SteppedSpec"]) -> "SteppedSpec":
        # vLLM takes an AssertionError to mean that layers belong to different groups.
        assert all(spec == specs[0] for spec in specs), "layers with KV of other sizes"
        return specs[0]


class SteppedManager(PrivateRequests, FullAttentionManager):
    """Full attention, but for requests whose window steps."""

    def most_blocks_of(self, window_tokens: int) -> int:
        return cdiv(window_tokens, self.block_size) + 1

    def roll_back(self, request_id: str, position: int) -> None:
        """Give back all blocks; `position` is what the request computes next, null blocks stand before it."""
        self.free(request_id)
        empty = position // self.block_size
        self.req_to_blocks[request_id] = [self._null_block] * empty
        self.num_cached_block[request_id] = empty

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        if apply_admission_cap and (most := self.most_blocks.get(request_id)) is not None:
            null = sum(block.is_null for block in self.req_to_blocks.get(request_id, ()))
            num_tokens = min(num_tokens, (null + most) * self.block_size)
        return super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            apply_admission_cap,
            prefill_end,
        )


@dataclass(frozen=True, kw_only=True)
class WindowSpec(LambdaSpec):
    """KV of a Focused Transformer's layer without memory: that of the window; `sliding_window` is a whole
    window's tokens.

    steps: of a request under way at once, at most; each is one of a single window.
    """

    windows: SteppedWindows
    steps: int = 1

    @classmethod
    def of(cls, spec: AttentionSpec, windows: SteppedWindows, steps: int = 1) -> "WindowSpec":
        common = {f.name: getattr(spec, f.name) for f in fields(AttentionSpec) if f.init}
        return cls(**common, sliding_window=windows.tokens, n_global=0, windows=windows, steps=steps)

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """Those of as many windows as steps are under way, since no step goes past a window's end; the first
        is ragged.
        """
        return min(
            cdiv(self.steps * self.sliding_window, self.block_size) + 1, cdiv(max_model_len, self.block_size)
        )

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(isinstance(s, WindowSpec) and s.windows == self.windows for s in kv_cache_specs.values())


class WindowManager(LambdaManager):
    """Frees what stands before the window.

    Only first windows are shared: where a later hit ends, a window begins, empty.
    """

    kv_cache_spec: WindowSpec

    def _kept_blocks(self, hit: int, prompt: int) -> tuple[range, range]:
        """None: once the first window is memory, a hit inside of it would need its memory as it was
        before.
        """
        return range(0), range(0)

    def _unseen_blocks(self, computed_tokens: int, num_prompt_tokens: int | None) -> tuple[int, int]:
        assert num_prompt_tokens is not None
        return 0, self.kv_cache_spec.windows.start(computed_tokens, num_prompt_tokens) // self.block_size

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        first_window = self.kv_cache_spec.windows.end(0, request.num_prompt_tokens)
        super().cache_blocks(request, min(num_tokens, first_window), *args, **kwargs)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """vLLM asks memory layers first: `max_length` is what they have."""
        assert isinstance(kv_cache_spec, WindowSpec)
        if hit := _window_starts_before(max_length, kv_cache_spec):
            nothing = [block_pool.null_block] * (hit // kv_cache_spec.block_size)
            return tuple(list(nothing) for _ in kv_cache_group_ids), hit
        return _cached_from_the_first(block_hashes, max_length, kv_cache_group_ids, block_pool, kv_cache_spec)


@dataclass(frozen=True, kw_only=True)
class MemorySpec(FullAttentionSpec):
    """KV of a Focused Transformer's memory layer: all of it.

    memory_blocks: of a pool of its own, in host memory; None for vLLM's pool.
    """

    windows: SteppedWindows
    memory_blocks: int | None = None

    @classmethod
    def of(cls, spec: AttentionSpec, windows: SteppedWindows, memory_blocks: int | None) -> "MemorySpec":
        return cls(**full_attention_fields(spec), windows=windows, memory_blocks=memory_blocks)

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Of vLLM's pool."""
        return 0 if self.memory_blocks is not None else super().max_memory_usage_bytes(vllm_config)

    @classmethod
    def merge(cls, specs: list["MemorySpec"]) -> "MemorySpec":
        # vLLM takes an AssertionError to mean that layers belong to different groups.
        assert all(spec == specs[0] for spec in specs), "memory layers beside others"
        return specs[0]


def blocks_apart(spec: KVCacheSpec) -> int:
    """Blocks of the pool that the spec's layers have to themselves, 0 if they share vLLM's."""
    return (isinstance(spec, MemorySpec) and spec.memory_blocks) or 0


class MemoryManager(FullAttentionManager):
    """Publishes closed windows, whose keys are un-rotated, where another prompt would have been cut into the
    same windows.

    And the first window, as if it were a group of its own, while it is open: its keys are still rotated by
    their places, which are the same in every text. Who is hit there gets copies, since either request may go
    on and close its window in place.

    With a pool of its own, what finished requests leave there is evicted as vLLM does it, least recently used
    first.
    """

    kv_cache_spec: MemorySpec

    def __init__(
        self,
        kv_cache_spec: MemorySpec,
        block_pool: BlockPool,
        enable_caching: bool,
        *args: Any,
        **kwargs: Any,
    ):
        self.is_apart = kv_cache_spec.memory_blocks is not None
        if kv_cache_spec.memory_blocks is not None:
            block_pool = BlockPool(kv_cache_spec.memory_blocks, enable_caching, block_pool.hash_block_size)
        super().__init__(kv_cache_spec, block_pool, enable_caching, *args, **kwargs)
        self._open: dict[
            str, int
        ] = {}  # blocks of each request's open first window that are published, or copies
        self._to_copy: dict[
            str, int
        ] = {}  # blocks that a request was hit in there, until it has copies of them
        self._copies: dict[str, tuple[tuple[int, int], ...]] = {}  # (from, to), for the step to come

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        *args: Any,
        **kwargs: Any,
    ) -> int:
        """Of vLLM's pool: none from a pool apart, or more than any pool has where that one has too few
        left.
        """
        needed = super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, *args, **kwargs
        )
        if self._is_in_first_window(len(new_computed_blocks)):
            needed += len(new_computed_blocks)
        if not self.is_apart:
            return needed
        return 0 if needed <= self.block_pool.get_num_free_blocks() else NO_ROOM

    def _is_in_first_window(self, num_blocks: int) -> bool:
        return num_blocks * self.block_size < self.kv_cache_spec.windows.tokens

    def add_local_computed_blocks(
        self, request_id: str, new_computed_blocks: Sequence[KVCacheBlock], *args: Any, **kwargs: Any
    ) -> None:
        super().add_local_computed_blocks(request_id, new_computed_blocks, *args, **kwargs)
        if new_computed_blocks and self._is_in_first_window(len(new_computed_blocks)):
            self._open[request_id] = self._to_copy[request_id] = len(new_computed_blocks)
            self.num_cached_block[request_id] = 0  # as memory, none is published

    def allocate_new_blocks(self, request_id: str, *args: Any, **kwargs: Any) -> list[KVCacheBlock]:
        if count := self._to_copy.pop(request_id, 0):
            table = self.req_to_blocks[request_id]
            shared, table[:count] = table[:count], self.block_pool.get_new_blocks(count)
            self._copies[request_id] = tuple(
                (a.block_id, b.block_id) for a, b in zip(shared, table, strict=False)
            )
            # They may be given away in the same step: copies are made before anything is written in it.
            self.block_pool.free_blocks(reversed(shared))
        return super().allocate_new_blocks(request_id, *args, **kwargs)

    def take_copies(self, request_id: str) -> tuple[tuple[int, int], ...]:
        """Ids of the blocks that are to be copied at the beginning of the request's first step: (from,
        to).
        """
        return self._copies.pop(request_id, ())

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        windows, prompt = self.kv_cache_spec.windows, request.num_prompt_tokens
        closed = windows.start(
            max(num_tokens - 1, 0), prompt
        )  # as far as whole blocks go, which is what vLLM gives here
        if windows.start(request.num_computed_tokens, prompt) == 0:
            self.publish_first_window(request)
        else:
            self._withdraw(request.request_id)
        # With a short prompt all windows are cut as those of a longer prompt are that begins with the same
        # text.
        cut_alike = windows.last_start(prompt) or closed
        super().cache_blocks(request, min(closed, cut_alike), *args, **kwargs)

    def publish_first_window(self, request: Request) -> None:
        """What is computed of it: unlike blocks that are shared, those to be copied must be there before the
        step.
        """
        computed = (
            min(request.num_computed_tokens, len(request.block_hashes) * self.block_size) // self.block_size
        )
        published = self._open.setdefault(request.request_id, 0)
        blocks = self.req_to_blocks[request.request_id]
        # vLLM's events name groups that it knows.
        if not self.enable_caching or self.block_pool.enable_kv_cache_events or computed <= published:
            return
        group = self.kv_cache_group_id + OPEN
        self.block_pool.cache_full_blocks(request, blocks, published, computed, self.block_size, group)
        self._open[request.request_id] = computed

    def _withdraw(self, request_id: str) -> None:
        """The first window becomes memory, in place."""
        if count := self._open.pop(request_id, 0):
            blocks = self.req_to_blocks[request_id][:count]
            self.block_pool.evict_blocks({block.block_id for block in blocks})

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        for kept in (self._open, self._to_copy, self._copies):
            kept.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        assert isinstance(kv_cache_spec, MemorySpec)
        blocks, hit = super().find_longest_cache_hit(
            block_hashes, max_length, kv_cache_group_ids, block_pool, kv_cache_spec, *args, **kwargs
        )
        if hit := _window_starts_before(hit, kv_cache_spec):
            return tuple(group[: hit // kv_cache_spec.block_size] for group in blocks), hit
        inside = min(max_length, kv_cache_spec.windows.tokens - 1)
        groups = [group + OPEN for group in kv_cache_group_ids]
        return _cached_from_the_first(block_hashes, inside, groups, block_pool, kv_cache_spec)


def _cached_from_the_first(
    block_hashes: BlockHashList,
    max_length: int,
    groups: list[int],
    block_pool: BlockPool,
    spec: AttentionSpec,
) -> tuple[tuple[list[KVCacheBlock], ...], int]:
    """The longest run of cached blocks from the text's beginning, by group, and its length in tokens."""
    hashes = resolve_block_hashes(block_hashes, block_pool.hash_block_size, spec.block_size)
    found = (
        block_pool.get_cached_block(hashes[i], groups)
        for i in range(min(max_length // spec.block_size, len(hashes)))
    )
    blocks = [block for block in itertools.takewhile(bool, found) if block]
    return tuple([b[group] for b in blocks] for group in range(len(groups))), len(blocks) * spec.block_size


def _window_starts_before(num_tokens: int, spec: WindowSpec | MemorySpec) -> int:
    """The last place up to `num_tokens` where a window and a block begin, in a prompt that goes on for
    long.
    """
    return num_tokens // (common := math.lcm(spec.windows.tokens, spec.block_size)) * common


@dataclass(frozen=True, kw_only=True)
class MiddleSpec(FullAttentionSpec):
    """KV of a layer with LM-Infinite's top-k branch: all of it.

    `startup.engine_args` turns prefix caching off.
    """

    @classmethod
    def of(cls, spec: AttentionSpec) -> "MiddleSpec":
        return cls(**full_attention_fields(spec))

    @classmethod
    def merge(cls, specs: list["MiddleSpec"]) -> "MiddleSpec":
        assert all(spec == specs[0] for spec in specs), "layers with a top-k branch beside others"
        return specs[0]


def prefix_caching(settings: Settings, cache: CacheConfig) -> str:
    """From which length on and in which steps prefixes are hit, for users."""
    if not cache.enable_prefix_caching:
        return "off"
    steps = f"in steps of {cache.block_size} tokens"
    if Role.MEMORY in settings.mode.layers:
        windows = settings.memory.windows
        return (
            f"{steps} inside of the first window, while that is open; then in steps of {windows.tokens}, up "
            f"to "
            f"{windows.last_tokens} tokens before the end of either prompt"
        )
    return f"{steps}; requests that learn: off" if settings.mode.adapts else steps


def layer_spec(kind: str, spec: AttentionSpec, vllm_config: VllmConfig) -> KVCacheSpec:
    """What the pool keeps of a layer.

    kind: the name of the spec in `modes.MODES`. spec: what vLLM would keep of it.
    """
    settings = active_settings(vllm_config)
    if kind == "LambdaSpec":
        return LambdaSpec.from_attention_spec(spec, settings.geometry)
    if kind == "MiddleSpec":
        return MiddleSpec.of(spec)
    if kind == "SteppedSpec":
        a = settings.temp_lora
        most_tokens = min(max(a.window_tokens, a.plain_tokens), vllm_config.model_config.max_model_len)
        return SteppedSpec.from_attention_spec(spec, most_tokens)
    windows = settings.memory.windows
    if kind == "WindowSpec":
        return WindowSpec.of(spec, windows, vllm_config.max_concurrent_batches)
    return MemorySpec.of(spec, windows, memory_blocks(settings, vllm_config))


def memory_blocks(settings: Settings, vllm_config: VllmConfig) -> int | None:
    """Blocks of the memory layers' own pool on a rank, the null block included; None if memory lives in
    vLLM's pool.
    """
    if Role.MEMORY not in settings.mode.layers or (limit := settings.memory.limit_gib) is None:
        return None
    return int(limit * 2**30) // (len(settings.memory.layers) * bytes_per_layer_block(vllm_config))


def bytes_per_layer_block(vllm_config: VllmConfig) -> int:
    """Bytes of one KV block in one of a rank's layers."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    element = 2 * model.get_head_size() * (1 if cache.cache_dtype in FP8 else model_dtype(model).itemsize)
    return model.get_num_kv_heads(vllm_config.parallel_config) * cache.block_size * element


def register() -> None:
    """Make the specs known to vLLM; also needed where it is only unpickled.

    Built-in specs must be there first.
    """
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(LambdaSpec, LambdaManager, uniform_type_base_spec=LambdaSpec)
    KVCacheSpecRegistry.register(SteppedSpec, SteppedManager, uniform_type_base_spec=SteppedSpec)
    KVCacheSpecRegistry.register(WindowSpec, WindowManager, uniform_type_base_spec=WindowSpec)
    KVCacheSpecRegistry.register(MemorySpec, MemoryManager, uniform_type_base_spec=MemorySpec)
    KVCacheSpecRegistry.register(MiddleSpec, FullAttentionManager, uniform_type_base_spec=MiddleSpec)
