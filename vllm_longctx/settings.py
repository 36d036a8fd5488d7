"""A configuration in force: of an engine whose model is known, with nothing left open.

`config` has what a user may write, where None takes a value from the model. Here a mode's values are typed by
what the mode is, so nobody who reads them has to ask whether they are there.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field
from vllm.config import VllmConfig
from vllm.platforms import current_platform

from vllm_longctx.config import (
    KEY,
    MAX_RANK,
    AdaptationSection,
    AttentionSection,
    KVPolicy,
    Learn,
    LongContextConfig,
    LongContextError,
    RequestOptions,
    ServingSection,
    TrainerSection,
    check_policy,
    filled,
    learned,
)
from vllm_longctx.geometry import Geometry, RequestView, SteppedWindows
from vllm_longctx.modes import Mode, Role, load

if TYPE_CHECKING:
    from vllm_longctx.windows import Windows

# Tokens that every request may train on at once, whatever the server's sizes, for which memory was counted.
SMALL_EXAMPLE = 512


@dataclass(frozen=True)
class TopK:
    """LM-Infinite's top-k branch.

    k: Keys between first tokens and window that each query head sees, those with the highest scores.
    insert_at: The distance at which they are seen, in tokens.
    layers: Those that have the branch.
    """

    k: int
    insert_at: int
    layers: range


@dataclass(frozen=True)
class Lookup:
    """How a query finds its keys in a memory.

    top_k: It attends to so many, those with the highest scores.
    share: Of the memory's blocks, that are read to find them; None to find exactly these.
    """

    top_k: int
    share: float | None


@dataclass(frozen=True)
class Memory:
    """Windows of LongLLaMA, and the memory of its memory layers.

    layers: Those that have one. There may be none.
    has_positions: Their queries and keys are rotated (`mem_positionals`).
    dtype: torch's name of the dtype to which keys and values are rounded as a window becomes memory.
    lookup: None where queries see all of the memory.
    limit_gib: Host memory for a pool of their own, in GiB; None for vLLM's pool.
    """

    layers: frozenset[int]
    has_positions: bool
    dtype: str
    windows: SteppedWindows
    lookup: Lookup | None
    limit_gib: float | None


class TrainerSettings(TrainerSection):
    """The trainer process of an engine.

    device: Always with its number among the visible GPUs.
    """

    device: str
    recompute: bool

    @classmethod
    def of(cls, section: TrainerSection) -> Self:
        name = section.device or current_platform.device_type
        recompute = name != "cpu" if section.recompute is None else section.recompute
        device = "cuda:0" if name == "cuda" else name
        return cls.model_construct(**{**dict(section), "device": device, "recompute": recompute})


class Adaptation(AdaptationSection):
    """Temp-LoRA in an engine, or for one request. Sizes in tokens."""

    block_tokens: int
    context_tokens: int
    window_tokens: int
    plain_tokens: int
    train_context_tokens: int
    kv_policy: KVPolicy
    learn: Learn
    slots: int
    max_rank: int = Field(le=MAX_RANK)
    trainer: TrainerSettings

    @classmethod
    def of(cls, section: AdaptationSection) -> Self:
        """section: filled in by `for_model`."""
        return cls.model_construct(**{**dict(section), "trainer": TrainerSettings.of(section.trainer)})

    @property
    def has_passes(self) -> bool:
        """Windows step: where one is full, a new pass begins. Else they slide."""
        return self.kv_policy != "keep"

    @property
    def sizes(self) -> dict[str, int]:
        """In tokens, those that count: without passes, not those of windows."""
        of_passes = ("window_tokens", "context_tokens", "plain_tokens") if self.has_passes else ()
        return {name: getattr(self, name) for name in (*of_passes, "block_tokens", "train_context_tokens")}

    def check(self, trained_length: int, kv_block: int) -> None:
        """Raises LongContextError unless filled-in sizes go together."""
        example = self.train_context_tokens + self.block_tokens + 1
        if example > trained_length:
            raise LongContextError(
                f"adaptation.train_context_tokens + adaptation.block_tokens + 1 = {example}, but the model "
                f"was trained on "
                f"{trained_length} tokens; lower one of them"
            )
        if self.has_passes and self.context_tokens + kv_block + self.keep_first > self.window_tokens:
            most = self.window_tokens - kv_block - self.keep_first
            remedy = f"give at most {most}" if most > 0 else "give a smaller block_size or keep_first"
            if self.window_tokens < trained_length:
                remedy += ", or raise window_tokens"
            raise LongContextError(
                f"adaptation.context_tokens = {self.context_tokens} leaves no room in "
                f"adaptation.window_tokens = "
                f"{self.window_tokens}: a new pass keeps them, up to {kv_block - 1} more and "
                f"{self.keep_first} first ones; "
                f"{remedy}"
            )

    def is_asked(self, options: RequestOptions) -> bool:
        """Whether a request with these options is to adapt."""
        return self.requests == "all" if options.temp_lora is None else options.temp_lora

    def for_request(self, options: RequestOptions, trained_length: int, kv_block: int) -> Self | None:
        """The settings of one request, or None if it does not adapt.

        Raises LongContextError for an option beyond the server's limits.
        """
        given = options.of_adaptation
        given.pop("temp_lora", None)
        if not self.is_asked(options):
            if given:
                raise LongContextError(
                    f"{next(iter(given))} has no effect without temp_lora; set temp_lora true, or leave it "
                    f"out"
                )
            return None
        for name in ("save_as", "start_from"):
            if given.pop(name, None) is not None and self.adapters_root is None:
                raise LongContextError(
                    f"{name}: this server keeps no adapters; start it with adaptation.adapters_root"
                )
        if options.start_from is not None:
            given.setdefault("rank", self._saved_rank(options.start_from))
        limits = {
            "rank": (given.get("rank", 1) <= self.max_rank, f"at most {self.max_rank} (adaptation.max_rank)"),
            "epochs": (
                given.get("epochs", 0) <= self.max_epochs,
                f"at most {self.max_epochs} (adaptation.max_epochs)",
            ),
            "block_tokens": (
                given.get("block_tokens", self.block_tokens) >= self.min_block_tokens,
                f"at least {self.min_block_tokens} (adaptation.min_block_tokens)",
            ),
        }
        for name, (holds, allowed) in limits.items():
            if not holds:
                raise LongContextError(
                    f"{name} = {given[name]} is beyond this server's limit; give {allowed}"
                )
        most = max(self.block_tokens + self.train_context_tokens, SMALL_EXAMPLE)
        if "block_tokens" in given and "train_context_tokens" not in given:
            room = max(min(trained_length - 1, most) - given["block_tokens"], 0)
            given["train_context_tokens"] = min(self.train_context_tokens, room)
        if "learn" in given or "train_on_prompt" in given:
            given["learn"] = learned(options.learn, given.get("train_on_prompt", True))
        own = self.model_copy(update=given)
        check_policy(own.kv_policy, keeps=not self.has_passes)
        own.check(trained_length, kv_block)
        if (example := own.block_tokens + own.train_context_tokens) > most:
            raise LongContextError(
                f"block_tokens + train_context_tokens = {example} is beyond this server's limit; give at "
                f"most {most} (adaptation.block_tokens + adaptation.train_context_tokens)"
            )
        return own

    def _saved_rank(self, name: str) -> int:
        """The largest of a saved adapter's. Raises LongContextError without an adapter, or room for it."""
        path = Path(filled(self.adapters_root), name, "adapter_config.json")
        if not path.is_file():
            raise LongContextError(
                f"start_from = {name!r}: there is no such adapter in adaptation.adapters_root"
            )
        try:
            config = json.loads(path.read_text())
            rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
            if not isinstance(rank, int):
                raise TypeError(f"a rank is {rank!r}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise LongContextError(
                f"start_from = {name!r}: its adapter_config.json cannot be read: {e!r}"
            ) from None
        if rank > self.max_rank:
            raise LongContextError(
                f"start_from = {name!r}: it has rank {rank}, but this server has room for at most "
                f"{self.max_rank} (adaptation.max_rank)"
            )
        return rank


@dataclass(frozen=True)
class Settings:
    """The configuration in force. A value that its mode does not have raises RuntimeError.

    mode: The row of `modes.MODES` that the engine runs.
    attention, serving: As the user wrote them, every value filled in.
    self_check: Whether layers are checked at start; None where the architecture says it.
    """

    mode: Mode
    attention: AttentionSection
    serving: ServingSection
    adaptation: Adaptation | None
    self_check: bool | None

    @classmethod
    def of(cls, config: LongContextConfig) -> Self:
        """config: filled in by `for_model`."""
        adaptation = None if config.adaptation is None else Adaptation.of(config.adaptation)
        return cls(config.mode, config.attention, config.serving, adaptation, config.self_check)

    @property
    def temp_lora(self) -> Adaptation:
        return filled(self.adaptation)

    @functools.cached_property
    def windows(self) -> "Windows":
        """How they move, and what follows from it."""
        windows: Windows = load(f"windows.{self.mode.windows}").of(self)
        return windows

    @property
    def geometry(self) -> Geometry:
        """Of sliding layers; in modes without any, that of plain attention."""
        return self.windows.geometry

    def sees_whole(self, tokens: int) -> bool:
        """Whether queries of a text of so many tokens see all of it, as with plain attention."""
        if not self.mode.slides:
            return True
        geometry = self.geometry
        ceiling = geometry.distance_ceiling
        return filled(geometry.n_local) >= tokens and (ceiling is None or ceiling >= tokens)

    def view_of(
        self, options: RequestOptions, trained_length: int, turns: tuple[int, ...] = ()
    ) -> RequestView | None:
        """What a request's queries see, if that is something else than what others see.

        turns: Where messages of the user's begin in its prompt.
        """
        if self.attention.method == "focused":
            if options.attention == "plain":
                return RequestView()
            # Which keys are looked up decides what layers behind a memory compute.
            return None if self.lookup_of(options) == self.memory.lookup else RequestView(0)
        if not self.mode.slides:
            return None
        if options.attention == "plain":
            return None if self.sees_whole(trained_length) else RequestView()
        n_global = filled(self.attention.n_global) if options.n_global is None else options.n_global
        if options.drop is not None:
            return RequestView(max(n_global, turns[0]), turns)
        return None if n_global == self.attention.n_global else RequestView(n_global)

    def lookup_of(self, options: RequestOptions) -> Lookup | None:
        """How a request's queries find their keys in a memory. None where they see all of it."""
        own = self.memory.lookup
        top_k = options.top_k or (None if own is None else own.top_k)
        if options.lookup == "all" or top_k is None:
            return None
        share = None if own is None or options.lookup == "top_k" else own.share
        return Lookup(top_k, share)

    @property
    def top_k(self) -> TopK:
        a = self.attention
        layers = range(filled(a.top_k_from_layer), filled(a.top_k_to_layer))
        return TopK(filled(a.top_k), filled(a.top_k_insert_at), layers)

    @property
    def memory(self) -> Memory:
        a = self.attention
        return Memory(
            frozenset(filled(a.mem_layers)),
            filled(a.mem_positionals),
            filled(a.mem_dtype),
            SteppedWindows(filled(a.n_local), filled(a.last_context_length)),
            None if a.top_k is None else Lookup(a.top_k, a.lookup_share),
            a.memory_limit_gib,
        )

    def described(self) -> list[str]:
        """What is in force, for the log."""
        attention = self.attention.model_dump(exclude_none=True, exclude={"allow_beyond_trained"})
        parts = [f"{name} {value}" for name, value in attention.items()]
        if self.mode.adapts:
            a = self.temp_lora
            parts += [
                f"Temp-LoRA rank {a.rank}, blocks of {a.block_tokens} tokens, kv_policy {a.kv_policy}, "
                f"{a.slots} slots"
            ]
        return parts

    def role(self, layer: int, has_window: bool) -> Role:
        """What the model's layer of this number is in the mode. Raises RuntimeError in mode plain.

        has_window: The model gives the layer a sliding window of its own.
        """
        roles = self.mode.layers
        if Role.KEPT in roles and layer in self.top_k.layers and not has_window:
            return Role.KEPT
        if Role.MEMORY in roles and layer in self.memory.layers:
            return Role.MEMORY
        return filled(next(iter(roles), None))


def for_model(
    config: LongContextConfig, trained_length: int, kv_block: int, *args: Any, **kwargs: Any
) -> LongContextConfig:
    """`LongContextConfig.for_model`, and whether its values go together.

    Raises LongContextError if they do not.
    """
    completed = config.for_model(trained_length, kv_block, *args, **kwargs)
    settings = Settings.of(completed)
    if settings.mode.adapts:
        settings.temp_lora.check(trained_length, kv_block)
    return completed


def active_settings(vllm_config: VllmConfig) -> Settings:
    """Of an engine that `startup.engine_args` has set up."""
    return _parsed(json.dumps(plugin_configs(vllm_config)[KEY]))


def plugin_configs(vllm_config: VllmConfig) -> dict[str, Any]:
    """vLLM's `additional_config`; empty where it is not a dict, but an object of another plugin's."""
    configs = vllm_config.additional_config
    return configs if isinstance(configs, dict) else {}


@functools.lru_cache(maxsize=8)
def _parsed(text: str) -> Settings:
    return Settings.of(LongContextConfig.parse(text))
