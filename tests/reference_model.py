"""A dense float64 Llama for tests: every layer attends by `attention.reference`, literally."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from vllm_longctx.attention.reference import attention
from vllm_longctx.geometry import Geometry, branches
from vllm_longctx.rotary import Rotary, inverse_frequencies

PLAIN = Geometry()


class ReferenceLlama:
    def __init__(self, path: str | Path):
        path = Path(path)
        self.config = json.loads((path / "config.json").read_text())
        self.weights = {k: v.double() for k, v in load_file(path / "model.safetensors").items()}
        heads = self.config["num_attention_heads"]
        self.head_dim = self.config.get("head_dim") or self.config["hidden_size"] // heads
        theta = self.config.get("rope_theta", 10000.0)
        parameters = self.config.get("rope_parameters") or {"rope_type": "default", "rope_theta": theta}
        frequencies = inverse_frequencies(self.head_dim, parameters)
        self.rotary = Rotary(self.head_dim, self.head_dim, neox=True, inverse_frequencies=frequencies)

    def logprobs(self, ids: list[int], geometry: Geometry = PLAIN) -> Tensor:
        """float64 [tokens, vocab]: log-probabilities of the token after each position."""
        w, eps = self.weights, self.config["rms_norm_eps"]
        positions = torch.arange(len(ids))
        visible = branches(geometry, positions, positions)

        def norm(x: Tensor, name: str) -> Tensor:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w[name]

        x = w["model.embed_tokens.weight"][torch.tensor(ids)]
        for number in range(self.config["num_hidden_layers"]):
            layer = f"model.layers.{number}."
            y = norm(x, layer + "input_layernorm.weight")
            q, k, v = ((y @ w[f"{layer}self_attn.{p}_proj.weight"].T).unflatten(-1, (-1, self.head_dim)) for p in "qkv")
            attended = attention(q, k, v, visible, self.head_dim**-0.5, self.rotary).flatten(1)
            x = x + attended @ w[layer + "self_attn.o_proj.weight"].T
            y = norm(x, layer + "post_attention_layernorm.weight")
            gate, up = (y @ w[f"{layer}mlp.{p}_proj.weight"].T for p in ("gate", "up"))
            x = x + (torch.nn.functional.silu(gate) * up) @ w[layer + "mlp.down_proj.weight"].T
        x = norm(x, "model.norm.weight")
        head = w["model.embed_tokens.weight" if self.config["tie_word_embeddings"] else "lm_head.weight"]
        return (x @ head.T).log_softmax(-1)

    def token_logprobs(self, ids: list[int], geometry: Geometry = PLAIN) -> Tensor:
        """float64 [tokens - 1]: log-probability of each token after the first."""
        return self.logprobs(ids, geometry)[:-1].gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
