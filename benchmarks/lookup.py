"""Tables "Looking up a memory" of benchmarks/README.md: what finding the best keys costs, and how many
`blocks` finds.

    python benchmarks/lookup.py --texts DIR --json OUT.json --plot OUT.png --recall-plot RECALL.png

Cost: milliseconds of one query and layer (median over rounds, the ways in turn) with random keys in blocks
that lie anywhere in the pool, as after some traffic, against the length of the memory. `all` is vLLM's own
kernel over every key; the others find the best keys and attend to them. Prefill is one chunk.

Recall: the model reads every text of `--texts` in windows of its trained length. Each `--recall-lengths`
first tokens are the memory of the window that follows, whose queries see it as LongLLaMA does. recall@k is
the share of the k exactly best keys that were found, averaged over texts, layers, heads and queries; beside
it its lowest mean over a layer, and how many results were proven exact. `min/max` is the same choice of
blocks by Quest's bound. Keys read count all query heads of a KV head, for `top_k` those of a single query and
its KV head that reads most; they do not count the summaries, of which all are read.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from texts import read_all
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.utils.math_utils import cdiv
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from vllm_longctx.cli.engine import model_path
from vllm_longctx.cli.options import JsonOut
from vllm_longctx.cli.output import console, plot, write_json
from vllm_longctx.cli.score import tokenize
from vllm_longctx.cpu.kernels import retrieval
from vllm_longctx.cpu.kernels.retrieval import Codes, Memory, Pages, attend_best, best_blocks, recall, top_k
from vllm_longctx.cpu.kernels.scratch import as_kernel_caches, packed_order

BLOCK_SIZE = 32
WAYS = ("all", "top_k", "blocks")
PERCENTS = ("share", "keys_read", "recall", "lowest_recall", "proven", "min_max_recall", "top_k_read")


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    head_size: int

    @property
    def scale(self) -> float:
        return self.head_size**-0.5


def empty_memory(shape: Shape, length: int, dtype: torch.dtype, scattered: bool = False) -> Memory:
    """A memory of `length` tokens with nothing in it, in blocks that follow each other or lie anywhere."""
    blocks = cdiv(length, BLOCK_SIZE)
    cache = torch.zeros(blocks, shape.kv_heads, BLOCK_SIZE, 2 * shape.head_size, dtype=dtype)
    places = packed_order(BLOCK_SIZE, shape.head_size, dtype, isa(shape, dtype))
    codes = Codes.empty(blocks, shape.kv_heads, BLOCK_SIZE, shape.head_size)
    table = torch.randperm(blocks) if scattered else torch.arange(blocks)
    return Memory(Pages(cache, places), table, 0, length, codes)


def isa(shape: Shape, dtype: torch.dtype) -> str:
    return _get_attn_isa(dtype, BLOCK_SIZE, shape.head_size)


def kernel_attention(query: Tensor, memory: Memory, shape: Shape) -> Callable[[], Tensor]:
    """vLLM's kernel over all keys of the memory, for queries [T, heads, d] that see each of them (but for the
    causal end).
    """
    key_cache, value_cache = as_kernel_caches(memory.pages.cache)
    starts, seq_lens = (
        torch.tensor([0, len(query)], dtype=torch.int32),
        torch.tensor([memory.end], dtype=torch.int32),
    )
    batch: dict[str, Any] = {"query_start_loc": starts, "seq_lens": seq_lens, "causal": True}
    metadata = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=1,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_size,
        dtype=query.dtype,
        **batch,
        sliding_window_size=-1,
        isa=isa(shape, query.dtype),
        enable_kv_split=True,
        kv_cache_dtype="auto",
    )
    output, table = torch.empty_like(query), memory.block_table.int()[None]

    def attend() -> Tensor:
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=key_cache,
            value_cache=value_cache,
            output=output,
            **batch,
            scale=shape.scale,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=table,
            softcap=0.0,
            scheduler_metadata=metadata,
            s_aux=None,
        )
        return output

    return attend


def costs(
    shape: Shape, length: int, queries: int, k: int, share: float, dtype: torch.dtype, rounds: int
) -> dict[str, float]:
    """Milliseconds of one lookup and the attention over what it found, by way."""
    memory = empty_memory(shape, length, dtype, scattered=True)
    memory.pages.cache.normal_()
    assert memory.codes is not None
    memory.codes.summarise(memory.pages, memory.blocks)
    query = torch.randn(queries, shape.heads, shape.head_size).to(dtype)
    window = torch.zeros_like(query), torch.zeros(queries, shape.heads)
    ways: dict[str, Callable[[], Tensor]] = {
        "all": kernel_attention(query, memory, shape),
        "top_k": lambda: attend_best(query, memory, window, k, shape.scale),
        "blocks": lambda: attend_best(query, memory, window, k, shape.scale, share),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):  # the first one warms up
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if number:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def trained_keys(
    model: str, ids: list[int], lengths: list[int], layers: list[int] | None
) -> tuple[Shape, list[dict[str, Any]]]:
    """Un-rotated keys [longest, kv_heads, d] by layer, and after each length a window's queries, seen at the
    memory.
    """
    from transformers import AutoModelForCausalLM

    from vllm_longctx.rotary import Rotary, inverse_frequencies

    net = AutoModelForCausalLM.from_pretrained(model_path(model), dtype=torch.float32).eval()
    c = net.config
    window, longest = c.max_position_embeddings, max(lengths)
    starts = [n // window * window for n in lengths]
    if len(ids) < longest + window:
        raise SystemExit(
            f"a text has {len(ids):,} tokens, but {longest + window:,} are needed; lower --recall-lengths"
        )
    shape = Shape(c.num_attention_heads, c.num_key_value_heads, c.head_dim)
    rotary = Rotary(c.head_dim, c.head_dim, True, inverse_frequencies(c.head_dim, c.rope_parameters))
    collected: dict[tuple[int, str], list[Tensor]] = {}
    chosen = layers or list(range(c.num_hidden_layers))
    for layer in chosen:
        for name in "qk":
            into = collected.setdefault((layer, name), [])
            projection = getattr(net.model.layers[layer].self_attn, f"{name}_proj")
            projection.register_forward_hook(lambda module, inputs, out, into=into: into.append(out))
    windows = torch.tensor(ids[: longest // window * window + window]).view(-1, window)
    with torch.no_grad():
        for batch in track(windows.split(16), "reading", console=console):
            net.model(batch)
    found = []
    for layer in chosen:
        query, key = (
            torch.cat(collected[layer, name]).flatten(0, 1).unflatten(1, (-1, c.head_dim)) for name in "qk"
        )
        turned = {
            n: rotary.turn(query[s : s + window], torch.arange(window)[:, None])
            for n, s in zip(lengths, starts, strict=True)
        }
        found.append({"layer": layer, "key": key, "queries": turned})
    return shape, found


def recalls(
    shape: Shape, key: Tensor, query: Tensor, ks: list[int], shares: list[float]
) -> list[dict[str, float]]:
    """How much of the exact result each share of the blocks gives: key [S, kv_heads, d], query [T, heads,
    d].
    """
    memory = empty_memory(shape, len(key), torch.float32)
    assert memory.codes is not None
    caches = as_kernel_caches(memory.pages.cache)
    ops.cpu_attn_reshape_and_cache(
        key, torch.zeros_like(key), *caches, torch.arange(len(key)), isa(shape, torch.float32)
    )
    memory.codes.summarise(memory.pages, memory.blocks)
    rows = []
    for k in ks:
        exact = top_k(query, memory, k, shape.scale)
        alone = statistics.fmean(top_k(q, memory, k, shape.scale).keys_read for q in query.split(1)) / len(
            key
        )
        for share in shares:
            found = best_blocks(query, memory, k, shape.scale, share)
            rows.append(
                {
                    "k": k,
                    "share": share,
                    "keys_read": found.keys_read / len(key),
                    "recall": recall(found, exact).mean().item(),
                    "proven": found.proven.float().mean().item(),
                    "top_k_read": alone,
                    "min_max_recall": min_max_recall(key, query, exact.positions, share),
                }
            )
    return rows


def min_max_recall(key: Tensor, query: Tensor, best: Tensor, share: float) -> float:
    """The share of the `best` keys (positions [T, heads, k]) in the blocks with the highest bounds by minima
    and maxima.
    """
    whole = len(key) // BLOCK_SIZE * BLOCK_SIZE
    blocks = key[:whole].unflatten(0, (-1, BLOCK_SIZE))
    grouped = query.unflatten(1, (key.shape[1], -1))
    high = torch.einsum("tkgd,nkd->ktgn", grouped.clamp_min(0), blocks.amax(1))
    bounds = high + torch.einsum("tkgd,nkd->ktgn", grouped.clamp_max(0), blocks.amin(1))
    chosen = retrieval._in_turn(bounds, max(1, int(len(blocks) * share))).transpose(0, 1)
    read = torch.zeros(*chosen.shape[:2], len(blocks) + 1, dtype=torch.bool).scatter_(2, chosen, True)
    found = read.repeat_interleave(query.shape[1] // key.shape[1], 1).gather(2, best // BLOCK_SIZE)
    return found.float().mean().item()


def main(
    lengths: Annotated[
        str, typer.Option(help="Memory lengths in tokens.")
    ] = "1024,4096,16384,65536,131072,262144,1000000",
    prefill_lengths: Annotated[
        str, typer.Option(help="Of these a chunk is timed too; '' for none.")
    ] = "16384,131072",
    chunk: Annotated[int, typer.Option(help="Queries of a prefill chunk.")] = 512,
    k: Annotated[int, typer.Option(help="Keys to find, for the costs.")] = 64,
    share: Annotated[float, typer.Option(help="Of the blocks to read, for the costs.")] = 0.1,
    shape: Annotated[str, typer.Option(help="Query heads, KV heads, head size.")] = "8,4,32",
    dtype: str = "float32",
    rounds: int = 7,
    texts: Annotated[
        Path | None, typer.Option(help="Directory of .txt files for the recall; without it, none.")
    ] = None,
    model: str = "booklm",
    layers: Annotated[str, typer.Option(help="Layers whose keys are looked up; '' for all.")] = "",
    recall_lengths: str = "8192,32768,131072",
    recall_ks: str = "16,64,128",
    shares: Annotated[
        str, typer.Option(help="Of the blocks to read, for the recall.")
    ] = "0.01,0.02,0.05,0.1",
    queries: Annotated[int, typer.Option(help="Of a window, evenly spread, for the recall.")] = 32,
    json_out: JsonOut = None,
    plot_out: Annotated[Path | None, typer.Option("--plot", help="Cost against the memory's length.")] = None,
    recall_plot: Annotated[
        Path | None, typer.Option(help="Recall against the share of keys that may be read, longest memory.")
    ] = None,
) -> None:
    torch.manual_seed(0)
    size, kind = Shape(*integers(shape)), getattr(torch, dtype)
    plan = [(n, 1) for n in integers(lengths)] + [(n, chunk) for n in integers(prefill_lengths)]
    cost_rows = [
        {"length": n, "queries": t, **costs(size, n, t, k, share, kind, rounds if t == 1 else 1)}
        for n, t in track(plan, "timing", console=console)
    ]
    print_costs(cost_rows, k)
    recall_rows = []
    if texts is not None:
        recall_rows = all_recalls(
            model, texts, layers, integers(recall_lengths), integers(recall_ks), shares, queries
        )
        print_recalls(recall_rows)
    setting = {
        "shape": asdict(size),
        "dtype": dtype,
        "k": k,
        "share": share,
        "rounds": rounds,
        "model": model,
    }
    write_json(json_out, {**setting, "costs": cost_rows, "recalls": recall_rows})
    if plot_out is not None:
        decode = [r for r in cost_rows if r["queries"] == 1]
        curves = {way: ([r["length"] for r in decode], [r[way] for r in decode]) for way in WAYS}
        plot(plot_out, curves, "memory (tokens)", "milliseconds per query and layer", yscale="log")
    if recall_plot is not None and recall_rows:
        longest = [r for r in recall_rows if r["length"] == max(r["length"] for r in recall_rows)]
        curves = {
            f"{name}, k = {n}": (
                [r["share"] for r in longest if r["k"] == n],
                [r[key] for r in longest if r["k"] == n],
            )
            for n in integers(recall_ks)
            for name, key in (("7 bits", "recall"), ("min/max", "min_max_recall"))
        }
        plot(recall_plot, curves, "share of the memory's keys that may be read", "recall")


def all_recalls(
    model: str, texts: Path, layers: str, lengths: list[int], ks: list[int], shares: str, queries: int
) -> list[dict[str, float]]:
    """One row for each length, k and share: means over texts and layers, and the lowest of them."""
    names = [f.stem for f in sorted(texts.glob("*.txt"))]
    figures: dict[tuple[int, int, float], list[dict[str, float]]] = {}
    for name, text in read_all(texts).items():
        if name not in names:  # the Python topics are too short for the longest memories
            continue
        needed = max(lengths) + 4096
        shape, by_layer = trained_keys(
            model, tokenize(model, text, None)[:needed], lengths, integers(layers) or None
        )
        for found in track(by_layer, f"looking up in {name}", console=console):
            for length, window in found["queries"].items():
                query = window[torch.linspace(0, len(window) - 1, queries).long()]
                for row in recalls(
                    shape, found["key"][: length // len(window) * len(window)], query, ks, numbers(shares)
                ):
                    figures.setdefault((length, row["k"], row["share"]), []).append(row)
    rows = []
    for (length, k, share), some in figures.items():
        means = {
            n: statistics.fmean(r[n] for r in some)
            for n in ("keys_read", "recall", "proven", "top_k_read", "min_max_recall")
        }
        rows.append(
            {
                "length": length,
                "k": k,
                "share": share,
                **means,
                "lowest_recall": min(r["recall"] for r in some),
            }
        )
    return rows


def integers(listed: str) -> list[int]:
    return [int(x) for x in listed.split(",") if x]


def numbers(listed: str) -> list[float]:
    return [float(x) for x in listed.split(",") if x]


def print_costs(rows: list[dict[str, float]], k: int) -> None:
    table = Table("memory", "queries", *WAYS, title=f"milliseconds per layer, k = {k}")
    for r in rows:
        table.add_row(f"{r['length']:,}", f"{r['queries']}", *(f"{r[way]:,.2f}" for way in WAYS))
    Console(width=110).print(table)


def print_recalls(rows: list[dict[str, float]]) -> None:
    headers = ("memory", "k", "at most", "keys read", "recall", "lowest", "proven", "min/max", "top_k reads")
    table = Table(*headers, title="recall of `blocks`, %")
    for r in rows:
        percents = (r[n] for n in PERCENTS)
        table.add_row(f"{r['length']:,}", f"{r['k']}", *(f"{100 * x:.1f}" for x in percents))
    Console(width=110).print(table)


if __name__ == "__main__":
    typer.run(main)
