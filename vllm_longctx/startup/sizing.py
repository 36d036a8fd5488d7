"""What a load of sessions needs of engines, before there is any.

What a layer keeps comes from the KV specs of the table of modes, and what training needs from the trainer's
own account (`Shape`). Nothing of this machine counts. What only a run can tell is given: how long a step and
a block's training take.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, cast

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheSpec, SlidingWindowSpec

from vllm_longctx.config import KEY, LongContextConfig
from vllm_longctx.engine.kv_cache import layer_spec
from vllm_longctx.engine.lora import with_slots
from vllm_longctx.engine.memory_kv import blocks_apart
from vllm_longctx.models.properties import layer_windows, model_dtype, without_weights
from vllm_longctx.settings import Adaptation, active_settings, plugin_configs
from vllm_longctx.startup.platform import PlatformFacts
from vllm_longctx.startup.pool import KV_SHARE
from vllm_longctx.temp_lora.base_model import trained_model
from vllm_longctx.temp_lora.linear_layers import linear_layers
from vllm_longctx.temp_lora.slots import Slots
from vllm_longctx.temp_lora.training_memory import Shape

TOKEN_ID_BYTES = 4
# Of training, in forwards of the block's tokens: one, and the gradients of what goes into each layer. The
# weights are frozen. With `recompute`, one forward more.
TRAINING_FORWARDS = 2


class Place(StrEnum):
    """Whose memory something is in."""

    DEVICE = "device memory"
    HOST = "host memory"


@dataclass(frozen=True)
class Load:
    """What is asked of all engines together.

    sessions: That are open.
    learn: The share of them that learns.
    turn_tokens: Read and written in a turn.
    every_s: From one turn of a session to its next, in seconds.
    token_s: A step, in which a session gets a token, in seconds.
    block_tokens: Of a block; None where nobody can learn.
    block_s: Of a block's training, in seconds.
    """

    sessions: int
    learn: float
    turn_tokens: int
    every_s: float
    token_s: float
    block_tokens: int | None = None
    block_s: float = 0.0

    @property
    def learners(self) -> float:
        return self.sessions * self.learn

    @property
    def blocks_of_turn(self) -> float:
        return self.turn_tokens / self.block_tokens if self.block_tokens else 0.0

    @property
    def blocks_per_s(self) -> float:
        return self.learners * self.blocks_of_turn / self.every_s

    @property
    def turn_s(self) -> float:
        return self.turn_tokens * self.token_s

    @property
    def learning_turn_s(self) -> float:
        """With the waits for its training."""
        return self.turn_s + self.blocks_of_turn * self.block_s

    @property
    def learning_at_once(self) -> float:
        """Sessions that learn and have a turn under way (Little's law)."""
        return self.learners * min(self.learning_turn_s / self.every_s, 1.0)

    @property
    def at_once(self) -> float:
        """All sessions that have a turn under way."""
        others = self.sessions - self.learners
        return self.learning_at_once + others * min(self.turn_s / self.every_s, 1.0)


@dataclass(frozen=True)
class Part:
    """What one of so many engines has of a load, rounded up.

    requests: Whose turn is under way. slots: Of them, those that learn. versions: Sessions that learn.
    blocks_per_s: To be trained.
    """

    requests: int
    slots: int
    versions: int
    blocks_per_s: float

    @classmethod
    def of(cls, load: Load, engines: int) -> "Part":
        return cls(
            math.ceil(load.at_once / engines),
            math.ceil(load.learning_at_once / engines),
            math.ceil(load.learners / engines),
            load.blocks_per_s / engines,
        )


@dataclass(frozen=True)
class Item:
    """Something in an engine's memory: bytes of all, and of each request, slot and remembered version.

    formula: How they come about, for users.
    """

    name: str
    place: Place
    formula: str
    fixed: int = 0
    per_request: int = 0
    per_slot: int = 0
    per_version: int = 0

    def bytes_of(self, part: Part) -> int:
        return (
            self.fixed
            + part.requests * self.per_request
            + part.slots * self.per_slot
            + part.versions * self.per_version
        )


@dataclass(frozen=True)
class Layers:
    """The KV of one request in the layers of a kind.

    name, spec: Of the layers, and of the class of their KV spec.
    number: Of the layers.
    page: Bytes of a layer's block.
    blocks: Of a layer, while the request writes.
    in_flight: Of a layer, for the tokens of a step beside that, whoever computes them.
    host: Of a layer, in host memory.
    stock: Of a layer, without longctx.
    """

    name: str
    spec: str
    number: int
    page: int
    blocks: int
    in_flight: int
    host: int
    stock: int

    def bytes_of(self, blocks: int) -> int:
        return self.number * blocks * self.page

    def formula(self, blocks: int) -> str:
        return f"{blocks:,} blocks × {self.number} layers × {self.page:,} B"


@dataclass(frozen=True)
class Engine:
    """One engine, on one device.

    limits: Bytes of each place's memory, where they are known.
    sequences: Requests that it computes at once.
    slots: Of them, those that may learn; None for as many as there is memory for.
    items: What is in its memory.
    layers: The KV of a request.
    """

    limits: Mapping[Place, int]
    sequences: int
    slots: int | None
    items: Sequence[Item]
    layers: Sequence[Layers]

    @property
    def kv(self) -> int:
        """Bytes of a request in the KV cache, while it writes."""
        return sum(kind.bytes_of(kind.blocks) for kind in self.layers)

    @property
    def kv_stock(self) -> int:
        return sum(kind.bytes_of(kind.stock) for kind in self.layers)

    def stock(self) -> "Engine":
        """stock vLLM's engine on the same device, where nobody learns."""
        layers = [replace(kind, blocks=kind.stock, in_flight=0, host=0) for kind in self.layers]
        others = [item for item in self.items if item.name in ("weights", "token ids")]
        return replace(self, slots=None, items=[*others, *_kv_items(layers)], layers=layers)

    @property
    def kv_host(self) -> int:
        """Bytes of a request in host memory."""
        return sum(kind.bytes_of(kind.host) for kind in self.layers)

    def used(self, part: Part, place: Place) -> int:
        return sum(item.bytes_of(part) for item in self.items if item.place is place)

    def idle_sessions(self, part: Part) -> int:
        """Whose KV the rest of the KV cache can keep from one turn to the next."""
        left = self.limits[Place.DEVICE] - self.used(part, Place.DEVICE)
        return max(int(KV_SHARE * left) // self.kv, 0)

    def uses(self, part: Part, block_s: float) -> dict[str, float]:
        """The share of each resource that a part of a load uses; 1 is all of it."""
        shares = {str(place): self.used(part, place) / limit for place, limit in self.limits.items()}
        shares["requests at once"] = part.requests / self.sequences
        shares["training"] = part.blocks_per_s * block_s
        if self.slots is not None:
            shares["adaptation.slots"] = part.slots / self.slots
        return shares

    def engines(self, load: Load) -> int | None:
        """The least number of engines that hold a load; None if no number does."""

        def hold(engines: int) -> bool:
            return max(self.uses(Part.of(load, engines), load.block_s).values()) <= 1

        low, high = 1, max(load.sessions, math.ceil(load.blocks_per_s * load.block_s))
        if not hold(high):
            return None
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if hold(middle) else (middle + 1, high)
        return low


def engine_of(
    config: VllmConfig, platform: PlatformFacts, limits: Mapping[Place, int], slots: int | None = None
) -> Engine:
    """An engine of this configuration on one device of a platform, which need not be here.

    limits: Bytes of each place's memory, where they are known.
    slots: The user's own; None if the user has not said.

    Raises ValueError for a model that transformers does not know.
    """
    model, layers = config.model_config, layers_of(config)
    if (made := without_weights(model)) is None:
        raise ValueError(f"transformers does not know {model.model}, so its weights cannot be counted")
    parameters, itemsize = made.num_parameters(), model_dtype(model).itemsize
    formula = f"{parameters:,} parameters × {itemsize} B"
    items = [Item("weights", Place.DEVICE, formula, fixed=parameters * itemsize), *_kv_items(layers)]
    if (settings := adaptation_on(config, platform)) is not None:
        items += _learning_items(config, settings, platform)
    sequences, longest = config.scheduler_config.max_num_seqs, model.max_model_len
    formula = f"max_num_seqs {sequences:,} × {longest:,} tokens × {TOKEN_ID_BYTES} B"
    items.append(Item("token ids", Place.HOST, formula, fixed=sequences * longest * TOKEN_ID_BYTES))
    if platform.device == "cpu":  # which has one memory for all
        items = [replace(item, place=Place.DEVICE) for item in items]
        limits = {Place.DEVICE: limits[Place.DEVICE]}
    return Engine(limits, sequences, slots, items, layers)


def adaptation_on(config: VllmConfig, platform: PlatformFacts) -> Adaptation | None:
    """Temp-LoRA of an engine on this platform; None without. Its trainer is where the user, or it, says."""
    given = LongContextConfig.parse(plugin_configs(config)[KEY]).adaptation
    if given is None:
        return None
    trainer = given.trainer.model_copy(update={"device": given.trainer.device or platform.device})
    return Adaptation.of(given.model_copy(update={"trainer": trainer}))


def specs_of(config: VllmConfig) -> Counter[tuple[str, KVCacheSpec, AttentionSpec]]:
    """How many layers are of each kind: its name, its KV spec by the mode's row, and vLLM's own."""
    settings, model = active_settings(config), config.model_config
    common: dict[str, Any] = {
        "block_size": config.cache_config.block_size,
        "num_kv_heads": model.get_num_kv_heads(config.parallel_config),
        "head_size": model.get_head_size(),
        "dtype": model_dtype(model),
    }
    kinds: Counter[tuple[str, KVCacheSpec, AttentionSpec]] = Counter()
    for number, window in enumerate(layer_windows(model)):
        stock: AttentionSpec = FullAttentionSpec(**common)
        if window is not None:
            stock = SlidingWindowSpec(**common, sliding_window=window)
        role, spec = "full", cast(KVCacheSpec, stock)
        if not settings.mode.is_plain:
            role = settings.role(number, window is not None)
            spec = layer_spec(settings.mode.layers[role], stock, config)
        kinds[role if window is None else f"{role} ({window:,} tokens)", spec, stock] += 1
    return kinds


def layers_of(config: VllmConfig) -> list[Layers]:
    """The KV of a request of max_model_len tokens."""
    layers = []
    for (name, spec, stock), number in specs_of(config).items():
        kept, whole = _blocks(spec, config, in_flight=1), _blocks(stock, config, in_flight=1)
        reading = _blocks(spec, config, config.max_in_flight_tokens)
        host = whole if blocks_apart(spec) else 0
        page = spec.page_size_bytes
        layers.append(Layers(name, type(spec).__name__, number, page, kept, reading - kept, host, whole))
    return layers


def _blocks(spec: KVCacheSpec, config: VllmConfig, in_flight: int) -> int:
    """Of one request of max_model_len tokens. in_flight: Its tokens under way."""
    longest = config.model_config.max_model_len
    if isinstance(spec, SlidingWindowSpec):
        most = spec.max_admission_blocks_per_request(in_flight, longest)
        return min(most, cdiv(longest, spec.block_size))
    return spec.max_memory_usage_bytes(config) // spec.page_size_bytes


def _kv_items(layers: Sequence[Layers]) -> Iterator[Item]:
    for kind in layers:
        formula = f"requests × {kind.formula(kind.blocks)} ({kind.spec})"
        yield Item(f"KV, {kind.name} layers", Place.DEVICE, formula, per_request=kind.bytes_of(kind.blocks))
        if kind.host:
            formula = f"requests × {kind.formula(kind.host)} (attention.memory_limit_gib)"
            yield Item(
                f"memory, {kind.name} layers", Place.HOST, formula, per_request=kind.bytes_of(kind.host)
            )
    in_flight = sum(kind.bytes_of(kind.in_flight) for kind in layers)
    each = sum(kind.bytes_of(kind.blocks) for kind in layers)
    formula = " + ".join(kind.formula(kind.in_flight) for kind in layers if kind.in_flight)
    if in_flight:
        yield Item("KV, tokens of a step", Place.DEVICE, formula, fixed=in_flight)
    more = 1 / KV_SHARE - 1
    yield Item(
        "activations",
        Place.DEVICE,
        f"{more:.2f} × all KV, an estimate",
        fixed=int(more * in_flight),
        per_request=int(more * each),
    )


def _learning_items(config: VllmConfig, settings: Adaptation, platform: PlatformFacts) -> Iterator[Item]:
    model = trained_model(config, settings.trainer)
    shape, lora = Shape.of(model), with_slots(config).lora_config
    assert lora is not None
    is_beside = settings.trainer.device == platform.device
    shares = is_beside and platform.trains_beside_engine
    trainer = Place.DEVICE if is_beside else Place.HOST
    per_rank = f"{shape.adapted_features:,} features in and out"
    itemsize = model_dtype(config.model_config).itemsize
    yield Item(
        "LoRA layers",
        Place.DEVICE,
        f"slots × rank {lora.max_lora_rank} × {per_rank} × {itemsize} B",
        per_slot=lora.max_lora_rank * shape.adapted_features * itemsize,
    )
    yield Item(
        "slots",
        Place.DEVICE if shares else Place.HOST,
        f"slots × 2 banks × rank {settings.max_rank} × {per_rank} × 4 B, in whole pages",
        per_slot=Slots.size(linear_layers(model), settings.max_rank, 1),
    )
    empty = settings.model_copy(update={"slots": 0, "cache_gib": 0.0})
    fixed = shape.training_bytes(empty)
    yield Item(
        "trainer, adapters",
        trainer,
        f"slots × (weights and 2 moments) × rank {settings.max_rank} × {per_rank} × 4 B",
        per_slot=shape.training_bytes(empty.model_copy(update={"slots": 1})) - fixed,
    )
    example = settings.train_context_tokens + settings.block_tokens + 1
    kept = "activations of one layer" if settings.trainer.recompute else "activations of all layers"
    formula = f"{kept} and logits of {example:,} tokens, one adapter's gradients, CUDA's or torch's own"
    yield Item("trainer, a block", trainer, formula, fixed=fixed)
    formula = "none: it uses the engine's" if shares else "a copy of its own"
    own = 0 if shares else model.num_parameters() * itemsize
    yield Item("trainer, weights", trainer, formula, fixed=own)
    yield Item(
        "remembered versions",
        Place.HOST,
        f"sessions that learn × (weights and 2 moments) × rank {settings.rank} × {per_rank} × 4 B "
        "(adaptation.cache_gib)",
        per_version=shape.version_bytes(settings),
    )


def training_s(config: VllmConfig, settings: Adaptation, tflops: float) -> tuple[float, str]:
    """Seconds of a block's training by the work in the model's linear layers, and the formula.

    tflops: What training reaches, in 10^12 operations a second.
    """
    parameters = trained_model(config).num_parameters()
    tokens = settings.train_context_tokens + settings.block_tokens + 1
    forwards = TRAINING_FORWARDS + settings.trainer.recompute
    seconds = settings.epochs * forwards * 2 * parameters * tokens / (tflops * 1e12)
    formula = (
        f"{settings.epochs} epochs × {forwards} forwards × 2 × {parameters:,} parameters × {tokens:,} tokens "
        f"/ {tflops:g} TFLOP/s"
    )
    return seconds, formula
