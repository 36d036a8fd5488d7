"""`vllm serve` with a config file, through the `openai` client: one server for all tests."""

import dataclasses
import json
import os
import pydoc_data.topics
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from openai import OpenAI
from server import metrics, running_server
from transformers import AutoTokenizer

from tests.support.engines import wait_until
from tests.support.example_programs import assert_that_a_chat_goes_on
from tests.support.reference_model import PLAIN, Layers, ReferenceLlama, alike, in_whole_turns
from vllm_longctx import BOOKLM
from vllm_longctx.geometry import Geometry

TRAINED, LIMIT = 512, 20_000
DEFAULT_MAX_TOKENS = 24
CONFIG = f"""
longctx:
  preset: lm-infinite
  attention:
    n_global: 4
    n_local: 256
    max_n_global: 160
  serving:
    default_max_tokens: {DEFAULT_MAX_TOKENS}
served-model-name: booklm
dtype: float32
enforce-eager: true
max-model-len: {LIMIT}
max-num-seqs: 4
max-num-batched-tokens: 512
kv-cache-memory-bytes: 100000000
enable-prompt-tokens-details: true
"""
# A message of the user's begins with a token of its own.
CHAT_TEMPLATE = "{% for m in messages %}{{ '<s>' if m.role == 'user' else '' }}{{ m.content }}\n{% endfor %}"
GEOMETRY = Geometry(4, 256, 512)
GREEDY: dict[str, Any] = {"model": "booklm", "temperature": 0}
EXACT: dict[str, Any] = {"ignore_eos": True, "return_token_ids": True}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("server")
    (directory / "serve.yaml").write_text(CONFIG)
    (directory / "chat.jinja").write_text(CHAT_TEMPLATE)
    flags = [
        "--plugin",
        "longctx",
        "--config",
        str(directory / "serve.yaml"),
        "--chat-template",
        str(directory / "chat.jinja"),
    ]
    with running_server(BOOKLM, directory / "log", *flags) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> OpenAI:
    return OpenAI(base_url=f"{address}/v1", api_key="none", timeout=120, max_retries=0)


@pytest.fixture(scope="module")
def text() -> str:
    return "".join(pydoc_data.topics.topics[name] for name in ("exprlists", "typesseq", "formatstrings"))


@pytest.fixture(scope="module")
def ids(text: str) -> list[int]:
    return AutoTokenizer.from_pretrained(BOOKLM)(text)["input_ids"]


@pytest.fixture(scope="module")
def reference() -> ReferenceLlama:
    return ReferenceLlama(BOOKLM)


def margin(reference: ReferenceLlama, prompt: list[int], written: list[int]) -> float:
    """How far, in log-probability, the tokens written are from the reference's best ones."""
    rows = reference.logprobs(prompt + written, GEOMETRY)[len(prompt) - 1 : -1]
    chosen = rows.gather(1, torch.tensor(written)[:, None]).squeeze(1)
    return float((rows.max(-1).values - chosen).max())


def test_a_completion_past_the_trained_length_equals_the_reference(
    client: OpenAI, ids: list[int], reference: ReferenceLlama
) -> None:
    answer = client.completions.create(**GREEDY, prompt=ids[:700], max_tokens=12, extra_body=EXACT)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        700,
        12,
        712,
    )
    assert answer.choices[0].finish_reason == "length"
    assert margin(reference, ids[:700], answer.choices[0].token_ids) < 1e-3


def test_a_streamed_completion_longer_than_the_trained_length_equals_the_reference(
    client: OpenAI, ids: list[int], reference: ReferenceLlama
) -> None:
    request = {**GREEDY, "prompt": ids[:20], "max_tokens": 600, "extra_body": EXACT}
    written, pieces, usage = [], [], None
    for chunk in client.completions.create(**request, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage
        for choice in chunk.choices:
            written += choice.token_ids
            pieces.append(choice.text)
    assert (usage.prompt_tokens, usage.completion_tokens, len(written)) == (20, 600, 600)
    assert margin(reference, ids[:20], written) < 1e-3
    assert client.completions.create(**request).choices[0].text == "".join(pieces)


def test_a_chat_is_the_completion_of_its_tokens(client: OpenAI, text: str) -> None:
    request = {
        **GREEDY,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 20,
        "extra_body": EXACT,
    }
    answer = client.chat.completions.create(**request)
    written = answer.choices[0].message.content
    assert answer.usage.prompt_tokens == len(answer.prompt_token_ids) > 8 * 512
    completion = client.completions.create(
        **GREEDY, prompt=answer.prompt_token_ids, max_tokens=20, extra_body=EXACT
    )
    assert (completion.choices[0].token_ids, completion.choices[0].text) == (
        answer.choices[0].token_ids,
        written,
    )
    chunks = list(client.chat.completions.create(**request, stream=True))
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == written


def test_the_example_of_a_chat_goes_on_past_the_trained_length(address: str, text: str) -> None:
    assert_that_a_chat_goes_on(address, text, TRAINED)


@pytest.mark.slow
def test_each_request_sees_what_it_has_chosen(
    client: OpenAI, text: str, ids: list[int], reference: ReferenceLlama
) -> None:
    """All at once: a chat that drops whole turns, the same that does not, and completions."""
    roles = ("system", *["user", "assistant"] * 5, "user")
    talk = [{"role": role, "content": text[300 * n :][:300]} for n, role in enumerate(roles)]

    def body(options: dict[str, Any]) -> dict[str, Any]:
        return {**EXACT, "vllm_xargs": {"longctx": json.dumps(options)}} if options else EXACT

    def chat(**options: Any) -> tuple[list[int], list[int], list[float]]:
        request = {**GREEDY, "messages": talk, "max_tokens": 20, "logprobs": True}
        answer = client.chat.completions.create(**request, extra_body=body(options))
        (choice,) = answer.choices
        return answer.prompt_token_ids, choice.token_ids, [one.logprob for one in choice.logprobs.content]

    def completion(prompt: list[int], **options: Any) -> tuple[list[int], list[int], list[float]]:
        request = {**GREEDY, "prompt": prompt, "max_tokens": 20, "logprobs": 0}
        (choice,) = client.completions.create(**request, extra_body=body(options)).choices
        return prompt, choice.token_ids, choice.logprobs.token_logprobs

    with ThreadPoolExecutor() as pool:
        dropping, kept = pool.submit(chat, drop="turns"), pool.submit(chat)
        others: list[tuple[Any, Layers]] = [
            (
                pool.submit(completion, ids[:700], n_global=150),
                alike(dataclasses.replace(GEOMETRY, n_global=150)),
            ),
            (pool.submit(completion, ids[:450], attention="plain"), alike(PLAIN)),
            (pool.submit(completion, ids[:700]), alike(GEOMETRY)),
        ]
    talked, written, logprobs = dropping.result()
    turns = tuple(place for place, token in enumerate(talked) if token == 0)
    assert len(turns) == 6 and GEOMETRY.n_global < turns[0] <= 160
    whole = in_whole_turns(dataclasses.replace(GEOMETRY, n_global=turns[0]), turns)

    def difference(answer: tuple[list[int], list[int], list[float]], seen: Layers) -> float:
        prompt, tokens, ours = answer
        expected = reference.token_logprobs([*prompt, *tokens], seen)[-len(tokens) :]
        return float((torch.tensor(ours) - expected).abs().max())

    for answer, seen in [(dropping, whole), (kept, alike(GEOMETRY)), *others]:
        assert difference(answer.result(), seen) < 1e-3
    sliding = alike(dataclasses.replace(GEOMETRY, n_global=turns[0]))
    assert difference(dropping.result(), sliding) > 1e-2  # the window's beginning shows
    _, same_tokens, same_logprobs = completion(talked, drop="turns")
    assert same_tokens == written and same_logprobs == pytest.approx(logprobs, abs=1e-3)


def test_an_open_ended_chat_ends_at_the_default_which_is_no_cap(client: OpenAI) -> None:
    request = {**GREEDY, "messages": [{"role": "user", "content": "x"}], "extra_body": {"ignore_eos": True}}
    assert client.chat.completions.create(**request).usage.completion_tokens == DEFAULT_MAX_TOKENS
    more = DEFAULT_MAX_TOKENS + 10
    assert (
        client.chat.completions.create(**request, max_completion_tokens=more).usage.completion_tokens == more
    )
    assert client.chat.completions.create(**request, max_tokens=more).usage.completion_tokens == more
    answer = client.responses.create(**GREEDY, input="x", extra_body={"ignore_eos": True})
    assert answer.usage.output_tokens == DEFAULT_MAX_TOKENS


def test_open_ended_requests_with_little_room_take_what_there_is(client: OpenAI) -> None:
    answer = client.completions.create(**GREEDY, prompt=[5] * (LIMIT - 3), extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 3


def test_several_choices_and_their_log_probabilities(client: OpenAI, ids: list[int]) -> None:
    prompt, request = ids[:700], {"model": "booklm", "logprobs": 2, "temperature": 1, "extra_body": EXACT}
    answer = client.completions.create(**request, prompt=prompt, max_tokens=5, n=3, seed=1)
    assert sorted(choice.index for choice in answer.choices) == [0, 1, 2]
    assert len({tuple(choice.token_ids) for choice in answer.choices}) > 1
    assert answer.usage.completion_tokens == 15
    for choice in answer.choices:
        assert all(len(position) >= 2 for position in choice.logprobs.top_logprobs)
        again = client.completions.create(
            **request, prompt=prompt + choice.token_ids, max_tokens=1, echo=True
        ).choices[0]
        assert choice.logprobs.token_logprobs == pytest.approx(
            again.logprobs.token_logprobs[700:705], abs=1e-3
        )


def test_log_probabilities_of_a_chat(client: OpenAI, text: str) -> None:
    answer = client.chat.completions.create(
        **GREEDY,
        messages=[{"role": "user", "content": text[:4000]}],
        max_tokens=4,
        logprobs=True,
        top_logprobs=3,
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 4 and all(len(position.top_logprobs) == 3 for position in content)
    assert all(position.logprob == max(top.logprob for top in position.top_logprobs) for position in content)


def test_a_stop_string_ends_a_long_completion(client: OpenAI, ids: list[int]) -> None:
    request = {**GREEDY, "prompt": ids[:600], "max_tokens": 60, "extra_body": EXACT}
    full = client.completions.create(**request).choices[0].text
    stop = full[len(full) // 2 :][:5]
    answer = client.completions.create(**request, stop=[stop]).choices[0]
    assert answer.finish_reason == "stop" and answer.text == full[: full.index(stop)]


def test_a_later_request_finds_the_prefix_of_an_earlier_one(client: OpenAI, ids: list[int]) -> None:
    prompt = [7, *ids[:1500]]  # of no other test
    first = client.completions.create(**GREEDY, prompt=prompt, max_tokens=2, extra_body=EXACT)
    assert not first.usage.prompt_tokens_details.cached_tokens
    request = {**GREEDY, "prompt": prompt + ids[1500:1510], "max_tokens": 8}
    hit = client.completions.create(**request, extra_body=EXACT)
    assert hit.usage.prompt_tokens_details.cached_tokens == 1500 // 32 * 32
    fresh = client.completions.create(**request, extra_body={**EXACT, "cache_salt": "another"})
    assert not fresh.usage.prompt_tokens_details.cached_tokens
    assert hit.choices[0].token_ids == fresh.choices[0].token_ids


def test_blocks_of_a_client_that_leaves_come_back(address: str, client: OpenAI) -> None:
    wait_until(lambda: metrics(address)["num_requests_running"] == 0)
    stream = client.completions.create(
        **GREEDY, prompt=[5] * 800, max_tokens=15_000, stream=True, extra_body=EXACT
    )
    next(iter(stream))
    assert metrics(address)["num_requests_running"] == 1 and metrics(address)["kv_cache_usage_perc"] > 0
    stream.close()
    wait_until(lambda: metrics(address)["num_requests_running"] == 0)
    assert metrics(address)["num_requests_waiting"] == 0 and metrics(address)["kv_cache_usage_perc"] == 0


# What clients send by mistake or ill will: NaN, numbers beyond 64 bits, other types, half surrogates.
ODD: dict[str, Any] = {
    "max_tokens": [-1, "many", "5", 1.5, True, 10**30, LIMIT + 1, [1]],
    "n": [0, 10**9, 10**30, "x", None],
    "seed": [2**63, -(10**30), 2**63 - 1],
    "temperature": [-1, 10**30, "hot", "0", float("nan")],
    "top_p": [0, 7, 1e-320],
    "top_k": [-7, 10**30, 2**63 - 1, 2**31],
    "min_p": [7, float("nan")],
    "min_tokens": [-1, 10**30],
    "presence_penalty": [9, float("nan")],
    "repetition_penalty": [0, float("inf"), 1e30, 1e-320],
    "priority": [5, 10**30],
    "stop": [5, "\ud800"],
    "stop_token_ids": [[10**30], [-1], [4096]],
    "logit_bias": [{"99999": 1}, {str(10**30): 1}, {"5": float("nan")}, {"5": float("inf")}, {"5": 10**30}],
    "allowed_token_ids": [[], [10**30]],
    "prompt_logprobs": [10**6, 10**30],
    "truncate_prompt_tokens": [-5, LIMIT + 1, 10**30],
    "stream_interval": [0, 10**30],
    "repetition_detection": [
        {"max_pattern_size": 10**30, "min_count": 2},
        {"max_pattern_size": 2**40, "min_count": 2},
    ],
    "structured_outputs": [{"regex": "("}, {"json": "{"}],
    "vllm_xargs": [{"longctx": "{}"}, {"a": 10**30}, {"a": float("nan")}],
    "request_id": ["\ud800"],
    "prompt": [[10**30], [-1], [4096], "\ud800", [5] * (LIMIT + 1)],
    "input": [5, None, "\ud800"],
    "messages": [5, None, [{"role": "user", "content": 5}], [{"role": "user", "content": "\ud800"}]],
    "logprobs": [10**6, 10**30, -3, True],
    "top_logprobs": [10**30, -3],
    "mx_tokens": [5],
}
TALK: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": [5, 6, 7], "max_tokens": 2},
    "/v1/chat/completions": TALK,
    "/v1/responses": {"input": "x", "max_output_tokens": 2},
    "/v1/messages": TALK,
}


@pytest.mark.parametrize("path", ROUTES)
def test_no_request_harms_the_engine(address: str, path: str) -> None:
    """A stream that is refused is refused as without a stream; nothing is cut, and nothing is left behind."""
    wrong = []
    with httpx.Client(timeout=60) as http:

        def status(body: dict[str, Any]) -> tuple[int, str]:
            content = json.dumps({"model": "booklm", **ROUTES[path], **body})
            answer = http.post(address + path, content=content, headers={"Content-Type": "application/json"})
            return answer.status_code, answer.text[:300]

        for field, values in ODD.items():
            for value in values:
                at_once, stream = status({field: value}), status({field: value, "stream": True})
                # vLLM's 500 is for what cannot travel to its engine
                told_late = stream[0] == 200 and re.match(r'data: {"error"|event: error', stream[1])
                if at_once[0] not in (200, 400, 500) or stream[0] not in (200, 400, 500) or told_late:
                    wrong.append((field, str(value)[:40].encode(errors="replace"), at_once, stream))
        assert not wrong, "\n".join(map(str, wrong))
        assert status({})[0] == status({"stream": True})[0] == 200
        for body in ("", "{", "[]", "null", "[" * 100_000):
            assert (
                http.post(
                    address + path, content=body, headers={"Content-Type": "application/json"}
                ).status_code
                == 400
            )
    wait_until(
        lambda: metrics(address)["num_requests_running"] == metrics(address)["num_requests_waiting"] == 0
    )


def test_a_limit_that_does_not_fit_ends_with_length(client: OpenAI) -> None:
    for limit in (51, LIMIT):
        answer = client.completions.create(
            **GREEDY, prompt=[5] * (LIMIT - 50), max_tokens=limit, extra_body={"ignore_eos": True}
        )
        assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (50, "length")
    with pytest.raises(openai.BadRequestError, match=f"maximum context length is {LIMIT} tokens"):
        client.completions.create(**GREEDY, prompt=[5] * (LIMIT + 1), max_tokens=1)


def test_the_client_reads_a_bad_option_of_ours(client: OpenAI) -> None:
    for stream in (False, True):
        for create in (
            lambda **kwargs: client.completions.create(**GREEDY, prompt="x", **kwargs),
            lambda **kwargs: client.chat.completions.create(**GREEDY, messages=TALK["messages"], **kwargs),
            lambda **kwargs: client.responses.create(**GREEDY, input="x", **kwargs),
        ):
            with pytest.raises(
                openai.BadRequestError, match="this engine was started without adaptation"
            ) as error:
                create(stream=stream, extra_body={"vllm_xargs": {"longctx": '{"temp_lora": true}'}})
            assert error.value.param == "vllm_xargs.longctx"


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", *ROUTES])
def test_fields_that_vllm_ignores_are_counted(address: str, path: str) -> None:
    body = {"/tokenize": {"prompt": "x"}, "/detokenize": {"tokens": [5]}}.get(path, ROUTES.get(path))
    for _ in range(2):
        assert (
            httpx.post(address + path, json={"model": "booklm", **body, "mdel": 1}, timeout=60).status_code
            == 200
        )
    sample = f'vllm:longctx_ignored_fields_total{{field="mdel",route="{path}"}} 2.0'
    assert sample in httpx.get(f"{address}/metrics").text.splitlines()


@pytest.mark.slow
def test_vllms_own_load_generator_runs(address: str, tmp_path: Path) -> None:
    words = [
        "--base-url",
        address,
        "--model",
        "booklm",
        "--tokenizer",
        BOOKLM,
        "--num-prompts",
        "6",
        "--max-concurrency",
        "4",
    ]
    words += ["--dataset-name", "random", "--random-input-len", "1500", "--random-output-len", "20"]
    words += ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json"]
    command = [Path(sys.executable).parent / "vllm", "bench", "serve", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (6, 0, 120)
    assert result["total_input_tokens"] > 6 * 1400
