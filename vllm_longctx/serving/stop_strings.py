"""Stop strings of requests whose adapter is to be saved.

vLLM's front end finds a stop string, answers the client, and then aborts the request in the engine. For these
requests it aborts first. The answer waits for the engine's last output: the adapter is saved, or the reason
why it is not.
"""

import functools
from typing import Any

from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.detokenizer import IncrementalDetokenizer
from vllm.v1.engine.output_processor import OutputProcessor, OutputProcessorOutput

from vllm_longctx.config import KEY
from vllm_longctx.temp_lora.messages import not_saved

# Attributes that are added to vLLM's objects:
SAVE_AS = "longctx_save_as"  # of SamplingParams, in the front end's process only: the name of the adapter
SAVING = "longctx_saving"  # of an OutputProcessor: ids of these requests


class SavingDetokenizer(IncrementalDetokenizer):
    """vLLM's, but `update` returns a stop string only once the engine's last output has come.

    If the adapter is not saved, it returns the reason in place of the stop string. The wrapped detokenizer
    has all state.

    found: The stop string. None until it is found.
    last: The engine's last output. None until it has come.
    """

    def __init__(self, detokenizer: IncrementalDetokenizer, save_as: str):
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


def mark_for_save(request: EngineCoreRequest, name: str) -> None:
    """Have the front end wait for the save of a request. Call it before the request enters the engine."""
    assert request.sampling_params is not None
    vars(request.sampling_params)[SAVE_AS] = name


def wait_for_saves() -> None:
    """From now on, this process's front ends wait for the saves of requests that are marked for it."""
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
                # The engine has written these after the stop string, before the abort reached it.
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
