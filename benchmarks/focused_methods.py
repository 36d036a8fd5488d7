"""The words that the tasks of focused.py share, and engines of the methods that they name."""

import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from focused_report import Report, Row, Scale

from vllm_longctx.cli.engine import METHODS, PeakBlocks, method_engine, parse_methods
from vllm_longctx.cli.output import errors_for_users
from vllm_longctx.cli.passkey import ANSWER_TOKENS

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

Config = dict[str, Any] | None

WRITTEN = ANSWER_TOKENS  # at most, by any task but speed


@dataclass(frozen=True)
class Methods:
    """What is compared: configurations by name, the longest text of each in tokens where it has a limit, and
    the engine.

    windows: the configurations whose windows pass keys are placed by, whatever is compared.
    """

    configs: dict[str, Config]
    windows: list[Config]
    up_to: dict[str, int]
    engine: dict[str, Any]

    @classmethod
    def parse(
        cls, methods: str, top_k: int, focused: str, branch: str, up_to: str, dtype: str, kv_gib: float
    ) -> "Methods":
        """Raises ValueError naming the option that says nothing of sense."""
        section = {"method": "focused", **keys_of("--focused", focused)}
        known: dict[str, Config] = {
            "plain": None,
            "lm-infinite": METHODS["lm-infinite"],
            "lm-infinite-top-k": {"attention": {"method": "lm_infinite", **keys_of("--branch", branch)}},
            "focused": {"attention": section},
            "focused-top-k": {"attention": {**section, "lookup": "top_k", "top_k": top_k}},
            "focused-blocks": {"attention": {**section, "lookup": "blocks", "top_k": top_k}},
        }
        limits = {}
        for word in up_to.split(",") if up_to else ():
            name, _, tokens = word.partition("=")
            if name not in known or not tokens.isdecimal():
                raise ValueError(
                    f"--up-to {up_to}: give methods and tokens such as plain=8192; methods: {','.join(known)}"
                )
            limits[name] = int(tokens)
        engine = {
            "dtype": dtype,
            "kv_cache_memory_bytes": int(kv_gib * 2**30),
            "max_num_batched_tokens": 2048,
        }
        return cls(parse_methods(methods, known), [known["lm-infinite"], known["focused"]], limits, engine)

    def within(self, name: str, tokens: int) -> bool:
        return tokens <= self.up_to.get(name, tokens)

    def longest(self, lengths: Iterable[int]) -> dict[str, int]:
        """Of texts of such lengths, by method. Raises ValueError where `--up-to` leaves none."""
        lengths = list(lengths)
        for name in self.configs:
            if not self.within(name, min(lengths)):
                raise ValueError(
                    f"--up-to {name}={self.up_to[name]} leaves it none; the shortest has {min(lengths)} "
                    f"tokens"
                )
        return {name: max(n for n in lengths if self.within(name, n)) for name in self.configs}

    def start(
        self, stack: ExitStack, report: Report, model: str, name: str, longest: int, **engine_kwargs: Any
    ) -> tuple["LLMEngine", PeakBlocks] | None:
        """A method's engine for prompts of up to `longest` tokens, until the stack ends; None if it was
        refused.
        """
        context = method_engine(model, self.configs[name], longest + WRITTEN, **self.engine, **engine_kwargs)
        try:
            return stack.enter_context(context)
        except (
            ValueError,
            OSError,
            RuntimeError,
        ) as e:  # RuntimeError: the engine's process ended while it started
            report.refuse(model, name, e)
            return None

    def measure(
        self,
        report: Report,
        model: str,
        longest: Mapping[str, int],
        rows: Callable[["LLMEngine", PeakBlocks, str, str], list[Row]],
        **engine_kwargs: Any,
    ) -> None:
        """`rows` of each method's engine, one after the other; it is given the model and the method, too."""
        for name in self.configs:
            with ExitStack() as stack:
                running = self.start(
                    stack, report, model, name, longest[name], enforce_eager=True, **engine_kwargs
                )
                if running is not None:
                    report.add(
                        model, name, attention=attention_of(running[0]), rows=rows(*running, model, name)
                    )


def keys_of(option: str, text: str) -> dict[str, Any]:
    try:
        keys = json.loads(text)
    except json.JSONDecodeError:
        keys = None
    if not isinstance(keys, dict):
        raise ValueError(f"""{option} {text}: give keys of `attention` as JSON, such as '{{"top_k": 5}}'""")
    return keys


def attention_of(engine: "LLMEngine") -> dict[str, Any]:
    return engine.vllm_config.additional_config["longctx"]["attention"]


def bytes_per_block(engine: "LLMEngine", meter: PeakBlocks) -> int:
    """Of a KV block in a group of layers, which is what the pool counts."""
    from vllm_longctx.engine.memory_kv import bytes_per_layer_block

    layer = bytes_per_layer_block(engine.vllm_config)
    pool = engine.vllm_config.cache_config.kv_cache_memory_bytes
    assert pool is not None  # every engine here is given one
    return layer * round(pool / meter.num_blocks / layer)


@dataclass(frozen=True)
class Comparison:
    """What a task is asked to compare, and where its results go."""

    models: list[str]
    ways: Methods
    dtype: str
    json_out: Path | None
    plot_out: Path | None

    def report(self, task: str, scale: Scale, **settings: Any) -> Report:
        """Raises ValueError as `Report` does."""
        return Report(task, scale, {**settings, "dtype": self.dtype}, self.json_out, self.plot_out)


def comparison(
    models: Annotated[
        list[str],
        typer.Argument(help="Model directories; `booklm` is the small one that ships with longctx."),
    ],
    methods: Annotated[str, typer.Option("--methods", help="Some of these, separated by commas.")],
    top_k: Annotated[
        int, typer.Option(help="Keys that a query head finds, for focused-top-k and focused-blocks.", min=1)
    ] = 32,
    focused: Annotated[
        str, typer.Option(help="Keys of `attention` for the focused methods, where the checkpoint has none.")
    ] = "{}",
    branch: Annotated[str, typer.Option(help="Keys of `attention` for lm-infinite-top-k.")] = '{"top_k": 5}',
    up_to: Annotated[
        str, typer.Option(help="Longest text in tokens by method: plain=8192,focused=131072")
    ] = "",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "float32",
    kv_gib: Annotated[float, typer.Option(help="Of each engine's pool.")] = 2,
    json_out: Annotated[
        Path | None, typer.Option("--json", help="Write the results to this file, or add to it.")
    ] = None,
    plot_out: Annotated[Path | None, typer.Option("--plot", help="Draw them.")] = None,
) -> Comparison:
    """Of the command line's words. Raises ValueError as `Methods.parse` does."""
    ways = Methods.parse(methods, top_k, focused, branch, up_to, dtype, kv_gib)
    return Comparison(models, ways, dtype, json_out, plot_out)


def task_command(app: typer.Typer, **defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a command of a task, a function of a `Comparison` and of the task's own options.

    The command has these options and those of `comparison`. defaults: of the latter, where the task has its
        own.
    """
    models, *shared = inspect.signature(comparison).parameters.values()
    shared = [p.replace(default=defaults.get(p.name, p.default)) for p in shared]

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        def command(**words: Any) -> None:
            with errors_for_users():
                compared = comparison(**{p.name: words.pop(p.name) for p in (models, *shared)})
            function(compared, **words)

        # Typer makes options of the parameters that it finds here.
        own = [*inspect.signature(function).parameters.values()][1:]
        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in (models, *own, *shared)]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        app.command(function.__name__, help=function.__doc__)(command)
        return function

    return decorate
