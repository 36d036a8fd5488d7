"""What an engine runs: one row per mode. A new mode is a new row and the layers that its roles need.

Nothing else in this package works out which mode an engine is in. Classes are named by their paths, as vLLM
names its own, so that this table imports nothing and a process loads only what it runs. Both platforms'
folders have the same files and classes, so a row names each class once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module
from typing import Any


class Role(StrEnum):
    """What the queries of a layer see; which class makes a layer of it, below a platform's folder, is in
    `BACKENDS`.
    """

    SLIDING = "sliding"  #: the first tokens and a window that slides with the query (Λ attention)
    KEPT = "kept"  #: as sliding, and of all tokens between them, which the layer keeps, the best top_k
    WINDOW = "window"  #: the keys since the query's window, or its pass, began
    MEMORY = "memory"  #: as window, and all tokens before it, or the best of them


BACKENDS: Mapping[Role, str] = {
    Role.SLIDING: "sliding.LambdaBackend",
    Role.KEPT: "top_k.TopKBackend",
    Role.WINDOW: "window.WindowBackend",
    Role.MEMORY: "memory.MemoryBackend",
}


@dataclass(frozen=True)
class Mode:
    """A row.

    name: For users, in the log and in `vllm-longctx doctor`.
    methods, top_k, adapts: The configuration that this is the mode of: `attention.method`, whether
        `attention.top_k` is set beside a sliding window, and whether there is an `adaptation`. Rows of one
        method differ in their layers, too: those with memory layers are for models that have any.
    scheduler: In `vllm_longctx.scheduling`; asynchronous scheduling takes its twin with the prefix `Async`.
        Empty: vLLM's own.
    layers: The roles that layers have, each with its KV spec in `vllm_longctx.engine.kv_cache`.
    runner: Below a platform's folder: what vLLM's model runner becomes.
    windows: In `vllm_longctx.windows`: how they move, and what follows from it.
    checks: In `vllm_longctx.startup.checks`: what refuses models, and settings of vLLM's, that do not go with
        it.
    grows: Some layers keep the KV of the whole text, so vLLM fits max_model_len to the pool.
    extends: Every request may go past the trained length, also one that does not adapt.
    caches_prefixes: vLLM's prefix caching is sound.
    asked_for: What the user wrote to get it, for messages.
    takes_drafts: Speculative decoding goes with it: a rejected token leaves nothing behind.
    takes_parts: A prompt may come in parts: nothing depends on where it ends. Requests that adapt never may.
    """

    name: str
    methods: tuple[str, ...]
    scheduler: str
    layers: Mapping[Role, str]
    runner: str
    windows: str
    asked_for: str
    checks: tuple[str, ...] = ()
    top_k: bool = False
    adapts: bool = False
    grows: bool = False
    extends: bool = True
    caches_prefixes: bool = True
    takes_drafts: bool = False
    takes_parts: bool = False

    @property
    def is_plain(self) -> bool:
        """vLLM is left as it is."""
        return not self.scheduler

    @property
    def slides(self) -> bool:
        """There are layers whose windows slide with the query."""
        return Role.SLIDING in self.layers

    @property
    def scheduler_paths(self) -> tuple[str, str]:
        """Of the scheduler, and of its asynchronous twin."""
        module, _, name = self.scheduler.rpartition(".")
        path = f"vllm_longctx.scheduling.{module}"
        return f"{path}.{name}", f"{path}.Async{name}"


SLIDING_METHODS = ("lm_infinite", "streaming")
BASE_RUNNER = "runner.LongContextRunner"

MODES = (
    Mode("plain", ("none",), "", {}, "", "Windows", "attention.method none", extends=False, takes_parts=True),
    Mode(
        "sliding",
        SLIDING_METHODS,
        "scheduler.LongContextScheduler",
        {Role.SLIDING: "LambdaSpec"},
        BASE_RUNNER,
        windows="SlidingWindows",
        asked_for="attention.method lm_infinite or streaming",
        takes_drafts=True,
        takes_parts=True,
    ),
    Mode(
        "top-k",
        SLIDING_METHODS,
        "memory.TopKScheduler",
        {Role.SLIDING: "LambdaSpec", Role.KEPT: "MiddleSpec"},
        "top_k_runner.TopKRunner",
        windows="SlidingWindows",
        asked_for="attention.top_k",
        checks=("check_lookup", "check_runner"),
        top_k=True,
        grows=True,
        # keys that leave the window of a request that writes are un-rotated, wherever it ends
        caches_prefixes=False,
    ),
    Mode(
        "memory",
        ("focused",),
        "memory.MemoryScheduler",
        {Role.WINDOW: "WindowSpec", Role.MEMORY: "MemorySpec"},
        "memory_runner.MemoryRunner",
        windows="MemoryWindows",
        asked_for="attention.method focused",
        checks=("check_lookup", "check_runner"),
        grows=True,
    ),
    Mode(
        "windows",
        ("focused",),
        "memory.MemoryScheduler",
        {Role.WINDOW: "WindowSpec"},
        "memory_runner.MemoryRunner",
        windows="DroppedWindows",
        asked_for="attention.mem_layers []",
        checks=("check_lookup", "check_runner"),
    ),
    Mode(
        "temp-lora",
        ("none",),
        "temp_lora.TempLoraScheduler",
        {Role.WINDOW: "SteppedSpec"},
        "passes_runner.PassesRunner",
        windows="Passes",
        asked_for="adaptation with attention.method none",
        checks=("check_adaptation", "check_runner"),
        adapts=True,
        extends=False,
    ),
    Mode(
        "temp-lora over sliding",
        SLIDING_METHODS,
        "temp_lora.TempLoraScheduler",
        {Role.SLIDING: "LambdaSpec"},
        BASE_RUNNER,
        windows="SlidingWindows",
        asked_for="adaptation",
        checks=("check_adaptation",),
        adapts=True,
        takes_parts=True,
    ),
    Mode(
        "temp-lora over top-k",
        SLIDING_METHODS,
        "together.TempLoraTopKScheduler",
        {Role.SLIDING: "LambdaSpec", Role.KEPT: "MiddleSpec"},
        "top_k_runner.TopKRunner",
        windows="SlidingWindows",
        asked_for="adaptation with attention.top_k",
        checks=("check_adaptation", "check_lookup", "check_together"),
        top_k=True,
        adapts=True,
        grows=True,
        caches_prefixes=False,
    ),
    Mode(
        "temp-lora over memory",
        ("focused",),
        "together.TempLoraMemoryScheduler",
        {Role.WINDOW: "WindowSpec", Role.MEMORY: "MemorySpec"},
        "memory_runner.MemoryRunner",
        windows="MemoryWindows",
        asked_for="adaptation with attention.method focused",
        checks=("check_adaptation", "check_lookup", "check_together"),
        adapts=True,
        grows=True,
        caches_prefixes=False,
    ),
    Mode(
        "temp-lora over windows",
        ("focused",),
        "together.TempLoraMemoryScheduler",
        {Role.WINDOW: "WindowSpec"},
        "memory_runner.MemoryRunner",
        windows="DroppedWindows",
        asked_for="adaptation with attention.mem_layers []",
        checks=("check_adaptation", "check_lookup", "check_together"),
        adapts=True,
        caches_prefixes=False,
    ),
)
SCHEDULERS = tuple(path for mode in MODES if not mode.is_plain for path in mode.scheduler_paths)


def mode_of(method: str, top_k: bool, adapts: bool, remembers: bool = True) -> Mode | None:
    """The mode of a configuration; None if there is none for it.

    top_k: means something beside a sliding window only. remembers: there are memory layers; means something
    with the method focused only.
    """
    top_k, remembers = top_k and method in SLIDING_METHODS, remembers and method == "focused"
    asked = (adapts, top_k, remembers)
    rows = (m for m in MODES if method in m.methods)
    return next((m for m in rows if (m.adapts, m.top_k, Role.MEMORY in m.layers) == asked), None)


def load(path: str) -> Any:
    """The class or function of a path below this package."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(f"vllm_longctx.{module}"), name)
