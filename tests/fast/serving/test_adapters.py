"""Saved adapters over HTTP and offline: put, listed and deleted, apart by tenants, within quotas.

The server is real, and its engine core a stand-in.
"""

import io
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI
from safetensors.torch import load_file, save
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.inputs import tokens_input
from vllm.lora.request import LoRARequest
from vllm.v1.engine.input_processor import InputProcessor

from tests.support.lora_adapters import write_adapter
from tests.support.served_app import GENERATING, ROUTES, Core, served
from vllm_longctx import BOOKLM
from vllm_longctx.config import LongContextError
from vllm_longctx.serving.adapters import add_routes
from vllm_longctx.temp_lora.adapters import Adapters

ROUTE = "/v1/longctx/adapters"
KEY = {"Authorization": "Bearer secret"}
LAMBDA = {"longctx": {"preset": "lm-infinite"}}
ADAPTATION = {"rank": 4, "tenant_header": "X-Tenant", "quota": {"adapters": 2, "gib": 0.1, "tokens": 40}}

Served = tuple[str, Core, Path]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("adapters")
    config = {"preset": "temp-lora-quality", "adaptation": {**ADAPTATION, "adapters_root": str(root)}}
    with served("--longctx", json.dumps(config), "--api-key", "secret") as (address, core):
        yield address, core, root


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ordinary adapter of booklm."""
    return write_adapter(tmp_path_factory.mktemp("made") / "a", BOOKLM, 1, modules=("q_proj", "v_proj"))


@pytest.fixture(autouse=True)
def _clean(server: Served) -> Iterator[None]:
    yield
    server[1].reset()
    for path in sorted(server[2].rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def files(made: Path, **changed: bytes) -> dict[str, bytes]:
    config, weights = (made / name for name in ("adapter_config.json", "adapter_model.safetensors"))
    return {"config": config.read_bytes(), "weights": weights.read_bytes(), **changed}


def ask(
    server: Served, method: str, path: str, tenant: str | None = None, timeout: float = 60, **kwargs: Any
) -> httpx.Response:
    headers = KEY if tenant is None else {**KEY, "X-Tenant": tenant}
    return httpx.request(method, server[0] + path, headers=headers, verify=False, timeout=timeout, **kwargs)


def put(server: Served, name: str, made: Path, tenant: str | None = None, **changed: bytes) -> httpx.Response:
    return ask(server, "PUT", f"{ROUTE}/{name}", tenant, files=files(made, **changed))


def names(server: Served, tenant: str | None = None) -> list[str]:
    return [adapter["id"] for adapter in ask(server, "GET", ROUTE, tenant).json()["data"]]


def learn(
    server: Served, route: str = "/v1/completions", tenant: str | None = None, **options: Any
) -> httpx.Response:
    body = {**ROUTES[route][0], "vllm_xargs": {"longctx": json.dumps({"temp_lora": True, **options})}}
    return ask(server, "POST", route, tenant, json=body)


def message(response: httpx.Response) -> str:
    return response.json()["error"]["message"]


def test_adapters_are_put_listed_and_deleted(server: Served, made: Path) -> None:
    assert names(server) == []
    answer = put(server, "book", made)
    assert answer.status_code == 200, answer.text
    about = answer.json()
    sizes = sum(file.stat().st_size for file in (server[2] / "book").iterdir())
    assert (about["id"], about["rank"], about["bytes"], about["blocks"]) == ("book", 4, sizes, None)
    assert ask(server, "GET", ROUTE).json() == {"object": "list", "data": [about]}
    assert (server[2] / "book" / "adapter_model.safetensors").read_bytes() == files(made)["weights"]
    assert learn(server, start_from="book").status_code == 200

    other = load_file(made / "adapter_model.safetensors")
    changed = save({key: tensor + 1 for key, tensor in other.items()})
    assert put(server, "book", made, weights=changed).status_code == 200
    assert (server[2] / "book" / "adapter_model.safetensors").read_bytes() == changed

    assert ask(server, "DELETE", f"{ROUTE}/book").json() == {
        "id": "book",
        "object": "adapter",
        "deleted": True,
    }
    assert names(server) == [] and list(server[2].iterdir()) == []
    gone = ask(server, "DELETE", f"{ROUTE}/book")
    assert gone.status_code == 404 and "there is no adapter 'book'" in message(gone)


def test_the_servers_own_authentication_stands_before_them(server: Served, made: Path) -> None:
    for method, path in (("GET", ROUTE), ("PUT", f"{ROUTE}/book"), ("DELETE", f"{ROUTE}/book")):
        answer = httpx.request(method, server[0] + path, verify=False)
        assert answer.status_code == 401
    assert list(server[2].iterdir()) == []


def pickled(tensors: dict[str, torch.Tensor]) -> bytes:
    file = io.BytesIO()
    torch.save(tensors, file)
    return file.getvalue()


BAD: dict[str, tuple[Any, str]] = {
    "a pickle": (lambda t: {"weights": pickled(t)}, "its weights are not safetensors"),
    "cut": (lambda t: {"weights": save(t)[:-1]}, "its weights are not safetensors"),
    "nan": (lambda t: {"weights": save({k: v * torch.nan for k, v in t.items()})}, "is not finite"),
    "shape": (lambda t: {"weights": save({k: v[:, :-1].clone() for k, v in t.items()})}, "has shapes"),
    "other layers": (lambda t: {"weights": save({f"{k}.x": v for k, v in t.items()})}, "which is no LoRA"),
    "config": (lambda t: {"config": b"{"}, "its adapter_config.json is not JSON"),
    "dora": (lambda t: {"config": b'{"r": 4, "lora_alpha": 4, "use_dora": true}'}, "has use_dora = True"),
    "rank": (lambda t: {"config": b'{"r": 5, "lora_alpha": 4}'}, "this model and rank 5 need"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_requests_could_not_begin_with_is_refused(server: Served, made: Path, case: str) -> None:
    change, reason = BAD[case]
    answer = put(server, "book", made, **change(load_file(made / "adapter_model.safetensors")))
    assert answer.status_code == 400 and message(answer).startswith("adapter 'book': ")
    assert reason in message(answer)
    assert list(server[2].iterdir()) == []


def test_bodies_that_are_none_are_refused(server: Served, made: Path) -> None:
    for kwargs in (
        {"content": b"x" * 9},
        {"json": {}},
        {"files": {"config": b"{}"}},
        {"data": {"config": "{}"}},
    ):
        answer = ask(server, "PUT", f"{ROUTE}/book", **kwargs)  # type: ignore[arg-type]
        assert answer.status_code == 400 and "curl -X PUT" in message(answer)
    broken = {
        "content": b"--x\r\nbroken",
        "headers": {**KEY, "Content-Type": "multipart/form-data; boundary=x"},
    }
    answer = httpx.put(f"{server[0]}{ROUTE}/book", verify=False, **broken)  # type: ignore[arg-type]
    assert answer.status_code == 400 and "curl -X PUT" in message(answer)
    huge = put(server, "book", made, weights=bytes(8 << 20))
    assert huge.status_code == 413 and "which an adapter of adaptation.max_rank takes at most" in message(
        huge
    )
    for name in (".hidden", "@acme", "-x", "a b", "x" * 129):
        answer = put(server, name, made)
        assert answer.status_code == 400 and "use up to 128 letters" in message(answer)
    assert put(server, "a%2Fb", made).status_code == put(server, "..%2Fb", made).status_code == 404
    assert list(server[2].iterdir()) == []


def test_what_was_not_saved_here_is_neither_replaced_nor_deleted(server: Served, made: Path) -> None:
    (server[2] / "mine").mkdir()
    (server[2] / "mine" / "notes").write_text("")
    for answer in (put(server, "mine", made), ask(server, "DELETE", f"{ROUTE}/mine")):
        assert answer.status_code == 400 and "was not saved by longctx" in message(answer)
    assert [path.name for path in (server[2] / "mine").iterdir()] == ["notes"]


def test_tenants_have_names_of_their_own(server: Served, made: Path) -> None:
    assert put(server, "book", made, tenant="acme").status_code == 200
    assert names(server, "acme") == ["book"] and names(server, "other") == names(server) == []
    assert [path.name for path in server[2].iterdir()] == ["@acme"]
    for tenant in ("other", None):
        refused = learn(server, tenant=tenant, start_from="book")
        assert refused.status_code == 400 and "there is no such adapter" in message(refused)
        assert ask(server, "DELETE", f"{ROUTE}/book", tenant).status_code == 404
    forged = learn(server, tenant="other", start_from="@acme/book")
    assert forged.status_code == 400 and "start_from = '@acme/book': use up to 128" in message(forged)
    core = server[1]
    assert learn(server, tenant="acme", start_from="book", save_as="next").status_code == 200
    options = core.requests[-1].sampling_params.extra_args["longctx"]
    assert options == {"temp_lora": True, "start_from": "@acme/book", "save_as": "@acme/next"}


def test_tenants_share_nothing_that_is_remembered(server: Served) -> None:
    core, salts = server[1], []
    for tenant in ("acme", "other", None):
        for salt in (None, "s", '["acme", null]'):
            body = {**ROUTES["/v1/completions"][0], "vllm_xargs": {"longctx": '{"temp_lora": true}'}}
            given = {} if salt is None else {"cache_salt": salt}
            assert ask(server, "POST", "/v1/completions", tenant, json=body | given).status_code == 200
            salts.append(core.requests[-1].cache_salt)
    assert len(set(salts)) == 9
    plain = ask(server, "POST", "/v1/completions", "acme", json=ROUTES["/v1/completions"][0])
    assert plain.status_code == 200 and core.requests[-1].cache_salt is None


def test_a_header_that_names_no_tenant_is_refused_where_it_matters(server: Served, made: Path) -> None:
    for tenant in ("../x", "a/b", "@a", "a b", "x" * 129):
        for answer in (learn(server, tenant=tenant), put(server, "book", made, tenant=tenant)):
            assert answer.status_code == 400 and "X-Tenant = " in message(answer)
        plain = ask(server, "POST", "/v1/completions", tenant, json=ROUTES["/v1/completions"][0])
        assert plain.status_code == 200
    assert list(server[2].iterdir()) == []


def test_tokens_under_way_are_within_a_quota(server: Served) -> None:
    """Of each tenant. They are given back when a request is answered."""
    _, core, _ = server
    core.reads.clear()
    answers: list[httpx.Response] = []
    body = {"model": "booklm", "prompt": [5, 6, 7], "max_tokens": 37}
    body["vllm_xargs"] = {"longctx": '{"temp_lora": true}'}

    def first() -> None:
        answers.append(ask(server, "POST", "/v1/completions", "acme", json=body))

    thread = threading.Thread(target=first)
    thread.start()
    while not core.requests:
        thread.join(0.01)
    for route in GENERATING:
        refused = learn(server, route, "acme")
        assert refused.status_code == 429, refused.text
        said = message(refused)
        assert "tenant 'acme' has 40 tokens of requests that adapt under way, and this one has" in said
        assert "adaptation.quota.tokens = 40; wait until others are answered, or lower max_tokens" in said
    thread_of_other = threading.Thread(target=learn, args=(server, "/v1/completions", "other"))
    thread_of_other.start()
    while len(core.requests) < 2:
        thread_of_other.join(0.01)
    core.reads.set()
    thread.join()
    thread_of_other.join()
    assert answers[0].status_code == 200
    for route in GENERATING:
        assert learn(server, route, "acme").status_code == 200, "the other one is answered"


def test_anthropics_api_has_its_own_word_for_it(server: Served) -> None:
    body = {**ROUTES["/v1/messages"][0], "max_tokens": 41, "vllm_xargs": {"longctx": '{"temp_lora": true}'}}
    refused = ask(server, "POST", "/v1/messages", json=body)
    assert refused.status_code == 429 and refused.json()["error"]["type"] == "rate_limit_error"


def test_one_request_may_be_more_than_the_quota(server: Served) -> None:
    body = {"model": "booklm", "prompt": [[5] * 9, [6] * 9], "max_tokens": 6, "n": 2}
    body["vllm_xargs"] = {"longctx": '{"temp_lora": true}'}
    refused = ask(server, "POST", "/v1/completions", json=body)
    assert refused.status_code == 429
    assert "this server has 0 tokens of requests that adapt under way, and this one has 60" in message(
        refused
    )
    assert ask(server, "POST", "/v1/completions", json=body | {"n": 1}).status_code == 200


def test_adapters_are_within_a_quota(server: Served, made: Path) -> None:
    for name in ("a", "b"):
        assert put(server, name, made, tenant="acme").status_code == 200
    for answer in (put(server, "c", made, tenant="acme"), learn(server, tenant="acme", save_as="c")):
        assert answer.status_code == 429
        assert "tenant 'acme' has 2 adapters, where adaptation.quota.adapters = 2; delete one" in message(
            answer
        )
    for answer in (
        put(server, "b", made, tenant="acme"),
        learn(server, tenant="acme", save_as="a"),
        put(server, "c", made),
    ):
        assert answer.status_code == 200
    more = server[2] / "@acme" / "a" / "more"
    more.touch()
    os.truncate(more, int(0.1 * 2**30) - (1 << 20))  # room for a small one, without AdamW's state
    assert put(server, "b", made, tenant="acme").status_code == 200
    refused = learn(server, tenant="acme", save_as="b")
    assert refused.status_code == 429 and "GiB of other adapters, and this one takes up to" in message(
        refused
    )
    os.truncate(more, 110 << 20)
    refused = put(server, "b", made, tenant="acme")
    assert refused.status_code == 429 and "adaptation.quota.gib = 0.1; delete one" in message(refused)
    assert put(server, "a", made, tenant="acme").status_code == 200, "it takes the place of what is too large"


def test_adapters_that_are_about_to_be_saved_count(server: Served, made: Path) -> None:
    """Of two new names one is there, and one request saves the other."""
    core = server[1]
    put(server, "a", made)
    core.reads.clear()
    thread = threading.Thread(target=learn, args=(server,), kwargs={"save_as": "b"})
    thread.start()
    while not core.requests:
        thread.join(0.01)
    for answer in (put(server, "c", made), learn(server, save_as="c")):
        assert answer.status_code == 429 and "this server has 2 adapters" in message(answer)
    core.reads.set()
    thread.join()
    assert learn(server, save_as="c").status_code == 200, "this engine has saved nothing"


def engine(root: Path | None, **kwargs: Any) -> Any:
    adaptation: dict[str, Any] = {"rank": 4} if root is None else {"rank": 4, "adapters_root": str(root)}
    config = {"longctx": {"preset": "temp-lora-quality", "adaptation": adaptation}}
    return EngineArgs(model=BOOKLM, additional_config=config, **kwargs).create_engine_config()


def test_programs_put_list_and_delete_them_too(tmp_path: Path, made: Path) -> None:
    adapters = Adapters(engine(tmp_path))
    config = json.loads((made / "adapter_config.json").read_text())
    tensors = load_file(made / "adapter_model.safetensors")
    tensors = {
        key: tensor.t().contiguous().t() for key, tensor in tensors.items()
    }  # as a program may have it
    assert adapters.put("book", config, tensors) == adapters.list()[0]
    assert adapters.put("@acme/book", json.dumps(config), files(made)["weights"]) == adapters.list("acme")[0]
    with pytest.raises(LongContextError, match=r"adapter name '\.\./book': use up to"):
        adapters.put("../book", config, tensors)
    with pytest.raises(LongContextError, match=r"adapter 'book': its model.* is not finite"):
        adapters.put("book", config, {key: tensor / 0 for key, tensor in tensors.items()})
    assert load_file(tmp_path / "book" / "adapter_model.safetensors").keys() == tensors.keys()
    assert adapters.delete("book") and not adapters.delete("book") and adapters.delete("@acme/book")
    assert adapters.list() == adapters.list("acme") == []
    with pytest.raises(LongContextError, match=r"keeps no adapters; start it with adaptation\.adapters_root"):
        Adapters(engine(None))


def test_a_server_without_a_root_has_no_routes_for_them() -> None:
    app = FastAPI()
    before = list(app.routes)
    for config in (engine(None), EngineArgs(BOOKLM, additional_config=LAMBDA).create_engine_config()):
        app.state.vllm_config = config
        add_routes(app)
    assert app.routes == before


def test_an_adapter_that_vllm_loads_is_known_by_what_it_is(tmp_path: Path, made: Path) -> None:
    """Another one under its name is another one for vLLM and its prefix cache. Not outside of the root."""
    processor = InputProcessor(engine(tmp_path, enable_lora=True, max_lora_rank=8))
    adapters = Adapters(engine(tmp_path))

    def add(path: Path, **more: Any) -> tuple[int, str | None]:
        prompt = {**tokens_input([5, 6]), **more}
        request = processor.process_inputs(
            "id", prompt, SamplingParams(), ("generate",), lora_request=LoRARequest("book", 1, str(path))
        )
        return request.lora_request.lora_int_id, request.cache_salt

    adapters.put("book", *files(made).values())
    first, link = add(tmp_path / "book"), tmp_path.with_name("link")
    assert first == add(tmp_path / "book") and first[0] > 1 << 60
    os.symlink(tmp_path / "book", link)
    assert add(link) == first
    adapters.put("book", *files(made).values())
    second = add(tmp_path / "book")
    assert second[0] != first[0] and second[1] != first[1]
    assert add(tmp_path / "book", cache_salt="x")[1] not in (second[1], "x")
    assert add(made) == (1, None)
    assert add(tmp_path / "nothing") == (1, None)
