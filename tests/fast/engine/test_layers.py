"""Which entries of vLLM's forward context are attention layers that longctx serves."""

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionType

from vllm_longctx.config import LongContextError
from vllm_longctx.engine.layers import attention_layers


class Impl:
    """Of an attention layer."""


def layer(**changes: Any) -> Attention:
    made = object.__new__(Attention)
    nn.Module.__init__(made)
    stock = {
        "attn_type": AttentionType.DECODER,
        "kv_sharing_target_layer_name": None,
        "head_size": 64,
        "head_size_v": 64,
        "impl": Impl(),
    }
    for name, value in {**stock, **changes}.items():
        setattr(made, name, value)
    return made


def config_of(**layers: Any) -> Any:
    return SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=layers))


def test_linear_layers_that_run_beside_others_are_none() -> None:
    """With VLLM_LORA_ENABLE_DUAL_STREAM each adapted linear layer is in the forward context, too."""
    attention, linear = layer(), nn.Linear(2, 2)
    config = config_of(**{"layers.0.attn": attention, "layers.0.qkv_proj.lora_linear_async": linear})
    assert attention_layers(config, Impl) == {"layers.0.attn": attention}  # type: ignore[type-abstract, arg-type]


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(LongContextError, match="it has no attention layers"):
        attention_layers(config_of(**{"qkv_proj.lora_linear_async": nn.Linear(2, 2)}), Impl)  # type: ignore[arg-type]
