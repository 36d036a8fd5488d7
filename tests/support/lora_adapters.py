"""LoRA adapters for the tests' models, as peft writes them, good ones and bad ones."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput

from tests.support.engines import logprobs_of, tokens_of

LINEAR_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_adapter(
    path: Path,
    model: Path | str,
    seed: int,
    rank: int = 4,
    modules: tuple[str, ...] = LINEAR_MODULES,
    wider: int = 0,
    **config: Any,
) -> Path:
    """Random, and far from the base model's weights. wider: this many features too many go in."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, module in base.named_modules():
        last = name.rpartition(".")[2]
        if last not in modules:
            continue
        (outputs, inputs), kind = module.weight.shape, ""
        if last == "embed_tokens":
            inputs, outputs, kind = outputs, inputs, "embedding_"
        a = torch.randn(rank, inputs + wider, generator=generator) / 8
        b = torch.randn(outputs, rank, generator=generator) / 8
        suffix = "" if kind else ".weight"
        tensors[f"base_model.model.{name}.lora_{kind}A{suffix}"] = a
        tensors[f"base_model.model.{name}.lora_{kind}B{suffix}"] = b
    path.mkdir(parents=True)
    save_file(tensors, path / "adapter_model.safetensors")
    given = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": list(modules),
        "task_type": "CAUSAL_LM",
    }
    (path / "adapter_config.json").write_text(json.dumps({**given, **config}))
    return path


def write_bad_adapters(root: Path, model: Path) -> dict[str, Path]:
    """Each is refused at another point of vLLM's loading."""
    bad = {
        "modules_to_save": write_adapter(root / "modules_to_save", model, 1, modules_to_save=["lm_head"]),
        "dora": write_adapter(root / "dora", model, 2, use_dora=True),
        "rank": write_adapter(root / "rank", model, 3, rank=32),
        "shape": write_adapter(root / "shape", model, 4, wider=8),
        "no_tensors": write_adapter(root / "no_tensors", model, 5),
        "unknown_module": write_adapter(root / "unknown_module", model, 6),
        "not_json": write_adapter(root / "not_json", model, 7),
        "missing": root / "missing",
    }
    (bad["no_tensors"] / "adapter_model.safetensors").unlink()
    save_file(
        {"base_model.model.other.lora_A.weight": torch.zeros(4, 8)},
        bad["unknown_module"] / "adapter_model.safetensors",
    )
    (bad["not_json"] / "adapter_config.json").write_text("{")
    return bad


def logprobs_by_peft(model: Path, adapter: LoRARequest | None, output: RequestOutput) -> torch.Tensor:
    """Log-probabilities of what was written (and of the prompt, where it was scored), by peft."""
    base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter is not None:
        base = PeftModel.from_pretrained(base, adapter.lora_path)
    tokens = torch.tensor([tokens_of(output)])
    with torch.no_grad():
        logprobs = base(tokens).logits.double().log_softmax(-1)[0, :-1]
    values = logprobs.gather(1, tokens[0, 1:, None])[:, 0]
    return values[-len(logprobs_of(output)) :]
