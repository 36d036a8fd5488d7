"""The trainer has the engine's model, whatever setting it comes from, or the engine does not start."""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import psutil
import pytest
from transformers import AutoModelForCausalLM

from tests.support.engines import generate, metric, prompt, running, running_here, sidecars
from tests.support.temp_lora_engine import STEPPED, asked, assert_equal
from tests.support.temp_lora_replay import Options, replay
from vllm_longctx.config import LongContextError
from vllm_longctx.engine import lora
from vllm_longctx.engine.adapted_layers import AdaptedLayers, adapted_layers
from vllm_longctx.temp_lora import base_model

YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
NONE = {"method": "none"}
ADAPTATION = {**STEPPED, "slots": 2}
OPTIONS = Options(**{key: value for key, value in STEPPED.items() if key != "dropout"})

pytestmark = pytest.mark.trainer


def copied(model: Path, path: Path, **entries: Any) -> Path:
    """A checkpoint with the same weights and other entries in its config."""
    path.mkdir(parents=True)
    for file in model.iterdir():
        (path / file.name).symlink_to(file.resolve())
    (path / "config.json").unlink()
    (path / "config.json").write_text(json.dumps(json.loads((model / "config.json").read_text()) | entries))
    return path


def refused(*args: Any, **kwargs: Any) -> str:
    of_others = sidecars()
    with pytest.raises(LongContextError) as error, running_here(*args, **kwargs):
        pass
    assert not psutil.wait_procs([p for p in sidecars() if p not in of_others], timeout=20)[1]
    return str(error.value)


def test_overrides_reach_the_trainer_and_its_check_leaves_nothing_behind(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """YaRN by --hf-overrides learns what a checkpoint with YaRN in its config learns."""
    overrides = {"rope_parameters": YARN, "rms_norm_eps": 1e-4}
    length, tokens = 90, 70
    with running_here(tiny_llama, NONE, ADAPTATION, hf_overrides=overrides) as llm:
        engine = llm.llm_engine.engine_core.engine_core
        assert len(engine.scheduler.kv_cache_manager.block_pool.cached_block_hash_to_block) == 0
        for name in (
            "num_preemptions",
            "prefix_cache_queries",
            "longctx_adapted_tokens",
            "generation_tokens",
        ):
            assert metric(llm, f"vllm:{name}") == 0
        output = generate(llm, [prompt(length)], tokens, prompt_logprobs=0, **asked({}))[0]
        assert metric(llm, "vllm:longctx_blocks_trained") > 2
        assert metric(llm, "vllm:longctx_train_failures") == 0
    assert_equal(
        output, replay(copied(tiny_llama, tmp_path / "yarn", **overrides), prompt(length), tokens, OPTIONS)
    )


@pytest.mark.parametrize("start", [running_here, pytest.param(running, marks=pytest.mark.slow)])
def test_a_revision_reaches_the_trainer(
    start: Any, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model that is known by its name, in a cache with two of them; also by an engine in processes of
    its own.
    """
    repository = tmp_path / "hub/models--org--model"
    other = AutoModelForCausalLM.from_pretrained(tiny_llama)
    for parameter in other.model.layers[1].parameters():
        parameter.data *= 1.5
    other.save_pretrained(repository / "snapshots" / ("1" * 40))
    shutil.copytree(tiny_llama, repository / "snapshots" / ("2" * 40))
    (repository / "refs").mkdir()
    for name, commit in {"main": "1" * 40, "v1": "2" * 40}.items():
        (repository / "refs" / name).write_text(commit)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with start("org/model", NONE, ADAPTATION, revision="v1") as llm:
        output = generate(llm, [prompt(90)], 40, prompt_logprobs=0, **asked({}))[0]
    assert_equal(output, replay(tiny_llama, prompt(90), 40, OPTIONS))


def test_another_checkpoint_in_the_trainer_refuses_to_start(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files were exchanged behind the engine's back."""
    other = AutoModelForCausalLM.from_pretrained(tiny_llama)
    for parameter in other.model.layers[1].parameters():
        parameter.data *= 1.05
    other.save_pretrained(tmp_path)
    monkeypatch.setattr(base_model, "weight_files", lambda vllm_config: [str(tmp_path / "model.safetensors")])
    message = refused(tiny_llama, NONE, ADAPTATION)
    assert (
        "the trainer has another model than the engine: log-probabilities of the same text differ by "
        in message
    )
    assert "with no unusual settings; see whether the checkpoint was changed" in message


def test_an_adapter_that_means_something_else_refuses_to_start(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The models are the same, but one takes the keys' adapter for the values'."""

    def confused(*args: Any) -> AdaptedLayers:
        found = adapted_layers(*args)
        for parts in found.parts.values():
            if len(parts) == 3:
                parts[1:] = parts[:0:-1]
        return found

    monkeypatch.setattr(lora, "adapted_layers", confused)
    message = refused(tiny_llama, NONE, ADAPTATION)
    assert f"the trainer computes an adapter of {tiny_llama} otherwise than the engine: " in message
    assert "model.layers.*.self_attn.v_proj" in message and message.endswith("; leave adaptation out")


def test_what_only_one_of_them_computes_refuses_to_start_in_another_process(tiny_llama: Path) -> None:
    """vLLM's Llama scales its logits by this entry of a config, transformers' does not know it.

    The reason reaches the user.
    """
    began = sidecars()
    message = r"has another model .* with hf_overrides = \{'logit_scale': 0.5\}; leave out"
    with (
        pytest.raises(LongContextError, match=message),
        running(tiny_llama, NONE, ADAPTATION, hf_overrides={"logit_scale": 0.5}),
    ):
        pass
    assert not psutil.wait_procs([p for p in sidecars() if p not in began], timeout=20)[1]
