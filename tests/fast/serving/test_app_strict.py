"""With `serving.strict` nothing is silently ignored, converted or shortened; vLLM's own app, all but the
engine core real.
"""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support.served_app import served

LIMIT = 20_000
CONFIG = {"preset": "lm-infinite", "serving": {"strict": True}}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with served("--longctx", json.dumps(CONFIG), max_model_len=LIMIT) as (address, _):
        yield address


BAD: dict[str, Any] = {
    "max_tokens": [-1, "many", "5", 1.5, True, 10**30, LIMIT + 1, LIMIT - 1, [1]],
    "n": [0, 10**9, 10**30, "x"],
    "seed": [2**63, -(10**30), "x", 1.5],
    "temperature": [-1, 10**30, "hot", float("nan")],
    "top_p": [0, 7, "x"],
    "top_k": [-7, 10**30, "x"],
    "min_p": [7],
    "min_tokens": [-1, 10**30],
    "presence_penalty": [9],
    "repetition_penalty": [0, float("inf")],
    "priority": [5, 10**30, "x"],
    "stop": [5, [1]],
    "stop_token_ids": [[10**30], [-1], [4096], ["x"]],
    "logit_bias": [{"x": 1}, {"99999": 1}, {str(10**30): 1}, {"5": "x"}],
    "allowed_token_ids": [[], [10**30]],
    "prompt_logprobs": [10**6, 10**30, "x"],
    "truncate_prompt_tokens": [-5, LIMIT + 1, 10**30],
    "stream_interval": [0, 10**30],
    "stream_options": [{"include_usage": "x"}, {"include_usge": True}, 5],
    "routed_experts_prompt_start": [5000],
    "ignore_eos": ["x", 1],
    "mx_tokens": [5],
    "longctx": [{"preset": "streaming"}],
    "vllm_xargs": [{"longctx": '{"temp_lora": true}'}, {"longctx": "{"}, 5],
}
BAD_COMPLETION = {
    "prompt": [
        5,
        None,
        "",
        [],
        [10**30],
        [-1],
        [4096],
        ["a", 5],
        {"a": 1},
        [5] * (LIMIT + 1),
        "a b " * LIMIT,
    ],
    "logprobs": [10**6, 10**30, -3, "x", True],
    "best_of": [3],
}
BAD_CHAT = {
    "messages": [5, None, [{"role": "user", "content": 5}]],
    "max_completion_tokens": [10**30, "x", LIMIT - 1],
    "top_logprobs": [10**30, -3, "x"],
    "prompt": ["x"],
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("endpoint", ["completions", "chat/completions"])
def test_bad_input_is_a_400_that_names_the_field(address: str, endpoint: str, stream: bool) -> None:
    chat = endpoint.startswith("chat")
    good = {"model": "booklm", "max_tokens": 1, "stream": stream}
    good |= (
        {"messages": [{"role": "user", "content": "x"}], "logprobs": True} if chat else {"prompt": [5, 6, 7]}
    )
    url = f"{address}/v1/{endpoint}"
    wrong = []
    with httpx.Client(timeout=60) as http:
        for field, values in {**BAD, **(BAD_CHAT if chat else BAD_COMPLETION)}.items():
            for value in values:
                body = json.dumps(
                    {**good, **({"stream": True} if field.startswith("stream_") else {}), field: value}
                )
                answer = http.post(url, content=body, headers={"Content-Type": "application/json"})
                if answer.status_code != 400 or field not in answer.text:
                    wrong.append((field, str(value)[:40], answer.status_code, answer.text[:200]))
        assert not wrong, "\n".join(map(str, wrong))
        assert http.post(url, json=good).status_code == 200
        for content in ("", "{", "[]", "null", "[" * 100_000):
            assert (
                http.post(url, content=content, headers={"Content-Type": "application/json"}).status_code
                == 400
            )


def test_a_limit_that_does_not_fit_says_what_would(address: str) -> None:
    body = {"model": "booklm", "prompt": [5] * (LIMIT - 50), "max_tokens": 100}
    error = httpx.post(f"{address}/v1/completions", json=body, timeout=60).json()["error"]
    message = (
        f"max_tokens = 100 does not fit behind the prompt of {LIMIT - 50} tokens: max_model_len is {LIMIT}; "
        "ask for at most 50"
    )
    assert error["message"].startswith(message) and error["param"] == "max_tokens"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"model": "booklm", "prompt": "x"}),
        ("/detokenize", {"model": "booklm", "tokens": [5]}),
        ("/v1/responses", {"model": "booklm", "input": "x", "max_output_tokens": 2}),
        (
            "/v1/messages",
            {"model": "booklm", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2},
        ),
    ],
)
def test_every_route_with_a_known_body_is_checked(address: str, path: str, body: dict[str, Any]) -> None:
    assert httpx.post(address + path, json=body, timeout=60).status_code == 200
    answer = httpx.post(address + path, json={**body, "mdel": 1}, timeout=60)
    assert answer.status_code == 400 and "mdel: unknown key; did you mean 'model'" in answer.text
