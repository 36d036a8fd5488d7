"""What the plugin makes of engine arguments, without starting an engine."""

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import pytest
import vllm
from transformers import (
    AutoConfig,
    BloomConfig,
    GPTJConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MptConfig,
)
from vllm.config import CompilationMode, WeightTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.support.engine_args import TINY, create, save
from vllm_longctx import BOOKLM
from vllm_longctx.config import PRESETS, LongContextError
from vllm_longctx.engine.kv_cache import prefix_caching
from vllm_longctx.engine.lora import LoRAConfigWithSlots, with_slots
from vllm_longctx.geometry import Geometry, SteppedWindows
from vllm_longctx.settings import active_settings
from vllm_longctx.startup.engine_args import DEFAULT_MAX_MODEL_LEN
from vllm_longctx.temp_lora.base_model import resolved_config
from vllm_longctx.temp_lora.shared_weights import model_class

QUALITY = {"longctx": {"preset": "temp-lora-quality"}}


def test_it_sets_what_vllm_needs() -> None:
    config = create()
    assert config.parallel_config.worker_cls == "vllm_longctx.cpu.worker.LongContextWorker"
    assert config.cache_config.block_size == 32
    assert config.model_config.max_model_len == 1 << 20
    assert active_settings(config).geometry == Geometry(10, 512, 512)


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


@pytest.mark.parametrize(
    "additional_config", [{}, {"other": 1}, {"longctx": {"attention": {"method": "none"}}}]
)
def test_without_a_method_nothing_is_changed(additional_config: dict) -> None:
    config = create(additional_config=additional_config)
    assert config.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"
    assert config.model_config.max_model_len == 512
    assert config.additional_config == additional_config


def test_the_configuration_enters_the_compile_cache_hash() -> None:
    assert (
        create().compute_hash()
        != create(additional_config={"longctx": {"preset": "streaming"}}).compute_hash()
    )


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"additional_config": {"longctx": {"prest": "x"}}}, r"unknown key 'prest'; did you mean 'preset'"),
        (
            {"additional_config": {"longctx": {"attention": {"n_local": 1024}}}},
            r"n_local = 1024, but .* 512 tokens",
        ),
        (
            {"num_gpu_blocks_override": 20},
            r"num_gpu_blocks_override = 20 gives 20 blocks, but one request holds up to",
        ),
        (
            {"kv_cache_memory_bytes": 1_000_000},
            r"the KV cache of 1000000 bytes .* gives 10 blocks, but one request",
        ),
        ({"additional_config": '{"longctx": {}}'}, r"additional_config = '.*' is a string; give a dict"),
        (
            {"worker_cls": "my.Worker"},
            r"worker_cls = 'my.Worker', but longctx needs its own; leave worker_cls out",
        ),
        ({"block_size": 48}, r"block_size = 48; give a multiple of 32"),
        ({"kv_cache_dtype": "fp8"}, r"kv_cache_dtype = 'fp8'; leave it at 'auto'"),
        ({"runner": "pooling"}, r"runner = 'pooling'; leave it out: longctx is for models that write"),
        ({"runner": "pooling", "additional_config": QUALITY}, r"runner = 'pooling'; leave it out"),
        ({"convert": "embed"}, r"runner = 'pooling'; leave it out"),
        ({"kv_offloading_size": 1.0}, r"kv_offloading_size = 1.0; leave it out"),
        ({"kv_cache_dtype_skip_layers": ["0"]}, r"kv_cache_dtype_skip_layers = \['0'\]; leave it out"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(
    kwargs: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    with pytest.raises(LongContextError, match=message):
        create(**kwargs)


def test_a_front_end_that_passes_by_the_checks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    create()  # a program's engine has no front end
    with pytest.raises(
        LongContextError, match=r"the Rust front end is chosen, .* unset VLLM_USE_RUST_FRONTEND"
    ):
        create(_api_process_rank=-1, _api_process_count=1)
    create(additional_config={}, _api_process_rank=-1, _api_process_count=1)


def test_the_smallest_pool_that_is_accepted() -> None:
    config = {"longctx": {"attention": {"n_local": 64, "n_global": 16}}}
    create(
        additional_config=config, num_gpu_blocks_override=9, max_num_batched_tokens=128, max_model_len=100_000
    )
    with pytest.raises(LongContextError, match="give at least 9 blocks"):
        create(additional_config=config, num_gpu_blocks_override=8, max_num_batched_tokens=128)


@pytest.mark.parametrize(
    ("config", "architecture", "message"),
    [
        (
            MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=64),
            "MambaForCausalLM",
            "it has Mamba or linear-attention layers",
        ),
        (
            AutoConfig.for_model(
                "deepseek_v2", **TINY, num_key_value_heads=2, kv_lora_rank=16, q_lora_rank=None,
                qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16, intermediate_size=64,
                moe_intermediate_size=32, first_k_dense_replace=2,
            ),
            "DeepseekV2ForCausalLM",
            "it has MLA layers",
        ),
        (
            BloomConfig(hidden_size=64, n_layer=2, n_head=2, vocab_size=64),
            "BloomForCausalLM",
            r"does not say the trained length \(.*\); give it, for example --hf-overrides "
            r"'\{\"seq_length\": 2048\}'",
        ),
        (
            LlamaConfig(**{**TINY, "hidden_size": 48}, intermediate_size=64),
            "LlamaForCausalLM",
            "it has heads of 24 elements; vLLM's attention on the CPU takes 32, 64,",
        ),
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
        (
            LlamaConfig(**TINY, intermediate_size=64, max_position_embeddings=64, rope_parameters=YARN),
            "LlamaForCausalLM",
            256,
        ),
        (
            GPTJConfig(n_embd=64, n_layer=2, n_head=2, n_positions=96, vocab_size=64, rotary_dim=16),
            "GPTJForCausalLM",
            96,
        ),
        (
            BloomConfig(hidden_size=64, n_layer=2, n_head=2, vocab_size=64, seq_length=80),
            "BloomForCausalLM",
            80,
        ),
        (MptConfig(d_model=64, n_layers=2, n_heads=2, vocab_size=64, max_seq_len=112), "MptForCausalLM", 112),
    ],
)
def test_the_trained_length_is_read_from_every_family(
    config: Any, architecture: str, length: int, tmp_path: Path
) -> None:
    resolved = create(save(tmp_path, config, architecture))
    assert active_settings(resolved).geometry == Geometry(10, length, length)
    assert resolved.model_config.max_model_len == 1 << 20


def test_temp_lora_asks_vllm_for_its_slots() -> None:
    config = create(additional_config=QUALITY, max_num_seqs=4)
    adaptation = active_settings(config).adaptation
    assert adaptation is not None and adaptation.slots == 4
    assert (adaptation.rank, adaptation.learning_rate) == (8, 5e-4)  # what booklm recommends
    assert config.lora_config is None and config.compilation_config.mode == CompilationMode.NONE
    assert config.scheduler_config.get_scheduler_cls().__name__ == "TempLoraScheduler"


@pytest.mark.parametrize(
    "targets",
    [None, ["q_proj", "lm_head"]],
)
def test_workers_have_places_for_slots_behind_the_users_adapters(targets: Any) -> None:
    plain = create(additional_config=QUALITY, max_num_seqs=4)
    layers = with_slots(plain).lora_config
    assert layers is not None and plain.lora_config is None
    assert (layers.max_loras, layers.max_lora_rank, layers.target_modules) == (4, 8, [])
    users = {
        "enable_lora": True,
        "max_loras": 3,
        "max_cpu_loras": 9,
        "max_lora_rank": 64,
        "lora_target_modules": targets,
    }
    both = create(additional_config=QUALITY, max_num_seqs=4, **users)
    assert both.lora_config == create(additional_config={}, **users).lora_config
    layers = with_slots(both).lora_config
    assert isinstance(layers, LoRAConfigWithSlots) and layers.users is both.lora_config
    assert (layers.max_loras, layers.max_cpu_loras, layers.max_lora_rank, layers.target_modules) == (
        7,
        9,
        64,
        targets,
    )
    without = create(max_num_seqs=4, **users)
    assert with_slots(without) is without


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    "users", [{}, {"enable_lora": True, "max_loras": 2, "max_num_seqs": 16, "hf_overrides": {"a": 1}}]
)
def test_the_same_arguments_make_the_same_engine(preset: str, users: dict[str, Any]) -> None:
    """Of today's code: each time with a preset's slots more, and with what we had set as if the user had."""
    args = EngineArgs(model=str(BOOKLM), additional_config={"longctx": {"preset": preset}}, **users)
    given = copy.deepcopy(vars(args))
    made = [args.create_engine_config() for _ in range(3)]
    for config in made:
        config.instance_id = made[0].instance_id
    assert repr(made[1]) == repr(made[0]) == repr(made[2])
    for config in made[1:]:
        for name, value in vars(made[0]).items():
            assert repr(vars(config)[name]) == repr(value), name
    stock = EngineArgs(model=str(BOOKLM), additional_config={"longctx": {"preset": preset}}, **users)
    ours = {name for name, value in vars(args).items() if repr(value) != repr(given[name])}
    create_engine_config = EngineArgs.create_engine_config.__wrapped__
    stock.additional_config = {}
    create_engine_config(stock)
    of_vllm = {name for name, value in vars(stock).items() if repr(value) != repr(given[name])} - {
        "additional_config"
    }
    assert ours == of_vllm


def test_arguments_that_are_refused_are_left_as_they_were() -> None:
    args = EngineArgs(model=str(BOOKLM), additional_config=QUALITY, num_gpu_blocks_override=3)
    ours = (
        "worker_cls",
        "scheduler_cls",
        "hf_overrides",
        "block_size",
        "max_model_len",
        "enable_lora",
        "additional_config",
    )
    given = copy.deepcopy({name: getattr(args, name) for name in ours})
    with pytest.raises(LongContextError):
        args.create_engine_config()
    assert {name: getattr(args, name) for name in ours} == given


def test_what_the_user_says_goes_before_what_a_checkpoint_recommends() -> None:
    value = {"longctx": {"preset": "temp-lora-quality", "adaptation": {"rank": 4, "slots": 2}}}
    adaptation = active_settings(create(additional_config=value)).adaptation
    assert adaptation is not None
    assert (adaptation.rank, adaptation.learning_rate, adaptation.slots) == (4, 5e-4, 2)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"max_num_seqs": 2, "slots": 3},
            "adaptation.slots = 3, but max_num_seqs = 2 requests run at once; lower slots",
        ),
        (
            {"scheduling_policy": "priority"},
            "scheduling_policy = 'priority' may preempt a request that adapts",
        ),
        (
            {"num_gpu_blocks_override": 17},
            "17 blocks, but one request holds up to 17 .* give at least 18 blocks",
        ),
        (
            {"distributed_executor_backend": "external_launcher"},
            "distributed_executor_backend = 'external_launcher': the trainer",
        ),
        (
            {"weight_transfer_config": WeightTransferConfig(backend="ipc")},
            "weight_transfer_config is set, but the trainer keeps",
        ),
        (
            {"cpu_offload_gb": 1},
            "weights are offloaded .cpu_offload_gb = 1.0, offload_group_size = 0., which the trainer",
        ),
    ],
)
def test_settings_that_do_not_go_with_temp_lora_are_refused(kwargs: dict[str, Any], message: str) -> None:
    slots = {"slots": kwargs.pop("slots")} if "slots" in kwargs else {}
    value = {"longctx": {"preset": "temp-lora-quality", "adaptation": slots}}
    with pytest.raises(LongContextError, match=message):
        create(additional_config=value, **kwargs)


def test_a_model_whose_layers_take_no_lora_is_refused(tmp_path: Path) -> None:
    config = GPTJConfig(n_embd=64, n_layer=2, n_head=2, n_positions=96, vocab_size=64, rotary_dim=16)
    with pytest.raises(
        LongContextError, match="has no LoRA support in vLLM \\(GPTJForCausalLM\\); leave adaptation out"
    ):
        create(save(tmp_path, config, "GPTJForCausalLM"), QUALITY)


def test_another_vllm_version_is_refused_but_only_with_a_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.31.0")
    create(additional_config={})
    with pytest.raises(LongContextError, match=r"vLLM is 0.31.0, but .* install vllm==0.33.0"):
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
            [
                "--plugin",
                "longctx",
                "--longctx",
                '{"attention": {"n_local": 64}}',
                "--longctx-preset",
                "streaming",
            ],
            {"longctx": {"attention": {"n_local": 64}, "preset": "streaming"}},
        ),
        (
            ["--additional-config", '{"longctx": {"preset": "streaming"}}'],
            {"longctx": {"preset": "streaming"}},
        ),
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


@pytest.mark.parametrize(
    "additional_config", [{}, {"longctx": {}}, {"longctx": {"attention": {"n_local": 256}}}]
)
def test_a_longllama_checkpoint_says_all_by_itself(additional_config: dict, longllama: Path) -> None:
    vllm_config = create(longllama, additional_config)
    config = active_settings(vllm_config)
    assert config.attention.mem_layers == [2, 4]
    assert (config.attention.mem_dtype, config.attention.mem_positionals) == ("bfloat16", True)
    n_local = config.attention.n_local
    assert config.memory.windows == SteppedWindows(
        n_local, n_local
    )  # the default of 1,024 last tokens is more than a window
    assert vllm_config.model_config.original_max_model_len == -1


@pytest.mark.parametrize("said", [{"mem_layers": []}, {}])
def test_a_longllama_checkpoint_without_memory_layers_has_windows_only(
    said: dict, longllama: Path, tmp_path: Path
) -> None:
    """As in the official code. A request keeps two windows at the most, however long its text."""
    for file in longllama.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((longllama / "config.json").read_text())
    del config["mem_layers"]
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config | said))
    vllm_config = create(tmp_path, {}, num_gpu_blocks_override=34)
    settings = active_settings(vllm_config)
    assert (settings.mode.name, settings.attention.lookup) == ("windows", None)
    assert vllm_config.model_config.max_model_len == DEFAULT_MAX_MODEL_LEN
    assert "steps of 512, up to 512 tokens before the end of the prompt" in prefix_caching(
        settings, vllm_config.cache_config
    )
    with pytest.raises(LongContextError, match="gives 33 blocks, but one request holds up to 33 "):
        create(tmp_path, {}, num_gpu_blocks_override=33)


def test_a_longllama_checkpoint_may_learn(longllama: Path) -> None:
    """Transformers has no class of its name."""
    vllm_config = create(longllama, {"longctx": {"attention": {"method": "focused"}, "adaptation": {}}})
    assert active_settings(vllm_config).mode.name == "temp-lora over memory"
    config = resolved_config(vllm_config.model_config)
    assert model_class(config).config_class.from_dict(config).num_hidden_layers == 6


def test_how_prefixes_are_hit_is_said(longllama: Path) -> None:
    """In the first line of each engine's log, and by doctor."""
    learning = {"longctx": {"preset": "temp-lora-quality"}}
    forgetting = {"longctx": {"preset": "temp-lora-quality", "adaptation": {"cache_gib": 0}}}
    focused = {"longctx": {"attention": {"method": "focused", "last_context_length": 256}}}
    said = {
        "in steps of 32 tokens": create(),
        "in steps of 128 tokens": create(block_size=128),
        "in steps of 32 tokens; requests that learn: with the same versions only": create(
            additional_config=learning
        ),
        "in steps of 32 tokens; requests that learn: off": create(additional_config=forgetting),
        "off": create(enable_prefix_caching=False),
        "in steps of 32 tokens inside of the first window, while that is open; then in steps of 512, up to "
        "256 tokens before "
        "the end of either prompt": create(longllama, focused),
    }
    assert [prefix_caching(active_settings(c), c.cache_config) for c in said.values()] == list(said)
    with_top_k = create(
        additional_config={"longctx": {"attention": {"top_k": 5}}}, enable_prefix_caching=True
    )
    assert prefix_caching(active_settings(with_top_k), with_top_k.cache_config) == "off"
    assert not with_top_k.cache_config.enable_prefix_caching


def test_lm_infinite_can_be_asked_for_on_longllama(longllama: Path) -> None:
    assert active_settings(create(longllama, {"longctx": {"preset": "lm-infinite"}})).geometry == Geometry(
        10, 512, 512
    )


@pytest.mark.parametrize(
    ("attention", "kwargs", "message"),
    [
        ({"mem_layers": [2, 6]}, {}, r"attention.mem_layers = \[2, 6\], but the model has layers 0 to 5"),
        (
            {"mem_layers": [], "lookup": "top_k", "top_k": 5},
            {},
            r"attention.lookup has no effect without memory layers, and mem_layers is \[\]; leave lookup out",
        ),
        ({"n_local": 513}, {}, r"attention.n_local = 513, but the model was trained on 512 tokens; lower it"),
        (
            {"last_context_length": 300, "n_local": 256},
            {},
            r"last_context_length = 300 is more than the window",
        ),
        ({"mem_dtype": "int8"}, {}, r"longctx.attention.mem_dtype = 'int8'"),
        (
            {"memory_limit_gib": 0.001},
            {"max_model_len": 10_000},
            r"memory_limit_gib = 0.001 holds \d+ tokens, but max_model_len",
        ),
        ({"memory_limit_gib": 1e-6}, {}, r"memory_limit_gib = 1e-06 holds 0 tokens"),
        (
            {"memory_limit_gib": 1.0, "mem_layers": [0, 1, 2, 3, 4, 5]},
            {},
            r"memory in every layer leaves nothing",
        ),
        ({}, {"disable_hybrid_kv_cache_manager": True}, r"disable_hybrid_kv_cache_manager is set"),
    ],
)
def test_a_memory_that_cannot_work_is_refused(
    attention: dict, kwargs: dict, message: str, longllama: Path
) -> None:
    with pytest.raises(LongContextError, match=message):
        create(longllama, {"longctx": {"attention": {"method": "focused", **attention}}}, **kwargs)


def test_a_memory_needs_layers_that_can_have_one(tmp_path: Path) -> None:
    path = save(
        tmp_path, BloomConfig(hidden_size=64, n_layer=2, n_head=2, seq_length=128), "BloomForCausalLM"
    )
    with pytest.raises(LongContextError, match="has ALiBi, by which no key looks as if it were elsewhere"):
        create(path, {"longctx": {"attention": {"method": "focused", "mem_layers": [1]}}})


@pytest.mark.parametrize(
    ("key", "value"), [("num_hidden_layers", 5), ("hidden_size", 320), ("vocab_size", 4097)]
)
def test_a_config_that_disagrees_with_its_weights_is_named(
    key: str, value: int, longllama: Path, tmp_path: Path
) -> None:
    for file in longllama.iterdir():
        (tmp_path / file.name).symlink_to(file.resolve())
    config = json.loads((longllama / "config.json").read_text()) | {key: value}
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        LongContextError, match=r"config.json says .* one of the two files belongs to another model"
    ):
        create(tmp_path, {})
