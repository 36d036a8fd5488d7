"""What a model's config says of its trained length, and which default windows the KV cache holds."""

import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    Cohere2Config,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Olmo3Config,
    Phi3Config,
    Qwen2Config,
    Starcoder2Config,
)
from vllm.config import ModelConfig
from vllm.engine.arg_utils import EngineArgs

from tests.support.engine_args import LM_INFINITE, TINY, create, save
from vllm_longctx.config import LongContextError
from vllm_longctx.models.properties import keep_trained_window, trained_length, without_weights
from vllm_longctx.settings import Settings, active_settings
from vllm_longctx.startup import pool

SMALL = {**TINY, "intermediate_size": 64, "num_key_value_heads": 2}
DEEPER = {**SMALL, "num_hidden_layers": 8}  # so that some layers see all
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 8192}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 4096,
    "short_factor": [1.0] * 16,
    "long_factor": [2.0] * 16,
}


def model_config(path: Path, config: Any, architecture: str, **kwargs: Any) -> ModelConfig:
    args = EngineArgs(model=str(save(path, config, architecture)), skip_tokenizer_init=True, **kwargs)
    return args.create_model_config()


def mistral(window: int | None, **more: Any) -> MistralConfig:
    return MistralConfig(**SMALL, max_position_embeddings=32768, sliding_window=window, **more)


@pytest.mark.parametrize(
    ("config", "architecture", "length"),
    [
        (mistral(4096), "MistralForCausalLM", 4096),
        (mistral(None), "MistralForCausalLM", 32768),
        (mistral(0), "MistralForCausalLM", 32768),
        (mistral(32767), "MistralForCausalLM", 32767),
        (mistral(32768), "MistralForCausalLM", 32768),
        (mistral(32769), "MistralForCausalLM", 32768),
        (mistral(64, layer_types=["sliding_attention"] * 2), "MistralForCausalLM", 64),
        (mistral(64, layer_types=["full_attention", "sliding_attention"]), "MistralForCausalLM", 32768),
        (mistral(64, sliding_window_pattern=2), "MistralForCausalLM", 32768),
        (
            Starcoder2Config(**SMALL, max_position_embeddings=16384, sliding_window=4096),
            "Starcoder2ForCausalLM",
            4096,
        ),
        (
            Qwen2Config(**SMALL, max_position_embeddings=32768, sliding_window=4096),
            "Qwen2ForCausalLM",
            32768,
        ),
        (
            Qwen2Config(
                **SMALL, max_position_embeddings=32768, sliding_window=4096, use_sliding_window=True,
                max_window_layers=0,
            ),
            "Qwen2ForCausalLM",
            4096,
        ),
        (
            Qwen2Config(
                **SMALL, max_position_embeddings=32768, sliding_window=4096, use_sliding_window=True,
                max_window_layers=1,
            ),
            "Qwen2ForCausalLM",
            32768,
        ),
        (Gemma2Config(**DEEPER, max_position_embeddings=8192), "Gemma2ForCausalLM", 8192),
        (Cohere2Config(**DEEPER, max_position_embeddings=8192), "Cohere2ForCausalLM", 8192),
        (
            GptOssConfig(**DEEPER, max_position_embeddings=131072, num_local_experts=2),
            "GptOssForCausalLM",
            131072,
        ),
        (
            Gemma3TextConfig(
                **DEEPER, max_position_embeddings=131072,
                rope_parameters={
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                },
            ),
            "Gemma3ForCausalLM",
            131072,
        ),
        (
            Olmo3Config(
                **DEEPER, max_position_embeddings=65536,
                rope_parameters={
                    "full_attention": YARN,
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                },
            ),
            "Olmo3ForCausalLM",
            65536,
        ),
        (
            Phi3Config(
                **SMALL, pad_token_id=0, max_position_embeddings=131072, sliding_window=262144,
                original_max_position_embeddings=4096, rope_parameters=LONGROPE,
            ),
            "Phi3ForCausalLM",
            131072,
        ),
        (
            Phi3Config(**SMALL, pad_token_id=0, max_position_embeddings=4096, sliding_window=2047),
            "Phi3ForCausalLM",
            2047,
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("disable", [False, True])
def test_the_trained_length_is_the_window_where_every_layer_slides(
    config: Any, architecture: str, length: int, disable: bool, tmp_path: Path
) -> None:
    model = model_config(tmp_path, config, architecture, disable_sliding_window=disable, max_model_len=32)
    keep_trained_window(model)
    assert trained_length(model) == length


@pytest.mark.parametrize("overrides", [{}, {"sliding_window": 100}, lambda config: _changed(config, 100)])
def test_a_disabled_window_is_read_from_the_checkpoint_and_its_overrides(
    overrides: Any, tmp_path: Path
) -> None:
    model = save(tmp_path, mistral(128), "MistralForCausalLM")
    config = create(model, disable_sliding_window=True, hf_overrides=overrides)
    length = 100 if overrides else 128
    assert trained_length(config.model_config) == length
    assert active_settings(config).geometry.n_local == length
    assert config.model_config.get_sliding_window() is None
    longer = {"longctx": {"attention": {"n_local": length + 1}}}
    with pytest.raises(
        LongContextError, match=rf"n_local = {length + 1}, but the model was trained on {length}"
    ):
        create(model, longer, disable_sliding_window=True, hf_overrides=overrides)


def _changed(config: Any, window: int) -> Any:
    config.sliding_window = window
    return config


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.WARNING, "vllm.longctx")
    return caplog


@pytest.fixture(autouse=True)
def _pools_are_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)


@pytest.fixture
def llama_8b(tmp_path: Path) -> Path:
    """The config of a Llama 3.1 8B: its KV takes 128 KiB a token in bfloat16."""
    return save(tmp_path, LlamaConfig(**LLAMA_8B), "LlamaForCausalLM")


def settings(model: Path, value: dict[str, Any], **kwargs: Any) -> Settings:
    given = {"dtype": "bfloat16", "max_num_batched_tokens": 2048, **kwargs}
    return active_settings(create(model, {"longctx": value}, **given))


KIB_128 = 128 << 10
# n_global 10 takes a block of 32 tokens, 2,048 - 1 tokens are in flight, a block is ragged, one is vLLM's.
BESIDE = 32 + 2047 + 32 + 32


@pytest.mark.parametrize("blocks", [(131072 + BESIDE + 31) // 32, 4096])
def test_a_sliding_window_is_what_the_kv_cache_holds(
    llama_8b: Path, blocks: int, warnings: pytest.LogCaptureFixture
) -> None:
    found = settings(llama_8b, {}, kv_cache_memory_bytes=blocks * 32 * KIB_128)
    fits = blocks != 4096
    assert found.geometry.n_local == (131072 if fits else 4096 * 32 - BESIDE)
    assert found.geometry.distance_ceiling == 131072
    said = "attention.n_local is 128929, not 131072, since the KV cache of 17179869184 bytes"
    assert (said in warnings.text) == (not fits)


def test_the_window_that_is_taken_is_the_largest(llama_8b: Path) -> None:
    pool = {"num_gpu_blocks_override": 1000}
    n_local = settings(llama_8b, {}, **pool).geometry.n_local
    assert n_local == 1000 * 32 - BESIDE
    settings(llama_8b, {"attention": {"n_local": n_local}}, **pool)
    with pytest.raises(LongContextError, match=r"num_gpu_blocks_override = 1000 gives 1000 blocks, but one"):
        settings(llama_8b, {"attention": {"n_local": n_local + 1}}, **pool)


def test_a_pool_with_a_window_of_no_use_is_refused(llama_8b: Path) -> None:
    least = (1024 + BESIDE + 31) // 32
    assert settings(llama_8b, {}, num_gpu_blocks_override=least).geometry.n_local in range(1024, 1056)
    with pytest.raises(
        LongContextError, match=r"one request holds up to .* n_local 131072, .*; give at least"
    ):
        settings(llama_8b, {}, num_gpu_blocks_override=least - 1)


@pytest.mark.parametrize(
    ("blocks", "plain"), [(4098, 131072), (4097, 131040), (1000, 998 * 32), (500, 498 * 32)]
)
def test_temp_loras_windows_are_what_the_kv_cache_holds(
    llama_8b: Path, blocks: int, plain: int, warnings: pytest.LogCaptureFixture
) -> None:
    found = settings(llama_8b, {"preset": "temp-lora-quality"}, num_gpu_blocks_override=blocks).temp_lora
    assert (found.plain_tokens, found.window_tokens) == (plain, min(plain, 24576))
    assert ("adaptation.plain_tokens is" in warnings.text) == (plain < 131072)
    assert ("adaptation.window_tokens is" in warnings.text) == (plain < 24576)


def test_what_a_user_says_of_temp_loras_windows_is_kept_or_refused(llama_8b: Path) -> None:
    pool = {"num_gpu_blocks_override": 100}
    own = {"window_tokens": 3136, "plain_tokens": 2000}
    value = {"preset": "temp-lora-quality", "adaptation": own}
    found = settings(llama_8b, value, **pool).temp_lora
    assert (found.window_tokens, found.plain_tokens) == (3136, 2000)
    with pytest.raises(
        LongContextError,
        match=r"window_tokens 3137, adaptation.plain_tokens 2000, .* give at least 101 blocks, or lower both",
    ):
        settings(llama_8b, {**value, "adaptation": {**own, "window_tokens": 3137}}, **pool)
    # A text ends at max_model_len, whatever the model was trained on.
    found = settings(llama_8b, {"preset": "temp-lora-quality"}, max_model_len=2000, **pool).temp_lora
    assert (found.window_tokens, found.plain_tokens) == (24576, 131072)


def test_weights_of_a_model_are_counted_without_making_any(llama_8b: Path) -> None:
    made = without_weights(create(llama_8b, LM_INFINITE).model_config)
    assert made is not None and made.num_parameters() == 8_030_261_248


@pytest.mark.parametrize("gib", [20, 24, 32, 640])
def test_where_vllm_takes_what_memory_is_left_the_window_is_what_that_holds(
    llama_8b: Path, gib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On machines of `gib` GiB, of which the weights take 15."""
    monkeypatch.setattr(pool, "memory_of_a_rank", lambda: gib << 30)
    left = 0.75 * ((gib << 30) * 0.9 - 2 * 8_030_261_248)
    n_local = settings(llama_8b, {}, gpu_memory_utilization=0.9).geometry.n_local
    assert n_local == min(int(left // (32 * KIB_128)) * 32 - BESIDE, 131072)


def test_where_vllm_takes_what_is_left_there_is_room_for_the_trainer(
    llama_8b: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine of 75 GiB, where the trainer has another copy of the weights."""
    monkeypatch.setattr(pool, "memory_of_a_rank", lambda: 75 << 30)

    trainer = {"dtype": "bfloat16"}

    def plain(**adaptation: Any) -> int:
        value = {"preset": "temp-lora-quality", "adaptation": {"slots": 1, "trainer": trainer, **adaptation}}
        return settings(llama_8b, value).temp_lora.plain_tokens

    monkeypatch.setattr(pool, "without_weights", lambda model: pytest.fail("made beside the trainer's"))
    here = plain()
    assert 24576 < here < 131072
    assert plain(slots=2) < here < plain(rank=32) < plain(trainer={**trainer, "recompute": True}) == 131072
    assert plain(trainer={"address": "ipc:///tmp/trainer"}) == 131072


def test_a_small_model_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "without_weights", lambda model: pytest.fail("counted"))
    assert active_settings(create()).geometry.n_local == 512
