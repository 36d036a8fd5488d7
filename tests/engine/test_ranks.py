"""Two ranks on the CPU: tensor-parallel ones have heads, pools and scratch blocks of their own, data-parallel ones all."""

import pydoc_data.topics
import re
from pathlib import Path

import httpx
import pytest
import torch
from conftest_engine import a_core_for_each_of_two_ranks, generate, logprobs_of, prompt, running, tokens_of
from reference_model import ReferenceLlama
from server import running_server
from transformers import AutoTokenizer

from vllm_longctx import BOOKLM
from vllm_longctx.geometry import Geometry


@pytest.fixture(autouse=True)
def _two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    a_core_for_each_of_two_ranks(monkeypatch)


def test_two_ranks_equal_the_reference(tiny_llama: Path) -> None:
    attention = {"n_global": 10, "n_local": 64, "distance_ceiling": 64}
    with running(tiny_llama, attention, tensor_parallel_size=2) as llm:
        outputs = generate(llm, [prompt(n, seed=9) for n in (63, 64, 65, 300)], 40, prompt_logprobs=0)
    reference = ReferenceLlama(tiny_llama)
    for output in outputs:
        expected = reference.token_logprobs(tokens_of(output), Geometry(10, 64, 64))
        assert (logprobs_of(output) - expected).abs().max() <= 1e-4


def test_a_data_parallel_server_writes_the_same_on_every_rank(tmp_path: Path) -> None:
    prompt = AutoTokenizer.from_pretrained(BOOKLM)(pydoc_data.topics.topics["exprlists"])["input_ids"][:200]
    flags = ["--longctx", '{"attention": {"n_global": 4, "n_local": 64}}', "--data-parallel-size", "2", "--max-num-seqs", "4"]
    flags += ["--dtype", "float32", "--enforce-eager", "--max-num-batched-tokens", "64", "--kv-cache-memory-bytes", "100000000"]
    body = {"prompt": prompt, "max_tokens": 40, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    with running_server(BOOKLM, tmp_path / "log", *flags) as address, httpx.Client(base_url=address, timeout=120) as http:
        written = []
        for rank in ("0", "1"):
            answer = http.post("/v1/completions", json=body, headers={"X-data-parallel-rank": rank})
            written.append(answer.json()["choices"][0]["token_ids"])
        # Each rank has an API server of its own, which take turns.
        unknown = [http.post("/v1/completions", json={**body, "sed": 1}).status_code for _ in range(4)]
        counted = re.findall(r'vllm:prompt_tokens_total\{engine="(\d)",.*\} (\S+)', http.get("/metrics").text)
    assert written[0] == written[1] and unknown == [400] * 4
    assert sorted((rank, float(tokens)) for rank, tokens in counted) == [("0", 200), ("1", 200)]
    rows = ReferenceLlama(BOOKLM).logprobs(prompt + written[0], Geometry(4, 64, 512))[len(prompt) - 1 : -1]
    assert (rows.max(-1).values - rows.gather(1, torch.tensor(written[0])[:, None]).squeeze(1)).max() < 1e-3
