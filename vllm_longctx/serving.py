"""What a longctx server checks in a request before vLLM takes it, and the one thing it fills in.

vLLM ignores keys it does not know, converts wrong types where it can and shortens `max_tokens` to what fits. Here nothing is
silently ignored: each is a 400 that names the field. `RequestChecks` is given to `vllm serve` as a middleware (`plugin.py`);
`check_engine_requests` is the part that holds for `LLM.generate` too.
"""

import contextvars
import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.input_processor import InputProcessor

from vllm_longctx.adaptation import stop_strings
from vllm_longctx.config import KEY, LongContextConfig, LongContextError, RequestOptions, active_config, did_you_mean
from vllm_longctx.engine_args import trained_length

NOT_PER_REQUEST = "this engine has no options per request (it was started without adaptation); leave it out"
EXAMPLE = """{"vllm_xargs": {"longctx": "{\\"temp_lora\\": true}"}}"""
# Requests travel to the engine as msgpack, whose integers end here; beyond, vLLM answers 500.
INT64 = range(-(2**63), 2**63)
# In vLLM's order of precedence.
OUTPUT_LIMITS = ("max_completion_tokens", "max_tokens")

# The field with which the HTTP request being served limits its output, and its value.
_output_limit: contextvars.ContextVar[tuple[str, int] | None] = contextvars.ContextVar("output_limit", default=None)
_over_http: contextvars.ContextVar[bool] = contextvars.ContextVar("over_http", default=False)


class RequestError(VLLMValidationError, LongContextError):
    """A bad request: over HTTP a 400 whose `param` is the field, offline a ValueError."""

    def __init__(self, message: str, parameter: str) -> None:
        VLLMValidationError.__init__(self, message, parameter=parameter)


class RequestChecks:
    """ASGI middleware that puts the checks in front of every route with a pydantic body when the server starts.

    They stand right before vLLM's handlers, behind its authentication, CORS headers and error handlers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            prepare(scope["app"])
        await self.app(scope, receive, send)


def prepare(app: FastAPI) -> None:
    """Check the bodies of the app's routes, and limit open-ended requests, if its engine runs a longctx configuration."""
    config = LongContextConfig.parse(app.state.vllm_config.additional_config[KEY])
    if not config.changes_engine:
        return
    for name in app.state:
        # What vLLM takes from the model's generation_config.json, where that says anything.
        defaults = getattr(app.state[name], "default_sampling_params", None)
        if isinstance(defaults, dict):
            defaults.setdefault("max_tokens", config.serving.default_max_tokens)
    for route in app.routes:
        if isinstance(route, APIRoute) and route.body_field is not None:
            models = list(_models(route.body_field.field_info.annotation))
            if models:
                route.app = functools.partial(_checked, route.app, models)


async def _checked(app: ASGIApp, models: list[type], scope: Scope, receive: Receive, send: Send) -> None:
    try:
        body = await Request(scope, receive).body()
    except ClientDisconnect:
        return
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):
        parsed = None
    if isinstance(parsed, dict):  # vLLM answers anything else with a 400
        check_body(models, parsed)
        _over_http.set(True)
        given = [(name, parsed[name]) for name in OUTPUT_LIMITS if parsed.get(name) is not None]
        # Beam search sends its prompts again for every token.
        _output_limit.set(given[0] if given and not parsed.get("use_beam_search") else None)
    unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return unread.pop() if unread else await receive()

    await app(scope, receive_again, _first_error_as_status(scope, receive, send))


def _first_error_as_status(scope: Scope, receive: Receive, send: Send) -> Send:
    """A `send` that holds a stream's status back until its first event, and makes an error there the whole answer.

    vLLM checks most sampling parameters only after it has sent a stream's 200.
    """
    held: list[Message] = []
    answered = False

    async def send_checked(message: Message) -> None:
        nonlocal answered
        if answered:
            return
        if message["type"] == "http.response.start" and (b"content-type", b"text/event-stream") in (
            (name.lower(), value.partition(b";")[0]) for name, value in message["headers"]
        ):
            held.append(message)
            return
        event = message.get("body", b"")
        if held and event.startswith(b'data: {"error"'):
            answered = True
            error = json.loads(event.removeprefix(b"data: ").partition(b"\n")[0])
            await JSONResponse(error, status_code=error["error"]["code"])(scope, receive, send)
            return
        while held:
            await send(held.pop())
        await send(message)

    return send_checked


def check_body(models: list[type], body: dict[str, Any]) -> None:
    """Raises RequestError naming the first field that vLLM would ignore, convert or stumble over.

    models: the pydantic models of which the body is to fit one.
    """
    if KEY in body:
        raise RequestError(f"{KEY}: options of ours stand in vllm_xargs, as a JSON string: {EXAMPLE}", KEY)
    extra_args = body.get("vllm_xargs")
    if isinstance(extra_args, dict) and not isinstance(extra_args.get(KEY, ""), str):
        raise RequestError(f"vllm_xargs.{KEY} = {_short(extra_args[KEY])}: give a JSON string, {EXAMPLE}", "vllm_xargs")
    _check_keys(models, body)
    _check_numbers(body)
    for name, value in body.items():
        if not isinstance(value, list | dict):
            _check_type(models, name, value)


def _check_keys(models: list[type], body: dict[str, Any], where: str = "") -> None:
    fields: dict[str, list[Any]] = {}
    for model in models:
        for name, annotation in _fields(model):
            fields.setdefault(name, []).append(annotation)
    for key, value in body.items():
        if key not in fields:
            hint = did_you_mean(key, fields) or "leave it out"
            raise RequestError(f"{where}{key}: unknown key; {hint}", f"{where}{key}")
        inner = [model for annotation in fields[key] for model in _models(annotation)]
        if inner and isinstance(value, dict):
            _check_keys(inner, value, f"{where}{key}.")


def _models(annotation: Any) -> Iterator[type]:
    """The pydantic models and dataclasses among the alternatives that an annotation names."""
    if isinstance(annotation, type) and (issubclass(annotation, BaseModel) or dataclasses.is_dataclass(annotation)):
        yield annotation
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        for alternative in typing.get_args(annotation):
            yield from _models(alternative)


def _fields(model: type) -> Iterator[tuple[str, Any]]:
    """Names that a body may use, each with its annotation."""
    if dataclasses.is_dataclass(model):
        yield from ((field.name, field.type) for field in dataclasses.fields(model) if field.init)
        return
    assert issubclass(model, BaseModel)
    for name, info in model.model_fields.items():
        yield name, info.annotation
        yield info.alias or name, info.annotation


def _check_numbers(body: dict[str, Any]) -> None:
    pending = list(body.items())
    for name, value in pending:
        if isinstance(value, dict):
            pending += [(f"{name}.{key}", inner) for key, inner in value.items()]
        elif isinstance(value, int) and value not in INT64:
            raise RequestError(f"{name} = {_short(value)} does not fit into 64 bits", name)
        elif isinstance(value, float) and not math.isfinite(value):
            raise RequestError(f"{name} = {value} is not a finite number", name)


def _check_type(models: list[type], name: str, value: str | float | None) -> None:
    """No conversion: "5" is not a number, 1 not a boolean."""
    errors = []
    for adapter in filter(None, (_adapter(model, name) for model in models)):
        try:
            adapter.validate_json(json.dumps(value), strict=True)
            return
        except ValidationError as e:
            errors.append(e.errors()[0]["msg"])
    if errors:
        raise RequestError(f"{name} = {_short(value)}: {errors[0]}", name)


@functools.cache
def _adapter(model: type[BaseModel], name: str) -> TypeAdapter[Any] | None:
    for known, info in model.model_fields.items():
        if name in (known, info.alias):
            return TypeAdapter(info.rebuild_annotation())
    return None


def _short(value: Any, characters: int = 100) -> str:
    text = repr(value)
    return text if len(text) <= characters else f"{text[:characters]}..."


def check_engine_requests() -> None:
    """Check every request that enters a longctx engine of this process, over HTTP or offline.

    Afterwards such an engine refuses, with RequestError, bad options of ours in `SamplingParams.extra_args`, an output
    limit over HTTP that does not fit behind the prompt, and a priority that its scheduler does not look at.
    """
    process_inputs = InputProcessor.process_inputs
    if hasattr(process_inputs, "__wrapped__"):
        return

    @functools.wraps(process_inputs)
    def process(self: InputProcessor, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        if KEY not in (self.vllm_config.additional_config or {}):
            return process_inputs(self, request_id, prompt, params, *args, **kwargs)
        config = active_config(self.vllm_config)
        if not config.changes_engine:
            return process_inputs(self, request_id, prompt, params, *args, **kwargs)
        options, adapts = _adaptation(config, self.vllm_config, params)
        try:
            request = process_inputs(self, request_id, prompt, params, *args, **kwargs)
        except VLLMValidationError as e:
            if str(e).startswith("Token id"):  # the one message of vLLM's that does not say where
                raise RequestError(f"prompt: {e}", "prompt") from None
            raise
        if request.lora_request is not None and options == RequestOptions():
            adapts = False  # it has its adapter, also where all others learn one
        if adapts:
            _check_adapting(request, options)
        _check_room(request, self.model_config.max_model_len)
        if not adapts and not config.changes_attention:
            _limit_to_trained(request, params, trained_length(self.model_config))
        policy = self.scheduler_config.policy
        if request.priority and policy != "priority":
            raise RequestError(
                f"priority = {request.priority}, but the scheduling policy is {policy!r}; leave it out, or start the engine "
                "with --scheduling-policy priority",
                "priority",
            )
        return request

    InputProcessor.process_inputs = process


def _adaptation(config: LongContextConfig, vllm_config: VllmConfig, params: Any) -> tuple[RequestOptions, bool]:
    """A request's options, and whether it adapts. Raises RequestError naming what is wrong with them."""
    given = getattr(params, "extra_args", None) or {}
    if config.adaptation is None or not isinstance(params, SamplingParams):
        if KEY in given:
            name = f"vllm_xargs.{KEY}" if _over_http.get() else KEY
            raise RequestError(f"{name}: {NOT_PER_REQUEST}", KEY)
        return RequestOptions(), False
    try:
        options = RequestOptions.parse(given.get(KEY, {}))
        trained, kv_block = trained_length(vllm_config.model_config), vllm_config.cache_config.block_size
        adapts = config.adaptation.for_request(options, trained, kv_block) is not None
    except LongContextError as e:
        raise RequestError(str(e) if str(e).startswith(KEY) else f"{KEY}.{e}", KEY) from None
    if options.save_as is not None and params.n > 1:
        raise RequestError(
            f"{KEY}.save_as = {options.save_as!r} with n = {params.n}: samples would overwrite it; set n to 1", KEY
        )
    return options, adapts


def _check_adapting(request: EngineCoreRequest, options: RequestOptions) -> None:
    if request.lora_request is not None:
        raise RequestError(
            f"{KEY}.temp_lora beside the adapter {request.lora_request.lora_name!r}: a request has one; leave one of them out",
            KEY,
        )
    if request.prompt_token_ids is None or request.resumable:
        raise RequestError(f"{KEY}.temp_lora needs a prompt of tokens, given at once; leave it out", KEY)
    if options.save_as is not None:
        stop_strings.wait_for_save(request, options.save_as)


def _limit_to_trained(request: EngineCoreRequest, params: Any, trained: int) -> None:
    """Requests that do not adapt see all they read, so they end where the model was trained to end."""
    if request.sampling_params is None or request.prompt_token_ids is None:
        return
    prompt, asked = len(request.prompt_token_ids), request.sampling_params.max_tokens
    explicit = _output_limit.get() is not None if _over_http.get() else params.max_tokens is not None
    if prompt >= trained or (explicit and prompt + asked > trained):
        raise RequestError(
            f"prompt of {prompt} tokens and max_tokens = {asked}: this request does not adapt, and the model was trained on "
            f"{trained} tokens; shorten it, or ask for {EXAMPLE}",
            "prompt" if prompt >= trained else "max_tokens",
        )
    request.sampling_params.max_tokens = min(asked, trained - prompt)


def _check_room(request: EngineCoreRequest, max_model_len: int) -> None:
    output_limit = _output_limit.get()
    if output_limit is None or request.prompt_token_ids is None:
        return
    (name, value), prompt = output_limit, len(request.prompt_token_ids)
    if prompt + value > max_model_len:
        raise RequestError(
            f"{name} = {value} does not fit behind the prompt of {prompt} tokens: max_model_len is {max_model_len}; "
            f"ask for at most {max_model_len - prompt}",
            name,
        )
