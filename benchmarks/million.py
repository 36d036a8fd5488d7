"""A million tokens in one request: NLL of each 100,000 against the same text read alone, KV blocks, resident
memory.

    python benchmarks/million.py --texts DIR --json OUT.json

Joins the .txt files of DIR (and the Python topics after them) until there are `--tokens` tokens.
"""

from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.console import Console
from rich.table import Table
from texts import read_all

from vllm_longctx.cli.engine import running_engine
from vllm_longctx.cli.options import JsonOut
from vllm_longctx.cli.output import write_json
from vllm_longctx.cli.score import score_in, tokenize


def worker_resident_bytes() -> int:
    """Resident memory of the engine's worker process."""
    children = psutil.Process().children(recursive=True)
    (worker,) = [p for p in children if "Worker" in p.name() or "Worker" in " ".join(p.cmdline())]
    return worker.memory_info().rss


def main(
    texts: Annotated[Path, typer.Option(help="Directory of .txt files.")],
    model: str = "booklm",
    tokens: int = 1_000_000,
    part_tokens: int = 100_000,
    max_num_batched_tokens: int = 2048,
    json_out: JsonOut = None,
) -> None:
    ids = tokenize(model, "\n".join(read_all(texts).values()), tokens)
    if len(ids) < tokens:
        raise SystemExit(f"{texts} and the Python topics hold {len(ids):,} tokens, fewer than {tokens:,}")
    resident: list[tuple[int, int]] = []  # (tokens read, bytes)

    def watch(read: int) -> None:
        resident.append((read, worker_resident_bytes()))

    def resident_at(read: int) -> int:
        return next(size for at, size in resident if at >= read)

    kwargs: dict[str, Any] = {
        "dtype": "float32",
        "max_num_batched_tokens": max_num_batched_tokens,
        "enforce_eager": True,
    }
    config = {"longctx": {"preset": "lm-infinite"}}
    with running_engine(model, config, tokens + 2, **kwargs) as (engine, meter):
        whole = score_in(engine, meter, ids, f"{tokens:,} tokens", each_step=watch)
        alone = [
            score_in(engine, meter, [ids[0], *ids[start + 1 : start + part_tokens]], f"from {start:,}").nll
            for start in range(0, tokens, part_tokens)
        ]
        block_size = engine.vllm_config.cache_config.block_size
    together = [
        whole.nll[max(start - 1, 0) : start + part_tokens - 1] for start in range(0, tokens, part_tokens)
    ]
    parts = [
        {"start": number * part_tokens, "nll": sum(a) / len(a), "nll_alone": sum(b) / len(b)}
        for number, (a, b) in enumerate(zip(together, alone, strict=True))
    ]
    table = Table("from token", "NLL", "NLL read alone", "difference", "worker MiB")
    for part in parts:
        row = f"{part['nll']:.4f}", f"{part['nll_alone']:.4f}", f"{part['nll'] - part['nll_alone']:+.4f}"
        table.add_row(f"{part['start']:,}", *row, f"{resident_at(part['start']) / 2**20:,.0f}")
    Console().print(table)
    growth = resident[-1][1] - resident_at(part_tokens)
    summary = {
        "tokens_per_s": whole.tokens_per_s,
        "kv_blocks_peak": whole.kv_blocks_peak,
        "block_size": block_size,
        "worker_growth_mib": growth / 2**20,
    }
    Console().print(summary)
    write_json(json_out, {"model": model, "config": whole.config, "parts": parts, **summary})


if __name__ == "__main__":
    typer.run(main)
