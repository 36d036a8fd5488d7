"""Passes of requests that adapt, in vLLM's Model Runner V2.

Positions and slots stay those of the text: the attention kernel takes where each request's keys begin. A pass
that begins makes known tokens count as not computed; the runner then reads them as the rest of a prompt,
whatever part of them it wrote itself, and samples no token before the last of them, so that penalties, seeds
and grammars see nothing of it.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker

from vllm_longctx.cuda.runner import LongContextRunner
from vllm_longctx.engine.lora import SlotLoRAManager
from vllm_longctx.engine.step import Pass, StepInfo


class FirstPassWins(PromptLogprobsWorker):
    """vLLM's, but rows of positions that were computed before stay. Takes over a PromptLogprobsWorker."""

    passes: Mapping[str, Pass]  # of the step
    aside: dict[str, tuple[Any, Any]]  # of preempted requests: what vLLM forgets

    def put_aside(self, request_ids: Iterable[str]) -> None:
        for name in request_ids:
            self.aside[name] = self.in_progress_prompt_logprobs.get(name), self.token_id_scores.get(name)

    def add_request(self, req_id: str, req_idx: int, sampling_params: SamplingParams) -> None:
        super().add_request(req_id, req_idx, sampling_params)
        in_progress, scores = self.aside.pop(req_id, (None, None))
        if req_id not in self.passes:  # it computes all of its prompt again
            return
        if in_progress is not None:
            self.in_progress_prompt_logprobs[req_id] = in_progress
        if scores is not None:
            self.token_id_scores[req_id] = scores

    def _again(self, batch: InputBatch) -> dict[str, tuple[int, int]]:
        """By request: its first position in the step, and how many from there on were computed before."""
        found = {}
        begins, lens = batch.num_computed_tokens_np.tolist(), batch.num_scheduled_tokens.tolist()
        for name, begin, length in zip(batch.req_ids, begins, lens, strict=True):
            again = min(self.passes[name].frontier - begin, length) if name in self.passes else 0
            if again > 0:
                found[name] = begin, again
        return found

    def compute_prompt_logprobs(
        self,
        logits_fn: Callable[[Tensor], Tensor],
        hidden_states: Tensor,
        input_batch: InputBatch,
        *args: Any,
    ) -> dict[str, LogprobsTensors]:
        again, in_progress = self._again(input_batch), self.in_progress_prompt_logprobs
        first_pass = {name: sum(len(part.logprobs) for part in in_progress.get(name, ())) for name in again}
        finished = super().compute_prompt_logprobs(logits_fn, hidden_states, input_batch, *args)
        for name, (_, count) in again.items():
            known = first_pass[name]
            if name in finished:
                parts = rows(finished[name], 0, known), rows(finished[name], known + count, None)
                finished[name] = LogprobsTensors.cat(parts)
            elif in_progress.get(name):  # the last of them is this step's
                in_progress[name][-1] = rows(in_progress[name][-1], count, None)
        return finished

    def compute_prompt_token_id_logprobs(
        self,
        logits_fn: Callable[[Tensor], Tensor],
        hidden_states: Tensor,
        input_batch: InputBatch,
        prompt_lens: Any,
    ) -> dict[str, Tensor]:
        kept = []
        for name, (begin, count) in self._again(input_batch).items():
            asked = self.token_id_scores.get(name)
            if asked is not None and asked.scores is not None:
                known = slice(max(begin - asked.start, 0), max(begin + count - asked.start, 0))
                kept.append(
                    (asked.scores[known], asked.scores[known].masked_fill(asked.pad[known], -torch.inf))
                )
        finished = super().compute_prompt_token_id_logprobs(
            logits_fn, hidden_states, input_batch, prompt_lens
        )
        for place, scores in kept:
            place.copy_(scores)
        return finished


def rows(tensors: LogprobsTensors, begin: int, end: int | None) -> LogprobsTensors:
    ids, logprobs, ranks = (t[begin:end] for t in tensors[:3])
    return LogprobsTensors(ids, logprobs, ranks)


class PassesRunner(LongContextRunner, GPUModelRunner):
    """vLLM's Model Runner V2. Methods of its that are overridden here: see `vllm_longctx.seams`."""

    prompt_logprobs_worker: FirstPassWins
    lora_manager: SlotLoRAManager

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        stock: object = self.prompt_logprobs_worker
        assert type(stock) is PromptLogprobsWorker
        stock.__class__ = FirstPassWins  # vLLM makes it with the model, of a class that it names
        self.prompt_logprobs_worker.passes, self.prompt_logprobs_worker.aside = {}, {}

    def begin_step(self, scheduler_output: SchedulerOutput, info: StepInfo) -> None:
        super().begin_step(scheduler_output, info)
        self.prompt_logprobs_worker.passes = self.step.passes

    def finish_requests(self, scheduler_output: SchedulerOutput) -> None:
        worker = self.prompt_logprobs_worker
        worker.put_aside(scheduler_output.preempted_req_ids or ())
        super().finish_requests(scheduler_output)
        for request_id in scheduler_output.finished_req_ids:
            worker.aside.pop(request_id, None)

    def add_requests(self, scheduler_output: SchedulerOutput) -> None:
        begins = self._begin_passes(scheduler_output.scheduled_cached_reqs)
        super().add_requests(scheduler_output)
        if (
            begins and not scheduler_output.scheduled_new_reqs
        ):  # for these vLLM has done it, and once a step is enough
            self.req_states.apply_staged_writes()

    def _begin_passes(self, cached: CachedRequestData) -> bool:
        """vLLM sends preempted requests to this runner as new ones: those that resume without that begin a
        pass.

        Their new_block_ids are whole tables. Host and device learn what `update_requests` does not tell them.
        """
        states = self.req_states
        counts = zip(cached.req_ids, cached.num_computed_tokens, cached.num_output_tokens, strict=True)
        for request_id, computed, written in counts:
            if request_id in cached.resumed_req_ids:
                index = states.req_id_to_index[request_id]
                self.block_tables.num_blocks.np[:, index] = 0
                states.num_computed_tokens.stage_write_elem(index, computed)
                states.prefill_len.np[index] = states.prompt_len.np[index] + written
        return bool(cached.resumed_req_ids)

    def prepare_inputs(self, *args: Any, **kwargs: Any) -> InputBatch:
        batch = super().prepare_inputs(*args, **kwargs)
        passes = [self.step.passes.get(name) for name in batch.req_ids]
        starts = np.array([0 if p is None else p.first for p in passes], dtype=np.int32)
        self.rows.begin_windows(starts)
        for row, p in enumerate(passes):
            if p is not None:
                self._put_first_tokens(batch, row, p)
        return batch

    def _put_first_tokens(self, batch: InputBatch, row: int, p: Pass) -> None:
        """At the step's positions right before a pass's window; the text itself, which targets are taken
        from, stays.
        """
        begin, at = int(batch.num_computed_tokens_np[row]), int(batch.query_start_loc_np[row])
        count = min(p.start - begin, int(batch.num_scheduled_tokens[row]))
        if count > 0:
            text = self.req_states.all_token_ids.gpu[int(batch.idx_mapping_np[row])]
            batch.input_ids[at : at + count] = text[begin - p.first : begin - p.first + count]
