"""How responses are sent: errors with an HTTP status, streams with early headers and keep-alives.

vLLM sends a stream's status before its engine has checked the request. An error is then an event of a 200, or
a connection that is cut. Here the start of a stream waits until the engine has admitted the request, which is
before any work on it, not until the first token. A later error ends the stream as the route's API defines it.
"""

import asyncio
import contextlib
import contextvars
import functools
import json
from collections.abc import AsyncGenerator
from http import HTTPStatus
from typing import Any

from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.entrypoints.anthropic import protocol as anthropic
from vllm.entrypoints.anthropic.protocol import AnthropicError, AnthropicErrorResponse
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorInfo
from vllm.exceptions import GenerationError
from vllm.logger import init_logger
from vllm.utils.async_utils import run_in_loop
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_longctx.config import LongContextError

logger = init_logger("vllm.longctx")

KEEP_ALIVE_COMMENT = b": keep-alive\n\n"
PING_EVENT = b'event: ping\ndata: {"type": "ping"}\n\n'
# Events that /v1/responses sends before its request goes to the engine.
EARLY_EVENTS = (b"event: response.created", b"event: response.in_progress", b"event: response.queued")


class Admission:
    """Whether the engine has admitted the requests that one HTTP request makes of it.

    requested: How many it has made.
    admitted: How many the engine has admitted.
    error: What the first that failed raised, before or after its admission.
    decided: Set when all are admitted, or one has failed.

    headers: Of the HTTP request.
    tenant, tokens, saves: What it counts for in quotas while it is under way, see `adapters.admit`: whose it
        is, its tokens, and by name the bytes of adapters that it saves, at most.
    """

    def __init__(self, headers: Headers) -> None:
        self.headers = headers
        self.tenant: str | None = None
        self.tokens = 0
        self.saves: dict[str, int] = {}
        self.requested = self.admitted = 0
        self.error: Exception | None = None
        self.decided = asyncio.Event()

    def admit(self) -> None:
        self.admitted += 1
        if self.admitted >= self.requested:
            self.decided.set()

    def fail(self, error: Exception) -> None:
        self.error = self.error or error
        self.decided.set()


_admission: contextvars.ContextVar[Admission | None] = contextvars.ContextVar("admission", default=None)


def current_admission() -> Admission | None:
    """Of the HTTP request to a longctx server within which the caller runs. None offline."""
    return _admission.get()


def over_http() -> bool:
    """Whether the caller runs within an HTTP request to a longctx server."""
    return _admission.get() is not None


def track_admissions(engine: Any) -> None:
    """Have an app's engine client (EngineClient) update the admission of each HTTP request."""
    if "generate" in vars(engine):
        return
    generate, add_request = engine.generate, engine.add_request

    @functools.wraps(generate)
    def tracked_generate(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        admission, outputs = _admission.get(), generate(*args, **kwargs)
        if admission is None:
            return outputs
        admission.requested += 1
        return _tracked(outputs, admission)

    @functools.wraps(add_request)
    async def tracked_add_request(*args: Any, **kwargs: Any) -> Any:
        added = await add_request(*args, **kwargs)
        if (admission := _admission.get()) is not None:
            admission.admit()
        return added

    engine.generate, engine.add_request = tracked_generate, tracked_add_request


def end_requests_at_shutdown(engine: Any) -> None:
    """Have an app's engine client (AsyncLLM) end the requests that its engine has not ended at its shutdown.

    vLLM's client then stops reading outputs, also those that would end requests. Their connections stay open,
    and vLLM's server waits for them without a limit.
    """
    shutdown = engine.shutdown

    @functools.wraps(shutdown)
    def ending(*args: Any, **kwargs: Any) -> None:
        shutdown(*args, **kwargs)
        if (handler := engine.output_handler) is not None:
            run_in_loop(handler.get_loop(), engine.output_processor.propagate_error, EngineDeadError())

    engine.shutdown = ending


async def _tracked(outputs: AsyncGenerator[Any, None], admission: Admission) -> AsyncGenerator[Any, None]:
    async with contextlib.aclosing(outputs):
        try:
            async for output in outputs:
                yield output
        except Exception as e:
            admission.fail(e)
            raise


def with_response_sender(app: ASGIApp, route: APIRoute, keep_alive_s: float) -> ASGIApp:
    """A route's app whose responses are sent as this module says.

    keep_alive_s: Seconds without an event after which a stream sends a keep-alive. 0 for none.
    """

    async def respond(scope: Scope, receive: Receive, send: Send) -> None:
        sender = ResponseSender(route, scope, receive, send, keep_alive_s)
        token = _admission.set(sender.admission)
        try:
            await app(scope, receive, sender.send)
        except Exception as e:
            if not await sender.end_with_error(e):
                raise
        finally:
            _admission.reset(token)
            sender.admission.tokens, sender.admission.saves = 0, {}
            await sender.close()

    return respond


class ResponseSender:
    """Sends one response. The route's app gets `send` in place of the server's.

    admission: Of the HTTP request.
    """

    def __init__(
        self,
        route: APIRoute,
        scope: Scope,
        receive: Receive,
        send: Send,
        keep_alive_s: float,
    ) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        # By the error response that the route declares.
        self._anthropic = route.responses.get(400, {}).get("model") is AnthropicErrorResponse
        self._responses = route.path == "/v1/responses"
        self._keep_alive_s = keep_alive_s
        self.admission = Admission(Headers(scope=scope))
        self._buffered: list[Message] = []  # of a stream that waits for its admission
        self._first_event = self._last_event = b""
        self._streams = self._ended = False
        self._sent_at = 0.0
        self._lock = asyncio.Lock()
        self._keep_alive: asyncio.Task[None] | None = None

    async def send(self, message: Message) -> None:
        async with self._lock:
            if self._ended:  # by an error response
                return
            if self._buffered:
                self._buffered.append(message)
                if self._must_wait(message):
                    return
                await self._start_stream()
            elif _starts_stream(message):
                self._buffered.append(message)
                self._keep_alive = asyncio.create_task(self._keep_stream_alive())
            elif self._streams:
                await self._forward(message)
            elif self._must_convert(self.admission.error) and _starts_error(message):
                await self._send_error(self.admission.error)
            else:
                await self._send(message)

    def _must_convert(self, error: BaseException | None) -> bool:
        """Whether vLLM has no error response of the route's API for an error."""
        return self._anthropic and isinstance(error, LongContextError)

    def _must_wait(self, message: Message) -> bool:
        """Whether a stream still waits for its admission after this message."""
        if self.admission.decided.is_set() or not message.get("more_body", False):
            return False
        # A route that has made no request to the engine makes none, or makes it later.
        return self.admission.requested > 0 or message.get("body", b"").startswith((*EARLY_EVENTS, b":"))

    async def _start_stream(self) -> None:
        """Send the buffered messages, or an error response in place of the stream."""
        self.admission.decided.set()
        if self.admission.error is not None:
            await self._send_error(self.admission.error)
        elif error := _error_in(*self._buffered[1:2]):  # the handler failed before its request to the engine
            await self._send_whole(JSONResponse(error, status_code=error["error"]["code"]))
        else:
            buffered, self._buffered, self._streams = self._buffered, [], True
            for message in buffered:
                await self._forward(message)

    async def _forward(self, message: Message) -> None:
        """Send one message of a stream that has started."""
        body = message.get("body", b"")
        if self._anthropic and body.startswith(b"event: error"):
            message = {**message, "body": self._with_cause(body)}
        if body:
            self._first_event, self._last_event = self._first_event or body, body
        self._sent_at = asyncio.get_running_loop().time()
        self._ended = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self._send(message)

    async def _keep_stream_alive(self) -> None:
        """Start the stream when its admission is decided, and send keep-alives until it ends."""
        with contextlib.suppress(OSError):  # the client has left
            await self.admission.decided.wait()
            async with self._lock:
                if self._buffered:
                    await self._start_stream()
            while self._keep_alive_s and not self._ended:
                await asyncio.sleep(self._sent_at + self._keep_alive_s - asyncio.get_running_loop().time())
                async with self._lock:
                    await self._send_keep_alive()

    async def _send_keep_alive(self) -> None:
        now = asyncio.get_running_loop().time()
        if self._ended or now - self._sent_at < self._keep_alive_s:
            return
        self._sent_at = now
        if self._last_event and not self._last_event.endswith(b"\n\n"):  # in the middle of an event
            return
        if self._responses and self.admission.error is not None:  # vLLM's response would wait for ever
            await self._fail_response()
            return
        keep_alive = PING_EVENT if self._anthropic else KEEP_ALIVE_COMMENT
        await self._send({"type": "http.response.body", "body": keep_alive, "more_body": True})

    async def end_with_error(self, error: Exception) -> bool:
        """End the response with an error that the route's app has raised. False if it can only be raised."""
        async with self._lock:
            if self._ended:
                return True
            # Once a response has started, Starlette raises a RuntimeError from an error that has a handler.
            cause = error
            if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
                cause = error.__cause__
            if self._buffered or (not self._streams and self._must_convert(cause)):
                await self._send_error(self.admission.error or cause)
                return True
            if not (self._streams and self._responses):
                return False
            logger.error("A stream of %s failed.", self._scope["path"], exc_info=error)
            await self._fail_response()
            return True

    async def close(self) -> None:
        if self._keep_alive is not None:
            self._keep_alive.cancel()
            await asyncio.wait([self._keep_alive])

    async def _send_error(self, error: Exception | None) -> None:
        """Send the response that the route has for this error where nothing is streamed."""
        assert error is not None
        response = create_error_response(error)
        content, details = response.model_dump(), response.error
        if self._anthropic:
            anthropic_error = AnthropicError(type=_anthropic_type(error, details), message=details.message)
            content = AnthropicErrorResponse(error=anthropic_error).model_dump()
        await self._send_whole(JSONResponse(content, status_code=details.code))

    async def _send_whole(self, response: JSONResponse) -> None:
        self._buffered, self._ended = [], True
        await response(self._scope, self._receive, self._send)

    def _with_cause(self, event: bytes) -> bytes:
        """An error event of /v1/messages, with the engine's error.

        vLLM converts the stream of a chat completion there. An error event makes the conversion fail, and
        vLLM sends that failure instead of the error.
        """
        if self.admission.error is None and b"ChatCompletionStreamResponse" not in event:
            return event
        message = create_error_response(self.admission.error or GenerationError()).error.message
        error = AnthropicErrorResponse(error=AnthropicError(type="api_error", message=message))
        return f"event: error\ndata: {error.model_dump_json()}\n\n".encode()

    async def _fail_response(self) -> None:
        """End a stream of /v1/responses with the events of OpenAI's API. vLLM has none and fails."""
        message = create_error_response(self.admission.error or GenerationError()).error.message
        events_sent = self._first_event, self._last_event
        created, last = (json.loads(event.partition(b"data: ")[2] or "{}") for event in events_sent)
        number = last.get("sequence_number", -1) + 1
        error = {"code": "server_error", "message": message}
        failed = {**created.get("response", {}), "status": "failed", "error": error}
        events: list[dict[str, Any]] = [
            {"type": "error", **error, "param": None, "sequence_number": number},
            {"type": "response.failed", "response": failed, "sequence_number": number + 1},
        ]
        body = "".join(f"event: {e['type']}\ndata: {json.dumps(e)}\n\n" for e in events).encode()
        self._ended = True
        await self._send({"type": "http.response.body", "body": body, "more_body": True})
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


def _anthropic_type(error: Exception, details: ErrorInfo) -> str:
    """What Anthropic's API calls an error. vLLM 0.32 gives it its own name."""
    if details.code == HTTPStatus.TOO_MANY_REQUESTS:
        return "rate_limit_error"
    if isinstance(error, LongContextError):
        return "invalid_request_error"
    translate = getattr(anthropic, "translate_error_type", None)
    return details.type if translate is None else translate(details.code)


def _starts_stream(message: Message) -> bool:
    return message["type"] == "http.response.start" and any(
        name.lower() == b"content-type" and value.partition(b";")[0].strip() == b"text/event-stream"
        for name, value in message.get("headers", ())
    )


def _starts_error(message: Message) -> bool:
    return message["type"] == "http.response.start" and message["status"] >= 400


def _error_in(event: Message | None = None) -> dict[str, Any] | None:
    """vLLM's error in a stream's first event. None if that is no error, or has no HTTP status."""
    body = event["body"] if event is not None and "body" in event else b""
    if not body.startswith(b'data: {"error"'):
        return None
    with contextlib.suppress(ValueError, KeyError, TypeError):
        response = json.loads(body.removeprefix(b"data: ").partition(b"\n")[0])
        if 400 <= response["error"]["code"] < 600:
            return response
    return None
