"""Whether a request, or a memory, fits into the pool of KV blocks."""

from dataclasses import dataclass

from transformers import PreTrainedModel
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.utils.math_utils import cdiv

from vllm_longctx.config import LongContextError
from vllm_longctx.engine.memory_kv import bytes_per_layer_block
from vllm_longctx.models.properties import model_dtype, trained_length, without_weights
from vllm_longctx.settings import Adaptation, Settings
from vllm_longctx.startup.platform import memory_of_a_rank, platform
from vllm_longctx.temp_lora.base_model import trained_model
from vllm_longctx.temp_lora.training_memory import Shape

logger = init_logger("vllm.longctx")

MIN_WINDOW = 1024  # tokens; a default that is smaller than that, and than the model's, is not worth an engine
# Of the memory that vLLM may take. Where a request's KV takes less, nobody need know what the weights leave.
SMALL_SHARE = 0.1
# Of what the weights leave; activations and what else an engine needs take the rest. An estimate.
KV_SHARE = 0.75


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


def window_room(settings: Settings, pool: "Pool", vllm_config: VllmConfig) -> int | None:
    """Tokens of the largest default window with which the pool holds a request; None for any.

    settings: With the defaults for the model, whatever the machine. None, too, where the pool is so small
        that no such window would be of use: `check_pool` refuses it.
    """
    if pool.blocks > _blocks_per_request(settings, vllm_config):
        return None
    block_size, in_flight = vllm_config.cache_config.block_size, vllm_config.max_in_flight_tokens
    room = settings.windows.largest(pool.blocks - 1, block_size, in_flight)  # vLLM keeps one
    least = min(MIN_WINDOW, trained_length(vllm_config.model_config))
    return room if room is not None and room >= least else None


def log_windows(full: Settings, fitted: Settings, pool: "Pool", block_size: int) -> None:
    """Log which default windows are smaller than the model's, so that the pool holds a request."""
    before, after = full.windows.sizes, fitted.windows.sizes
    smaller = [
        f"{name} is {after[name]}, not {before[name]}" for name in before if after[name] != before[name]
    ]
    if smaller:
        logger.warning(
            "longctx: %s, since %s gives %d blocks of %d tokens; to have more, raise %s",
            "; ".join(smaller),
            pool.given,
            pool.blocks,
            block_size,
            platform().pool_settings[0],
        )


def check_pool(settings: Settings, vllm_config: VllmConfig) -> None:
    """Raises LongContextError if the pool, where its size is known, has fewer blocks than one request may
    hold.
    """
    if settings.mode.grows:  # vLLM fits max_model_len to the pool, or says that it does not fit
        return
    windows, block_size = settings.windows, vllm_config.cache_config.block_size
    kept = windows.kept(vllm_config.max_in_flight_tokens)
    blocks, pool = _blocks_per_request(settings, vllm_config), known_pool(vllm_config)
    if pool is not None and pool.blocks < blocks + 1:
        raise LongContextError(
            f"{pool.given} gives {pool.blocks} blocks, but one request holds up to {blocks} "
            f"({kept}, block_size {block_size}) and vLLM keeps one; "
            f"give at least {blocks + 1} blocks, or lower {windows.remedy}"
        )


def _blocks_per_request(settings: Settings, vllm_config: VllmConfig) -> int:
    """The most KV blocks that one request holds."""
    block_size, longest = vllm_config.cache_config.block_size, vllm_config.model_config.max_model_len
    return settings.windows.most_blocks(block_size, vllm_config.max_in_flight_tokens, longest)


@dataclass(frozen=True)
class Pool:
    """vLLM's pool of KV blocks on a rank.

    blocks: Their number, with the null block.
    given: What decides it, for messages.
    """

    blocks: int
    given: str


def known_pool(vllm_config: VllmConfig) -> Pool | None:
    """The pool that the user asks for; None where vLLM takes the memory that is left."""
    cache = vllm_config.cache_config
    if (blocks := cache.num_gpu_blocks_override) is not None:
        return Pool(blocks, f"num_gpu_blocks_override = {blocks}")
    if (size := cache.kv_cache_memory_bytes) is not None:
        names = ", ".join(platform().pool_settings[1])
        return Pool(size // _bytes_per_block(vllm_config), f"the KV cache of {size} bytes ({names})")
    return None


def pool_of(settings: Settings, vllm_config: VllmConfig) -> Pool | None:
    """The pool that the user asks for, or about the one that vLLM will make.

    None if nobody can tell, and where no window depends on it.
    """
    if settings.mode.grows:
        return None
    known = known_pool(vllm_config)
    if known is not None:
        return known
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    memory = int(memory_of_a_rank() * vllm_config.cache_config.gpu_memory_utilization)
    if _blocks_per_request(settings, vllm_config) * _bytes_per_block(vllm_config) < SMALL_SHARE * memory:
        return None  # and models need not be made to be counted
    made = trained_model(vllm_config) if settings.mode.adapts else without_weights(model)
    if made is None:
        return None
    weights = made.num_parameters() * model_dtype(model).itemsize
    ranks = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    left = memory - weights // ranks
    if settings.mode.adapts:
        left -= _trainer_bytes(settings.temp_lora, made, weights) // ranks
    blocks = max(int(KV_SHARE * left), 0) // _bytes_per_block(vllm_config)
    return Pool(blocks, f"the KV cache of about {blocks * _bytes_per_block(vllm_config) / 2**30:.1f} GiB")


def _trainer_bytes(adaptation: Adaptation, model: PreTrainedModel, weights: int) -> int:
    """What the trainer takes of the memory where the engine is. weights: Bytes of the model's."""
    trainer = adaptation.trainer
    if trainer.address is not None or trainer.device != platform().device:
        return 0
    own = 0 if platform().trains_beside_engine else weights
    return own + Shape.of(model).training_bytes(adaptation)


def _bytes_per_block(vllm_config: VllmConfig) -> int:
    """Bytes of one KV block in all of a rank's layers."""
    return vllm_config.model_config.get_num_layers(vllm_config.parallel_config) * bytes_per_layer_block(
        vllm_config
    )
