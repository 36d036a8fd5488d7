"""What is said at start of options of Temp-LoRA that cannot work, and of what a checkpoint recommends."""

import json
import logging
import os
import stat
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from vllm.engine.arg_utils import EngineArgs

from vllm_longctx.config import AdaptationSection, LongContextConfig, LongContextError
from vllm_longctx.settings import TrainerSettings, active_settings
from vllm_longctx.startup.recommended import read_recommended

QUALITY = {"preset": "temp-lora-quality"}


def start(model: Path, adaptation: dict[str, Any], **config: Any) -> AdaptationSection:
    value = {"longctx": {**QUALITY, **config, "adaptation": adaptation}}
    vllm_config = EngineArgs(
        model=str(model), additional_config=value, skip_tokenizer_init=True, dtype="float32"
    ).create_engine_config()
    section = active_settings(vllm_config).adaptation
    assert section is not None
    return section


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    for file in tiny_llama.iterdir():
        (path / file.name).symlink_to(file)
    return path


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.WARNING, "vllm.longctx")
    return caplog


RECIPE = {
    "rank": 4,
    "alpha": 8.0,
    "dropout": 0.1,
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "adam_eps": 1e-6,
    "grad_clip": 1.0,
    "warmup_blocks": 1,
    "epochs": 3,
    "adapter_seed": 5,
    "block_tokens": 16,
    "context_tokens": 48,
    "window_tokens": 112,
    "train_context_tokens": 24,
}
THIS_MACHINE = {
    "requests": "all",
    "adapters_root": "/tmp/of-a-stranger",
    "trainer": {"address": "ipc:///tmp/of-a-stranger"},
    "slots": 1,
    "on_failure": "fail",
    "max_rank": 256,
    "max_epochs": 1000,
    "min_block_tokens": 1,
    "method": "temp_lora",
}


def test_a_checkpoint_recommends_a_recipe_and_nothing_else(
    model: Path, warnings: pytest.LogCaptureFixture
) -> None:
    document = {
        "adaptation": {**RECIPE, **THIS_MACHINE},
        "attention": {"n_local": 3},
        "serving": 1,
        "preset": "streaming",
    }
    (model / "longctx.json").write_text(json.dumps(document))
    found = start(model, {"learning_rate": 2e-3})
    assert found.model_dump(include=set(RECIPE)) == RECIPE | {"learning_rate": 2e-3}
    default = AdaptationSection()
    assert found.trainer == TrainerSettings.of(default.trainer)
    for name in ("requests", "adapters_root", "on_failure", "max_epochs"):
        assert getattr(found, name) == getattr(default, name)
    assert (found.slots, found.max_rank) == (8, 4)
    (message,) = {record.getMessage() for record in warnings.records if "longctx.json" in record.getMessage()}
    for name in (
        *(f"adaptation.{name} = " for name in THIS_MACHINE),
        "attention = ",
        "serving = 1",
        "preset = 'streaming'",
    ):
        assert name in message
    assert not any(f"adaptation.{name} = " in message for name in RECIPE)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "the whole file (JSONDecodeError"),
        ("", "the whole file (JSONDecodeError"),
        ("\x00\xff", "the whole file (JSONDecodeError"),
        ("[" * 100_000, "the whole file (RecursionError"),
        ("[1, 2]", "the whole file = [1, 2]"),
        ("null", "the whole file = None"),
        ('{"adaptation": 5}', "adaptation = 5"),
        ('{"adaptation": null}', "adaptation = None"),
        ('{"adaptation": [{"rank": 4}]}', "adaptation = [{'rank': 4}]"),
        ('{"adaptation": {"rank": "4"}}', "adaptation.rank = '4'"),
        ('{"adaptation": {"rank": 0}}', "adaptation.rank = 0"),
        ('{"adaptation": {"rank": 1000000}}', "adaptation.rank = 1000000"),
        ('{"adaptation": {"rank": null}}', "adaptation.rank = None"),
        ('{"adaptation": {"learning_rate": NaN}}', "adaptation.learning_rate = nan"),
        ('{"adaptation": {"weight_decay": Infinity}}', "adaptation.weight_decay = inf"),
        ('{"adaptation": {"epochs": 1000000}}', "adaptation.epochs = 1000000 (the limit is 8)"),
        ('{"adaptation": {"unheard_of": {"of": [1]}}}', "adaptation.unheard_of = {'of': [1]}"),
        (
            '{"adaptation": {"block_tokens": 500}}',
            "adaptation.block_tokens = 500 (adaptation.train_context_tokens + ",
        ),
        (
            '{"adaptation": {"window_tokens": 500}}',
            "adaptation.window_tokens = 500 (adaptation.window_tokens = 500, but",
        ),
        (
            '{"adaptation": {"context_tokens": 127}}',
            "adaptation.context_tokens = 127 (adaptation.context_tokens = 127 leaves",
        ),
    ],
)
def test_what_a_checkpoint_says_never_stops_an_engine(
    model: Path, warnings: pytest.LogCaptureFixture, content: str, named: str
) -> None:
    plain = start(model, {})
    (model / "longctx.json").write_text(content)
    assert start(model, {}) == plain
    assert any(
        "longctx.json" in record.getMessage() and named in record.getMessage() for record in warnings.records
    )


def test_sizes_that_are_recommended_give_way_to_a_window_that_slides(model: Path) -> None:
    (model / "longctx.json").write_text(json.dumps({"adaptation": {"window_tokens": 96, "rank": 2}}))
    value = {"attention": {"method": "lm_infinite"}, "preset": "lm-infinite"}
    assert start(model, {}, **value).rank == 2
    with pytest.raises(
        LongContextError, match=r"adaptation.window_tokens has no effect beside attention.method lm_infinite"
    ):
        start(model, {"window_tokens": 96}, **value)


def test_a_users_own_sizes_are_still_refused_beside_recommended_ones(model: Path) -> None:
    (model / "longctx.json").write_text(json.dumps({"adaptation": {"context_tokens": 32}}))
    with pytest.raises(
        LongContextError, match=r"adaptation.window_tokens = 500, but the model was trained on 128 tokens"
    ):
        start(model, {"window_tokens": 500})


def test_a_recommended_rank_keeps_to_the_users_limit(model: Path, warnings: pytest.LogCaptureFixture) -> None:
    (model / "longctx.json").write_text(json.dumps({"adaptation": {"rank": 128, "epochs": 5}}))
    found = start(model, {"max_rank": 64, "max_epochs": 4})
    assert (found.rank, found.epochs) == (64, 2)
    assert "adaptation.rank = 128 (the limit is 64)" in warnings.text


def test_a_model_known_by_its_name_recommends_by_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--org--model"
    (repository / "refs").mkdir(parents=True)
    for rank, name in enumerate(("main", "v1"), 2):
        (snapshot := repository / "snapshots" / (str(rank) * 40)).mkdir(parents=True)
        (snapshot / "longctx.json").write_text(json.dumps({"adaptation": {"rank": rank}}))
        (repository / "refs" / name).write_text(snapshot.name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert read_recommended("org/model", None) == ({"rank": 2}, [])
    assert read_recommended("org/model", "v1") == ({"rank": 3}, [])
    assert read_recommended("org/other", None) == ({}, [])
    assert read_recommended("s3://bucket/model", None) == ({}, [])


CPUS = sorted(os.sched_getaffinity(0))
THERE = f"this process may use {', '.join(map(str, CPUS))}"


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        (
            {"cpus": [CPUS[0], 100_000]},
            rf"trainer.cpus = \[{CPUS[0]}, 100000\], but {THERE}; give some of these, or leave",
        ),
        ({"cpus": []}, r"longctx.adaptation.trainer.cpus = \[\]: List should have at least 1 item"),
        (
            {"cpus": [-1]},
            r"longctx.adaptation.trainer.cpus.0 = -1: Input should be greater than or equal to 0",
        ),
        (
            {"cpus": CPUS[:1], "threads": 2},
            rf"trainer.threads = 2, but the trainer would have 1 CPUs \({THERE}\); lower threads, or give it "
            rf"more CPUs",
        ),
        ({"threads": 100_000}, rf"trainer.threads = 100000, but the trainer would have {len(CPUS)} CPUs"),
        (
            {"address": "/tmp/trainer"},
            r"trainer.address = '/tmp/trainer': only a trainer on this machine can be joined; give",
        ),
        (
            {"address": "inproc://trainer"},
            r"only a trainer on this machine can be joined; give what .* ipc:///run/user",
        ),
        (
            {"address": "ipc://" + 60 * "/a"},
            r"trainer.address = 'ipc://.*': file name too long; .*at most 107 bytes",
        ),
        (
            {"address": "ipc:///no/such/place/trainer"},
            r"there is no directory /no/such/place; give what the trainer",
        ),
        ({"address": "ipc://"}, r"trainer.address = 'ipc://': invalid argument; give"),
        (
            {"address": "tcp://127.0.0.1"},
            r"trainer.address = 'tcp://127.0.0.1': invalid argument; give .* tcp://127.0.0.1:5555",
        ),
        (
            {"address": "ipc:///tmp/x", "threads": 2},
            r"threads has no effect beside address; give it to the process",
        ),
        ({"address": "ipc:///tmp/x", "cpus": [0]}, r"cpus has no effect beside address"),
        ({"timeout_s": float("inf")}, r"trainer.timeout_s = inf: Input should be a finite number"),
        (
            {"start_timeout_s": float("nan")},
            r"trainer.start_timeout_s = nan: Input should be a finite number",
        ),
        (
            {"device": "cuda:0"},
            r"trainer.device = 'cuda:0', but torch sees no GPU; name another, or leave it out",
        ),
        (
            {"attention": "xformers"},
            r"trainer.attention = 'xformers' needs a GPU, .*; leave attention out, or set device",
        ),
    ],
)
def test_a_trainer_that_cannot_be_is_refused(model: Path, trainer: dict[str, Any], message: str) -> None:
    with pytest.raises(LongContextError, match=message):
        start(model, {"trainer": trainer})


def test_a_trainer_beside_the_engine_has_its_dtype(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        LongContextError, match=r"dtype = 'float32' is for a trainer on the CPU, but .* leave dtype out"
    ):
        start(model, {"trainer": {"device": "cuda", "dtype": "float32"}})


def test_cpus_are_those_of_this_process(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5})
    assert start(model, {"trainer": {"cpus": [5, 5], "threads": 1}}).trainer.cpus == [5, 5]
    with pytest.raises(
        LongContextError, match=r"trainer.cpus = \[4\], but this process may use 3, 5; give some of these"
    ):
        start(model, {"trainer": {"cpus": [4]}})


@pytest.mark.parametrize(("name", "what"), [("adapters_root", "adapters"), ("cache_dir", "versions")])
def test_a_directory_that_cannot_be_written_is_refused(
    model: Path, tmp_path: Path, name: str, what: str
) -> None:
    (tmp_path / "file").touch()
    for root in (
        tmp_path / "file",
        tmp_path / "file" / "below",
        Path("/proc/adapters"),
        tmp_path / ("x" * 300),
    ):
        with pytest.raises(
            LongContextError,
            match=rf"adaptation.{name} = '{root}': {what} cannot be written there \(",
        ):
            start(model, {name: str(root)})
    with pytest.raises(
        LongContextError,
        match=rf"longctx.adaptation.{name} = '': String should have at least 1 character",
    ):
        LongContextConfig.parse({"adaptation": {name: ""}})


def test_a_cache_on_disk_has_a_place_of_its_own(model: Path, tmp_path: Path) -> None:
    found = start(model, {"cache_dir": str(tmp_path / "versions"), "cache_dir_gib": 0.5})
    assert (found.cache_dir, found.cache_dir_gib) == (str(tmp_path / "versions"), 0.5)
    assert (tmp_path / "versions").stat().st_mode & 0o777 == 0o700
    both = {"cache_dir": str(tmp_path / "versions"), "adapters_root": f"{tmp_path}/versions/"}
    with pytest.raises(LongContextError, match=r"is adaptation\.adapters_root; give another one"):
        start(model, both)
    with pytest.raises(LongContextError, match=r"cache_dir_gib = 0\.5 has no effect without cache_dir"):
        LongContextConfig.parse({"adaptation": {"cache_dir_gib": 0.5}})
    with pytest.raises(LongContextError, match="cache_dir = 'x' has no effect with cache_gib = 0"):
        LongContextConfig.parse({"adaptation": {"cache_dir": "x", "cache_gib": 0}})


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_root_of_somebody_elses_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(LongContextError, match=r"adapters cannot be written there \(Permission denied\)"):
        start(model, {"adapters_root": str(tmp_path / "theirs")})


def test_a_root_is_made_and_is_the_same_in_every_process(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert start(model, {"adapters_root": "a/b"}).adapters_root == str(tmp_path / "a/b")
    assert start(model, {"adapters_root": "~/adapters"}).adapters_root == str(tmp_path / "home/adapters")
    assert list((tmp_path / "home/adapters").iterdir()) == [] == list((tmp_path / "a/b").iterdir())
