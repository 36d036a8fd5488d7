"""A base with weights of 8 or 4 bits: its KV cache is as any other's, and so are the methods."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.engines import generate, logprobs_of, prompt, running_here, tokens_of
from tests.support.reference_model import Layers, ReferenceLlama, alike, focused
from vllm_longctx.config import LongContextError
from vllm_longctx.geometry import Geometry, SteppedWindows

GROUP = 32  # input channels with one scale
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


Tensors = dict[str, Tensor]


def eight_bits(weight: Tensor) -> tuple[Tensors, Tensor]:
    """(weights that are loaded, those that they stand for), of one linear layer: W8A8 of llm-compressor."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    loaded = (weight / scale).round().to(torch.int8)
    return {"weight": loaded, "weight_scale": scale}, loaded * scale


def in_groups(weight: Tensor, lowest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Four bits, [in, out] from `lowest` on, scales [groups, out], and the weights [out, in] of these."""
    groups = weight.T.reshape(-1, GROUP, weight.shape[0])
    scale = (groups.abs().amax(1) / -lowest).bfloat16()  # what the engine computes with
    values = (groups / scale[:, None].float()).round().clamp(lowest, lowest + 15)
    meant = (values * scale[:, None].float()).reshape(weight.T.shape).T
    return values.reshape(weight.T.shape).int(), scale.half(), meant.contiguous()


def packed(values: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """int32 [rows, columns / 8] of 4-bit values."""
    parts = values.reshape(len(values), -1, 8)[:, :, order].int()
    return sum((parts[:, :, i] << 4 * i for i in range(8)), torch.zeros(parts.shape[:2], dtype=torch.int32))


def gptq(weight: Tensor) -> tuple[Tensors, Tensor]:
    values, scales, meant = in_groups(weight, -8)
    rows, groups = len(values), len(scales)
    zeros = packed(torch.full((groups, values.shape[1]), 7))  # this format keeps a zero less one
    index = torch.arange(rows, dtype=torch.int32) // GROUP
    words = packed((values + 8).T).T.contiguous()
    return {"qweight": words, "qzeros": zeros, "scales": scales, "g_idx": index}, meant


def awq(weight: Tensor) -> tuple[Tensors, Tensor]:
    values, scales, meant = in_groups(weight, -7)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    zeros = packed(torch.full((len(scales), values.shape[1]), 7), order)
    return {"qweight": packed(values + 7, order), "qzeros": zeros, "scales": scales}, meant


# Of a linear layer's weights, those of the checkpoint and those that they stand for; and the config's entry.
FORMATS: dict[str, tuple[Callable[[Tensor], tuple[Tensors, Tensor]], dict[str, Any]]] = {
    "w8a8": (
        eight_bits,
        {
            "quant_method": "compressed-tensors", "format": "int-quantized",
            "quantization_status": "compressed", "config_groups": {"group_0": SCHEME}, "ignore": ["lm_head"],
        },
    ),
    "gptq": (
        gptq,
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
    ),
    "awq": (
        awq,
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=["w8a8", "gptq", pytest.param("awq", marks=pytest.mark.slow)])
def quantized(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, ReferenceLlama]:
    """A checkpoint in this format, and the reference of its weights."""
    quantize, entry = FORMATS[request.param]
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
    meant = dict(weights)
    for name in [name for name in weights if name.endswith("proj.weight")]:
        loaded, meant[name] = quantize(weights.pop(name))
        weights |= {f"{name.removesuffix('weight')}{part}": value for part, value in loaded.items()}
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    save_file(meant, plain / "model.safetensors")
    document = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(document | {"quantization_config": entry}))
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
