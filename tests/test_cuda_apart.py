"""Memory layers' KV apart from vLLM's pool on CUDA: as `test_cuda_focused`, with the blocks that vLLM's managers give."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_cuda import gpu, stock_cache_update  # noqa: F401 (fixtures)
from test_cuda_focused import BLOCK_SIZE, LOOKUPS, Engine, configure
from test_engine_args import TINY, save
from torch import Tensor
from transformers import LlamaConfig
from vllm import _custom_ops as ops
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request
from vllm.v1.worker.gpu import attn_utils
from vllm.v1.worker.gpu_worker import Worker

from vllm_longctx.attention.cuda_focused import remember
from vllm_longctx.attention.kernels.lookup import WORKSPACE, Memories, Summaries, attend_best
from vllm_longctx.attention.memory import ClosedWindow
from vllm_longctx.config import LongContextError
from vllm_longctx.focused import host_memory
from vllm_longctx.focused.host_memory import HostMemory, check_host_memory, keep_apart
from vllm_longctx.rotary import Rotary, inverse_frequencies
from vllm_longctx.worker_cuda import LongContextCUDAWorker

MAX_LEN, POOL = 80, 3  # tokens of a request; blocks of vLLM's pool, the null block among them
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, kernels are not interpreted")
BLOCK_GIB = 2 * 32 * 4 * BLOCK_SIZE / 2**30  # of the tiny model's one memory layer


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return save(tmp_path, LlamaConfig(**TINY, intermediate_size=64, num_key_value_heads=1), "LlamaForCausalLM")


@pytest.fixture
def unmapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where device and host are one."""
    monkeypatch.setattr(host_memory, "mapped", lambda pages: pages)


def apart(model: Path, attention: dict[str, Any], blocks: int, **kwargs: Any) -> VllmConfig:
    kwargs = {"block_size": BLOCK_SIZE, "dtype": "float32", "max_num_batched_tokens": 64, "max_model_len": MAX_LEN, **kwargs}
    return configure(model, {**attention, "memory_limit_gib": blocks * BLOCK_GIB}, **kwargs)


class ApartEngine(Engine):
    """manager: vLLM's own, over a pool in which the request's memory would find no room."""

    def __init__(self, config: VllmConfig, monkeypatch: pytest.MonkeyPatch, prompts: dict[str, int], pool: int = POOL):
        super().__init__(config, monkeypatch, prompts, MAX_LEN)
        self.tables.zero_()  # as vLLM's at this time
        layers, runner = config.compilation_config.static_forward_context, self.runner
        self.memory = keep_apart(layers, runner.kv_cache_config)
        self.layers[1].attn.kv_cache.fill_(torch.nan)
        runner.look_into_memory()
        pools = KVCacheConfig(pool, [], self.kv_cache_config.kv_cache_groups)
        sizes = MAX_LEN, BLOCK_SIZE, BLOCK_SIZE
        self.manager = KVCacheManager(pools, *sizes, max_in_flight_tokens=64, enable_caching=False)
        parameters = SamplingParams(max_tokens=MAX_LEN)
        self.requests = {name: Request(name, [1] * n, parameters, None) for name, n in prompts.items()}

    def step(self, tokens: dict[str, int]) -> dict[str, list[Tensor]]:
        for name, n in tokens.items():
            request, row = self.requests[name], list(self.prompts).index(name)
            if request.num_computed_tokens == request.num_tokens:
                request.append_output_token_ids(1)
            is_new = request.num_computed_tokens == 0
            assert self.manager.allocate_slots(request, n, full_sequence_must_fit=is_new) is not None
            request.num_computed_tokens += n
            for table, blocks in zip(self.tables, self.manager.get_block_ids(name), strict=True):
                table[row, : len(blocks)] = torch.tensor(blocks)
        return super().step(tokens)


@interpreted
@pytest.mark.usefixtures("gpu", "stock_cache_update", "one_thread", "unmapped")
@pytest.mark.parametrize("attention", LOOKUPS, ids=["all", "top_k", "blocks"])
def test_a_memory_longer_than_the_pool(attention: dict[str, Any], tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ApartEngine(apart(tiny, attention, 31), monkeypatch, {"a": 60})
    windows, memory = (engine.layers[i].attn.kv_cache for i in range(2))
    assert len(memory) == 31 and memory.is_contiguous()
    assert memory.untyped_storage().data_ptr() == engine.memory.pages.untyped_storage().data_ptr() != windows.data_ptr()
    assert engine.runner.kv_cache_config.num_blocks == 31  # vLLM's pool has more; so many has the memory
    managers = engine.manager.coordinator.single_type_managers
    free = [manager.block_pool.get_num_free_blocks() for manager in managers]
    assert free[engine.memory_group] == 30 and free[1 - engine.memory_group] == POOL - 1
    for n in (12, 12, 12, 12, 1, 11, 1, 1, 1):
        for layer, output in enumerate(engine.step({"a": n})["a"]):
            expected, margin = engine.expected("a", n, layer, attention.get("top_k"))
            assert margin > 1e-5
            torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)
    kept = engine.manager.get_block_ids("a")[engine.memory_group]
    assert len(kept) * BLOCK_SIZE == 64 > POOL * BLOCK_SIZE and max(kept) >= POOL
    engine.manager.free(engine.requests["a"])
    assert [manager.block_pool.get_num_free_blocks() for manager in managers] == free


@interpreted
@pytest.mark.usefixtures("gpu", "unmapped")
def test_what_does_not_fit_into_the_memory_waits(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is taken of either pool, though vLLM's has room."""
    engine = ApartEngine(apart(tiny, {}, blocks=6), monkeypatch, {"a": 60, "b": 30}, pool=20)
    a, b = engine.requests.values()

    assert engine.manager.allocate_slots(a, 60, full_sequence_must_fit=True) is not None  # 4 of 5 blocks
    pools = [manager.block_pool for manager in engine.manager.coordinator.single_type_managers]
    free = [pool.get_num_free_blocks() for pool in pools]
    assert free[engine.memory_group] == 1 and free[1 - engine.memory_group] > 10
    assert engine.manager.allocate_slots(b, 12, full_sequence_must_fit=True) is None
    assert [pool.get_num_free_blocks() for pool in pools] == free
    engine.manager.free(a)
    assert engine.manager.allocate_slots(b, 12, full_sequence_must_fit=True) is not None


@interpreted
@pytest.mark.usefixtures("gpu", "unmapped")
def test_blocks_that_vllm_makes_up_to_warm_its_kernels_are_there(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each group behind the null block, however small the memory; more only up to num_blocks."""
    engine = ApartEngine(apart(tiny, {}, blocks=2, max_model_len=16), monkeypatch, {"a": 60})
    (memory,) = [g.kv_cache_spec for g in engine.kv_cache_config.kv_cache_groups if hasattr(g.kv_cache_spec, "memory_blocks")]
    assert memory.memory_blocks == 2
    assert engine.runner.kv_cache_config.num_blocks == len(engine.layers[1].attn.kv_cache) == 3


class Stock:
    """What vLLM's worker does, in short. available: bytes that it finds for the KV cache."""

    available = 60 << 30

    def __init__(self, config: VllmConfig, monkeypatch: pytest.MonkeyPatch):
        self.engine = engine = ApartEngine(config, monkeypatch, {"a": 60})
        stock = {
            "init_device": lambda worker: None,
            "determine_available_memory": lambda worker: self.available,
            "get_kv_cache_spec": lambda worker: attn_utils.get_kv_cache_spec(config),
            "initialize_from_config": lambda worker, kv_cache_config: None,
            "shutdown": lambda worker: None,
        }
        for name, function in stock.items():
            monkeypatch.setattr(Worker, name, function)
        self.worker: Any = LongContextCUDAWorker.__new__(LongContextCUDAWorker)
        for name in ("cache_config", "model_config", "parallel_config"):
            setattr(self.worker, name, getattr(config, name))
        self.worker.vllm_config, self.worker.model_runner = config, engine.runner


@interpreted
@pytest.mark.usefixtures("gpu", "unmapped", "one_thread")
def test_the_pool_leaves_room_for_the_summaries_of_a_memory_apart(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Just theirs: its KV is not on the GPU."""
    stock = Stock(apart(tiny, LOOKUPS[2], blocks=31), monkeypatch)
    (summaries,) = [layer.attn.impl.summaries for layer in stock.engine.layers if hasattr(layer.attn.impl, "lookup")][1:]
    room = summaries.codes.nbytes + summaries.steps.nbytes
    assert len(summaries.codes) == 31
    assert stock.worker.determine_available_memory() == stock.available - 4 * 8 * WORKSPACE - room
    stock.available = 4 * 8 * WORKSPACE + room
    with pytest.raises(LongContextError, match=r"0.50 GiB .* 0.50 GiB .* raise gpu_memory_utilization, or lower attention"):
        stock.worker.determine_available_memory()


@interpreted
@pytest.mark.usefixtures("gpu", "unmapped", "one_thread")
def test_the_worker_moves_memory_before_anything_looks_into_it(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = Stock(apart(tiny, LOOKUPS[2], blocks=31), monkeypatch)
    memory, released = stock.engine.layers[1].attn, []
    memory.kv_cache = torch.zeros(9, *memory.kv_cache.shape[1:])  # in vLLM's pool
    stock.worker.initialize_from_config(stock.engine.kv_cache_config)
    assert len(memory.kv_cache) == len(memory.impl.summaries.codes) == 31
    pages = stock.worker.host_memory.pages
    assert pages.nbytes == memory.kv_cache.nbytes and pages.data_ptr() == memory.kv_cache.data_ptr()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostUnregister=released.append))
    stock.worker.shutdown()
    assert released == [pages.data_ptr()]


@pytest.mark.usefixtures("gpu")
def test_a_memory_that_the_host_has_not_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = apart(tiny, {}, blocks=31)
    check_host_memory(config)
    monkeypatch.setattr(host_memory, "get_cgroup_memory_limit", lambda: 100_000)
    with pytest.raises(LongContextError, match=r"memory_limit_gib = 0.0001\d+ is to be pinned, but this host has 0.0 GiB free"):
        LongContextCUDAWorker.init_device(SimpleNamespace(vllm_config=config))
    monkeypatch.setattr(host_memory, "get_cgroup_memory_limit", lambda: 200_000)
    check_host_memory(config)
    config.parallel_config.world_size = 2
    with pytest.raises(LongContextError, match=r"for each of 2 ranks is to be pinned"):
        check_host_memory(config)


@interpreted
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (2, r"cannot be pinned for the GPU \(cudaHostRegister: 2\); this host has .* GiB free; lower it, or leave"),
        (0, r"cannot be pinned for the GPU \(CUDA does not take registered memory for pinned\)"),
    ],
)
def test_memory_that_cannot_be_pinned_is_named(error: int, message: str, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never a view of a copy, which vLLM makes of memory that is not pinned."""

    class Code(int):
        value = property(int)

    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=lambda *args: Code(error)))
    with pytest.raises(LongContextError, match=message):
        ApartEngine(apart(tiny, {}, blocks=31), monkeypatch, {"a": 60})


@pytest.mark.usefixtures("gpu")
def test_what_memory_apart_cannot_do_on_cuda_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LongContextError, match=r"leaves nothing in vLLM's pool; .* the room \(gpu_memory_utilization\)"):
        apart(tiny, {"mem_layers": [0, 1]}, blocks=31)
    with pytest.raises(LongContextError, match=r"holds 16 tokens, but max_model_len = 80; give at least"):
        apart(tiny, {}, blocks=2)
    monkeypatch.setattr(current_platform, "is_pin_memory_available", lambda: False)
    with pytest.raises(
        LongContextError, match=r"with this setting: attention.memory_limit_gib = .* no pinned host memory .* leave it out"
    ):
        apart(tiny, {}, blocks=31)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_read_and_write_it_where_it_is() -> None:
    """Bit for bit as in the GPU's own memory: vLLM's operator that writes, windows that close, summaries, lookups."""
    torch.manual_seed(0)
    device, block_size, kv_heads, d, length = torch.device("cuda"), 32, 2, 64, 2000
    shape = 80, kv_heads, block_size, 2 * d
    here = torch.zeros(shape, dtype=torch.float16, device=device)
    memory = HostMemory(here.nbytes)
    there = memory.on_device.view(here.dtype).view(shape)
    assert there.device.type == "cuda" and there.data_ptr() == memory.pages.data_ptr()
    table = (torch.randperm(79, device=device) + 1).int()
    key, value = torch.randn(2, length, kv_heads, d, dtype=here.dtype, device=device)
    positions, scale = torch.arange(length, device=device), torch.ones(1, device=device)
    slots = table[positions // block_size].long() * block_size + positions % block_size
    rotary = Rotary(d, d, True, inverse_frequencies(d, {})).to(device)
    query = torch.randn(1, 1, 8, d, dtype=here.dtype, device=device)
    starts, ends = (torch.full((1,), n, dtype=torch.int32, device=device) for n in (0, length))
    found = []
    for cache in (here, there):
        keys, values = cache.transpose(1, 2).chunk(2, -1)
        ops.reshape_and_cache_flash(key, value, keys, values, slots, "auto", scale, scale)
        remember(cache, ClosedWindow(0, 0, length, table), rotary, torch.bfloat16)
        summaries = Summaries.like(keys)
        blocks = table[: -(-length // block_size)].long()
        summaries.summarise(
            keys, blocks, (length - torch.arange(len(blocks), device=device) * block_size).clamp_max(block_size)
        )
        memories = Memories(keys, values, table[None], starts, ends, length, summaries)
        best = [attend_best(query, memories, 16, d**-0.5, share) for share in (None, 0.1)]
        found.append([summaries.codes, *best[0], *best[1]])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert torch.equal(here, there) and torch.equal(here.cpu().view(torch.int8).flatten(), memory.pages)
    memory.release()
