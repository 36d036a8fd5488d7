"""What stock vLLM answers a longctx server answers, too: both in this process, all but the engine core
real.
"""

import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.served_app import GENERATING, ROUTES, TALK, Core, post, served, without_chance

TRAINED = 512


@pytest.fixture(scope="module")
def stock() -> Iterator[tuple[str, Core]]:
    with served(max_model_len=TRAINED) as server:
        yield server


@pytest.fixture(scope="module")
def ours() -> Iterator[tuple[str, Core]]:
    """The strictest of ours: its requests, which do not adapt, live within the trained length."""
    config = {"preset": "temp-lora-quality", "serving": {"default_max_tokens": TRAINED}}
    with served("--longctx", json.dumps(config), max_model_len=TRAINED) as server:
        yield server


@pytest.fixture(scope="module")
def roomy() -> Iterator[tuple[str, Core]]:
    with served("--longctx-preset", "temp-lora-quality", max_model_len=4096) as server:
        yield server


def verdict(address: str, path: str, body: dict[str, Any]) -> tuple[int, str]:
    """A stream's refusal counts as what the route says without a stream, which is what ours makes of it."""
    try:
        answer = post(address, path, body)
    except httpx.RemoteProtocolError:  # stock cuts a response that it refuses
        answer = None
    refused = answer is None or re.match(r'data: \{"error"|event: error', answer.text)
    if body.get("stream") and refused:
        unstreamed = {key: value for key, value in body.items() if key not in ("stream", "stream_options")}
        answer = post(address, path, unstreamed)
    assert answer is not None
    return answer.status_code, without_chance(answer.text)


NUMBERS: list[Any] = [
    0,
    1,
    2,
    3,
    -1,
    4.0,
    0.7,
    "0.7",
    "4",
    True,
    None,
    509,
    512,
    513,
    2**31,
    2**63,
    -(10**30),
    10**30,
]
NUMBERS += [float("nan"), float("inf"), 1e308, 1e-320]
OTHERS: list[Any] = [
    "",
    "x",
    "auto",
    "none",
    "yes",
    [],
    ["x"],
    [5],
    ["5"],
    [10**30],
    {},
    {"5": 1},
    {"5": "x"},
    {"type": "text"},
]
OTHERS += [
    {"include_usage": True, "include_obfuscation": False},
    {"effort": "low"},
    [{"type": "function", "name": "f"}],
]
EXTRAS = [
    *[
        "store",
        "metadata",
        "service_tier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "verbosity",
    ],
    *[
        "modalities",
        "functions",
        "function_call",
        "best_of",
        "context_management",
        "cache_control",
        "prediction",
        "audio",
    ],
    *[
        "web_search_options",
        "mx_tokens",
        "$schema",
        "ключ",
        "a b",
        "inference_geo",
        "container",
        "thinking",
        "conversation",
    ],
]
# Of a random or a lasting effect.
LEFT_OUT = {"request_id", "background", "store", "previous_response_id", "watermarking", "model"}


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    path = draw(st.sampled_from(list(ROUTES)))
    good, model = ROUTES[path]
    fields = sorted(model.model_fields.keys() - LEFT_OUT) + EXTRAS
    odd = draw(st.dictionaries(st.sampled_from(fields), st.sampled_from(NUMBERS + OTHERS), max_size=3))
    stream = {"stream": True} if path in GENERATING and draw(st.booleans()) else {}
    return path, {**good, **stream, **odd}


few: Any = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture],
}


@settings(max_examples=30, **few)
@given(request=requests())
def test_any_body_gets_stocks_verdict(
    stock: tuple[str, Core], ours: tuple[str, Core], request: tuple[str, dict[str, Any]]
) -> None:
    path, body = request
    assert verdict(ours[0], path, body) == verdict(stock[0], path, body)


@pytest.mark.slow
@settings(max_examples=300, **few)
@given(request=requests())
def test_any_of_many_bodies_gets_stocks_verdict(
    stock: tuple[str, Core], ours: tuple[str, Core], request: tuple[str, dict[str, Any]]
) -> None:
    path, body = request
    assert verdict(ours[0], path, body) == verdict(stock[0], path, body)


@pytest.mark.parametrize("path", GENERATING)
@pytest.mark.parametrize("stream", [False, True])
def test_what_clients_send_gets_stocks_answer(
    stock: tuple[str, Core], ours: tuple[str, Core], path: str, stream: bool
) -> None:
    for extra in [
        {name: "x" for name in EXTRAS if name != "thinking"},
        {"store": True, "metadata": {"a": "b"}, "user": "me"},
        {"temperature": "0.7", "top_p": 1},
        {"max_tokens": 4.0, "max_output_tokens": 4.0},
        {"max_tokens": TRAINED, "max_output_tokens": TRAINED, "max_completion_tokens": TRAINED},
        {"priority": 5},
        {"stream_options": {"include_usage": True, "include_obfuscation": False}}
        if stream
        else {"stream": None},
        {"vllm_xargs": {"anybody's": "x"}, "context_management": None},
    ]:
        body = {**ROUTES[path][0], "stream": stream, **extra}
        answers = [post(server[0], path, body) for server in (stock, ours)]
        assert answers[0].status_code in (200, 400), answers[0].text
        assert [a.status_code for a in answers] == [answers[0].status_code] * 2, (
            extra,
            [a.text for a in answers],
        )
        assert without_chance(answers[0].text) == without_chance(answers[1].text)


@pytest.mark.parametrize("path", GENERATING)
def test_a_fixed_limit_ends_where_the_model_was_trained_to_end(roomy: tuple[str, Core], path: str) -> None:
    address, core = roomy
    limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    body = {**ROUTES[path][0], limit: 4000}
    core.reset()
    answer = post(address, path, body)
    assert answer.status_code == 200, answer.text
    (request,) = core.requests
    prompt = len(request.prompt_token_ids)
    usage = answer.json()["usage"]
    assert usage.get("completion_tokens", usage.get("output_tokens")) == TRAINED - prompt
    assert '"length"' in answer.text or '"max_tokens"' in answer.text or '"max_output_tokens"' in answer.text


@pytest.mark.parametrize(
    "limit", [{}, {"max_tokens": 1}, {"max_tokens": 3000}, {"echo": True, "max_tokens": 0}, {"n": 2}]
)
def test_the_edge_of_the_trained_length(roomy: tuple[str, Core], limit: dict[str, Any]) -> None:
    address, core = roomy
    good = {"model": "booklm", **limit}
    core.reset()
    answer = post(address, "/v1/completions", {**good, "prompt": [5] * (TRAINED - 1)})
    assert answer.status_code == 200, answer.text
    assert all(r.sampling_params.max_tokens == 1 for r in core.requests)
    for length in (TRAINED, TRAINED + 1, 2000):
        for stream in (False, True):
            answer = post(address, "/v1/completions", {**good, "prompt": [5] * length, "stream": stream})
            error = answer.json()["error"]
            assert (answer.status_code, error["type"], error["param"]) == (
                400,
                "BadRequestError",
                "input_tokens",
            )
            assert f"maximum context length is {TRAINED} tokens" in error["message"]
            assert f"contains {length} input tokens" in error["message"] and "temp_lora" in error["message"]


@pytest.mark.parametrize("path", GENERATING[:2])
def test_a_beam_search_lives_within_the_trained_length_too(roomy: tuple[str, Core], path: str) -> None:
    address, core = roomy
    search = {**ROUTES[path][0], "use_beam_search": True, "n": 2, "max_tokens": 3000, "ignore_eos": True}
    talk = {"messages": [{"role": "user", "content": "a b " * 250}]}
    core.reset()
    answer = post(address, path, {**search, **talk, "prompt": [5] * 505})
    assert answer.status_code == 200, answer.text
    assert max(len(r.prompt_token_ids) for r in core.requests) == TRAINED - 1
    assert [choice["finish_reason"] for choice in answer.json()["choices"]] == ["length"] * 2
    core.reset()
    too_long = {"messages": [{"role": "user", "content": "a b " * 700}], "prompt": [5] * 600}
    assert post(address, path, {**search, **too_long}).status_code == 400 and not core.requests


def test_ignored_fields_are_counted_and_said_once(
    ours: tuple[str, Core], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)  # to where pytest listens
    body = {
        **TALK,
        "max_tokens": 1,
        "unsayable\n": 1,
        "x" * 500: 2,
        "stream_options": {"ours": 1},
        "stream": True,
    }
    body["tools"] = [{"type": "function", "function": {"name": "f", "parameters": {}, "strikt": True}}]
    body["tool_choice"] = "none"
    with caplog.at_level(logging.INFO, "vllm.longctx"):
        for _ in range(2):
            assert post(ours[0], "/v1/chat/completions", {**body, "yours": "x"}).status_code == 200
    records = {
        r for r in caplog.records if "does not know the field" in r.getMessage()
    }  # SageMaker's package shows each twice
    said = [record.getMessage() for record in records]
    assert sum("/v1/chat/completions: vLLM does not know the field yours" in line for line in said) == 1
    text = httpx.get(ours[0] + "/metrics").text
    counted = dict(
        re.findall(
            r'vllm:longctx_ignored_fields_total\{field="(.*)",route="/v1/chat/completions"\} (\S+)', text
        )
    )
    assert counted["yours"] == counted["stream_options.ours"] == counted["tools[].function.strikt"] == "2.0"
    assert float(counted["other"]) >= 4 and len(counted) < 100
    assert not any("unsayable" in line or "xxxx" in line for line in (text, *said))


OPTIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"longctx": {}}, "longctx", "longctx: options of ours stand in vllm_xargs"),
    ({"vllm_xargs": {"longctx": 5}}, "vllm_xargs.longctx", "vllm_xargs.longctx = 5: give a JSON string"),
    (
        {"vllm_xargs": {"longctx": None}},
        "vllm_xargs.longctx",
        "vllm_xargs.longctx = None: give a JSON string",
    ),
    ({"vllm_xargs": {"longctx": "{"}}, "vllm_xargs.longctx", "vllm_xargs.longctx: not valid JSON"),
    ({"vllm_xargs": {"longctx": '{"rnk": 4}'}}, "vllm_xargs.longctx", "did you mean 'rank'"),
    (
        {"vllm_xargs": {"longctx": '{"temp_lora": true, "rank": 999}'}},
        "vllm_xargs.longctx",
        "vllm_xargs.longctx.rank = 999",
    ),
]


@pytest.mark.parametrize("path", GENERATING)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("option", "param", "message"), OPTIONS)
def test_options_of_ours_are_strict(
    ours: tuple[str, Core], path: str, stream: bool, option: dict[str, Any], param: str, message: str
) -> None:
    answer = post(ours[0], path, {**ROUTES[path][0], "stream": stream, **option})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert message in error["message"]
    if path == "/v1/messages":
        assert (answer.json()["type"], error["type"]) == ("error", "invalid_request_error")
    else:
        assert (error["type"], error["param"], error["code"]) == ("BadRequestError", param, 400)


def test_options_of_ours_are_strict_in_sagemakers_route(ours: tuple[str, Core]) -> None:
    for option, _, message in OPTIONS:
        for stream in (False, True):
            answer = post(
                ours[0], "/invocations", {**ROUTES["/v1/completions"][0], "stream": stream, **option}
            )
            assert answer.status_code == 400 and message in answer.json()["error"]["message"]


def test_where_no_options_are_taken_they_are_refused(ours: tuple[str, Core]) -> None:
    for path in ("/tokenize", "/v1/messages/count_tokens"):
        answer = post(ours[0], path, {**ROUTES[path][0], "vllm_xargs": {"longctx": "{}"}})
        assert (
            answer.status_code == 400
            and "this route takes no vllm_xargs" in answer.json()["error"]["message"]
        )


def test_a_beam_search_takes_no_options(ours: tuple[str, Core]) -> None:
    search = {"use_beam_search": True, "n": 2}
    for path in GENERATING[:2]:
        assert post(ours[0], path, {**ROUTES[path][0], **search}).status_code == 200
        answer = post(
            ours[0], path, {**ROUTES[path][0], **search, "vllm_xargs": {"longctx": '{"temp_lora": true}'}}
        )
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["param"] == "vllm_xargs.longctx"
        assert "a beam search takes no options of ours" in error["message"]
