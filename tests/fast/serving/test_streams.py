"""How answers leave the server: refusals, headers, keep-alive and failures of streams, with vLLM's own
handlers and clients.
"""

import asyncio
import json
import re
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import anthropic
import httpx
import openai
import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.v1.engine.exceptions import EngineDeadError

from tests.support.served_app import GENERATING, ROUTES, Core, post, served, socket_server, without_chance
from vllm_longctx.serving.app import prepare

KEEP_ALIVE_S = 0.2
CONFIG = {"preset": "temp-lora-quality", "serving": {"keep_alive_s": KEEP_ALIVE_S}}
SILENCE = {path: "event: ping" if path == "/v1/messages" else ": keep-alive" for path in GENERATING}


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Core]]:
    with served("--longctx", json.dumps(CONFIG), max_model_len=4096) as server:
        yield server


@pytest.fixture(autouse=True)
def _reset(server: tuple[str, Core]) -> Iterator[None]:
    server[1].reset()
    yield
    server[1].reads.set()


BAD: dict[str, list[dict[str, Any]]] = {
    path: [
        {"vllm_xargs": {"longctx": "{"}},
        {"vllm_xargs": {"longctx": '{"rank": 1}'}},
        {"vllm_xargs": {"longctx": '{"temp_lora": true, "start_from": "nobody"}'}},
        {"top_k": 10**30},  # vLLM's 500
        {"top_k": -5},
        {"temperature": -1},
        {"model": "nobody"},
    ]
    for path in GENERATING
}
LATE: list[dict[str, Any]] = [
    {"logit_bias": {"99999": 1}},
    {"stop_token_ids": [99999]},
    {"structured_outputs": {"regex": "("}},
]
for _path in GENERATING[:3]:
    BAD[_path] += LATE
BAD["/v1/completions"] += [{"prompt": [4096]}, {"prompt": [[5], [4096]]}, {"prompt": [[5]] * 3 + [[5] * 600]}]
BAD["/v1/completions"] += [{"prompt": [5] * 5000}, {"n": 2, **LATE[0]}]
BAD["/v1/chat/completions"] += [
    {"n": 2, **LATE[0]},
    {"messages": [{"role": "user", "content": "a b " * 700}]},
]


# What clients are told; since vLLM 0.33 not what the log says.
ENGINE_DIED = getattr(EngineDeadError, "CLIENT_MESSAGE", "EngineCore encountered an issue")
BAD["/invocations"] = [
    bad for bad in BAD["/v1/completions"] if "model" not in bad
]  # SageMaker's header names it


@pytest.mark.parametrize("path", [*GENERATING, "/invocations"])
def test_a_stream_is_refused_as_an_answer_at_once_is(server: tuple[str, Core], path: str) -> None:
    good = ROUTES["/v1/completions" if path == "/invocations" else path][0]
    for bad in BAD[path]:
        body = {**good, **bad}
        at_once, stream = (post(server[0], path, {**body, "stream": s}) for s in (False, True))
        assert at_once.status_code >= 400, at_once.text
        assert (stream.status_code, stream.json()) == (at_once.status_code, at_once.json()), bad
        assert stream.headers["content-type"] == "application/json"
        if path == "/v1/messages" and bad.get("model") != "nobody":
            assert set(stream.json()) == {"type", "error"} and stream.json()["type"] == "error"
    assert post(server[0], path, {**good, "stream": True}).status_code == 200
    assert server[1].unfinished() == 0  # vLLM keeps requests that cannot travel to its engine


@pytest.mark.parametrize("path", GENERATING)
def test_headers_go_out_and_silence_is_broken_while_a_prompt_is_read(
    server: tuple[str, Core], path: str
) -> None:
    address, core = server
    body = {**ROUTES[path][0], "stream": True}
    expected = without_chance(post(address, path, body).text)
    core.reads.clear()
    with httpx.stream("POST", address + path, json=body, timeout=60) as answer:
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
        assert not core.reads.is_set()
        text, pieces = "", answer.iter_text()
        while text.count(SILENCE[path]) < 3:
            text += next(pieces)
        core.reads.set()
        text += "".join(pieces)
    kept_alive = re.compile(r': keep-alive\n\n|event: ping\ndata: {"type": "ping"}\n\n')
    assert without_chance(kept_alive.sub("", text)) == expected


def test_clients_read_on_over_signs_of_life(server: tuple[str, Core]) -> None:
    address, core = server

    def slowly(stream: Any) -> Iterator[Any]:
        time.sleep(3 * KEEP_ALIVE_S)
        core.reads.set()
        yield from stream

    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    chat = {"model": "booklm", "messages": [{"role": "user", "content": "x"}], "max_tokens": 3}
    core.reads.clear()
    chunks = list(slowly(client.chat.completions.create(**chat, stream=True)))
    assert chunks[-1].choices[0].finish_reason == "length"
    core.reads.clear()
    chunks = list(slowly(client.completions.create(model="booklm", prompt="x", max_tokens=3, stream=True)))
    assert chunks[-1].choices[0].finish_reason == "length"
    core.reads.clear()
    events = list(
        slowly(client.responses.create(model="booklm", input="x", max_output_tokens=3, stream=True))
    )
    assert events[0].type == "response.created"
    assert events[-1].type in ("response.completed", "response.incomplete")  # the latter since vLLM 0.33
    core.reads.clear()
    messages = anthropic.Anthropic(base_url=address, api_key="none", max_retries=0).messages
    events = list(slowly(messages.create(**chat, stream=True)))
    assert (events[0].type, events[-1].type) == ("message_start", "message_stop")


def test_a_client_that_leaves_while_its_prompt_is_read_is_forgotten(server: tuple[str, Core]) -> None:
    address, core = server
    core.reads.clear()
    for path in GENERATING:
        with httpx.stream("POST", address + path, json={**ROUTES[path][0], "stream": True}, timeout=60):
            pass
    deadline = time.monotonic() + 30
    while {r.request_id for r in core.requests} != core.aborted and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(core.requests) == len(GENERATING) and {r.request_id for r in core.requests} == core.aborted


def fail(address: str, message: str) -> None:
    """Every route's client is told, within its stream, in the route's own words."""
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    chat = {"model": "booklm", "messages": [{"role": "user", "content": "x"}], "max_tokens": 3}
    with pytest.raises(openai.APIError, match=message):
        list(client.chat.completions.create(**chat, stream=True))
    with pytest.raises(openai.APIError, match=message):
        list(client.completions.create(model="booklm", prompt="x", max_tokens=3, stream=True))
    events = list(client.responses.create(model="booklm", input="x", max_output_tokens=3, stream=True))
    error, failed = events[-2:]
    assert (error.type, error.code, failed.type) == ("error", "server_error", "response.failed")
    assert (failed.response.status, failed.response.error.code) == ("failed", "server_error")
    assert re.search(message, error.message) and re.search(message, failed.response.error.message)
    assert [e.sequence_number for e in events] == list(range(len(events)))
    messages = anthropic.Anthropic(base_url=address, api_key="none", max_retries=0).messages
    with pytest.raises(anthropic.APIStatusError, match=message) as raised:
        list(messages.create(**chat, stream=True))
    assert raised.value.body["error"]["type"] == "api_error"


def test_a_request_that_fails_later_ends_its_stream_in_the_routes_own_way(server: tuple[str, Core]) -> None:
    server[1].fails_after = 1
    fail(server[0], "Internal server error")


@pytest.mark.parametrize("path", GENERATING)
def test_an_engine_that_dies_ends_every_stream_in_the_routes_own_way(path: str) -> None:
    with served("--longctx", json.dumps(CONFIG), max_model_len=4096) as (address, core):
        core.dies_after = 1
        text = post(
            address, path, {**ROUTES[path][0], "stream": True}
        ).text  # and not a connection that is cut
        assert ENGINE_DIED in text and text.endswith("\n\n")
        assert post(address, path, {**ROUTES[path][0], "stream": True}).status_code == 500


def test_a_shutdown_ends_requests_that_the_engine_did_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that is killed sends nothing; a server waits for all its connections to close."""
    monkeypatch.setattr("vllm.v1.engine.async_llm.shutdown_prometheus", lambda: None)
    path = "/v1/completions"
    with served("--longctx", json.dumps(CONFIG), max_model_len=4096) as (address, core):
        core.reads.clear()
        body = {**ROUTES[path][0], "stream": True}
        with httpx.stream("POST", address + path, json=body, timeout=60, verify=False) as answer:
            core.front_end.shutdown()
            assert ENGINE_DIED in answer.read().decode()


def other_app(events: list[str], pause_s: float = 0.0) -> FastAPI:
    """With a route of somebody else's, which streams without the engine."""
    app = FastAPI()
    app.state.args = SimpleNamespace(log_error_stack=False)
    app.state.engine_client = SimpleNamespace(generate=None, add_request=None, shutdown=None)
    app.state.vllm_config = SimpleNamespace(
        additional_config={"longctx": {"preset": "lm-infinite", "serving": {"keep_alive_s": KEEP_ALIVE_S}}}
    )
    init_exception_handler(app)

    @app.post("/v1/stream")
    async def stream(request: CompletionRequest) -> Any:
        async def answer() -> Any:
            for event in events:
                yield event
                await asyncio.sleep(pause_s)

        return StreamingResponse(answer(), media_type="text/event-stream")

    prepare(app)
    return app


def test_streams_without_the_engine_begin_with_their_first_event() -> None:
    with socket_server(other_app(["data: 1\n\n", "data: 2\n\n"], 2.5 * KEEP_ALIVE_S)) as address:
        answer = post(address, "/v1/stream", {"prompt": "x"})
        assert answer.status_code == 200
        assert re.fullmatch(r"data: 1\n\n(: keep-alive\n\n)+data: 2\n\n(: keep-alive\n\n)+", answer.text)


def test_no_sign_of_life_inside_an_event() -> None:
    with socket_server(other_app(["data: 1\n", "data: 2\n\n"], 2.5 * KEEP_ALIVE_S)) as address:
        answer = post(address, "/v1/stream", {"prompt": "x"})
        assert answer.text.startswith("data: 1\ndata: 2\n\n")


def test_streams_of_nothing_and_errors_of_handlers() -> None:
    with socket_server(other_app([])) as address:
        answer = post(address, "/v1/stream", {"prompt": "x"})
        assert (answer.status_code, answer.text) == (200, "")
    error = {"error": {"message": "logprobs: too many", "code": 400}}
    with socket_server(other_app([f"data: {json.dumps(error)}\n\n", "data: [DONE]\n\n"])) as address:
        answer = post(address, "/v1/stream", {"prompt": "x"})
        assert (answer.status_code, answer.json()) == (400, error)
    others = 'data: {"error": "of somebody else\'s making"}\n\n'
    with socket_server(other_app([others])) as address:
        answer = post(address, "/v1/stream", {"prompt": "x"})
        assert (answer.status_code, answer.text) == (200, others)
