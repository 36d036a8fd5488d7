"""What the trainer is told of the engine's model, setting by setting; and when the two are not the same."""

import json
import math
import multiprocessing
import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from vllm_longctx import refusals
from vllm_longctx.config import LongContextError
from vllm_longctx.models.properties import TRAINED_WINDOW
from vllm_longctx.settings import active_settings
from vllm_longctx.temp_lora import base_model
from vllm_longctx.temp_lora import messages as m
from vllm_longctx.temp_lora.client import trainer_client
from vllm_longctx.trainer import sidecar


def adapting(**more: Any) -> dict[str, Any]:
    return {"longctx": {"attention": {"method": "none"}, "adaptation": {"rank": 4, "slots": 2, **more}}}


ADAPTING = adapting()
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0}


def create(model: Any, **kwargs: Any) -> VllmConfig:
    return EngineArgs(
        **{
            "model": str(model),
            "additional_config": ADAPTING,
            "skip_tokenizer_init": True,
            "dtype": "float32",
            **kwargs,
        }
    ).create_engine_config()


def told(vllm_config: VllmConfig) -> m.Options:
    """What the process of the trainer would read."""
    settings = active_settings(vllm_config).adaptation
    assert settings is not None
    client = trainer_client(vllm_config, settings, None)
    try:
        return msgspec.json.decode(msgspec.json.encode(client._options), type=m.Options)
    finally:
        client.close()


def loaded(vllm_config: VllmConfig) -> LlamaForCausalLM:
    return sidecar.load(told(vllm_config))


def changed(model: Path, path: Path, by: float, **entries: Any) -> Path:
    """A checkpoint whose final norm, and nothing else in its weights, is another."""
    path.mkdir(parents=True)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], by)
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(json.loads((model / "config.json").read_text()) | entries))
    return path


def norm(model: LlamaForCausalLM) -> float:
    return model.model.norm.weight[0].item()


def scaled(config: Any) -> Any:
    config.rope_parameters = YARN
    return config


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, {"rms_norm_eps": 1e-6}),
        (
            {"hf_overrides": {"rms_norm_eps": 1e-3, "rope_parameters": YARN}},
            {"rms_norm_eps": 1e-3, "rope_parameters": YARN},
        ),
        ({"hf_overrides": scaled}, {"rope_parameters": YARN}),
        ({"hf_overrides": {"num_hidden_layers": 2}}, {"num_hidden_layers": 2}),
        ({"hf_config_path": "other"}, {"rms_norm_eps": 1e-2}),
    ],
    ids=["plain", "dict", "function", "layers", "config path"],
)
def test_the_config_is_the_engines(
    tiny_llama: Path, tmp_path: Path, kwargs: dict[str, Any], expected: dict[str, Any]
) -> None:
    changed(tiny_llama, tmp_path / "other", 1.0, rms_norm_eps=1e-2)
    if "hf_config_path" in kwargs:
        kwargs = {"hf_config_path": str(tmp_path / "other")}
    vllm_config = create(tiny_llama, **kwargs)
    model = loaded(vllm_config)
    for name, value in expected.items():
        found = getattr(model.config, name)
        assert found == getattr(vllm_config.model_config.hf_config, name)
        assert (value.items() <= found.items()) if isinstance(value, dict) else found == value
    assert not hasattr(model.config, "model_max_length")
    assert len(model.model.layers) == model.config.num_hidden_layers
    assert model.model.rotary_emb.rope_type == model.config.rope_parameters["rope_type"]


def test_a_function_that_pickle_takes_is_still_one_to_it_when_composed(tiny_llama: Path) -> None:
    """vLLM's engine core may be a spawned process, to which the configuration goes by pickle."""
    vllm_config = create(tiny_llama, hf_overrides=scaled)
    override = pickle.loads(pickle.dumps(vllm_config.model_config.hf_overrides))
    config = override(LlamaForCausalLM.config_class())
    assert config.rope_parameters == YARN and config.model_max_length == 1 << 20


def test_a_sliding_window_that_is_disabled_is_so_in_the_trainer(tmp_path: Path) -> None:
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 64,
    }
    MistralForCausalLM(MistralConfig(num_hidden_layers=1, sliding_window=64, **sizes)).save_pretrained(
        tmp_path
    )
    config = loaded(create(tmp_path, disable_sliding_window=True)).config
    assert config.sliding_window is None and not hasattr(config, TRAINED_WINDOW)


def test_an_output_layer_of_its_own_is_used_where_the_config_says_tied(
    tiny_llama: Path, tmp_path: Path
) -> None:
    path = changed(tiny_llama, tmp_path / "model", 1.0, tie_word_embeddings=True)
    model = loaded(create(path))
    own = load_file(path / "model.safetensors")["lm_head.weight"]
    assert torch.equal(model.lm_head.weight, own) and not torch.equal(own, model.model.embed_tokens.weight)


@pytest.fixture
def formats(tiny_llama: Path, tmp_path: Path) -> Path:
    """One checkpoint in all of vLLM's formats, told apart by its final norm."""
    path = changed(tiny_llama, tmp_path / "formats", 2.0)
    weights = load_file(path / "model.safetensors")
    for name, value in {"pytorch_model.bin": 3.0, "model.pt": 4.0}.items():
        torch.save(
            weights | {"model.norm.weight": torch.full_like(weights["model.norm.weight"], value)}, path / name
        )
    return path


@pytest.mark.parametrize(
    ("load_format", "value"), [("auto", 2), ("safetensors", 2), ("hf", 2), ("npcache", 3), ("pt", 4)]
)
def test_the_files_are_those_of_the_load_format(formats: Path, load_format: str, value: float) -> None:
    assert norm(loaded(create(formats, load_format=load_format))) == value


def test_auto_takes_what_is_there(formats: Path) -> None:
    (formats / "model.safetensors").unlink()
    assert norm(loaded(create(formats))) == 3


def test_hugging_faces_files_are_taken_where_mistrals_own_are_beside_them(formats: Path) -> None:
    (formats / "model.safetensors").rename(formats / "consolidated.safetensors")
    vllm_config = create(formats)
    with pytest.raises(
        LongContextError, match=r"has its weights in Mistral's own format only.* or leave adaptation out"
    ):
        base_model.weight_files(vllm_config)
    weights = load_file(formats / "consolidated.safetensors")
    save_file(weights, formats / "model-00001-of-00001.safetensors", {"format": "pt"})
    index = {"weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}
    (formats / "model.safetensors.index.json").write_text(json.dumps(index))
    assert base_model.weight_files(vllm_config) == [str(formats / "model-00001-of-00001.safetensors")]


@pytest.mark.parametrize(
    "load_format",
    [
        "dummy",
        "tensorizer",
        "runai_streamer",
        "runai_streamer_sharded",
        "sharded_state",
        "ipc_cache",
        "modelexpress",
    ],
)
def test_weights_that_the_trainer_cannot_load_are_refused(tiny_llama: Path, load_format: str) -> None:
    with pytest.raises(
        LongContextError,
        match=rf"load_format = '{load_format}': .* give one of auto, hf, .* leave adaptation",
    ):
        create(tiny_llama, load_format=load_format)


def test_a_quantized_checkpoint_is_refused_however_vllm_learns_of_it(tiny_llama: Path) -> None:
    for kwargs in (
        {"quantization": "fp8"},
        {"hf_overrides": {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}}},
    ):
        with pytest.raises(
            LongContextError, match=r"is quantized \(fp8\), and the trainer loads unquantized weights only"
        ):
            create(tiny_llama, dtype="bfloat16", **kwargs)


@pytest.fixture
def hub(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub with two revisions of the model org/model in it."""
    cache = tmp_path / "hub"
    repository = cache / "models--org--model"
    for number, name in enumerate(("main", "v1"), 2):
        commit = str(number) * 40
        path = changed(tiny_llama, repository / "snapshots" / commit, float(number))
        (path / "longctx.json").write_text(json.dumps({"adaptation": {"rank": number}}))
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache


@pytest.mark.parametrize(("revision", "value"), [(None, 2), ("main", 2), ("v1", 3), ("3" * 40, 3)])
def test_the_files_are_those_of_the_revision(hub: Path, revision: str | None, value: float) -> None:
    assert norm(loaded(create("org/model", revision=revision))) == value


def test_the_files_are_those_of_the_download_directory(hub: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """A model that is known by its name; offline vLLM would look for it in Hugging Face's own cache first of
    all.
    """
    vllm_config = create(tiny_llama, download_dir=str(tmp_path / "downloads"))
    vllm_config.model_config.model, vllm_config.model_config.revision = "org/model", "v1"
    hub.rename(tmp_path / "downloads")
    options = told(vllm_config)
    assert options.weights == [
        str(tmp_path / "downloads/models--org--model/snapshots" / ("3" * 40) / "model.safetensors")
    ]
    assert norm(sidecar.load(options)) == 3


def test_weights_that_are_not_all_there_are_never_made_up(tiny_llama: Path, tmp_path: Path) -> None:
    options = told(create(changed(tiny_llama, tmp_path / "model", 1.0)))
    weights = load_file(tmp_path / "model/model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, tmp_path / "model/model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"the weights of .* lack model.layers.1.mlp.up_proj.weight"):
        sidecar.load(options)


@pytest.mark.parametrize(
    ("dtype", "can", "trainer", "expected"),
    [
        ("float32", {}, {}, torch.float32),
        ("bfloat16", {}, {}, torch.float32),
        ("bfloat16", {"amx_bf16": False, "avx512_bf16": True}, {}, torch.bfloat16),
        ("bfloat16", {"amx_bf16": True}, {"dtype": "float32"}, torch.float32),
        ("bfloat16", {}, {"dtype": "bfloat16"}, torch.bfloat16),
        ("float16", {"amx_bf16": True}, {}, torch.float32),
        ("float16", {"amx_fp16": True}, {}, torch.float16),
    ],
)
def test_the_trainer_computes_in_what_the_cpu_multiplies(
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    can: dict[str, bool],
    trainer: dict[str, str],
    expected: torch.dtype,
) -> None:
    """What it is told, what the memory is counted by, and what versions are named by."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can)
    config = create(tiny_llama, dtype=dtype, additional_config=adapting(trainer={"device": "cpu", **trainer}))
    assert getattr(torch, told(config).dtype) == expected
    assert base_model.trained_model(config, active_settings(config).temp_lora.trainer).dtype == expected
    another = {"device": "cpu", "dtype": "bfloat16" if expected == torch.float32 else "float32"}
    other = create(tiny_llama, dtype=dtype, additional_config=adapting(trainer=another))
    assert base_model.identity(config) != base_model.identity(other)


def test_the_probe_is_a_text_that_every_query_sees_whole(tiny_llama: Path) -> None:
    vllm_config = create(tiny_llama)
    adaptation = active_settings(vllm_config).adaptation
    assert adaptation is not None
    tokens = base_model.probe(vllm_config.model_config, adaptation)
    assert len(tokens) == 64 and tokens[0] == 1 and tokens[1:32] == tokens[33:] and max(tokens) < 512
    short = adaptation.model_copy(update={"window_tokens": 5})
    assert base_model.probe(vllm_config.model_config, short) == tokens[:5]
    assert (
        base_model.probe(vllm_config.model_config, adaptation.model_copy(update={"window_tokens": 1})) == []
    )


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("ours", "theirs", "nats", "share"),
    [
        ([-1.0, -3.0, -5.0, -7.0] * 5, [-1.0, -3.0, -5.0, -7.0] * 5, 0, 0),
        ([-1.0, -3.0] * 10, [-1.5, -3.5] * 10, 0.5, 0.5),
        ([-1.0, -3.0] * 10, [-1.0, -3.0] * 9 + [-9.0, -9.0], 0, 0),  # one in ten
        ([-1.0, -3.0, NAN] * 10, [-1.0, -3.0, NAN] * 10, 0, 0),
        ([-1.0, -3.0, -INF] * 10, [-1.0, -3.0, -INF] * 10, 0, 0),
        ([-1.0, -3.0, -4.0] * 10, [-1.0, -3.0, NAN] * 10, INF, INF),
        ([NAN] * 10, [NAN] * 10, 0, 0),
        ([-6.0] * 10, [-6.001] * 10, 0.001, 0.1),  # a spread of 0 is taken for 0.01
    ],
)
def test_how_far_apart_two_models_are(
    ours: list[float], theirs: list[float], nats: float, share: float
) -> None:
    assert base_model.logprob_difference(ours, theirs) == pytest.approx((nats, share))


def test_an_adapter_is_compared_by_what_it_changes(tiny_llama: Path) -> None:
    model, without = create(tiny_llama).model_config, [-1.0, -9.0] * 10
    ours, theirs = [-2.0, -8.0] * 10, [-2.001, -8.001] * 10  # 0.001 of 1 nat, 0.0003 of a spread of 3
    assert base_model.difference_beyond_rounding(ours, theirs, model, without) is None
    theirs = [-2.004, -8.004] * 10
    assert base_model.difference_beyond_rounding(ours, theirs, model) is None
    reason = base_model.difference_beyond_rounding(ours, theirs, model, without)
    assert reason is not None and "differ by 0.004 nats, 0.004 of what it changes" in reason
    ignored = base_model.difference_beyond_rounding(without, ours, model, without)
    assert ignored is not None and "differ by 1 nats" in ignored  # an engine that leaves the adapter out


def test_a_difference_names_the_settings_that_may_explain_it(
    tiny_llama: Path, hub: Path, tmp_path: Path
) -> None:
    kwargs = {"hf_overrides": {"rope_parameters": YARN}, "revision": "v1", "load_format": "safetensors"}
    vllm_config = create("org/model", **kwargs, download_dir=str(tmp_path))
    ours, about = [-1.0, -3.0] * 10, "OTHER in float32"
    same = m.Ready({}, [-1.0001, -3.0001] * 10, about)
    other = m.Ready({}, [-1.1, -3.1] * 10, about)
    given: dict[str, Any] = {"ours": ours, "vllm_config": vllm_config, "address": None}
    assert base_model.mismatch(same, **given) is None
    reason = base_model.mismatch(other, **given)
    assert reason is not None
    for part in (
        "differ by 0.1 nats, 0.1 of their spread, where torch.float32 explains 0.002",
        about,
        "revision = 'v1'",
    ):
        assert part in reason
    for part in (
        "'rope_type': 'yarn'",
        "load_format = 'safetensors'",
        "download_dir = ",
        "leave out what the trainer",
    ):
        assert part in reason
    assert "model_max_length" not in reason
    joined = base_model.mismatch(other, **given | {"address": "ipc:///x"})
    assert joined is not None and "trainer.address = 'ipc:///x' with the engine's model" in joined


def refuse(vllm_config: SimpleNamespace) -> None:
    with refusals.reported(vllm_config):
        raise LongContextError("a reason")


def test_a_refusal_in_another_process_reaches_the_one_that_started_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.v1.engine import utils

    class Manager:
        def __init__(self, vllm_config: SimpleNamespace, message: bool):
            context = multiprocessing.get_context("fork")
            self.process = context.Process(
                target=refuse if message else int, args=(vllm_config,) if message else ()
            )
            self.process.start()
            self.process.join()

        def finished_procs(self) -> dict[str, int]:
            return {"EngineCore": self.process.exitcode}

    monkeypatch.setattr(utils, "CoreEngineProcManager", Manager)
    refusals.raise_in_front_end()
    refusals.raise_in_front_end()
    files = len(os.listdir("/proc/self/fd"))
    assert Manager(vllm_config=SimpleNamespace(), message=False).finished_procs() == {"EngineCore": 0}
    manager = Manager(vllm_config=SimpleNamespace(), message=True)
    with pytest.raises(LongContextError, match=r"^a reason$"):
        manager.finished_procs()
    del manager
    assert len(os.listdir("/proc/self/fd")) == files
