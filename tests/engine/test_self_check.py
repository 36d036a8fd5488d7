"""Engines whose layers are checked at start."""

import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import HyperCLOVAXConfig

from tests.support.engine_args import save
from tests.support.engines import generate, prompt, running_here, tokens_of
from vllm_longctx.models.properties import TESTED

ATTENTION = {"n_global": 10, "n_local": 64, "distance_ceiling": 64}


def written(model: Path, self_check: bool | None, **kwargs: Any) -> list[list[int]]:
    section: dict[str, Any] = {"attention": ATTENTION, "self_check": self_check}
    with running_here(model, None, additional_config={"longctx": section}, **kwargs) as llm:
        return [tokens_of(output) for output in generate(llm, [prompt(n) for n in (31, 64, 300)], 20)]


def test_a_checked_engine_writes_the_same(tiny_llama: Path) -> None:
    assert written(tiny_llama, True) == written(tiny_llama, False)


def test_an_architecture_that_was_not_tested_is_checked_and_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture = "HyperCLOVAXForCausalLM"
    assert architecture not in TESTED
    config = HyperCLOVAXConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.INFO, "vllm.longctx"):
        assert written(save(tmp_path, config, architecture), None, load_format="dummy")
    assert f"architecture {architecture} was not tested; its layers passed the self-check" in caplog.text
