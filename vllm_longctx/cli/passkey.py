"""`vllm-longctx passkey`: can a model still tell a number that it has read, and how far back?

Through the real engine.

The task of Landmark Attention (arXiv 2305.16300), worded as in LM-Infinite's code (arXiv 2308.16137): a
five-digit pass key stands somewhere in a text of filler sentences, and the text ends by asking for it.

Λ attention sees first tokens and window only. So every length is tried with the key *inside* the window of
all methods that are compared, and *outside* the window and the first tokens of all of them. Stepped windows
count as the prompt's last one, what stands before it being what a Focused Transformer needs its memory for.
Scores:

- exact: the share of trials in which the first number that greedy decoding writes is the key. Models that
  were not taught to follow instructions fail at this for other reasons than their memory.
- choice: ten random keys, the right one among them, are scored as the answer: log-probability after the text,
  less that after a text of the same length without a key (some numbers are likely anyway). The share in which
  the right one's score is highest; keys that tie share the point, so that chance is 10 %. It is about what
  the model knows, not about what it would write, and means the same for every model.
- gain: the score of the right key less the mean of the nine others, in nats; 0 where nothing is remembered.
"""

import os
import random
import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from vllm_longctx.cli.engine import (
    METHODS,
    STOCK,
    Job,
    load_plugin,
    longctx_config,
    method_engine,
    model_path,
    parse_lengths,
    parse_methods,
    run_jobs,
    tokenizer_of,
)
from vllm_longctx.cli.options import BatchedTokens, Dtype, EnforceEager, JsonOut, Longctx, Model, Preset
from vllm_longctx.cli.output import errors_for_users, plot, tables, write_json

if TYPE_CHECKING:
    from vllm.logprobs import Logprob
    from vllm.outputs import RequestOutput

    from vllm_longctx.geometry import Geometry

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
KEY = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"
ANSWER_TOKENS = 10
CHOICES = 10
PLACES = ("inside", "outside")
TIE = 1e-3  # nats; engines compute the same text in other pieces
TRIALS_AT_ONCE = 4
MAX_NUM_SEQS = 32


@dataclass(frozen=True)
class Trial:
    """A prompt, and the tokens key_start .. key_end - 1 of it that tell the key. keyless: filler only.

    choices: tokens of the answer for each of the keys.
    """

    place: str
    key: str
    prompt: list[int]
    keyless: list[int]
    key_start: int
    key_end: int
    choices: dict[str, list[int]]


@dataclass(frozen=True)
class Outcome:
    """What a model made of a trial; the scores are explained at the top of this file."""

    exact: bool
    choice: float
    gain: float


@dataclass(frozen=True)
class Row:
    """Means over the trials of one length and place.

    gain_error: standard error of the gain's mean, in nats.
    """

    length: int
    place: str
    trials: int
    exact: float
    choice: float
    gain: float
    gain_error: float


class Task:
    """Prompts of an exact number of tokens for one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.head = self.tokens(TASK)
        self.unit = self.after(TASK, FILLER)
        self.question = self.after(FILLER, QUESTION)

    def tokens(self, text: str) -> list[int]:
        ids = self.tokenizer(text)["input_ids"]
        return ids[:-1] if ids[-1] == self.tokenizer.eos_token_id else ids

    def after(self, before: str, text: str) -> list[int]:
        """Tokens of `text` as it follows `before`: where the space goes is the tokenizer's affair."""
        head, both = self.tokens(before), self.tokens(f"{before} {text}")
        if both[: len(head)] != head:
            raise ValueError(
                f"this tokenizer's tokens run across the end of {before!r}: passkey has no prompt for it"
            )
        return both[len(head) :]

    def trials(self, length: int, geometries: Sequence["Geometry"], count: int, seed: int) -> list[Trial]:
        """`count` trials of `length` tokens for each place that the length has.

        Raises ValueError if it is too short.

        Whole repetitions of the filler stand before the key, so that prompts share long prefixes.
        """
        result = []
        for place in PLACES:
            for number in range(count):
                rng = random.Random(f"{seed}/{length}/{place}/{number}")
                keys = [str(key) for key in rng.sample(range(10_000, 100_000), CHOICES)]
                sentence = self.after(FILLER, KEY.format(key=keys[0]))
                filler = length - len(self.head) - len(sentence) - len(self.question)
                if filler < 0:
                    raise ValueError(
                        f"length {length} is too short: the task alone takes {length - filler} tokens"
                    )
                befores = [
                    before
                    for before in range(0, filler + 1, len(self.unit))
                    if place_of(len(self.head) + before, len(sentence), length, geometries) == place
                ]
                if not befores:
                    break
                before = rng.choice(befores)
                start = len(self.head) + before
                prompt = [
                    *self.head,
                    *cycle(self.unit, before),
                    *sentence,
                    *cycle(self.unit, filler - before),
                    *self.question,
                ]
                keyless = [*self.head, *cycle(self.unit, filler + len(sentence)), *self.question]
                choices = {key: self.after(QUESTION, key) for key in keys}
                result.append(Trial(place, keys[0], prompt, keyless, start, start + len(sentence), choices))
        if not result:
            raise ValueError(
                f"length {length} has no place for a key inside or outside of all windows; give a longer one"
            )
        return result


def cycle(unit: list[int], tokens: int) -> list[int]:
    """`tokens` tokens of the repeated unit, its end last."""
    return (unit * (tokens // len(unit) + 1))[len(unit) - tokens % len(unit) :]


def place_of(key_start: int, key_tokens: int, length: int, geometries: Sequence["Geometry"]) -> str | None:
    """Whether all queries that write the answer see the whole key, none of them any of it, or else None."""
    sizes = [g.n_local for g in geometries if g.n_local is not None]
    if key_start >= length + ANSWER_TOKENS - 1 - min(sizes):
        return "inside"
    if key_start >= max(g.n_global for g in geometries) and key_start + key_tokens <= length - max(sizes):
        return "outside"
    return None


def ask(trial: Trial) -> Job[Outcome]:
    """The requests of one trial, and its outcome.

    Each prompt is computed once; the answers find it in the prefix cache.
    """
    from vllm import SamplingParams

    greedy, one = (SamplingParams(max_tokens=n, temperature=0) for n in (ANSWER_TOKENS, 1))
    written, _ = yield [(trial.prompt, greedy), (trial.keyless, one)]
    wanted: dict[tuple[int, ...], set[int]] = defaultdict(
        set
    )  # tokens to score after each beginning of an answer
    for tokens in trial.choices.values():
        for k, token in enumerate(tokens):
            wanted[tuple(tokens[:k])].add(token)
    logprobs = []
    for prompt in (trial.prompt, trial.keyless):
        outputs = yield [
            (
                [*prompt, *begun],
                SamplingParams(max_tokens=1, temperature=0, logprob_token_ids=list(ids), detokenize=False),
            )
            for begun, ids in wanted.items()
        ]
        scored = {begun: first_logprobs(output) for begun, output in zip(wanted, outputs, strict=True)}
        logprobs.append(
            {
                key: sum(scored[tuple(tokens[:k])][token].logprob for k, token in enumerate(tokens))
                for key, tokens in trial.choices.items()
            }
        )
    return outcome(trial.key, written.outputs[0].text, *logprobs)


def first_logprobs(output: "RequestOutput") -> "dict[int, Logprob]":
    logprobs = output.outputs[0].logprobs
    assert logprobs is not None  # they were asked for
    return logprobs[0]


def outcome(key: str, written: str, logprobs: dict[str, float], keyless: dict[str, float]) -> Outcome:
    """Scores from what was written and from the keys' log-probabilities after the text with the key and
    without it.
    """
    scores = {k: logprobs[k] - keyless[k] for k in logprobs}
    best = [k for k, score in scores.items() if score > max(scores.values()) - TIE]
    return Outcome(
        exact=tells(written, key),
        choice=(key in best) / len(best),
        gain=scores[key] - statistics.fmean(score for k, score in scores.items() if k != key),
    )


def tells(written: str, key: str) -> bool:
    """Whether the first number written is the key."""
    number = re.search(r"\d+", written)
    return number is not None and number[0] == key


def rows(trials: Sequence[Trial], outcomes: Sequence[Outcome]) -> list[Row]:
    groups: dict[tuple[int, str], list[Outcome]] = defaultdict(list)
    for trial, outcome in zip(trials, outcomes, strict=True):
        groups[len(trial.prompt), trial.place].append(outcome)
    return [
        Row(
            length,
            place,
            len(group),
            exact=statistics.fmean(o.exact for o in group),
            choice=statistics.fmean(o.choice for o in group),
            gain=statistics.fmean(gains := [o.gain for o in group]),
            gain_error=statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0,
        )
        for (length, place), group in groups.items()
    ]


def passkey(
    model: Model = "booklm",
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens.")] = "512,1024,2048,4096,8192,16384",
    trials: Annotated[int, typer.Option(help="Trials per length and place of the key.", min=1)] = 20,
    longctx: Longctx = None,
    preset: Preset = None,
    baseline: Annotated[bool, typer.Option(help="Ask stock vLLM, too.")] = False,
    methods: Annotated[str | None, typer.Option(help=f"Compare some of {','.join(METHODS)} instead.")] = None,
    stock_tokens: Annotated[
        int | None, typer.Option(help="Longest prompt for stock vLLM, which is quadratic.", min=1)
    ] = None,
    seed: int = 0,
    json_out: JsonOut = None,
    plot_out: Annotated[
        Path | None, typer.Option("--plot", help="Draw the share of right choices against length.")
    ] = None,
    dtype: Dtype = "auto",
    max_num_batched_tokens: BatchedTokens = 2048,
    enforce_eager: EnforceEager = False,
) -> None:
    """Test whether a model can tell a number that it has read, inside and outside of its window."""
    with errors_for_users():
        sizes = parse_lengths(lengths)
        configs = chosen_methods(methods, longctx, preset, baseline)
        geometries = windows(model, list(configs.values()))
        task = Task(tokenizer_of(model))
        everything = [trial for size in sizes for trial in task.trials(size, geometries, trials, seed)]
        limits = {name: stock_tokens if config is None else None for name, config in configs.items()}
        asked = {
            name: [t for t in everything if limit is None or len(t.prompt) <= limit]
            for name, limit in limits.items()
        }
        for name, some in asked.items():
            if not some:
                raise ValueError(
                    f"--stock-tokens {stock_tokens} leaves no length of {lengths} for {name}; raise it"
                )
        kwargs = {
            "dtype": dtype,
            "max_num_batched_tokens": max_num_batched_tokens,
            "enforce_eager": enforce_eager,
        }
        result = {
            name: evaluate(model, name, config, asked[name], **kwargs) for name, config in configs.items()
        }
    print_table({name: found for name, (found, _) in result.items()})
    parts = {
        name: {"rows": [asdict(r) for r in found], "config": config}
        for name, (found, config) in result.items()
    }
    write_json(
        json_out, {"model": model, "trials": trials, "seed": seed, "choices": CHOICES, "methods": parts}
    )
    if plot_out is not None:
        plot(
            plot_out,
            curves({name: found for name, (found, _) in result.items()}),
            "length (tokens)",
            "right choices (%)",
        )


def chosen_methods(
    methods: str | None, longctx: str | None, preset: str | None, baseline: bool
) -> dict[str, dict[str, Any] | None]:
    """`additional_config["longctx"]` by name, None for stock vLLM.

    Raises ValueError for flags that do not go together.
    """
    if methods is None:
        ours: dict[str, dict[str, Any] | None] = {"longctx": longctx_config(longctx, preset)["longctx"]}
        return {**ours, "stock vLLM": None} if baseline else ours
    if longctx is not None or preset is not None or baseline:
        raise ValueError("--methods names all that is compared; leave out --longctx, --preset and --baseline")
    return parse_methods(methods)


def windows(model: str, configs: Sequence[dict[str, Any] | None]) -> list["Geometry"]:
    """What queries see under `configs`, of stepped windows the prompt's last.

    If all are plain attention, a window of the trained length. Raises LongContextError.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    load_plugin()
    from vllm.engine.arg_utils import EngineArgs

    from vllm_longctx.geometry import Geometry
    from vllm_longctx.models.properties import trained_length
    from vllm_longctx.modes import Role
    from vllm_longctx.settings import active_settings

    result = []
    for config in configs:
        additional_config = STOCK if config is None else {"longctx": config}
        vllm_config = EngineArgs(
            model=model_path(model), additional_config=dict(additional_config)
        ).create_engine_config()
        active = active_settings(vllm_config)
        if active.mode.extends:
            steps = Role.WINDOW in active.mode.layers
            result.append(Geometry(0, active.memory.windows.last_tokens) if steps else active.geometry)
    return result or [Geometry(0, trained_length(vllm_config.model_config))]


def evaluate(
    model: str, name: str, config: dict[str, Any] | None, trials: list[Trial], **engine_kwargs: Any
) -> tuple[list[Row], dict[str, Any]]:
    """The rows of one method, and its configuration as the engine filled it in."""
    from vllm_longctx.settings import plugin_configs

    max_model_len = max(len(t.prompt) for t in trials) + ANSWER_TOKENS
    engine_kwargs = {"max_num_seqs": MAX_NUM_SEQS, "enable_prefix_caching": True, **engine_kwargs}
    with method_engine(model, config, max_model_len, **engine_kwargs) as (engine, _):
        outcomes = run_jobs(engine, [ask(t) for t in trials], name, TRIALS_AT_ONCE)
        return rows(trials, outcomes), plugin_configs(engine.vllm_config).get("longctx", {})


def print_table(result: dict[str, list[Row]]) -> None:
    """A row per length and place, a column per method."""
    table = Table(
        "length", "key", *result, title=f"Right choices of {CHOICES} keys, gain in nats, exact answers"
    )
    columns = [{(r.length, r.place): r for r in found} for found in result.values()]
    for length, place in sorted({key for column in columns for key in column}):
        cells = [cell(column.get((length, place))) for column in columns]
        table.add_row(f"{length:,}", place, *cells)
    output = tables()
    output.print(table)
    output.print(
        "inside, outside: whether the key is in the window of every method, or in none's window and first "
        "tokens. "
        f"Chance is {1 / CHOICES:.0%} right choices and a gain of 0.",
        highlight=False,
    )


def cell(row: Row | None) -> str:
    return "" if row is None else f"{row.choice:4.0%}  {row.gain:+.2f}  {row.exact:4.0%}"


def curves(result: dict[str, list[Row]]) -> dict[str, tuple[list[float], list[float]]]:
    """Right choices in percent against length, by method and place."""
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for name, found in result.items():
        for row in found:
            points[f"{name}, key {row.place}"].append((row.length, 100 * row.choice))
    return {name: ([x for x, _ in xy], [y for _, y in xy]) for name, xy in points.items()}
