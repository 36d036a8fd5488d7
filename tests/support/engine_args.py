"""Engine arguments and the configuration that vLLM makes of them, without an engine."""

from pathlib import Path
from typing import Any

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from vllm_longctx import BOOKLM

LM_INFINITE = {"longctx": {"preset": "lm-infinite"}}
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}


def create(model: str | Path = BOOKLM, additional_config: Any = LM_INFINITE, **kwargs: Any) -> VllmConfig:
    return EngineArgs(
        model=str(model), additional_config=additional_config, skip_tokenizer_init=True, **kwargs
    ).create_engine_config()


def save(path: Path, config: Any, architecture: str) -> Path:
    config.architectures = [architecture]
    config.save_pretrained(path)
    return path
