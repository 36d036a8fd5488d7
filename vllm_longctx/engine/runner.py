"""What all model runners of ours have, on both platforms."""

from collections.abc import Sequence
from typing import Any

from vllm_longctx.engine.layers import LayerSite
from vllm_longctx.engine.lora import Adapts


class RunnerBase(Adapts):
    """Mixed into a model runner of vLLM's, before it.

    sites: The model's attention layers.
    rows: What its metadata builders read of a step, the platform's `StepRows`.
    """

    sites: Sequence[LayerSite]
    rows: Any

    def begin(self, sites: Sequence[LayerSite], rows: Any) -> None:
        """Once the model is loaded and its layers are made."""
        self.sites, self.rows = sites, rows

    def bind_kv_cache(self) -> None:
        """Once the KV cache is there."""
