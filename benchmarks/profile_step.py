"""Where a decode step's time goes: milliseconds per step by what is done (docs/evaluation.md).

    python benchmarks/profile_step.py

The engine runs in this process, so that Python's profiler sees the worker; its overhead is part of what is
printed.
"""

import cProfile
import os
import pstats
import random

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import typer
from load import greedy
from rich.console import Console
from rich.table import Table

from vllm_longctx.cli.engine import PremiseError, running_engine

PARTS = {
    "attention kernels": ["cpu_attention_with_kv_cache"],
    "matrix products": ["onednn_mm"],
    "compact tables": ["kernel_tables", "next_tables"],
    "scratch blocks": ["fill", "forget_written"],
    "rotary": ["_step_cos_sin", "_rotate_flat", "turn"],
    "the model's forward": ["_model_forward"],
    "the whole step": ["step"],
}


def milliseconds(stats: pstats.Stats, names: list[str], steps: int) -> float:
    """Cumulative time per step of the functions of these names.

    Raises PremiseError if none of them was called: they may have other names by now.
    """
    total, called = 0.0, False
    for (file, _, name), (_, _, _, cumulative, _) in stats.stats.items():  # type: ignore[attr-defined]
        ours_or_vllm = "longctx" in file or "vllm" in file
        if name in names and ours_or_vllm and not (name == "step" and not file.endswith("llm_engine.py")):
            total, called = total + cumulative, True
    if not called:
        raise PremiseError(f"no function of {', '.join(names)} was called")
    return 1000 * total / steps


def main(
    model: str = "booklm", context: int = 600, batch: int = 16, steps: int = 100, dtype: str = "float32"
) -> None:
    from vllm.inputs import tokens_input

    params = greedy(steps + 40)
    config = {"longctx": {"preset": "lm-infinite"}}
    kwargs = {"dtype": dtype, "enforce_eager": True, "max_num_seqs": batch}
    with running_engine(model, config, context + steps + 50, **kwargs) as (engine, _):
        for number in range(batch):
            prompt = [random.randrange(3, 4000) for _ in range(context)]
            engine.add_request(str(number), tokens_input(prompt), params)
        for _ in range(30):  # prompts, and steps to warm up
            engine.step()
        profile = cProfile.Profile()
        profile.enable()
        for _ in range(steps):
            engine.step()
        profile.disable()
        while engine.has_unfinished_requests():
            engine.step()
    stats = pstats.Stats(profile)
    table = Table("part", "ms per step", title=f"decode, batch {batch}, context {context}, eager, {dtype}")
    for part, names in PARTS.items():
        table.add_row(part, f"{milliseconds(stats, names, steps):.2f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
