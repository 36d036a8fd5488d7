"""The checks of a request to a longctx engine before vLLM takes it, and the default of max_tokens.

A body that stock vLLM accepts is accepted. Fields in it that vLLM ignores are logged and counted. Only
options of ours are checked strictly: a wrong one is a 400 that names it. With `serving.strict`, so is
everything that vLLM would silently ignore, convert or shorten. `vllm serve` gets `RequestChecks` as a
middleware (`plugin.py`). `check_engine_requests` is for `LLM.generate`, too.
"""

import contextvars
import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import typing_extensions
from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.datastructures import State
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.config import VllmConfig
from vllm.entrypoints.launchers.api_server import app_state
from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.multimodal.processing import BaseProcessingInfo
from vllm.sampling_params import BeamSearchParams, SamplingParams
from vllm.utils import length_from_prompt_token_ids_or_embeds
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.serial_utils import MsgpackEncoder

from vllm_longctx.config import KEY, LongContextConfig, LongContextError, RequestOptions, did_you_mean
from vllm_longctx.metrics import count_ignored_field, export_ignored_fields
from vllm_longctx.models.properties import TEXT_ONLY, trained_length
from vllm_longctx.serving import adapters, stop_strings
from vllm_longctx.serving.attention_options import CHAT_TEMPLATE, TURNS, check_attention, turns_of_prompt
from vllm_longctx.serving.streams import (
    Admission,
    current_admission,
    end_requests_at_shutdown,
    over_http,
    track_admissions,
    with_response_sender,
)
from vllm_longctx.settings import Adaptation, Settings, active_settings, plugin_configs
from vllm_longctx.temp_lora.messages import adapter_path
from vllm_longctx.temp_lora.peft_adapter import rank_of, read_directory_config

logger = init_logger("vllm.longctx")

WITHOUT_ADAPTATION = "this engine was started without adaptation; leave it out"
OVER_HTTP = f"vllm_xargs.{KEY}"  # the field of a body with options of ours
EXAMPLE = """{"vllm_xargs": {"longctx": "{\\"temp_lora\\": true}"}}"""
OFFLINE_EXAMPLE = """SamplingParams(extra_args={"longctx": {"temp_lora": True}})"""
ANY_BODY = "/invocations"  # SageMaker's route, which accepts the bodies of several other routes
# Integers that msgpack can send to the engine. For others vLLM answers 500.
INT64 = range(-(2**63), 2**63)
# In vLLM's order of precedence.
OUTPUT_LIMITS = ("max_completion_tokens", "max_tokens")

_encoder = MsgpackEncoder()  # that of vLLM's clients of its engine core

# With `serving.strict`: the field with which the current HTTP request limits its output, and its value.
OutputLimit = contextvars.ContextVar[tuple[str, int] | None]
_output_limit: OutputLimit = contextvars.ContextVar("output_limit", default=None)

Models = tuple[type, ...]  # pydantic models and dataclasses, of which a JSON object must fit one


class RequestError(VLLMValidationError, LongContextError):
    """A bad request: over HTTP a 400 whose `param` is the field, offline a ValueError.

    parameter: The field.
    """

    def __init__(self, message: str, parameter: str) -> None:
        VLLMValidationError.__init__(self, message, parameter=parameter)


class RequestChecks:
    """ASGI middleware that adds the checks to every route with a pydantic body when the server starts.

    They run right before vLLM's handlers, after its authentication, CORS headers and error handlers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            prepare(scope["app"])
        await self.app(scope, receive, send)


def prepare(app: FastAPI) -> None:
    """Check the bodies of an app's routes and send their responses as `streams` says.

    Does nothing the second time, and where the configuration changes nothing.
    """
    config = LongContextConfig.parse(app.state.vllm_config.additional_config[KEY])
    if config.mode.is_plain or getattr(app.state, "longctx_prepared", False):
        return
    app.state.longctx_prepared = True
    export_ignored_fields()
    track_admissions(app.state.engine_client)
    end_requests_at_shutdown(app.state.engine_client)
    adapters.add_routes(app)
    for route in app.routes:
        if isinstance(route, APIRoute) and "POST" in route.methods:
            models = _models(route.body_field.field_info.annotation) if route.body_field is not None else ()
            if models or route.path == ANY_BODY:
                route.app = functools.partial(_checked, route.app, route.path, models, config.serving.strict)
            route.app = with_response_sender(route.app, route, config.serving.keep_alive_s)


def limit_requests() -> None:
    """Give the handlers of every server of this process the limits of its longctx engine, and its checks.

    `vllm run-batch` and Ray Serve call the handlers without any HTTP.

    vLLM makes the handlers for `vllm serve` and `vllm run-batch` alike, and then initializes endpoint
    plugins.
    """
    init = app_state.init_endpoint_plugins_state
    if hasattr(init, "__wrapped__"):
        return

    @functools.wraps(init)
    async def limit(engine_client: Any, state: State, *args: Any, **kwargs: Any) -> None:
        await init(engine_client, state, *args, **kwargs)
        vllm_config = engine_client.vllm_config
        if KEY not in (vllm_config.additional_config or {}):
            return
        settings = active_settings(vllm_config)
        if settings.mode.is_plain:
            return
        template = getattr(getattr(state, "online_renderer", None), "chat_template", None)
        if template is not None:  # the server's own; else turns are those of the tokenizer's
            setattr(engine_client.renderer, CHAT_TEMPLATE, template)
        for handler in (state[name] for name in state):
            # From the model's generation_config.json, if it has any.
            defaults = getattr(handler, "default_sampling_params", None)
            if isinstance(defaults, dict):
                defaults.setdefault("max_tokens", settings.serving.default_max_tokens)
            if hasattr(handler, "beam_search") and not settings.mode.extends:
                handler.beam_search = _within(handler.beam_search, settings.temp_lora.plain_tokens)
            for name in ("create_chat_completion", "create_completion"):
                if (create := getattr(handler, name, None)) is not None:
                    setattr(handler, name, _with_own_options(create))

    app_state.init_endpoint_plugins_state = limit


def _with_own_options(create: Any) -> Any:
    """As `check_own_options`, for a handler's request."""

    @functools.wraps(create)
    async def checked(request: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(request, BaseModel):
            given = {name: getattr(request, name) for name in request.model_fields_set}
            check_own_options((type(request),), given)
        return await create(request, *args, **kwargs)

    return checked


async def _checked(
    app: ASGIApp,
    path: str,
    models: Models,
    strict: bool,
    scope: Scope,
    receive: Receive,
    send: Send,
) -> None:
    try:
        body = await Request(scope, receive).body()
    except ClientDisconnect:
        return
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):
        parsed = None
    if isinstance(parsed, dict):  # vLLM answers anything else with a 400
        check_own_options(models, parsed)
        if strict and models:
            check_strictly(models, parsed)
            given = [(name, parsed[name]) for name in OUTPUT_LIMITS if parsed.get(name) is not None]
            # Not with beam search, which sends its prompts again for every token.
            _output_limit.set(given[0] if given and not parsed.get("use_beam_search") else None)
        elif models:
            for where, name, _ in unknown_fields(models, parsed):
                if new := count_ignored_field(path, where + name):
                    text = "%s: vLLM does not know the field %s and ignores it; this is logged once."
                    logger.info(text, path, new)
    unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return unread.pop() if unread else await receive()

    await app(scope, receive_again, send)


def check_own_options(models: Models, body: dict[str, Any]) -> None:
    """Raises RequestError where options of ours are in a field or a form that is not read.

    models: Of which the body must fit one; empty where that is not known.
    """
    if KEY in body:
        raise RequestError(f"{KEY}: options of ours stand in vllm_xargs, as a JSON string: {EXAMPLE}", KEY)
    extra_args = body.get("vllm_xargs")
    if not isinstance(extra_args, dict) or KEY not in extra_args:
        return
    if models and "vllm_xargs" not in _fields(models):
        raise RequestError(f"{OVER_HTTP}: this route takes no vllm_xargs; leave it out", OVER_HTTP)
    if not isinstance(extra_args[KEY], str):
        given = _short(extra_args[KEY])
        raise RequestError(f"{OVER_HTTP} = {given}: give a JSON string, {EXAMPLE}", OVER_HTTP)
    if body.get("use_beam_search"):  # vLLM makes a request for each beam, without vllm_xargs
        reason = "a beam search takes no options of ours; leave it out, or use_beam_search"
        raise RequestError(f"{OVER_HTTP}: {reason}", OVER_HTTP)


def check_strictly(models: Models, body: dict[str, Any]) -> None:
    """Raises RequestError naming the first field that vLLM would ignore, convert or fail at.

    models: Of which the body must fit one.
    """
    for where, name, known in unknown_fields(models, body):
        if "[]" not in where:  # inside messages and tools vLLM decides
            hint = did_you_mean(name, known) or "leave it out"
            raise RequestError(f"{where}{name}: unknown key; {hint}", f"{where}{name}")
    _check_numbers(body)
    for name, value in body.items():
        if not isinstance(value, list | dict):
            _check_type(models, name, value)


def unknown_fields(models: Models, body: dict[str, Any]) -> Iterator[tuple[str, str, Iterable[str]]]:
    """Each field that no model has: its path, as `outer.` or `list[].`, its name, the known names there."""
    pending = [(models, "", body)]
    for models, where, values in pending:
        fields = _fields(models)
        for name, value in values.items():
            if name not in fields:
                yield where, name, fields
                continue
            one, many = fields[name]
            if one and isinstance(value, dict):
                pending.append((one, f"{where}{name}.", value))
            elif many and isinstance(value, list):
                pending += [(many, f"{where}{name}[].", item) for item in value if isinstance(item, dict)]


@functools.cache
def _fields(models: Models) -> dict[str, tuple[Models, Models]]:
    """Field names of a body. For each, the models of an object in it, and of the objects of a list in it."""
    annotations: dict[str, list[Any]] = {}
    for model in models:
        if dataclasses.is_dataclass(model):
            hints = typing.get_type_hints(model)
            for field in dataclasses.fields(model):
                if field.init:
                    annotations.setdefault(field.name, []).append(hints[field.name])
        else:
            assert issubclass(model, BaseModel)
            for name, info in model.model_fields.items():
                for spelling in {name, info.alias or name}:
                    annotations.setdefault(spelling, []).append(info.annotation)
    found = {}
    for name, given in annotations.items():
        alternatives = [a for annotation in given for a in _alternatives(annotation)]
        lists = [a for a in alternatives if typing.get_origin(a) is list]
        items = [item for a in lists for item in _alternatives(*typing.get_args(a))]
        found[name] = (_all_models(alternatives), _all_models(items))
    return found


def _alternatives(annotation: Any) -> Iterator[Any]:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        yield from _alternatives(typing.get_args(annotation)[0])
    elif origin in (typing.Union, types.UnionType):
        for alternative in typing.get_args(annotation):
            yield from _alternatives(alternative)
    else:
        yield annotation


def _models(annotation: Any) -> Models:
    return _all_models(list(_alternatives(annotation)))


def _all_models(alternatives: list[Any]) -> Models:
    """The models of which an object must fit one.

    None where it may be anything, or vLLM forbids unknown keys itself.
    """
    models = []
    for a in alternatives:
        if isinstance(a, type) and (issubclass(a, BaseModel) or dataclasses.is_dataclass(a)):
            models.append(a)
        elif a is Any or typing_extensions.is_typeddict(a) or (typing.get_origin(a) or a) in (dict, Mapping):
            return ()
    forbidding = any(getattr(m, "model_config", {}).get("extra") == "forbid" for m in models)
    return () if forbidding else tuple(models)


def _check_numbers(body: dict[str, Any]) -> None:
    pending = list(body.items())
    for name, value in pending:
        if isinstance(value, dict):
            pending += [(f"{name}.{key}", inner) for key, inner in value.items()]
        elif isinstance(value, int) and value not in INT64:
            raise RequestError(f"{name} = {_short(value)} does not fit into 64 bits", name)
        elif isinstance(value, float) and not math.isfinite(value):
            raise RequestError(f"{name} = {value} is not a finite number", name)


def _check_type(models: Models, name: str, value: str | float | None) -> None:
    """Raises RequestError for a value that must be converted: "5" is not a number, 1 not a boolean."""
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


def refuse_images() -> None:
    """Say of a longctx engine why it takes no image, audio or video. vLLM names a limit to raise."""
    validate = BaseProcessingInfo.validate_num_items
    if hasattr(validate, "__wrapped__"):
        return

    @functools.wraps(validate)
    def checked(self: BaseProcessingInfo, modality: str, num_items: int) -> None:
        if getattr(self.ctx.model_config.hf_text_config, TEXT_ONLY, False):
            raise RequestError(
                f"this engine takes text only, but the request has {num_items} {modality}(s): windows and "
                "distances of longctx are those of text; leave these out, or ask a server without longctx",
                modality,
            )
        validate(self, modality, num_items)

    BaseProcessingInfo.validate_num_items = checked  # type: ignore[method-assign]  # a seam


def check_engine_requests() -> None:
    """Check every request that enters a longctx engine of this process, over HTTP or offline.

    From then on, bad options of ours in `SamplingParams.extra_args` raise RequestError. On an engine with
    Temp-LoRA, requests that do not adapt end at the model's trained length, as they do on stock vLLM.
    """
    process_inputs = InputProcessor.process_inputs
    if hasattr(process_inputs, "__wrapped__"):
        return

    @functools.wraps(process_inputs)
    def process(
        self: InputProcessor,
        request_id: str,
        prompt: Any,
        params: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if KEY not in plugin_configs(self.vllm_config):
            return process_inputs(self, request_id, prompt, params, *args, **kwargs)
        settings = active_settings(self.vllm_config)
        if settings.mode.is_plain:
            return process_inputs(self, request_id, prompt, params, *args, **kwargs)
        options, own, tenant = _options(settings, self.vllm_config, params)
        try:
            request = process_inputs(self, request_id, prompt, params, *args, **kwargs)
        except VLLMValidationError as e:
            if settings.serving.strict and str(e).startswith("Token id"):  # vLLM does not name the field here
                raise RequestError(f"prompt: {e}", "prompt") from None
            raise
        # A request that cannot be sent to the engine fails now. Later, the front end would keep it for ever.
        _encoder.encode((request.request_id, request.sampling_params, request.cache_salt, request.session_id))
        if request.lora_request is not None and not options.of_adaptation:
            own = None  # it has an adapter, also where all others adapt
        if request.resumable:
            _check_streamed(settings, options)
        if (sampling := request.sampling_params) is not None and getattr(params, "max_tokens", 0) is None:
            assert sampling.max_tokens is not None  # vLLM has filled it in
            sampling.max_tokens = min(sampling.max_tokens, settings.serving.default_max_tokens)
        if own is not None:
            _check_adapting(request, options)
            adapters.admit(own, self.vllm_config, tenant, options.save_as, params.n * _tokens(request))
            _adapt_for(tenant, request, options, own)
        elif settings.mode.adapts:
            adapters.know_by_content(request, settings.temp_lora.adapters_root)
        if options.drop is not None:
            _find_turns(self, request, settings)
        if settings.serving.strict:
            _check_room(request, self.model_config.max_model_len)
            _check_priority(request, self.scheduler_config.policy)
        trained = trained_length(self.model_config)
        if own is None and not settings.mode.extends:
            _limit_plain(request, params, settings.temp_lora.plain_tokens, trained, settings.serving.strict)
        elif options.attention == "plain":
            _limit_plain(request, params, trained, trained, settings.serving.strict, asked=True)
        return request

    InputProcessor.process_inputs = process  # type: ignore[method-assign]  # a seam


def _options(
    settings: Settings, vllm_config: VllmConfig, params: Any
) -> tuple[RequestOptions, Adaptation | None, str | None]:
    """A request's options, its settings if it adapts, and its tenant.

    Raises RequestError naming what is wrong.
    """
    given = getattr(params, "extra_args", None) or {}
    if not isinstance(params, SamplingParams):
        if KEY in given:
            raise _bad_options(f"{KEY}: only requests that write have options; leave it out")
        return RequestOptions(), None, None
    trained, kv_block = trained_length(vllm_config.model_config), vllm_config.cache_config.block_size
    tenant = None
    try:
        options = RequestOptions.parse(given.get(KEY, {}))
        check_attention(options, settings, trained)
        if not settings.mode.adapts:
            for name in options.of_adaptation:
                raise LongContextError(f"{name}: {WITHOUT_ADAPTATION}")
            return options, None, None
        if (admission := current_admission()) is not None and settings.temp_lora.is_asked(options):
            tenant = _tenant(settings.temp_lora, admission)
            options = adapters.of_tenant(options, tenant)
        own = settings.temp_lora.for_request(options, trained, kv_block)
        if own is not None and options.start_from is not None:
            _check_start(own, options.start_from)
        for name in options.of_attention if own is not None else ():
            raise LongContextError(f"{name} does not go with temp_lora; leave one of them out")
    except RequestError:
        raise
    except LongContextError as e:
        raise _bad_options(str(e) if str(e).startswith(KEY) else f"{KEY}.{e}") from None
    if options.save_as is not None and params.n > 1:
        given = f"{KEY}.save_as = {options.save_as!r} with n = {params.n}"
        raise _bad_options(f"{given}: samples would overwrite it; set n to 1")
    return options, own, tenant


def _tenant(settings: Adaptation, admission: Admission) -> str | None:
    try:
        return adapters.tenant_of(settings, admission.headers)
    except LongContextError as e:
        raise RequestError(str(e), str(settings.tenant_header)) from None


def _tokens(request: EngineCoreRequest) -> int:
    """Of the prompt and of one answer, at most."""
    assert request.sampling_params is not None and request.sampling_params.max_tokens is not None
    return len(request.prompt_token_ids or ()) + request.sampling_params.max_tokens


def _adapt_for(
    tenant: str | None, request: EngineCoreRequest, options: RequestOptions, settings: Adaptation
) -> None:
    """Have a request adapt under its tenant's names, apart from the requests of others."""
    sampling = request.sampling_params
    assert sampling is not None
    if tenant is not None:
        given = options.model_dump(exclude_none=True)
        sampling.extra_args = {**(sampling.extra_args or {}), KEY: given}
    if over_http():
        request.cache_salt = adapters.salt_of(settings, tenant, request.cache_salt)


def _check_start(settings: Adaptation, name: str) -> None:
    """Raises LongContextError for a saved adapter with which a request cannot begin, by what its config says.

    settings: The request's.
    """
    try:
        rank = rank_of(read_directory_config(adapter_path(settings.adapters_root, name)))
    except ValueError as e:
        raise LongContextError(f"start_from = {name!r}: {e}") from None
    if rank > settings.rank:
        raise LongContextError(
            f"start_from = {name!r}: it has rank {rank}, more than rank = {settings.rank}; leave rank out"
        )


def _find_turns(processor: InputProcessor, request: EngineCoreRequest, settings: Settings) -> None:
    """Tell the scheduler where the turns of a request begin that drops whole ones."""
    sampling, prompt = request.sampling_params, request.prompt_token_ids
    if prompt is None:
        raise _bad_options(f"{KEY}.drop needs a prompt of tokens; leave it out")
    try:
        turns = turns_of_prompt(prompt, processor.renderer, settings)
    except LongContextError as e:
        raise _bad_options(f"{KEY}.{e}") from None
    assert sampling is not None
    sampling.extra_args = {**(sampling.extra_args or {}), TURNS: turns}


def _bad_options(message: str) -> RequestError:
    """message: Begins with the option's name below `extra_args`."""
    return RequestError(f"vllm_xargs.{message}", OVER_HTTP) if over_http() else RequestError(message, KEY)


def _check_adapting(request: EngineCoreRequest, options: RequestOptions) -> None:
    if request.lora_request is not None:
        name = request.lora_request.lora_name
        given = f"{KEY}.temp_lora beside the adapter {name!r}"
        raise _bad_options(f"{given}: a request has one; leave one of them out")
    if request.prompt_token_ids is None or request.resumable:
        raise _bad_options(f"{KEY}.temp_lora needs a prompt of tokens, given at once; leave it out")
    if options.save_as is not None:
        stop_strings.mark_for_save(request, options.save_as)


def _check_streamed(settings: Settings, options: RequestOptions) -> None:
    """Raises RequestError for a streamed prompt, unless its end does not matter to the mode and the options.

    It matters to stepped windows, top-k and blocks of Temp-LoRA, but not to Λ attention alone.
    """
    for name in options.of_attention.keys() & {"attention", "drop"}:
        raise _bad_options(f"{KEY}.{name} needs a prompt that is given at once; leave it out")
    if not settings.mode.takes_parts:
        raise RequestError(
            f"prompt: its parts come one after the other, but {settings.mode.asked_for} of this engine "
            "needs all of it at once; give it at once, or start the engine with attention.method lm_infinite "
            "or streaming alone",
            "prompt",
        )


def _limit_plain(
    request: EngineCoreRequest, params: Any, most: int, trained: int, strict: bool, asked: bool = False
) -> None:
    """End a request at its limit whose queries all see all tokens before them.

    most: the limit, `adaptation.plain_tokens`; at most the trained length. asked: It has chosen so; else it
    does not adapt.
    """
    if request.sampling_params is None:
        return
    prompt = length_from_prompt_token_ids_or_embeds(request.prompt_token_ids, request.prompt_embeds)
    wanted = request.sampling_params.max_tokens
    assert wanted is not None  # vLLM has filled it in
    why = ", on which it was trained" if most == trained else " on this server (adaptation.plain_tokens)"
    remedy = f"ask for {EXAMPLE if over_http() else OFFLINE_EXAMPLE}"
    chosen = "this request does not adapt"
    if asked:
        remedy, chosen = f"leave {KEY}.attention out", f"this request asks for {KEY}.attention = 'plain'"
    if prompt >= most:
        raise RequestError(  # as vLLM does for a prompt that is too long
            f"This model's maximum context length is {most} tokens{why}. However, "
            f"your prompt contains {prompt} input tokens, and {chosen}. Please reduce the "
            f"length of the input prompt, or {remedy}",
            "input_tokens",
        )
    explicit = _output_limit.get() is not None if over_http() else params.max_tokens is not None
    if strict and explicit and prompt + wanted > most:
        raise RequestError(
            f"prompt of {prompt} tokens and max_tokens = {wanted}: {chosen}, and its limit "
            f"is {most} tokens{why}; shorten it, or {remedy}",
            "max_tokens",
        )
    request.sampling_params.max_tokens = min(wanted, most - prompt)


def _within(beam_search: Any, most: int) -> Any:
    """As `_limit_plain`, for a handler's beam search, which sends its prompt again for every token."""

    @functools.wraps(beam_search)
    def limited(prompt: Any, request_id: str, params: BeamSearchParams, **kwargs: Any) -> Any:
        room = most - len(prompt.get("prompt_token_ids") or ())
        if room > 0:  # else the first request is refused
            params.max_tokens = min(params.max_tokens, room)
        return beam_search(prompt=prompt, request_id=request_id, params=params, **kwargs)

    return limited


def _check_room(request: EngineCoreRequest, max_model_len: int) -> None:
    output_limit = _output_limit.get()
    if output_limit is None or request.prompt_token_ids is None:
        return
    (name, value), prompt = output_limit, len(request.prompt_token_ids)
    if prompt + value > max_model_len:
        raise RequestError(
            f"{name} = {value} does not fit behind the prompt of {prompt} tokens: max_model_len is "
            f"{max_model_len}; ask for at most {max_model_len - prompt}",
            name,
        )


def _check_priority(request: EngineCoreRequest, policy: str) -> None:
    if request.priority and policy != "priority":
        raise RequestError(
            f"priority = {request.priority}, but the scheduling policy is {policy!r}; leave it out, or start "
            "the engine with --scheduling-policy priority",
            "priority",
        )
