"""Two ranks on the CPU: tensor-parallel ones have heads, pools and scratch blocks of their own, data-parallel
ones all.
"""

import json
import os
import pydoc_data.topics
import re
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from server import running_server
from transformers import AutoTokenizer
from vllm import SamplingParams
from vllm.inputs import tokens_input
from vllm.lora.request import LoRARequest

from tests.support.engines import generate, logprobs_of, prompt, running, sidecars, tokens_of
from tests.support.lora_adapters import logprobs_by_peft, write_adapter
from tests.support.reference_model import ReferenceLlama
from tests.support.temp_lora_engine import STEPPED, assert_equal, replayed, written_together
from vllm_longctx import BOOKLM
from vllm_longctx.geometry import Geometry

pytestmark = [pytest.mark.usefixtures("two_cores"), pytest.mark.alone]


def test_two_ranks_equal_the_reference(tiny_llama: Path, tmp_path: Path) -> None:
    """Beside them, adapters: one that both ranks load, and one that only one of them finds, which is none for
    both.
    """
    attention = {"n_global": 10, "n_local": 64, "distance_ceiling": 64}
    path = write_adapter(tmp_path / "adapter", tiny_llama, 1)
    users = {"enable_lora": True, "fully_sharded_loras": True, "max_loras": 2, "max_lora_rank": 8}
    with running(tiny_llama, attention, tensor_parallel_size=2, **users) as llm:
        outputs = generate(llm, [prompt(n, seed=9) for n in (63, 64, 65, 300)], 40, prompt_logprobs=0)
        workers = [
            p.pid
            for p in psutil.Process().children(recursive=True)
            if "Worker" in p.name() or "Worker" in p.cmdline()[0]
        ]
        assert len(workers) == 2
        seen_by_one = [f"/proc/self/task/{worker}/root{path}" for worker in workers]
        adapters = [LoRARequest(str(n), n, str(p)) for n, p in enumerate([path, *seen_by_one], 1)]
        params = SamplingParams(max_tokens=20, temperature=0, logprobs=0, ignore_eos=True, detokenize=False)
        texts = [tokens_input(prompt(n, seed=3)) for n in (20, 21, 22, 23)]
        adapted = llm.generate(texts, params, use_tqdm=False, lora_request=[*adapters, None])
        again = llm.generate(texts[:1], params, use_tqdm=False, lora_request=adapters[:1])
    reference = ReferenceLlama(tiny_llama)
    for output in (*outputs, adapted[3]):
        expected = reference.token_logprobs(tokens_of(output), Geometry(10, 64, 64))
        assert (logprobs_of(output) - expected[-len(logprobs_of(output)) :]).abs().max() <= 1e-4
    for output in (adapted[0], again[0]):
        torch.testing.assert_close(
            logprobs_of(output), logprobs_by_peft(tiny_llama, adapters[0], output), rtol=0, atol=1e-4
        )
    assert [output.outputs[0].finish_reason for output in adapted] == ["length", "error", "error", "length"]


@pytest.mark.slow
def test_two_ranks_with_layers_of_their_own_equal_the_reference(tiny_llama: Path) -> None:
    """Pipeline parallelism."""
    attention = {"n_global": 10, "n_local": 64, "distance_ceiling": 64, "max_n_global": 40}
    own = {"extra_args": {"longctx": {"n_global": 40}}}
    with running(tiny_llama, attention, pipeline_parallel_size=2, enforce_eager=False) as llm:
        outputs = generate(llm, [prompt(n, seed=9) for n in (63, 64, 65, 300)], 40, prompt_logprobs=0)
        chosen = generate(llm, [prompt(n, seed=9) for n in (63, 300)], 40, prompt_logprobs=0, **own)
    reference = ReferenceLlama(tiny_llama)
    for output in (*outputs, *chosen):
        seen = Geometry(40 if output in chosen else 10, 64, 64)
        expected = reference.token_logprobs(tokens_of(output), seen)
        assert (logprobs_of(output) - expected).abs().max() <= 1e-4


def _ranks_that_leave_a_core_to_trainers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting ranks spin: on two cores of two, one each, a trainer gets too little of either to end within
    minutes.
    """
    last = max(os.sched_getaffinity(0))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{last}|{last}")


@pytest.mark.slow
def test_requests_that_adapt_on_two_ranks_equal_the_replay(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank takes its shard of a slot: more requests than slots, so that slots change hands on both."""
    _ranks_that_leave_a_core_to_trainers(monkeypatch)
    cases = [
        (50, 120, {}),
        (200, 60, {"update_mode": "parallel"}),
        (90, 80, {"kv_policy": "recompute", "rank": 4}),
    ]
    with running(
        tiny_llama, {"method": "none"}, adaptation={**STEPPED, "slots": 2}, tensor_parallel_size=2
    ) as llm:
        outputs = written_together(llm, [*cases, (60, 40, None)])
        alone = generate(llm, [prompt(60, 3)], 40)[0]
    for seed, (case, output) in enumerate(zip(cases, outputs, strict=False)):
        assert_equal(output, replayed(tiny_llama, seed, case, STEPPED))
    assert tokens_of(outputs[-1]) == tokens_of(alone)


@pytest.mark.slow
def test_a_data_parallel_server_writes_the_same_on_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests that adapt, too: each engine has a trainer of its own."""
    _ranks_that_leave_a_core_to_trainers(monkeypatch)
    prompt = AutoTokenizer.from_pretrained(BOOKLM)(pydoc_data.topics.topics["exprlists"])["input_ids"][:200]
    adaptation = {"slots": 1, "block_tokens": 64, "learning_rate": 1e-3}
    longctx = json.dumps({"attention": {"n_global": 4, "n_local": 64}, "adaptation": adaptation})
    flags = ["--longctx", longctx, "--data-parallel-size", "2", "--max-num-seqs", "4"]
    flags += [
        "--dtype",
        "float32",
        "--enforce-eager",
        "--max-num-batched-tokens",
        "64",
        "--kv-cache-memory-bytes",
        "100000000",
    ]
    body = {
        "prompt": prompt,
        "max_tokens": 40,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    with (
        running_server(BOOKLM, tmp_path / "log", *flags) as address,
        httpx.Client(base_url=address, timeout=120) as http,
    ):

        def written_by_both(body: dict[str, Any]) -> list[list[int]]:
            answers = [
                http.post("/v1/completions", json=body, headers={"X-data-parallel-rank": rank})
                for rank in "01"
            ]
            return [answer.json()["choices"][0]["token_ids"] for answer in answers]

        written = written_by_both(body)
        adapted = written_by_both({**body, "vllm_xargs": {"longctx": '{"temp_lora": true}'}})
        assert len(sidecars()) == 2
        # Each rank has an API server of its own, which take turns.
        wrong = {**body, "vllm_xargs": {"longctx": '{"rnk": 4}'}}
        refused = [http.post("/v1/completions", json=wrong).status_code for _ in range(4)]
        exported = http.get("/metrics").text

    def counted(name: str) -> list[float]:
        return [
            float(value)
            for _, value in sorted(re.findall(rf'vllm:{name}_total\{{engine="(\d)",.*\}} (\S+)', exported))
        ]

    assert written[0] == written[1] and refused == [400] * 4
    assert adapted[0] == adapted[1] != written[0]
    assert counted("prompt_tokens") == [400, 400] and counted("longctx_blocks_trained") == [3, 3]
    rows = ReferenceLlama(BOOKLM).logprobs(prompt + written[0], Geometry(4, 64, 512))[len(prompt) - 1 : -1]
    assert (rows.max(-1).values - rows.gather(1, torch.tensor(written[0])[:, None]).squeeze(1)).max() < 1e-3
