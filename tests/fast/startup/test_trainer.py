"""Where the trainer trains and what it needs there.

No GPU is touched: what torch and the driver would say is put in place.
"""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, MistralForCausalLM
from vllm.platforms import current_platform
from vllm.v1.worker.cpu_worker import CPUWorker

from tests.support.engine_args import create
from vllm_longctx import BOOKLM
from vllm_longctx.config import AdaptationSection, LongContextConfig, LongContextError, TrainerSection
from vllm_longctx.cpu.worker import LongContextWorker
from vllm_longctx.settings import Adaptation, TrainerSettings, active_settings
from vllm_longctx.startup.trainer import check_trainer
from vllm_longctx.temp_lora import client
from vllm_longctx.temp_lora import training_memory as device
from vllm_longctx.temp_lora.base_model import trainer_dtype
from vllm_longctx.temp_lora.messages import Options, Recipe
from vllm_longctx.temp_lora.training_memory import Shape
from vllm_longctx.trainer import sidecar
from vllm_longctx.trainer.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA_2_7B = LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    def have(number: int) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
        monkeypatch.setattr(current_platform, "device_type", "cuda" if number else "cpu")

    return have


def test_the_engines_own_device_is_the_default(gpus):
    def found(**given) -> tuple[str, bool]:
        trainer = TrainerSettings.of(TrainerSection(**given))
        return trainer.device, trainer.recompute

    assert found() == ("cpu", False)
    gpus(2)
    assert found() == found(device="cuda") == ("cuda:0", True)
    assert found(device="cuda:1") == ("cuda:1", True)
    assert found(recompute=False) == ("cuda:0", False) and found(device="cpu") == ("cpu", False)


@pytest.mark.parametrize(
    ("number", "trainer", "reason"),
    [
        (0, {"device": "cuda"}, "device = 'cuda', but torch sees no GPU; name another, or leave it out"),
        (2, {"device": "cuda:2"}, "device = 'cuda:2', but torch sees 2 GPUs, cuda:0 to cuda:1; name another"),
        (
            2,
            {"device": "cpu", "attention": "xformers"},
            "'xformers' needs a GPU, but adaptation.trainer.device is cpu",
        ),
        (
            2,
            {"attention": "xformers"},
            "xformers is not installed here; install it .*, or leave attention out",
        ),
    ],
)
def test_what_is_not_there_is_refused(
    gpus, monkeypatch: pytest.MonkeyPatch, number: int, trainer: dict, reason: str
):
    gpus(number)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LongContextError, match=reason):
        check_trainer(TrainerSection(**trainer))
    check_trainer(TrainerSection())


@pytest.mark.parametrize(
    ("trainer", "reason"),
    [
        ({"device": "gpu"}, r"adaptation.trainer.device = 'gpu': String should match pattern .*cpu\|cuda"),
        (
            {"attention": "flash"},
            "adaptation.trainer.attention = 'flash': Input should be 'sdpa' or 'xformers'",
        ),
        ({"device": "cpu", "address": "ipc:///x"}, "device has no effect beside address"),
    ],
)
def test_what_nobody_has_is_refused(trainer: dict, reason: str):
    with pytest.raises(LongContextError, match=reason):
        LongContextConfig.parse({"adaptation": {"trainer": trainer}})


def test_a_trainer_that_runs_elsewhere_is_still_one_when_written_out():
    config = LongContextConfig.parse({"adaptation": {"trainer": {"address": "ipc:///x"}}})
    assert LongContextConfig.parse(config.dump()) == config


def settings(**given) -> Adaptation:
    sizes = {"rank": 4, "max_rank": 4, "slots": 2, "block_tokens": 32, "train_context_tokens": 31}
    return Adaptation.of(AdaptationSection(**{**sizes, **given}))


def test_adapters_are_counted_as_they_are(tiny_llama: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    shape = Shape.of(model)
    assert shape.adapted_features == sum(map(sum, Trainer(model).modules.values()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("recompute", [False, True])
def test_activations_are_about_what_autograd_keeps(tiny_llama: Path, dtype: torch.dtype, recompute: bool):
    """Counted where autograd saves them.

    `recompute` keeps a layer's while it is computed again, which this does not see.
    """
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=dtype)
    shape = Shape.of(model)
    trainer, tokens = Trainer(model, recompute), 64
    trainer.begin(1, Recipe(rank=4, dropout=0.1))
    trainer._model.set_adapter("owner-1")
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept.setdefault(x.untyped_storage().data_ptr(), x)
        return x

    ids = torch.arange(tokens)[None]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    assert hidden.requires_grad
    measured = sum(x.untyped_storage().nbytes() for pointer, x in kept.items() if pointer not in weights)
    layer = shape.layers[0]
    wider_masks = 3 * layer.adapter_inputs  # a dropout mask has 4 bytes on the CPU, 1 on a GPU
    per_layer = shape.hidden * shape.itemsize if recompute else layer.activation_bytes + wider_masks
    last_norm = 4 * shape.hidden
    assert measured < 1.05 * tokens * (len(shape.layers) * per_layer + last_norm) < 1.3 * measured


def test_what_training_a_7b_model_needs():
    """Rank 64 on all linear layers is 160M values, so 1.8 GiB a stream with AdamW's; 4K tokens keep 47 GiB,
    or 2 and 1.2.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LLAMA_2_7B, dtype=torch.bfloat16)
    shape, gib = Shape.of(model), 2**30
    assert 64 * shape.adapted_features == 159907840  # peft's count of trainable parameters

    def need(slots: int, recompute: bool) -> float:
        sizes = {"max_rank": 64, "block_tokens": 1024, "train_context_tokens": 3071, "cache_gib": 0}
        one = settings(**sizes, slots=slots, trainer=TrainerSection(recompute=recompute))
        return shape.training_bytes(one) / gib

    recomputed, kept, eight = need(1, True), need(1, False), need(8, True)
    assert 7 < recomputed < 9.5
    assert 40 < kept < 50
    assert eight - recomputed == pytest.approx(7 * 3 * 4 * 159907840 / gib)


def test_too_little_memory_is_named_at_the_start(monkeypatch: pytest.MonkeyPatch):
    options = Options(address="", model=str(BOOKLM), dtype="float32", device="cuda:1")
    need = client.weight_bytes(str(BOOKLM), torch.float32) + 2**30
    monkeypatch.setattr(client, "free_bytes", lambda where: need if where == torch.device("cuda:1") else 0)
    client.check_memory(options, training(2**30))
    with pytest.raises(
        LongContextError,
        match=r"on cuda:1 \(.*, 1\.00 to train\).*recompute true, lower adaptation.block_tokens = 32, "
        r"adaptation.train_context_tokens = 31, adaptation.slots = 2 or adaptation.rank = 4, "
        r"lower gpu_memory_utilization, or name another GPU",
    ):
        client.check_memory(options, training(2**30 + 1))


def training(size: int) -> client.TrainingNeed:
    """A need of so many bytes, by the settings of `settings`."""
    return client.TrainingNeed(size, client.training_need(create(additional_config={}), settings()).sizes)


@pytest.mark.parametrize("recompute", [False, True])
def test_training_is_counted_on_the_cpu_too(monkeypatch: pytest.MonkeyPatch, recompute: bool):
    options = Options(address="", model=str(BOOKLM), dtype="float32", recompute=recompute)
    need = client.weight_bytes(str(BOOKLM), torch.float32) + 5 * 2**30
    monkeypatch.setattr(device, "free_host_bytes", lambda: need)
    client.check_memory(options, training(5 * 2**30))
    less = (
        "lower adaptation.block_tokens = 32" if recompute else "set adaptation.trainer.recompute true, lower"
    )
    with pytest.raises(
        LongContextError,
        match=rf"needs 5\.02 GiB on the host \(0\.02 for .*, 5\.00 to train\), but only 5\.02 GiB are free "
        rf"there; {less}.* or adaptation.rank = 4, give the KV cache less \(VLLM_CPU_KVCACHE_SPACE, .*\), or",
    ):
        client.check_memory(options, training(5 * 2**30 + 1))


def test_the_cpus_automatic_kv_cache_leaves_room_for_the_trainer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    config = create(additional_config={"longctx": {"preset": "temp-lora-quality"}})
    need = client.trainer_bytes(config, torch.device("cpu"))
    adaptation = active_settings(config).temp_lora
    weights = client.weight_bytes(str(BOOKLM), trainer_dtype(config.model_config, adaptation.trainer))
    assert need == weights + client.training_need(config, adaptation).bytes
    worker = object.__new__(LongContextWorker)
    worker.vllm_config, worker.cache_config = config, config.cache_config
    worker.parallel_config, worker.device = config.parallel_config, torch.device("cpu")
    worker.settings = active_settings(config)
    left = need + 1000
    monkeypatch.setattr(CPUWorker, "determine_available_memory", lambda self: left)
    assert worker.determine_available_memory() == 1000
    left = need
    with pytest.raises(
        LongContextError, match=r"the trainer needs .* beside each worker, .* lower adaptation"
    ):
        worker.determine_available_memory()
    config.parallel_config.world_size = 2
    assert worker.determine_available_memory() == need - need // 2
    config.cache_config.kv_cache_memory_bytes = left = 5000
    assert worker.determine_available_memory() == 5000


def test_what_training_needs_is_that_of_the_models_shape_with_the_settings_that_decide_it():
    config = create(additional_config={}, dtype="float32")
    shape = Shape.of(AutoModelForCausalLM.from_pretrained(BOOKLM, dtype=torch.float32))
    for more, named in ((settings(), "rank = 4"), (settings(max_rank=8), "max_rank = 8")):
        need = client.training_need(config, more)
        assert need.bytes == shape.training_bytes(more)
        assert need.sizes.endswith(f"adaptation.slots = 2 or adaptation.{named}")


def test_what_is_remembered_is_counted_where_it_is():
    """In host memory: beside a trainer on the CPU it is the trainer's, beside one on a GPU it is not."""
    shape = Shape.of(AutoModelForCausalLM.from_pretrained(BOOKLM))
    kept, none = settings(cache_gib=0.5), settings(cache_gib=0)
    assert shape.cache_bytes(kept) == 2**29 and shape.cache_bytes(none) == 0
    assert shape.training_bytes(kept) - shape.training_bytes(none) == 2**29
    version = 3 * 4 * 4 * shape.adapted_features
    assert 32 * version < shape.cache_bytes(settings()) < 33 * version + 2**22
    on_gpu = [settings(trainer=TrainerSection(device="cuda"), cache_gib=gib) for gib in (0.5, 0)]
    assert shape.training_bytes(on_gpu[0]) == shape.training_bytes(on_gpu[1])
    need = client.training_need(create(additional_config={}), settings(cache_gib=1.5))
    assert need.cache_bytes == 3 * 2**29 and need.sizes.startswith("adaptation.cache_gib = 1.5, ")


def test_free_memory_is_the_drivers(monkeypatch: pytest.MonkeyPatch):
    class Nvml:
        open = 0

        def nvmlInit(self):
            self.open += 1

        def nvmlShutdown(self):
            self.open -= 1

        def nvmlDeviceGetHandleByIndex(self, index):
            return index

        def nvmlDeviceGetMemoryInfo(self, handle):
            assert self.open
            return type("Memory", (), {"free": 1000 + handle})

    nvml: Any = Nvml()
    monkeypatch.setattr(device, "import_pynvml", lambda: nvml)
    monkeypatch.setattr(current_platform, "visible_device_id_to_physical_device_id", lambda index: index + 4)
    assert device.free_bytes(torch.device("cuda:1")) == 1005 and not nvml.open
    nvml.NVMLError, nvml.nvmlInit = LookupError, {}.popitem  # it raises: KeyError is a LookupError
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda where: (77, 99))
    assert device.free_bytes(torch.device("cuda:1")) == 77


class Window:
    """xformers' biases, as far as they are used, as the mask [tokens, tokens] that they stand for."""

    def __init__(self, size: int | None = None):
        self.size = size

    @classmethod
    def from_seqlens(cls, seqlens: list[int]) -> "Window":
        return cls(*seqlens)

    def make_local_attention(self, size: int) -> "Window":
        return Window(size)

    def mask(self, tokens: int) -> torch.Tensor:
        mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        return mask if self.size is None else mask.triu(1 - self.size)


def attend(query, key, value, attn_bias, p, scale):
    """xformers' `memory_efficient_attention`: [1, tokens, heads, head_size], as many KV heads as query
    heads.
    """
    assert query.shape == key.shape == value.shape and p == 0
    attended.append(attn_bias.size)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    mask = attn_bias.mask(query.shape[1])
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(
        1, 2
    )


attended: list[int | None] = []


@pytest.mark.parametrize(("window", "tokens"), [(None, 40), (16, 40), (40, 40)])
def test_xformers_is_asked_for_the_same_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int | None, tokens: int
):
    ops = SimpleNamespace(memory_efficient_attention=attend, LowerTriangularMask=Window)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    monkeypatch.setitem(
        sys.modules, "xformers.ops.fmha.attn_bias", SimpleNamespace(BlockDiagonalCausalMask=Window)
    )
    attended.clear()
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MistralConfig(vocab_size=64, num_hidden_layers=2, sliding_window=window, **sizes)
    MistralForCausalLM(config).save_pretrained(tmp_path)
    runs = []
    for name in ("sdpa", "xformers"):
        options = Options(address="", model=str(tmp_path), dtype="float32", attention=name)
        trainer = sidecar.make_sidecar(options, None)._trainer
        trainer.begin(1, Recipe(rank=4, learning_rate=1e-2, warmup_blocks=0))
        losses = trainer.train(1, 1, [3 * i % 64 for i in range(tokens)], 16)
        runs.append((losses, trainer.weights(1)))
    assert attended == 2 * 2 * [None if window in (None, tokens) else window]  # layers, epochs
    assert runs[0][0] == pytest.approx(runs[1][0], abs=1e-5)
    for name, pair in runs[0][1].items():
        torch.testing.assert_close(runs[1][1][name], pair, rtol=1e-4, atol=1e-5)
