"""Layers that attend to something else are refused at start, and right ones pass."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BloomConfig, Cohere2Config, Gemma2Config, Gemma3TextConfig, LlamaConfig

from tests.support.checked_worker import loaded, start
from tests.support.engine_args import save
from vllm_longctx.config import LongContextError
from vllm_longctx.cpu.worker import LongContextWorker
from vllm_longctx.engine import self_check
from vllm_longctx.engine.layers import LayerSite
from vllm_longctx.geometry import Geometry
from vllm_longctx.rotary import Rotary, inverse_frequencies

pytestmark = pytest.mark.usefixtures("one_rank", "no_gpu_memory", "one_thread")
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 64,
    "vocab_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
}
WINDOWS: dict[str, Any] = {"sliding_window": 40, "layer_types": ["sliding_attention", "full_attention"]}
MODELS: dict[str, Any] = {
    "LlamaForCausalLM": LlamaConfig(**SIZES),
    "BloomForCausalLM": BloomConfig(hidden_size=192, n_layer=2, n_head=6, vocab_size=64, seq_length=128),
    "Gemma2ForCausalLM": Gemma2Config(**SIZES, **WINDOWS, query_pre_attn_scalar=32),
    "Gemma3ForCausalLM": Gemma3TextConfig(**SIZES, **WINDOWS),
    "Cohere2ForCausalLM": Cohere2Config(**SIZES, **WINDOWS),  # its full layer has no positions
}
LAMBDA = {"n_global": 5, "n_local": 64, "distance_ceiling": 70}
SECTIONS: dict[str, dict[str, Any]] = {
    "lm-infinite": {"attention": LAMBDA},
    "defaults": {},
    "streaming": {"attention": {"method": "streaming", "n_global": 4, "n_local": 64}},
    "top-k": {"attention": {**LAMBDA, "top_k": 3, "top_k_from_layer": 1}},
    "memory": {"attention": {"method": "focused", "mem_layers": [1], "n_local": 64}},
    "lookup": {"attention": {"method": "focused", "mem_layers": [1], "lookup": "top_k", "top_k": 3}},
    "temp-lora": {"preset": "temp-lora-quality"},
}


def made(architecture: str, path: Path, section: dict[str, Any], **kwargs: Any) -> LongContextWorker:
    model = save(path, MODELS[architecture], architecture)
    return loaded(model, {"self_check": True, **section}, **kwargs)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.INFO, "vllm.longctx")
    return caplog


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Layers and positions that were compared: `model.layers.0.self_attn.attn:47`."""
    places, error = [], self_check.Text.error

    def noted(text: self_check.Text, output: torch.Tensor) -> float:
        places.append(f"{text.site.name}:{text.end - 1}")
        return error(text, output)

    monkeypatch.setattr(self_check.Text, "error", noted)
    return places


@pytest.mark.parametrize(
    ("architecture", "section", "dtype"),
    [
        *((name, "lm-infinite", dtype) for name in MODELS for dtype in ("float32", "bfloat16")),
        ("BloomForCausalLM", "lm-infinite", "float16"),
        ("LlamaForCausalLM", "defaults", "float32"),
        ("LlamaForCausalLM", "streaming", "bfloat16"),
        ("BloomForCausalLM", "streaming", "float32"),
        ("LlamaForCausalLM", "top-k", "float32"),
        ("LlamaForCausalLM", "memory", "float32"),
        ("LlamaForCausalLM", "lookup", "bfloat16"),
    ],
)
def test_right_layers_pass_and_nothing_is_left(
    architecture: str, section: str, dtype: str, tmp_path: Path, compared: list[str]
) -> None:
    worker = made(architecture, tmp_path, SECTIONS[section], dtype=dtype)
    start(worker)
    assert len(compared) >= 2
    assert not any(site.layer.kv_cache.any() for site in worker.sites)
    assert worker.model_runner.rows.selection_seconds == 0
    builders = [
        group.get_metadata_builder() for groups in worker.model_runner.attn_groups for group in groups
    ]
    assert not any("scratch" in vars(builder) for builder in builders)


@pytest.mark.parametrize(("section", "dtype"), [("temp-lora", "float32"), ("lm-infinite", "float16")])
def test_right_layers_of_a_checkpoint_pass(
    section: str, dtype: str, tiny_llama: Path, compared: list[str]
) -> None:
    start(loaded(tiny_llama, {"self_check": True, **SECTIONS[section]}, dtype=dtype, load_format="auto"))
    assert compared


def test_each_kind_is_compared_inside_at_the_end_of_and_past_its_window(
    tmp_path: Path, compared: list[str]
) -> None:
    start(made("Gemma3ForCausalLM", tmp_path, SECTIONS["lm-infinite"]))
    own, full = (f"model.layers.{number}.self_attn.attn" for number in (0, 1))
    assert sorted(compared) == sorted(
        [f"{own}:39", f"{own}:41", f"{own}:87", f"{full}:47", f"{full}:65", f"{full}:111"]
    )


def impl(**changes: Any) -> Callable[[LayerSite], LayerSite]:
    """What became of the layer is not what vLLM made."""

    def change(site: LayerSite) -> LayerSite:
        for name, value in changes.items():
            setattr(site.layer.impl, name, value(site.layer.impl) if callable(value) else value)
        return site

    return change


def sinks(site: LayerSite) -> LayerSite:
    site.stock.sinks = torch.tensor([0.0, 3.0, -9.0, 2.0])
    return site


def window(n_local: int, n_global: int = 5, ceiling: int | None = 70) -> Callable[[LayerSite], LayerSite]:
    return impl(geometry=Geometry(n_global, n_local, ceiling), sliding_window=n_global + n_local)


def base(site: LayerSite) -> LayerSite:
    rotary = Rotary(32, 32, True, inverse_frequencies(32, {"rope_theta": 1000.0}))
    return replace(site, rotary=rotary)


FAULTS: dict[str, tuple[str, int, Callable[[LayerSite], LayerSite]]] = {
    "a rotation with another base": ("LlamaForCausalLM", 0, base),
    "another scale": ("LlamaForCausalLM", 0, impl(scale=lambda impl: impl.scale * 1.1)),
    "no sinks": ("LlamaForCausalLM", 0, sinks),
    "a window that is a token shorter": ("LlamaForCausalLM", 0, window(63)),
    "a window that is a token longer": ("LlamaForCausalLM", 0, window(65)),
    "a first token less": ("LlamaForCausalLM", 0, window(64, 4)),
    "a first token more": ("LlamaForCausalLM", 0, window(64, 6)),
    "another ceiling": ("LlamaForCausalLM", 0, window(64, 5, 71)),
    "no ceiling": ("LlamaForCausalLM", 0, window(64, 5, None)),
    "no soft cap": ("Gemma2ForCausalLM", 0, impl(logits_soft_cap=0.0)),
    "no soft cap in a full layer": ("Gemma2ForCausalLM", 1, impl(logits_soft_cap=0.0)),
    "an own window that is a token shorter": ("Gemma3ForCausalLM", 0, window(39, 0)),
    "an own window that is a token longer": ("Gemma3ForCausalLM", 0, window(41, 0)),
    "no own window": ("Gemma3ForCausalLM", 0, window(64, 5)),
    "another bias": ("BloomForCausalLM", 0, impl(alibi_slopes=lambda impl: impl.alibi_slopes * 1.1)),
    "no bias": ("BloomForCausalLM", 0, impl(alibi_slopes=None)),
    "a shorter window under ALiBi": ("BloomForCausalLM", 0, window(63)),
    "another ceiling under ALiBi": ("BloomForCausalLM", 0, window(64, 5, 71)),
    "a first token less under ALiBi": ("BloomForCausalLM", 0, window(64, 4)),
    "positions where there are none": ("Cohere2ForCausalLM", 1, base),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_layer_is_refused_by_its_name(fault: str, dtype: str, tmp_path: Path) -> None:
    architecture, number, change = FAULTS[fault]
    worker = made(architecture, tmp_path, SECTIONS["lm-infinite"], dtype=dtype)
    worker.sites[number] = site = change(worker.sites[number])
    with pytest.raises(LongContextError) as refusal:
        start(worker)
    message = str(refusal.value)
    assert message.startswith(f"longctx cannot serve layer {site.name}: in the self-check, its attention at ")
    assert message.endswith("report it in the project's issues, with the model's config.json")
    assert not site.layer.kv_cache.any()


def test_a_layer_that_gives_nan_is_refused(tmp_path: Path) -> None:
    worker = made("LlamaForCausalLM", tmp_path, SECTIONS["lm-infinite"])
    impl(scale=float("nan"))(worker.sites[0])
    with pytest.raises(LongContextError, match="off by nan"):
        start(worker)


@pytest.fixture
def llama_is_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing else."""
    monkeypatch.setattr(self_check, "TESTED", ("LlamaForCausalLM",))


@pytest.mark.usefixtures("llama_is_tested")
def test_the_default_checks_what_was_not_tested(
    tmp_path: Path, compared: list[str], log: pytest.LogCaptureFixture
) -> None:
    start(made("LlamaForCausalLM", tmp_path, {"self_check": None}))
    assert not compared and "was not tested" not in log.text
    start(made("Cohere2ForCausalLM", tmp_path, {"self_check": None}))
    assert compared
    assert (
        "longctx: architecture Cohere2ForCausalLM was not tested; its layers passed the self-check. "
        "Tell us how it does: the project's issues"
    ) in log.text


@pytest.mark.usefixtures("llama_is_tested")
def test_it_can_be_left_out(tmp_path: Path, compared: list[str], log: pytest.LogCaptureFixture) -> None:
    start(made("Cohere2ForCausalLM", tmp_path, {"self_check": False}))
    assert not compared
    assert "Cohere2ForCausalLM was not tested; longctx.self_check is false" in log.text


def test_positions_that_the_kv_cache_cannot_hold_are_left_out(
    tmp_path: Path, compared: list[str], log: pytest.LogCaptureFixture
) -> None:
    worker = made("LlamaForCausalLM", tmp_path, SECTIONS["lm-infinite"])
    worker.cache_config.num_gpu_blocks_override = 4
    start(worker)
    name = worker.sites[0].name
    assert compared == [f"{name}:47", f"{name}:65"]
    assert f"the self-check of layer {name} leaves out position 111: the KV cache has 4 blocks" in log.text


def test_sinks_count(tmp_path: Path) -> None:
    worker = made("LlamaForCausalLM", tmp_path, SECTIONS["lm-infinite"])
    for site in worker.sites:
        site.layer.impl.sinks = sinks(site).stock.sinks
    start(worker)


def test_a_small_soft_cap_leaves_no_key_without_weight(tmp_path: Path, compared: list[str]) -> None:
    worker = made("LlamaForCausalLM", tmp_path, SECTIONS["lm-infinite"])
    for site in worker.sites:
        site.stock.logits_soft_cap = site.layer.impl.logits_soft_cap = 2.0
    start(worker)
    assert compared
