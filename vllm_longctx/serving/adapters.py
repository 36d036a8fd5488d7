"""Saved adapters over HTTP: whose they are, how many, and the routes that put, list and delete them.

A tenant is whom the header `adaptation.tenant_header` of a request names. Each has names, remembered versions
and a quota of its own. Requests without the header, and all without the option, are nobody's and share one
namespace.
"""

import dataclasses
import json
import os
import re
import weakref
from collections.abc import Mapping
from hashlib import blake2b
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from msgspec.structs import replace
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException
from starlette.types import Message, Receive
from vllm.config import VllmConfig
from vllm.exceptions import GracefulHTTPError, VLLMNotFoundError
from vllm.v1.engine import EngineCoreRequest

from vllm_longctx.config import ADAPTER_NAME, LongContextError, RequestOptions
from vllm_longctx.serving.streams import Admission, current_admission
from vllm_longctx.settings import Adaptation, active_settings
from vllm_longctx.temp_lora.adapters import OTHER_BYTES, Adapters, SavedAdapter, saved_adapters
from vllm_longctx.temp_lora.peft_adapter import CONFIG_NAME, WEIGHTS_NAME

ROUTE = "/v1/longctx/adapters"
EXAMPLE = f"curl -X PUT .../NAME -F config=@{CONFIG_NAME} -F weights=@{WEIGHTS_NAME}"
FORM_BYTES = 1 << 16  # of a multipart body, at most, beside its files

ALLOWED = "up to 128 letters, digits, '.', '_' and '-', the first a letter or a digit"

# Those of HTTP requests that adapt and are under way.
_adapting: weakref.WeakSet[Admission] = weakref.WeakSet()
_adapters: dict[str, Adapters] = {}  # by the engine's `instance_id`


class QuotaError(GracefulHTTPError, LongContextError):
    """A tenant asks for more than its quota: a 429 that says what to do."""

    def __init__(self, message: str) -> None:
        GracefulHTTPError.__init__(self, message, HTTPStatus.TOO_MANY_REQUESTS)


# --- tenants ----------------------------------------------------------------------------------------------


def tenant_of(settings: Adaptation, headers: Headers) -> str | None:
    """None for nobody's requests. Raises LongContextError for a value that names none."""
    if settings.tenant_header is None or not (tenant := headers.get(settings.tenant_header)):
        return None
    if not re.fullmatch(ADAPTER_NAME, tenant):
        raise LongContextError(f"{settings.tenant_header} = {tenant[:200]!r}: use {ALLOWED}")
    return tenant


def owned(name: str, tenant: str | None, field: str = "adapter name") -> str:
    """The engine's name for a tenant's adapter. Raises LongContextError for a name that is none."""
    if not re.fullmatch(ADAPTER_NAME, name):
        raise LongContextError(f"{field} = {name[:200]!r}: use {ALLOWED}")
    return name if tenant is None else f"@{tenant}/{name}"


def of_tenant(options: RequestOptions, tenant: str | None) -> RequestOptions:
    """The options of an HTTP request, with names as the engine knows them.

    Raises LongContextError, beginning with the field, for a name that is none.
    """
    given = {field: getattr(options, field) for field in ("save_as", "start_from")}
    names = {field: owned(name, tenant, field) for field, name in given.items() if name is not None}
    return options.model_copy(update=names)


def salt_of(settings: Adaptation, tenant: str | None, salt: str | None) -> str | None:
    """What stands for vLLM's `cache_salt` in addresses and block hashes: tenants share nothing."""
    return salt if settings.tenant_header is None else json.dumps([tenant, salt])


# --- quotas -----------------------------------------------------------------------------------------------


def adapters_of(vllm_config: VllmConfig) -> Adapters:
    """Of an engine of this process, which keeps adapters."""
    if vllm_config.instance_id not in _adapters:
        _adapters[vllm_config.instance_id] = Adapters(vllm_config)
    return _adapters[vllm_config.instance_id]


def admit(
    settings: Adaptation, vllm_config: VllmConfig, tenant: str | None, save_as: str | None, tokens: int
) -> None:
    """Count the current HTTP request, which adapts, until it is answered.

    Raises QuotaError if it is too much.

    settings: The request's.
    save_as: The engine's name of the adapter that it saves.
    tokens: Of its prompt and its answer, at most.
    """
    admission = current_admission()
    if admission is None:
        return
    others = [a for a in _adapting if a.tenant == tenant and a is not admission]
    saves: dict[str, int] = {}
    if save_as is not None:
        saves[save_as] = (
            0 if settings.quota.gib is None else adapters_of(vllm_config).saved_bytes(settings.rank)
        )
        check_names(settings, tenant, saves, _saves(tenant, admission))
    limit, used, own = settings.quota.tokens, sum(a.tokens for a in others), admission.tokens + tokens
    if limit is not None and used + own > limit:
        raise QuotaError(
            f"{_whose(tenant)} {used} tokens of requests that adapt under way, and this one has {own} "
            f"(prompt and max_tokens), where adaptation.quota.tokens = {limit}; wait until others are "
            "answered, or lower max_tokens"
        )
    admission.tenant, admission.tokens = tenant, own
    admission.saves |= saves
    _adapting.add(admission)


def _saves(tenant: str | None, but: Admission | None = None) -> dict[str, int]:
    """What requests that are under way save, as `check_names` takes it. but: Of them not this one."""
    others = (a for a in _adapting if a.tenant == tenant and a is not but)
    return {name: size for a in others for name, size in a.saves.items()}


def check_names(
    settings: Adaptation, tenant: str | None, saves: Mapping[str, int], under_way: dict[str, int]
) -> None:
    """Raises QuotaError if what is to be saved is too much, beside what is there.

    saves: By the engine's name, the bytes of each, at most.
    under_way: The same of other requests.
    """
    quota, root = settings.quota, settings.adapters_root
    if root is None or (quota.adapters is None and quota.gib is None):
        return
    there = {owned(adapter.name, tenant): adapter.nbytes for adapter in saved_adapters(root, tenant)}
    names, remedy = there | under_way, f"delete one (DELETE {ROUTE}/NAME)"
    if quota.adapters is not None and not saves.keys() <= names.keys() and len(names) >= quota.adapters:
        raise QuotaError(
            f"{_whose(tenant)} {len(names)} adapters, where adaptation.quota.adapters = {quota.adapters}; "
            f"{remedy}, or save under a name that is there"
        )
    needed = sum(saves.values()) / 2**30
    others = sum(nbytes for name, nbytes in names.items() if name not in saves) / 2**30
    if quota.gib is not None and others + needed > quota.gib:
        raise QuotaError(
            f"{_whose(tenant)} {others:.3f} GiB of other adapters, and this one takes up to {needed:.3f}, "
            f"where adaptation.quota.gib = {quota.gib}; {remedy}"
        )


def _whose(tenant: str | None) -> str:
    return "this server has" if tenant is None else f"tenant {tenant!r} has"


# --- adapters that vLLM loads -----------------------------------------------------------------------------


def know_by_content(request: EngineCoreRequest, root: str | None) -> None:
    """Have a saved adapter that vLLM loads known by what is in its files, not by its name only.

    Under the same name, vLLM would go on with the weights that it has loaded, and find KV of other ones in
    its prefix cache. Who still writes with the former weights goes on with them.
    """
    lora = request.lora_request
    if root is None or lora is None:
        return
    path = Path(os.path.realpath(lora.lora_path))
    if not path.is_relative_to(os.path.realpath(root)):
        return
    try:
        files = [(path / name).stat() for name in (CONFIG_NAME, WEIGHTS_NAME)]
    except OSError:  # vLLM says what is wrong with it
        return
    about = [(file.st_dev, file.st_ino, file.st_mtime_ns, file.st_size) for file in files]
    digest = blake2b(json.dumps([lora.lora_int_id, str(path), about]).encode(), digest_size=8).digest()
    number = int.from_bytes(digest) >> 2 | 1 << 61  # no user has so many
    request.lora_request = replace(lora, lora_int_id=number)
    request.cache_salt = json.dumps([number, request.cache_salt])


# --- routes -----------------------------------------------------------------------------------------------


def add_routes(app: FastAPI) -> None:
    """Put, list and delete adapters, if the engine keeps any. vLLM's authentication stands before `/v1`."""
    settings = active_settings(app.state.vllm_config)
    if not settings.mode.adapts or settings.temp_lora.adapters_root is None:
        return
    adaptation, adapters = settings.temp_lora, adapters_of(app.state.vllm_config)
    if adaptation.quota.gib is not None:
        adapters.saved_bytes(1)  # so that no request waits for the model's shapes

    async def put(name: str, request: Request) -> JSONResponse:
        tenant = tenant_of(adaptation, request.headers)
        full_name = owned(name, tenant)
        most = await run_in_threadpool(lambda: adapters.max_bytes)
        config, weights = await _files(request, most)
        check_names(adaptation, tenant, {full_name: len(config) + len(weights)}, _saves(tenant))
        return JSONResponse(_shown(await run_in_threadpool(adapters.put, full_name, config, weights)))

    async def list_all(request: Request) -> JSONResponse:
        found = await run_in_threadpool(adapters.list, tenant_of(adaptation, request.headers))
        return JSONResponse({"object": "list", "data": [_shown(adapter) for adapter in found]})

    async def delete(name: str, request: Request) -> JSONResponse:
        full_name = owned(name, tenant_of(adaptation, request.headers))
        if not await run_in_threadpool(adapters.delete, full_name):
            raise VLLMNotFoundError(f"there is no adapter {name!r}; GET {ROUTE} lists those that are there")
        return JSONResponse({"id": name, "object": "adapter", "deleted": True})

    app.add_api_route(ROUTE, list_all, methods=["GET"])
    app.add_api_route(ROUTE + "/{name}", put, methods=["PUT"])
    app.add_api_route(ROUTE + "/{name}", delete, methods=["DELETE"])


def _shown(adapter: SavedAdapter) -> dict[str, Any]:
    values = dataclasses.asdict(adapter)
    return {"id": values.pop("name"), "object": "adapter", "bytes": values.pop("nbytes"), **values}


async def _files(request: Request, max_bytes: int) -> tuple[bytes, bytes]:
    """The config and the weights of a multipart body. Raises GracefulHTTPError or LongContextError.

    max_bytes: Of the weights.
    """
    receive = _limited(request.receive, max_bytes + OTHER_BYTES + FORM_BYTES)
    try:
        async with Request(request.scope, receive).form(max_files=2, max_fields=2) as form:
            parts = [form.get(name) for name in ("config", "weights")]
            config, weights = [await p.read() if isinstance(p, UploadFile) else p for p in parts]
    except MultiPartException as e:
        raise LongContextError(f"the body is no multipart form: {e.message}; as in {EXAMPLE}") from None
    if isinstance(config, str):
        config = config.encode()
    if not isinstance(config, bytes) or not isinstance(weights, bytes):
        raise LongContextError(f"the body has no files config and weights; as in {EXAMPLE}")
    return config, weights


def _limited(receive: Receive, most: int) -> Receive:
    """Raises GracefulHTTPError once a body has more bytes than it may have."""
    left = most

    async def counted() -> Message:
        nonlocal left
        message = await receive()
        left -= len(message.get("body", b""))
        if left < 0:
            raise GracefulHTTPError(
                f"the body has more than {most} bytes, which an adapter of adaptation.max_rank takes at most",
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            )
        return message

    return counted
