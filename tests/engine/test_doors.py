"""Doors into an engine other than `vllm serve`, and what an operator may do to it while it runs."""

import asyncio
import importlib
import itertools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.inputs import tokens_input
from vllm.lora.request import LoRARequest
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM

from tests.support.engines import CHAT_TEMPLATE, generate, prompt, running_here, wait_until
from tests.support.lora_adapters import write_adapter
from vllm_longctx import BOOKLM

LAMBDA = {"n_global": 10, "n_local": 64, "distance_ceiling": 64}
MODES: dict[str, dict[str, Any]] = {
    "lambda": {"attention": LAMBDA},
    "memory": {
        "attention": {"method": "focused", "mem_layers": [1], "n_local": 64, "last_context_length": 32}
    },
    "temp_lora": {
        "attention": {"method": "none"},
        "adaptation": {
            "block_tokens": 32,
            "train_context_tokens": 64,
            "rank": 4,
            "learning_rate": 2e-3,
            "slots": 2,
        },
    },
    "temp_lora_over_lambda": {
        "attention": LAMBDA,
        "adaptation": {"block_tokens": 32, "train_context_tokens": 64, "rank": 4},
    },
}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=pytest.mark.trainer) if "adaptation" in config else name
        for name, config in MODES.items()
    ],
)
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def llm(mode: str, tiny_llama: Path) -> Iterator[LLM]:
    with running_here(tiny_llama, **MODES[mode]) as llm:
        yield llm


def written(llm: LLM, mode: str) -> list[list[int]]:
    kwargs = {"extra_args": {"longctx": {"temp_lora": True}}} if mode.startswith("temp_lora") else {}
    return [
        list(output.outputs[0].token_ids)
        for output in generate(llm, [prompt(100), prompt(300)], 40, **kwargs)
    ]


@pytest.mark.parametrize(
    "level", [pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow), 2]
)
def test_an_engine_that_slept_writes_the_same(llm: LLM, mode: str, level: int) -> None:
    """On the CPU vLLM's workers keep everything while they sleep; on a GPU `enable_sleep_mode` is refused."""
    before = written(llm, mode)
    llm.sleep(level)
    llm.wake_up(["scheduling"] if level == 0 else None)
    assert written(llm, mode) == before


def test_what_is_under_way_when_an_engine_goes_to_sleep_ends(llm: LLM, mode: str) -> None:
    before = written(llm, mode)
    engine = llm.llm_engine
    extra_args = {"longctx": {"temp_lora": True}} if mode.startswith("temp_lora") else None
    params = SamplingParams(max_tokens=1000, ignore_eos=True, extra_args=extra_args)
    engine.add_request("long", tokens_input(prompt(200)), params)
    for _ in range(20):
        engine.step()
    llm.sleep(1)
    llm.wake_up()
    while engine.has_unfinished_requests():
        engine.step()
        engine.abort_request(["long"])
    assert written(llm, mode) == before


def test_weights_under_a_trainer_stay(llm: LLM, mode: str) -> None:
    before = written(llm, mode)
    if mode.startswith("temp_lora"):
        with pytest.raises(RuntimeError, match="weights of an engine with adaptation cannot be changed"):
            llm.collective_rpc("reload_weights")
    else:
        llm.collective_rpc("reload_weights")
        assert llm.reset_prefix_cache()
    assert written(llm, mode) == before


def test_without_enable_lora_adapters_are_refused(
    llm: LLM, mode: str, tiny_llama: Path, tmp_path: Path
) -> None:
    """Before anything is scheduled, as stock vLLM does.

    Before, beside requests that learn: loaded, then `All items are pinned` in a step.
    """
    before, engine = written(llm, mode), llm.llm_engine
    adapter = LoRARequest("a", 1, str(write_adapter(tmp_path / "a", tiny_llama, 11)))
    for _ in range(2):
        with pytest.raises(VLLMValidationError, match="but LoRA is not enabled!"):
            llm.generate([tokens_input(prompt(20))], use_tqdm=False, lora_request=adapter)
        for call, argument in ((engine.add_lora, adapter), (engine.remove_lora, 1), (engine.pin_lora, 1)):
            with pytest.raises(RuntimeError, match=r"LoRA is not enabled\. Use --enable-lora"):
                call(argument)
        assert written(llm, mode) == before


def streamed(llm: LLM, parts: list[list[int]], max_tokens: int) -> list[int]:
    """What AsyncLLM does with a prompt that comes in parts: the tokens written after the last of them."""
    engine = llm.llm_engine

    def request(ids: list[int], tokens: int, more: bool) -> EngineCoreRequest:
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
        made = engine.input_processor.process_inputs(
            "parts", tokens_input(ids), params, ("generate",), resumable=more
        )
        made.external_req_id = "parts"
        return made

    tokens: list[int] = []
    for number, ids in enumerate(parts):
        engine.engine_core.add_request(request(ids, max_tokens if number == len(parts) - 1 else 1, more=True))
        tokens, ended = [], False
        while not ended:
            for output in engine.engine_core.get_output().outputs:
                tokens += output.new_token_ids
                ended = (
                    ended
                    or output.finish_reason is not None
                    or len(tokens) == (max_tokens if ids is parts[-1] else 1)
                )
    engine.engine_core.add_request(request([0], 1, more=False))
    engine.engine_core.get_output()
    return tokens


def test_a_prompt_in_parts_is_read_as_if_it_came_at_once(llm: LLM, mode: str) -> None:
    if mode != "lambda" and mode != "temp_lora_over_lambda":
        with pytest.raises(ValueError, match="prompt: its parts come one after the other"):
            streamed(llm, [prompt(100), prompt(150)], 30)
        return
    for lengths in ([100, 150], [10, 20, 30], [300, 1, 64]):
        parts = [prompt(length, seed=length) for length in lengths]
        (output,) = generate(llm, [list(itertools.chain(*parts))], 30)
        assert streamed(llm, parts, 30) == list(output.outputs[0].token_ids)


def test_a_batch_runs_with_the_checks_and_the_default_of_a_server(tmp_path: Path) -> None:
    longctx = {"preset": "lm-infinite", "serving": {"default_max_tokens": 6}}
    chat = {"model": BOOKLM, "messages": [{"role": "user", "content": "a b c"}], "ignore_eos": True}
    bodies = [
        chat,
        {**chat, "max_tokens": 9},
        {**chat, "vllm_xargs": {"longctx": json.dumps({"temp_lora": True})}},
    ]
    lines = [
        json.dumps({"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions", "body": body})
        for number, body in enumerate(bodies)
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    (tmp_path / "chat.jinja").write_text(CHAT_TEMPLATE)
    flags = [
        "--dtype",
        "float32",
        "--enforce-eager",
        "--kv-cache-memory-bytes",
        "100000000",
        "--longctx",
        json.dumps(longctx),
    ]
    flags += ["--chat-template", str(tmp_path / "chat.jinja"), "-i", str(tmp_path / "in.jsonl")]
    command = [
        Path(sys.executable).parent / "vllm",
        "run-batch",
        "--model",
        BOOKLM,
        *flags,
        "-o",
        tmp_path / "out.jsonl",
    ]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    open_ended, limited, refused = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert open_ended["response"]["body"]["usage"]["completion_tokens"] == 6
    assert limited["response"]["body"]["usage"]["completion_tokens"] == 9
    assert refused["response"]["status_code"] == 400
    assert "this engine was started without adaptation" in refused["error"]["error"]["message"]


# Of the doors below: open-ended requests write 6 tokens, and those that do not learn end after 60 of both.
LEARNING = {"block_tokens": 32, "train_context_tokens": 32, "rank": 4, "plain_tokens": 60}
LIMITED: dict[str, Any] = {
    "attention": {"method": "none"},
    "adaptation": {**LEARNING, "quota": {"tokens": 10}},  # for clients over HTTP, so for none of these
    "serving": {"default_max_tokens": 6},
}
ENGINE = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 100_000_000}


@pytest.mark.slow
@pytest.mark.trainer
def test_a_program_around_async_llm_has_the_checks_and_limits() -> None:
    async def ask(engine: AsyncLLM, prompt: Any, **given: Any) -> int:
        params = SamplingParams(**{"max_tokens": None, "ignore_eos": True, **given})
        async for output in engine.generate(prompt, params, str(asyncio.get_running_loop().time())):
            written = len(output.outputs[0].token_ids)
        return written

    async def visit() -> None:
        args = AsyncEngineArgs(model=BOOKLM, additional_config={"longctx": LIMITED}, **ENGINE)
        engine = AsyncLLM.from_engine_args(args)
        try:
            # Raw prompts are checked in a thread of their own.
            for prompt in ("It was a dark night.", tokens_input([5] * 20)):
                assert await ask(engine, prompt) == 6
                assert await ask(engine, prompt, max_tokens=9) == 9
                for bad, why in (
                    ({"rank": 9}, r"longctx\.rank = 9 is beyond this server's limit; give at most 4"),
                    ({"save_as": "a"}, r"longctx\.save_as: this server keeps no adapters"),
                ):
                    with pytest.raises(VLLMValidationError, match=why):
                        await ask(engine, prompt, extra_args={"longctx": {"temp_lora": True, **bad}})
            assert await ask(engine, tokens_input([5] * 50), max_tokens=20) == 10
            with pytest.raises(VLLMValidationError, match="maximum context length is 60 tokens"):
                await ask(engine, tokens_input([5] * 70))
            learn = {"longctx": {"temp_lora": True}}
            assert await ask(engine, tokens_input([5] * 70), extra_args=learn) == 6
            assert await ask(engine, tokens_input([5] * 70), extra_args=learn, max_tokens=9) == 9
        finally:
            engine.shutdown()

    asyncio.run(visit())


@pytest.mark.slow
@pytest.mark.trainer
def test_the_grpc_server_has_the_limits(tmp_path: Path) -> None:
    """Its clients cannot name options of ours, so all learn."""
    reason = "needs smg-grpc-servicer (pip install vllm[grpc])"
    pytest.importorskip("smg_grpc_servicer", reason=reason)
    grpc, proto = importlib.import_module("grpc"), importlib.import_module("smg_grpc_proto")
    messages, services = proto.vllm_engine_pb2, proto.vllm_engine_pb2_grpc
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    module = [sys.executable, "-m", "vllm.entrypoints.launchers.grpc_server"]
    config = {**LIMITED, "adaptation": {**LIMITED["adaptation"], "requests": "all"}}
    flags = ["--model", BOOKLM, "--host", "127.0.0.1", "--port", port, "--longctx", json.dumps(config)]
    flags += ["--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", "100000000"]
    log = tmp_path / "log"
    with log.open("w") as out:
        server = subprocess.Popen([*module, *flags], env=os.environ, stdout=out, stderr=out)
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            answers = grpc.channel_ready_future(channel)
            wait_until(lambda: answers.done() or server.poll() is not None, 300)
            assert server.poll() is None, log.read_text()[-3000:]
            client = services.VllmEngineStub(channel)

            def ask(number: int, length: int, **given: Any) -> Any:
                params = messages.SamplingParams(ignore_eos=True, n=1, top_p=1, repetition_penalty=1, **given)
                text = messages.TokenizedInput(input_ids=[5] * length)
                request = messages.GenerateRequest(
                    request_id=str(number), tokenized=text, sampling_params=params
                )
                *_, last = client.Generate(request)
                return last.complete

            assert ask(1, 20).completion_tokens == 6
            assert ask(2, 20, max_tokens=9).completion_tokens == 9
            assert ask(3, 70, max_tokens=3).completion_tokens == 3
    finally:
        server.terminate()
        server.wait(60)
