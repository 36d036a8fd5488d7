"""bf16 and fp16 err by their own rounding: past the window no more than inside it, where attention is stock
vLLM's.
"""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.support.engines import generate, logprobs_of, prompt, running_here, tokens_of
from tests.support.reference_model import ReferenceLlama
from vllm_longctx.geometry import Geometry


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype: str, tiny_llama: Path, tmp_path: Path) -> None:
    import torch

    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text((tiny_llama / "config.json").read_text())
    weights = load_file(tiny_llama / "model.safetensors")
    rounded = {k: v.to(getattr(torch, dtype)) for k, v in weights.items()}
    save_file(rounded, model / "model.safetensors", metadata={"format": "pt"})

    with running_here(model, {"n_global": 10, "n_local": 64, "distance_ceiling": 64}, dtype=dtype) as llm:
        outputs = generate(llm, [prompt(n, seed=7) for n in (600, 500, 90)], 100, prompt_logprobs=0)
    reference = ReferenceLlama(model)
    inside, past = [], []
    for output in outputs:
        expected = reference.token_logprobs(tokens_of(output), Geometry(10, 64, 64))
        error = (logprobs_of(output) - expected).abs()
        inside.append(error[:63])
        past.append(error[64:])
    assert torch.cat(past).mean() < 1.5 * torch.cat(inside).mean()
