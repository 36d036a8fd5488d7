"""A dense float64 decoder for tests: every layer attends by `reference.attention`, literally.

`hf_oracle` has one for every family; this one is Llama's, and says of each layer what it computes.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import silu

from vllm_longctx.geometry import (
    Branch,
    Geometry,
    SteppedWindows,
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


def in_whole_turns(geometry: Geometry, turns: tuple[int, ...]) -> Layers:
    """A window begins where the first turn does that it holds whole."""

    def start(query: int) -> int:
        lowest = 0 if geometry.n_local is None else max(query - geometry.n_local + 1, 0)
        return next((turn for turn in turns if 0 < lowest <= turn <= query), lowest)

    def seen(_: int, positions: Tensor) -> tuple[list[Branch], bool]:
        starts = torch.tensor([start(query) for query in positions.tolist()])
        return branches(geometry, positions, positions, starts), True

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


class ReferenceLlama:
    """A checkpoint directory of Hugging Face's: Llama, Mistral, Qwen2 (biases) or Qwen3 (norms of heads)."""

    def __init__(self, path: str | Path):
        path = Path(path)
        self.config = c = json.loads((path / "config.json").read_text())
        self.weights = {k: v.double() for k, v in load_file(path / "model.safetensors").items()}
        self.layers = c["num_hidden_layers"]
        self.head_dim = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
        parameters = c.get("rope_parameters") or {
            "rope_type": "default",
            "rope_theta": c.get("rope_theta", 10000.0),
        }
        frequencies = inverse_frequencies(self.head_dim, parameters, c["max_position_embeddings"])
        self.rotary = Rotary(self.head_dim, self.head_dim, True, frequencies, attention_factor(parameters))

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
            pieces.append(attention(q[rows], k[keys], v[keys], of_piece, scale, rotary, margins=self.margins))
        return torch.cat(pieces).flatten(1)

    def linear(self, x: Tensor, name: str) -> Tensor:
        y = x @ self.weights[f"{name}.weight"].T
        return y + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else y

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
