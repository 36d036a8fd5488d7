"""Stop strings of requests that are to be saved.

vLLM's front end finds a stop string, answers, and tells the engine afterwards. Of these requests the engine is told first, and
the answer waits for its: that the adapter is saved, or why it is not.
"""

import functools
from typing import Any

from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.detokenizer import IncrementalDetokenizer
from vllm.v1.engine.output_processor import OutputProcessor, OutputProcessorOutput

from vllm_longctx.config import KEY
from vllm_longctx.temp_lora.messages import not_saved

SAVE_AS = "longctx_save_as"  # of a request's SamplingParams, in the front end's process only
SAVING = "longctx_saving"  # of an OutputProcessor: the requests that wait like this


class SavingDetokenizer(IncrementalDetokenizer):
    """vLLM's, but it names the stop string it has found only with the engine's last output; if not saved, the reason instead.

    found: None before. last: that output.
    """

    def __init__(self, detokenizer: IncrementalDetokenizer, save_as: str):  # the wrapped one has all the state
        self._detokenizer, self._save_as = detokenizer, save_as
        self.found: str | None = None
        self.last: EngineCoreOutput | None = None

    @property
    def output_token_ids(self) -> list[int]:
        return self._detokenizer.output_token_ids

    def num_output_tokens(self) -> int:
        return self._detokenizer.num_output_tokens()

    def get_next_output_text(self, finished: bool, delta: bool) -> str:
        return self._detokenizer.get_next_output_text(finished, delta)

    def update(self, new_token_ids: list[int], stop_terminated: bool) -> str | None:
        if self.found is None:
            self.found = self._detokenizer.update(new_token_ids, stop_terminated)
        if self.found is None or self.last is None:
            return None
        if self.last.kv_transfer_params is not None and KEY in self.last.kv_transfer_params:
            return str(self.last.stop_reason)
        if self.last.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
            return not_saved(self._save_as, "the request was aborted")
        return self.found


def wait_for_save(request: EngineCoreRequest, name: str) -> None:
    """To be called before the request enters an engine of ours."""
    assert request.sampling_params is not None
    vars(request.sampling_params)[SAVE_AS] = name


def wait_for_saves() -> None:
    """Afterwards the front ends of this process do. Requests of other engines are not touched."""
    add_request, process_outputs = OutputProcessor.add_request, OutputProcessor.process_outputs
    if hasattr(process_outputs, "__wrapped__"):
        return

    @functools.wraps(add_request)
    def add(self: OutputProcessor, request: EngineCoreRequest, *args: Any, **kwargs: Any) -> None:
        add_request(self, request, *args, **kwargs)
        params = request.sampling_params
        name = None if params is None else vars(params).get(SAVE_AS)
        if name is not None and params is not None and params.stop:
            state = self.request_states[request.request_id]
            assert state.detokenizer is not None
            state.detokenizer = SavingDetokenizer(state.detokenizer, name)
            vars(self).setdefault(SAVING, set()).add(request.request_id)

    @functools.wraps(process_outputs)
    def process(
        self: OutputProcessor, engine_core_outputs: list[EngineCoreOutput], *args: Any, **kwargs: Any
    ) -> OutputProcessorOutput:
        waiting = vars(self).get(SAVING)
        if not waiting:
            return process_outputs(self, engine_core_outputs, *args, **kwargs)
        waiting.intersection_update(self.request_states)
        states = {name: self.request_states[name].detokenizer for name in waiting}
        detokenizers = {name: state for name, state in states.items() if isinstance(state, SavingDetokenizer)}
        found = {name for name, detokenizer in detokenizers.items() if detokenizer.found is not None}
        outputs = []
        for output in engine_core_outputs:
            if output.request_id in found:
                if not output.finished:
                    continue
                # What the engine has written behind the stop string, before it was told.
                output.new_token_ids, output.new_logprobs, output.new_sampling_mask = [], None, None
            if output.finished and output.request_id in detokenizers:
                detokenizers[output.request_id].last = output
            outputs.append(output)
        processed = process_outputs(self, outputs, *args, **kwargs)
        for name, detokenizer in detokenizers.items():
            if detokenizer.found is not None and name not in found and detokenizer.last is None:
                processed.reqs_to_abort.append(name)
        return processed

    OutputProcessor.add_request = add  # type: ignore[method-assign]  # a seam
    OutputProcessor.process_outputs = process  # type: ignore[method-assign]  # a seam
