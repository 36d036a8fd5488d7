"""vLLM's own server application, over HTTP, whose engine core alone is a stand-in.

Routes, handlers, tokenizer, checks at the engine's door and output processing are real. It starts in a
second.
"""

import asyncio
import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
import uvicorn
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.anthropic.protocol import AnthropicCountTokensRequest, AnthropicMessagesRequest
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.tokenize.protocol import DetokenizeRequest, TokenizeCompletionRequest
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.outputs import LogprobsLists
from vllm.v1.serial_utils import MsgpackEncoder

from tests.support.vllm_names import make_arg_parser
from vllm_longctx import BOOKLM

TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
TALK = {"model": "booklm", "messages": [{"role": "user", "content": "x"}]}
# A good body of each route, and the model that vLLM reads it with.
ROUTES: dict[str, tuple[dict[str, Any], Any]] = {
    "/v1/completions": ({"model": "booklm", "prompt": [5, 6, 7], "max_tokens": 3}, CompletionRequest),
    "/v1/chat/completions": ({**TALK, "max_tokens": 3}, ChatCompletionRequest),
    "/v1/responses": ({"model": "booklm", "input": "x", "max_output_tokens": 3}, ResponsesRequest),
    "/v1/messages": ({**TALK, "max_tokens": 3}, AnthropicMessagesRequest),
    "/v1/messages/count_tokens": (TALK, AnthropicCountTokensRequest),
    "/tokenize": ({"model": "booklm", "prompt": "x"}, TokenizeCompletionRequest),
    "/detokenize": ({"model": "booklm", "tokens": [5]}, DetokenizeRequest),
}
GENERATING = list(ROUTES)[:4]


class Core:
    """Writes tokens that depend on all that the request says, so that equal answers come of equal requests.

    reads: set while prompts may be read; a request waits for it before its first token. fails_after,
    dies_after: tokens after which a request ends with an error, or the engine dies. requests: all that were
    taken. aborted: their ids. unfinished: how many the front end holds. front_end: the engine's client.
    """

    unfinished: Callable[[], int]
    front_end: AsyncLLM

    def __init__(self) -> None:
        self.resources = SimpleNamespace(engine_dead=False)
        self.engine_ranks_managed = [0]
        self.encoder = MsgpackEncoder()
        self.outputs: asyncio.Queue[EngineCoreOutputs | Exception] = asyncio.Queue()
        self.reads = threading.Event()
        self.reset()

    def reset(self) -> None:
        self.reads.set()
        self.fails_after = self.dies_after = -1
        self.requests: list[EngineCoreRequest] = []
        self.aborted: set[str] = set()
        self.tasks: set[asyncio.Task[None]] = set()

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        return ("generate",)

    async def get_output_async(self) -> EngineCoreOutputs:
        out = await self.outputs.get()
        if isinstance(out, Exception):
            raise out
        return out

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        self.encoder.encode(request)
        self.requests.append(request)
        self.tasks.add(asyncio.create_task(self._write(request)))

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        self.aborted |= set(request_ids)

    async def _write(self, request: EngineCoreRequest) -> None:
        params = request.sampling_params
        assert params is not None and params.max_tokens is not None
        said = {
            **msgspec.structs.asdict(params),
            "prompt": request.prompt_token_ids,
            "priority": request.priority,
        }
        del said["output_kind"]  # a stream says the same
        digest = hashlib.sha256(repr(sorted(said.items(), key=lambda item: item[0])).encode()).digest()
        while not self.reads.is_set():
            await asyncio.sleep(0.005)
        for i in range(params.max_tokens):
            if request.request_id in self.aborted:
                return
            if i == self.dies_after:
                self.resources.engine_dead = True
                self.outputs.put_nowait(EngineDeadError())
                return
            if i == self.fails_after:
                self._put(request, [], FinishReason.ERROR)
                return
            self._put(
                request, [100 + digest[i % 32]], FinishReason.LENGTH if i + 1 == params.max_tokens else None
            )
            await asyncio.sleep(0)

    def _put(self, request: EngineCoreRequest, ids: list[int], reason: FinishReason | None) -> None:
        params, logprobs = request.sampling_params, None
        if params is not None and params.logprobs is not None and ids:
            best = np.arange(max(params.logprobs, 0) + 1)
            logprobs = LogprobsLists((ids[0] + best)[None], -(1.0 + best)[None], np.array([1]))
        output = EngineCoreOutput(request.request_id, ids, new_logprobs=logprobs, finish_reason=reason)
        self.outputs.put_nowait(EngineCoreOutputs(outputs=[output], timestamp=time.monotonic()))

    def shutdown(self, timeout: float | None = None) -> None:
        pass


@contextmanager
def served(*flags: str, max_model_len: int = 512) -> Iterator[tuple[str, Core]]:
    """The address of a server of booklm with these flags of `vllm serve`, and its engine core."""
    core = Core()
    words = [
        "--model",
        BOOKLM,
        "--served-model-name",
        "booklm",
        "--chat-template",
        TEMPLATE,
        "--dtype",
        "float32",
        *flags,
    ]
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(
        [*words, "--max-model-len", str(max_model_len)]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
        patch.setattr(EngineCoreClient, "make_async_mp_client", lambda **_: core)
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
        engine = AsyncLLM.from_vllm_config(config, disable_log_stats=True)
    core.front_end = engine
    core.unfinished = engine.get_num_unfinished_requests
    app = build_app(args, ("generate",), config.model_config)
    with socket_server(app, init_app_state(engine, app.state, args, ("generate",))) as address:
        yield address, core
    engine.renderer.shutdown()


@contextmanager
def socket_server(app: Any, first: Any = None) -> Iterator[str]:
    """The address of an ASGI app that is served, after something was awaited, by a thread."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))

    async def serve() -> None:
        if first is not None:
            await first
        with contextlib.suppress(AttributeError):
            app.state.server = server
        await server.serve()

    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)


def post(address: str, path: str, body: dict[str, Any]) -> httpx.Response:
    content = json.dumps(body)  # not httpx's, which refuses NaN
    headers = {"Content-Type": "application/json"}
    # Else certificates, of no use here, are read for each request.
    return httpx.post(address + path, content=content, headers=headers, timeout=60, verify=False)


def without_chance(text: str) -> str:
    """An answer without what vLLM draws or takes from a clock, and without the configuration's
    fingerprint.
    """
    text = re.sub(r'"(id|item_id|system_fingerprint)": ?"[^"]*"', r'"\1":""', text)
    return re.sub(r'"(created|created_at)": ?[\d.]+', r'"\1":0', text)
