"""Every family and every kind of positions, on random weights, against the dense float64 reference."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.support.engines import generate, logprobs_of, prompt, running_here, tokens_of
from tests.support.reference_model import (
    Reference,
    ReferenceBloom,
    ReferenceGPTJ,
    ReferenceLlama,
    ReferenceMpt,
)
from vllm_longctx.geometry import Geometry

LENGTHS = [1, 31, 63, 64, 65, 97, 300]
TRAINED = 128
LM_INFINITE = {"n_global": 10, "n_local": 64, "distance_ceiling": 64}, Geometry(10, 64, 64)
STREAMING = {"method": "streaming", "n_global": 4, "n_local": 60}, Geometry(4, 60, distances="in_cache")
LLAMA = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": TRAINED,
    "tie_word_embeddings": False,
}


def rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return {**LLAMA, "rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **parameters}}


@dataclass(frozen=True)
class Family:
    name: str
    config: dict[str, Any]
    reference: type[Reference]
    method: tuple[dict[str, Any], Geometry] = LM_INFINITE


YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GPTJ = {"n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": TRAINED, "rotary_dim": 16, "vocab_size": 512}
BLOOM = {
    "hidden_size": 192,
    "n_layer": 3,
    "n_head": 6,
    "vocab_size": 512,
    "seq_length": TRAINED,
}  # 6: not a power of two
MPT = {"d_model": 192, "n_layers": 3, "n_heads": 6, "max_seq_len": TRAINED, "vocab_size": 512}
FAMILIES = {
    "llama, linear": Family("Llama", rope("linear", factor=4.0), ReferenceLlama),
    "mistral, dynamic NTK": Family(
        "Mistral",
        {**rope("dynamic", factor=2.0, max_trained_positions=64), "sliding_window": None},
        ReferenceLlama,
    ),
    "qwen2, YaRN": Family("Qwen2", rope("yarn", **YARN), ReferenceLlama),
    "qwen2, YaRN, streaming": Family("Qwen2", rope("yarn", **YARN), ReferenceLlama, STREAMING),
    "qwen3, llama3": Family("Qwen3", rope("llama3", **LLAMA3), ReferenceLlama),
    "gptj": Family("GPTJ", GPTJ, ReferenceGPTJ),
    "bloom": Family("Bloom", BLOOM, ReferenceBloom),
    "mpt": Family("Mpt", MPT, ReferenceMpt),
    "mpt, streaming": Family("Mpt", MPT, ReferenceMpt, STREAMING),
}


def make(family: Family, path: Path) -> Path:
    """A random checkpoint whose attention is far from uniform."""
    torch.manual_seed(5)
    config = getattr(transformers, f"{family.name}Config")(**family.config, initializer_range=0.08)
    model = getattr(transformers, f"{family.name}ForCausalLM")(config)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            weight.data.normal_(std=0.1)
        if any(
            part in name
            for part in ("q_proj.weight", "k_proj.weight", "query_key_value.weight", "Wqkv.weight")
        ):
            weight.data *= 2.5
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("name", "eager"),
    [
        *((name, True) for name in FAMILIES),
        *(pytest.param(name, False, marks=pytest.mark.slow) for name in ("qwen3, llama3", "mpt")),
    ],
)
def test_it_equals_the_reference(name: str, eager: bool, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = make(family, tmp_path)
    attention, geometry = family.method
    with running_here(model, attention, enforce_eager=eager) as llm:
        outputs = generate(llm, [prompt(n) for n in LENGTHS], 40, prompt_logprobs=0)
    reference = family.reference(model)
    for output in outputs:
        expected = reference.token_logprobs(tokens_of(output), geometry)
        assert (logprobs_of(output) - expected).abs().max() <= 1e-4


def test_the_tests_own_references_are_transformers_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside the trained length, with plain attention, they are what transformers computes."""
    ids = prompt(TRAINED)
    monkeypatch.setattr(ReferenceBloom, "approximate", "tanh")
    for number, (name, family) in enumerate(FAMILIES.items()):
        if "streaming" in name:
            continue
        path = make(family, tmp_path / str(number))
        model = getattr(transformers, f"{family.name}ForCausalLM").from_pretrained(path, dtype=torch.float32)
        if "dynamic" in name:  # transformers does not know vLLM's max_trained_positions
            continue
        with torch.no_grad():
            theirs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        assert (family.reference(path).logprobs(ids) - theirs).abs().max() < 1e-3, name
