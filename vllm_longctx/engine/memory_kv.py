"""KV cache of Focused Transformers and of LM-Infinite's top-k branch: some layers keep all blocks.

In Focused Transformers memory layers keep all blocks, the others those of the window. How a prompt is cut
into windows depends on its length near its end only, so a prefix-cache hit ends where a window begins that
both requests have, or inside of the first window, where nothing depends on windows yet.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import (
    BlockHashList,
    KVCacheBlock,
    resolve_block_hashes,
)
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheSpec
from vllm.v1.request import Request

from vllm_longctx.engine.sliding_kv import LambdaManager, LambdaSpec, PrivateRequests
from vllm_longctx.engine.stepped_kv import full_attention_fields
from vllm_longctx.geometry import RequestView, SteppedWindows
from vllm_longctx.models.properties import model_dtype
from vllm_longctx.modes import Role
from vllm_longctx.settings import Settings, active_settings

FP8 = ("fp8", "fp8_e4m3")  # dtypes of the KV cache
NO_ROOM = 1 << 62  # blocks
OPEN = 1 << 16  # added to a group's id in the prefix cache: its blocks while the first window is open


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

    @classmethod
    def for_layer(cls, spec: AttentionSpec, vllm_config: VllmConfig) -> "WindowSpec":
        """What the pool keeps of a layer. spec: What vLLM would keep of it."""
        windows = active_settings(vllm_config).memory.windows
        return cls.of(spec, windows, vllm_config.max_concurrent_batches)

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
        """vLLM asks memory layers first: `max_length` is what they have.

        Without any, nothing need have been computed before a window that nobody sees.
        """
        assert isinstance(kv_cache_spec, WindowSpec)
        hashed = len(block_hashes) * block_pool.hash_block_size  # up to where the prompt's last window begins
        if hit := _window_starts_before(min(max_length, hashed), kv_cache_spec):
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

    @classmethod
    def for_layer(cls, spec: AttentionSpec, vllm_config: VllmConfig) -> "MemorySpec":
        """What the pool keeps of a layer. spec: What vLLM would keep of it."""
        settings = active_settings(vllm_config)
        return cls.of(spec, settings.memory.windows, memory_blocks(settings, vllm_config))

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


class MemoryManager(PrivateRequests, FullAttentionManager):
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
        # Requests that have chosen what they see: their blocks are not published.
        self._views: set[str] = set()
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

    def most_blocks_of(self, window_tokens: int, text_tokens: int) -> int:
        """Of vLLM's pool."""
        return 0 if self.is_apart else cdiv(text_tokens, self.block_size)

    def blocks_apart_of(self, text_tokens: int) -> int:
        """Of a pool of the memory layers' own."""
        return cdiv(text_tokens, self.block_size) if self.is_apart else 0

    def begin_view(self, request_id: str, view: RequestView) -> None:
        """As `LambdaManager.begin_view`: all blocks are kept, as ever."""
        self._views.add(request_id)

    def end_view(self, request_id: str) -> None:
        self._views.discard(request_id)

    def take_copies(self, request_id: str) -> tuple[tuple[int, int], ...]:
        """Ids of the blocks that are to be copied at the beginning of the request's first step: (from,
        to).
        """
        return self._copies.pop(request_id, ())

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        if request.request_id in self._views:
            return
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
        if request.request_id in self._views:
            return
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
    def for_layer(cls, spec: AttentionSpec, vllm_config: VllmConfig) -> "MiddleSpec":
        """What the pool keeps of a layer. spec: What vLLM would keep of it."""
        return cls.of(spec)

    @classmethod
    def merge(cls, specs: list["MiddleSpec"]) -> "MiddleSpec":
        assert all(spec == specs[0] for spec in specs), "layers with a top-k branch beside others"
        return specs[0]


class MiddleManager(PrivateRequests, FullAttentionManager):
    """Full attention, also of requests that adapt."""

    def most_blocks_of(self, window_tokens: int, text_tokens: int) -> int:
        return cdiv(text_tokens, self.block_size)


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
