"""Whether a request, or a memory, fits into the pool of KV blocks."""

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv

from vllm_longctx.config import LongContextError
from vllm_longctx.engine.kv_cache import bytes_per_layer_block, max_blocks_per_request
from vllm_longctx.models.properties import trained_length
from vllm_longctx.settings import Settings
from vllm_longctx.startup.platform import platform


def fit_memory(settings: Settings, vllm_config: VllmConfig, blocks: int) -> None:
    """Bound max_model_len by the memory.

    Raises LongContextError if the user asks for more, or for a memory of no use.
    """
    memory, model = settings.memory, vllm_config.model_config
    if len(memory.layers) == model.get_total_num_hidden_layers():
        room = platform().pool_settings[0]
        raise LongContextError(
            f"attention.memory_limit_gib = {memory.limit_gib} with memory in every layer leaves nothing in "
            f"vLLM's "
            f"pool; leave it out, and give that pool the room ({room})"
        )
    block_size = vllm_config.cache_config.block_size
    tokens = (blocks - 1) * block_size
    auto = model.original_max_model_len == -1
    if tokens < (block_size if auto else model.max_model_len):
        needed = (
            (cdiv(model.max_model_len, block_size) + 1)
            * len(memory.layers)
            * bytes_per_layer_block(vllm_config)
        )
        raise LongContextError(
            f"attention.memory_limit_gib = {memory.limit_gib} holds {max(tokens, 0)} tokens, but "
            f"max_model_len = "
            f"{model.max_model_len}; give at least {needed / 2**30:.3g}, or lower max_model_len"
        )
    if auto:
        model.max_model_len = min(model.max_model_len, tokens)


def check_pool(settings: Settings, vllm_config: VllmConfig) -> None:
    """Raises LongContextError if the pool, where its size is known, has fewer blocks than one request may
    hold.
    """
    cache, model, geometry = vllm_config.cache_config, vllm_config.model_config, settings.geometry
    in_flight = vllm_config.max_in_flight_tokens
    if settings.mode.grows:  # vLLM fits max_model_len to the pool, or says that it does not fit
        return
    if settings.mode.slides:
        blocks = max_blocks_per_request(geometry, cache.block_size, in_flight, model.max_model_len)
        why = f"n_global {geometry.n_global}, n_local {geometry.n_local}, {in_flight} tokens in flight"
        remedy = "max_num_batched_tokens or attention.n_local"
    else:
        blocks = cdiv(trained_length(model), cache.block_size) + 1
        why, remedy = f"the trained length of {trained_length(model)} tokens", "block_size"
    if cache.num_gpu_blocks_override is not None:
        pool, given = (
            cache.num_gpu_blocks_override,
            f"num_gpu_blocks_override = {cache.num_gpu_blocks_override}",
        )
    elif cache.kv_cache_memory_bytes is not None:
        pool = cache.kv_cache_memory_bytes // _bytes_per_block(vllm_config)
        names = ", ".join(platform().pool_settings[1])
        given = f"the KV cache of {cache.kv_cache_memory_bytes} bytes ({names})"
    else:
        return
    if pool < blocks + 1:
        raise LongContextError(
            f"{given} gives {pool} blocks, but one request holds up to {blocks} ({why}, block_size "
            f"{cache.block_size}) and "
            f"vLLM keeps one; give at least {blocks + 1} blocks, or lower {remedy}"
        )


def _bytes_per_block(vllm_config: VllmConfig) -> int:
    """Bytes of one KV block in all of a rank's layers."""
    return vllm_config.model_config.get_num_layers(vllm_config.parallel_config) * bytes_per_layer_block(
        vllm_config
    )
