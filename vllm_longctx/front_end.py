"""What a process has that takes requests for an engine, and the configuration that brings it there.

vLLM makes an engine's configuration in the process that then takes its requests. Ray Serve LLM makes it in a
task of its own, and sends it to the replica. So the configuration installs its checks where it arrives.
"""

import multiprocessing
from typing import Any, Self

from vllm.plugins import load_general_plugins

from vllm_longctx import processes, refusals
from vllm_longctx.config import KEY, LongContextConfig


class AdditionalConfig(dict[str, Any]):
    """vLLM's `additional_config` of an engine of ours; a dict in all but how it is pickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return self.arrived, (dict(self),)

    @classmethod
    def arrived(cls, values: dict[str, Any]) -> Self:
        # Engine cores and workers take no requests. API servers make a configuration.
        if multiprocessing.parent_process() is None and not processes.is_started_by_vllm():
            load_general_plugins()
            install(LongContextConfig.parse(values[KEY]))
        return cls(values)


def install(config: LongContextConfig) -> None:
    """Have the requests of engines with a configuration of ours checked, and ends of processes heard."""
    from vllm_longctx.serving import app, stop_strings, token_cache, written_text

    app.check_engine_requests()
    app.refuse_images()
    app.limit_requests()
    stop_strings.wait_for_saves()
    written_text.keep_ends_of_texts()
    token_cache.keep_ids()
    refusals.raise_in_front_end()
    if not config.mode.is_plain:
        processes.end_together()
