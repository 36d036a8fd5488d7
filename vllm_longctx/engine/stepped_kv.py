"""KV cache of stepped windows (Temp-LoRA without Λ attention): requests that adapt live in passes.

A new pass gives all blocks back and starts with null blocks up to its window.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import (
    KVCacheBlock,
)
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from vllm_longctx.engine.sliding_kv import PrivateRequests
from vllm_longctx.settings import active_settings


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

    @classmethod
    def for_layer(cls, spec: AttentionSpec, vllm_config: VllmConfig) -> "SteppedSpec":
        """What the pool keeps of a layer. spec: What vLLM would keep of it."""
        a = active_settings(vllm_config).temp_lora
        longest = max(a.window_tokens, a.plain_tokens)
        return cls.from_attention_spec(spec, min(longest, vllm_config.model_config.max_model_len))

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        return cdiv(self.most_tokens, self.block_size) * self.page_size_bytes

    @classmethod
    def merge(cls, specs: list["SteppedSpec"]) -> "SteppedSpec":
        # vLLM takes an AssertionError to mean that layers belong to different groups.
        assert all(spec == specs[0] for spec in specs), "layers with KV of other sizes"
        return specs[0]


def first_entry(first: int, block_size: int) -> int:
    """The position from which the KV blocks of a pass are counted. first: The first that it computes.

    CPU kernels see a table from its first entry on, so there a pass begins a block (`cpu.window`).
    """
    return first if current_platform.is_cpu() else first // block_size * block_size


class SteppedManager(PrivateRequests, FullAttentionManager):
    """Full attention, but for requests whose window steps."""

    def most_blocks_of(self, window_tokens: int, text_tokens: int) -> int:
        return cdiv(window_tokens, self.block_size) + 1

    def roll_back(self, request_id: str, position: int) -> None:
        """Give back all blocks; `position` is what the request computes next, null blocks stand before it."""
        self.free(request_id)
        empty = position // self.block_size
        self.req_to_blocks[request_id] = [self.block_pool.null_block] * empty
        self.num_cached_block[request_id] = empty
        self.shifts[request_id] = first_entry(position, self.block_size) - empty * self.block_size

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
