"""Table "Beside a long prompt" of benchmarks/README.md: what a long prompt costs others, and they cost it.

    python benchmarks/fairness.py --json OUT.json

**Waits**: while one request reads `--long` tokens, short ones come one after another. Each comes while a step
runs, and the next one `--every` steps later. Its time to the first token is in steps of the long prompt, of
which the engine is asked to read as many as it can: median of the same text's steps, read alone just before.
Beside it is how much longer the long prompt took.

**Keeps**: a prefix is read, then a request of `--passing` tokens goes by in a pool too small for both. Then
the prefix comes again, with another end. The tokens of it that were still cached are counted.
"""

import random
import statistics
import time
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any

import typer
from load import greedy, random_tokens
from rich.console import Console

from vllm_longctx.cli.engine import METHODS, PremiseError, running_engine
from vllm_longctx.cli.options import JsonOut
from vllm_longctx.cli.output import write_json

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

POOL_BLOCKS = 500  # 16,000 tokens, with blocks of 32


def read_long(
    engine: "LLMEngine", length: int, short: int, every: int, seed: str
) -> tuple[list[float], list[float]]:
    """Read one long prompt, with short requests beside it or, with `every` 0, without.

    Returns the seconds of each step, and those that each short request waited for its first token.
    """
    from vllm.inputs import tokens_input

    engine.add_request("long", tokens_input(random_tokens(engine, length, seed)), greedy(1))
    came: dict[str, float] = {}
    waits, marks, due = [], [time.perf_counter()], every
    while engine.has_unfinished_requests():
        outputs = engine.step()
        marks.append(now := time.perf_counter())
        waits += [now - came.pop(output.request_id) for output in outputs if output.request_id in came]
        if any(output.request_id == "long" for output in outputs):
            break
        due -= not came
        if every and due == 0:
            name, due = f"short {len(marks)}", every
            came[name] = now
            engine.add_request(name, tokens_input(random_tokens(engine, short, name)), greedy(1))
    while engine.has_unfinished_requests():
        engine.step()
    return [after - before for before, after in pairwise(marks)], waits


def cached_tokens(engine: "LLMEngine", prompt: list[int]) -> int:
    from vllm.inputs import tokens_input

    engine.add_request("cached", tokens_input(prompt), greedy(1))
    while True:
        for output in engine.step():
            if output.finished:
                return output.num_cached_tokens or 0  # type: ignore[union-attr]


def main(
    model: str = "booklm",
    long: Annotated[int, typer.Option(help="Tokens of the long prompt.")] = 200_000,
    short: Annotated[int, typer.Option(help="Tokens of each short one.")] = 32,
    every: Annotated[int, typer.Option(help="Steps between two short ones.")] = 5,
    prefix: int = 1500,
    passing: int = 100_000,
    rounds: int = 3,
    max_num_batched_tokens: int = 2048,
    dtype: str = "float32",
    json_out: JsonOut = None,
) -> None:
    random.seed(0)
    config = {"longctx": METHODS["lm-infinite"]}
    kwargs: dict[str, Any] = {
        "dtype": dtype,
        "enforce_eager": True,
        "max_num_batched_tokens": max_num_batched_tokens,
        "max_num_seqs": 4,
    }
    waits, losses = [], []
    with running_engine(model, config, long + 2, **kwargs) as (engine, _):
        read_long(engine, min(long, 4 * max_num_batched_tokens), short, 1, "warm up")
        for number in range(rounds):
            alone, _ = read_long(engine, long, short, 0, f"{number}")
            beside, waited = read_long(engine, long, short, every, f"{number}")
            if len(waited) < 5:
                raise PremiseError(f"only {len(waited)} short requests came; give a longer --long")
            step = statistics.median(alone)
            waits += [seconds / step for seconds in waited]
            losses.append(sum(beside) / sum(alone) - 1)
    pool = {"enable_prefix_caching": True, "block_size": 32, "num_gpu_blocks_override": POOL_BLOCKS}
    with running_engine(model, config, passing + prefix, **kwargs, **pool) as (engine, _):
        text = random_tokens(engine, prefix, "prefix")
        before = cached_tokens(engine, text)
        read_long(engine, passing, 0, 0, "passing")
        after = cached_tokens(engine, text + random_tokens(engine, short, "end"))
    if before:
        raise PremiseError(f"{before} tokens of the prefix were cached before anybody had read it")
    result = {
        "long": long,
        "short": short,
        "waits_in_steps": {"median": statistics.median(waits), "most": max(waits), "count": len(waits)},
        "long_prompt_loses": statistics.median(losses),
        "prefix": prefix,
        "passing": passing,
        "still_cached": after,
    }
    Console().print(result)
    write_json(json_out, result)


if __name__ == "__main__":
    typer.run(main)
