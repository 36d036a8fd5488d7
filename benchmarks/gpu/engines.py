"""Whole engines of real shapes with random weights: stock vLLM (FlashAttention) and longctx, each a stage of
its own.

Both are vLLM as users start it, with the same pool of KV memory and prefix caching on. Stock vLLM's RoPE
table is enlarged, or it could not run past the trained length at all. Texts are random tokens.

Prefill is the time to the first token of one request. Decode is the median time between tokens of a batch at
once: its requests differ in all their tokens with stock vLLM, whose memory and traffic must be real, and in
their last ones, more than a window, with longctx, which sees no others but the first; what they share comes
from the prefix cache. A batch of one has read the text of the prefill. `common` marks the largest batch that
stock vLLM can hold at that length (LARGEST_BATCH at most). KV memory is the peak of the blocks in use, which
the whole row saw.
"""

import importlib.metadata
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu.kernels import Plan, shapes
from gpu.models import LARGEST_BATCH, RANDOM_WEIGHTS, WRITTEN, Shape, write_model
from gpu.report import CPU, QUICK
from lm_infinite import token_times
from load import add_requests, random_tokens

from vllm_longctx.cli.engine import METHODS, PeakBlocks, method_engine

if TYPE_CHECKING:
    from gpu.report import Record
    from gpu.run_all import Setting
    from vllm.v1.engine.llm_engine import LLMEngine

LENGTHS = (4096, 16384, 32768, 131072, 1 << 20)
LENGTHS_BY_SIZE: dict[str, tuple[int, ...]] = {CPU: (1024, 4096), QUICK: (32768,)}
LONG = 131072
STEPS = (4096, 8192)  # tokens of a step: what is measured, and vLLM's default on this card
BATCHED_TOKENS = STEPS[0]  # the goal for KV memory at 128K is beyond what the default allows (README.md)
MOST_SEQUENCES = 64


def engine_shape(setting: "Setting", number: int, thin_for: int | None) -> Shape:
    """thin_for: the length at which stock vLLM must be able to hold a request, at the cost of layers."""
    shape = shapes(setting)[number]
    return shape if thin_for is None else shape.thin(thin_for, setting.memory)


def engine_plan(setting: "Setting", number: int, method: str, thin_for: int | None = None) -> Plan:
    """The shortest texts first.

    Stock vLLM: those that fit, and at the window's length every batch that longctx runs.
    """
    shape, stock = engine_shape(setting, number, thin_for), method == "stock"
    lengths = LENGTHS_BY_SIZE.get(setting.size, (LONG,) if thin_for else LENGTHS)
    short = 0.95 * shape.window, shape.window  # the window's own length stands for those
    common = {
        n: shape.common_batch(n, setting.memory)
        for n in (shape.window, *lengths)
        if not short[0] < n < short[1]
    }
    every = sorted({1, LARGEST_BATCH, *(b for b in common.values() if b)})
    plan: Plan = []
    for n in sorted(common):
        if stock and not common[n]:
            continue
        batches = {1, common[n]} - {0}
        if n == shape.window:
            batches = {b for b in every if b <= common[n]}
        elif not stock:
            batches |= {LARGEST_BATCH}
        fixed = {"length": n, "window": shape.window, "layers": shape.layers}
        row = {"what": "prefill", **fixed, "batch": 1, "common": common[n] > 0}
        if n == LONG and not stock:
            row |= {f"blocks_at_{tokens}_a_step": shape.held_blocks(tokens) for tokens in STEPS}
        plan.append(row)
        plan += [{"what": "decode", **fixed, "batch": b, "common": b == common[n]} for b in sorted(batches)]
        if n == LONG and not stock and not thin_for:
            plan.append({"what": "most at once", **fixed, "batch": MOST_SEQUENCES, "common": False})
    return plan


def engine(
    record: "Record", plan: Plan, setting: "Setting", number: int, method: str, thin_for: int | None = None
) -> None:
    shape, stock = engine_shape(setting, number, thin_for), method == "stock"
    pool = shape.pool_bytes(setting.memory)
    if not stock:
        check_plugin()
    own = None if stock else shape.trained + 1024
    kwargs = {
        **RANDOM_WEIGHTS,
        "max_num_seqs": MOST_SEQUENCES,
        "max_num_batched_tokens": BATCHED_TOKENS,
        "enable_prefix_caching": True,
        "kv_cache_memory_bytes": pool,
        **setting.engine_kwargs,
    }
    if stock and setting.cuda:
        kwargs["attention_backend"] = "FLASH_ATTN"
    longest = max(row["length"] for row in plan) + 2 * WRITTEN
    with tempfile.TemporaryDirectory() as directory:
        model = write_model(shape, Path(directory))
        with method_engine(model, None if stock else METHODS["lm-infinite"], longest, **kwargs) as (
            llm,
            meter,
        ):
            config = llm.vllm_config
            record.note(
                model=shape.name,
                layers=shape.layers,
                weight_bytes=shape.weight_bytes,
                pool_bytes=pool,
                block_size=config.cache_config.block_size,
                runner="V2" if config.use_v2_model_runner else "V1",
                cuda_graphs=str(config.compilation_config.cudagraph_mode),
                fits_at_128k=shape.pool_bytes(setting.memory) // (LONG * shape.kv_bytes),
            )
            measure(record, plan, llm, meter, pool, own)


def check_plugin() -> None:
    """Raises RuntimeError where vLLM would not find longctx, and would run as if nothing had been asked of
    it.
    """
    if "longctx" not in importlib.metadata.entry_points(group="vllm.general_plugins").names:
        raise RuntimeError(
            "vLLM does not find the plugin: PYTHONPATH alone is not enough, install the project (see "
            "benchmarks/gpu/README.md)"
        )


def measure(
    record: "Record",
    plan: Plan,
    llm: "LLMEngine",
    meter: PeakBlocks,
    pool: int,
    own: int | None,
    written: int = WRITTEN,
) -> None:
    """own: tokens at the end of a prompt in which the requests of a batch differ; None for all."""
    decoding(llm, prompts_of(llm, random_tokens(llm, plan[0]["length"], "warm-up"), 2, None), 8)
    for row in plan:
        n, batch = row["length"], row["batch"]
        text = random_tokens(llm, n, f"text {n}")
        meter.reset()
        if row["what"] == "prefill":
            repeats = 3 if n <= 32768 else 1
            texts = [random_tokens(llm, n, f"text {n}, {number}") for number in range(repeats - 1)] + [text]
            seconds = statistics.median(token_times(llm, [t], 2)[0] for t in texts)
            found: dict[str, Any] = {"tokens_per_s": n / seconds, "ms": 1000 * seconds}
        else:
            tail = 1 if batch == 1 else own  # the text has just been read, and is in the prefix cache
            gap, at_once = decoding(llm, prompts_of(llm, text, batch, tail), written)
            found = {"tokens_per_s": at_once / gap, "ms": 1000 * gap, "at_once": at_once}
        void = why_void(row, found.get("at_once"), meter.preemptions)
        record.add(**row, **found, **void, kv_bytes=meter.peak_usage * pool, preemptions=meter.preemptions)


def why_void(row: dict[str, Any], at_once: int | None, preemptions: int) -> dict[str, str]:
    """`void`, with the reason, where a row is of another load than it says; else nothing."""
    if row["what"] == "decode" and at_once != row["batch"]:
        return {"void": f"{at_once} of {row['batch']} requests decoded at once"}
    if row["what"] != "most at once" and preemptions:
        return {"void": f"{preemptions} preemptions"}
    return {}


def prompts_of(llm: "LLMEngine", text: list[int], batch: int, own: int | None) -> list[list[int]]:
    own = len(text) if own is None else min(own, len(text))
    return [
        text[: len(text) - own] + random_tokens(llm, own, f"{len(text)}, {batch}, {number}")
        for number in range(batch)
    ]


def decoding(llm: "LLMEngine", prompts: Sequence[list[int]], written: int) -> tuple[float, int]:
    """Median seconds between steps in which most requests decode, and how many these are."""
    add_requests(llm, prompts, written)
    steps = []
    while llm.has_unfinished_requests():
        if outputs := llm.step():
            steps.append((time.perf_counter(), len(outputs)))
    gaps: dict[int, list[float]] = {}  # by how many requests decode in both steps around
    for (before, count), (after, next_count) in pairwise(steps):
        if count == next_count:
            gaps.setdefault(count, []).append(after - before)
    most = max(gaps)
    return statistics.median(gaps[most]), most
