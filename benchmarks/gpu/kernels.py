"""The kernels alone: what they reach of the card's copy bandwidth, and their time against FlashAttention's.

One layer of each shape, bfloat16. Block tables lead every request through one pool of random numbers, each
from another place of it, so that long texts need no memory of their own: a text longer than the pool passes
through it again. The pool is many times the L2 cache, and the calls that are timed read different parts of
it, as the layers of a model do.

Bytes are those of the keys and values that the queries see, each counted once: useful traffic, not what was
    moved.
"""

import contextlib
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import triton
from gpu import costs
from gpu.models import BLOCK_SIZE, GIB, GQA_8B, LLAMA_2_7B, N_GLOBAL, TINY, TINY_GQA, Shape
from gpu.report import CPU, QUICK, SMOKE
from torch import Tensor

if TYPE_CHECKING:
    from gpu.report import Record
    from gpu.run_all import Setting

    from vllm_longctx.cuda.kernels.lambda_tile import View
    from vllm_longctx.cuda.kernels.lookup import Memories, Summaries

CHUNK = 8192  # queries of a prefill step
K, SHARE = 64, 0.1  # of a lookup: keys for each query and head; share of the blocks that `blocks` reads
LENGTHS = (4096, 16384, 32768, 131072, 1 << 20)
LOOKUP_LENGTHS = (1 << 17, 1 << 20, 1 << 22, 1 << 24)
BATCHES = (1, 16, 64)
# Of sizes that are not whole: lengths, and batches or queries.
DECODES_BY_SIZE: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    CPU: ((1024, 4096), (1, 4)),
    SMOKE: ((32768,), (16,)),
    QUICK: ((4096, 131072), (1, 16)),
}
PREFILLS_BY_SIZE: dict[str, tuple[tuple[int, ...], int]] = {
    CPU: ((1024, 4096), 256),
    QUICK: ((8192, 131072), CHUNK),
}
DTYPE = torch.bfloat16

Plan = list[dict[str, Any]]
Flash = Callable[..., Any]


def shapes(setting: "Setting") -> tuple[Shape, Shape]:
    return (LLAMA_2_7B, GQA_8B) if setting.cuda else (TINY, TINY_GQA)


def environment_plan(setting: "Setting") -> Plan:
    return [{"copy": "2 GiB"}]


def decode_plan(setting: "Setting") -> Plan:
    lengths, batches = DECODES_BY_SIZE.get(setting.size, (LENGTHS, BATCHES))
    return [
        {"shape": s.name, "batch": b, "length": n, "bytes": b * min(n, s.window) * s.layer_kv_bytes}
        for s in shapes(setting)[setting.size == SMOKE :]
        for b in batches
        for n in lengths
    ]


def prefill_plan(setting: "Setting") -> Plan:
    lengths, chunk = PREFILLS_BY_SIZE.get(setting.size, (LENGTHS, CHUNK))
    return [
        {"shape": s.name, "length": n, "queries": min(n, chunk), "flops": flops(s, n, min(n, chunk))}
        for s in shapes(setting)
        for n in lengths
    ]


def lookup_plan(setting: "Setting") -> Plan:
    lengths = LOOKUP_LENGTHS if setting.cuda else (4096, 16384)
    return [
        {"shape": s.name, "length": n, "bytes": n * s.layer_kv_bytes}
        for s in shapes(setting)
        for n in lengths
    ]


def memory_plan(setting: "Setting") -> Plan:
    length, queries = (1 << 17, (1, 128)) if setting.cuda else (4096, (1, 16))
    every = itertools.product(shapes(setting), queries, {"blocks": SHARE, "top_k": None}.items())
    return [
        {"shape": s.name, "queries": n, "lookup": name, "length": length, "k": K, "share": share}
        for s, n, (name, share) in every
    ]


def flops(shape: Shape, length: int, queries: int) -> int:
    """Of one layer's Λ attention for a text's last queries: 4 for a query head, a key it sees and an
    element.
    """
    seen = sum(min(i + 1, shape.window) for i in range(length - queries, length))
    return 4 * shape.heads * shape.head_size * seen


def of_name(setting: "Setting", name: str) -> Shape:
    return next(s for s in shapes(setting) if s.name == name)


def environment(record: "Record", plan: Plan, setting: "Setting") -> None:
    """The card, the versions, and bytes/s of a copy in its memory: read and written ones together."""
    import platform

    import vllm

    properties = torch.cuda.get_device_properties(0)
    record.note(
        device=properties.name,
        capability=f"{properties.major}.{properties.minor}",
        memory_bytes=properties.total_memory,
        multiprocessors=properties.multi_processor_count,
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        triton=triton.__version__,
        vllm=vllm.__version__,
    )
    source = torch.empty(2 * GIB, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = milliseconds([lambda: target.copy_(source)], rounds=15) / 1000
    record.note(copy_bytes_per_s=2 * source.numel() / seconds)


def decode(record: "Record", plan: Plan, setting: "Setting") -> None:
    """Milliseconds of one layer's decode: Λ; a stepped window of as many keys; FlashAttention over all keys,
    in its sliding window, and over a short text, of as many keys.

    FlashAttention's sliding window is the larger part of what it would take in our place: no first tokens, no
    merge.
    """
    for row in plan:
        shape, batch, length = of_name(setting, row["shape"]), row["batch"], row["length"]
        pool = Pool.of(shape, setting.cuda)
        tables = pool.tables(length, batch, 2 if row["bytes"] > GIB else 8)
        query = randn(batch, shape.heads, shape.head_size)
        flashes = flash_times(
            pool, query, list(range(batch + 1)), length, min(length, shape.window), tables, shape
        )
        ours = lambda_decode_time(pool, query, length, tables, shape)
        window = min(length, shape.window)
        starts, lens = (integers([n] * batch) for n in (length - window, length))
        call = stepped_decode(pool, query, starts, lens, window, shape)
        ours["stepped_ms"] = milliseconds([partial(call, table) for table in tables])
        cost = costs.decode(shape, batch, window, int(ours["splits"]))
        record.add(**row, **ours, **flashes, **asdict(cost))


def lambda_decode_time(
    pool: "Pool", query: Tensor, length: int, tables: list[Tensor], shape: Shape
) -> dict[str, float]:
    from vllm_longctx.cuda.kernels.lambda_decode import (
        decode_splits,
        decode_workspace,
        lambda_decode,
        num_sms,
    )

    view, batch = view_of(shape), len(query)
    splits = decode_splits(view, batch, shape.kv_heads, num_sms(device()), length)
    workspace = decode_workspace(batch, shape.heads, shape.head_size, splits, device())
    out, lens = torch.empty_like(query), integers([length] * batch)
    turn, key_turn = turns(shape, view, torch.full((batch,), length - 1))

    def call(table: Tensor) -> None:
        scale = shape.scale
        lambda_decode(query, *pool.caches, table, lens, turn, key_turn, view, scale, out, workspace, splits)

    return {"splits": splits, "longctx_ms": milliseconds([partial(call, t) for t in tables])}


def stepped_decode(
    pool: "Pool", query: Tensor, starts: Tensor, lens: Tensor, window: int, shape: Shape
) -> Callable[..., None]:
    """A decode in stepped windows, as a function of the block table and of what was found before them.

    query [rows, heads, head_size]. window: keys of the longest.
    """
    from vllm_longctx.cuda.kernels.lambda_decode import (
        decode_splits,
        decode_workspace,
        lambda_decode,
        num_sms,
    )
    from vllm_longctx.cuda.kernels.lambda_tile import View
    from vllm_longctx.geometry import Geometry

    view, rows = View(Geometry()), len(query)
    splits = decode_splits(view, rows, shape.kv_heads, num_sms(device()), window)
    workspace, out = (
        decode_workspace(rows, shape.heads, shape.head_size, splits, device()),
        torch.empty_like(query),
    )

    def call(table: Tensor, branch: tuple[Tensor, Tensor] | None = None) -> None:
        where = table, lens, None, None, view, shape.scale, out, workspace, splits
        lambda_decode(query, *pool.caches, *where, starts=starts, branch=branch)

    return call


def prefill(record: "Record", plan: Plan, setting: "Setting") -> None:
    """Milliseconds of one layer's attention for the last chunk of a text; the ways as in `decode`, the short
    text a chunk.
    """
    for row in plan:
        shape, length, queries = of_name(setting, row["shape"]), row["length"], row["queries"]
        pool = Pool.of(shape, setting.cuda)
        tables = pool.tables(length, 1, 2)
        query = randn(queries, shape.heads, shape.head_size)
        flashes = flash_times(pool, query, [0, queries], length, queries, tables, shape)
        ours = lambda_prefill_time(pool, query, length, tables, shape)
        record.add(**row, longctx_ms=ours, **flashes, **asdict(costs.prefill(shape, length, queries)))


def lambda_prefill_time(
    pool: "Pool", query: Tensor, length: int, tables: list[Tensor], shape: Shape
) -> float:
    from vllm_longctx.cuda.kernels.lambda_attention import lambda_attention

    view, queries, out = view_of(shape), len(query), torch.empty_like(query)
    lens, starts = integers([length]), integers([0, queries])
    turn, key_turn = turns(shape, view, torch.arange(length - queries, length))

    def call(table: Tensor) -> None:
        where = table, lens, starts, queries
        lambda_attention(query, *pool.caches, *where, turn, key_turn, view, shape.scale, out)

    return milliseconds([partial(call, t) for t in tables])


def lookup(record: "Record", plan: Plan, setting: "Setting") -> None:
    """Milliseconds of one query in one memory layer: all keys (FlashAttention), the exact best, the best in
    few blocks. Lookups are those that engines have in FULL CUDA graphs.
    """
    from vllm_longctx.cuda.kernels.lookup import Memories

    for name, rows in itertools.groupby(plan, lambda row: row["shape"]):
        shape = of_name(setting, name)
        pool = Pool.of(shape, setting.cuda)
        summaries = summaries_of(pool)
        query = randn(1, 1, shape.heads, shape.head_size)
        for row in rows:
            length = row["length"]
            tables = pool.tables(length, 1, 2)
            ranges = integers([0]), integers([length])

            def call(table: Tensor, share: float | None, ranges: Any = ranges, length: int = length) -> None:
                memories = Memories(*pool.caches, table, *ranges, length, summaries)  # noqa: B023
                look_up(query, memories, shape.scale, share)  # noqa: B023

            ways = {"top_k_ms": None, "blocks_ms": SHARE}
            ours = {
                way: milliseconds([partial(call, t, share) for t in tables]) for way, share in ways.items()
            }
            flashes = flash_times(pool, query[0], [0, 1], length, min(length, shape.window), tables, shape)
            cost = costs.lookup(shape, length, K, None)
            record.add(**row, k=K, share=SHARE, **ours, **flashes, **asdict(cost))


def look_up(query: Tensor, memories: "Memories", scale: float, share: float | None) -> tuple[Tensor, Tensor]:
    """A text's queries [1, queries, heads, head_size], as layers look them up: one as decodes in CUDA graphs.

    Output [queries, heads, head_size], log-sum-exps [queries, heads].
    """
    from vllm_longctx.cuda.kernels.lambda_decode import num_sms
    from vllm_longctx.cuda.kernels.lookup import attend_best, block_counts
    from vllm_longctx.cuda.kernels.lookup_decode import attend_best_decode, lookup_splits
    from vllm_longctx.engine.lookup import SCANNED

    if query.shape[1] > 1:
        output, lse = attend_best(query, memories, K, scale, share)
        return output[0], lse[0]
    m, counts = replace(memories, longest=None), None
    if share is not None:
        group = query.shape[2] // m.kv_heads
        counts = block_counts(m.begins, m.ends, m.block_size, group, K, share, SCANNED)
    splits = lookup_splits(m.num_columns, 1, m.kv_heads, num_sms(device()))
    return attend_best_decode(query[0], m, K, scale, splits, share, counts)


def summaries_of(pool: "Pool") -> "Summaries":
    from vllm_longctx.cuda.kernels.lookup import Summaries

    summaries = Summaries.like(pool.caches[0])
    for blocks in torch.arange(len(pool.numbers), device=device()).split(1024):
        summaries.summarise(pool.caches[0], blocks, torch.full_like(blocks, BLOCK_SIZE))
    return summaries


def memory(record: "Record", plan: Plan, setting: "Setting") -> None:
    """Milliseconds of a decode, or of a few queries of a prompt, in a memory layer: its KV on the GPU, and in
    host memory.

    The window, as long as the trained length, is read whole; summaries are in the GPU's memory both times.
    """
    for name, rows in itertools.groupby(plan, lambda row: row["shape"]):
        shape = of_name(setting, name)
        pool = Pool.of(shape, setting.cuda)
        summaries = summaries_of(pool)
        with in_host_memory(pool.numbers) as numbers:
            for row in rows:
                tables, query = (
                    pool.tables(row["length"], 1, 4),
                    randn(1, row["queries"], shape.heads, shape.head_size),
                )
                times = {
                    where: memory_time(p, query, row["length"], tables, shape, summaries, row["share"])
                    for where, p in (("gpu_ms", pool), ("host_ms", Pool(numbers)))
                }
                record.add(**row, window=min(row["length"], shape.trained), **times)


def memory_time(
    pool: "Pool",
    query: Tensor,
    length: int,
    tables: list[Tensor],
    shape: Shape,
    summaries: "Summaries",
    share: float | None,
) -> float:
    from vllm_longctx.cuda.kernels.lookup import Memories
    from vllm_longctx.cuda.kernels.stepped import stepped_attention

    start, out, queries = max(length - shape.trained, 0), torch.empty_like(query[0]), query.shape[1]
    zeros, starts, lens, tokens = (integers(values) for values in ([0], [start], [length], [0, queries]))
    decode = stepped_decode(pool, query[0], starts, lens, length - start, shape) if queries == 1 else None

    def call(table: Tensor) -> None:
        memories = Memories(*pool.caches, table, zeros, starts, start, summaries)
        branch = look_up(query, memories, shape.scale, share)
        if decode is not None:
            decode(table, branch)
            return
        stepped_attention(
            query[0], *pool.caches, table, starts, lens, tokens, queries, shape.scale, out, branch
        )

    return milliseconds([partial(call, t) for t in tables])


@contextlib.contextmanager
def in_host_memory(x: Tensor) -> Iterator[Tensor]:
    """x, contiguous, copied to where `memory_limit_gib` keeps KV."""
    from vllm_longctx.cuda.host_memory import HostMemory

    memory = HostMemory(x.nbytes)
    memory.pages.copy_(x.flatten().view(torch.int8))
    try:
        yield memory.on_device.view(x.dtype).view(x.shape)
    finally:
        memory.release()


def milliseconds(calls: Sequence[Callable[[], Any]], rounds: int = 7) -> float:
    """Median over rounds of the time per call, in a CUDA graph of all the calls, as an engine runs them.

    Without a GPU, so that tests can run the stages, by the clock, of one call.
    """
    if not torch.cuda.is_available():
        start = time.perf_counter()
        calls[0]()
        return 1000 * (time.perf_counter() - start)
    for call in calls:  # compiles
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for number in range(rounds + 2):  # two warm up
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if number > 1:
            times.append(start.elapsed_time(end) / len(calls))
    return statistics.median(times)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def randn(*size: int) -> Tensor:
    return torch.randn(size, device=device()).to(DTYPE)


def integers(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device())


@dataclass(frozen=True)
class Pool:
    """One layer's KV cache, random numbers in bfloat16, [num_blocks, kv_heads, BLOCK_SIZE, 2 * head_size].

    As caches of each half [num_blocks, BLOCK_SIZE, kv_heads, head_size]: `caches` of just this layout, which
    longctx's backend prefers, `slots_first` of the one that vLLM gives FlashAttention.
    """

    numbers: Tensor

    @classmethod
    @functools.lru_cache(maxsize=1)
    def of(cls, shape: Shape, cuda: bool) -> "Pool":
        blocks = (8 * GIB if cuda else 4 << 20) // (BLOCK_SIZE * shape.layer_kv_bytes)
        numbers = torch.empty(
            blocks, shape.kv_heads, BLOCK_SIZE, 2 * shape.head_size, dtype=DTYPE, device=device()
        )
        return cls(numbers.normal_())

    @property
    def caches(self) -> tuple[Tensor, ...]:
        return self.numbers.transpose(1, 2).chunk(2, -1)

    @property
    def slots_first(self) -> tuple[Tensor, ...]:
        blocks, kv_heads, slots, both = self.numbers.shape
        return self.numbers.view(blocks, slots, kv_heads, both).chunk(2, -1)

    def tables(self, length: int, rows: int, count: int) -> list[Tensor]:
        """`count` block tables int32 [rows, columns]; each row of each begins in its own part of the pool."""
        blocks = len(self.numbers)
        order = torch.randperm(blocks, device=device()).int()
        columns = torch.arange(triton.cdiv(length, BLOCK_SIZE), device=device())
        starts = torch.arange(rows * count, device=device()).view(rows, count, 1) * blocks // (rows * count)
        return [table.contiguous() for table in order[(starts + columns) % blocks].unbind(1)]


def view_of(shape: Shape) -> "View":
    from vllm_longctx.cuda.kernels.lambda_tile import View
    from vllm_longctx.geometry import Geometry

    return View(Geometry(N_GLOBAL, shape.trained, shape.trained), shape.head_size)


def turns(shape: Shape, view: "View", positions: Tensor) -> tuple[Any, Any]:
    """Cosines and sines that turn the queries at `positions` [n], and the first keys."""
    from vllm_longctx.rotary import Rotary, inverse_frequencies

    frequencies = inverse_frequencies(shape.head_size, {"rope_theta": shape.rope_theta})
    rotary = Rotary(shape.head_size, shape.head_size, True, frequencies)
    query_turn, key_turn = view.query_turn(positions), view.key_turn()
    assert query_turn is not None and key_turn is not None
    return tuple(tuple(t.to(device()) for t in rotary.cos_sin(by)) for by in (query_turn, key_turn))  # type: ignore[return-value]


def vllms_flash() -> Flash:
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    return partial(flash_attn_varlen_func, fa_version=get_flash_attn_version())


def flash_times(
    pool: Pool, query: Tensor, starts: list[int], length: int, short: int, tables: list[Tensor], shape: Shape
) -> dict[str, float]:
    """Milliseconds of vLLM's FlashAttention over `length` keys, in its sliding window of them, and over
    `short` keys.

    query [tokens, heads, head_size], starts: of each row's tokens in it, and their end. Empty without a GPU.
    """
    if not torch.cuda.is_available():
        return {}
    key, value = pool.slots_first
    longest = max(b - a for a, b in itertools.pairwise(starts))
    flash = partial(vllms_flash(), q=query, k=key, v=value, out=torch.empty_like(query), max_seqlen_q=longest)
    flash = partial(flash, cu_seqlens_q=integers(starts), softmax_scale=shape.scale, causal=True)

    def timed(keys: int, window: int | None = None) -> float:
        lens, sides = integers([keys] * (len(starts) - 1)), [-1, -1] if window is None else [window - 1, 0]
        call = partial(flash, seqused_k=lens, max_seqlen_k=keys, window_size=sides)
        return milliseconds([partial(call, block_table=table) for table in tables])

    return {
        "flash_ms": timed(length),
        "flash_window_ms": timed(length, shape.trained),
        "flash_short_ms": timed(short),
    }
