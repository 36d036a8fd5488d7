"""The engine's memory in the trainer.

Without a GPU: CPU tensors stand for GPU ones, and a table for CUDA IPC's handles.
"""

import inspect
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq
from torch import nn
from torch.multiprocessing import reductions
from transformers import Gemma2Config, Gemma3TextConfig, PreTrainedModel
from vllm.model_executor.models import ModelRegistry

from tests.support.shared_model import CONFIGS, SIZES, Engine, load, save
from vllm_longctx.temp_lora import messages as m
from vllm_longctx.temp_lora import shared_weights as shared
from vllm_longctx.temp_lora.linear_layers import linear_layers
from vllm_longctx.temp_lora.messages import Recipe
from vllm_longctx.temp_lora.slots import Slots
from vllm_longctx.trainer import sidecar
from vllm_longctx.trainer.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.arange(40)[None]
RECIPE = Recipe(rank=4, learning_rate=1e-2, warmup_blocks=0, weight_decay=0.1)


def rebuilt(path: Path, dtype: torch.dtype, engine: nn.Module) -> PreTrainedModel:
    name = str(dtype).removeprefix("torch.")
    return shared.fill(shared.skeleton(str(path), name, "sdpa"), shared.engine_weights(engine))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_rebuilt_model_is_the_original_in_the_engines_memory(
    tmp_path: Path, config: Any, dtype: torch.dtype
):
    original = load(save(tmp_path, config), dtype)
    engine = Engine(original)
    model = rebuilt(tmp_path, dtype, engine)
    assert torch.equal(model(IDS).logits, original(IDS).logits)
    theirs = {p.untyped_storage().data_ptr() for p in engine.parameters()}
    assert {p.untyped_storage().data_ptr() for p in model.parameters()} == theirs
    assert {b.dtype for b in model.buffers()} == {b.dtype for b in original.buffers()}
    assert model.name_or_path == original.name_or_path


def test_it_trains_alike_and_leaves_the_engines_weights(tmp_path: Path):
    original = load(save(tmp_path, CONFIGS["qwen3"]), torch.float32)
    engine = Engine(original)
    before = {name: p.clone() for name, p in engine.named_parameters()}
    runs = []
    for trainer in (Trainer(original), Trainer(rebuilt(tmp_path, torch.float32, engine), recompute=True)):
        trainer.begin(1, RECIPE)
        runs.append((trainer.train(1, 1, list(range(40)), 16), trainer.weights(1)))
    assert runs[0][0] == runs[1][0]
    assert all(
        torch.equal(x, y)
        for name in runs[0][1]
        for x, y in zip(runs[0][1][name], runs[1][1][name], strict=True)
    )
    assert all(torch.equal(p[:100], before[name][:100]) for name, p in engine.named_parameters())


@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]
)
def test_vllm_fuses_what_we_part(architecture: str):
    model = ModelRegistry._try_load_model_cls(architecture)
    assert {name: tuple(parts) for name, parts in model.packed_modules_mapping.items()} == shared.FUSED


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (
            lambda w: {n: t[: len(t) // 2] if "qkv" in n else t for n, t in w.items()},
            "qkv_proj.weight has 64 rows, but .* have",
        ),
        (
            lambda w: {n: t[:, :32] if "o_proj" in n else t for n, t in w.items()},
            "o_proj.weight and 1 more are not in both",
        ),
        (
            lambda w: {n: t[:64] if "embed" in n else t for n, t in w.items()},
            "embed_tokens.weight and 0 more are not in both",
        ),
        (
            lambda w: {n: t for n, t in w.items() if "model.norm" not in n},
            "model.norm.weight and 0 more are not in both",
        ),
        (
            lambda w: w | {"model.layers.0.mlp.scale": torch.ones(1)},
            "model.layers.0.mlp.scale and 0 more are not in both",
        ),
    ],
    ids=["a rank's heads", "a rank's columns", "a rank's vocabulary", "missing", "unknown"],
)
def test_other_weights_are_refused(tmp_path: Path, spoil, reason: str):
    engine = Engine(load(save(tmp_path, CONFIGS["llama"]), torch.float32))
    with pytest.raises(ValueError, match=reason):
        shared.views(spoil(shared.engine_weights(engine)), shared.skeleton(str(tmp_path), "float32", "sdpa"))


def test_a_soft_cap_is_kept_by_eager_attention():
    plain, capped = Gemma2Config(attn_logit_softcapping=None), Gemma2Config(attn_logit_softcapping=50.0)
    assert shared.attention_implementation("sdpa", plain) is None
    assert shared.attention_implementation("sdpa", capped) == "eager"
    assert shared.attention_implementation("xformers", plain) == "xformers"


def test_buffers_that_the_config_does_not_make_are_refused(tmp_path: Path):
    shared.check_buffers(shared.skeleton(str(save(tmp_path / "llama", CONFIGS["llama"])), "float32", "sdpa"))
    scaled = Gemma3TextConfig(**SIZES, query_pre_attn_scalar=16)
    with pytest.raises(ValueError, match=r"model.embed_tokens has buffers that are not made from the config"):
        shared.check_buffers(shared.skeleton(str(save(tmp_path / "gemma", scaled)), "float32", "sdpa"))


@pytest.fixture
def ipc(monkeypatch: pytest.MonkeyPatch) -> dict[bytes, torch.UntypedStorage]:
    """CUDA IPC with the same arguments and results, where a handle names a CPU storage of this process."""
    storages: dict[bytes, torch.UntypedStorage] = {}

    def reduce(t: torch.Tensor) -> tuple:
        assert not t.requires_grad
        handle = b"handle %d" % len(storages)
        storages[handle] = t.untyped_storage()
        place = type(t), t.size(), t.stride(), t.storage_offset(), torch.storage.TypedStorage, t.dtype, 0
        return None, (*place, handle, t.untyped_storage().nbytes(), 512, False, b"counter", 7, b"event", True)

    def rebuild(**given: Any) -> torch.Tensor:
        inspect.signature(reductions.rebuild_cuda_tensor).bind(**given)
        assert (given["storage_device"], given["storage_offset_bytes"], given["ref_counter_handle"]) == (
            1,
            512,
            b"counter",
        )
        assert (given["ref_counter_offset"], given["event_handle"], given["event_sync_required"]) == (
            7,
            b"event",
            True,
        )
        storage = storages[given["storage_handle"]]
        assert storage.nbytes() == given["storage_size_bytes"]
        empty = torch.empty(0, dtype=given["dtype"])
        return empty.set_(storage, given["tensor_offset"], given["tensor_size"], given["tensor_stride"])

    monkeypatch.setattr(shared, "reduce_tensor", reduce)
    monkeypatch.setattr(shared, "rebuild_cuda_tensor", rebuild)
    return storages


def test_a_tensor_travels_as_a_message(ipc: dict):
    matrix = torch.arange(24, dtype=torch.bfloat16).view(4, 6)
    for tensor in (matrix, matrix.T, matrix[1:3, 2:]):
        message = m.encode(shared.export(tensor.requires_grad_()))
        received = shared.attach(
            m.msgspec.msgpack.decode(message, type=m.SharedTensor), torch.device("cuda:1")
        )
        assert torch.equal(received, tensor) and received.data_ptr() == tensor.data_ptr()
        assert not received.requires_grad


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ((0, b"[0.0, 1.0, 2.0, 3.0]\n", b""), None),
        ((0, b"[0.0, 0.0, 0.0, 0.0]\n", b""), "another process sees other numbers there"),
        (
            (1, b"", b"Traceback\nRuntimeError: invalid device context\n"),
            "RuntimeError: invalid device context",
        ),
        ((-11, b"", b""), "code -11"),
        (subprocess.TimeoutExpired("python", 5), "TimeoutExpired: .*timed out after 5 seconds"),
    ],
)
def test_whether_another_process_can_map_a_tensor(
    ipc: dict, monkeypatch: pytest.MonkeyPatch, found: Any, reason: str | None
):
    def run(command: list[str], input: bytes, **kwargs: Any) -> Any:
        assert command[1:] == ["-m", "vllm_longctx.temp_lora.shared_weights", "cpu"]
        assert shared.attach_probe("cuda:1", input) == "[0.0, 1.0, 2.0, 3.0]"
        if isinstance(found, Exception):
            raise found
        return subprocess.CompletedProcess(command, *found)

    monkeypatch.setattr(subprocess, "run", run)
    why = shared.why_not_attached(torch.arange(4, dtype=torch.bfloat16))
    assert why is None if reason is None else why is not None and re.fullmatch(reason, why)


@pytest.mark.slow
def test_a_process_that_cannot_map_a_tensor_says_why(ipc: dict):
    """A real one. It knows no handle of this process."""
    reason = shared.why_not_attached(torch.arange(4.0))
    assert reason is not None and "Error" in reason


def test_what_cannot_be_exported_is_not_attached():
    assert shared.why_not_attached(torch.arange(4.0)) is not None


def test_a_trainer_takes_over_what_it_is_sent(tmp_path: Path, ipc: dict):
    """From the worker's offer to a trained version in the worker's own memory, with messages as they are
    sent.
    """
    original = load(save(tmp_path, CONFIGS["tied"]), torch.float32)
    engine = Engine(original)
    weights = shared.engine_weights(engine)
    modules = linear_layers(original)
    memory = torch.zeros(Slots.size(modules, 4, 2), dtype=torch.uint8)
    offer, slots = shared.SharedWeights(weights, memory), Slots.create(modules, 4, 2)
    options = m.Options(address="", model=str(tmp_path), dtype="float32", device="cpu:1", shares=True)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router, context.socket(zmq.DEALER) as client:
        router.bind("inproc://trainer")
        client.connect("inproc://trainer")
        train = m.Train(1, 1, 0, 1, list(range(40)), 16)
        for job in (offer.message(), m.Join(), m.OpenSlots(slots.path, 4, 2), m.Begin(1, 1, RECIPE), train):
            client.send(m.encode(job))
        trainer = sidecar.make_sidecar(options, router)
        for _ in range(4):
            trainer.serve_one()
        reports = [m.decode_report(client.recv()) for _ in range(4)]
    assert reports[0].modules == modules
    assert reports[1:3] == [m.Began(1), m.Started(1, 1)]
    alone = Trainer(original)
    alone.begin(1, RECIPE)
    assert alone.train(1, 1, list(range(40)), 16) == reports[3].losses
    worker = Slots.open(slots.path, modules, 4, 2, memory)
    with worker.read(1, 0, 1, 1) as read:
        assert all(
            torch.equal(x, y)
            for name, pair in alone.weights(1).items()
            for x, y in zip(read[name], pair, strict=True)
        )
    for one in (worker, slots):
        one.close()
