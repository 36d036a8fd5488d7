"""Memory layers' KV apart from vLLM's pool on CUDA, in vLLM's engine as `cuda_engine` runs it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import _custom_ops as ops
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.worker.gpu import attn_utils
from vllm.v1.worker.gpu.warmup import warmup_kernels
from vllm.v1.worker.gpu_worker import Worker

from tests.support.cuda_engine import Engine as WholeEngine
from tests.support.cuda_engine import text
from tests.support.reference_model import focused
from tests.support.window_layers import BLOCK_SIZE, FOCUSED, LOOKUPS, Engine, configure
from vllm_longctx.config import LongContextError
from vllm_longctx.cuda import host_memory
from vllm_longctx.cuda.host_memory import HostMemory, allocate_apart, check_host_memory
from vllm_longctx.cuda.kernels.lookup import WORKSPACE, Memories, Summaries, attend_best
from vllm_longctx.cuda.memory import close_window
from vllm_longctx.cuda.memory_runner import MemoryRunner
from vllm_longctx.cuda.worker import LongContextWorker
from vllm_longctx.engine.lookup import ClosedWindow
from vllm_longctx.engine.memory_kv import MemoryManager
from vllm_longctx.geometry import SteppedWindows
from vllm_longctx.rotary import Rotary, inverse_frequencies
from vllm_longctx.scheduling.memory import AsyncMemoryScheduler, MemoryScheduler
from vllm_longctx.settings import active_settings

MAX_LEN = 80  # tokens of a request
interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="where there is a GPU, kernels are not interpreted"
)
BLOCK_GIB = 2 * 32 * 4 * BLOCK_SIZE / 2**30  # of the tiny model's one memory layer


@pytest.fixture
def unmapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where device and host are one."""
    monkeypatch.setattr(host_memory, "mapped", lambda pages: pages)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)


def apart(model: Path, attention: dict[str, Any], blocks: int, **kwargs: Any) -> VllmConfig:
    kwargs = {
        "block_size": BLOCK_SIZE,
        "dtype": "float32",
        "max_num_batched_tokens": 64,
        "max_model_len": MAX_LEN,
        **kwargs,
    }
    return configure(model, {**attention, "memory_limit_gib": blocks * BLOCK_GIB}, **kwargs)


class Layers(Engine):
    def __init__(self, config: VllmConfig, monkeypatch: pytest.MonkeyPatch):
        super().__init__(config, monkeypatch, {"a": 60}, MAX_LEN)
        self.tables.zero_()  # as vLLM's at this time
        self.memory = allocate_apart(self.runner.sites, self.runner.kv_cache_config)
        self.runner.bind_kv_cache()


class Apart(WholeEngine):
    """pool, blocks: of vLLM's pool and of the memory's, each with a null block."""

    def __init__(self, model: Path, attention: dict[str, Any], pool: int, blocks: int, steps_ahead: int):
        windows = SteppedWindows(16, 11)
        section = {
            "attention": {
                **FOCUSED,
                **attention,
                "n_local": windows.tokens,
                "memory_limit_gib": blocks * BLOCK_GIB,
            }
        }
        sizes = {
            "num_gpu_blocks_override": pool,
            "max_num_batched_tokens": 40,
            "max_model_len": MAX_LEN,
            "max_num_seqs": 3,
        }
        schedulers = MemoryScheduler, AsyncMemoryScheduler
        super().__init__(model, section, MemoryRunner, schedulers, steps_ahead, **sizes)
        layers = self.config.compilation_config.static_forward_context
        self.memory = allocate_apart(self.runner.sites, self.runner.kv_cache_config)
        self.cache = layers["model.layers.1.self_attn.attn"].kv_cache
        with set_current_vllm_config(self.config):
            self.runner.bind_kv_cache()
            warmup_kernels(self.runner, self.runner.execute_model, self.sample_nothing)
        self.cache.fill_(torch.nan)
        self.pools = [manager.block_pool for manager in self.managers]
        self.of_memory = [isinstance(manager, MemoryManager) for manager in self.managers].index(True)
        self.seen: dict[str, Any] = {}
        self.most: dict[str, int] = {}  # blocks of each request in the memory

        def seen(prompt: int) -> Any:
            return focused(
                windows, prompt, [1], attention.get("mem_positionals", True), attention.get("top_k")
            )

        self.sees = seen

    def sample_nothing(self, grammar_output: Any) -> None:
        self.runner.execute_model_state = None

    def check_inputs(self) -> None:
        for name in self.runner.execute_model_state.input_batch.req_ids:
            row = self.runner.req_states.req_id_to_index[name]
            self.most[name] = max(
                self.most.get(name, 0), int(self.runner.block_tables.num_blocks.np[self.of_memory, row])
            )

    def check_all(self) -> None:
        with set_current_vllm_config(self.config):
            self.run()
        for name, request in self.requests.items():
            self.check(name, self.sees(request.num_prompt_tokens))
        assert self.is_empty() and all(
            pool.get_num_free_blocks() == pool.num_gpu_blocks - 1 for pool in self.pools
        )


@interpreted
@pytest.mark.usefixtures("one_rank", "gpu", "host", "stock_cache_update", "one_thread", "unmapped")
@pytest.mark.parametrize(
    ("attention", "steps_ahead"),
    [(LOOKUPS[0], 1), pytest.param(LOOKUPS[2], 0, marks=pytest.mark.slow)],
    ids=["all", "blocks"],
)
def test_a_memory_longer_than_the_pool(
    attention: dict[str, Any], steps_ahead: int, small_llama: Path
) -> None:
    """With a step ahead and without; behind vLLM's own warm-up."""
    engine = Apart(small_llama, attention, pool=4, blocks=31, steps_ahead=steps_ahead)
    assert [pool.num_gpu_blocks for pool in engine.pools] == [
        31 if i == engine.of_memory else 4 for i in range(2)
    ]
    assert len(engine.cache) == 31 and engine.cache.data_ptr() == engine.memory.pages.data_ptr()
    engine.add("a", text(60), max_tokens=6)
    engine.check_all()
    assert engine.most == {"a": 5} and engine.requests["a"].num_preemptions == 0
    assert (~engine.cache.isnan()).flatten(1).any(1).sum() == 5


@interpreted
@pytest.mark.usefixtures("one_rank", "gpu", "host", "stock_cache_update", "one_thread", "unmapped")
def test_what_does_not_fit_into_the_memory_waits(small_llama: Path) -> None:
    """Though vLLM's pool has room for both.

    To warm its kernels, vLLM made up fewer block ids than that has, too.
    """
    engine = Apart(small_llama, LOOKUPS[0], pool=20, blocks=6, steps_ahead=1)
    engine.add("a", text(60), max_tokens=2)
    engine.add("b", text(40), max_tokens=2, prompt_logprobs=None)
    engine.check_all()
    assert engine.most == {"a": 4, "b": 3}


@interpreted
@pytest.mark.usefixtures("gpu", "unmapped")
def test_blocks_that_vllm_makes_up_to_warm_its_kernels_are_there(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for each group behind the null block, however small the memory; more only up to num_blocks."""
    engine = Layers(apart(tiny, {}, blocks=2, max_model_len=16), monkeypatch)
    (memory,) = [
        g.kv_cache_spec
        for g in engine.kv_cache_config.kv_cache_groups
        if hasattr(g.kv_cache_spec, "memory_blocks")
    ]
    assert memory.memory_blocks == 2
    assert engine.runner.kv_cache_config.num_blocks == len(engine.layers[1].attn.kv_cache) == 3


class Stock:
    """What vLLM's worker does, in short. available: bytes that it finds for the KV cache."""

    available = 60 << 30

    def __init__(self, config: VllmConfig, monkeypatch: pytest.MonkeyPatch):
        self.engine = engine = Layers(config, monkeypatch)
        stock = {
            "init_device": lambda worker: None,
            "determine_available_memory": lambda worker: self.determine_available_memory(worker),
            "get_kv_cache_spec": lambda worker: attn_utils.get_kv_cache_spec(config),
            "initialize_from_config": lambda worker, kv_cache_config: None,
            "shutdown": lambda worker: None,
        }
        for name, function in stock.items():
            monkeypatch.setattr(Worker, name, function)
        self.worker: Any = LongContextWorker.__new__(LongContextWorker)
        for name in ("cache_config", "model_config", "parallel_config"):
            setattr(self.worker, name, getattr(config, name))
        self.worker.vllm_config, self.worker.model_runner, self.worker.rank = config, engine.runner, 0
        self.worker.settings, self.worker.sites = active_settings(config), engine.runner.sites

    def determine_available_memory(self, worker: Any) -> int:
        worker.total_consumed, worker.available_kv_cache_memory_bytes = 0, self.available
        return self.available


@interpreted
@pytest.mark.usefixtures("gpu", "unmapped", "one_thread")
def test_the_pool_leaves_room_for_the_summaries_of_a_memory_apart(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Just theirs: its KV is not on the GPU."""
    stock = Stock(apart(tiny, LOOKUPS[2], blocks=31), monkeypatch)
    (summaries,) = [
        layer.attn.impl.summaries for layer in stock.engine.layers if hasattr(layer.attn.impl, "lookup")
    ]
    room = summaries.codes.nbytes + summaries.steps.nbytes
    assert len(summaries.codes) == 31
    assert stock.worker.determine_available_memory() == stock.available - 4 * 8 * WORKSPACE - room
    stock.available = 4 * 8 * WORKSPACE + room
    with pytest.raises(
        LongContextError, match=r"0.50 GiB .* 0.50 GiB .* raise gpu_memory_utilization, or lower attention"
    ):
        stock.worker.determine_available_memory()


@interpreted
@pytest.mark.usefixtures("gpu", "unmapped", "one_thread")
def test_the_worker_moves_memory_before_anything_looks_into_it(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    with pytest.raises(
        LongContextError,
        match=r"memory_limit_gib = 0.0001\d+ is to be pinned, but this host has 0.0 GiB free",
    ):
        LongContextWorker.init_device(SimpleNamespace(vllm_config=config))
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
        (
            2,
            r"cannot be pinned for the GPU \(cudaHostRegister: 2\); this host has .* GiB free; lower it, or "
            r"leave",
        ),
        (0, r"cannot be pinned for the GPU \(CUDA does not take registered memory for pinned\)"),
    ],
)
def test_memory_that_cannot_be_pinned_is_named(
    error: int, message: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never a view of a copy, which vLLM makes of memory that is not pinned."""

    class Code(int):
        value = property(int)

    monkeypatch.setattr(
        torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=lambda *args: Code(error))
    )
    with pytest.raises(LongContextError, match=message):
        Layers(apart(tiny, {}, blocks=31), monkeypatch)


@pytest.mark.usefixtures("gpu")
def test_what_memory_apart_cannot_do_on_cuda_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        LongContextError, match=r"leaves nothing in vLLM's pool; .* the room \(gpu_memory_utilization\)"
    ):
        apart(tiny, {"mem_layers": [0, 1]}, blocks=31)
    with pytest.raises(LongContextError, match=r"holds 16 tokens, but max_model_len = 80; give at least"):
        apart(tiny, {}, blocks=2)
    monkeypatch.setattr(current_platform, "is_pin_memory_available", lambda: False)
    with pytest.raises(
        LongContextError,
        match=r"with this setting: attention.memory_limit_gib = .* no pinned host memory .* leave it out",
    ):
        apart(tiny, {}, blocks=31)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_read_and_write_it_where_it_is() -> None:
    """Bit for bit as in the GPU's own memory: vLLM's operator that writes, windows that close, summaries,
    lookups.
    """
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
        close_window(cache, ClosedWindow(0, 0, length, table), rotary, torch.bfloat16)
        summaries = Summaries.like(keys)
        blocks = table[: -(-length // block_size)].long()
        summaries.summarise(
            keys,
            blocks,
            (length - torch.arange(len(blocks), device=device) * block_size).clamp_max(block_size),
        )
        memories = Memories(keys, values, table[None], starts, ends, length, summaries)
        best = [attend_best(query, memories, 16, d**-0.5, share) for share in (None, 0.1)]
        found.append([summaries.codes, *best[0], *best[1]])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert torch.equal(here, there) and torch.equal(here.cpu().view(torch.int8).flatten(), memory.pages)
    memory.release()
