"""Table "Preloaded libraries" of benchmarks/README.md: what LD_PRELOAD and a second core are worth here.

    python benchmarks/preload.py --json OUT.json

vLLM warns at every start on a CPU that libtcmalloc and libiomp are not preloaded. Here stock vLLM, Λ
attention and training steps run without them, with each, and with both; and with every core for vLLM's
threads, of which vLLM keeps one back. Each is a process of its own, round by round; medians over rounds. What
is not installed is left out: Debian has the package libtcmalloc-minimal4, PyPI has intel-openmp.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import typer
from lm_infinite import decode_speed, prefill_speed
from load import random_tokens
from rich.console import Console
from rich.table import Table

from vllm_longctx.cli.doctor import preloadable
from vllm_longctx.cli.engine import METHODS, PremiseError, method_engine, model_path
from vllm_longctx.cli.options import JsonOut
from vllm_longctx.cli.output import console, write_json

CONTEXT, WRITTEN = 2048, 128
MEASURES = ("stock prefill", "stock decode", "longctx prefill", "longctx decode", "training steps")


def variants(cores: int) -> dict[str, dict[str, str]]:
    """Environments, by what they differ in."""
    libraries = {name: path for name, path in preloadable().items() if path is not None}
    sets = [[], *([name] for name in libraries), [*libraries]]
    chosen = sets if len(libraries) > 1 else sets[: len(libraries) + 1]
    plain = {
        " + ".join(names) or "nothing": {"LD_PRELOAD": ":".join(libraries[name] for name in names)}
        for names in chosen
    }
    every_core = {"LD_PRELOAD": "", "VLLM_CPU_OMP_THREADS_BIND": f"0-{cores - 1}"}
    return plain | ({f"nothing, {cores} cores": every_core} if cores > 1 else {})


def measure(model: str, dtype: str) -> dict[str, float]:
    """Tokens/s of prefill and decode, and training steps per second, in this process's environment."""
    figures = {"training steps": training_steps(model, dtype)}
    for name, config in (("stock", None), ("longctx", METHODS["lm-infinite"])):
        kwargs: dict[str, Any] = {"dtype": dtype, "enforce_eager": True, "enable_prefix_caching": True}
        with method_engine(model, config, CONTEXT + 2 * WRITTEN, **kwargs) as (engine, _):
            decode_speed(engine, random_tokens(engine, CONTEXT, 0), 1, 16)
            texts = [random_tokens(engine, CONTEXT, number) for number in (1, 2, 3)]
            figures[f"{name} prefill"] = statistics.median(prefill_speed(engine, text) for text in texts)
            speeds = [decode_speed(engine, text, 1, WRITTEN) for text in texts]
            figures[f"{name} decode"] = statistics.median(speeds)
    return figures


def training_steps(model: str, dtype: str, steps: int = 8) -> float:
    """Of a trainer with one thread, as the engine starts it, on an example of 256 tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    from vllm_longctx.temp_lora.messages import Recipe
    from vllm_longctx.trainer.trainer import Trainer

    torch.set_num_threads(1)
    base = AutoModelForCausalLM.from_pretrained(model_path(model), dtype=getattr(torch, dtype))
    trainer, seconds = Trainer(base), []
    trainer.begin(1, Recipe(rank=8, alpha=8, epochs=1))
    tokens = torch.randint(3, 1000, (256,), generator=torch.Generator().manual_seed(0)).tolist()
    for version in range(1, steps + 1):
        began = time.perf_counter()
        trainer.train(1, version, tokens, 128)
        seconds.append(time.perf_counter() - began)
    return 1 / statistics.median(seconds[2:])


def main(
    model: str = "booklm",
    dtype: str = "float32",
    rounds: int = 3,
    child: Annotated[Path | None, typer.Option(hidden=True)] = None,
    json_out: JsonOut = None,
) -> None:
    if child is not None:
        child.write_text(json.dumps(measure(model, dtype)), encoding="utf-8")
        return
    cores = len(os.sched_getaffinity(0))
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory, "figures.json")
        for number in range(rounds):
            for name, environment in variants(cores).items():
                words = [sys.executable, __file__, "--model", model, "--dtype", dtype, "--child", str(out)]
                with console.status(f"round {number + 1}: {name}"):
                    done = subprocess.run(
                        words, env={**os.environ, **environment}, capture_output=True, text=True
                    )
                if done.returncode:
                    raise PremiseError(f"with {name} the engines ended with {done.stderr.strip()[-500:]}")
                for what, figure in json.loads(out.read_text(encoding="utf-8")).items():
                    found[name][what].append(figure)
    medians = {n: {w: statistics.median(v) for w, v in figures.items()} for n, figures in found.items()}
    table = Table("preloaded", *MEASURES, title="per second, and of what it is with nothing")
    for name, figures in medians.items():
        cells = (f"{figures[w]:,.1f} ({figures[w] / medians['nothing'][w]:.2f} ×)" for w in MEASURES)
        table.add_row(name, *cells)
    Console(width=140).print(table)
    write_json(
        json_out, {"model": model, "dtype": dtype, "rounds": rounds, "cores": cores, "medians": medians}
    )


if __name__ == "__main__":
    typer.run(main)
