"""Stop strings of requests that are to be saved: the front end's outputs are stock vLLM's, but for when the
last one comes.
"""

from typing import Any

import pytest
from transformers import AutoTokenizer
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor

from vllm_longctx import BOOKLM
from vllm_longctx.serving import stop_strings
from vllm_longctx.temp_lora.messages import not_saved

TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on."
STOP = "lazy"
KINDS = list(RequestOutputKind)
ERROR = not_saved("book", "no space left on device")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BOOKLM)


@pytest.fixture(autouse=True)
def _waits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("add_request", "process_outputs"):
        method = getattr(OutputProcessor, name)
        monkeypatch.setattr(OutputProcessor, name, getattr(method, "__wrapped__", method))
    stop_strings.wait_for_saves()
    stop_strings.wait_for_saves()


class FrontEnd:
    """An output processor with one request; what it gives out and wants aborted."""

    def __init__(self, tokenizer: Any, kind: RequestOutputKind, saves: bool, **params: Any):
        self.tokenizer, self.kind = tokenizer, kind
        sampling = SamplingParams(stop=[STOP], max_tokens=100, output_kind=kind, **params)
        request = EngineCoreRequest(
            request_id="1-a",
            external_req_id="1",
            prompt_token_ids=[1, 2],
            mm_features=None,
            sampling_params=sampling,
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        if saves:
            stop_strings.mark_for_save(request, "book")
        self.processor = OutputProcessor(tokenizer, log_stats=False)
        self.processor.add_request(request, None)
        self.outputs: list[RequestOutput] = []
        self.aborted: list[str] = []

    def hear(self, *tokens: int, **kwargs: Any) -> None:
        processed = self.processor.process_outputs([EngineCoreOutput("1-a", list(tokens), **kwargs)])
        self.outputs += processed.request_outputs
        self.aborted += processed.reqs_to_abort

    def write(self, last: FinishReason | None = None) -> None:
        """Up to the token that completes the stop string.

        last: the engine's reason to end there, if it does.
        """
        told: list[int] = []
        for token in self.tokenizer(TEXT, add_special_tokens=False)["input_ids"]:
            told.append(token)
            complete = STOP in self.tokenizer.decode(told)
            self.hear(token, finish_reason=last if complete else None)
            if complete:
                return

    @property
    def ended(self) -> bool:
        assert [o.finished for o in self.outputs[:-1]] == [False] * len(self.outputs[:-1])
        return bool(self.outputs) and self.outputs[-1].finished

    @property
    def result(self) -> tuple[str, list[int], str | None]:
        """Text, tokens and finish reason."""
        parts = [o.outputs[0] for o in self.outputs]
        if self.kind != RequestOutputKind.DELTA:
            parts = parts[-1:]
        return (
            "".join(p.text for p in parts),
            [t for p in parts for t in p.token_ids],
            parts[-1].finish_reason,
        )

    @property
    def stop_reason(self) -> int | str | None:
        return self.outputs[-1].outputs[0].stop_reason


@pytest.fixture(params=KINDS, ids=[kind.name.lower() for kind in KINDS])
def kind(request: pytest.FixtureRequest) -> RequestOutputKind:
    return request.param


@pytest.fixture(params=[False, True], ids=["without", "with"])
def stock(request: pytest.FixtureRequest, tokenizer: Any, kind: RequestOutputKind) -> FrontEnd:
    front_end = FrontEnd(tokenizer, kind, saves=False, include_stop_str_in_output=request.param)
    front_end.write()
    assert front_end.ended and front_end.stop_reason == STOP and front_end.aborted == ["1-a"]
    return front_end


@pytest.fixture
def saving(
    request: pytest.FixtureRequest, tokenizer: Any, kind: RequestOutputKind, stock: FrontEnd
) -> FrontEnd:
    """That has found its stop string, and the engine has written another token before it heard of it."""
    include = request.node.callspec.params["stock"]
    front_end = FrontEnd(tokenizer, kind, saves=True, include_stop_str_in_output=include)
    front_end.write()
    front_end.hear(7)
    assert not front_end.ended and front_end.aborted == ["1-a"]
    return front_end


def test_the_answer_waits_for_the_engines(saving: FrontEnd, stock: FrontEnd) -> None:
    saving.hear(finish_reason=FinishReason.STOP)
    assert saving.ended and saving.result == stock.result and saving.stop_reason == STOP
    assert saving.aborted == ["1-a"] and not saving.processor.has_unfinished_requests()
    saving.processor.process_outputs([])
    assert not vars(saving.processor)[stop_strings.SAVING], "nothing of it is kept"


def test_an_engine_that_ends_before_it_is_told_makes_no_difference(saving: FrontEnd, stock: FrontEnd) -> None:
    saving.hear(8, finish_reason=FinishReason.LENGTH)
    assert saving.ended and saving.result == stock.result and saving.stop_reason == STOP


def test_the_answer_has_the_error(saving: FrontEnd, stock: FrontEnd) -> None:
    saving.hear(
        finish_reason=FinishReason.STOP,
        stop_reason=ERROR,
        kv_transfer_params={"longctx": {"save_error": ERROR}},
    )
    assert saving.ended and saving.result == stock.result and saving.stop_reason == ERROR
    assert saving.outputs[-1].kv_transfer_params == {"longctx": {"save_error": ERROR}}


def test_an_engine_that_gives_up_is_an_error_too(saving: FrontEnd, stock: FrontEnd) -> None:
    saving.hear(finish_reason=FinishReason.ABORT)
    assert saving.ended and saving.result == stock.result and "was not saved" in saving.stop_reason


def test_a_client_that_leaves_hears_nothing_more(saving: FrontEnd) -> None:
    assert saving.processor.abort_requests(["1-a"], internal=True) == ["1-a"]
    before = len(saving.outputs)
    saving.hear(finish_reason=FinishReason.STOP)
    assert len(saving.outputs) == before and not saving.processor.has_unfinished_requests()


@pytest.mark.parametrize("error", [None, ERROR])
def test_the_last_token_completes_it(tokenizer: Any, kind: RequestOutputKind, error: str | None) -> None:
    """The engine has ended with it, and has saved: nothing is left to wait for."""
    expected = FrontEnd(tokenizer, kind, saves=False)
    expected.write(FinishReason.LENGTH)
    front_end = FrontEnd(tokenizer, kind, saves=True)
    told = (
        {}
        if error is None
        else {"stop_reason": error, "kv_transfer_params": {"longctx": {"save_error": error}}}
    )
    hear = front_end.hear
    front_end.hear = lambda *tokens, **kwargs: hear(*tokens, **kwargs, **told)  # type: ignore[method-assign]
    front_end.write(FinishReason.LENGTH)
    assert front_end.ended and front_end.result == expected.result and front_end.result[2] == "stop"
    assert front_end.stop_reason == (error or STOP) and front_end.aborted == []


def test_without_the_stop_string_nothing_changes(tokenizer: Any, kind: RequestOutputKind) -> None:
    front_ends = [FrontEnd(tokenizer, kind, saves) for saves in (False, True)]
    for front_end in front_ends:
        for token in front_end.tokenizer("quick", add_special_tokens=False)["input_ids"]:
            front_end.hear(token)
        front_end.hear(8, finish_reason=FinishReason.STOP, stop_reason=8)
        assert front_end.ended and front_end.stop_reason == 8 and front_end.aborted == []
    assert front_ends[0].result == front_ends[1].result


def test_requests_of_other_engines_are_stock(tokenizer: Any) -> None:
    params = {"extra_args": {"longctx": {"temp_lora": True, "save_as": "book"}}}
    front_end = FrontEnd(tokenizer, RequestOutputKind.DELTA, saves=False, **params)
    front_end.write()
    assert front_end.ended
