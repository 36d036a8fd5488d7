"""An independent replay of Temp-LoRA (arXiv 2401.11504), one greedy request at a time.

It uses Hugging Face transformers, peft and torch, and nothing of vllm_longctx.

Two copies of the model stand side by side: one learns, the other reads and writes with the version of the
adapter that each position is due. A pass is one KV cache, filled in the order of the text and never touched
again, so an entry keeps what the version that computed it wrote. Everything in float32, the dense attention
of `keep` in float64, dropout 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache

Adapter = dict[str, Tensor]  # every lora_A and lora_B by its parameter's name


@dataclass(frozen=True)
class Lambda:
    """Λ attention: the last `n_local` keys and the first `n_global`, no distance above the ceiling.

    top_k: Layers from `top_k_from_layer` on also see so many of the keys between, from the last token of the
    prompt on, at distance `top_k_insert_at`; in float64 no two of them are equally good.
    """

    n_global: int
    n_local: int
    distance_ceiling: int | None = None
    distances: Literal["relative", "in_cache"] = "relative"
    top_k: int | None = None
    top_k_from_layer: int = 0
    top_k_insert_at: int = 0


@dataclass(frozen=True)
class Focused:
    """Windows of `n_local` tokens, the last of a prompt `last_context_length` before its end.

    Memory layers also see all keys before, or the best `top_k`, as if first in the window.
    """

    n_local: int
    last_context_length: int
    mem_layers: tuple[int, ...]
    top_k: int | None = None

    def start(self, position: int, prompt: int) -> int:
        last = max(prompt - self.last_context_length, 0)
        if position < last:
            return position // self.n_local * self.n_local
        return last + (position - last) // self.n_local * self.n_local


@dataclass(frozen=True)
class Options:
    """The keys of `adaptation` and of requests, by the same names; lengths in tokens.

    window_tokens is of no use under `keep`, which needs `attention` instead. kv_block: new passes start at a
    multiple of it. start_from: a PEFT directory with the adapter of version 0. target_modules: peft's.
    """

    block_tokens: int
    context_tokens: int = 0
    window_tokens: int | None = None
    train_context_tokens: int = 64
    rank: int = 8
    alpha: int | None = None
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    adam_eps: float = 1e-7
    grad_clip: float | None = None
    warmup_blocks: int = 2
    epochs: int = 2
    adapter_seed: int = 0
    train_on_prompt: bool = True
    learn: Literal["all", "prompt"] = "all"
    kv_policy: Literal["reuse", "recompute", "keep"] = "reuse"
    update_mode: Literal["cascaded", "parallel"] = "cascaded"
    keep_first: int = 1
    kv_block: int = 32
    attention: Lambda | Focused | None = None
    start_from: Path | None = None
    target_modules: str | list[str] = "all-linear"


@dataclass(frozen=True)
class Replay:
    """What one request gives.

    tokens, logprobs, margins: of each generated token; margins are log-probabilities of the best token less
    the next best. prompt_logprobs: of each token of the prompt after the first, under the pass that first
    computed it. versions: of the adapter that first computed each position, the prompt's included; the last
    token is never computed. losses: of each block that was completed, one for each epoch.  passes: (position
    at which it began, its start s). adapter: the last version by module of the base model: (A [rank, in], B
    [out, rank] times alpha / rank).
    """

    tokens: list[int]
    logprobs: list[float]
    margins: list[float]
    prompt_logprobs: list[float]
    versions: list[int]
    losses: list[list[float]]
    passes: list[tuple[int, int]]
    adapter: dict[str, tuple[Tensor, Tensor]]


def replay(
    model_dir: str | Path,
    prompt_ids: Sequence[int],
    max_tokens: int,
    options: Options,
    forced_output: Sequence[int] | None = None,
) -> Replay:
    """Reads the prompt and writes `max_tokens` tokens, whatever they are: no token ends the text.

    With 0 it scores the prompt.

    forced_output: tokens to go on with instead of the likeliest ones.
    """
    text, prompt = list(prompt_ids), len(prompt_ids)
    learner = Learner(model_dir, options, text)
    reader = Reader(model_dir, options, prompt - 1)
    rows: list[float] = []  # of position p: the log-probability of token p + 1
    margins: list[float] = []
    versions: list[int] = []
    passes: list[tuple[int, int]] = []
    position, start, last = 0, 0, prompt + max_tokens - 1
    while position < last:
        block = learner.block_of(position)
        due = max(block - (1 if options.update_mode == "cascaded" else 2), 0)
        version = min(due, learner.last)
        reader.use(version, learner.version(version))
        kept = options.keep_first if start else 0
        full = options.kv_policy != "keep" and position - start + kept >= options.window_tokens
        block_begins = block >= 2 and position == learner.first_position(block) and due == version
        if position == 0 or full or (options.kv_policy == "recompute" and block_begins):
            start = max(0, (position - options.context_tokens) // options.kv_block * options.kv_block)
            kept = options.keep_first if start else 0
            passes.append((position, start))
            reader.new_pass(text[:kept] + text[start:position])
        end = min(len(text), last, learner.first_position(block + 1))
        if options.kv_policy != "keep":
            end = min(end, start + options.window_tokens - kept)
        logprobs = reader.read(text[position:end])
        versions += [version] * (end - position)
        if end == len(text):  # the last row says how the text goes on
            best = logprobs[-1].topk(2)
            margins.append((best.values[0] - best.values[1]).item())
            text.append(int(best.indices[0]) if forced_output is None else forced_output[len(text) - prompt])
        rows += logprobs.gather(1, torch.tensor(text[position + 1 : end + 1])[:, None])[:, 0].tolist()
        position = end
    while learner.trained < learner.completed:
        learner.train_next()
    return Replay(
        text[prompt:],
        rows[prompt - 1 :],
        margins,
        rows[: prompt - 1],
        versions,
        learner.losses,
        passes,
        learner.adapter(),
    )


class Learner:
    """Trains the blocks of `text`, which grows under its eyes, one after another."""

    last = 1 << 30  # version

    def __init__(self, model_dir: str | Path, options: Options, text: list[int]):
        self.options, self.text = options, text
        self.origin = 0 if options.train_on_prompt else len(text) - 1
        if options.learn == "prompt":
            self.last = (len(text) - 1) // options.block_tokens
        self.model = with_adapter(model_dir, options)
        self.weights = adapter_parameters(self.model)
        self.optimizer = torch.optim.AdamW(
            self.weights.values(),
            lr=options.learning_rate,
            betas=(0.9, 0.999),
            eps=options.adam_eps,
            weight_decay=options.weight_decay,
        )
        self.losses: list[list[float]] = []
        self.versions = {0: self.snapshot()}

    @property
    def trained(self) -> int:
        """Blocks trained so far: the newest version."""
        return len(self.losses)

    @property
    def completed(self) -> int:
        """Blocks all of whose targets are there."""
        return min(max(0, len(self.text) - 1 - self.origin) // self.options.block_tokens, self.last)

    def block_of(self, position: int) -> int:
        """Blocks count from 1; 0 for what stands before the first."""
        return max(0, (position - self.origin) // self.options.block_tokens + 1)

    def first_position(self, block: int) -> int:
        return self.origin + (block - 1) * self.options.block_tokens

    def snapshot(self) -> Adapter:
        return {name: p.detach().clone() for name, p in self.weights.items()}

    def version(self, number: int) -> Adapter:
        """The adapter after so many blocks; older ones are forgotten."""
        while self.trained < number:
            self.train_next()
        for old in [v for v in self.versions if v < number]:
            del self.versions[old]
        return self.versions[number]

    def train_next(self) -> None:
        options, text, block = self.options, self.text, self.trained + 1
        target = self.first_position(block) + 1
        end = target + options.block_tokens
        assert end <= len(text)
        begin = max(0, target - options.train_context_tokens)
        example = text[begin:end]
        if begin > 0 and text[0] == self.model.config.bos_token_id:
            example = [text[0], *example]
        targets = torch.tensor(text[target:end])
        warmth = min(1.0, (block - 1) / options.warmup_blocks) if options.warmup_blocks else 1.0
        self.optimizer.param_groups[0]["lr"] = options.learning_rate * warmth
        losses = []
        for _ in range(options.epochs):
            logits = self.model(input_ids=torch.tensor([example])).logits[0]
            loss = cross_entropy(logits[-len(targets) - 1 : -1], targets)
            self.optimizer.zero_grad()
            loss.backward()
            if options.grad_clip is not None:
                torch.nn.utils.clip_grad_norm_(self.weights.values(), options.grad_clip)
            self.optimizer.step()
            losses.append(loss.item())
        self.losses.append(losses)
        self.versions[block] = self.snapshot()

    def adapter(self) -> dict[str, tuple[Tensor, Tensor]]:
        scaling = (self.options.alpha or self.options.rank) / self.options.rank
        modules = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in self.weights}
        find = {name: p.detach() for name, p in self.weights.items()}
        path = "base_model.model.{}.lora_{}.default.weight".format
        return {
            module: (find[path(module, "A")], find[path(module, "B")] * scaling) for module in sorted(modules)
        }


class Reader:
    """Computes the text under any version of the adapter.

    One KV cache is one pass; distances count from its own start.
    """

    def __init__(self, model_dir: str | Path, options: Options, first_lookup: int = 0):
        assert (options.kv_policy == "keep") == (options.attention is not None)
        self.rotates_itself = options.attention is not None
        self.model = with_adapter(model_dir, options, options.attention, first_lookup)
        self.number: int | None = None

    def use(self, number: int, adapter: Adapter) -> None:
        if number != self.number:
            self.number = number
            for name, p in adapter_parameters(self.model).items():
                p.data.copy_(adapter[name])

    def new_pass(self, tokens: list[int]) -> None:
        self.cache = DynamicCache(config=self.model.config)
        if tokens:
            self.read(tokens)

    @torch.no_grad()
    def read(self, tokens: list[int]) -> Tensor:
        """float64 [tokens, vocab]: log-probabilities of what comes after each."""
        # At position 0 RoPE turns nothing: `dense_lambda_attention` does it by distance.
        positions = torch.zeros(1, len(tokens), dtype=torch.int64) if self.rotates_itself else None
        output = self.model(
            input_ids=torch.tensor([tokens]),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.logits[0].double().log_softmax(-1)


def with_adapter(
    model_dir: str | Path, options: Options, attention: Lambda | Focused | None = None, first_lookup: int = 0
) -> PeftModel:
    """The model in float32 with an adapter, as `adapter_seed` begins it."""
    implementation = "sdpa"
    if attention is not None:
        implementation = "dense_lambda"
        dense = dense_lambda_attention if isinstance(attention, Lambda) else dense_focused_attention
        AttentionInterface.register(implementation, dense(attention, first_lookup))
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation=implementation
    )
    if attention is not None:
        for layer in model.model.layers:
            layer.self_attn.inv_freq = model.model.rotary_emb.inv_freq.double()
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha or options.rank,
        lora_dropout=0.0,
        target_modules=options.target_modules,
        task_type="CAUSAL_LM",
    )
    if options.start_from is not None:
        return PeftModel.from_pretrained(model, options.start_from, is_trainable=True)
    with torch.random.fork_rng():
        torch.manual_seed(options.adapter_seed)
        return get_peft_model(model, config)


def adapter_parameters(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if ".lora_" in name}


Row = tuple[
    Tensor, Tensor
]  # of one query: scores [heads, S], not scaled yet, and values [heads, S, head_dim]


def query_by_query(row_of: Callable[..., Row]) -> Callable[..., tuple[Tensor, None]]:
    """Attention of transformers, with one softmax for each query; in float64.

    The cache holds every key of the text, none of them rotated.

    row_of: Of a module, a query [heads, head_dim], its position, and all keys and values [heads, S,
        head_dim].
    """

    def attend(module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_):
        # query [1, heads, T, head_dim]; key and value [1, kv_heads, S, head_dim], of which the last T are the
        # queries' own.
        query, key, value = (x[0].double() for x in (query, key, value))
        groups = len(query) // len(key)
        key, value = (x.repeat_interleave(groups, 0) for x in (key, value))
        past = key.shape[1] - query.shape[1]
        outputs = []
        for row in range(query.shape[1]):
            scores, values = row_of(module, query[:, row], past + row, key, value)
            outputs.append(torch.einsum("hs,hsd->hd", (scores * scaling).softmax(-1), values))
        return torch.stack(outputs)[None].float(), None

    return attend


def with_best(row: Row, others: Row, count: int) -> Row:
    """A row, and of other keys those with the highest scores, by head."""
    (scores, values), (other_scores, other_values) = row, others
    best = other_scores.topk(count, -1)
    chosen = best.indices[..., None].expand(-1, -1, values.shape[-1])
    return torch.cat((scores, best.values), -1), torch.cat((values, other_values.gather(1, chosen)), 1)


def dense_lambda_attention(shape: Lambda, first_lookup: int) -> Callable[..., tuple[Tensor, None]]:
    """Which keys each query sees, and how far each is."""

    def looks_up(layer: int, position: int) -> bool:
        return shape.top_k is not None and layer >= shape.top_k_from_layer and position >= first_lookup

    def row_of(module, query: Tensor, i: int, key: Tensor, value: Tensor) -> Row:
        window = max(0, i - shape.n_local + 1)
        first = torch.arange(min(shape.n_global, window))
        if shape.distances == "in_cache":
            distance = i - first - max(0, window - shape.n_global)
        else:
            distance = (i - first).clamp_max(shape.distance_ceiling or i)
        local = torch.arange(window, i + 1)
        seen, distance = torch.cat((first, local)), torch.cat((distance, i - local))
        row = scored(query, key[:, seen], distance, module), value[:, seen]
        if not looks_up(module.layer_idx, i) or window < shape.n_global + shape.top_k:
            return row
        middle = slice(shape.n_global, window)
        at = torch.full((window - shape.n_global,), shape.top_k_insert_at)
        return with_best(row, (scored(query, key[:, middle], at, module), value[:, middle]), shape.top_k)

    return query_by_query(row_of)


def dense_focused_attention(shape: Focused, last_of_prompt: int) -> Callable[..., tuple[Tensor, None]]:
    """As `dense_lambda_attention`."""

    def row_of(module, query: Tensor, i: int, key: Tensor, value: Tensor) -> Row:
        start = shape.start(i, last_of_prompt + 1)
        local, distance = slice(start, i + 1), i - torch.arange(start, i + 1)
        row = scored(query, key[:, local], distance, module), value[:, local]
        if module.layer_idx not in shape.mem_layers or not start:
            return row
        before = scored(query, key[:, :start], torch.full((start,), i - start), module), value[:, :start]
        return with_best(row, before, min(shape.top_k or start, start))

    return query_by_query(row_of)


def scored(query: Tensor, key: Tensor, distance: Tensor, module) -> Tensor:
    """query [heads, head_dim], key [heads, S, head_dim], distance [S]: [heads, S]."""
    angles = torch.outer(distance.double(), module.inv_freq)
    (q1, q2), (k1, k2) = query[:, None].chunk(2, -1), key.chunk(2, -1)
    # q turned by the angle of the distance, times k, pair by pair
    dot = angles.cos() * (q1 * k1 + q2 * k2) + angles.sin() * (q1 * k2 - q2 * k1)
    return dot.sum(-1)
