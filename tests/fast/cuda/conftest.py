"""What a GPU alone can do is replaced.

That is streams and events, the operator that writes the KV cache, memory that both sides see, LoRA's kernels.
vLLM's Triton kernels are interpreted, as are ours.
"""

import inspect
import pkgutil
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import triton
from torch import Tensor
from transformers import LlamaConfig
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.v1.worker import gpu as v2
from vllm.v1.worker.gpu import buffer_utils

from tests.support.cuda_engine import BLOCK_SIZE
from tests.support.engine_args import TINY, save
from vllm_longctx.cuda import sliding as cuda
from vllm_longctx.cuda.kernels import lambda_attention, lambda_decode, stepped
from vllm_longctx.cuda.kernels.lambda_tile import Launch

KERNELS = ("buffer_utils", "input_batch", "block_table", "prompt_logprob", "logprob", "gumbel", "penalties")


class HostBuffer:
    """Of memory that host and device see."""

    def __init__(self, size: Any, dtype: torch.dtype):
        self.cpu = torch.zeros(size, dtype=dtype)
        self.np = self.cpu.numpy()

    def uva(self, n: int | None = None) -> Tensor:
        return self.cpu[:n]


@pytest.fixture
def lora_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "vllm.lora.model_manager.get_punica_wrapper",
        lambda tokens, max_batches, device, **kwargs: PunicaWrapperCPU(tokens, max_batches, device, **kwargs),
    )
    monkeypatch.setattr("vllm.lora.model_manager.PIN_MEMORY", False)


@pytest.fixture
def one_tile(sorted_by_numpy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels over whole engines: the fewer tiles, the sooner they are interpreted.

    Many are of the tests of each kernel.
    """
    for module in (lambda_attention, stepped):
        monkeypatch.setattr(module, "prefill_launch", lambda *args: Launch(128, 128, 4, 1))
    monkeypatch.setattr(lambda_decode, "decode_launch", lambda *args: Launch(16, 128, 4, 1))


@pytest.fixture
def host(no_gpu_memory: None, one_tile: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model Runner V2 on the CPU, where vLLM leaves its kernels undecorated."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "0")
    for module in pkgutil.walk_packages(v2.__path__, v2.__name__ + "."):
        if module.name.rpartition(".")[2] in KERNELS:
            names = vars(import_module(module.name))
            monkeypatch.setitem(names, "tl", triton.language)
            monkeypatch.setitem(names, "triton", triton)
            for name, function in list(names.items()):
                if inspect.isfunction(function) and inspect.getsource(function).startswith("@triton.jit"):
                    monkeypatch.setitem(names, name, triton.jit(function))
    monkeypatch.setattr(buffer_utils, "is_uva_available", lambda: False)
    monkeypatch.setattr(buffer_utils, "NonUvaBuffer", HostBuffer)
    for name in ("Stream", "Event", "set_stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    profiled = nullcontext(SimpleNamespace(consumed_memory=0))
    monkeypatch.setattr("vllm.v1.worker.gpu.model_runner.DeviceMemoryProfiler", lambda: profiled)


@pytest.fixture
def stock_cache_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's CUDA operator, which its CPU builds have not."""

    def reshape_and_cache_flash(
        key, value, key_cache, value_cache, slots, kv_cache_dtype, k_scale, v_scale
    ) -> None:
        real = slots >= 0
        if kv_cache_dtype == "fp8":
            key, value = (t.to(torch.float8_e4m3fn).view(torch.uint8) for t in (key, value))
        block, offset = slots[real] // BLOCK_SIZE, slots[real] % BLOCK_SIZE
        key_cache[block, offset], value_cache[block, offset] = (
            key[: len(slots)][real],
            value[: len(slots)][real],
        )

    monkeypatch.setattr(cuda.ops, "reshape_and_cache_flash", reshape_and_cache_flash)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return save(
        tmp_path, LlamaConfig(**TINY, intermediate_size=64, num_key_value_heads=1), "LlamaForCausalLM"
    )
