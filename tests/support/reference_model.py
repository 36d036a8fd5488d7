"""Dense float64 decoders for tests: every layer attends by `attention.reference`, literally."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, silu

from vllm_longctx.geometry import (
    Branch,
    Geometry,
    SteppedWindows,
    alibi_slopes,
    branches,
    local_branch,
    memory_branch,
    middle_branch,
)
from vllm_longctx.reference import attention
from vllm_longctx.rotary import Rotary, attention_factor, inverse_frequencies

PLAIN = Geometry()
PIECE = 64  # queries that are computed at once
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
# What a layer sees at positions [tokens], by its number, and whether its queries and keys are rotated.
Layers = Callable[[int, Tensor], tuple[list[Branch], bool]]


def alike(geometry: Geometry) -> Layers:
    return lambda _, positions: (branches(geometry, positions, positions), True)


def focused(
    windows: SteppedWindows,
    prompt_length: int,
    mem_layers: list[int],
    mem_positionals: bool = True,
    best: int | None = None,
) -> Layers:
    def seen(layer: int, positions: Tensor) -> tuple[list[Branch], bool]:
        start = torch.tensor([windows.start(i, prompt_length) for i in positions.tolist()])
        local = local_branch(positions, positions, start)
        if layer not in mem_layers:
            return [local], True
        return [local, memory_branch(positions, positions, start, best)], mem_positionals

    return seen


def with_top_k(geometry: Geometry, prompt_length: int, layers: range, top_k: int, insert_at: int) -> Layers:
    def seen(layer: int, positions: Tensor) -> tuple[list[Branch], bool]:
        by_position = branches(geometry, positions, positions)
        if layer in layers:
            by_position.append(
                middle_branch(geometry, positions, positions, top_k, insert_at, prompt_length - 1)
            )
        return by_position, True

    return seen


def official_top_k(case: Mapping[str, Any]) -> dict[str, Any]:
    """`attention` for what the case.json of a golden says of the official LM-Infinite code with its top-k
    branch.
    """
    names = {"n_global": "global_branch", "n_local": "local_branch", "distance_ceiling": "limit_distance"}
    names |= {"top_k": "top_k_attention"} | {
        name: name for name in ("top_k_insert_at", "top_k_from_layer", "top_k_to_layer")
    }
    return {ours: case[theirs] for ours, theirs in names.items()}


class Reference:
    """A checkpoint directory of Hugging Face's.

    A family says how to embed, what a layer does, and what comes last.
    """

    rotary: Rotary | None = None
    slopes: Tensor | None = None

    def __init__(self, path: str | Path):
        path = Path(path)
        self.config = json.loads((path / "config.json").read_text())
        self.weights = {k: v.double() for k, v in load_file(path / "model.safetensors").items()}
        self.set_up()

    def logprobs(self, ids: list[int], seen: Geometry | Layers = PLAIN) -> Tensor:
        """float64 [tokens, vocab]: log-probabilities of the token after each position."""
        layers = alike(seen) if isinstance(seen, Geometry) else seen
        x = self.embed(torch.tensor(ids))
        self.margins: list[float] = []
        for number in range(self.layers):
            by_position, rotates = layers(number, torch.arange(len(ids)))

            x = self.layer(x, number, partial(self.attend, by_position, self.rotary if rotates else None))
        return self.head(x).log_softmax(-1)

    def token_logprobs(self, ids: list[int], seen: Geometry | Layers = PLAIN) -> Tensor:
        """float64 [tokens - 1]: log-probability of each token after the first."""
        return self.logprobs(ids, seen)[:-1].gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)

    def attend(self, seen: list[Branch], rotary: Rotary | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """In pieces of the text, each beside the keys that any of its queries sees; [tokens, heads *
        head_dim].
        """
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v))
        pieces = []
        for rows in torch.arange(len(q)).split(PIECE):
            keys = torch.cat([branch.visible[rows] for branch in seen]).any(0).nonzero().squeeze(1)
            of_piece = [Branch(b.visible[rows][:, keys], b.distance[rows][:, keys], b.best) for b in seen]
            scale = self.head_dim**-0.5
            pieces.append(
                attention(q[rows], k[keys], v[keys], of_piece, scale, rotary, self.slopes, self.margins)
            )
        return torch.cat(pieces).flatten(1)

    def linear(self, x: Tensor, name: str) -> Tensor:
        y = x @ self.weights[f"{name}.weight"].T
        return y + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else y

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")
        return layer_norm(x, x.shape[-1:], weight, bias, self.config.get("layer_norm_epsilon", 1e-5))


class ReferenceLlama(Reference):
    """Llama, Mistral, Qwen2 (biases) and Qwen3 (norms of queries and keys)."""

    def set_up(self) -> None:
        c = self.config
        self.layers = c["num_hidden_layers"]
        self.head_dim = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
        parameters = c.get("rope_parameters") or {
            "rope_type": "default",
            "rope_theta": c.get("rope_theta", 10000.0),
        }
        frequencies = inverse_frequencies(self.head_dim, parameters, c["max_position_embeddings"])
        self.rotary = Rotary(self.head_dim, self.head_dim, True, frequencies, attention_factor(parameters))

    def embed(self, ids: Tensor) -> Tensor:
        return self.weights["model.embed_tokens.weight"][ids]

    def norm(self, x: Tensor, name: str) -> Tensor:
        return (
            x
            * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"])
            * self.weights[f"{name}.weight"]
        )

    def layer(self, x: Tensor, number: int, attend: Attend) -> Tensor:
        name = f"model.layers.{number}"
        y = self.norm(x, f"{name}.input_layernorm")
        q, k, v = (self.linear(y, f"{name}.self_attn.{p}_proj") for p in "qkv")
        if f"{name}.self_attn.q_norm.weight" in self.weights:
            heads = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k))
            q, k = (
                self.norm(t, f"{name}.self_attn.{p}_norm").flatten(1)
                for t, p in zip(heads, "qk", strict=True)
            )
        x = x + self.linear(attend(q, k, v), f"{name}.self_attn.o_proj")
        y = self.norm(x, f"{name}.post_attention_layernorm")
        gated = silu(self.linear(y, f"{name}.mlp.gate_proj")) * self.linear(y, f"{name}.mlp.up_proj")
        return x + self.linear(gated, f"{name}.mlp.down_proj")

    def head(self, x: Tensor) -> Tensor:
        return self.linear(
            self.norm(x, "model.norm"),
            "model.embed_tokens" if self.config["tie_word_embeddings"] else "lm_head",
        )


class ReferenceGPTJ(Reference):
    """Partial rotation of interleaved pairs; attention and MLP side by side."""

    def set_up(self) -> None:
        c = self.config
        self.layers, self.head_dim = c["n_layer"], c["n_embd"] // c["n_head"]
        frequencies = inverse_frequencies(c["rotary_dim"], {"rope_type": "default"})
        self.rotary = Rotary(self.head_dim, c["rotary_dim"], False, frequencies)

    def embed(self, ids: Tensor) -> Tensor:
        return self.weights["transformer.wte.weight"][ids]

    def layer(self, x: Tensor, number: int, attend: Attend) -> Tensor:
        name = f"transformer.h.{number}"
        y = self.norm(x, f"{name}.ln_1")
        attended = attend(*(self.linear(y, f"{name}.attn.{p}_proj") for p in "qkv"))
        inner = gelu(self.linear(y, f"{name}.mlp.fc_in"), approximate="tanh")
        return x + self.linear(attended, f"{name}.attn.out_proj") + self.linear(inner, f"{name}.mlp.fc_out")

    def head(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x, "transformer.ln_f"), "lm_head")


class ReferenceBloom(Reference):
    approximate = "none"  # as in vLLM; transformers has "tanh", which moves log-probabilities by up to 2e-3

    def set_up(self) -> None:
        c = self.config
        self.layers, heads = c["n_layer"], c["n_head"]
        self.head_dim, self.slopes = c["hidden_size"] // heads, alibi_slopes(heads)

    def embed(self, ids: Tensor) -> Tensor:
        return self.norm(
            self.weights["transformer.word_embeddings.weight"][ids], "transformer.word_embeddings_layernorm"
        )

    def layer(self, x: Tensor, number: int, attend: Attend) -> Tensor:
        name = f"transformer.h.{number}"
        y = self.norm(x, f"{name}.input_layernorm")
        per_head = self.linear(y, f"{name}.self_attention.query_key_value").unflatten(
            -1, (-1, 3, self.head_dim)
        )
        x = x + self.linear(
            attend(*(per_head[:, :, part].flatten(1) for part in range(3))), f"{name}.self_attention.dense"
        )
        y = self.norm(x, f"{name}.post_attention_layernorm")
        inner = gelu(self.linear(y, f"{name}.mlp.dense_h_to_4h"), approximate=self.approximate)
        return x + self.linear(inner, f"{name}.mlp.dense_4h_to_h")

    def head(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x, "transformer.ln_f"), "transformer.word_embeddings")


class ReferenceMpt(Reference):
    def set_up(self) -> None:
        c = self.config
        self.layers, self.head_dim = c["n_layers"], c["d_model"] // c["n_heads"]
        self.slopes = alibi_slopes(c["n_heads"])

    def embed(self, ids: Tensor) -> Tensor:
        return self.weights["transformer.wte.weight"][ids]

    def layer(self, x: Tensor, number: int, attend: Attend) -> Tensor:
        name = f"transformer.blocks.{number}"
        qkv = self.linear(self.norm(x, f"{name}.norm_1"), f"{name}.attn.Wqkv")
        x = x + self.linear(attend(*qkv.chunk(3, -1)), f"{name}.attn.out_proj")
        inner = gelu(self.linear(self.norm(x, f"{name}.norm_2"), f"{name}.ffn.up_proj"))
        return x + self.linear(inner, f"{name}.ffn.down_proj")

    def head(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x, "transformer.norm_f"), "transformer.wte")
