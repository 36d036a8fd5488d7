"""LoRA in a worker, on any device: users' adapters as in vLLM, and beside them the adapter slots.

Slots are adapter slots here. An index is the place of an adapter in the LoRA layers' stacked weights (vLLM's
`lora_index`). A number is the id by which vLLM's managers in a worker know an adapter.

The engine's `lora_config` is what the user asked for, and all that the front end and the scheduler know.
Workers have `with_slots` of it. Their LoRA layers have indices for users' adapters first, which vLLM's caches
manage, and after them one index for each slot, which the caches never see.

A step comes in by `Adapts.begin_step`. vLLM's model runner then calls `SlotLoRAManager.set_active_adapters`,
which copies the versions of the step from the slots to their indices.
"""

import dataclasses
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any, get_args

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.config.lora import LoRAConfig, MaxLoRARanks
from vllm.distributed.parallel_state import get_tp_group
from vllm.logger import init_logger
from vllm.lora.layers import LoRAMapping
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import AdapterLRUCache, LRUCacheLoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.utils import is_in_target_modules
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.models import supports_lora
from vllm.v1.core.sched.output import SchedulerOutput

from vllm_longctx.engine.adapted_layers import AdaptedLayers, adapted_layers
from vllm_longctx.engine.step import SlotUse, StepInfo, Weights
from vllm_longctx.settings import active_settings
from vllm_longctx.temp_lora import base_model
from vllm_longctx.temp_lora.linear_layers import experts, linear_layers
from vllm_longctx.temp_lora.slots import Slots

logger = init_logger("vllm.longctx")

EMPTY = StepInfo()


class LoRAConfigWithSlots(LoRAConfig):
    """The configuration of LoRA layers whose last indices are the slots'.

    Its `target_modules` are the users', and once the model is loaded, also the layers that slots adapt.

    slots: Number of slots.
    users: What the user asked for. None without `enable_lora`.
    """

    slots: int
    users: LoRAConfig | None


def with_slots(vllm_config: VllmConfig) -> VllmConfig:
    """The configuration of a worker's LoRA layers. Without Temp-LoRA, the configuration itself."""
    settings, users = active_settings(vllm_config), vllm_config.lora_config
    if not settings.mode.adapts:
        return vllm_config
    adaptation = settings.temp_lora
    base = users or LoRAConfig(target_modules=[])
    assert base.max_cpu_loras is not None
    indices = adaptation.slots + (0 if users is None else users.max_loras)
    rank = max(adaptation.max_rank, 1 if users is None else users.max_lora_rank)
    values = {field.name: getattr(base, field.name) for field in dataclasses.fields(LoRAConfig)}
    values["max_loras"], values["max_cpu_loras"] = indices, max(indices, base.max_cpu_loras)
    values["max_lora_rank"] = next(allowed for allowed in get_args(MaxLoRARanks) if allowed >= rank)
    lora_config = LoRAConfigWithSlots(**values)
    lora_config.slots, lora_config.users = adaptation.slots, users
    lora_config.verify_with_model_config(vllm_config.model_config)
    vllm_config = copy(vllm_config)
    vllm_config.lora_config = lora_config
    return vllm_config


class NumberedRequest(LoRARequest):
    """vLLM's, with the worker's number as its id.

    Equal where the numbers are, since two adapters may have one name.
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NumberedRequest) and self.lora_int_id == other.lora_int_id

    def __hash__(self) -> int:
        return self.lora_int_id


class SwapTimes:
    """How long swaps take. On a GPU what they take there, known once it has done them.

    seconds: Of those that are known.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._under_way: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self.seconds: list[float] = []

    @contextmanager
    def timed(self) -> Iterator[None]:
        if self._on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._under_way.append((begin, end))
        else:
            started = time.perf_counter()
            yield
            self.seconds.append(time.perf_counter() - started)

    def take(self) -> list[float]:
        """Of the swaps that are done and were not taken yet. Does not wait."""
        while self._under_way and self._under_way[0][1].query():
            begin, end = self._under_way.popleft()
            self.seconds.append(begin.elapsed_time(end) / 1000)
        taken, self.seconds = self.seconds, []
        return taken


class AdapterManager(LRUCacheLoRAModelManager):
    """vLLM's, with indices for users' adapters, as many as they asked for, and after them those of the slots.

    Slot s has number s + 1. While vLLM warms up, all indices are for its dummy adapters.

    num_slots: Number of slots; 0 without Temp-LoRA.
    users: The user's LoRA configuration. None without `enable_lora`.
    warming_up: Whether vLLM warms up.
    slot_modules: LoRA layers that are there for slots only: users' adapters have no weights for them.
    """

    lora_index_to_id: list[int | None]

    def __init__(self, *args: Any, lora_config: LoRAConfig, **kwargs: Any):
        self.num_slots: int = 0
        self.users: LoRAConfig | None = lora_config
        if isinstance(lora_config, LoRAConfigWithSlots):
            self.num_slots, self.users = lora_config.slots, lora_config.users
        self.warming_up = True
        super().__init__(*args, lora_config=lora_config, **kwargs)  # type: ignore[misc]  # args end before it
        targets = None if self.users is None else self.users.target_modules
        self.slot_modules = [
            module
            for name, module in self.modules.items()
            if not is_in_target_modules(name, targets, self.packed_modules_mapping)
        ]
        self.assign_indices(warming_up=False)

    @property
    def lora_slots(self) -> int:
        return self.lora_config.max_loras - (0 if self.warming_up else self.num_slots)

    @property
    def capacity(self) -> int:
        lora_config = self.lora_config if self.warming_up else self.users
        return 0 if lora_config is None else lora_config.max_cpu_loras or 0

    def assign_indices(self, warming_up: bool) -> None:
        """Empty all indices.

        Assign them to dummy adapters (`warming_up`), or to users' adapters and slots.
        """
        super().remove_all_adapters()
        self.warming_up = warming_up
        self._registered_adapters = AdapterLRUCache(self.capacity, self.deactivate_adapter)
        self._active_adapters = AdapterLRUCache(self.lora_slots, self._deactivate_adapter)
        slots = [] if warming_up else [slot + 1 for slot in range(self.num_slots)]
        self.lora_index_to_id = [*[None] * self.lora_slots, *slots]

    def index_of_slot(self, slot: int) -> int:
        return self.lora_config.max_loras - self.num_slots + slot

    def remove_all_adapters(self) -> None:
        self.assign_indices(warming_up=False)

    def activate_adapter(self, lora_id: int) -> bool:
        activated = super().activate_adapter(lora_id)
        if activated and not self.warming_up:
            for module in self.slot_modules:
                module.reset_lora(self.lora_index_to_id.index(lora_id))
        return activated


class SlotLoRAManager(LRUCacheWorkerLoRAManager):
    """vLLM's manager of users' adapters, and the slots, whose weights are swapped in place before a forward.

    A user's adapter that cannot be loaded for a step fails the requests that have it, not the step.

    step: What the current step's requests compute with.
    in_layers: By slot, the owner and the weights that the layers have for it.
    adapted: The layers that slots adapt.
    slots: The shared memory of the slots. None until the scheduler has sent it.
    device_slots: Their memory on this GPU, uint8. None where it is host memory.
    swap_times: Of the swaps.
    loaded: Whether all ranks have loaded the last user's adapter.
    failed: By number, why a user's adapter could not be loaded for this step.
    """

    _manager_cls = AdapterManager
    _adapter_manager: AdapterManager

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.step = EMPTY
        self.in_layers: dict[int, tuple[int, Weights]] = {}
        self.adapted = AdaptedLayers()
        self.slots: Slots | None = None
        self.device_slots: Tensor | None = None
        self.swap_times = SwapTimes(self.device)
        self.loaded = False
        self.failed: dict[int, str] = {}

    def create_lora_manager(self, model: nn.Module, vllm_config: VllmConfig) -> Any:
        wrapped = super().create_lora_manager(model, vllm_config)
        if self._adapter_manager.users is not None:
            self.lora_config: LoRAConfig = self._adapter_manager.users  # the limits of users' adapters
        return wrapped

    # --- the users' adapters ---------------------------------------------------------------------------

    def _load_adapter(self, lora_request: LoRARequest) -> LoRAModel:
        """Load a user's adapter on all tensor-parallel ranks, or on none."""
        self.loaded, adapter, error = False, None, None
        try:
            adapter = super()._load_adapter(lora_request)
        except Exception as e:
            error = e
        _raise_on_all_ranks(error)
        assert adapter is not None
        self.loaded = True
        return adapter

    def add_adapter(self, lora_request: LoRARequest) -> bool:
        """Put a user's adapter into the layers on all tensor-parallel ranks, or on none."""
        number = lora_request.lora_int_id
        if number in self.list_adapters() and not lora_request.load_inplace:
            return super().add_adapter(lora_request)
        added, error = False, None
        try:
            added = super().add_adapter(lora_request)
        except Exception as e:
            if not self.loaded:  # on no rank; the layers are as before
                raise
            error = e
        try:
            _raise_on_all_ranks(error)
        except Exception:
            self.remove_adapter(number)  # some of its weights may be in the layers
            raise
        return added

    def _apply_adapters(self, lora_requests: set[LoRARequest]) -> None:
        if self._adapter_manager.warming_up:
            super()._apply_adapters(lora_requests)
            return
        # All ranks in one order.
        for request in sorted(lora_requests, key=lambda request: request.lora_int_id):
            try:
                super()._apply_adapters({request})
            except Exception as e:
                name, path = request.lora_name, request.lora_path
                logger.error("longctx: the adapter %r (%s) cannot be used: %s", name, path, e)
                self.failed[request.lora_int_id] = f"the adapter {name!r} cannot be used: {e}"

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        if not self._adapter_manager.warming_up:  # vLLM may warm up between steps, too
            self._assign_indices(warming_up=True)
        with super().dummy_lora_cache():
            yield

    def remove_all_adapters(self) -> None:
        self._assign_indices(warming_up=False)

    def _assign_indices(self, warming_up: bool) -> None:
        self._adapter_manager.assign_indices(warming_up)
        self.in_layers.clear()

    # --- a step ----------------------------------------------------------------------------------------

    def set_active_adapters(self, requests: set[Any], mapping: Any | None) -> None:
        if self._adapter_manager.warming_up:
            super().set_active_adapters(requests, mapping)
            return
        num_slots = self._adapter_manager.num_slots
        self._apply_adapters({request for request in requests if request.lora_int_id > num_slots})
        if mapping is not None:
            if self.failed:  # tokens of these are computed without an adapter; their outputs are not sent
                mapping = copy(mapping)
                mapping.index_mapping = self._without_failed(mapping.index_mapping)
                mapping.prompt_mapping = self._without_failed(mapping.prompt_mapping)
            self._adapter_manager.set_adapter_mapping(mapping)
        for use in self.step.slots.values():
            if self.in_layers.get(use.slot) != (use.owner, use.weights):
                with self.swap_times.timed():
                    self._swap(use)

    def _without_failed(self, numbers: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(0 if number in self.failed else number for number in numbers)

    def free(self, slots: Iterable[int]) -> None:
        """Take the weights of freed slots out of the layers."""
        for slot in slots:
            if self.in_layers.pop(slot, None) is not None:
                for module in self._adapter_manager.modules.values():
                    module.reset_lora(self._adapter_manager.index_of_slot(slot))

    def _swap(self, use: SlotUse) -> None:
        """Put the weights that the scheduler has approved into the layers.

        Raises StaleSlot if the slot has others.
        """
        manager, index = self._adapter_manager, self._adapter_manager.index_of_slot(use.slot)
        if use.weights.bank is None or use.slot not in self.in_layers:
            for module in manager.modules.values():
                module.reset_lora(index)
        if use.weights.bank is not None:
            self._copy(use, use.weights.bank, index)
        self.in_layers[use.slot] = (use.owner, use.weights)

    def _copy(self, use: SlotUse, bank: int, index: int) -> None:
        """From a bank into the layers. Raises StaleSlot as `_swap`."""
        assert self.slots is not None
        with self.slots.read(use.slot, bank, use.owner, use.weights.version) as weights:
            for module, pairs in self._adapted_layers(weights):
                a, b = zip(*(pair or (None, None) for pair in pairs), strict=True)
                if len(pairs) > 1:
                    module.set_lora(index, list(a), list(b))
                else:
                    module.set_lora(index, a[0], b[0])

    def _adapted_layers(
        self, weights: Mapping[str, tuple[Tensor, Tensor]]
    ) -> Iterator[tuple[Any, list[tuple[Tensor, Tensor] | None]]]:
        """The LoRA layers that slots adapt, each with the weights of its parts."""
        for name, parts in self.adapted.parts.items():
            yield (
                self._adapter_manager.modules[name],
                [None if part is None else weights[part] for part in parts],
            )


def slices(
    module: Any, pairs: Iterable[tuple[Tensor, Tensor] | None]
) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor, Tensor]]:
    """For each slice of a LoRA layer that has an adapter: its A and B, and the layer's own for all indices.

    pairs: Of each part. Its B [rows, rank] may be that of several slices, one below the other.
    """
    buffers = zip(module.lora_a_stacked, module.lora_b_stacked, strict=True)
    for pair in pairs:
        if pair is None:
            next(buffers)
            continue
        a, b = pair
        first = 0
        while first < len(b):
            a_buffer, b_buffer = next(buffers)
            rows = b_buffer.shape[-2]
            yield (a, b[first : first + rows]), a_buffer, b_buffer
            first += rows


def _raise_on_all_ranks(error: Exception | None) -> None:
    """Raise an error on every tensor-parallel rank if one rank has one. Each rank must call this."""
    group = get_tp_group()
    if group.world_size > 1:
        failed = torch.tensor(int(error is not None))
        torch.distributed.all_reduce(failed, group=group.cpu_group)
        if failed and error is None:
            raise RuntimeError("another rank cannot load it; see its log")
    if error is not None:
        raise error


class Adapts:
    """Adapters of a worker. Mixed into a model runner of vLLM's, before it.

    Users' ids of adapters are mapped to the worker's numbers here. The first numbers are those of the slots.
    So no user's id is that of a slot, and none is too large for vLLM's arrays.

    step: What the current step's requests compute with.
    lora_manager_class: The platform's manager.
    lora_manager: The manager, once the model is loaded with LoRA layers.
    numbers: By the id that the user gave, the number of each user's adapter.
    """

    step = EMPTY
    lora_manager_class: type[SlotLoRAManager] = SlotLoRAManager
    lora_manager: SlotLoRAManager
    lora_config: LoRAConfig | None
    vllm_config: VllmConfig

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model as without LoRA where only slots adapt: they never adapt experts.

        Else experts would take a kernel that goes with LoRA, which vLLM does not have on the CPU.
        """
        lora_config = self.vllm_config.lora_config
        if isinstance(lora_config, LoRAConfigWithSlots) and lora_config.users is None:
            self.vllm_config.lora_config = None
        super().load_model(*args, **kwargs)  # type: ignore[misc]  # of the runner behind
        self.vllm_config.lora_config = lora_config

    def load_lora_model(self, model: nn.Module, vllm_config: VllmConfig, device: torch.device) -> nn.Module:
        if not supports_lora(model):
            raise ValueError(f"vLLM's {type(model).__name__} has no LoRA support")
        if vllm_config.lora_config is None:  # see `load_model`
            vllm_config.lora_config = self.lora_config
        lora_config, adapted = vllm_config.lora_config, AdaptedLayers()
        if isinstance(lora_config, LoRAConfigWithSlots):
            trained = base_model.trained_model(vllm_config)
            adapted = adapted_layers(model, linear_layers(trained), lora_config)
            if left_out := experts(trained):
                adapted.left_out["experts have no adapters"] = left_out
            if lora_config.target_modules is not None:  # else vLLM wraps all layers that it can
                lora_config.target_modules = [*lora_config.target_modules, *adapted.parts]
        self.lora_manager = self.lora_manager_class(vllm_config, device, model.embedding_modules)
        self.lora_manager.adapted = adapted
        self.numbers: dict[int, int] = {}
        return self.lora_manager.create_lora_manager(model, vllm_config)

    def leave_out_adapters(self, tokens: int) -> None:
        """Have the next forward of so many tokens computed by the base model, also before the first step."""
        if hasattr(self, "lora_manager"):
            nothing = (0,) * tokens
            self.lora_manager.set_active_adapters(set(), LoRAMapping(nothing, nothing, is_prefill=True))

    def begin_step(self, scheduler_output: SchedulerOutput, info: StepInfo) -> None:
        """Before a forward: take what this step's requests compute with, and give each its number."""
        self.step = info
        if not hasattr(self, "lora_manager"):
            return
        manager = self.lora_manager
        if self.step.slots_memory is not None and manager.slots is None:
            manager.slots = Slots.open(**vars(self.step.slots_memory), device_memory=manager.device_slots)
        manager.step, manager.failed = self.step, {}
        manager.free(self.step.freed_slots)
        for new in scheduler_output.scheduled_new_reqs:
            if (use := self.step.slots.get(new.req_id)) is not None:
                new.lora_request = NumberedRequest(f"slot {use.slot}", use.slot + 1, "in memory")
            elif new.lora_request is not None:
                new.lora_request = self._numbered(new.lora_request)

    def _numbered(self, request: LoRARequest) -> NumberedRequest:
        first = self.lora_manager._adapter_manager.num_slots + 1
        number = self.numbers.setdefault(request.lora_int_id, first + len(self.numbers))
        values = {name: getattr(request, name) for name in request.__struct_fields__}
        return NumberedRequest(**{**values, "lora_int_id": number})

    def add_lora(self, lora_request: LoRARequest) -> bool:
        return self._users_manager().add_adapter(self._numbered(lora_request))

    def remove_lora(self, lora_id: int) -> bool:
        manager = self._users_manager()
        return lora_id in self.numbers and manager.remove_adapter(self.numbers[lora_id])

    def pin_lora(self, lora_id: int) -> bool:
        manager, number = self._users_manager(), self.numbers.get(lora_id, 0)
        if number not in manager.list_adapters():
            raise ValueError(f"Pinning failed. LoRA {lora_id} is not registered.")
        return manager.pin_adapter(number)

    def list_loras(self) -> set[int]:
        loaded = self._users_manager().list_adapters()
        return {lora_id for lora_id, number in self.numbers.items() if number in loaded}

    def _users_manager(self) -> SlotLoRAManager:
        """The manager, for users. Raises RuntimeError, as vLLM does, where the user has not enabled LoRA."""
        if not hasattr(self, "lora_manager") or self.lora_manager._adapter_manager.users is None:
            raise RuntimeError("LoRA is not enabled. Use --enable-lora to enable LoRA.")
        return self.lora_manager

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        """Raises RuntimeError where there is a trainer: it has the old weights and keeps them."""
        if not active_settings(self.vllm_config).mode.adapts:
            super().reload_weights(*args, **kwargs)  # type: ignore[misc]  # of the runner behind
            return
        raise RuntimeError(
            "longctx: the weights of an engine with adaptation cannot be changed, because its trainer has "
            "a copy of them; start it anew with the other weights"
        )

    def take_swap_seconds(self) -> list[float]:
        if not hasattr(self, "lora_manager"):
            return []
        return self.lora_manager.swap_times.take()

    def take_failed_adapters(self) -> dict[int, str]:
        """By the id that the user gave, why an adapter could not be loaded for this step."""
        failed = self.lora_manager.failed if hasattr(self, "lora_manager") else {}
        if not failed:
            return {}
        return {lora_id: failed[number] for lora_id, number in self.numbers.items() if number in failed}
