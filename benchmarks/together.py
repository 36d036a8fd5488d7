"""Long requests together in the memory of one window each: no preemption, each writing as it would alone.

    python benchmarks/together.py --json OUT.json

The pool has, for every request, the blocks of one window and of the first tokens, and for all of them the
blocks of one step's tokens. Texts are random tokens.
"""

from typing import Annotated, Any

import typer
from load import greedy, random_tokens
from rich.console import Console
from rich.progress import Progress
from vllm.utils.math_utils import cdiv

from vllm_longctx.cli.engine import running_engine
from vllm_longctx.cli.options import JsonOut
from vllm_longctx.cli.output import console, write_json


def main(
    model: str = "booklm",
    requests: int = 8,
    length: int = 100_000,
    written: Annotated[
        int, typer.Option(help="Enough that the first is still writing when the last has been read.")
    ] = 500,
    dtype: str = "float32",
    max_num_batched_tokens: int = 2048,
    json_out: JsonOut = None,
) -> None:
    from vllm.inputs import tokens_input

    n_global, n_local, block_size = 10, 512, 32  # booklm's preset
    window_blocks = cdiv(n_global, block_size) + cdiv(n_local - 1, block_size) + 1
    pool = requests * window_blocks + cdiv(max_num_batched_tokens, block_size) + 1
    config = {"longctx": {"attention": {"n_global": n_global, "n_local": n_local}}}
    kwargs: dict[str, Any] = {
        "dtype": dtype,
        "max_num_seqs": requests,
        "max_num_batched_tokens": max_num_batched_tokens,
        "num_gpu_blocks_override": pool,
        "block_size": block_size,
    }
    params = greedy(written)
    together = []
    with (
        running_engine(model, config, length + written, **kwargs) as (engine, meter),
        Progress(console=console) as progress,
    ):
        task = progress.add_task(f"{requests} requests of {length:,} tokens", total=requests * written)
        for number in range(requests):
            engine.add_request(str(number), tokens_input(random_tokens(engine, length, number)), params)
        lengths: dict[str, int] = {}
        while engine.has_unfinished_requests():
            outputs = engine.step()
            lengths.update((o.request_id, len(o.outputs[0].token_ids)) for o in outputs)
            together.append(sum(not o.finished for o in outputs))
            progress.update(task, completed=sum(lengths.values()))
    result = {
        "requests": requests,
        "tokens_read_each": length,
        "tokens_written": sorted(lengths.values()),
        "writing_at_once": max(together),
        "pool_blocks": pool - 1,
        "peak_blocks": meter.peak,
        "blocks_of_one_window": window_blocks,
        "blocks_of_the_text_in_stock_vllm": requests * cdiv(length + written, block_size),
        "preemptions": meter.preemptions,
    }
    Console().print(result)
    write_json(json_out, result)


if __name__ == "__main__":
    typer.run(main)
