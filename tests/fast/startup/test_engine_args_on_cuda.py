"""What the plugin makes of engine arguments on CUDA."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from tests.support.engine_args import TINY, create, save
from vllm_longctx.config import LongContextError
from vllm_longctx.cuda.sliding import LambdaBackend
from vllm_longctx.engine.memory_kv import bytes_per_layer_block
from vllm_longctx.modes import SCHEDULERS
from vllm_longctx.scheduling.scheduler import AsyncLongContextScheduler, LongContextScheduler
from vllm_longctx.startup import platform


@pytest.mark.parametrize("v2", [True, False])
def test_engine_arguments_on_cuda(gpu: type, v2: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(int(v2)))
    config = create(max_num_seqs=8)
    assert config.use_v2_model_runner == v2
    assert config.parallel_config.worker_cls == "vllm_longctx.cuda.worker.LongContextWorker"
    assert config.attention_config.backend == AttentionBackendEnum.CUSTOM
    assert AttentionBackendEnum.CUSTOM.get_class() is LambdaBackend
    assert (config.cache_config.block_size, config.model_config.max_model_len) == (32, 1 << 20)
    assert config.scheduler_config.async_scheduling
    assert config.scheduler_config.get_scheduler_cls() is AsyncLongContextScheduler
    assert config.scheduler_config.scheduler_cls in SCHEDULERS


def test_without_async_scheduling_the_scheduler_is_the_plain_one(gpu: type) -> None:
    assert create(async_scheduling=False).scheduler_config.get_scheduler_cls() is LongContextScheduler


def test_what_is_allowed_on_cuda_only(gpu: type) -> None:
    config = create(block_size=16, kv_cache_dtype="fp8", attention_backend="CUSTOM")
    assert (config.cache_config.block_size, config.cache_config.cache_dtype) == (16, "fp8")
    model = config.model_config
    assert bytes_per_layer_block(config) == 2 * 16 * model.get_total_num_kv_heads() * model.get_head_size()


def test_an_engine_without_a_configuration_keeps_vllms_own(gpu: type) -> None:
    config = create(additional_config={})
    assert config.parallel_config.worker_cls == "vllm.v1.worker.gpu_worker.Worker"
    assert config.attention_config.backend is None and config.scheduler_config.scheduler_cls is None


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"block_size": 24}, r"block_size = 24; give a multiple of 16"),
        (
            {"kv_cache_dtype": "int8_per_token_head"},
            r"kv_cache_dtype = 'int8_per_token_head'; leave it at 'auto', or give 'fp8'",
        ),
        (
            {"attention_backend": "FLASH_ATTN"},
            r"attention_backend = FLASH_ATTN, but longctx brings its own; leave",
        ),
        (
            {"attention_config": {"backend": "TRITON_ATTN"}},
            r"attention_backend = TRITON_ATTN, but longctx brings its own",
        ),
        (
            {"attention_config": {"backend_per_kind": {"full_attention": "FLASH_ATTN"}}},
            r"backend_per_kind = .*, but longctx's backend serves all layers; leave it out",
        ),
        (
            {"worker_cls": "my.Worker"},
            r"worker_cls = 'my.Worker', but longctx needs its own; leave worker_cls out",
        ),
        (
            {"kv_cache_memory_bytes": 1_000_000},
            r"the KV cache of 1000000 bytes \(kv_cache_memory_bytes\) gives .* blocks",
        ),
    ],
)
def test_what_cuda_cannot_do_is_refused(kwargs: dict[str, Any], message: str, gpu: type) -> None:
    with pytest.raises(LongContextError, match=message):
        create(**kwargs)


@pytest.mark.parametrize(
    ("capability", "kwargs", "message"),
    [
        (
            DeviceCapability(7, 5),
            {},
            r"capability of NVIDIA H100 is 7.5, but longctx's attention needs 8.0 or newer; use such a GPU, "
            r"or vLLM for",
        ),
        (
            DeviceCapability(8, 0),
            {"kv_cache_dtype": "fp8"},
            r"capability of NVIDIA H100 is 8.0, but kv_cache_dtype = 'fp8' needs 8.9 or newer; leave "
            r"kv_cache_dtype at 'auto'",
        ),
    ],
)
def test_a_gpu_that_is_too_old_is_refused(
    capability: DeviceCapability,
    kwargs: dict[str, Any],
    message: str,
    gpu: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu, "capability", capability)
    with pytest.raises(LongContextError, match=message):
        create(**kwargs)


def test_another_platform_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    tpu = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: False, device_name="tpu")
    monkeypatch.setattr(platform, "current_platform", tpu)
    with pytest.raises(
        LongContextError, match="longctx runs on vLLM's CPU and CUDA platforms, but this is tpu"
    ):
        create()


def test_heads_beyond_the_kernels_are_refused(gpu: type, tmp_path: Path) -> None:
    config = LlamaConfig(**TINY, intermediate_size=64, head_dim=512)
    with pytest.raises(
        LongContextError,
        match=r"it has heads of 512 elements; longctx's attention on CUDA takes 32, 64, .* 256",
    ):
        create(save(tmp_path, config, "LlamaForCausalLM"))


def test_another_plugins_backend_is_not_overwritten(gpu: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        sys.modules["vllm.v1.attention.backends.registry"]._ATTN_OVERRIDES, AttentionBackendEnum.CUSTOM, "a.B"
    )
    with pytest.raises(
        LongContextError, match=r"another plugin has registered its own attention backend CUSTOM \(a.B\)"
    ):
        create()
    create(additional_config={})
