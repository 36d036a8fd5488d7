"""LongLLaMA's checkpoints (github.com/CStanKonrad/long_llama): Llama's weights, and which layers have memory.

The model is vLLM's and transformers' own Llama; the memory is the engine's (`attention/focused`).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, LlamaConfig
from vllm.model_executor.models.registry import ModelRegistry

MODEL_TYPE = "longllama"
ARCHITECTURE = "LongLlamaForCausalLM"


class LongLlamaConfig(LlamaConfig):
    """Llama's config and, in the official code's names and with its defaults:

    max_position_embeddings: tokens of a window, not of the text. last_context_length: a window begins so far before the end
    of the prompt. mem_layers: numbers of the layers that see all keys before the window. mem_positionals: False for memory
    layers without any rotation. mem_dtype: of the memory's keys and values.
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        mem_layers: Sequence[int] = (),
        mem_positionals: bool = True,
        mem_dtype: str = "bfloat16",
        last_context_length: int = 1024,
        **kwargs: Any,
    ):
        self.mem_layers = list(mem_layers)
        self.mem_positionals = mem_positionals
        self.mem_dtype = mem_dtype
        self.last_context_length = last_context_length
        super().__init__(**kwargs)


def is_checkpoint(model: str) -> bool:
    """Whether a local directory holds a LongLLaMA checkpoint."""
    path = Path(model, "config.json")
    try:
        return json.loads(path.read_text()).get("model_type") == MODEL_TYPE
    except (OSError, ValueError, AttributeError):  # not a directory, or one that vLLM complains of better than we could
        return False


def register() -> None:
    AutoConfig.register(MODEL_TYPE, LongLlamaConfig, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, "vllm.model_executor.models.llama:LlamaForCausalLM")
