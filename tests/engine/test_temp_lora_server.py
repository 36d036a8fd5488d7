"""Temp-LoRA over HTTP, through the `openai` client: one server for all tests, which has a static LoRA,
too.
"""

import json
import pydoc_data.topics
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from openai import OpenAI
from peft import LoraConfig, get_peft_model
from server import metrics, running_server
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.engines import CHAT_TEMPLATE, sidecars, wait_until
from tests.support.temp_lora_replay import Options, replay
from vllm_longctx import BOOKLM

TRAINED = 512
RANK, BLOCK = 4, 64
SIZES = {
    "rank": RANK,
    "block_tokens": BLOCK,
    "train_context_tokens": 64,
    "window_tokens": 256,
    "context_tokens": 128,
}
RECIPE = {"learning_rate": 1e-3, "epochs": 1}
SLOTS = 2
FLAGS = [
    "--dtype",
    "float32",
    "--enforce-eager",
    "--max-model-len",
    "8192",
    "--max-num-seqs",
    "6",
    "--served-model-name",
    "booklm",
]
FLAGS += ["--max-num-batched-tokens", "256", "--kv-cache-memory-bytes", "100000000"]
# or a model of no opinion fills its JSON with blanks
FLAGS += ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}']
GREEDY: dict[str, Any] = {"model": "booklm", "temperature": 0}
HELD, IN_USE = "longctx_num_requests_held", "longctx_adapter_slots_in_use"

pytestmark = pytest.mark.trainer


@pytest.fixture(scope="module")
def static_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("static")
    torch.manual_seed(1)
    config = LoraConfig(
        r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(BOOKLM, dtype=torch.float32), config).save_pretrained(
        path
    )
    return path


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, static_lora: Path, adapters: Path) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("server")
    (directory / "chat.jinja").write_text(CHAT_TEMPLATE)
    adaptation = {**SIZES, **RECIPE, "dropout": 0.0, "slots": SLOTS, "adapters_root": str(adapters)}
    flags = ["--longctx", json.dumps({"preset": "temp-lora-quality", "adaptation": adaptation}), *FLAGS]
    flags += [
        "--chat-template",
        str(directory / "chat.jinja"),
        "--enable-lora",
        "--lora-modules",
        f"static={static_lora}",
    ]
    with running_server(BOOKLM, directory / "log", *flags) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> OpenAI:
    return OpenAI(base_url=f"{address}/v1", api_key="none", timeout=120, max_retries=0)


@pytest.fixture(scope="module")
def text() -> str:
    return "".join(pydoc_data.topics.topics[name] for name in ("exprlists", "typesseq"))


@pytest.fixture(scope="module")
def ids(text: str) -> list[int]:
    return AutoTokenizer.from_pretrained(BOOKLM)(text)["input_ids"]


def adapting(**options: Any) -> dict[str, Any]:
    """The body of a request that adapts, beside what the client has arguments for."""
    longctx = json.dumps({"temp_lora": True, **options})
    return {"vllm_xargs": {"longctx": longctx}, "ignore_eos": True, "return_token_ids": True}


def wait_until_idle(address: str) -> None:
    wait_until(
        lambda: metrics(address)["num_requests_running"] == metrics(address)["num_requests_waiting"] == 0
    )
    assert metrics(address)[IN_USE] == metrics(address)["kv_cache_usage_perc"] == 0


def test_a_long_completion_equals_the_replay(client: OpenAI, address: str, ids: list[int]) -> None:
    trained = metrics(address)["longctx_blocks_trained_total"]
    answer = client.completions.create(
        **GREEDY, prompt=ids[:600], max_tokens=100, logprobs=2, extra_body=adapting()
    )
    expected = replay(BOOKLM, ids[:600], 100, Options(**SIZES, **RECIPE))
    (choice,) = answer.choices
    assert min(expected.margins) > 1e-4
    assert (choice.token_ids, choice.finish_reason) == (expected.tokens, "length")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        600,
        100,
        700,
    )
    assert choice.logprobs.token_logprobs == pytest.approx(expected.logprobs, abs=1e-3)
    assert all(len(position) >= 2 for position in choice.logprobs.top_logprobs)
    assert len(expected.losses) == (700 - 1) // BLOCK  # no one needs what the last of them learned
    assert metrics(address)["longctx_blocks_trained_total"] - trained >= len(expected.losses) - 1


def test_streams_and_chats_beside_requests_that_do_not_adapt(
    client: OpenAI, address: str, text: str, ids: list[int]
) -> None:
    """More that adapt than there are slots; each says what it says alone."""

    def streamed(extra_body: dict[str, Any]) -> tuple[str, int, int]:
        chunks = list(
            client.completions.create(
                **GREEDY,
                prompt=ids[:530],
                max_tokens=80,
                stream=True,
                stream_options={"include_usage": True},
                extra_body=extra_body,
            )
        )
        written = "".join(choice.text for chunk in chunks for choice in chunk.choices)
        assert [
            choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason
        ] == ["length"]
        return written, chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens

    chat: dict[str, Any] = {
        **GREEDY,
        "messages": [{"role": "user", "content": text[:2500]}],
        "max_tokens": 70,
    }

    def chatted() -> str:
        chunks = client.chat.completions.create(
            **chat, stream=True, extra_body=adapting(update_mode="parallel")
        )
        return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)

    def plain() -> str:
        request = {**GREEDY, "prompt": ids[:300], "max_tokens": 60, "extra_body": {"ignore_eos": True}}
        return client.completions.create(**request).choices[0].text

    with ThreadPoolExecutor(6) as pool:
        streams = [pool.submit(streamed, adapting()) for _ in range(2)]
        chats, plains = [pool.submit(chatted) for _ in range(2)], [pool.submit(plain) for _ in range(2)]
    whole = (
        client.completions.create(**GREEDY, prompt=ids[:530], max_tokens=80, extra_body=adapting())
        .choices[0]
        .text
    )
    assert [s.result() for s in streams] == [(whole, 530, 80)] * 2
    answer = client.chat.completions.create(**chat, extra_body=adapting(update_mode="parallel"))
    assert answer.usage.prompt_tokens > TRAINED and answer.usage.completion_tokens == 70
    assert [c.result() for c in chats] == [answer.choices[0].message.content] * 2
    assert [p.result() for p in plains] == [plain()] * 2
    wait_until_idle(address)


def test_samples_have_adapters_of_their_own_and_seeds_repeat(client: OpenAI, ids: list[int]) -> None:
    request = {
        "model": "booklm",
        "temperature": 1,
        "prompt": ids[:200],
        "max_tokens": 150,
        "extra_body": adapting(),
    }
    both = client.completions.create(**request, n=2, seed=5)
    assert sorted(choice.index for choice in both.choices) == [0, 1]
    assert both.usage.completion_tokens == 300
    for choice in both.choices:  # vLLM counts a sample's seed up from the request's
        alone = client.completions.create(**request, seed=5 + choice.index).choices[0]
        assert (alone.token_ids, alone.text) == (choice.token_ids, choice.text)
    assert both.choices[0].text != both.choices[1].text


def test_a_stop_string_ends_it_and_what_it_learned_is_kept(
    client: OpenAI, address: str, ids: list[int], adapters: Path
) -> None:
    request = {**GREEDY, "prompt": ids[:500], "max_tokens": 120}
    full = client.completions.create(**request, extra_body=adapting()).choices[0].text
    stop = full[len(full) * 3 // 4 :][:5]
    answer = client.completions.create(**request, stop=[stop], extra_body=adapting(save_as="stopped"))
    assert (answer.choices[0].finish_reason, answer.choices[0].text) == ("stop", full[: full.index(stop)])
    assert answer.usage.completion_tokens < 120
    assert (adapters / "stopped" / "longctx.json").is_file()
    wait_until_idle(address)


ITEMS = 24
STRUCTURED: list[dict[str, Any]] = [
    {
        "response_format": {
            "type": "json_schema",
            "json_schema": {
                "name": "answers",
                "schema": {
                    "type": "array",
                    "items": {"enum": ["yes", "no"]},
                    "minItems": ITEMS,
                    "maxItems": ITEMS,
                },
            },
        }
    },
    {"structured_outputs": {"regex": r"([a-z]{3} ){30}end"}},
]


@pytest.mark.parametrize("form", STRUCTURED)
def test_a_structured_output_spans_blocks(
    client: OpenAI, address: str, ids: list[int], form: dict[str, Any]
) -> None:
    body = {**adapting(block_tokens=16, train_on_prompt=False), **form, "ignore_eos": False}
    request = {
        "model": "booklm",
        "temperature": 1,
        "seed": 3,
        "prompt": ids[:520],
        "max_tokens": 300,
        "extra_body": body,
    }
    trained = metrics(address)["longctx_blocks_trained_total"]
    answer = client.completions.create(**request)
    (choice,) = answer.choices
    assert choice.finish_reason == "stop"
    if "response_format" in form:
        items = json.loads(choice.text)
        assert len(items) == ITEMS and set(items) <= {"yes", "no"}
    else:
        assert re.fullmatch(form["structured_outputs"]["regex"], choice.text)
    blocks = answer.usage.completion_tokens // 16
    assert blocks >= 3 and metrics(address)["longctx_blocks_trained_total"] - trained >= blocks - 1
    assert client.completions.create(**request).choices[0].text == choice.text


BAD: list[tuple[Any, str]] = [
    ('{"temp_lora": "yes"}', r"longctx.temp_lora = 'yes'"),
    ('{"temp_lora": true, "rank": "4"}', r"longctx.rank = '4'"),
    ('{"temp_lora": true, "blocks": 3}', r"unknown key 'blocks'; did you mean 'block_tokens'\?"),
    ('{"temp_lora": true, "rank": 5}', r"longctx.rank = 5 is beyond this server's limit; give at most 4"),
    ('{"temp_lora": true, "save_as": "../x"}', r"longctx.save_as = '../x'"),
    (
        '{"temp_lora": true, "start_from": "nobody"}',
        r"longctx.start_from = 'nobody': there is no such adapter",
    ),
    ('{"temp_lora": true', r"longctx: not valid JSON"),
    ("[]", r"longctx"),
    ({"temp_lora": True}, r"vllm_xargs.longctx = {'temp_lora': True}: give a JSON string"),
    (True, r"vllm_xargs.longctx = True: give a JSON string"),
    (None, r"vllm_xargs.longctx = None: give a JSON string"),
]


@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_option_is_a_400_that_names_it(client: OpenAI, stream: bool) -> None:
    for value, message in BAD:
        body = {"vllm_xargs": {"longctx": value}}
        with pytest.raises(openai.BadRequestError, match=message) as error:
            client.completions.create(**GREEDY, prompt="x", stream=stream, extra_body=body)
        assert error.value.param == "vllm_xargs.longctx"
        with pytest.raises(openai.BadRequestError, match=message):
            client.chat.completions.create(
                **GREEDY, messages=[{"role": "user", "content": "x"}], stream=stream, extra_body=body
            )
    with pytest.raises(openai.BadRequestError, match=r"longctx.save_as = 'x' with n = 2"):
        client.completions.create(
            model="booklm", temperature=1, prompt="x", n=2, stream=stream, extra_body=adapting(save_as="x")
        )


def test_what_does_not_adapt_ends_at_the_trained_length(client: OpenAI, ids: list[int]) -> None:
    message = (
        r"maximum context length is 512 tokens.* contains 600 input tokens, .* does not adapt.*temp_lora"
    )
    with pytest.raises(openai.BadRequestError, match=message) as error:
        client.completions.create(**GREEDY, prompt=ids[:600], max_tokens=5)
    assert error.value.param == "input_tokens"
    fixed = client.completions.create(
        **GREEDY, prompt=ids[:400], max_tokens=256, extra_body={"ignore_eos": True}
    )
    assert (fixed.usage.completion_tokens, fixed.choices[0].finish_reason) == (TRAINED - 400, "length")
    open_ended = client.completions.create(**GREEDY, prompt=ids[:500], extra_body={"ignore_eos": True})
    assert (open_ended.usage.completion_tokens, open_ended.choices[0].finish_reason) == (
        TRAINED - 500,
        "length",
    )


def test_a_static_lora_goes_beside_requests_that_adapt_but_not_with_one(
    client: OpenAI, ids: list[int]
) -> None:
    static = {**GREEDY, "model": "static", "prompt": ids[:100], "max_tokens": 30}
    plain = {**static, "model": "booklm"}
    with pytest.raises(
        openai.BadRequestError, match=r"longctx.temp_lora beside the adapter 'static'"
    ) as error:
        client.completions.create(**static, extra_body=adapting())
    assert error.value.param == "vllm_xargs.longctx"
    alone = [
        client.completions.create(**r, extra_body={"ignore_eos": True}).choices[0].text
        for r in (static, plain)
    ]
    with ThreadPoolExecutor(4) as pool:
        adapts = [
            pool.submit(
                client.completions.create, **GREEDY, prompt=ids[:600], max_tokens=40, extra_body=adapting()
            )
        ]
        others = [
            pool.submit(client.completions.create, **r, extra_body={"ignore_eos": True})
            for r in (static, plain)
        ]
    assert adapts[0].result().usage.completion_tokens == 40
    assert [o.result().choices[0].text for o in others] == alone
    assert alone[0] != alone[1]


def test_a_client_that_leaves_while_it_is_held_gives_everything_back(
    client: OpenAI, address: str, ids: list[int]
) -> None:
    wait_until_idle(address)
    stream = client.completions.create(
        **GREEDY, prompt=ids[:100], max_tokens=2000, stream=True, extra_body=adapting()
    )
    next(iter(stream))
    (sidecar,) = sidecars()
    sidecar.suspend()
    try:
        wait_until(lambda: metrics(address)[HELD] == 1)
        assert metrics(address)[IN_USE] == 1
        beside = client.completions.create(**GREEDY, prompt=ids[:50], max_tokens=5)
        assert beside.usage.completion_tokens > 0
        stream.close()
        wait_until_idle(address)
    finally:
        sidecar.resume()
    after = client.completions.create(**GREEDY, prompt=ids[:150], max_tokens=5, extra_body=adapting())
    assert after.usage.completion_tokens == 5


def test_what_was_learned_is_kept_and_gone_on_with(
    client: OpenAI, address: str, ids: list[int], adapters: Path
) -> None:
    client.completions.create(**GREEDY, prompt=ids[:600], max_tokens=40, extra_body=adapting(save_as="day-1"))
    assert json.loads((adapters / "day-1" / "longctx.json").read_text())["position"] == 640
    request = {**GREEDY, "prompt": ids[640:720], "max_tokens": 100}
    answer = client.completions.create(**request, extra_body=adapting(start_from="day-1", save_as="day-2"))
    expected = replay(BOOKLM, ids[640:720], 100, Options(**SIZES, **RECIPE, start_from=adapters / "day-1"))
    assert min(expected.margins) > 1e-4
    assert answer.choices[0].token_ids == expected.tokens
    assert (adapters / "day-2" / "longctx.json").is_file()
    wait_until_idle(address)


def test_a_stream_ends_when_the_adapter_is_saved(
    client: OpenAI, ids: list[int], adapters: Path, text: str
) -> None:
    completion: dict[str, Any] = {**GREEDY, "prompt": ids[:100], "max_tokens": 40, "stream": True}
    full = client.completions.create(**{**completion, "stream": False}, extra_body=adapting()).choices[0].text
    chat: dict[str, Any] = {
        **GREEDY,
        "messages": [{"role": "user", "content": text[:300]}],
        "max_tokens": 20,
        "stream": True,
    }
    for number, stop in enumerate([None, full[-9:-4]] * 3):
        name = f"streamed-{number}"
        chunks = list(client.completions.create(**completion, stop=stop, extra_body=adapting(save_as=name)))
        ends = [
            (c.finish_reason, c.stop_reason) for chunk in chunks for c in chunk.choices if c.finish_reason
        ]
        assert ends == ([("length", None)] if stop is None else [("stop", stop)])
        written = "".join(c.text for chunk in chunks for c in chunk.choices)
        assert written == (full if stop is None else full[: full.index(stop)])
        assert (adapters / name / "longctx.json").is_file()
        chunks = list(
            client.chat.completions.create(
                **chat, extra_body=adapting(start_from=name, save_as=f"{name}-chat")
            )
        )
        assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["length"]
        assert (adapters / f"{name}-chat" / "longctx.json").is_file()


ENDS = ("response.completed", "response.incomplete")


def test_what_is_not_saved_is_told_on_every_route(
    client: OpenAI, address: str, text: str, adapters: Path
) -> None:
    (adapters / "taken").mkdir()
    error = (
        "longctx: adapter 'taken' was not saved: ValueError: 'taken' exists in adapters_root and was not "
        "saved by longctx; "
        "choose another name"
    )
    body, failed = adapting(save_as="taken"), metrics(address)["longctx_save_failures_total"]
    # An answer to what was learned before also says how many blocks were remembered.
    told = ({"save_error": error}, {"save_error": error, "blocks_remembered": 1})
    completion: dict[str, Any] = {**GREEDY, "prompt": text[:200], "max_tokens": 5, "extra_body": body}
    chat: dict[str, Any] = {
        **GREEDY,
        "messages": [{"role": "user", "content": text[:200]}],
        "max_tokens": 5,
        "extra_body": body,
    }
    for answer in (client.completions.create(**completion), client.chat.completions.create(**chat)):
        assert [(c.finish_reason, c.stop_reason) for c in answer.choices] == [("length", error)]
        assert answer.kv_transfer_params["longctx"] in told and answer.usage.completion_tokens == 5
    for stream in (
        client.completions.create(**completion, stream=True),
        client.chat.completions.create(**chat, stream=True),
    ):
        ends = [
            (c.finish_reason, c.stop_reason) for chunk in stream for c in chunk.choices if c.finish_reason
        ]
        assert ends == [("length", error)]
    response: dict[str, Any] = {
        **GREEDY,
        "input": text[:200],
        "max_output_tokens": 16,
        "extra_body": dict(body),
    }
    response["extra_body"].pop("return_token_ids")
    answer = client.responses.create(**response)
    assert answer.kv_transfer_params["longctx"] in told and answer.usage.output_tokens == 16
    (end,) = (e.response for e in client.responses.create(**response, stream=True) if e.type in ENDS)
    assert end.kv_transfer_params["longctx"] in told
    message = {"model": "booklm", "messages": [{"role": "user", "content": text[:200]}], "max_tokens": 5}
    message |= {"vllm_xargs": body["vllm_xargs"]}
    answer = httpx.post(f"{address}/v1/messages", json=message, timeout=60).json()
    assert answer["kv_transfer_params"]["longctx"] in told and answer["stop_reason"] == "max_tokens"
    assert metrics(address)["longctx_save_failures_total"] == failed + 7
    assert list((adapters / "taken").iterdir()) == []
    wait_until_idle(address)


def test_metrics_are_exported(address: str) -> None:
    found = metrics(address)
    assert found["longctx_blocks_trained_total"] == found["longctx_train_time_seconds_count"] > 50
    assert found["longctx_block_loss_before_count"] == found["longctx_blocks_trained_total"]
    for name in (
        "num_requests_saving",
        "train_failures_total",
        "trainer_restarts_total",
        "num_requests_held",
        "train_queue_blocks",
        "versions_behind",
    ):
        assert found[f"longctx_{name}"] == 0
    for name in (
        "swap_time_seconds_count",
        "hold_time_seconds_sum",
        "adapted_tokens_total",
        "idle_steps_total",
    ):
        assert found[f"longctx_{name}"] > 0
