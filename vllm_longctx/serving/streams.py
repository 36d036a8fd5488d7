"""How an answer leaves the server: a refusal is its status, a stream's headers go out at once, and no stream falls silent.

vLLM sends a stream's status before its engine has looked at the request; a refusal is then an event of a 200, or a connection
cut in the middle. Here a stream's beginning waits for the engine to take the request, which is before any work, not for its
first token. What fails later ends the stream in the route's own way.
"""

import asyncio
import contextlib
import contextvars
import functools
import json
from collections.abc import AsyncGenerator
from typing import Any

from fastapi.routing import APIRoute
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.entrypoints.anthropic.protocol import AnthropicError, AnthropicErrorResponse
from vllm.entrypoints.serve import create_error_response
from vllm.exceptions import GenerationError
from vllm.logger import init_logger

from vllm_longctx.config import LongContextError

logger = init_logger("vllm.longctx")

COMMENT = b": keep-alive\n\n"
PING = b'event: ping\ndata: {"type": "ping"}\n\n'
# What /v1/responses sends before it asks the engine.
EARLY_EVENTS = (b"event: response.created", b"event: response.in_progress", b"event: response.queued")


class Admission:
    """What the engine says to the requests that one HTTP request makes of it.

    asked, taken: how many were made, and taken by the engine. error: what the first that failed raised, at whatever time.
    """

    def __init__(self) -> None:
        self.asked = self.taken = 0
        self.error: Exception | None = None
        self.decided = asyncio.Event()  # all are taken, or one is refused

    def take(self) -> None:
        self.taken += 1
        if self.taken >= self.asked:
            self.decided.set()

    def fail(self, error: Exception) -> None:
        self.error = self.error or error
        self.decided.set()


_admission: contextvars.ContextVar[Admission | None] = contextvars.ContextVar("admission", default=None)


def over_http() -> bool:
    """Whether the code that asks works on an HTTP request to a route of a longctx server."""
    return _admission.get() is not None


def watch(engine: Any) -> None:
    """Let the engine client of an app (EngineClient) tell of each HTTP request what becomes of it."""
    if "generate" in vars(engine):
        return
    generate, add_request = engine.generate, engine.add_request

    @functools.wraps(generate)
    def watched_generate(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        admission, outputs = _admission.get(), generate(*args, **kwargs)
        if admission is None:
            return outputs
        admission.asked += 1
        return _watched(outputs, admission)

    @functools.wraps(add_request)
    async def watched_add_request(*args: Any, **kwargs: Any) -> Any:
        added = await add_request(*args, **kwargs)
        if (admission := _admission.get()) is not None:
            admission.take()
        return added

    engine.generate, engine.add_request = watched_generate, watched_add_request


async def _watched(outputs: AsyncGenerator[Any, None], admission: Admission) -> AsyncGenerator[Any, None]:
    async with contextlib.aclosing(outputs):
        try:
            async for output in outputs:
                yield output
        except Exception as e:
            admission.fail(e)
            raise


def guarded(app: ASGIApp, route: APIRoute, keep_alive_s: float) -> ASGIApp:
    """The app of a route, whose answers leave as this module says. keep_alive_s: seconds of silence; 0 for no keep-alive."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        out = Answer(route, scope, receive, send, keep_alive_s)
        token = _admission.set(out.admission)
        try:
            await app(scope, receive, out.send)
        except Exception as e:
            if not await out.end_with(e):
                raise
        finally:
            _admission.reset(token)
            await out.close()

    return answer


class Answer:
    """The way of one answer from a route's app to the server: `send` is what the app is given as its own."""

    def __init__(self, route: APIRoute, scope: Scope, receive: Receive, send: Send, keep_alive_s: float) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        # As the route declares it, which is how vLLM's handlers answer there.
        self._anthropic = route.responses.get(400, {}).get("model") is AnthropicErrorResponse
        self._responses = route.path == "/v1/responses"
        self._keep_alive_s = keep_alive_s
        self.admission = Admission()
        self._held: list[Message] = []  # a stream's start, and what came before the engine's word
        self._first_event = self._last_event = b""
        self._streams = self._ended = False
        self._sent_at = 0.0
        self._lock = asyncio.Lock()
        self._guard: asyncio.Task[None] | None = None

    async def send(self, message: Message) -> None:
        async with self._lock:
            if self._ended:  # by an error that was the whole answer
                return
            if self._held:
                self._held.append(message)
                if self._waits_behind(message):
                    return
                await self._begin()
            elif _starts_stream(message):
                self._held.append(message)
                self._guard = asyncio.create_task(self._watch())
            elif self._streams:
                await self._pass_on(message)
            elif self._anthropic and _starts_refusal(message) and isinstance(self.admission.error, LongContextError):
                await self._refuse(self.admission.error)
            else:
                await self._send(message)

    def _waits_behind(self, message: Message) -> bool:
        """Whether a stream's beginning is still to wait for the engine, behind an event that has come."""
        if self.admission.decided.is_set() or not message.get("more_body", False):
            return False
        # Without a request to the engine so far: a route that never makes one, or makes it later.
        return self.admission.asked > 0 or message.get("body", b"").startswith((*EARLY_EVENTS, b":"))

    async def _begin(self) -> None:
        """Let go what was held; where it is a refusal, that is the whole answer."""
        self.admission.decided.set()
        if self.admission.error is not None:
            await self._refuse(self.admission.error)
        elif error := _error_in(*self._held[1:2]):  # of a handler that failed before it asked the engine
            await self._whole(JSONResponse(error, status_code=error["error"]["code"]))
        else:
            held, self._held, self._streams = self._held, [], True
            for message in held:
                await self._pass_on(message)

    async def _pass_on(self, message: Message) -> None:
        """One message of a stream that has begun."""
        body = message.get("body", b"")
        if self._anthropic and body.startswith(b"event: error"):
            message = {**message, "body": self._with_its_cause(body)}
        if body:
            self._first_event, self._last_event = self._first_event or body, body
        self._sent_at = asyncio.get_running_loop().time()
        self._ended = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self._send(message)

    async def _watch(self) -> None:
        """Begins a stream as soon as the engine has spoken, and breaks its silences."""
        with contextlib.suppress(OSError):  # the client has left
            await self.admission.decided.wait()
            async with self._lock:
                if self._held:
                    await self._begin()
            while self._keep_alive_s and not self._ended:
                await asyncio.sleep(self._sent_at + self._keep_alive_s - asyncio.get_running_loop().time())
                async with self._lock:
                    await self._break_silence()

    async def _break_silence(self) -> None:
        now = asyncio.get_running_loop().time()
        if self._ended or now - self._sent_at < self._keep_alive_s:
            return
        self._sent_at = now
        if self._last_event and not self._last_event.endswith(b"\n\n"):  # inside of one that a handler sends in pieces
            return
        if self._responses and self.admission.error is not None:  # vLLM's generator of background responses waits for ever
            await self._fail_response()
            return
        keep_alive = PING if self._anthropic else COMMENT
        await self._send({"type": "http.response.body", "body": keep_alive, "more_body": True})

    async def end_with(self, error: Exception) -> bool:
        """What the route's app raised ends the answer. False if there is no way but to raise it."""
        async with self._lock:
            if self._ended:
                return True
            # Starlette's word for an error that would have had a handler, had the answer not begun.
            cause = error.__cause__ if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception) else error
            if self._held or (not self._streams and self._anthropic and isinstance(cause, LongContextError)):
                await self._refuse(self.admission.error or cause)
                return True
            if not (self._streams and self._responses):
                return False
            logger.error("A stream of %s failed.", self._scope["path"], exc_info=error)
            await self._fail_response()
            return True

    async def close(self) -> None:
        if self._guard is not None:
            self._guard.cancel()
            await asyncio.wait([self._guard])

    async def _refuse(self, error: Exception | None) -> None:
        """The answer that the route gives to this error where nothing is streamed."""
        assert error is not None
        said = create_error_response(error)
        if self._anthropic:
            kind = "invalid_request_error" if isinstance(error, LongContextError) else said.error.type
            shaped = AnthropicErrorResponse(error=AnthropicError(type=kind, message=said.error.message))
            await self._whole(JSONResponse(shaped.model_dump(), status_code=said.error.code))
        else:
            await self._whole(JSONResponse(said.model_dump(), status_code=said.error.code))

    async def _whole(self, response: JSONResponse) -> None:
        self._held, self._ended = [], True
        await response(self._scope, self._receive, self._send)

    def _with_its_cause(self, event: bytes) -> bytes:
        """vLLM's converter of streams stumbles over an error event, and tells of its stumbling."""
        if self.admission.error is None and b"ChatCompletionStreamResponse" not in event:
            return event
        said = create_error_response(self.admission.error or GenerationError()).error
        error = AnthropicErrorResponse(error=AnthropicError(type="api_error", message=said.message))
        return f"event: error\ndata: {error.model_dump_json()}\n\n".encode()

    async def _fail_response(self) -> None:
        """Ends a stream of /v1/responses as OpenAI's API does. vLLM has no events for that and trips over the attempt."""
        message = create_error_response(self.admission.error or GenerationError()).error.message
        created, last = (json.loads(event.partition(b"data: ")[2] or "{}") for event in (self._first_event, self._last_event))
        number = last.get("sequence_number", -1) + 1
        failed = {**created.get("response", {}), "status": "failed", "error": {"code": "server_error", "message": message}}
        events: list[dict[str, Any]] = [
            {"type": "error", "code": "server_error", "message": message, "param": None, "sequence_number": number},
            {"type": "response.failed", "response": failed, "sequence_number": number + 1},
        ]
        body = "".join(f"event: {e['type']}\ndata: {json.dumps(e)}\n\n" for e in events).encode()
        self._ended = True
        await self._send({"type": "http.response.body", "body": body, "more_body": True})
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


def _starts_stream(message: Message) -> bool:
    return message["type"] == "http.response.start" and any(
        name.lower() == b"content-type" and value.partition(b";")[0].strip() == b"text/event-stream"
        for name, value in message.get("headers", ())
    )


def _starts_refusal(message: Message) -> bool:
    return message["type"] == "http.response.start" and message["status"] >= 400


def _error_in(event: Message | None = None) -> dict[str, Any] | None:
    """What vLLM says in a stream's first event, if that is an error and has a status."""
    body = event["body"] if event is not None and "body" in event else b""
    if not body.startswith(b'data: {"error"'):
        return None
    with contextlib.suppress(ValueError, KeyError, TypeError):
        said = json.loads(body.removeprefix(b"data: ").partition(b"\n")[0])
        if 400 <= said["error"]["code"] < 600:
            return said
    return None
