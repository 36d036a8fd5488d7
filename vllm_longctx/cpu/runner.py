"""vLLM's model runner for the CPU, as all engines of ours have it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from vllm_longctx.cpu.kernels.penalties import Penalties
from vllm_longctx.cpu.lora import SegmentedLoRAManager
from vllm_longctx.cpu.rows import StepRows
from vllm_longctx.engine.layers import LayerSite
from vllm_longctx.engine.runner import RunnerBase


class LongContextRunner(RunnerBase, CPUModelRunner):
    """Private methods of vLLM's that are overridden here: see `vllm_longctx.seams`."""

    lora_manager_class = SegmentedLoRAManager
    lora_manager: SegmentedLoRAManager
    rows: StepRows

    def begin(self, sites: Sequence[LayerSite], rows: StepRows) -> None:
        super().begin(sites, rows)
        self.sampler.apply_penalties = Penalties().apply  # type: ignore[method-assign]  # a seam

    def _prepare_inputs(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_inputs(scheduler_output, *args, **kwargs)
        rows = self.input_batch.req_id_to_index
        self.rows.views = {rows[request_id]: view for request_id, view in self.step.views.items()}
        return prepared

    def isa(self, group: int) -> str:
        """Of the CPU kernel for the KV cache's group of this number, by which it packs blocks."""
        builder = self.attn_groups[group][0].get_metadata_builder()
        assert isinstance(builder, CPUAttentionMetadataBuilder)
        return builder.isa

    def _get_prompt_logprobs_dict(self, hidden_states: Tensor, num_scheduled_tokens: dict[str, int]) -> Any:
        """As vLLM's, but rows of positions that were computed before stay: the first pass wins."""
        kept = list(self._computed_before(num_scheduled_tokens))
        wrappers = list(self.lora_manager.wrappers()) if self.lora_config else []
        for wrapper in wrappers:
            wrapper.scored = hidden_states
        try:
            result = super()._get_prompt_logprobs_dict(hidden_states, num_scheduled_tokens)
        finally:
            for wrapper in wrappers:
                wrapper.scored = None
        for place, rows in kept:
            place.copy_(rows)
        return result

    def _computed_before(self, num_scheduled_tokens: dict[str, int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows of prompt log-probabilities that this step computes again: where they stand, and copies of
        them.
        """
        for request_id in (
            self.step.passes.keys() & self.num_prompt_logprobs.keys() & num_scheduled_tokens.keys()
        ):
            state = self.requests[request_id]
            tensors, begin = state.in_progress_prompt_logprobs_cpu, state.num_computed_tokens
            if tensors is not None:
                end = min(self.step.passes[request_id].frontier, begin + num_scheduled_tokens[request_id])
                for tensor in tensors[:3]:
                    yield tensor[begin:end], tensor[begin:end].clone()


def clear_last_blocks(runner: CPUModelRunner, scheduler_output: SchedulerOutput) -> None:
    """Clear the last of the blocks that each request gets in this step: all others are written to their end
    in it.

    vLLM's CPU kernel multiplies unused slots by a weight of zero, and NaN or infinity that a request before
    has left there would become this one's output. vLLM's own clearing (`new_block_ids_to_zero`) is of all new
    blocks, and on the CPU of full attention only.
    """
    given = [
        (request.block_ids, request.num_computed_tokens) for request in scheduler_output.scheduled_new_reqs
    ]
    cached = scheduler_output.scheduled_cached_reqs
    for name, block_ids, computed in zip(
        cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
    ):
        if block_ids is not None:
            given.append(
                (block_ids, computed if name in cached.resumed_req_ids else 0)
            )  # else it is no whole table
    layers = runner.compilation_config.static_forward_context
    for number, group in enumerate(runner.kv_cache_config.kv_cache_groups):
        tables = [(block_ids[number], computed) for block_ids, computed in given]
        # A prompt that comes in parts has a whole table whose last block may hold what is computed already.
        block_size = group.kv_cache_spec.block_size
        last = [
            table[-1] for table, computed in tables if table and (len(table) - 1) * block_size >= computed
        ]
        if last:
            for name in group.layer_names:
                layers[name].kv_cache.index_fill_(0, torch.tensor(last), 0)


@contextmanager
def seeds_of_finished_prompts(runner: CPUModelRunner) -> Iterator[None]:
    """Hide the generators of seeded requests whose prompt is not read to its end while tokens are sampled.

    vLLM samples a token for them too, discards it, and rewinds the generator by its offset; CPU generators
    have none, and the engine dies. Long prompts always come in chunks, so here every seeded one would.
    Hidden, nothing is drawn at all.
    """
    generators = runner.input_batch.generators
    unfinished = runner.discard_request_mask.np[: runner.input_batch.num_reqs].nonzero()[0].tolist()
    hidden = {row: generators.pop(row) for row in unfinished if row in generators}
    try:
        yield
    finally:
        generators.update(hidden)
