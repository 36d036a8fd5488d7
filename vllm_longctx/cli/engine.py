"""Engines from the command line's words, their peak KV use, and requests in batches."""

import os
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vllm_longctx import BOOKLM
from vllm_longctx.cli.get_model import PACKAGES, fetched
from vllm_longctx.cli.output import console, counting

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from vllm import SamplingParams
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.llm_engine import LLMEngine

T = TypeVar("T")
Job = Generator[list[tuple[list[int], "SamplingParams"]], list["RequestOutput"], T]

SHUTDOWN_S = 60.0  # vLLM kills what has not ended by then; its own 5 s are short where cores are shared

# The ways to attend that the evaluations compare, as `additional_config["longctx"]`; None is stock vLLM.
METHODS: dict[str, dict[str, Any] | None] = {
    "lm-infinite": {"preset": "lm-infinite"},
    "streaming": {"preset": "streaming"},
    "window": {"attention": {"method": "lm_infinite", "n_global": 0}},
    "plain": None,
}
# Said aloud: a LongLLaMA checkpoint without a configuration is no stock vLLM.
STOCK: dict[str, Any] = {"longctx": {"attention": {"method": "none"}}}

# The options of a request that does.
LEARNS: dict[str, Any] = {"temp_lora": True}


class PremiseError(ValueError):
    """What a figure would rest on does not hold, so the figure is not given."""


def why_left_out() -> str | None:
    """Why vLLM does not load longctx, and what to do; None if it does."""
    names = os.environ.get("VLLM_PLUGINS")
    if not entry_points(group="vllm.general_plugins", name="longctx"):
        return (
            "longctx is not loaded: vllm-longctx is not installed for this Python, and vLLM finds only what "
            "is; pip install it"
        )
    if names is not None and "longctx" not in names.split(","):
        return (
            f"longctx is not loaded: VLLM_PLUGINS = {names!r} leaves it out, and vLLM then ignores its "
            f"configuration in silence; add longctx to it, or unset it"
        )
    return None


def allow_plugin() -> None:
    """Have vLLM load longctx, here and in the processes that are started from here: whoever runs a command of
    ours wants it.

    Raises ValueError if longctx is not installed.
    """
    if why_left_out() is not None and "VLLM_PLUGINS" in os.environ:
        os.environ["VLLM_PLUGINS"] = ",".join(["longctx", *os.environ["VLLM_PLUGINS"].split(",")])
    if (reason := why_left_out()) is not None:
        raise ValueError(reason)


def load_plugin() -> None:
    """`allow_plugin`, and load it now. To be called before vLLM's engine arguments are made.

    Raises ValueError if it is not loaded: then vLLM would ignore every configuration of ours.
    """
    allow_plugin()
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    if not hasattr(EngineArgs.create_engine_config, "__wrapped__"):
        raise ValueError(
            "longctx is not loaded: vLLM could not import it, as its log says, or had loaded its plugins "
            "before VLLM_PLUGINS named longctx; mend that, and start again"
        )


def model_path(model: str) -> str:
    """Raises ValueError for the name of a model that is to be fetched first."""
    if model not in PACKAGES or Path(model).exists():
        return BOOKLM if model == "booklm" else model
    path = fetched(model)
    if path is None:
        raise ValueError(f"{model} is not on this machine: type vllm-longctx get-model {model}")
    return str(path)


def tokenizer_of(model: str) -> "PreTrainedTokenizerBase":
    """One that does not warn of texts past the trained length."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_path(model), model_max_length=1 << 60)


def trained_tokens(model: str) -> int:
    """The length, in tokens, that a model was trained on."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    load_plugin()
    from vllm.engine.arg_utils import EngineArgs

    from vllm_longctx.models.properties import trained_length

    args = EngineArgs(model=model_path(model), additional_config=dict(STOCK))
    return trained_length(args.create_engine_config().model_config)


def longctx_config(longctx: str | None, preset: str | None) -> dict[str, Any]:
    """The flags as `additional_config`, checked. Raises LongContextError."""
    from vllm_longctx.config import KEY, LongContextConfig, checked_json
    from vllm_longctx.startup.engine_args import additional_config_from_flags

    value = None if longctx is None else checked_json(longctx)
    config = additional_config_from_flags(None, "longctx", value, preset)
    LongContextConfig.parse(config[KEY])
    return config


def adapts(additional_config: Mapping[str, Any]) -> bool:
    """Whether requests of this configuration can learn."""
    from vllm_longctx.config import KEY, LongContextConfig

    return LongContextConfig.parse(additional_config[KEY]).mode.adapts


@contextmanager
def running_engine(
    model: str, additional_config: Mapping[str, Any], max_model_len: int, **engine_kwargs: Any
) -> Iterator[tuple["LLMEngine", "PeakBlocks"]]:
    """A vLLM engine, by default for one sequence at a time, shut down at the end, and its meter of KV
    blocks.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    load_plugin()
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    meter = PeakBlocks()
    defaults = {"kv_cache_memory_bytes": 1 << 30, "max_num_seqs": 1, "enable_prefix_caching": False}
    engine_kwargs = {**defaults, **engine_kwargs}
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
        engine.engine_core.shutdown(timeout=SHUTDOWN_S)


TRAINER_COUNTS = ("blocks_trained", "train_failures", "trainer_restarts")


@contextmanager
def blocks_are_trained(engine: "LLMEngine", least: int, most: int | None = None) -> Iterator[None]:
    """Whether the engine's trainer trains `least` to `most` text blocks within, by default `least` exactly.

    A trainer that fails lets requests go on untrained (`on_failure: continue`), and faster than they would
    be. Raises PremiseError for another number of blocks, for a block that failed, and for a trainer that was
    started again.
    """
    before = trainer_counts(engine)
    yield
    trained, failures, restarts = (n - m for n, m in zip(trainer_counts(engine), before, strict=True))
    most = least if most is None else most
    if failures or restarts or not least <= trained <= most:
        wanted = f"{least}" if least == most else f"{least} to {most}"
        raise PremiseError(
            f"{trained} blocks were trained where {wanted} should be, {failures} failed, and the trainer was "
            f"started again {restarts} times; the log says why"
        )


def trainer_counts(engine: "LLMEngine") -> tuple[int, ...]:
    """TRAINER_COUNTS since the engine started."""
    values = {m.name: getattr(m, "value", 0) for m in engine.get_metrics()}
    return tuple(int(values[f"vllm:longctx_{name}"]) for name in TRAINER_COUNTS)


def method_engine(
    model: str, config: dict[str, Any] | None, max_model_len: int, **engine_kwargs: Any
) -> AbstractContextManager[tuple["LLMEngine", "PeakBlocks"]]:
    """`running_engine` for a value of METHODS.

    Stock vLLM's RoPE table is enlarged, or it could not read past the trained length at all.
    """
    if config is None:
        overrides = {"max_position_embeddings": max_model_len}
        return running_engine(model, STOCK, max_model_len, hf_overrides=overrides, **engine_kwargs)
    return running_engine(model, {"longctx": config}, max_model_len, **engine_kwargs)


def run_jobs(engine: "LLMEngine", jobs: Sequence[Job[T]], label: str, at_once: int) -> list[T]:
    """Runs at most `at_once` jobs at a time in one batched engine; what they return, in their order.

    A job yields requests, each (prompt, sampling parameters), and is sent their outputs when all of them are
    finished. With prefix caching on, a job's later requests find what its earlier ones have computed.
    """
    from vllm.inputs import tokens_input

    results: dict[int, T] = {}
    running: dict[int, dict[str, RequestOutput | None]] = {}  # a job's requests and the outputs there are
    waiting = iter(range(len(jobs)))

    def advance(number: int | None, outputs: list["RequestOutput"] | None) -> None:
        """Go on with a job; when it is done start the next one."""
        while number is not None:
            try:
                requests = next(jobs[number]) if outputs is None else jobs[number].send(outputs)
            except StopIteration as done:
                results[number] = done.value
                running.pop(number, None)
                number, outputs = next(waiting, None), None
                continue
            running[number] = {f"{number}/{k}": None for k in range(len(requests))}
            for request_id, (prompt, params) in zip(running[number], requests, strict=True):
                engine.add_request(request_id, tokens_input(prompt), params)
            return

    with counting() as progress:
        task = progress.add_task(label, total=len(jobs))
        for _ in range(at_once):
            advance(next(waiting, None), None)
        while running:
            for output in step(engine):
                if not output.finished:
                    continue
                number = int(output.request_id.partition("/")[0])
                running[number][output.request_id] = output
                outputs = [o for o in running[number].values() if o is not None]
                if len(outputs) == len(running[number]):
                    advance(number, outputs)
            progress.update(task, completed=len(results))
    return [results[number] for number in range(len(jobs))]


def step(engine: "LLMEngine") -> "Iterator[RequestOutput]":
    """The outputs of an engine's step; an engine of ours does not pool."""
    from vllm.outputs import PoolingRequestOutput

    return (output for output in engine.step() if not isinstance(output, PoolingRequestOutput))


class PeakBlocks:
    """Most KV blocks in use at the end of any step, steps, and preemptions, from vLLM's own statistics.

    graph_modes: steps by what they ran in ("FULL", "PIECEWISE", "NONE"), with `cudagraph_metrics` on a GPU.
    """

    def __init__(self) -> None:
        self.num_blocks = 0
        self.reset()

    def reset(self) -> None:
        self.usage = self.peak_usage = 0.0
        self.steps = 0
        self.preemptions = 0
        self.graph_modes: Counter[str] = Counter()

    @property
    def peak(self) -> int:
        return self._blocks(self.peak_usage)

    @property
    def held(self) -> int:
        """KV blocks in use at the end of the last step."""
        return self._blocks(self.usage)

    def _blocks(self, usage: float) -> int:
        return round(usage * (self.num_blocks - 1))  # vLLM's usage leaves out the null block

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
                    meter.usage = scheduler_stats.kv_cache_usage
                    meter.peak_usage = max(meter.peak_usage, meter.usage)
                    if scheduler_stats.cudagraph_stats is not None:
                        meter.graph_modes[scheduler_stats.cudagraph_stats.runtime_mode] += 1

        return Logger()


def parse_lengths(text: str, option: str = "--lengths", least: int = 1) -> list[int]:
    """Distinct lengths in ascending order. Raises ValueError for anything but numbers of at least `least`."""
    try:
        sizes = sorted({int(word) for word in text.split(",")})
    except ValueError:
        sizes = [least - 1]
    if sizes[0] < least:
        raise ValueError(f"{option} {text}: give numbers of tokens such as 512,1024")
    return sizes


def parse_methods(
    text: str, known: Mapping[str, dict[str, Any] | None] = METHODS
) -> dict[str, dict[str, Any] | None]:
    """Some of the known methods. Raises ValueError for any other name."""
    names = text.split(",")
    for name in names:
        if name not in known:
            raise ValueError(f"--methods {text}: unknown method {name!r}; methods: {', '.join(known)}")
    return {name: known[name] for name in names}


def read_text(path: Path) -> str:
    text = path.read_text(encoding="utf-8", errors="replace")
    if not text.strip():
        raise ValueError(f"{path} holds no text")
    return text
