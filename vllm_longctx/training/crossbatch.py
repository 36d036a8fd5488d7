"""A decoder of transformers' with memory layers: the forwards of both training objectives, and reading a text
window by window.

CrossBatch (Focused Transformer, arXiv 2307.03170, section 3.2): a query of a memory layer sees, in one
softmax, its own context up to itself, the previous context of its document and those of d - 1 other documents
of the batch. The others are negatives: keys learn to be told apart, which is what a memory of many documents
needs. Gradients flow through all of them.

The Memorizing Transformer's objective (arXiv 2203.08913, section 3): contexts of a document one after the
other, as a text is read. A query of a memory layer sees all of its document before its context. No gradient
flows into these keys and values. Attention is the Focused Transformer's, one softmax without a gate.

Distances as in `geometry.memory_branch`: what is in the memory looks as if it stood at the first place of the
    query's window.

The model computes everything but attention. Its attention layers call the function that is registered here,
with queries and keys as they rotated them. What a layer's rotation is, is found by running the model.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vllm_longctx.geometry import SteppedWindows
from vllm_longctx.rotary import (
    Rotary,
    alike,
    attention_factor,
    inverse_frequencies,
    no_turn,
    rotation_between,
)

OURS = "longctx_memory"
PROBED = 16  # tokens with which a layer's rotation is found
TOLERANCE = 1e-4  # of float32 keys, as a share of the largest element

# A memory layer's number, keys (as at place 0) and values [windows, kv_heads, tokens, head_dim] of the
# windows computed -> keys and values [windows with memory, kv_heads, memory, head_dim] that the last of these
# windows find in the memory. A layer that is computed again in the backward pass asks again, and is to find
# the same.
Memory = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


class MemoryModel:
    """A decoder whose `mem_layers` also attend to a memory.

    The model is changed in place; its weights keep their names.

    mem_positionals: False for memory layers without any rotation. Raises ValueError for layers that the model
        does not have, and for those whose positions or attention cannot have a memory.
    """

    def __init__(self, model: PreTrainedModel, mem_layers: Sequence[int], mem_positionals: bool = True):
        self.config = model.config.get_text_config()
        layers = self.config.num_hidden_layers
        if (
            not mem_layers
            or len(set(mem_layers)) < len(mem_layers)
            or not all(0 <= n < layers for n in mem_layers)
        ):
            raise ValueError(f"mem_layers = {list(mem_layers)}: give different layers from 0 to {layers - 1}")
        self.model, self.mem_layers, self.mem_positionals = model, sorted(mem_layers), mem_positionals
        self.attend: Callable[..., Tensor] = attend
        self._memory: Memory | None = None  # of the last forward, in whose backward pass it may be asked
        self._is_text: Tensor | None = None  # as `_forward`'s
        self._longest = sys.maxsize  # tokens of a text up to which its length does not change the rotation
        for module in model.modules():
            if hasattr(module, "layer_idx"):
                module.memory_model = self  # type: ignore[assignment]  # no module: not among its children
        model.set_attn_implementation(OURS)
        self._rotations = self._found_rotations()
        self.attend = self._attend

    def check_length(self, tokens: int) -> None:
        """Raises ValueError for windows that are rotated by other frequencies than short ones."""
        if tokens > self._longest:
            raise ValueError(
                f"contexts of {tokens:,} tokens, but past {self._longest:,} tokens the model's RoPE has "
                "other frequencies, which a memory cannot mix; give fewer"
            )

    def crossbatch(self, ids: Tensor, documents: int, lengths: Tensor | None = None) -> Tensor:
        """Logits [rows, contexts, tokens, vocab] of ids [rows, contexts, tokens]: consecutive contexts of a
        document per row.

        documents: the paper's d, how many previous contexts a context finds in memory: its own and those of
        the rows before it, the first row coming after the last. The first context of a row has no memory.
        lengths: int64 [rows], the tokens of each row's document. What follows is padding, which no query of
        a document sees. None for rows that are full.
        """
        rows, contexts, tokens = ids.shape
        if not 1 <= documents <= rows:
            raise ValueError(f"d = {documents}: give 1 to {rows}, the documents of a batch")
        seen = (torch.arange(rows)[:, None] - torch.arange(documents)) % rows

        def memory(_: int, *keys_and_values: Tensor) -> tuple[Tensor, Tensor]:
            previous = (x.unflatten(0, (contexts, rows))[:-1, seen] for x in keys_and_values)
            key, value = (x.transpose(2, 3).flatten(3, 4).flatten(0, 1) for x in previous)
            return key, value

        is_text = None
        if lengths is not None:
            left = lengths[seen] - torch.arange(contexts - 1)[:, None, None] * tokens
            is_text = (torch.arange(tokens) < left[..., None]).flatten(2).flatten(0, 1)
        windows = ids.transpose(0, 1).flatten(0, 1)  # first contexts, which have no memory, first
        return self._forward(windows, memory, is_text).unflatten(0, (contexts, rows)).transpose(0, 1)

    def memorizing(self, ids: Tensor) -> Iterator[Tensor]:
        """Logits [rows, 1, tokens, vocab] of one context after the other of ids [rows, contexts, tokens],
        consecutive ones of a document per row.

        A context is to be back-propagated before the next is asked for. Padding may stand at the end of a
        row, where only padding sees it.

        The official code keeps a document's memory from step to step, of keys that older weights have
        computed. Here a step reads all of it, so that there is no state but the weights.
        """
        tokens = ids.shape[2]
        for _, logits in self._read(ids.flatten(1), SteppedWindows(tokens, tokens)):
            yield logits[:, None]

    @torch.no_grad()
    def read(
        self, ids: Tensor, windows: SteppedWindows, prompt_length: int | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Reads texts of one length, ids [rows, tokens], as the engine does: a window sees all before it in
        its memory layers.

        Yields each window's start and its logits [rows, window, vocab]. prompt_length: where a window may
        begin depends on it; None for all tokens.
        """
        yield from self._read(ids, windows, prompt_length)

    def _read(
        self, ids: Tensor, windows: SteppedWindows, prompt_length: int | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """As `read`, with gradients inside of each window."""
        length = ids.shape[1]
        prompt_length = length if prompt_length is None else prompt_length
        kept: dict[int, tuple[Tensor, Tensor]] = {}

        def memory(layer: int, *keys_and_values: Tensor) -> tuple[Tensor, Tensor]:
            if layer not in kept:
                key, value = (x.new_empty(*x.shape[:2], length, x.shape[3]) for x in keys_and_values)
                kept[layer] = key, value
            for all_of_it, new in zip(kept[layer], keys_and_values, strict=True):
                all_of_it[:, :, start:end] = new.detach()
            key, value = (x[:, :, :start] for x in kept[layer])
            return key, value

        start = 0
        while start < length:
            end = min(windows.end(start, prompt_length), length)
            yield start, self._forward(ids[:, start:end], memory)
            start = end

    def _forward(self, windows: Tensor, memory: Memory, is_text: Tensor | None = None) -> Tensor:
        """windows: ids [windows, tokens]. Returns logits [windows, tokens, vocab].

        is_text: bool [windows with memory, memory], which keys of the memory are no padding; None for all.
        """
        self.check_length(windows.shape[1])
        self._memory, self._is_text = memory, is_text
        logits: Tensor = self.model(input_ids=windows, use_cache=False).logits
        return logits

    def _attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **own: Any
    ) -> Tensor:
        """`attend`, in memory layers also to the memory. query, key and value [windows, heads, tokens,
        head_dim]: rotated as in a text of the window alone.
        """
        layer = module.layer_idx
        if layer not in self.mem_layers:
            return attend(module, query, key, value, mask, **own)
        if mask is not None:
            raise ValueError(f"layer {layer} sees less than all of a context: it cannot have a memory")
        assert self._memory is not None
        rotary = self._rotations[layer]
        cos, sin = rotary.cos_sin(-torch.arange(query.shape[2]))
        if self.mem_positionals:
            first = rotary.rotate(key, cos, sin)
        else:
            cos, sin = cos / rotary.factor, sin / rotary.factor
            query, key = (rotary.rotate(x, cos, sin) for x in (query, key))
            first = key
        memory_key, memory_value = self._memory(layer, first, value)
        without = len(query) if memory_key.shape[2] == 0 else len(query) - len(memory_key)
        parts = []
        if without:
            parts.append(attend(module, query[:without], key[:without], value[:without], None, **own))
        if without < len(query):
            keys, values = (
                torch.cat([m, x[without:]], 2) for m, x in ((memory_key, key), (memory_value, value))
            )
            visible = self._visible(query.shape[2], memory_key.shape[2])
            parts.append(attend(module, query[without:], keys, values, visible, **own))
        return torch.cat(parts)

    def _visible(self, tokens: int, memory: int) -> Tensor:
        """Of the memory's keys and the window's: bool [windows with memory or 1, 1, tokens, keys]."""
        causal, is_text = _causal(tokens), self._is_text
        if is_text is None:
            is_text = causal.new_ones(1, memory)
        seen = is_text[:, None].expand(-1, tokens, -1), causal.expand(len(is_text), -1, -1)
        return torch.cat(seen, 2)[:, None]

    def _found_rotations(self) -> dict[int, Rotary]:
        """Of each memory layer, from what it gives to attention at two places of a text."""
        parameters = getattr(self.config, "rope_parameters", None)
        if not parameters:
            raise ValueError(
                f"model_type {self.config.model_type!r} has no RoPE (rope_parameters): a memory needs it"
            )
        parameters = parameters.get("full_attention", parameters)
        scaling, longest = parameters.get("rope_type"), self.config.max_position_embeddings
        if scaling == "longrope":
            self._longest = parameters["original_max_position_embeddings"]
        elif scaling == "dynamic":
            self._longest = longest
        step = max(min(self._longest, longest, 1000) - PROBED, 2) // 2
        here, there = self._probed([0, step])
        rotations = {}
        for layer in self.mem_layers:
            if layer not in here:
                raise ValueError(
                    f"layer {layer} does not call transformers' AttentionInterface: it cannot have a memory"
                )
            query, key, value = here[layer]
            head_size = key.shape[-1]
            share = 1.0 if scaling == "proportional" else parameters.get("partial_rotary_factor", 1.0)
            rotated = int(head_size * share)
            frequencies = inverse_frequencies(rotated, parameters, longest)
            factor = attention_factor(parameters, longest)
            pairs = (Rotary(head_size, rotated, halves, frequencies, factor) for halves in (True, False))
            candidates = (no_turn(head_size), *pairs)
            query_there, key_there, value_there = there[layer]
            queries_and_keys = (query, key), (query_there, key_there)
            found = rotation_between(*queries_and_keys, step, candidates, TOLERANCE)
            if found is None or not alike(value, value_there, TOLERANCE):
                raise ValueError(
                    f"layer {layer}: its queries, keys and values do not depend on positions by a rotation "
                    f"that longctx knows (rope_parameters = {parameters}): it cannot have a memory"
                )
            rotations[layer] = found
        return rotations

    @torch.no_grad()
    def _probed(self, starts: Sequence[int]) -> list[dict[int, tuple[Tensor, ...]]]:
        """Queries, keys and values that each layer gives to attention, of a text at each of `starts`.

        Attention returns the same at all. So what layers read is the same, bit by bit, and all that can
        differ is what depends on positions.
        """
        outputs: dict[int, Tensor] = {}
        found: dict[int, tuple[Tensor, ...]] = {}

        def taken(module: Any, *query_key_value_mask: Any, **own: Any) -> Tensor:
            layer = module.layer_idx
            found[layer] = query_key_value_mask[:3]
            if layer in self.mem_layers and (window := own.get("sliding_window")):
                raise ValueError(
                    f"layer {layer} has a window of its own, of {window} tokens: give mem_layers that see all"
                )
            if layer not in outputs:
                outputs[layer] = attend(module, *query_key_value_mask, **own)
            return outputs[layer]

        self.attend = taken
        ids, all_found = torch.arange(PROBED) % self.config.vocab_size, []
        for start in starts:
            found.clear()
            self.model(
                input_ids=ids[None], position_ids=(start + torch.arange(PROBED))[None], use_cache=False
            )
            all_found.append(dict(found))
        return all_found


def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **own: Any) -> Tensor:
    """transformers' own attention. query [windows, heads, tokens, head_dim], key and value likewise.

    mask: bool, broadcastable to [windows, heads, tokens, keys]; None for causal attention. own: what the
    layer says. Returns [windows, tokens, heads, head_dim].
    """
    if own.get("softcap") is None and own.get("s_aux") is None:
        return sdpa_attention_forward(module, query, key, value, mask, **own)[0]
    # SDPA has no soft caps and no sinks; the model's own function does.
    mask = _causal(query.shape[2]) if mask is None else mask
    bias = torch.zeros(mask.shape, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    eager = sys.modules[type(module).__module__].eager_attention_forward
    output: Tensor = eager(module, query, key, value, bias, **own)[0]
    return output


def _causal(tokens: int) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


def _interface(module: Any, *args: Any, **own: Any) -> tuple[Tensor, None]:
    return module.memory_model.attend(module, *args, **own), None


AttentionInterface.register(OURS, _interface)
AttentionMaskInterface.register(OURS, sdpa_mask)


def scheduled(step: int, steps: int, schedule: Sequence[int]) -> int:
    """The value in a step of training, from 0: each of `schedule` for an equal share of the steps."""
    return schedule[step * len(schedule) // steps]
