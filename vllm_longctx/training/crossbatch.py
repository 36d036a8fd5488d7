"""Llama with memory layers, in plain torch: CrossBatch's differentiable forward, and reading a text window by
window.

CrossBatch (Focused Transformer, arXiv 2307.03170, section 3.2): a query of a memory layer sees, in one
softmax, its own context up to itself, the previous context of its document and those of d - 1 other documents
of the batch. The others are negatives: keys learn to be told apart, which is what a memory of many documents
needs. Gradients flow through all of them.

Distances as in `geometry.memory_branch`: what is in the memory looks as if it stood at the first place of the
    query's window.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

from vllm_longctx.geometry import SteppedWindows

# A memory layer's number, keys (as at place 0) and values [windows, kv_heads, tokens, head_dim] of the
# windows computed -> keys and values [windows with memory, kv_heads, memory, head_dim] that the last of these
# windows find in the memory.
Memory = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


class MemoryModel:
    """A Llama whose `mem_layers` also attend to a memory.

    The model is changed in place; its weights keep their names.

    mem_positionals: False for memory layers without any rotation. Raises ValueError for layers that the model
        does not have.
    """

    def __init__(self, model: LlamaForCausalLM, mem_layers: Sequence[int], mem_positionals: bool = True):
        layers = model.config.num_hidden_layers
        if (
            not mem_layers
            or len(set(mem_layers)) < len(mem_layers)
            or not all(0 <= n < layers for n in mem_layers)
        ):
            raise ValueError(f"mem_layers = {list(mem_layers)}: give different layers from 0 to {layers - 1}")
        self.model, self.mem_layers, self.mem_positionals = model, sorted(mem_layers), mem_positionals
        self._memory: Memory | None = None
        for number in self.mem_layers:
            attention = model.model.layers[number].self_attn
            attention.forward = lambda *args, attention=attention, **kwargs: (
                self._attend(attention, *args, **kwargs),
                None,
            )

    def crossbatch(self, ids: Tensor, documents: int) -> Tensor:
        """Logits [rows, contexts, tokens, vocab] of ids [rows, contexts, tokens]: consecutive contexts of a
        document per row.

        documents: the paper's d, how many previous contexts a context finds in memory: its own and those of
        the rows before it, the first row coming after the last. The first context of a row has no memory.
        """
        rows, contexts, _ = ids.shape
        if not 1 <= documents <= rows:
            raise ValueError(f"d = {documents}: give 1 to {rows}, the documents of a batch")
        seen = (torch.arange(rows)[:, None] - torch.arange(documents)) % rows

        def memory(_: int, *keys_and_values: Tensor) -> tuple[Tensor, Tensor]:
            previous = (x.unflatten(0, (contexts, rows))[:-1, seen] for x in keys_and_values)
            key, value = (x.transpose(2, 3).flatten(3, 4).flatten(0, 1) for x in previous)
            return key, value

        windows = ids.transpose(0, 1).flatten(0, 1)  # first contexts, which have no memory, first
        return (
            self.model.lm_head(self._forward(windows, memory)).unflatten(0, (contexts, rows)).transpose(0, 1)
        )

    @torch.no_grad()
    def read(
        self, ids: Tensor, windows: SteppedWindows, prompt_length: int | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Reads texts of one length, ids [rows, tokens], as the engine does: a window sees all before it in
        its memory layers.

        Yields each window's start and its last hidden states [rows, window, hidden], what `model.lm_head`
        takes. prompt_length: where a window may begin depends on it; None for all tokens.
        """
        length = ids.shape[1]
        prompt_length = length if prompt_length is None else prompt_length
        kept: dict[int, tuple[Tensor, Tensor]] = {}

        def memory(layer: int, *keys_and_values: Tensor) -> tuple[Tensor, Tensor]:
            if layer not in kept:
                key, value = (x.new_empty(*x.shape[:2], length, x.shape[3]) for x in keys_and_values)
                kept[layer] = key, value
            for all_of_it, new in zip(kept[layer], keys_and_values, strict=True):
                all_of_it[:, :, start:end] = new
            key, value = (x[:, :, :start] for x in kept[layer])
            return key, value

        start = 0
        while start < length:
            end = min(windows.end(start, prompt_length), length)
            yield start, self._forward(ids[:, start:end], memory)
            start = end

    def _forward(self, windows: Tensor, memory: Memory) -> Tensor:
        """windows: ids [windows, tokens]. Returns [windows, tokens, hidden]."""
        self._memory = memory
        try:
            return self.model.model(input_ids=windows, use_cache=False).last_hidden_state
        finally:
            self._memory = None

    def _attend(
        self,
        attention: LlamaAttention,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        **_: object,
    ) -> Tensor:
        """Takes the place of `LlamaAttention.forward`, and its arguments.

        hidden_states [windows, tokens, hidden].
        """
        assert self._memory is not None and attention.layer_idx is not None
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        query, key, value = (
            p(hidden_states).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for p in projections
        )
        first = key
        if self.mem_positionals:
            cos, sin = position_embeddings
            first = key * cos[:, :1, None, :]  # at place 0 rotation only scales: YaRN's factor, or 1
            query, key = apply_rotary_pos_emb(query, key, cos, sin)
        memory_key, memory_value = self._memory(attention.layer_idx, first, value)
        without = len(query) if memory_key.shape[2] == 0 else len(query) - len(memory_key)
        attend = partial(scaled_dot_product_attention, scale=attention.scaling, enable_gqa=True)
        parts = []
        if without:
            parts.append(attend(query[:without], key[:without], value[:without], is_causal=True))
        if without < len(query):
            causal = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).tril()
            visible = torch.cat([causal.new_ones(len(causal), memory_key.shape[2]), causal], 1)
            keys, values = (
                torch.cat([m, x[without:]], 2) for m, x in ((memory_key, key), (memory_value, value))
            )
            parts.append(attend(query[without:], keys, values, attn_mask=visible))
        return attention.o_proj(torch.cat(parts).transpose(1, 2).flatten(2))


def scheduled(step: int, steps: int, schedule: Sequence[int]) -> int:
    """The value in a step of training, from 0: each of `schedule` for an equal share of the steps."""
    return schedule[step * len(schedule) // steps]
