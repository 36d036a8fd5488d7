"""What a user may ask for, and every check of it. Names: docs/configuration.md.

A configuration is a plain dict under `additional_config["longctx"]`, so that it reaches every process and
enters vLLM's compile-cache hash. `LongContextConfig.parse` checks it by itself; `for_model` fills in lengths
from the model's trained length and checks them against it. What is then in force, without anything left open,
is `settings.Settings`.
"""

import difflib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_longctx.geometry import Distances
from vllm_longctx.modes import Mode, mode_of

KEY = "longctx"
KVPolicy = Literal["reuse", "recompute", "keep"]
UpdateMode = Literal["cascaded", "parallel"]
Learn = Literal["all", "prompt", "output", "none"]
ADAPTER_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"  # a directory's name, never a path
OWNED_NAME = f"(@{ADAPTER_NAME}/)?{ADAPTER_NAME}"  # of a tenant, or of nobody

PRESETS: dict[str, dict[str, Any]] = {
    "lm-infinite": {"attention": {"method": "lm_infinite"}},
    "streaming": {"attention": {"method": "streaming"}},
    "temp-lora-economic": {"attention": {"method": "none"}, "adaptation": {"method": "temp_lora"}},
    "temp-lora-quality": {"attention": {"method": "none"}, "adaptation": {"method": "temp_lora"}},
}


class DefaultSizes(NamedTuple):
    """Temp-LoRA's sizes where the user gives none, in tokens.

    window, block: At most; the paper's (arXiv 2401.11504, section 4), whatever more a model was trained on.
    blocks_per_window: So many fill a window that is smaller.
    """

    window: int
    block: int
    blocks_per_window: int


SIZES_OF_PRESET = {"temp-lora-economic": DefaultSizes(4096, 2048, 2)}
DEFAULT_SIZES = DefaultSizes(24576, 1024, 4)  # of the paper's setting for quality
DEFAULT_PRESET = "lm-infinite"
MAX_RANK = 512  # vLLM's largest `max_lora_rank`
SIZES = (
    "block_tokens",
    "context_tokens",
    "window_tokens",
    "train_context_tokens",
)  # of Temp-LoRA; None: from the window
DEFAULT_SLOTS = 8
DEFAULT_CACHE_DIR_GIB = 16.0
# Papers' choices: LM-Infinite section 4.1 (10 to 100 first tokens), StreamingLLM section 3.2 (4).
DEFAULT_N_GLOBAL = {"lm_infinite": 10, "streaming": 4}

DEFAULT_LOOKUP_SHARE = 0.1
DEFAULT_TOP_K_FROM_LAYER = 4  # LM-Infinite, appendix on reintroducing middle tokens: lower layers do without
# LongLLaMA's own (its configuration_longllama.py), where neither the checkpoint nor the user says anything.
LONGLLAMA_DEFAULTS: dict[str, Any] = {
    "mem_positionals": True,
    "mem_dtype": "bfloat16",
    "last_context_length": 1024,
}
FOCUSED_KEYS = (
    "mem_layers",
    "mem_positionals",
    "mem_dtype",
    "last_context_length",
    "lookup",
    "lookup_share",
    "memory_limit_gib",
)
OF_MEMORY = {*FOCUSED_KEYS, "top_k"} - {"mem_layers", "last_context_length"}
SLIDING_KEYS = (
    "n_global",
    "max_n_global",
    "distance_ceiling",
    "distances",
    "top_k_from_layer",
    "top_k_to_layer",
    "top_k_insert_at",
)

OF_ATTENTION = ("attention", "n_global", "drop", "lookup", "top_k")  # options of a request

S = TypeVar("S", bound="_Section")
T = TypeVar("T")


class LongContextError(ValueError):
    """A request of the user's that cannot be met; the message names the field, its value and the remedy."""


def did_you_mean(key: str, known: Iterable[str]) -> str | None:
    """A question that names the known key nearest to an unknown one; None if none is near."""
    near = difflib.get_close_matches(key, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else None


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _name_the_nearest_key(cls, data: Any) -> Any:
        for key in data if isinstance(data, dict) else ():
            if key not in cls.model_fields:
                hint = (
                    did_you_mean(str(key), cls.model_fields) or f"known keys: {', '.join(cls.model_fields)}"
                )
                raise ValueError(f"unknown key {key!r}; {hint}")
        return data


class AttentionSection(_Section):
    """What a query sees. Lengths in tokens; None takes the value from the model."""

    method: Literal["lm_infinite", "streaming", "focused", "none"] = "lm_infinite"
    """`lm_infinite` and `streaming` see the first tokens and a sliding window. `focused` sees stepped
    windows, with memory layers (LongLLaMA). `none` leaves vLLM's attention as it is. A LongLLaMA checkpoint
    defaults to `focused`."""
    n_global: int | None = Field(default=None, ge=0)
    """First tokens that every query sees. Default: 10; with `streaming` 4."""
    max_n_global: int | None = Field(default=None, ge=0)
    """Most first tokens that a request may ask for. With distances `in_cache`, they and the window together
    are at most the trained length. Default: `n_global`."""
    n_local: int | None = Field(default=None, ge=1)
    """Size of the window in tokens, the query included. With `lm_infinite` and `streaming` it slides, with
    `focused` it steps. Default: the trained length, or less if the KV cache holds less of a sliding window;
    with distances `in_cache`, the trained length less `max_n_global`; with `focused`, the checkpoint's if it
    has one, rounded down to whole KV blocks if prefixes are cached."""
    distance_ceiling: int | None = Field(default=None, ge=1)
    """No key looks farther away than this many tokens. Only with `relative` distances. Default: the trained
    length."""
    distances: Distances | None = None
    """`relative` counts distances in the text. `in_cache` counts them among the visible tokens, as
    StreamingLLM does. Default: `relative`; with `streaming`, `in_cache`."""
    allow_beyond_trained: bool = False
    """Accept windows, ceilings and `top_k_insert_at` above the trained length."""
    top_k: int | None = Field(default=None, ge=1)
    """Keys per query head that are looked up. With `focused` it needs `lookup` `top_k` or `blocks`. With
    `lm_infinite` it turns on the top-k branch. Default: no lookup."""
    top_k_from_layer: int | None = Field(default=None, ge=0)
    """`lm_infinite`: first layer with the top-k branch, counted from 0. Default: 4, or the last layer of a
    smaller model."""
    top_k_to_layer: int | None = Field(default=None, ge=0)
    """`lm_infinite`: first layer after those with the top-k branch. Default: the number of layers."""
    top_k_insert_at: int | None = Field(default=None, ge=0)
    """`lm_infinite`: the distance, in tokens, at which the keys of the top-k branch are seen. Default: half
    the trained length."""
    mem_layers: list[int] | None = None
    """`focused`: layers with a memory, counted from 0. `[]` is for windows without a memory. Default: the
    checkpoint's."""
    mem_positionals: bool | None = None
    """`focused`: whether memory layers rotate queries and keys at all. Default: the checkpoint's, else true.
    """
    mem_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """`focused`: the type to which memory keys and values are rounded. Default: the checkpoint's, else
    `bfloat16`."""
    last_context_length: int | None = Field(default=None, ge=1)
    """`focused`: the last window of a prompt begins this many tokens before its end. Default: the
    checkpoint's, else 1024; at most `n_local`."""
    lookup: Literal["all", "top_k", "blocks"] | None = None
    """`focused`: which memory keys a query sees. `all` sees all of them. `top_k` sees the best `top_k`, found
    exactly. `blocks` sees the best `top_k` of the best blocks. Default: `all`."""
    lookup_share: float | None = Field(default=None, gt=0, le=1)
    """`lookup` `blocks`: share of the memory's blocks that is read, at least 128 blocks. Default: 0.1."""
    memory_limit_gib: float | None = Field(default=None, gt=0)
    """`focused`: GiB of host memory, per rank, for a pool of the memory layers' own. On a GPU it is pinned.
    Default: memory lives in vLLM's pool."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.method == "none":
            given = self._given() - {"method"}
            if given:
                raise ValueError(f"method none takes no other keys, but {', '.join(sorted(given))} was given")
        self._consistent_focused()
        self._consistent_top_k()
        if self.method == "streaming" and self.distances == "relative":
            raise ValueError(
                "method streaming counts distances in_cache; for relative distances use lm_infinite"
            )
        if self.in_cache and self.distance_ceiling is not None:
            raise ValueError(
                f"distance_ceiling = {self.distance_ceiling} has no effect on distances in_cache; leave it "
                f"out"
            )
        for name in ("n_global", "max_n_global"):
            if (
                (given := getattr(self, name)) is not None
                and self.n_local is not None
                and given > self.n_local
            ):
                raise ValueError(f"{name} = {given} is more than n_local = {self.n_local}; lower {name}")
        if self.n_global is not None and self.max_n_global is not None and self.n_global > self.max_n_global:
            raise ValueError(
                f"n_global = {self.n_global} is more than max_n_global = {self.max_n_global}; lower n_global"
            )
        return self

    def _given(self) -> set[str]:
        return {
            name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default
        }

    def _consistent_top_k(self) -> None:
        given = sorted(name for name in self._given() if name.startswith("top_k"))
        if self.method == "streaming" or self.distances == "in_cache":
            if given:
                raise ValueError(
                    f"{given[0]} goes with method lm_infinite and relative distances, or focused; leave it "
                    f"out"
                )
        elif given and self.top_k is None:
            raise ValueError(f"{given[0]} has no effect without top_k; give top_k, or leave it out")

    def _consistent_focused(self) -> None:
        foreign = sorted(self._given() & set(SLIDING_KEYS if self.method == "focused" else FOCUSED_KEYS))
        if foreign:
            raise ValueError(f"{', '.join(foreign)} has no effect with method {self.method}; leave it out")
        if self.method == "focused" and (self.top_k is None) != (self.lookup in (None, "all")):
            if self.top_k is None:
                raise ValueError(f"lookup = {self.lookup!r} needs top_k; give both, or neither for all keys")
            raise ValueError(
                f"top_k = {self.top_k} needs lookup top_k or blocks; give both, or neither for all keys"
            )
        if self.lookup_share is not None and self.lookup != "blocks":
            raise ValueError(
                f"lookup_share = {self.lookup_share} has no effect but with lookup blocks; leave it out"
            )

    @property
    def in_cache(self) -> bool:
        return self.method == "streaming" or self.distances == "in_cache"

    def for_model(
        self,
        trained_length: int,
        num_layers: int,
        checkpoint: Mapping[str, Any],
        cached_block: int = 1,
        room: int | None = None,
    ) -> "AttentionSection":
        """Every value filled in and checked against the model's trained length (tokens), layers and own
        configuration.

        cached_block: tokens of a KV block where prefixes are cached, else 1.
        room: the largest sliding window that the KV cache holds, in tokens; None for any.
        """
        if self.method == "focused":
            return self._focused_for_model(trained_length, num_layers, checkpoint, cached_block)
        n_global = DEFAULT_N_GLOBAL[self.method] if self.n_global is None else self.n_global
        max_n_global = n_global if self.max_n_global is None else self.max_n_global
        if max_n_global < n_global:
            raise LongContextError(
                f"attention.max_n_global = {max_n_global} is less than attention.n_global = {n_global}; "
                "raise it"
            )
        widest = trained_length - max_n_global if self.in_cache else trained_length
        n_local = _at_most(room, max(widest, 1)) if self.n_local is None else self.n_local
        short = _short_length(checkpoint)
        longest = short if n_local <= short else trained_length
        ceiling = None if self.in_cache else (self.distance_ceiling or longest)
        if max_n_global > n_local:
            name = "n_global" if n_global > n_local else "max_n_global"
            raise LongContextError(
                f"attention.{name} = {max_n_global} is more than attention.n_local = {n_local}; lower {name}"
            )
        if not self.allow_beyond_trained:
            limit = (
                f"the model was trained on {trained_length} tokens; lower it, or set "
                "attention.allow_beyond_trained"
            )
            if self.in_cache and max_n_global + n_local > trained_length:
                name = "n_global" if max_n_global == n_global else "max_n_global"
                raise LongContextError(
                    f"attention.{name} + attention.n_local = {max_n_global + n_local}, but {limit}"
                )
            if n_local > trained_length:
                raise LongContextError(f"attention.n_local = {n_local}, but {limit}")
            if ceiling is not None and ceiling > trained_length:
                raise LongContextError(f"attention.distance_ceiling = {ceiling}, but {limit}")
        filled = self.model_copy(
            update={
                "n_global": n_global,
                "max_n_global": max_n_global,
                "n_local": n_local,
                "distance_ceiling": ceiling,
                "distances": "in_cache" if self.in_cache else "relative",
            }
        )
        return filled if self.top_k is None else filled._top_k_for_model(trained_length, num_layers)

    def _top_k_for_model(self, trained_length: int, num_layers: int) -> "AttentionSection":
        first = (
            min(DEFAULT_TOP_K_FROM_LAYER, num_layers - 1)
            if self.top_k_from_layer is None
            else self.top_k_from_layer
        )
        behind = num_layers if self.top_k_to_layer is None else self.top_k_to_layer
        insert_at = trained_length // 2 if self.top_k_insert_at is None else self.top_k_insert_at
        if not first < behind <= num_layers:
            raise LongContextError(
                f"attention.top_k_from_layer = {first} and attention.top_k_to_layer = {behind}, but the "
                f"model has layers 0 to "
                f"{num_layers - 1}; give a first layer and, behind it, one at most {num_layers} that is the "
                f"first without"
            )
        if insert_at > trained_length and not self.allow_beyond_trained:
            raise LongContextError(
                f"attention.top_k_insert_at = {insert_at}, but the model was trained on {trained_length} "
                f"tokens; lower it"
            )
        return self.model_copy(
            update={"top_k_from_layer": first, "top_k_to_layer": behind, "top_k_insert_at": insert_at}
        )

    def _focused_for_model(
        self, trained_length: int, num_layers: int, checkpoint: Mapping[str, Any], cached_block: int
    ) -> "AttentionSection":
        of_checkpoint = _parse(AttentionSection, {"n_local": checkpoint.get("n_local")}, "attention")
        own = of_checkpoint.n_local or trained_length
        n_local = self.n_local or own // cached_block * cached_block or own
        if n_local > trained_length and not self.allow_beyond_trained:
            raise LongContextError(
                f"attention.n_local = {n_local}, but the model was trained on {trained_length} tokens; lower "
                f"it, or set "
                "attention.allow_beyond_trained"
            )
        if self.n_local is not None and n_local % cached_block:
            below = n_local // cached_block * cached_block
            near = " or ".join(str(n) for n in (below, below + cached_block) if n)
            raise LongContextError(
                f"attention.n_local = {n_local} is no multiple of block_size = {cached_block}, so prefixes "
                f"would be cached in "
                f"steps of {math.lcm(n_local, cached_block)} tokens; give {near}, or turn prefix caching off "
                "(--no-enable-prefix-caching)"
            )
        known = {**LONGLLAMA_DEFAULTS, **{k: v for k, v in checkpoint.items() if k in FOCUSED_KEYS}}
        filled: dict[str, Any] = {"n_local": n_local, "lookup": self.lookup or "all"}
        if self.lookup == "blocks":
            filled["lookup_share"] = self.lookup_share or DEFAULT_LOOKUP_SHARE
        for name in ("mem_layers", "mem_positionals", "mem_dtype", "last_context_length"):
            given = getattr(self, name)
            filled[name] = known.get(name) if given is None else given
        if self.last_context_length is None:
            filled["last_context_length"] = min(filled["last_context_length"], n_local)
        if filled["mem_layers"] == []:
            if given := sorted(self._given() & OF_MEMORY):
                raise LongContextError(
                    f"attention.{given[0]} has no effect without memory layers, and mem_layers is []; leave "
                    f"{given[0]} out, or name layers in attention.mem_layers"
                )
            filled["lookup"] = None
        # Validated again: what the checkpoint says is as much somebody's input as what the user says.
        section = _parse(AttentionSection, {**self.model_dump(exclude_none=True), **filled}, "attention")
        if section.mem_layers is None:
            raise LongContextError(
                "attention.method focused needs memory layers, but neither attention.mem_layers nor the "
                "checkpoint's mem_layers names one; give for example attention.mem_layers [8, 16, 24], or [] "
                "for windows without a memory"
            )
        wrong = [layer for layer in section.mem_layers if not 0 <= layer < num_layers]
        if wrong or len(set(section.mem_layers)) < len(section.mem_layers):
            raise LongContextError(
                f"attention.mem_layers = {section.mem_layers}, but the model has layers 0 to "
                f"{num_layers - 1}; give each once"
            )
        if filled["last_context_length"] > n_local:
            raise LongContextError(
                f"attention.last_context_length = {filled['last_context_length']} is more than the window, "
                f"attention.n_local = "
                f"{n_local}; lower it"
            )
        return section


def check_policy(policy: KVPolicy, keeps: bool) -> None:
    """Raises LongContextError unless `adaptation.kv_policy` goes with the windows.

    keeps: They are those of `attention.method`, which no pass computes again.
    """
    if (policy == "keep") != keeps:
        raise LongContextError(
            f"adaptation.kv_policy = {policy!r}, but attention.method none takes reuse or recompute; Λ "
            "attention (attention.method lm_infinite or streaming) goes with keep, and so does "
            "a memory (focused)"
        )


class TrainerSection(_Section):
    """The process that trains adapters."""

    device: str | None = Field(default=None, pattern=r"^(cpu|cuda(:[0-9]{1,3})?)$")
    """Device of the trainer: `cpu`, `cuda` or `cuda:N`. Default: the engine's, its first GPU if it has
    several."""
    attention: Literal["sdpa", "xformers"] = "sdpa"
    """Attention of the trainer's model."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the trainer's weights, on a CPU. Default: the engine's, but float32 on a CPU without
    instructions for the engine's, where 16 bits would be slower."""
    recompute: bool | None = None
    """Keep only each layer's input for the backward pass, and compute the rest again. Default: true on a GPU,
    else false."""
    duty_cycle: float = Field(default=1.0, gt=0, le=1)
    """Share of the time in which the trainer may work. Below 1 it pauses after every block."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of the trainer, beside vLLM's. No more than the CPUs that it may run on."""
    cpus: list[Annotated[int, Field(ge=0)]] | None = Field(default=None, min_length=1)
    """CPUs that the trainer may run on, of those that the engine's process may use. Default: any."""
    address: str | None = None
    """Address (`ipc://...`) of a trainer that you started yourself. Default: the engine starts one."""
    timeout_s: float = Field(default=600.0, gt=0)
    """Seconds after which a block in training counts as a hang."""
    start_timeout_s: float = Field(default=300.0, gt=0)
    """Seconds that the trainer has to load its model."""
    max_restarts: int = Field(default=3, ge=0)
    """Restarts in a row, with nothing trained or saved in between, before the trainer is given up."""

    @model_validator(mode="after")
    def _own_process(self) -> Self:
        for name in (
            "device",
            "attention",
            "dtype",
            "recompute",
            "duty_cycle",
            "threads",
            "cpus",
            "max_restarts",
        ):
            if self.address is not None and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} has no effect beside address; give it to the process that runs there, or leave "
                    f"it out"
                )
        return self


class QuotaSection(_Section):
    """What each tenant may have, see `adaptation.tenant_header`; without that, all together."""

    adapters: int | None = Field(default=None, ge=0)
    """Saved adapters. Default: any number."""
    gib: float | None = Field(default=None, ge=0)
    """GiB that saved adapters take on disk. Default: any number."""
    tokens: int | None = Field(default=None, ge=0)
    """Tokens of prompts and answers of requests that adapt and are under way, in each API server. An answer
    counts with its `max_tokens`. Default: any number."""


class AdaptationSection(_Section):
    """Temp-LoRA (arXiv 2401.11504): what is trained, when, and what happens to the KV cache.

    The recipe is the official code's. Sizes in tokens; None takes the value from the window.
    """

    method: Literal["temp_lora"] = "temp_lora"
    """The only way to adapt so far."""
    block_tokens: int | None = Field(default=None, ge=1)
    """Tokens of a block, the unit that is trained at once. Default: a quarter of the window, at most 1,024;
    with `temp-lora-economic` half of it, at most 2,048."""
    context_tokens: int | None = Field(default=None, ge=1)
    """Tokens that a new pass computes again when the window is full. Only with `attention.method` `none`.
    Default: half the window, or less if a block and a KV block would not fit beside it."""
    window_tokens: int | None = Field(default=None, ge=1)
    """Largest live context in tokens. Only with `attention.method` `none`. Default: the trained length, at
    most 24,576; with `temp-lora-economic` 4,096. Less if the KV cache holds less."""
    plain_tokens: int | None = Field(default=None, ge=1)
    """Longest prompt and answer, together, of a request that does not learn. Only with `attention.method`
    `none`. Default: the trained length, or less if the KV cache holds less."""
    train_context_tokens: int | None = Field(default=None, ge=0)
    """Tokens before a block that its training also sees, without a loss on them. Default: as many as a block
    has, if the trained length has room for both."""
    rank: int = Field(default=64, ge=1, le=MAX_RANK)
    """LoRA rank."""
    alpha: float | None = Field(default=None, gt=0)
    """LoRA alpha. The update is scaled by alpha / rank. Default: the request's rank, a scale of 1."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    """LoRA dropout while training."""
    learning_rate: float = Field(default=5e-5, gt=0, le=1)
    """AdamW's learning rate."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's weight decay."""
    adam_eps: float = Field(default=1e-7, gt=0)
    """AdamW's epsilon."""
    grad_clip: float | None = Field(default=None, gt=0)
    """Largest norm of the gradient. Default: no clipping."""
    warmup_blocks: int = Field(default=2, ge=0)
    """Blocks over which the learning rate rises to its value. The first trains at 0."""
    epochs: int = Field(default=2, ge=0)
    """Passes over each block. 0 learns nothing, but keeps the windows."""
    adapter_seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the adapter's initial weights and of dropout."""
    learn: Learn | None = None
    """What is learned. `all` is what is read and written, `prompt` what is read, `output` what is written.
    `none` learns nothing, and uses what is remembered of the prompt, or the adapter of `start_from`. Default:
    `all`, or `output` if `train_on_prompt` is false."""
    train_on_prompt: bool = True
    """The former name of `learn`: true is `all`, false is `output`."""
    kv_policy: KVPolicy | None = None
    """What happens to KV that an older version computed. `reuse` keeps it until the window is full, then
    starts a new pass. `recompute` starts a new pass after every block. `keep` never does. Default: with
    `attention.method` `none` `reuse`; with others `keep`, and nothing else."""
    update_mode: UpdateMode = "cascaded"
    """`cascaded` waits for a block's training before the next block is computed. `parallel` computes the next
    block with the version before, so that training and computing overlap."""
    keep_first: int = Field(default=1, ge=0)
    """First tokens of the text that stay in front of every stepped window. At most a KV block."""
    on_failure: Literal["continue", "fail"] = "continue"
    """When a block cannot be trained: `continue` with the last good version, or `fail` the request."""
    cache_gib: float | None = Field(default=None, ge=0)
    """GiB of host memory for trained versions, so that a text which begins like an earlier one is not trained
    again. 0 turns it off. Default: 32 versions of an adapter of `rank`, at most 4 GiB."""
    cache_dir: str | None = Field(default=None, min_length=1)
    """Directory where trained versions outlive the memory and the engine. Engines may share one. It is made
    at start, for this user only, and `~` is your home. Default: they are in memory only."""
    cache_dir_gib: float | None = Field(default=None, gt=0)
    """GiB that all versions in `cache_dir` may take. The least recently used goes first. Default: 16."""
    slots: int | None = Field(default=None, ge=1)
    """Requests that learn at once; more of them wait. Default: 8, at most `max_num_seqs`."""
    requests: Literal["opt_in", "all"] = "opt_in"
    """Which requests learn: those that ask for it (`opt_in`), or `all`."""
    adapters_root: str | None = Field(default=None, min_length=1)
    """Directory of saved adapters. It is made at start, and `~` is your home. Default: requests cannot save
    or load adapters."""
    tenant_header: str | None = Field(default=None, pattern=r"^[A-Za-z0-9-]{1,64}$")
    """HTTP header that names the tenant of a request, such as `X-Tenant`. Each tenant has saved adapters and
    remembered versions of its own. Default: there is one namespace for all."""
    quota: QuotaSection = QuotaSection()
    """What each tenant may have."""
    max_rank: int | None = Field(default=None, ge=1, le=MAX_RANK)
    """Largest rank that a request may ask for. Default: `rank`."""
    max_epochs: int = Field(default=8, ge=0)
    """Most epochs that a request may ask for."""
    min_block_tokens: int = Field(default=16, ge=1)
    """Smallest block that a request may ask for, in tokens."""
    trainer: TrainerSection = TrainerSection()
    """The process that trains the adapters."""

    _recommended_sizes: dict[str, int] = {}

    @model_validator(mode="after")
    def _consistent_cache(self) -> Self:
        if self.cache_dir is None and self.cache_dir_gib is not None:
            given = f"cache_dir_gib = {self.cache_dir_gib}"
            raise ValueError(f"{given} has no effect without cache_dir; give cache_dir, or leave it out")
        if self.cache_dir is not None and self.cache_gib == 0:
            raise ValueError(
                f"cache_dir = {self.cache_dir!r} has no effect with cache_gib = 0; leave one of them out"
            )
        return self

    def with_recommended(self, recipe: Mapping[str, Any]) -> Self:
        """With what a checkpoint recommends, in place of defaults only."""
        made = self.model_copy(update=dict(recipe))
        made._recommended_sizes = {name: recipe[name] for name in SIZES if name in recipe}
        return made

    @property
    def recommended_sizes(self) -> Mapping[str, int]:
        return self._recommended_sizes

    def without_recommended_sizes(self) -> Self:
        return self.model_copy(update=dict.fromkeys(self._recommended_sizes))

    def for_model(
        self,
        trained_length: int,
        attention: AttentionSection,
        kv_block: int,
        max_num_seqs: int,
        preset: str | None,
        room: int | None = None,
    ) -> Self:
        """Every size filled in and checked. trained_length, kv_block: tokens. attention: filled in, too.

        room: the largest stepped window that the KV cache holds, in tokens; None for any.
        """
        keeps = attention.method != "none"
        policy = self.kv_policy or ("keep" if keeps else "reuse")
        check_policy(policy, keeps)
        max_rank = self.rank if self.max_rank is None else self.max_rank
        sizes = SIZES_OF_PRESET.get(preset or "", DEFAULT_SIZES)
        # A user's own sizes find room in it.
        usual = max(
            sizes.window, sizes.blocks_per_window * (self.block_tokens or 0), 2 * (self.context_tokens or 0)
        )
        window = self.window_tokens or attention.n_local or _at_most(room, min(trained_length, usual))
        block = self.block_tokens or max(min(window // sizes.blocks_per_window, sizes.block), 1)
        context = self.context_tokens or max(min(window // 2, window - block - kv_block), 1)
        train_context = self.train_context_tokens
        filled = self.model_copy(
            update={
                "kv_policy": policy,
                "learn": learned(self.learn, self.train_on_prompt, "adaptation."),
                "window_tokens": window,
                "plain_tokens": self.plain_tokens or _at_most(room, trained_length),
                "block_tokens": block,
                "context_tokens": context,
                "train_context_tokens": min(block, max(trained_length - block - 1, 0))
                if train_context is None
                else train_context,
                "max_rank": max_rank,
                "slots": self.slots or min(DEFAULT_SLOTS, max_num_seqs),
                "min_block_tokens": min(self.min_block_tokens, block),
                "max_epochs": max(self.max_epochs, self.epochs),
            }
        )
        if keeps:
            for name in ("window_tokens", "context_tokens", "plain_tokens"):
                if getattr(self, name) is not None:
                    raise LongContextError(
                        f"adaptation.{name} has no effect beside attention.method {attention.method}, which "
                        "has windows of its own; leave it out, or set attention.method none"
                    )
        for name in ("window_tokens", "plain_tokens"):
            if (tokens := getattr(filled, name)) > trained_length:
                raise LongContextError(
                    f"adaptation.{name} = {tokens}, but the model was trained on {trained_length} tokens; "
                    f"lower it"
                )
        if self.keep_first > kv_block:
            raise LongContextError(
                f"adaptation.keep_first = {self.keep_first} is more than a KV block of {kv_block} tokens; "
                f"lower it"
            )
        if self.rank > max_rank:
            raise LongContextError(
                f"adaptation.rank = {self.rank} is above adaptation.max_rank = {max_rank}; raise max_rank"
            )
        return filled


def learned(learn: Learn | None, train_on_prompt: bool, where: str = "") -> Learn:
    """The value of `learn`, given both of its names.

    Raises LongContextError if they contradict each other. where: The section, for its message.
    """
    if learn in ("all", "prompt") and not train_on_prompt:
        raise LongContextError(
            f"{where}train_on_prompt = false contradicts {where}learn = {learn!r}; leave train_on_prompt out"
        )
    return learn or ("all" if train_on_prompt else "output")


class RequestOptions(_Section):
    """What one request may set: `SamplingParams.extra_args["longctx"]`, over HTTP `vllm_xargs.longctx` (a
    JSON string).
    """

    attention: Literal["plain"] | None = None
    """`plain` sees the whole text, as stock vLLM does. The request ends at the trained length. Default: the
    engine's attention."""
    n_global: int | None = Field(default=None, ge=0)
    """As `attention.n_global`, at most `attention.max_n_global`."""
    drop: Literal["turns"] | None = None
    """`turns` drops whole turns of a chat, not half ones: the window begins where a message of the user's
    begins, and the system prompt stays in front. With a chat template only. Default: the window slides."""
    lookup: Literal["all", "top_k", "blocks"] | None = None
    """As `attention.lookup`. `blocks` only where it is the engine's."""
    top_k: int | None = Field(default=None, ge=1)
    """As `attention.top_k`, on an engine with a memory."""
    temp_lora: bool | None = None
    """Whether this request learns. Default: the server's `adaptation.requests`."""
    block_tokens: int | None = Field(default=None, ge=1)
    """As `adaptation.block_tokens`, at least `adaptation.min_block_tokens`."""
    context_tokens: int | None = Field(default=None, ge=1)
    """As `adaptation.context_tokens`."""
    train_context_tokens: int | None = Field(default=None, ge=0)
    """As `adaptation.train_context_tokens`."""
    rank: int | None = Field(default=None, ge=1)
    """As `adaptation.rank`, at most `adaptation.max_rank`. Default with `start_from`: the saved adapter's.
    """
    learning_rate: float | None = Field(default=None, gt=0, le=1)
    """As `adaptation.learning_rate`."""
    epochs: int | None = Field(default=None, ge=0)
    """As `adaptation.epochs`, at most `adaptation.max_epochs`."""
    learn: Learn | None = None
    """As `adaptation.learn`."""
    train_on_prompt: bool | None = None
    """As `adaptation.train_on_prompt`."""
    kv_policy: KVPolicy | None = None
    """As `adaptation.kv_policy`."""
    update_mode: UpdateMode | None = None
    """As `adaptation.update_mode`."""
    adapter_seed: int | None = Field(default=None, ge=0, lt=2**63)
    """As `adaptation.adapter_seed`."""
    save_as: str | None = Field(default=None, pattern=f"^{OWNED_NAME}$")
    """Name under which the adapter is saved when the request ends. A name, never a path. Offline it may be a
    tenant's: `@TENANT/NAME`."""
    start_from: str | None = Field(default=None, pattern=f"^{OWNED_NAME}$")
    """Name of a saved adapter to begin with."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.attention is not None and (others := list(self.of_attention)[1:]):
            raise ValueError(f"{others[0]} has no effect beside attention = {self.attention!r}; leave it out")
        if self.lookup == "all" and self.top_k is not None:
            raise ValueError(f"top_k = {self.top_k} has no effect with lookup all; leave one of them out")
        return self

    @property
    def of_attention(self) -> dict[str, Any]:
        """Those given that choose what its queries see."""
        return {name: value for name in OF_ATTENTION if (value := getattr(self, name)) is not None}

    @property
    def of_adaptation(self) -> dict[str, Any]:
        """All others that are given."""
        return self.model_dump(exclude_none=True, exclude=set(OF_ATTENTION))

    @classmethod
    def parse(cls, value: Any) -> "RequestOptions":
        """From a dict or a JSON string.

        Raises LongContextError naming each bad field, its value and what is allowed.
        """
        return _parse(cls, value)


class ServingSection(_Section):
    """What `vllm serve` does with HTTP requests."""

    default_max_tokens: int = Field(default=4096, ge=1)
    """Tokens written for a chat or response request that sets no limit. It is a default, not a cap."""
    strict: bool = False
    """Refuse what vLLM would ignore, convert or shorten in a request."""
    keep_alive_s: float = Field(default=10.0, ge=0, allow_inf_nan=False)
    """Seconds of silence in a stream after which a sign of life is sent. 0 sends none."""


class LongContextConfig(_Section):
    """The value of `additional_config["longctx"]`. Keys given beside a preset override the preset's."""

    preset: str | None = None
    """A named starting point: `lm-infinite`, `streaming`, `temp-lora-quality` or `temp-lora-economic`. Keys
    given beside it override it."""
    attention: AttentionSection = AttentionSection()
    """What a query sees."""
    adaptation: AdaptationSection | None = None
    """Temp-LoRA. Without this section, no request can learn."""
    serving: ServingSection = ServingSection()
    """How the server treats HTTP requests."""
    self_check: bool | None = None
    """Whether one attention layer of each kind is compared with an exact computation at start, and the engine
    refuses to start if one differs. Default: true for architectures that longctx was not tested with."""

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise ValueError(f"expected a mapping such as {{'preset': '{DEFAULT_PRESET}'}}, got {data!r}")
        name = data.get("preset")
        if name is None:
            return data
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; presets: {', '.join(PRESETS)}")
        merged = dict(data)
        for section, defaults in PRESETS[name].items():
            own = data.get(section, {})
            if isinstance(own, dict):
                merged[section] = {**defaults, **own}
        return merged

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.mode.is_plain and "serving" in self.model_fields_set:
            raise ValueError(
                "serving has no effect with attention.method none, which leaves vLLM as it is; leave it out"
            )
        if self.mode.is_plain and self.self_check is not None:
            raise ValueError(
                "self_check has no effect with attention.method none, which leaves vLLM as it is; leave it "
                "out"
            )
        return self

    @classmethod
    def parse(cls, value: Any) -> "LongContextConfig":
        """From a dict or a JSON string.

        Raises LongContextError naming each bad field, its value and what is allowed.
        """
        return _parse(cls, value)

    @property
    def _mode(self) -> Mode | None:
        a = self.attention
        return mode_of(a.method, a.top_k is not None, self.adaptation is not None, a.mem_layers != [])

    @property
    def mode(self) -> Mode:
        return filled(self._mode)  # as validated

    @property
    def temp_lora(self) -> AdaptationSection:
        """Raises RuntimeError in modes without."""
        return filled(self.adaptation)

    def for_model(
        self,
        trained_length: int,
        kv_block: int,
        num_layers: int,
        checkpoint: Mapping[str, Any],
        caches_prefixes: bool = True,
        max_num_seqs: int = DEFAULT_SLOTS,
        room: int | None = None,
    ) -> "LongContextConfig":
        """Every value filled in.

        trained_length, kv_block: tokens. checkpoint: the model's own configuration.
        room: the largest default window, in tokens; None for any.
        """
        attention = self.attention
        if attention.method != "none":
            cached_block = kv_block if caches_prefixes else 1
            attention = attention.for_model(trained_length, num_layers, checkpoint, cached_block, room)
        adaptation = self.adaptation
        if adaptation is not None:
            adaptation = adaptation.for_model(
                trained_length, attention, kv_block, max_num_seqs, self.preset, room
            )
        return self.model_copy(update={"attention": attention, "adaptation": adaptation})

    def dump(self) -> dict[str, Any]:
        """As plain JSON values, `parse`-able again."""
        return self.model_dump(exclude_none=True)


def _short_length(checkpoint: Mapping[str, Any]) -> int:
    """Tokens up to which LongRoPE has factors of their own; 0 for other rotations.

    A window that short gets them if the distance ceiling is as short.
    """
    parameters = checkpoint.get("rope_parameters") or {}
    is_longrope = parameters.get("rope_type") == "longrope"
    return int(parameters["original_max_position_embeddings"]) if is_longrope else 0


def filled(value: T | None) -> T:
    """Raises RuntimeError for None."""
    if value is None:
        raise RuntimeError(
            "this engine's mode does not have the value, or LongContextConfig.for_model has not been called"
        )
    return value


def _at_most(limit: int | None, value: int) -> int:
    return value if limit is None else min(limit, value)


def checked_json(text: str) -> dict[str, Any]:
    """The value of a `--longctx` flag, as the user wrote it.

    Raises LongContextError if it is not a configuration.
    """
    LongContextConfig.parse(text)
    return json.loads(text)


def _parse(section: type[S], value: Any, name: str = "longctx") -> S:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as e:
            raise LongContextError(
                f"longctx: not valid JSON ({e.msg} at character {e.pos}): {value[:200]}"
            ) from None
        except RecursionError:
            raise LongContextError(f"longctx: nested too deeply: {value[:200]}") from None
    try:
        return section.model_validate(value)
    except ValidationError as e:
        raise LongContextError("; ".join(_describe(error, name) for error in e.errors())) from None


def _describe(error: Any, name: str) -> str:
    where = ".".join([name, *(str(part) for part in error["loc"])])
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{where}: {message}"
    return f"{where} = {error['input']!r}: {message}"
