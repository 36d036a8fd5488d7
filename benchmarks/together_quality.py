"""Table "Methods together" of benchmarks/README.md: Λ attention, a memory and Temp-LoRA, alone and together.

    python benchmarks/together_quality.py --texts DIR --json OUT.json --plot OUT.png

Every method runs on one model, which has memory layers, through the real engine:

- perplexity by position: of the books, the .txt files of DIR, and of two manuals, the Python documentation
  topics and what torch says of its functions. Geometric means.
- pass keys told from outside of all windows (`vllm-longctx passkey`). Who learns, learns the prompt.
- KV: what a text holds at most while it is read, in bytes per token of it.
- tokens read per second, one text at a time, training included.

The goal is that a memory with Temp-LoRA is at least as good as the better of the two alone, in every row. A
row is void where one of these three has no figure: because a premise of it does not hold, such as that every
block was trained, or because it was refused.

Results are written when a method is done. A run with the same sizes adds to the file that is there.
"""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from focused import key_question
from focused_methods import bytes_per_block
from focused_report import Report, Row, Scale, averages
from perplexity import ALL, buckets_by_way
from rich.console import Console
from rich.table import Table
from texts import python_topics, read_directory, torch_functions

from vllm_longctx.cli.engine import (
    LEARNS,
    PeakBlocks,
    PremiseError,
    blocks_are_trained,
    method_engine,
    parse_lengths,
    parse_methods,
    run_jobs,
    tokenizer_of,
)
from vllm_longctx.cli.options import JsonOut
from vllm_longctx.cli.output import errors_for_users, plot, tables, write_json
from vllm_longctx.cli.passkey import ANSWER_TOKENS, TRIALS_AT_ONCE, Task, Trial, windows
from vllm_longctx.cli.score import Score, blocks_of_prompt, score_in, tokenize

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

MODEL = Path(__file__).parent / "booklm-memory"
BOTH, PARTS = "memory+temp-lora", ("memory", "temp-lora")
WAYS = ("lambda", *PARTS, "lambda+temp-lora", BOTH)
ATTENTION = {"lambda": "lm_infinite", "memory": "focused", "temp-lora": "none"}
RECIPE = '{"rank": 8, "learning_rate": 5e-4, "block_tokens": 128}'  # booklm's
CHUNK = 512  # a memory's steps are no longer; KV of tokens in flight counts, so others' are not either
PERPLEXITY, KV = "perplexity", "KV, bytes per token"
WRITTEN = 2  # tokens after each text, so that what it holds at its end is seen, too

Texts = dict[str, dict[str, list[int]]]  # token ids by kind and name


class Goal(NamedTuple):
    """Of a row. value: The better part's. met: None where the row is void."""

    value: float | None
    met: bool | None


def configs(adaptation: Mapping[str, Any]) -> dict[str, dict[str, Any] | None]:
    """`additional_config["longctx"]` by way. No reading is helped by what another one has taught."""
    result: dict[str, dict[str, Any] | None] = {}
    for way in WAYS:
        attention = {"attention": {"method": ATTENTION[way.split("+")[0]]}}
        result[way] = (
            {**attention, "adaptation": {**adaptation, "cache_gib": 0}} if learns(way) else attention
        )
    return result


def learns(way: str) -> bool:
    return way.endswith("temp-lora")


def goal_of(measure: str, found: Mapping[str, float]) -> Goal:
    """found: A row's figures by way.

    A difference that the table does not show is none: engines compute the same text in other pieces.
    """
    if not {BOTH, *PARTS} <= {*found}:
        return Goal(None, None)
    better = min if measure.startswith((PERPLEXITY, KV)) else max
    value, both = better(found[part] for part in PARTS), round(found[BOTH], digits(measure))
    return Goal(value, better(round(value, digits(measure)), both) == both)


def digits(measure: str) -> int:
    return 2 if measure.startswith(PERPLEXITY) else 0


def main(
    texts: Annotated[Path, typer.Option(help="Directory of .txt files: books that the model never saw.")],
    model: str = str(MODEL),
    methods: Annotated[str, typer.Option(help="Some of these.")] = ",".join(WAYS),
    max_tokens: Annotated[int, typer.Option(help="Of each text.", min=2)] = 16_384,
    lengths: Annotated[str, typer.Option(help="Of prompts with a pass key, in tokens.")] = "1024,4096",
    trials: Annotated[int, typer.Option(help="Pass keys of each length.", min=1)] = 20,
    adaptation: Annotated[str, typer.Option(help="Keys of adaptation, as JSON.")] = RECIPE,
    seed: int = 0,
    dtype: str = "float32",
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes, to see that all runs.")] = False,
    json_out: JsonOut = None,
    plot_out: Annotated[Path | None, typer.Option("--plot", help="Draw perplexity by position.")] = None,
) -> None:
    if quick:
        max_tokens, lengths, trials = 768, "1024", 2
    with errors_for_users():
        known = configs(json.loads(adaptation))
        chosen = parse_methods(methods, known)
        sizes = parse_lengths(lengths)
        manuals = {"python topics": python_topics(), "torch functions": torch_functions()}
        read = {
            kind: {name: tokenize(model, text, max_tokens) for name, text in some.items()}
            for kind, some in {"books": read_directory(texts), "manuals": manuals}.items()
        }
        settings = {
            "texts": {kind: sorted(some) for kind, some in read.items()},
            "max_tokens": max_tokens,
            "lengths": sizes,
            "trials": trials,
            "adaptation": adaptation,
            "seed": seed,
            "dtype": dtype,
        }
        report = Report("together_quality", Scale("measure", "value", "", ""), settings, json_out, None)
        task, seen = Task(tokenizer_of(model)), windows(model, [known["lambda"], known["memory"]])
        asked = [t for size in sizes for t in task.trials(size, seen, trials, seed) if t.place == "outside"]
        if not asked:
            raise ValueError(f"--lengths {lengths}: no place is outside of the windows; give longer ones")
    longest = max(max_tokens, *(len(trial.prompt) + ANSWER_TOKENS for trial in asked)) + 2
    kwargs = {"dtype": dtype, "enforce_eager": True, "max_num_batched_tokens": CHUNK}
    for way, config in chosen.items():
        try:
            with method_engine(model, config, longest, max_num_seqs=TRIALS_AT_ONCE, **kwargs) as running:
                rows, void = measured(*running, way, read, asked)
        except (ValueError, OSError, RuntimeError) as e:  # RuntimeError: the engine's process ended
            report.refuse(model, way, e)
        else:
            report.add(model, way, rows=rows, void=void)
    if not show(report, Path(model).name, plot_out):
        raise typer.Exit(1)


def measured(
    engine: "LLMEngine", meter: PeakBlocks, way: str, texts: Texts, trials: list[Trial]
) -> tuple[list[Row], list[str]]:
    """The rows of which a way has figures, and why others are missing."""
    rows: list[Row] = []
    void = []
    for part in (lambda: reading(engine, meter, way, texts), lambda: keys_told(engine, way, trials)):
        try:
            rows += part()
        except PremiseError as e:
            void.append(str(e))
    return rows, void


def learning(
    engine: "LLMEngine", way: str, prompts: Sequence[int], written: int
) -> AbstractContextManager[None]:
    """Whether every block of prompts of so many tokens is trained within. written: After each, at most."""
    if not learns(way):
        return nullcontext()
    least = sum(blocks_of_prompt(engine, tokens)[0] for tokens in prompts)
    most = sum(blocks_of_prompt(engine, tokens + written)[1] for tokens in prompts)
    return blocks_are_trained(engine, least, most)


def reading(engine: "LLMEngine", meter: PeakBlocks, way: str, texts: Texts) -> list[Row]:
    """Perplexity by position, KV and speed. Raises PremiseError if a block was not trained."""
    options = LEARNS if learns(way) else None
    scores: dict[str, dict[str, Score]] = {kind: {} for kind in texts}
    for kind, some in texts.items():
        for name, ids in some.items():
            with learning(engine, way, [len(ids)], WRITTEN):
                scores[kind][name] = score_in(
                    engine, meter, ids, f"{way}: {name}", options=options, written=WRITTEN
                )
    nll = {kind: {name: score.nll for name, score in some.items()} for kind, some in scores.items()}
    rows: list[Row] = [
        {
            "measure": f"{PERPLEXITY} of {kind}, {bucket.start:,} – {bucket.end:,}",
            "value": math.exp(bucket.nll),
            "kind": kind,
            "end": bucket.end,
        }
        for kind, buckets in buckets_by_way(nll).items()
        for bucket in buckets[ALL]
    ]
    every = [score for some in scores.values() for score in some.values()]
    tokens = [len(score.nll) + 1 for score in every]
    held = bytes_per_block(engine, meter) * sum(score.kv_blocks_peak for score in every)
    seconds = sum(count / score.tokens_per_s for count, score in zip(tokens, every, strict=True))
    rows.append({"measure": KV, "value": held / sum(tokens)})
    rows.append({"measure": "tokens/s read", "value": sum(tokens) / seconds})
    return rows


def keys_told(engine: "LLMEngine", way: str, trials: list[Trial]) -> list[Row]:
    """Shares in percent, by length. Raises PremiseError if a block was not trained."""
    options = LEARNS if learns(way) else None
    jobs = [key_question(trial, False, options).job() for trial in trials]
    with learning(engine, way, [len(trial.prompt) for trial in trials], ANSWER_TOKENS):
        scores = run_jobs(engine, jobs, f"{way}: pass keys", TRIALS_AT_ONCE)
    keys = [{"measure": f"pass keys told, {len(trial.prompt):,} tokens, %"} for trial in trials]
    return [{**row, "value": 100 * row["exact"]} for row in averages(keys, scores, "exact")]


def show(report: Report, model: str, plot_out: Path | None) -> bool:
    """The table of all that is in the file, its goals added to the file, and the plot.

    Whether no row is void.
    """
    found = {way: {row["measure"]: row["value"] for row in report.rows(model, way)} for way in WAYS}
    found = {way: values for way, values in found.items() if values}
    measures = dict.fromkeys(measure for values in found.values() for measure in values)
    table = Table("", *found, "better part", f"{BOTH} as good", title=f"{model}, methods together")
    goals = {}
    for measure in measures:
        row = {way: values[measure] for way, values in found.items() if measure in values}
        goals[measure] = goal = goal_of(measure, row)
        values = [*map(row.get, found), goal.value]
        cells = ["" if value is None else f"{value:,.{digits(measure)}f}" for value in values]
        table.add_row(measure, *cells, {None: "void", True: "reached", False: "not reached"}[goal.met])
    tables().print(table)
    reasons = [
        f"{result['method']}: {why}"
        for result in report.results
        for why in [*result.get("void", []), *([result["refused"]] if "refused" in result else [])]
    ]
    for reason in reasons:
        Console().print(reason, highlight=False, markup=False)
    about = {**report.about, "results": report.results}
    write_json(report.json_out, {**about, "goals": {name: goal._asdict() for name, goal in goals.items()}})
    if plot_out is not None:
        plot(plot_out, curves(report, model), "position (tokens)", "perplexity", "log")
    return all(goal.met is not None for goal in goals.values())


def curves(report: Report, model: str) -> dict[str, tuple[list[float], list[float]]]:
    """Perplexity against the end of each bucket, by way and kind of text."""
    result: dict[str, tuple[list[float], list[float]]] = {}
    for way in WAYS:
        for row in (row for row in report.rows(model, way) if "end" in row):
            x, y = result.setdefault(f"{way}, {row['kind']}", ([], []))
            x.append(row["end"])
            y.append(row["value"])
    return result


if __name__ == "__main__":
    typer.run(main)
