"""Fixtures for tests without an engine.

They import vLLM themselves: xdist reads this file where no test runs, too.
"""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


@pytest.fixture
def no_gpu_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM asks about it while a model is loaded."""
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda: 0)


@pytest.fixture(scope="session")
def small_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose attention is far from uniform; small, since interpreted."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("model")
    sizes = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = LlamaConfig(**sizes, num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.12)
    torch.manual_seed(5)
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> type:
    """vLLM's one platform object is a CUDA platform: an H100, without its libraries."""
    from vllm.platforms import current_platform
    from vllm.platforms.interface import DeviceCapability

    if not current_platform.is_cuda():
        monkeypatch.setitem(sys.modules, "vllm._C_stable_libtorch", ModuleType("vllm._C_stable_libtorch"))
    monkeypatch.setattr("vllm.config.vllm.HAS_TRITON", True)
    from vllm.platforms.cuda import NonNvmlCudaPlatform

    class H100(NonNvmlCudaPlatform):
        capability = DeviceCapability(9, 0)

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return cls.capability

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "NVIDIA H100"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return 80 << 30

    monkeypatch.setattr(current_platform, "__class__", H100)
    return H100


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """What vLLM's loader needs and can make only before the platform looks like CUDA."""
    if torch.cuda.is_available():
        pytest.skip("a GPU takes the tests of whole engines")
    from vllm import distributed
    from vllm.config import VllmConfig, set_current_vllm_config

    importlib.import_module("vllm.model_executor.layers.quantization.online.base")
    with set_current_vllm_config(VllmConfig()):
        distributed.init_distributed_environment(1, 0, f"file://{tmp_path / 'ranks'}", 0, "gloo")
        distributed.ensure_model_parallel_initialized(1, 1)
    yield
    distributed.destroy_model_parallel()
    distributed.destroy_distributed_environment()


@pytest.fixture
def short_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several chunks and parts each, where decodes look up a memory; long ones take long to interpret."""
    from vllm_longctx.cuda.kernels import lookup_decode

    monkeypatch.setattr(lookup_decode, "LIST", 4)
    monkeypatch.setattr(lookup_decode, "PART", 16)


@pytest.fixture
def sorted_by_numpy(short_lists: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing takes longer to interpret than Triton's own sorting. The tests of the kernels have that."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def largest(x: Any, k: Any, dim: Any = None, descending: Any = True) -> Any:
        return like(x, -np.sort(-x.handle.data)[: int(k)])

    def ascending(x: Any, dim: Any = None, descending: Any = False) -> Any:
        return like(x, np.sort(x.handle.data))

    def like(x: Any, data: Any) -> Any:
        return tl.tensor(TensorHandle(data, x.dtype), tl.block_type(x.dtype, [*data.shape]))

    if not torch.cuda.is_available():
        monkeypatch.setattr(tl, "topk", largest)
        monkeypatch.setattr(tl, "sort", ascending)
