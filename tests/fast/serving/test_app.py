"""What the server refuses with `serving.strict`, against vLLM's own request models.

Also the routes around the checks, without an engine. What it takes, and refuses without:
    test_app_like_stock.py.
"""

import asyncio
import inspect
import json
import multiprocessing
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from starlette.datastructures import State
from starlette.testclient import TestClient
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.launchers.api_server import app_state
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest, TokenizeCompletionRequest
from vllm.exceptions import VLLMValidationError
from vllm.inputs import tokens_input
from vllm.inputs.engine import embeds_input
from vllm.multimodal.processing import BaseProcessingInfo
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.input_processor import InputProcessor

from tests.support.vllm_names import make_arg_parser
from vllm_longctx import BOOKLM
from vllm_longctx.metrics import MAX_FIELDS, count_ignored_field
from vllm_longctx.models.properties import TEXT_ONLY
from vllm_longctx.plugin import MIDDLEWARE
from vllm_longctx.serving.app import (
    RequestChecks,
    RequestError,
    check_strictly,
    refuse_images,
    unknown_fields,
)

LM_INFINITE = {"longctx": {"preset": "lm-infinite", "serving": {"default_max_tokens": 7}}}
STRICT = {"longctx": {"preset": "lm-infinite", "serving": {"default_max_tokens": 7, "strict": True}}}
HUGE = 10**30


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        ({"mx_tokens": 5}, "mx_tokens", r"mx_tokens: unknown key; did you mean 'max_tokens'\?"),
        ({"zzz": 5}, "zzz", "zzz: unknown key; leave it out"),
        ({"best_of": 3}, "best_of", "best_of: unknown key"),
        (
            {"stream_options": {"include_usge": True}},
            "stream_options.include_usge",
            r"did you mean 'include_usage'\?",
        ),
        ({"structured_outputs": {"regx": "a"}}, "structured_outputs.regx", r"did you mean 'regex'\?"),
        ({"max_tokens": HUGE}, "max_tokens", f"max_tokens = {HUGE} does not fit into 64 bits"),
        ({"top_k": -HUGE}, "top_k", "top_k = -1000.* does not fit into 64 bits"),
        (
            {"repetition_detection": {"min_count": HUGE}},
            "repetition_detection.min_count",
            "does not fit into 64 bits",
        ),
        ({"temperature": float("nan")}, "temperature", "temperature = nan is not a finite number"),
        ({"logit_bias": {"5": float("inf")}}, "logit_bias.5", "logit_bias.5 = inf is not a finite number"),
        ({"max_tokens": "5"}, "max_tokens", "max_tokens = '5': Input should be a valid integer"),
        ({"max_tokens": True}, "max_tokens", "max_tokens = True: Input should be a valid integer"),
        ({"max_tokens": 1.5}, "max_tokens", "max_tokens = 1.5: Input should be a valid integer"),
        ({"temperature": "0"}, "temperature", "temperature = '0': Input should be a valid number"),
        ({"stream": "yes"}, "stream", "stream = 'yes': Input should be a valid boolean"),
        ({"ignore_eos": 1}, "ignore_eos", "ignore_eos = 1: Input should be a valid boolean"),
        ({"n": None}, "n", "n = None: Input should be a valid integer"),
        ({"seed": 2**63}, "seed", "seed = 9223372036854775808 does not fit into 64 bits"),
        ({"request_id": 5}, "request_id", "request_id = 5: Input should be a valid string"),
    ],
)
def test_a_bad_field_is_named(body: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as error:
        check_strictly((CompletionRequest,), {"prompt": "x", **body})
    assert error.value.parameter == field
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize(
    "body", [{"messages": None}, {"top_logprobs": "5"}, {"logprobs": 1}, {"max_completion_tokens": "x"}]
)
def test_a_bad_field_of_a_chat_is_named(body: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as error:
        check_strictly((ChatCompletionRequest,), {"messages": [], **body})
    assert error.value.parameter == next(iter(body))


GOOD: list[dict[str, Any]] = [
    {
        "prompt": "x",
        "max_tokens": None,
        "temperature": 0,
        "top_p": 1,
        "stop": None,
        "seed": -(2**63),
        "stream": False,
    },
    {
        "prompt": [5, 6],
        "stop": ["a"],
        "logit_bias": {"5": -100},
        "stream": True,
        "stream_options": {"include_usage": True},
    },
    {
        "prompt": ["a", "b"],
        "stop": "a",
        "logprobs": 5,
        "echo": True,
        "user": "me",
        "vllm_xargs": {"other": 1},
    },
    {
        "prompt": "x",
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "n", "schema": {"type": "object"}},
        },
    },
    {
        "prompt": "x",
        "structured_outputs": {"choice": ["a", "b"]},
        "truncate_prompt_tokens": -1,
        "thinking_token_budget": -1,
    },
]


@pytest.mark.parametrize("body", GOOD)
def test_what_vllm_knows_passes(body: dict[str, Any]) -> None:
    check_strictly((CompletionRequest,), body)
    del body["prompt"]
    logprobs = {"logprobs": True, "top_logprobs": 5} if "logprobs" in body else {}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}, "strict": True}}]
    chat = {
        "messages": [{"role": "user", "content": "x"}],
        "tools": tools,
        "tool_choice": "auto",
        "reasoning_effort": "low",
    }
    check_strictly((ChatCompletionRequest,), {**body, **logprobs, **chat})


def test_a_body_may_fit_any_model_of_its_route() -> None:
    models = (TokenizeCompletionRequest, TokenizeChatRequest)
    check_strictly(models, {"prompt": "x", "return_token_strs": True})
    check_strictly(models, {"messages": [], "add_generation_prompt": False})
    with pytest.raises(RequestError, match=r"promt: unknown key; did you mean 'prompt'"):
        check_strictly(models, {"promt": "x"})


def front_end(additional_config: dict[str, Any], **kwargs: Any) -> Callable[..., Any]:
    """What `LLM.generate` and the server call with every request."""
    args = EngineArgs(model=BOOKLM, additional_config=additional_config, **kwargs)
    processor = InputProcessor(args.create_engine_config())

    def add(prompt: Any, priority: int = 0, resumable: bool = False, **params: Any) -> Any:
        given = tokens_input(prompt) if isinstance(prompt, list) else prompt
        return processor.process_inputs(
            "id", given, SamplingParams(**params), ("generate",), priority=priority, resumable=resumable
        )

    return add


def test_requests_of_an_engine_are_checked_offline_too() -> None:
    add = front_end(LM_INFINITE)
    assert add([5, 6], max_tokens=3, extra_args={"other": 1}).prompt_token_ids == [5, 6]
    with pytest.raises(ValueError, match=r"longctx\.attention = {'n_local': 64}: Input should be") as error:
        add([5, 6], extra_args={"longctx": {"attention": {"n_local": 64}}})
    assert error.value.parameter == "longctx"
    with pytest.raises(ValueError, match=r"longctx\.temp_lora: this engine was started without adaptation"):
        add([5, 6], extra_args={"longctx": {"temp_lora": True}})
    assert add([5, 6], priority=5).priority == 5


def test_strict_engines_are_strict_offline_too() -> None:
    add = front_end(STRICT)
    with pytest.raises(RequestError, match="prompt: Token id 4096 is out of vocabulary"):
        add([5, 4096])
    with pytest.raises(RequestError, match="priority = 5, but the scheduling policy is 'fcfs'; leave it out"):
        add([5, 6], priority=5)
    assert front_end(STRICT, scheduling_policy="priority")([5, 6], priority=5).priority == 5


@pytest.mark.parametrize("strict", [False, True])
def test_what_does_not_adapt_ends_at_the_trained_length_offline(strict: bool) -> None:
    add = front_end(
        {"longctx": {"preset": "temp-lora-quality", "serving": {"strict": strict}}}, max_model_len=4096
    )
    assert add([5] * 500, max_tokens=None).sampling_params.max_tokens == 12
    assert add([5] * 511, max_tokens=1).sampling_params.max_tokens == 1
    adapts = {"longctx": {"temp_lora": True}}
    assert add([5] * 600, max_tokens=300, extra_args=adapts).sampling_params.max_tokens == 300
    for length in (512, 513):
        with pytest.raises(
            ValueError,
            match=f"maximum context length is 512 .* contains {length} input tokens.*extra_args.*temp_lora",
        ):
            add([5] * length, max_tokens=1)
    if strict:
        with pytest.raises(ValueError, match="prompt of 500 tokens and max_tokens = 300"):
            add([5] * 500, max_tokens=300)
    else:
        assert add([5] * 500, max_tokens=300).sampling_params.max_tokens == 12


def test_a_limit_of_the_users_for_what_does_not_adapt() -> None:
    value = {"preset": "temp-lora-quality", "serving": {"strict": True}, "adaptation": {"plain_tokens": 300}}
    add = front_end({"longctx": value}, max_model_len=4096)
    assert add([5] * 299, max_tokens=None).sampling_params.max_tokens == 1
    limit = r"300 tokens on this server \(adaptation.plain_tokens\)"
    with pytest.raises(RequestError, match=f"context length is {limit}. However, .* 300 input tokens"):
        add([5] * 300, max_tokens=1)
    with pytest.raises(RequestError, match=f"max_tokens = 2: .* does not adapt, and its limit is {limit}"):
        add([5] * 299, max_tokens=2)
    adapts = {"longctx": {"temp_lora": True}}
    assert add([5] * 600, max_tokens=3, extra_args=adapts).sampling_params.max_tokens == 3


def test_requests_of_other_engines_are_vllms_affair() -> None:
    front_end(LM_INFINITE)
    for config in ({}, {"longctx": {"attention": {"method": "none"}}}):
        request = front_end(config)([5, 6], priority=5, extra_args={"longctx": {}})
        assert request.sampling_params.extra_args == {"longctx": {}}


@pytest.mark.parametrize("is_child", [False, True])
def test_a_configuration_that_is_sent_brings_its_checks(
    is_child: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Serve LLM makes it in a task, and takes requests elsewhere. Before: without any check."""
    vllm_config = EngineArgs(model=BOOKLM, additional_config=LM_INFINITE).create_engine_config()
    sent = pickle.dumps(vllm_config)
    monkeypatch.setattr(InputProcessor, "process_inputs", InputProcessor.process_inputs.__wrapped__)
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object() if is_child else None)
    arrived = pickle.loads(sent)
    assert arrived.additional_config == vllm_config.additional_config
    assert arrived.compute_hash() == vllm_config.compute_hash()
    assert hasattr(InputProcessor.process_inputs, "__wrapped__") is not is_child


class Handler:
    def __init__(self, **defaults: Any) -> None:
        self.default_sampling_params = defaults


@pytest.mark.parametrize(
    ("additional_config", "unset"),
    [(LM_INFINITE, {"max_tokens": 7}), ({"longctx": {"attention": {"method": "none"}}}, {}), ({}, {})],
)
def test_handlers_of_every_server_end_open_ended_requests(
    additional_config: dict[str, Any], unset: dict[str, int]
) -> None:
    """vLLM's `serve` and `run-batch` make their handlers in one function, which ends by initializing endpoint
    plugins.
    """
    front_end(LM_INFINITE)
    vllm_config = EngineArgs(model=BOOKLM, additional_config=additional_config).create_engine_config()
    state = State()
    state.unset, state.set_by_model = Handler(), Handler(max_tokens=3)
    asyncio.run(
        app_state.init_endpoint_plugins_state(
            SimpleNamespace(vllm_config=vllm_config), state, SimpleNamespace()
        )
    )
    assert state.unset.default_sampling_params == unset
    assert state.set_by_model.default_sampling_params == {"max_tokens": 3}
    assert inspect.getsource(app_state.init_app_state).count("init_endpoint_plugins_state") == 1


@pytest.mark.parametrize(
    ("more", "refused"),
    [
        ({"longctx": {"temp_lora": True}}, "longctx: options of ours stand in vllm_xargs"),
        (
            {"use_beam_search": True, "vllm_xargs": {"longctx": "{}"}},
            "vllm_xargs.longctx: a beam search takes no options of ours",
        ),
        ({"vllm_xargs": {"longctx": ["{}"]}}, r"vllm_xargs.longctx = \['{}'\]: give a JSON string"),
        ({"vllm_xargs": {"longctx": "{}"}, "anything": 5}, None),
    ],
)
def test_options_of_ours_are_strict_without_http_too(more: dict[str, Any], refused: str | None) -> None:
    """`vllm run-batch` and Ray Serve call vLLM's handlers themselves. Before: such options were ignored."""
    front_end(LM_INFINITE)
    vllm_config = EngineArgs(model=BOOKLM, additional_config=LM_INFINITE).create_engine_config()
    state, taken = State(), []

    async def create(request: ChatCompletionRequest, *args: Any) -> None:
        taken.append(request)

    state.chat = SimpleNamespace(create_chat_completion=create)
    asyncio.run(
        app_state.init_endpoint_plugins_state(
            SimpleNamespace(vllm_config=vllm_config), state, SimpleNamespace()
        )
    )
    request = ChatCompletionRequest(messages=[{"role": "user", "content": "x"}], **more)
    answer = state.chat.create_chat_completion(request)
    if refused is None:
        asyncio.run(answer)
    else:
        with pytest.raises(RequestError, match=refused):
            asyncio.run(answer)
    assert len(taken) == (refused is None)


def test_open_ended_requests_of_programs_end_at_the_default_too() -> None:
    add = front_end(LM_INFINITE, max_model_len=20)
    assert add([5, 6], max_tokens=None).sampling_params.max_tokens == 7
    assert add([5] * 16, max_tokens=None).sampling_params.max_tokens == 4
    assert add([5, 6], max_tokens=9).sampling_params.max_tokens == 9
    assert add([5, 6]).sampling_params.max_tokens == SamplingParams().max_tokens
    assert front_end({}, max_model_len=20)([5, 6], max_tokens=None).sampling_params.max_tokens == 18


def test_embeddings_as_a_prompt_count_as_its_tokens() -> None:
    """Requests that do not adapt end at the trained length, in whatever form their prompt is."""
    add = front_end(
        {"longctx": {"preset": "temp-lora-quality"}}
    )  # prompt embeddings on would give the cached tokenizer a token
    assert add([5] * 500, max_tokens=None).sampling_params.max_tokens == 12
    assert add(embeds_input(torch.zeros(500, 8)), max_tokens=None).sampling_params.max_tokens == 12


FOCUSED = {"method": "focused", "mem_layers": [2]}


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"attention": FOCUSED}, "attention.method focused"),
        ({"attention": {"top_k": 5}}, "attention.top_k"),
        ({"preset": "temp-lora-quality"}, "adaptation with attention.method none"),
        ({"attention": {"method": "lm_infinite"}, "adaptation": {}}, None),
        ({"preset": "lm-infinite"}, None),
    ],
)
def test_a_prompt_in_parts_is_refused_where_all_of_it_is_needed_at_once(
    config: dict[str, Any], what: str | None
) -> None:
    add = front_end({"longctx": config})
    if what is None:
        assert add([5, 6], resumable=True).resumable
        return
    with pytest.raises(
        RequestError, match=f"prompt: its parts come one after the other, but {what} of this engine"
    ) as error:
        add([5, 6], resumable=True)
    assert error.value.parameter == "prompt"


def app(additional_config: dict[str, Any]) -> FastAPI:
    app = FastAPI()
    app.state.args = SimpleNamespace(log_error_stack=False)
    app.state.vllm_config = SimpleNamespace(additional_config=additional_config)
    app.state.engine_client = SimpleNamespace(generate=None, add_request=None, shutdown=None)
    init_exception_handler(app)

    @app.post("/v1/echo")
    async def echo(request: CompletionRequest) -> Any:
        return {"prompt": request.prompt, "max_tokens": request.max_tokens}

    @app.post("/v1/anything")
    async def anything(request: dict[str, Any]) -> Any:
        return request

    @app.post("/v1/stream")
    async def stream(request: CompletionRequest) -> Any:
        async def events() -> Any:
            if request.prompt == "bad":
                yield f"data: {json.dumps({'error': {'message': 'logprobs: too many', 'code': 400}})}\n\n"
            yield "data: 1\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    app.add_middleware(AuthenticationMiddleware, tokens=["key"])
    app.add_middleware(RequestChecks)  # vLLM adds those of --middleware last
    return app


def http(served: FastAPI, key: str = "key") -> TestClient:
    return TestClient(served, headers={"Authorization": f"Bearer {key}"})


def test_the_checks_stand_in_front_of_the_routes() -> None:
    served = app(STRICT)
    with http(served) as client:
        assert client.post("/v1/echo", json={"prompt": "x", "max_tokens": 5}).json() == {
            "prompt": "x",
            "max_tokens": 5,
        }
        answer = client.post("/v1/echo", json={"prompt": "x", "max_tokns": 5})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "max_tokns"
        for body in (b"", b"{", b"[]", b"[" * 100_000, b'{"max_tokens": ' + b"9" * 5000 + b"}"):
            answer = client.post("/v1/echo", content=body, headers={"Content-Type": "application/json"})
            assert answer.status_code == 400
        assert client.get("/v1/echo").status_code == 405
        assert client.post("/v1/anything", json={"of": "any"}).json() == {"of": "any"}


def test_who_may_not_ask_learns_nothing_about_the_body() -> None:
    with http(app(STRICT), key="wrong") as client:
        assert client.post("/v1/echo", json={"prompt": "x", "max_tokns": 5}).status_code == 401


def test_an_error_in_the_first_event_of_a_stream_is_the_status() -> None:
    with http(app(LM_INFINITE)) as client:
        answer = client.post("/v1/stream", json={"prompt": "bad"})
        assert answer.status_code == 400 and answer.json()["error"]["message"] == "logprobs: too many"
        answer = client.post("/v1/stream", json={"prompt": "good"})
        assert answer.status_code == 200 and answer.text == "data: 1\n\ndata: [DONE]\n\n"
        assert answer.headers["content-type"].startswith("text/event-stream")


def test_method_none_leaves_the_server_as_it_is() -> None:
    served = app({"longctx": {"attention": {"method": "none"}}})
    with http(served) as client:
        assert client.post("/v1/echo", json={"prompt": "x", "longctx": 5}).status_code == 200
        assert client.post("/v1/stream", json={"prompt": "bad"}).status_code == 200


def test_an_app_is_prepared_once() -> None:
    served = app(LM_INFINITE)
    for _ in range(2):
        with http(served) as client:
            assert client.post("/v1/echo", json={"prompt": "x"}).status_code == 200
        once = [route.app for route in served.routes]
        generate = served.state.engine_client.generate
    assert [route.app for route in served.routes] == once and served.state.engine_client.generate is generate


def names(*models: type, **body: Any) -> list[str]:
    return [where + name for where, name, _ in unknown_fields(models, body)]


def test_unknown_fields_are_found_where_models_are() -> None:
    tools = [{"type": "function", "function": {"name": "f", "a": 1}}, {"type": "function", "b": 2}, 5]
    found = names(ChatCompletionRequest, tools=tools, messages=[{"c": 3}], vllm_xargs={"d": 4}, x={"e": 5})
    assert set(found) == {"tools[].function.a", "tools[].b", "x"}
    content = [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]
    found = names(
        AnthropicMessagesRequest,
        messages=[{"role": "user", "content": content}],
        thinking={"type": "x", "f": 6},
    )
    assert "thinking.f" in found and set(found) <= {"thinking.f", "messages[].content[].cache_control"}
    assert names(ChatCompletionRequest, response_format={"type": "text", "g": 7}, tool_choice="auto") == [
        "response_format.g"
    ]


def test_no_depth_of_a_body_is_too_deep() -> None:
    content: list[dict[str, Any]] = []
    for _ in range(20_000):
        content = [{"type": "tool_result", "content": content}]
    names(AnthropicMessagesRequest, messages=[{"role": "user", "content": content}])


def test_clients_cannot_fill_the_metrics_with_names_of_theirs() -> None:
    route = "/v1/of-this-test"
    assert count_ignored_field(route, "store") == "store" and count_ignored_field(route, "store") is None
    assert count_ignored_field(route, "a\nb") == "other" and count_ignored_field(route, "x" * 100) is None
    labels = [count_ignored_field(route, f"mine_{i}") for i in range(2 * MAX_FIELDS)]
    assert sum(label is not None for label in labels) < MAX_FIELDS


def serve(*flags: str) -> Any:
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", BOOKLM, *flags])
    AsyncEngineArgs.from_cli_args(args)
    AsyncEngineArgs.from_cli_args(args)  # as with several API servers
    return args.middleware


def test_the_server_is_given_the_middleware() -> None:
    assert serve("--plugin", "longctx", "--middleware", "mine.Too") == ["mine.Too", MIDDLEWARE]
    assert serve("--additional-config", '{"longctx": {"preset": "streaming"}}') == [MIDDLEWARE]
    assert serve() == []


@pytest.mark.parametrize("is_ours", [True, False])
def test_an_image_is_refused_with_the_reason(is_ours: bool) -> None:
    """vLLM's own message would name a limit that must not be raised."""
    refuse_images()
    info = object.__new__(BaseProcessingInfo)
    config = SimpleNamespace(**({TEXT_ONLY: True} if is_ours else {}))
    info.ctx = SimpleNamespace(model_config=SimpleNamespace(hf_text_config=config))
    vars(info).update(supported_mm_limits={"image": 1}, allowed_mm_limits={"image": 0})
    reason = "this engine takes text only" if is_ours else "Set `--limit-mm-per-prompt`"
    with pytest.raises(VLLMValidationError, match=reason) as refused:
        info.validate_num_items("image", 1)
    assert refused.value.parameter == "image"
