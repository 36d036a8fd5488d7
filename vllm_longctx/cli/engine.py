"""What the commands share: an engine from the command line's words, its peak KV use, and plots."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from vllm_longctx import BOOKLM

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

console = Console(stderr=True)

Model = Annotated[str, typer.Option(help="Model directory or name; `booklm` is the small one that ships with longctx.")]
Longctx = Annotated[str | None, typer.Option(help="Configuration as JSON.")]
Preset = Annotated[str | None, typer.Option(help="Preset: lm-infinite (the default) or streaming.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
BatchedTokens = Annotated[int, typer.Option(help="Tokens computed in one step (a chunk of a long prompt).")]
EnforceEager = Annotated[bool, typer.Option(help="Skip compilation: starts sooner, runs slower.")]


@contextmanager
def errors_for_users() -> Iterator[None]:
    """A user's mistake is one line on stderr and exit code 2, not a traceback."""
    try:
        yield
    except (ValueError, OSError) as e:
        console.print(f"[bold red]error:[/] {e}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


def model_path(model: str) -> str:
    return BOOKLM if model == "booklm" else model


def longctx_config(longctx: str | None, preset: str | None) -> dict[str, Any]:
    """The flags as `additional_config`, checked. Raises LongContextError."""
    from vllm_longctx.config import KEY, LongContextConfig, checked_json
    from vllm_longctx.engine_args import additional_config_from_flags

    value = None if longctx is None else checked_json(longctx)
    config = additional_config_from_flags(None, "longctx", value, preset)
    LongContextConfig.parse(config[KEY])
    return config


@contextmanager
def running_engine(
    model: str, additional_config: Mapping[str, Any], max_model_len: int, **engine_kwargs: Any
) -> Iterator[tuple["LLMEngine", "PeakBlocks"]]:
    """A vLLM engine, by default for one sequence at a time, shut down at the end, and its meter of KV blocks."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    meter = PeakBlocks()
    engine_kwargs = {
        "kv_cache_memory_bytes": 1 << 30,
        "max_num_seqs": 1,
        "enable_prefix_caching": False,
        **engine_kwargs,
    }
    args = EngineArgs(
        model=model_path(model),
        additional_config=dict(additional_config),
        max_model_len=max_model_len,
        **engine_kwargs,
    )
    with console.status("starting vLLM"):
        engine = LLMEngine.from_engine_args(args, stat_loggers=[meter.logger])
    meter.num_blocks = engine.vllm_config.cache_config.num_gpu_blocks or 0
    try:
        yield engine, meter
    finally:
        engine.engine_core.shutdown()


class PeakBlocks:
    """Most KV blocks in use at the end of any step, steps, and preemptions, from vLLM's own statistics."""

    def __init__(self) -> None:
        self.num_blocks = 0
        self.reset()

    def reset(self) -> None:
        self.peak_usage = 0.0
        self.steps = 0
        self.preemptions = 0

    @property
    def peak(self) -> int:
        return round(self.peak_usage * (self.num_blocks - 1))  # vLLM's usage leaves out the null block

    def logger(self, vllm_config: Any, engine_index: int = 0) -> Any:
        from vllm.v1.metrics.loggers import StatLoggerBase

        meter = self

        class Logger(StatLoggerBase):
            def __init__(self) -> None: ...
            def log_engine_initialized(self) -> None: ...

            def record(self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any) -> None:
                if iteration_stats is not None:
                    meter.preemptions += iteration_stats.num_preempted_reqs
                if scheduler_stats is not None:
                    meter.steps += 1
                    meter.peak_usage = max(meter.peak_usage, scheduler_stats.kv_cache_usage)

        return Logger()


def read_text(path: Path) -> str:
    text = path.read_text(encoding="utf-8", errors="replace")
    if not text.strip():
        raise ValueError(f"{path} holds no text")
    return text


def plot(
    path: Path,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str,
    ylabel: str,
    yscale: str = "linear",
) -> None:
    """Curves by name, (x, y) each, drawn to a PNG, PDF or SVG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for name, (x, y) in curves.items():
        axes.plot(x, y, marker="o", markersize=3, label=name)
    axes.set(xlabel=xlabel, ylabel=ylabel, xscale="log", yscale=yscale)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
