"""What each platform does for a worker, under the same names; `engine.worker` says when."""

from typing import Any, Protocol

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_longctx.engine.layers import LayerSite
from vllm_longctx.engine.rows import StepTimes
from vllm_longctx.engine.step import StepInfo


class Platform(Protocol):
    """The workers of `vllm_longctx.cpu` and `vllm_longctx.cuda`.

    All is called in the worker's process, by its one thread, in this order: `new_rows` and `make_layer` once
    the weights are loaded, before anything is computed or compiled; `beside_layers` and `workers_on_device`
    where vLLM takes what memory is left; `bind_kv_cache` once the KV cache is there; then `begin_step` for
    each step.
    """

    def new_rows(self) -> StepTimes:
        """What the runner tells metadata builders of each step: the platform's `StepRows`, one for all
        layers.
        """
        ...

    def make_layer(self, site: LayerSite) -> None:
        """Make the layer what its role says: replace or complete `site.layer.impl`.

        By the class that `modes.BACKENDS` names, whose `make_layer` does it.
        """
        ...

    def beside_layers(self, available: int) -> int:
        """Bytes for the KV cache, beside what layers need that vLLM has not measured.

        available: Bytes that vLLM would take. Raises LongContextError if nothing is left.
        """
        ...

    def workers_on_device(self) -> int:
        """Workers that have one memory, in which a trainer may be, too."""
        ...

    def bind_kv_cache(self, kv_cache_config: KVCacheConfig) -> None:
        """Take what layers need beside vLLM's KV cache, which is allocated: other caches, summaries, compiled
        lookups.

        Raises LongContextError where memory for it cannot be had.
        """
        ...

    def begin_step(self, scheduler_output: SchedulerOutput, info: StepInfo) -> None:
        """Before a step's inputs are prepared: what its requests compute with, and what is to be done before
        they do.
        """
        ...


class Backend(Protocol):
    """A class of `modes.BACKENDS`: an attention backend of vLLM's that serves a role."""

    @classmethod
    def make_layer(cls, site: LayerSite) -> Any:
        """What takes the place of `site.layer.impl`. It may be the same object, completed."""
        ...
