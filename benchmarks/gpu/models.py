"""Models of real shapes with random weights, and what they take: pure arithmetic in bytes, but for
`write_model`.

Weights do not matter for speed: vLLM fills them in with `load_format="dummy"`, so that a model is one
    config.json.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

from vllm_longctx.config import DEFAULT_N_GLOBAL

ITEM_BYTES = 2  # bfloat16, weights and KV
GIB = 1 << 30
BLOCK_SIZE = 32  # of KV
USABLE = 0.92  # of the card's memory
RESERVE = 4 * GIB  # activations of a step, logits, CUDA graphs and contexts
N_GLOBAL = DEFAULT_N_GLOBAL["lm_infinite"]  # of the preset; its n_local is the trained length
LARGEST_BATCH = 16  # of the engine's decode rows
WRITTEN = 128  # tokens, of each request whose decoding is timed
# Arguments of an engine for `write_model`.
RANDOM_WEIGHTS = {"dtype": "bfloat16", "load_format": "dummy", "skip_tokenizer_init": True}


@dataclass(frozen=True)
class Shape:
    """A dense Llama with untied embeddings. trained: its length in tokens, the default of n_local."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    trained: int
    rope_theta: float

    @property
    def window(self) -> int:
        """Tokens that a query past the window sees."""
        return N_GLOBAL + self.trained

    @property
    def scale(self) -> float:
        return self.head_size**-0.5

    @property
    def linear(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of a layer's linear modules."""
        query, key = self.heads * self.head_size, self.kv_heads * self.head_size
        h, i = self.hidden, self.intermediate
        return [(h, query), (h, key), (h, key), (query, h), (h, i), (h, i), (i, h)]

    @property
    def weights(self) -> int:
        return self.layers * sum(n * m for n, m in self.linear) + 2 * self.vocab * self.hidden

    @property
    def weight_bytes(self) -> int:
        return ITEM_BYTES * self.weights

    @property
    def layer_kv_bytes(self) -> int:
        """Of one token in one layer."""
        return 2 * self.kv_heads * self.head_size * ITEM_BYTES

    @property
    def kv_bytes(self) -> int:
        """Of one token in all layers."""
        return self.layers * self.layer_kv_bytes

    def lora_weights(self, rank: int) -> int:
        """Of an adapter of all linear modules."""
        return self.layers * rank * sum(n + m for n, m in self.linear)

    def pool_bytes(self, memory: int) -> int:
        """What a card of `memory` bytes has for KV beside the weights; both engines of a comparison are given
        the same.
        """
        return max(int(USABLE * memory) - self.weight_bytes - RESERVE, 0)

    def held_blocks(self, batched_tokens: int, steps: int = 2) -> int:
        """KV blocks that LM-Infinite holds while it reads a long prompt.

        They are of the first tokens, of the window, and of the tokens of the steps in flight.

        steps: 2 with async scheduling, since a step's blocks are freed once the next one is scheduled.
        """
        parts = [N_GLOBAL, self.trained, *[batched_tokens] * steps]
        return sum(math.ceil(tokens / BLOCK_SIZE) for tokens in parts)

    def common_batch(self, length: int, memory: int) -> int:
        """Requests of `length` tokens that stock vLLM can hold at once, at most LARGEST_BATCH."""
        return min(self.pool_bytes(memory) // ((length + 2 * WRITTEN) * self.kv_bytes), LARGEST_BATCH)

    def thin(self, length: int, memory: int) -> "Shape":
        """Half the layers, or half of these, ..., until stock vLLM can hold one request of `length` tokens.

        Every layer costs the same, so the ratio of two engines hardly depends on how many there are.
        """
        thinner = self
        while thinner.layers > 1 and not thinner.common_batch(length, memory):
            thinner = replace(thinner, layers=thinner.layers // 2)
        return thinner

    def rank_that_fits(self, streams: int, tokens: int, memory: int) -> int:
        """The largest rank of an adapter, at most 64, for so many streams that learn, each with so many
        tokens of KV.

        Beside that a stream has its trainer's state, in float32 the weights, their gradients and two moments;
        and in the weights' type two banks of a slot and vLLM's buffer for one.
        """
        for rank in (64, 32, 16, 8):
            adapter = self.lora_weights(rank) * (4 * 4 + 3 * ITEM_BYTES)
            if streams * (tokens * self.kv_bytes + adapter) <= self.pool_bytes(memory) - 2 * RESERVE:
                return rank
        return 4


LLAMA_2_7B = Shape("Llama-2-7B", 32, 4096, 11008, 32, 32, 128, 32000, 4096, 1e4)
GQA_8B = Shape("8B-GQA", 32, 4096, 14336, 32, 8, 128, 128256, 8192, 5e5)  # Llama-3-8B's
TINY = Shape("tiny", 2, 256, 512, 8, 8, 64, 1024, 512, 1e4)
TINY_GQA = Shape("tiny-GQA", 2, 256, 512, 8, 2, 64, 1024, 512, 1e4)


def write_model(shape: Shape, directory: Path) -> str:
    """A directory for the shape with its config.json, nothing else; its path."""
    path = directory / f"{shape.name}-{shape.layers}"
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_size,
        "max_position_embeddings": shape.trained,
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    (path / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return str(path)
