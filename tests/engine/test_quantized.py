"""A base with 8-bit weights and activations: its KV cache is as any other's, and so are the methods."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.support.engines import generate, logprobs_of, prompt, running_here, tokens_of
from tests.support.reference_model import Layers, ReferenceLlama, alike, focused
from vllm_longctx.config import LongContextError
from vllm_longctx.geometry import Geometry, SteppedWindows

INSIDE, PAST = [40, 63, 64], [65, 97, 200]
SCHEME = {
    "targets": ["Linear"],
    "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
    "input_activations": {
        "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
    },
}  # fmt: skip
LAMBDA = {"n_global": 10, "n_local": 64, "distance_ceiling": 64}
MEMORY = {
    "method": "focused", "n_local": 64, "last_context_length": 32, "mem_layers": [2], "mem_dtype": "float32",
}  # fmt: skip


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ReferenceLlama]:
    """A checkpoint as llm-compressor writes it (W8A8), and the reference of its weights."""
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=128, initializer_range=0.08,
        tie_word_embeddings=False,
    )  # fmt: skip
    path, plain = tmp_path_factory.mktemp("quantized"), tmp_path_factory.mktemp("plain")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    shutil.copy(path / "config.json", plain)
    weights = load_file(path / "model.safetensors")
    for name in [name for name in weights if name.endswith("proj.weight")]:
        scale = weights[name].abs().amax(1, keepdim=True) / 127
        weights[f"{name}_scale"], weights[name] = scale, (weights[name] / scale).round().to(torch.int8)
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    scales = {name: weights.pop(f"{name}_scale") for name in list(weights) if f"{name}_scale" in weights}
    save_file(
        {n: w * scales[n] if n in scales else w for n, w in weights.items()}, plain / "model.safetensors"
    )
    document = json.loads((path / "config.json").read_text())
    document["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": SCHEME}, "ignore": ["lm_head"],
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(document))
    return path, ReferenceLlama(plain)


@pytest.fixture(scope="module")
def of_vllm(quantized: tuple[Path, ReferenceLlama]) -> float:
    """How far stock vLLM is from the reference, in nats: activations of 8 bits decide it, not attention."""
    return error(quantized, None, lambda _: alike(Geometry()), INSIDE, max_model_len=128)


def error(
    quantized: tuple[Path, ReferenceLlama], attention: Any, seen: Any, lengths: list[int], **kwargs: Any
) -> float:
    path, reference = quantized
    errors = []
    with running_here(path, attention, dtype="bfloat16", **kwargs) as llm:
        outputs = generate(llm, [prompt(n) for n in lengths], 20, prompt_logprobs=0)
    for length, output in zip(lengths, outputs, strict=True):
        expected = reference.token_logprobs(tokens_of(output), seen(length))
        errors.append(float((logprobs_of(output) - expected).abs().mean()))
    return max(errors)


def of_memory(length: int) -> Layers:
    return focused(SteppedWindows(64, 32), length, [2])


@pytest.mark.parametrize(
    ("attention", "seen"),
    [
        (LAMBDA, lambda _: alike(Geometry(10, 64, 64))),
        pytest.param(MEMORY, of_memory, marks=pytest.mark.slow),
    ],
    ids=["lm_infinite", "focused"],
)
def test_it_errs_no_more_past_the_window_than_vllm_does_inside(
    attention: dict[str, Any], seen: Any, quantized: tuple[Path, ReferenceLlama], of_vllm: float
) -> None:
    assert 0 < of_vllm < 0.1
    assert error(quantized, attention, seen, INSIDE + PAST) < 1.5 * of_vllm


def test_it_cannot_learn(quantized: tuple[Path, ReferenceLlama]) -> None:
    refused = running_here(quantized[0], LAMBDA, {"rank": 4}, dtype="bfloat16")
    with pytest.raises(LongContextError, match=r"is quantized .* give the unquantized checkpoint"), refused:
        pass
