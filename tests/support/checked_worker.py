"""A worker of the CPU engine in the test's process: its KV cache is bound, and its layers are checked."""

from pathlib import Path
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from tests.support.engine_args import create
from tests.support.vllm_names import kv_cache_config
from vllm_longctx.cpu.worker import LongContextWorker
from vllm_longctx.modes import load

CPU = torch.device("cpu")


def loaded(model: Path, section: dict[str, Any], **kwargs: Any) -> LongContextWorker:
    """A worker whose layers are made, with random weights."""
    settings = {
        "dtype": "float32",
        "block_size": 32,
        "max_model_len": 1024,
        "max_num_seqs": 4,
        "num_gpu_blocks_override": 40,
        "kv_cache_memory_bytes": 1 << 28,
        "enforce_eager": True,
        "load_format": "dummy",
    }
    config = create(model, {"longctx": section}, **{**settings, **kwargs})
    worker = LongContextWorker(config, 0, 0, "")
    worker.device = CPU
    with set_current_vllm_config(config):
        runner: Any = CPUModelRunner(config, CPU)
        runner.__class__ = load(f"cpu.{worker.settings.mode.runner}")
        worker.model_runner = runner
        worker.load_model()
    return worker


def start(worker: LongContextWorker) -> None:
    """Make the KV cache, as the engine core has it made, and check the layers."""
    config = worker.vllm_config
    with set_current_vllm_config(config):
        specs = worker.get_kv_cache_spec()
        layers = [site.layer for site in worker.sites]
        worker.initialize_from_config(kv_cache_config(config, specs, layers, 1 << 28))
