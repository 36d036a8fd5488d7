"""The users' LoRA adapters in engines of ours, beside requests that learn: two pools of places, each its own
weights.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from server import running_server
from vllm import LLM, SamplingParams
from vllm.inputs import tokens_input
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput

from tests.support.engines import generate, logprobs_of, metric, prompt, running_here, tokens_of
from tests.support.lora_adapters import logprobs_by_peft, write_adapter, write_bad_adapters
from vllm_longctx import BOOKLM
from vllm_longctx.temp_lora.adapters import Adapters

RECIPE = {"rank": 8, "dropout": 0.0, "learning_rate": 2e-3, "block_tokens": 32, "train_context_tokens": 64}
STEPPED = {**RECIPE, "window_tokens": 128, "context_tokens": 64, "slots": 2}
LAMBDA = {"method": "lm_infinite", "n_global": 10, "n_local": 64, "distance_ceiling": 64}
ADAPTS = {"extra_args": {"longctx": {"temp_lora": True}}}
ALL_MODULES = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "embed_tokens",
    "lm_head",
)

pytestmark = pytest.mark.trainer


@pytest.fixture(scope="module")
def adapters(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoRARequest]:
    root = tmp_path_factory.mktemp("adapters")
    paths = {
        "a": write_adapter(root / "a", tiny_llama, 11),
        "b": write_adapter(root / "b", tiny_llama, 12, rank=8),
        "c": write_adapter(root / "c", tiny_llama, 13, modules=("q_proj", "down_proj")),
        "whole": write_adapter(root / "whole", tiny_llama, 14, modules=ALL_MODULES),
    }
    return {
        name: LoRARequest(name, number, str(path)) for number, (name, path) in enumerate(paths.items(), 1)
    }


@pytest.fixture(scope="module")
def bad(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoRARequest]:
    paths = write_bad_adapters(tmp_path_factory.mktemp("bad"), tiny_llama)
    return {
        name: LoRARequest(name, number, str(path)) for number, (name, path) in enumerate(paths.items(), 101)
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the adapters that requests save and begin with."""
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="module")
def learning(tiny_llama: Path, root: Path) -> Iterator[LLM]:
    """Two slots, and one place for the users' adapters."""
    with running_here(
        tiny_llama,
        {"method": "none"},
        {**STEPPED, "adapters_root": str(root)},
        enable_lora=True,
        max_loras=1,
        max_cpu_loras=2,
        max_lora_rank=8,
    ) as llm:
        yield llm


@pytest.fixture(scope="module")
def sliding(tiny_llama: Path) -> Iterator[LLM]:
    """The layers that `fully_sharded_loras` asks for have operators of their own, on one rank too."""
    users = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8, "fully_sharded_loras": True}
    with running_here(tiny_llama, LAMBDA, **users) as llm:
        yield llm


def write(
    llm: LLM, requests: list[tuple[list[int], int, LoRARequest | None, dict[str, Any]]]
) -> list[RequestOutput]:
    """All at once: (prompt, tokens to write, adapter, more parameters) of each."""
    params = [
        SamplingParams(
            **{
                "max_tokens": n,
                "temperature": 0,
                "logprobs": 0,
                "ignore_eos": True,
                "detokenize": False,
                **more,
            }
        )
        for _, n, _, more in requests
    ]
    prompts = [tokens_input(p) for p, _, _, _ in requests]
    return llm.generate(
        prompts, params, use_tqdm=False, lora_request=[adapter for _, _, adapter, _ in requests]
    )


def assert_right(model: Path, adapter: LoRARequest | None, output: RequestOutput) -> None:
    torch.testing.assert_close(
        logprobs_of(output), logprobs_by_peft(model, adapter, output), rtol=0, atol=1e-4
    )


def test_adapters_after_all_slots_were_used(
    learning: LLM, tiny_llama: Path, adapters: dict[str, LoRARequest]
) -> None:
    """Of today's code: `ValueError: 2 is not in list` in the step, and the engine is gone."""
    generate(learning, [prompt(40, seed) for seed in range(5)], 20, **ADAPTS)
    requests = [
        (prompt(20, 1), 20, adapters["a"], {}),
        (prompt(30, 2), 20, adapters["b"], {}),
        (prompt(25, 3), 20, None, {}),
    ]
    for (_, _, adapter, _), output in zip(requests, write(learning, requests), strict=True):
        assert_right(tiny_llama, adapter, output)


def put(llm: LLM, name: str, path: Path) -> None:
    weights = load_file(path / "adapter_model.safetensors")
    Adapters.of(llm).put(name, (path / "adapter_config.json").read_text(), weights)


def test_an_adapter_that_is_replaced_is_another_one(
    learning: LLM, tiny_llama: Path, adapters: dict[str, LoRARequest], root: Path
) -> None:
    """Neither the weights that are loaded under its name are used, nor their KV. Of 60 tokens 32 are hit."""
    request = LoRARequest("served", 50, str(root / "served"))
    asked = [(prompt(60, 3), 5, request, {})]
    for name, cached in (("a", 0), ("a", 32), ("b", 0), ("b", 32)):
        if not cached:
            put(learning, "served", Path(adapters[name].lora_path))
        (output,) = write(learning, asked)
        assert output.num_cached_tokens == cached
        assert_right(tiny_llama, request, output)
    assert Adapters.of(learning).delete("served")


def test_requests_begin_with_ordinary_adapters(
    learning: LLM, tiny_llama: Path, adapters: dict[str, LoRARequest], root: Path
) -> None:
    """What is written with one of two kinds of layers, before anything is learned, is what peft says."""
    put(learning, "some", Path(adapters["c"].lora_path))
    begins: dict[str, Any] = {"longctx": {"temp_lora": True, "start_from": "some", "epochs": 0}}
    for rank in (4, 8):
        begins["longctx"]["rank"] = rank
        (output,) = write(learning, [(prompt(60, 4), 20, None, {"extra_args": begins})])
        assert_right(tiny_llama, adapters["c"], output)
    begins["longctx"]["rank"] = 2
    with pytest.raises(ValueError, match="it has rank 4, more than rank = 2; leave rank out"):
        write(learning, [(prompt(60, 4), 20, None, {"extra_args": begins})])
    assert Adapters.of(learning).delete("some")


def test_a_crowd_over_few_places(learning: LLM, tiny_llama: Path, adapters: dict[str, LoRARequest]) -> None:
    """Each writes what it writes alone; those that do not learn also what peft says."""
    names = ["a", None, "b", "learns", "c", "learns", "a", "b", "learns", None]
    requests: list[Any] = [
        (
            prompt(20 + 5 * seed, seed),
            30,
            adapters.get(name or ""),
            ADAPTS if name == "learns" else {"prompt_logprobs": 0},
        )
        for seed, name in enumerate(names)
    ]
    together = write(learning, requests)
    for name, request, output in zip(names, requests, together, strict=True):
        assert tokens_of(write(learning, [request])[0]) == tokens_of(output)
        if name != "learns":
            assert_right(tiny_llama, request[2], output)


def test_one_that_cannot_be_loaded_is_an_error_of_its_requests(
    learning: LLM, tiny_llama: Path, adapters: dict[str, LoRARequest], bad: dict[str, LoRARequest]
) -> None:
    requests: list[Any] = [(prompt(20, seed), 12, adapter, {}) for seed, adapter in enumerate(bad.values())]
    good: list[Any] = [
        (prompt(30, 7), 40, adapters["a"], {}),
        (prompt(31, 7), 40, None, {}),
        (prompt(60, 7), 40, None, ADAPTS),
    ]
    outputs = write(learning, good + requests)
    for adapter, output in zip(bad.values(), outputs[len(good) :], strict=True):
        (written,) = output.outputs
        assert (written.finish_reason, list(written.token_ids)) == ("error", [])
        assert f"the adapter '{adapter.lora_name}' cannot be used: " in str(written.stop_reason)
    for (_, _, adapter, more), output in zip(good, outputs, strict=False):
        assert len(output.outputs[0].token_ids) == 40
        if not more:
            assert_right(tiny_llama, adapter, output)
    with pytest.raises(Exception, match="rank 32"):
        learning.llm_engine.add_lora(bad["rank"])
    assert not learning.llm_engine.list_loras() & {adapter.lora_int_id for adapter in bad.values()}


def test_an_adapter_whose_files_go_while_it_is_used(
    learning: LLM, tiny_llama: Path, adapters: dict[str, LoRARequest], tmp_path: Path
) -> None:
    """And whose blocks in the prefix cache, should there be any of the step that could not load it, are
    nobody's.
    """
    path = tmp_path / "gone"
    shutil.copytree(adapters["a"].lora_path, path)
    gone = LoRARequest("gone", 7, str(path))
    request: Any = (prompt(64, 9), 30, gone, {})
    first = write(learning, [request])[0]
    shutil.move(path, tmp_path / "elsewhere")
    assert learning.llm_engine.remove_lora(7) and not learning.llm_engine.remove_lora(7)
    assert write(learning, [(prompt(96, 9), 30, gone, {})])[0].outputs[0].finish_reason == "error"
    shutil.move(tmp_path / "elsewhere", path)
    again = write(learning, [request, (prompt(96, 9), 30, gone, {})])
    assert tokens_of(again[0]) == tokens_of(first)
    assert_right(tiny_llama, gone, again[1])


@pytest.mark.parametrize("number", [1 << 20, (1 << 20) + 1, 1 << 31, (1 << 61) + 3, (1 << 63) + 1, 1 << 70])
def test_no_id_names_a_slot(
    learning: LLM, tiny_llama: Path, adapters: dict[str, LoRARequest], number: int
) -> None:
    adapter = LoRARequest(f"longctx-slot-{number}", number, adapters["b"].lora_path)
    requests: list[Any] = [(prompt(40, 4), 40, None, ADAPTS), (prompt(20, 5), 30, adapter, {})]
    outputs = write(learning, requests)
    assert tokens_of(outputs[0]) == tokens_of(write(learning, requests[:1])[0])
    assert_right(tiny_llama, adapter, outputs[1])
    assert number in learning.llm_engine.list_loras()


def test_pinned_adapters_are_pinned_among_the_users(learning: LLM, adapters: dict[str, LoRARequest]) -> None:
    """With one place and that pinned, another adapter is an error of its request, where stock vLLM's engine
    dies.
    """
    engine = learning.llm_engine
    engine.add_lora(adapters["a"])
    assert engine.pin_lora(1)
    outputs = write(learning, [(prompt(20, 1), 5, adapters["b"], {}), (prompt(40, 1), 40, None, ADAPTS)])
    assert [output.outputs[0].finish_reason for output in outputs] == ["error", "length"]
    engine.remove_lora(1)
    assert write(learning, [(prompt(20, 1), 5, adapters["b"], {})])[0].outputs[0].finish_reason == "length"
    with pytest.raises(ValueError, match="LoRA 4711 is not registered"):
        engine.pin_lora(4711)


def test_two_adapters_of_one_name(sliding: LLM, tiny_llama: Path, adapters: dict[str, LoRARequest]) -> None:
    """As when a server loads another adapter under a name while requests still run with the one before."""
    two = [LoRARequest("name", 21, adapters["a"].lora_path), LoRARequest("name", 22, adapters["b"].lora_path)]
    requests: list[Any] = [(prompt(20, seed), 20, adapter, {}) for seed, adapter in enumerate(two)]
    for adapter, output in zip(two, write(sliding, requests), strict=True):
        assert_right(tiny_llama, adapter, output)


def test_beside_requests_without_an_adapter(
    sliding: LLM, tiny_llama: Path, adapters: dict[str, LoRARequest]
) -> None:
    """Λ attention without Temp-LoRA: in stock vLLM on the CPU, and in today's code, an adapter's output leaks
    into these.
    """
    names = [None, "a", None, "b", "b", "whole", None, "c", None, "whole"]
    requests: list[Any] = [
        (
            prompt(12 + 3 * seed, seed),
            15,
            adapters.get(name or ""),
            {"prompt_logprobs": 0} if seed % 2 else {},
        )
        for seed, name in enumerate(names)
    ]
    for repetition in range(2):  # the second time from the prefix cache, where prompts are not scored
        for (_, _, adapter, _), output in zip(requests, write(sliding, requests), strict=True):
            assert_right(tiny_llama, adapter, output), repetition


def test_past_the_window_beside_adapters(sliding: LLM, adapters: dict[str, LoRARequest]) -> None:
    requests: list[Any] = [
        (prompt(120 + 30 * seed, seed), 20, adapters.get(name or ""), {})
        for seed, name in enumerate([None, "a", "whole", "b"])
    ]
    together = write(sliding, requests)
    for request, output in zip(requests, together, strict=True):
        assert tokens_of(write(sliding, [request])[0]) == tokens_of(output)


@dataclass(frozen=True)
class Case:
    """kind: "learns", "base", an adapter's name, or a bad one's."""

    kind: str
    length: int
    tokens: int


class Mixes:
    """Requests of all kinds over few places, compared with what each writes alone."""

    def __init__(self, llm: LLM, adapters: dict[str, LoRARequest]):
        self.llm, self.adapters = llm, adapters
        self.alone: dict[Case, list[int]] = {}

    def add(self, name: str, case: Case) -> None:
        more = ADAPTS if case.kind == "learns" else {}
        params = SamplingParams(
            max_tokens=case.tokens, temperature=0, ignore_eos=True, detokenize=False, **more
        )
        text = tokens_input(prompt(case.length))
        self.llm.llm_engine.add_request(name, text, params, lora_request=self.adapters.get(case.kind))

    def run(self, mix: list[tuple[Case, int, int | None]]) -> dict[str, RequestOutput]:
        """Of each: the step before which it comes, and after how many more its client leaves, if it does."""
        engine, finished, step = self.llm.llm_engine, {}, 0
        while step <= max(start for _, start, _ in mix) or engine.has_unfinished_requests():
            for number, (case, start, stays) in enumerate(mix):
                if step == start:
                    self.add(str(number), case)
                if stays is not None and step == start + stays:
                    engine.abort_request([str(number)])
            finished |= {output.request_id: output for output in engine.step() if output.finished}
            step += 1
        return finished

    def check(self, mix: list[tuple[Case, int, int | None]]) -> None:
        for case, _, _ in mix:
            if case not in self.alone:
                (output,) = self.run([(case, 0, None)]).values()
                self.alone[case] = list(output.outputs[0].token_ids)
                assert len(self.alone[case]) == (0 if case.kind in BAD else case.tokens)
        finished = self.run(mix)
        for number, (case, _, stays) in enumerate(mix):
            if stays is None or str(number) in finished:
                (written,) = finished[str(number)].outputs
                if written.finish_reason != "abort":
                    assert list(written.token_ids) == self.alone[case]
                    assert written.finish_reason == ("error" if case.kind in BAD else "length")
        assert metric(self.llm, "vllm:longctx_adapter_slots_in_use") == 0
        assert metric(self.llm, "vllm:kv_cache_usage_perc") == 0


BAD = ("shape", "missing", "rank")
cases = st.builds(
    Case,
    st.sampled_from(["learns", "learns", "base", "a", "b", "c", "whole", *BAD]),
    st.sampled_from([20, 70]),
    st.sampled_from([5, 36]),
)
mixes = st.lists(st.tuples(cases, st.integers(0, 12), st.none() | st.integers(1, 12)), min_size=2, max_size=8)
few: Any = {"deadline": None, "database": None, "suppress_health_check": [HealthCheck.too_slow]}


@pytest.fixture(scope="module")
def crowd(learning: LLM, adapters: dict[str, LoRARequest], bad: dict[str, LoRARequest]) -> Mixes:
    return Mixes(learning, adapters | bad)


@settings(max_examples=4, derandomize=True, **few)
@given(mixes)
def test_each_of_a_mix_writes_what_it_writes_alone(
    crowd: Mixes, mix: list[tuple[Case, int, int | None]]
) -> None:
    crowd.check(mix)


@pytest.mark.slow
@settings(max_examples=100, **few)
@given(mixes)
def test_each_of_many_mixes_writes_what_it_writes_alone(
    crowd: Mixes, mix: list[tuple[Case, int, int | None]]
) -> None:
    crowd.check(mix)


@pytest.mark.slow
def test_a_server_without_enable_lora_refuses_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stock vLLM's answers: on the route, by a model's name, and where the server is to start with
    one.
    """
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    path = write_adapter(tmp_path / "adapter", BOOKLM, 1)
    adaptation = json.dumps({"preset": "temp-lora-quality", "adaptation": {"slots": 1}})
    flags = [
        "--longctx",
        adaptation,
        "--dtype",
        "float32",
        "--enforce-eager",
        "--max-num-seqs",
        "4",
        "--max-model-len",
        "4096",
    ]
    flags += ["--kv-cache-memory-bytes", "100000000", "--served-model-name", "booklm"]
    with (
        running_server(BOOKLM, tmp_path / "log", *flags) as address,
        httpx.Client(base_url=address, timeout=120) as http,
    ):
        answer = http.post("/v1/load_lora_adapter", json={"lora_name": "mine", "lora_path": str(path)})
        assert answer.status_code == 500 and "LoRA is not enabled. Use --enable-lora" in answer.text
        body = {"prompt": "a b c", "max_tokens": 5, "temperature": 0}
        assert http.post("/v1/completions", json={"model": "mine", **body}).status_code == 404
        assert http.post("/v1/completions", json={"model": "booklm", **body}).status_code == 200
    with (
        pytest.raises(RuntimeError, match=r"LoRA is not enabled\. Use --enable-lora"),
        running_server(BOOKLM, tmp_path / "log", *flags, "--lora-modules", f"mine={path}"),
    ):
        pass
