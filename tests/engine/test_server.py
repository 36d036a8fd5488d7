"""`vllm serve` with a config file, over HTTP."""

import json
import os
import pydoc_data.topics
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from reference_model import ReferenceLlama
from transformers import AutoTokenizer

from vllm_longctx import BOOKLM
from vllm_longctx.geometry import Geometry

CONFIG = """
longctx:
  preset: lm-infinite
  attention:
    n_global: 4
    n_local: 256
dtype: float32
enforce-eager: true
max-model-len: 20000
max-num-seqs: 4
max-num-batched-tokens: 512
kv-cache-memory-bytes: 100000000
"""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("server")
    (directory / "serve.yaml").write_text(CONFIG)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    vllm = Path(sys.executable).parent / "vllm"
    flags = ["--plugin", "longctx", "--config", directory / "serve.yaml", "--host", "127.0.0.1", "--port", str(port)]
    with (directory / "log").open("w") as log:
        server = subprocess.Popen([vllm, "serve", BOOKLM, *flags], stdout=log, stderr=log, env=os.environ)
        try:
            for _ in range(180):
                assert server.poll() is None, (directory / "log").read_text()[-3000:]
                try:
                    urllib.request.urlopen(f"{address}/health", timeout=1)
                    break
                except OSError:
                    time.sleep(1)
            yield address
        finally:
            server.terminate()
            server.wait(60)


def complete(url: str, **body: object) -> dict:
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps({"model": BOOKLM, **body}).encode(), {"Content-Type": "application/json"}
    )
    return json.load(urllib.request.urlopen(request, timeout=120))


def test_a_completion_far_past_the_trained_length_equals_the_reference(url: str) -> None:
    text = pydoc_data.topics.topics["exprlists"] + pydoc_data.topics.topics["typesseq"]
    tokenizer = AutoTokenizer.from_pretrained(BOOKLM)
    prompt = tokenizer(text)["input_ids"][:900]
    answer = complete(url, prompt=prompt, max_tokens=12, temperature=0, ignore_eos=True, return_token_ids=True)
    written = answer["choices"][0]["token_ids"]
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (900, 12)
    rows = ReferenceLlama(BOOKLM).logprobs(prompt + written, Geometry(4, 256, 512))[len(prompt) - 1 : -1]
    chosen = rows.gather(1, torch.tensor(written)[:, None]).squeeze(1)
    assert (rows.max(-1).values - chosen).max() < 1e-3


def test_a_prompt_beyond_the_limit_is_a_client_error(url: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as error:
        complete(url, prompt=[5] * 20_001, max_tokens=1)
    assert error.value.code == 400
    assert "20000" in error.value.read().decode()
    assert complete(url, prompt=[5, 6], max_tokens=1)["usage"]["completion_tokens"] == 1
