"""The self-check of layers of the GPU engine, with the groups of vLLM's Model Runner V2."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from tests.support.cuda_engine import Engine
from vllm_longctx.config import LongContextError
from vllm_longctx.cuda.runner import LongContextRunner
from vllm_longctx.cuda.sliding import LambdaImpl
from vllm_longctx.cuda.top_k_runner import TopKRunner
from vllm_longctx.engine.self_check import check_layers
from vllm_longctx.scheduling.memory import AsyncTopKScheduler, TopKScheduler
from vllm_longctx.scheduling.scheduler import AsyncLongContextScheduler, LongContextScheduler

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, kernels are not interpreted"),
    pytest.mark.usefixtures("one_rank", "gpu", "host", "stock_cache_update", "one_thread"),
]
LAMBDA = {"n_global": 5, "n_local": 24, "distance_ceiling": 30}
TOP_K = {**LAMBDA, "top_k": 3, "top_k_from_layer": 1, "top_k_to_layer": 2}


class SlidingRunner(LongContextRunner, GPUModelRunner):
    pass


def engine(model: Path, attention: dict[str, Any], **kwargs: Any) -> Engine:
    is_kept = "top_k" in attention
    schedulers = (
        [TopKScheduler, AsyncTopKScheduler] if is_kept else [LongContextScheduler, AsyncLongContextScheduler]
    )
    runner = TopKRunner if is_kept else SlidingRunner
    pool = {"num_gpu_blocks_override": 12, "max_num_batched_tokens": 40, "max_model_len": 80}
    return Engine(model, {"attention": attention}, runner, schedulers, 0, **pool, **kwargs)


def check(engine: Engine) -> None:
    runner = engine.runner
    with set_current_vllm_config(engine.config):
        check_layers(runner.sites, runner.attn_groups, engine.config, True)


@pytest.mark.parametrize(
    ("attention", "kv_cache_dtype"), [(LAMBDA, "auto"), (TOP_K, "auto"), (LAMBDA, "fp8")]
)
def test_right_layers_pass(attention: dict[str, Any], kv_cache_dtype: str, small_llama: Path) -> None:
    check(engine(small_llama, attention, kv_cache_dtype=kv_cache_dtype))  # unwritten blocks are NaN


def test_a_wrong_layer_is_refused_by_its_name(small_llama: Path) -> None:
    made = engine(small_llama, LAMBDA)
    site = made.runner.sites[0]
    impl = site.layer.impl
    assert isinstance(impl, LambdaImpl)
    right = impl.view
    for n_local in (23, 25):
        impl.view = replace(right, geometry=replace(right.geometry, n_local=n_local))
        with pytest.raises(LongContextError, match=f"cannot serve layer {site.name}: in the self-check"):
            check(made)
    impl.view = right
    check(made)
