"""KV cache of sliding windows: which blocks live, which are freed, what prefix caching may reuse.

A request keeps the blocks of its first tokens and of its window; the blocks between are freed, their places
in the block table taken by the null block. A prefix-cache hit therefore needs the first tokens' blocks and
one window of blocks at its end, with null blocks between, just as vLLM's sliding-window manager does without
the first tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import (
    BlockHashList,
    BlockHashWithGroupId,
    KVCacheBlock,
    resolve_block_hashes,
)
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec, SlidingWindowSpec
from vllm.v1.request import Request

from vllm_longctx.engine.view_hashes import ViewHashes
from vllm_longctx.geometry import Geometry, RequestView
from vllm_longctx.settings import active_settings
from vllm_longctx.windows import SlidingWindows


@dataclass(frozen=True, kw_only=True)
class LambdaSpec(SlidingWindowSpec):
    """KV of one layer under Λ attention; `sliding_window` is n_local.

    has_own_window: The window is the model's, so no request has another one.

    A SlidingWindowSpec, because vLLM caps admission by the real need for these only: as a FullAttentionSpec,
    a prompt longer than the pool would wait for ever, and `FullAttentionSpec.merge` would absorb Λ layers
    silently.
    """

    n_global: int
    has_own_window: bool = False

    @classmethod
    def from_attention_spec(cls, spec: AttentionSpec, geometry: Geometry) -> "LambdaSpec":
        """The spec of the same layer under `geometry`, or under the window that the model gives it."""
        has_own_window = isinstance(spec, SlidingWindowSpec)
        if isinstance(spec, SlidingWindowSpec):
            geometry = Geometry(0, spec.sliding_window)
        assert geometry.n_local is not None
        common = {f.name: getattr(spec, f.name) for f in fields(AttentionSpec) if f.init}
        return cls(
            **common,
            sliding_window=geometry.n_local,
            n_global=geometry.n_global,
            has_own_window=has_own_window,
        )

    @classmethod
    def for_layer(cls, spec: AttentionSpec, vllm_config: VllmConfig) -> "LambdaSpec":
        """What the pool keeps of a layer. spec: What vLLM would keep of it."""
        return LambdaSpec.from_attention_spec(spec, active_settings(vllm_config).geometry)

    @property
    def first_blocks(self) -> int:
        return cdiv(self.n_global, self.block_size)

    @property
    def num_retained_tokens(self) -> int:
        """0: Model Runner V2 takes nothing out of a request's block table.

        vLLM 0.33 asks, and takes out what a sliding window has left behind: the first tokens, too.
        """
        return 0

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """Most blocks one request holds at once."""
        windows = SlidingWindows(Geometry(self.n_global, self.sliding_window))
        return windows.most_blocks(self.block_size, max_in_flight_tokens, max_model_len)

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(
            isinstance(s, LambdaSpec)
            and (s.n_global, s.sliding_window, s.has_own_window)
            == (self.n_global, self.sliding_window, self.has_own_window)
            for s in kv_cache_specs.values()
        )


class PrivateRequests(SingleTypeKVCacheManager):
    """Requests that adapt. `most_blocks` is what each holds at once.

    What they publish has hashes of its own (`scheduling.adapting_request`): a request's `block_hashes` say
    how far its blocks have any, and `shifts` how many tokens later than in the text each of them is full.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.most_blocks: dict[str, int] = {}
        self.shifts: dict[str, int] = {}

    def most_blocks_of(self, window_tokens: int, text_tokens: int) -> int:
        """Blocks that a request holds at once, at most.

        window_tokens: of its passes, if it has any. text_tokens: of all that it may read and write.
        """
        raise NotImplementedError

    def make_private(self, request_id: str, most_blocks: int) -> None:
        self.most_blocks[request_id] = most_blocks

    def forget(self, request_id: str) -> None:
        self.most_blocks.pop(request_id, None)
        self.shifts.pop(request_id, None)

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        if request.request_id in self.most_blocks:
            request.update_block_hashes()
            full = num_tokens - self.shifts.get(request.request_id, 0)
            num_tokens = min(full, len(request.block_hashes) * self.block_size)
        super().cache_blocks(request, num_tokens, *args, **kwargs)

    def adopt(self, request_id: str, blocks: Sequence[KVCacheBlock], index: int) -> None:
        """Put cached blocks into the request's table, from `index` on, in place of what it has there."""
        table = self.req_to_blocks[request_id]
        self.block_pool.touch(blocks)
        self.block_pool.free_blocks(reversed(table[index:]))
        table[index:] = blocks
        self.num_cached_block[request_id] = len(table)


class LambdaManager(PrivateRequests):
    """Frees the middle of every request in its group, and has the pool hand out these blocks before others
    that are cached.

    A request that has chosen what its queries see keeps other first tokens. Its KV is of use to requests only
    that have chosen the same: layers behind the first one compute keys from what was seen (`view_hashes`).

    A hit needs a window of blocks at its end. So of what slides out of a window, the last blocks of a prompt
    and those where a hit ended are worth keeping: who writes a turn of a chat again, or edits it, is hit
    there.
    """

    kv_cache_spec: LambdaSpec

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._gaps: dict[str, int] = {}  # null blocks in the table of each request that has any
        self._num_freed_blocks = 0
        self._first_blocks: dict[str, int | None] = {}  # of requests with a view of their own; None: all
        self._hits: dict[str, int] = {}  # tokens that each running request found in the prefix cache
        # Free and cached, but not worth keeping; the oldest first. With the hash, since other groups use the
        # same pool.
        self._middles: dict[int, tuple[KVCacheBlock, BlockHashWithGroupId]] = {}

    def most_blocks_of(self, window_tokens: int, text_tokens: int) -> int:
        assert self.max_admission_blocks_per_request is not None
        return self.max_admission_blocks_per_request

    def begin_view(self, request_id: str, view: RequestView) -> None:
        """The request is new, and sees something else than others do."""
        if not self.kv_cache_spec.has_own_window:
            tokens = view.n_global
            self._first_blocks[request_id] = None if tokens is None else cdiv(tokens, self.block_size)
        else:
            self._first_blocks[request_id] = 0

    def end_view(self, request_id: str) -> None:
        self._first_blocks.pop(request_id, None)

    def blocks_for(self, request_id: str, num_tokens: int) -> int:
        """That a request with a view of its own holds at once, at most, of a text of so many tokens."""
        needed, first = cdiv(num_tokens, self.block_size), self._first_blocks[request_id]
        most = self.max_admission_blocks_per_request
        if first is None or most is None:
            return needed
        return min(needed, most - self.kv_cache_spec.first_blocks + first)

    def cache_blocks(self, request: Request, *args: Any, **kwargs: Any) -> None:
        if request.request_id not in self._first_blocks or isinstance(request.block_hashes, ViewHashes):
            super().cache_blocks(request, *args, **kwargs)

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        """None: the callers in the base class take what is skipped to be a prefix."""
        return 0

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free the blocks between the first tokens and the window of the next query."""
        first, end = self._unseen_blocks(processed_computed_tokens, num_prompt_tokens)
        if request_id in self._first_blocks:
            own = self._first_blocks[request_id]
            first = end if own is None else own
        gap = self._gaps.get(request_id, 0)
        if end - first <= gap:  # most steps: the window is still in the same block
            return
        kept = self._kept_blocks(self._hits.get(request_id, 0), num_prompt_tokens or 0)
        table, pool = self.req_to_blocks[request_id], self.block_pool
        # From the end, as vLLM does it. Those of a hit may be null already.
        places = reversed(range(first + gap, min(end, len(table))))
        leaving = {b: table[b] for b in places if not table[b].is_null}
        for b in leaving:
            table[b] = pool.null_block
        free = pool.get_num_free_blocks()
        pool.free_blocks(leaving.values())
        self._num_freed_blocks += pool.get_num_free_blocks() - free
        self._gaps[request_id] = end - first
        # Those without a hash never match, and the pool hands them out first by itself.
        self._middles |= {
            block.block_id: (block, block.block_hash)
            for b, block in reversed(leaving.items())
            if block.block_hash is not None and block.ref_cnt == 0 and not any(b in blocks for blocks in kept)
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

    def adopt(self, request_id: str, blocks: Sequence[KVCacheBlock], index: int) -> None:
        super().adopt(request_id, blocks, index)
        self._hits[request_id] = len(self.req_to_blocks[request_id]) * self.block_size
        for block in blocks:
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
        if apply_admission_cap and request_id in self._first_blocks:
            held = self.num_live_blocks(request_id) if request_id in self.req_to_blocks else 0
            return max(self.blocks_for(request_id, num_tokens) - held, 0)
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
        taken_from_free = sum(block.ref_cnt == 0 and not block.is_null for block in new_computed_blocks)
        return max(min(hit + missing, cap) - hit, 0) + taken_from_free

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
        if isinstance(block_hashes, ViewHashes) and not kv_cache_spec.has_own_window:
            first_blocks = end if block_hashes.n_global is None else cdiv(block_hashes.n_global, bs)
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
