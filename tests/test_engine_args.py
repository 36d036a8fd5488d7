"""What the plugin makes of engine arguments, without starting an engine."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import vllm
from transformers import AutoConfig, BloomConfig, GPT2Config, GPTJConfig, LlamaConfig, MambaConfig, MistralConfig, MptConfig
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_longctx import BOOKLM, engine_args
from vllm_longctx.config import LongContextError, active_config
from vllm_longctx.geometry import Geometry, SteppedWindows
from vllm_longctx.kv_cache import prefix_caching

LM_INFINITE = {"longctx": {"preset": "lm-infinite"}}
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}


def create(model: str | Path = BOOKLM, additional_config: Any = LM_INFINITE, **kwargs: Any) -> VllmConfig:
    args = EngineArgs(
        model=str(model), additional_config=additional_config, skip_tokenizer_init=True, load_format="dummy", **kwargs
    )
    return args.create_engine_config()


def save(path: Path, config: Any, architecture: str) -> Path:
    config.architectures = [architecture]
    config.save_pretrained(path)
    return path


def test_it_sets_what_vllm_needs() -> None:
    config = create()
    assert config.parallel_config.worker_cls == engine_args.WORKER
    assert config.cache_config.block_size == 32
    assert config.model_config.max_model_len == 1 << 20
    assert active_config(config).geometry == Geometry(10, 512, 512)


def test_what_the_user_set_stays() -> None:
    config = create(block_size=64, max_model_len=5000, hf_overrides={"rms_norm_eps": 1e-4})
    assert (config.cache_config.block_size, config.model_config.max_model_len) == (64, 5000)
    assert config.model_config.hf_config.rms_norm_eps == 1e-4
    assert create(max_model_len=100).model_config.max_model_len == 100


def test_an_override_function_is_composed() -> None:
    def override(config: Any) -> Any:
        config.rms_norm_eps = 1e-3
        return config

    config = create(hf_overrides=override, max_model_len=9000)
    assert config.model_config.hf_config.rms_norm_eps == 1e-3 and config.model_config.max_model_len == 9000


@pytest.mark.parametrize("additional_config", [{}, {"other": 1}, {"longctx": {"attention": {"method": "none"}}}])
def test_without_a_method_nothing_is_changed(additional_config: dict) -> None:
    config = create(additional_config=additional_config)
    assert config.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"
    assert config.model_config.max_model_len == 512
    assert config.additional_config == additional_config


def test_the_configuration_enters_the_compile_cache_hash() -> None:
    assert create().compute_hash() != create(additional_config={"longctx": {"preset": "streaming"}}).compute_hash()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"additional_config": {"longctx": {"prest": "x"}}}, r"unknown key 'prest'; did you mean 'preset'"),
        ({"additional_config": {"longctx": {"attention": {"n_local": 1024}}}}, r"n_local = 1024, but .* 512 tokens"),
        ({"num_gpu_blocks_override": 20}, r"num_gpu_blocks_override = 20 gives 20 blocks, but one request holds up to"),
        ({"kv_cache_memory_bytes": 1_000_000}, r"the KV cache of 1000000 bytes .* gives 10 blocks, but one request"),
        ({"additional_config": '{"longctx": {}}'}, r"additional_config = '.*' is a string; give a dict"),
        ({"worker_cls": "my.Worker"}, r"worker_cls = 'my.Worker', but longctx needs its own; leave worker_cls out"),
        ({"block_size": 48}, r"block_size = 48; give a multiple of 32"),
        ({"kv_cache_dtype": "fp8"}, r"kv_cache_dtype = 'fp8'; leave it at 'auto'"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(kwargs: dict, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    with pytest.raises(LongContextError, match=message):
        create(**kwargs)


def test_the_smallest_pool_that_is_accepted() -> None:
    config = {"longctx": {"attention": {"n_local": 64, "n_global": 16}}}
    create(additional_config=config, num_gpu_blocks_override=9, max_num_batched_tokens=128, max_model_len=100_000)
    with pytest.raises(LongContextError, match="give at least 9 blocks"):
        create(additional_config=config, num_gpu_blocks_override=8, max_num_batched_tokens=128)


@pytest.mark.parametrize(
    ("config", "architecture", "message"),
    [
        (
            GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=64),
            "GPT2LMHeadModel",
            "it has neither one set of RoPE positions nor ALiBi",
        ),
        (
            MistralConfig(**TINY, intermediate_size=64, num_key_value_heads=2, sliding_window=64),
            "MistralForCausalLM",
            r"it has a sliding window of its own \(64 tokens\); --disable-sliding-window replaces it",
        ),
        (
            MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=64),
            "MambaForCausalLM",
            "it has Mamba or linear-attention layers",
        ),
        (
            AutoConfig.for_model(
                "deepseek_v2", **TINY, num_key_value_heads=2, kv_lora_rank=16, q_lora_rank=None, qk_rope_head_dim=16,
                qk_nope_head_dim=16, v_head_dim=16, intermediate_size=64, moe_intermediate_size=32, first_k_dense_replace=2,
            ),
            "DeepseekV2ForCausalLM",
            "it has MLA layers",
        ),
        (
            LlamaConfig(
                **TINY, intermediate_size=64, max_position_embeddings=128,
                rope_parameters={
                    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32,
                    "short_factor": [1.0] * 16, "long_factor": [2.0] * 16,
                },
            ),
            "LlamaForCausalLM",
            "it has rope_type 'longrope', not one of default, llama3, linear, dynamic, yarn",
        ),
        (
            BloomConfig(hidden_size=64, n_layer=2, n_head=2, vocab_size=64),
            "BloomForCausalLM",
            r"does not say the trained length \(.*\); give it, for example --hf-overrides '\{\"seq_length\": 2048\}'",
        ),
        (
            LlamaConfig(**{**TINY, "hidden_size": 48}, intermediate_size=64),
            "LlamaForCausalLM",
            "it has heads of 24 elements; vLLM's attention on the CPU takes 32, 64,",
        ),
        (LlamaConfig(**TINY, intermediate_size=64), "StableLmForCausalLM", "longctx was not tested with model"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_run_is_refused_with_its_reason(
    config: Any, architecture: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(LongContextError, match=message):
        create(save(tmp_path, config, architecture))


def test_a_disabled_sliding_window_is_accepted(tmp_path: Path) -> None:
    config = MistralConfig(**TINY, intermediate_size=64, num_key_value_heads=2, sliding_window=64)
    model = save(tmp_path, config, "MistralForCausalLM")
    create(model, disable_sliding_window=True)


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("config", "architecture", "length"),
    [
        (LlamaConfig(**TINY, intermediate_size=64, max_position_embeddings=64, rope_parameters=YARN), "LlamaForCausalLM", 256),
        (GPTJConfig(n_embd=64, n_layer=2, n_head=2, n_positions=96, vocab_size=64, rotary_dim=16), "GPTJForCausalLM", 96),
        (BloomConfig(hidden_size=64, n_layer=2, n_head=2, vocab_size=64, seq_length=80), "BloomForCausalLM", 80),
        (MptConfig(d_model=64, n_layers=2, n_heads=2, vocab_size=64, max_seq_len=112), "MptForCausalLM", 112),
    ],
)
def test_the_trained_length_is_read_from_every_family(config: Any, architecture: str, length: int, tmp_path: Path) -> None:
    resolved = create(save(tmp_path, config, architecture))
    assert active_config(resolved).geometry == Geometry(10, length, length)
    assert resolved.model_config.max_model_len == 1 << 20


QUALITY = {"longctx": {"preset": "temp-lora-quality"}}


def test_temp_lora_asks_vllm_for_its_slots() -> None:
    config = create(additional_config=QUALITY, max_num_seqs=4)
    adaptation = active_config(config).adaptation
    assert adaptation is not None and adaptation.slots == 4
    assert (adaptation.rank, adaptation.learning_rate) == (8, 5e-4)  # what booklm recommends
    assert (config.lora_config.max_loras, config.lora_config.max_lora_rank) == (4, 8)
    assert config.scheduler_config.get_scheduler_cls().__name__ == "TempLoraScheduler"
    both = create(additional_config=QUALITY, max_num_seqs=4, enable_lora=True, max_loras=3, max_lora_rank=64)
    assert (both.lora_config.max_loras, both.lora_config.max_lora_rank) == (7, 64)
    assert both.lora_config.target_modules == config.lora_config.target_modules == list(engine_args.LINEAR_MODULES)


def test_what_the_user_says_goes_before_what_a_checkpoint_recommends() -> None:
    value = {"longctx": {"preset": "temp-lora-quality", "adaptation": {"rank": 4, "slots": 2}}}
    adaptation = active_config(create(additional_config=value)).adaptation
    assert adaptation is not None
    assert (adaptation.rank, adaptation.learning_rate, adaptation.slots) == (4, 5e-4, 2)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_num_seqs": 2, "slots": 3}, "adaptation.slots = 3, but max_num_seqs = 2 requests run at once; lower slots"),
        ({"scheduling_policy": "priority"}, "scheduling_policy = 'priority' may preempt a request that adapts"),
        (
            {"enable_lora": True, "lora_target_modules": ["q_proj"]},
            r"lora_target_modules = \['q_proj'\], but Temp-LoRA adapts q_proj, k_proj, .*; leave it out",
        ),
        ({"num_gpu_blocks_override": 17}, "17 blocks, but one request holds up to 17 .* give at least 18 blocks"),
    ],
)
def test_settings_that_do_not_go_with_temp_lora_are_refused(kwargs: dict[str, Any], message: str) -> None:
    slots = {"slots": kwargs.pop("slots")} if "slots" in kwargs else {}
    value = {"longctx": {"preset": "temp-lora-quality", "adaptation": slots}}
    with pytest.raises(LongContextError, match=message):
        create(additional_config=value, **kwargs)


def test_a_model_whose_layers_take_no_lora_is_refused(tmp_path: Path) -> None:
    config = GPTJConfig(n_embd=64, n_layer=2, n_head=2, n_positions=96, vocab_size=64, rotary_dim=16)
    with pytest.raises(LongContextError, match="has no LoRA support for its linear layers; Temp-LoRA runs LlamaForCausalLM"):
        create(save(tmp_path, config, "GPTJForCausalLM"), QUALITY)


def test_another_vllm_version_is_refused_but_only_with_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.31.0")
    create(additional_config={})
    with pytest.raises(LongContextError, match=r"vLLM is 0.31.0, but .* written for 0.32.0; install vllm==0.32.0"):
        create()


def parse(*flags: str) -> AsyncEngineArgs:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", BOOKLM, *flags]))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], {}),
        (["--plugin", "longctx"], {"longctx": {}}),
        (["--longctx-preset", "streaming"], {"longctx": {"preset": "streaming"}}),
        (["--longctx", '{"attention": {"n_local": 64}}'], {"longctx": {"attention": {"n_local": 64}}}),
        (
            ["--plugin", "longctx", "--longctx", '{"attention": {"n_local": 64}}', "--longctx-preset", "streaming"],
            {"longctx": {"attention": {"n_local": 64}, "preset": "streaming"}},
        ),
        (["--additional-config", '{"longctx": {"preset": "streaming"}}'], {"longctx": {"preset": "streaming"}}),
    ],
)
def test_flags_mean_the_same_as_additional_config(flags: list[str], expected: dict) -> None:
    assert parse(*flags).additional_config == expected


def test_a_config_file_means_the_same_as_flags(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("longctx:\n  preset: streaming\n  attention:\n    n_local: 64\n")
    expected = {"longctx": {"preset": "streaming", "attention": {"n_local": 64}}}
    assert parse("--config", str(file)).additional_config == expected


def test_contradicting_flags_are_refused() -> None:
    with pytest.raises(LongContextError, match="is given beside --plugin, --longctx or --longctx-preset"):
        parse("--plugin", "longctx", "--additional-config", '{"longctx": {}}')
    with pytest.raises(LongContextError, match="--longctx-preset streaming contradicts preset lm-infinite"):
        parse("--longctx-preset", "streaming", "--longctx", '{"preset": "lm-infinite"}')


def test_a_bad_flag_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--longctx", '{"attention": {"n_locl": 64}}')
    assert "unknown key 'n_locl'; did you mean 'n_local'?" in capsys.readouterr().err


def test_parsers_without_the_flags_still_work() -> None:
    namespace = argparse.Namespace(model=BOOKLM, additional_config={"a": 1})
    assert EngineArgs.from_cli_args(namespace).additional_config == {"a": 1}


@pytest.fixture(scope="module")
def longllama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """booklm with a memory: its weights, and a config in the names of LongLLaMA's checkpoints."""
    path = tmp_path_factory.mktemp("longllama")
    for file in Path(BOOKLM).iterdir():
        if file.name not in ("config.json", "longctx.json"):
            (path / file.name).symlink_to(file)
    config = json.loads(Path(BOOKLM, "config.json").read_text())
    config |= {"model_type": "longllama", "architectures": ["LongLlamaForCausalLM"], "mem_layers": [2, 4]}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("additional_config", [{}, {"longctx": {}}, {"longctx": {"attention": {"n_local": 256}}}])
def test_a_longllama_checkpoint_says_all_by_itself(additional_config: dict, longllama: Path) -> None:
    vllm_config = create(longllama, additional_config)
    config = active_config(vllm_config)
    assert config.attention.mem_layers == [2, 4]
    assert (config.attention.mem_dtype, config.attention.mem_positionals) == ("bfloat16", True)
    n_local = config.attention.n_local
    assert config.windows == SteppedWindows(n_local, n_local)  # the default of 1,024 last tokens is more than a window
    assert vllm_config.model_config.original_max_model_len == -1


def test_how_prefixes_are_hit_is_said(longllama: Path) -> None:
    """In the first line of each engine's log, and by doctor."""
    learning = {"longctx": {"preset": "temp-lora-quality"}}
    focused = {"longctx": {"attention": {"method": "focused", "last_context_length": 256}}}
    said = {
        "in steps of 32 tokens": create(),
        "in steps of 128 tokens": create(block_size=128),
        "in steps of 32 tokens; requests that learn: off": create(additional_config=learning),
        "off": create(enable_prefix_caching=False),
        "in steps of 32 tokens inside of the first window, while that is open; then in steps of 512, up to 256 tokens before "
        "the end of either prompt": create(longllama, focused),
    }
    assert [prefix_caching(active_config(c), c.cache_config) for c in said.values()] == list(said)
    with_top_k = create(additional_config={"longctx": {"attention": {"top_k": 5}}}, enable_prefix_caching=True)
    assert prefix_caching(active_config(with_top_k), with_top_k.cache_config) == "off"
    assert not with_top_k.cache_config.enable_prefix_caching


def test_lm_infinite_can_be_asked_for_on_longllama(longllama: Path) -> None:
    assert active_config(create(longllama, {"longctx": {"preset": "lm-infinite"}})).geometry == Geometry(10, 512, 512)


@pytest.mark.parametrize(
    ("attention", "kwargs", "message"),
    [
        ({"mem_layers": [2, 6]}, {}, r"attention.mem_layers = \[2, 6\], but the model has layers 0 to 5"),
        ({"mem_layers": []}, {}, r"needs memory layers, but neither attention.mem_layers nor the checkpoint's"),
        ({"n_local": 513}, {}, r"attention.n_local = 513, but the model was trained on 512 tokens; lower it"),
        ({"last_context_length": 300, "n_local": 256}, {}, r"last_context_length = 300 is more than the window"),
        ({"mem_dtype": "int8"}, {}, r"longctx.attention.mem_dtype = 'int8'"),
        (
            {"memory_limit_gib": 0.001},
            {"max_model_len": 10_000},
            r"memory_limit_gib = 0.001 holds \d+ tokens, but max_model_len",
        ),
        ({"memory_limit_gib": 1e-6}, {}, r"memory_limit_gib = 1e-06 holds 0 tokens"),
        ({"memory_limit_gib": 1.0, "mem_layers": [0, 1, 2, 3, 4, 5]}, {}, r"memory in every layer leaves nothing"),
        ({}, {"disable_hybrid_kv_cache_manager": True}, r"disable_hybrid_kv_cache_manager is set"),
    ],
)
def test_a_memory_that_cannot_work_is_refused(attention: dict, kwargs: dict, message: str, longllama: Path) -> None:
    with pytest.raises(LongContextError, match=message):
        create(longllama, {"longctx": {"attention": {"method": "focused", **attention}}}, **kwargs)


def test_a_memory_needs_layers_that_can_have_one(tmp_path: Path) -> None:
    path = save(tmp_path, BloomConfig(hidden_size=64, n_layer=2, n_head=2, seq_length=128), "BloomForCausalLM")
    with pytest.raises(LongContextError, match="none of those whose layers can have a memory"):
        create(path, {"longctx": {"attention": {"method": "focused", "mem_layers": [1]}}})


@pytest.mark.parametrize(("key", "value"), [("num_hidden_layers", 5), ("hidden_size", 320), ("vocab_size", 4097)])
def test_a_config_that_disagrees_with_its_weights_is_named(key: str, value: int, longllama: Path, tmp_path: Path) -> None:
    for file in longllama.iterdir():
        (tmp_path / file.name).symlink_to(file.resolve())
    config = json.loads((longllama / "config.json").read_text()) | {key: value}
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LongContextError, match=r"config.json says .* one of the two files belongs to another model"):
        create(tmp_path, {})
