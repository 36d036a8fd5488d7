"""LongLLaMA's checkpoints (github.com/CStanKonrad/long_llama): Llama's weights, and which layers have memory.

The model is vLLM's and transformers' own Llama; the memory is the engine's (`modes`, row memory). Nothing of
vLLM here: training needs it too.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import LlamaConfig, PretrainedConfig

MODEL_TYPE = "longllama"
ARCHITECTURE = "LongLlamaForCausalLM"


class LongLlamaConfig(LlamaConfig):
    """Llama's config and the memory's, in the official code's names and with its defaults.

    max_position_embeddings: tokens of a window, not of the text. last_context_length: a window begins so far
    before the end of the prompt. mem_layers: numbers of the layers that see all keys before the window.
    mem_positionals: False for memory layers without any rotation. mem_dtype: of the memory's keys and values.
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


def is_checkpoint(model: str, ask_hub: bool) -> bool:
    """Whether a local directory or, if asked for, a name on the hub is a LongLLaMA checkpoint."""
    if not ask_hub and not Path(model).is_dir():
        return False
    try:
        return PretrainedConfig.get_config_dict(model)[0].get("model_type") == MODEL_TYPE
    except (OSError, ValueError):  # vLLM complains of that better than we could
        return False


def check_weights(model: str, config: PretrainedConfig) -> None:
    """Raises ValueError where a local checkpoint's safetensors have other layers or shapes than its config
    says.
    """
    shapes: dict[str, list[int]] = {}
    for path in sorted(Path(model).glob("*.safetensors")):
        with safe_open(path, "pt") as weights:
            shapes |= {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    if not shapes:
        return
    hidden, head = (
        config.hidden_size,
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    )
    expected = {
        "model.embed_tokens.weight": [config.vocab_size, hidden],
        "model.layers.0.self_attn.q_proj.weight": [config.num_attention_heads * head, hidden],
        "model.layers.0.self_attn.k_proj.weight": [config.num_key_value_heads * head, hidden],
        "model.layers.0.mlp.up_proj.weight": [config.intermediate_size, hidden],
    }
    for name, shape in expected.items():
        if shapes.get(name) != shape:
            raise ValueError(
                f"checkpoint {model}: config.json says {name} is {shape}, but in its weights it is "
                f"{shapes.get(name, 'missing')}; one of the two files belongs to another model"
            )
    layers = {int(name.split(".")[2]) for name in shapes if name.startswith("model.layers.")}
    if layers != set(range(config.num_hidden_layers)):
        raise ValueError(
            f"checkpoint {model}: config.json says num_hidden_layers = {config.num_hidden_layers}, but its "
            f"weights have layers "
            f"{min(layers)} to {max(layers)}; one of the two files belongs to another model"
        )
