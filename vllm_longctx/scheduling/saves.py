"""Requests that have ended and are answered when their adapter is saved, or cannot be."""

from vllm.logger import init_logger
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import Request, RequestStatus

from vllm_longctx.config import KEY
from vllm_longctx.scheduling.adapting_request import AdaptingRequest, PendingSave
from vllm_longctx.temp_lora import messages

logger = init_logger("vllm.longctx")

Answer = tuple[int, EngineCoreOutput]  # index of the client, and the last output of its request


class PendingSaves:
    """Requests that have ended and wait for their save.

    waiting: By request id.
    answers: Last outputs that can be sent.
    """

    def __init__(self) -> None:
        self.waiting: dict[str, AdaptingRequest] = {}
        self.answers: list[Answer] = []

    def add(self, adapting: AdaptingRequest, last_step: int) -> None:
        """last_step: Number of the last step that may still compute the request."""
        reason = adapting.request.get_finished_reason()
        if reason == FinishReason.ABORT:  # by a stop string; vLLM sends no output for it
            reason = FinishReason.STOP
        output = EngineCoreOutput(adapting.request_id, [], finish_reason=reason)
        adapting.save = PendingSave(output, last_step)
        self.waiting[adapting.request_id] = adapting

    def hold_back(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        """Take the last outputs of requests that wait out of a step's outputs. outputs: By client."""
        for of_client in outputs.values():
            sent = []
            for output in of_client.outputs:
                adapting = self.waiting.get(output.request_id) if output.finished else None
                if adapting is None:
                    sent.append(output)
                else:
                    assert adapting.save is not None
                    adapting.save.output = output
            of_client.outputs = sent

    def answer(self, adapting: AdaptingRequest, error: str | None) -> None:
        """The last output can be sent. error: Why the adapter is not saved; None if it is."""
        assert adapting.save is not None and adapting.save_as is not None
        output = adapting.save.output
        if error is not None:
            text = messages.not_saved(adapting.save_as, error)
            logger.error("%s (request %s)", text, adapting.request_id)
            # Some routes do not show stop_reason, and no route acts on these kv_transfer_params.
            output.stop_reason = text
            said = output.kv_transfer_params or {}
            output.kv_transfer_params = said | {KEY: {**said.get(KEY, {}), "save_error": text}}
        del self.waiting[adapting.request_id]
        self.answers.append((adapting.request.client_index, output))

    def take_answers(self) -> list[Answer]:
        answers, self.answers = self.answers, []
        return answers


def ended_by_itself(request: Request) -> bool:
    """False where the client left or the request failed.

    The front end finds stop strings and then aborts, as a client does. So an abort counts as a stop string if
    the request has stop strings and has written anything.
    """
    assert request.sampling_params is not None
    if request.status == RequestStatus.FINISHED_ABORTED:
        return bool(request.sampling_params.stop) and request.num_output_tokens > 0
    return request.status in (
        RequestStatus.FINISHED_STOPPED,
        RequestStatus.FINISHED_LENGTH_CAPPED,
        RequestStatus.FINISHED_REPETITION,
    )
