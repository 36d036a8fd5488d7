"""Table "Generation quality" of benchmarks/README.md: what is written after long texts against the texts
themselves.

    python benchmarks/quality.py --texts DIR --json OUT.json --plot OUT.png

The protocol of LM-Infinite (arXiv 2308.16137) and its code: after each milestone length 100 tokens are
written by greedy decoding and compared with the text's own next 100 tokens, by BLEU (sacrebleu, of all
prompts together) and ROUGE-LSum (rouge-score, mean F1), both from 0 to 100 and with a 95 % interval over
prompts. Every text is read from several places, evenly spread; a prompt is the tokenizer's first token and
then the text. All methods read the same prompts, except that plain (stock vLLM, its RoPE table enlarged so
that it can run past the trained length at all) is quadratic and stops at `--plain-tokens`.
"""

import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from load import greedy
from rich.console import Console
from rich.table import Table
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU
from texts import read_all
from transformers import AutoTokenizer

from vllm_longctx.cli.engine import (
    METHODS,
    Job,
    method_engine,
    model_path,
    parse_lengths,
    parse_methods,
    run_jobs,
)
from vllm_longctx.cli.options import JsonOut
from vllm_longctx.cli.output import errors_for_users, plot, write_json
from vllm_longctx.cli.score import tokenize

WRITTEN = 100
AT_ONCE = 16
METRICS = ("BLEU", "ROUGE-LSum")


@dataclass(frozen=True)
class Figure:
    """A metric and half the width of its 95 % interval over prompts."""

    value: float
    error: float


def starts(name: str, tokens: int, longest: int, count: int) -> list[int]:
    """Where to read a text from so that `longest` and then WRITTEN tokens follow.

    Raises ValueError if it is too short.
    """
    room = tokens - longest - WRITTEN
    if room < 0:
        raise ValueError(
            f"{name} has {tokens:,} tokens, but {longest + WRITTEN:,} are needed; lower --lengths"
        )
    return [room * k // max(count - 1, 1) for k in range(count)]


def prompt_and_truth(tokens: list[int], start: int, length: int) -> tuple[list[int], list[int]]:
    """`length` tokens of the text from `start` on, the text's first token in place of the first of them; what
    follows.
    """
    end = start + length
    return [tokens[0], *tokens[start + 1 : end]], tokens[end : end + WRITTEN]


def write_on(tokens: list[int], start: int, lengths: list[int]) -> Job[list[list[int]]]:
    """Tokens written after each length; a longer prompt finds the shorter one in the prefix cache."""
    params = greedy(WRITTEN)
    written = []
    for length in lengths:
        (output,) = yield [(prompt_and_truth(tokens, start, length)[0], params)]
        written.append(list(output.outputs[0].token_ids))
    return written


def compare(written: list[str], truth: list[str]) -> dict[str, Figure]:
    """METRICS of texts against the true ones."""
    bleu = BLEU().corpus_score(written, [truth], n_bootstrap=1000)
    rouge = RougeScorer(["rougeLsum"])
    scores = [100 * rouge.score(t, w)["rougeLsum"].fmeasure for t, w in zip(truth, written, strict=True)]
    error = 1.96 * statistics.stdev(scores) / len(scores) ** 0.5
    return {"BLEU": Figure(bleu.score, bleu._ci), "ROUGE-LSum": Figure(statistics.fmean(scores), error)}


def main(
    texts: Annotated[
        Path | None, typer.Option(help="Directory of .txt files to read beside the Python topics.")
    ] = None,
    model: str = "booklm",
    lengths: Annotated[
        str, typer.Option(help="Milestones: tokens read.")
    ] = "256,512,1024,2048,4096,8192,16384",
    places: Annotated[int, typer.Option(help="Places that every text is read from.", min=2)] = 8,
    methods: str = ",".join(METHODS),
    plain_tokens: Annotated[
        int, typer.Option(help="Plain attention is quadratic: read only so many.")
    ] = 4096,
    json_out: JsonOut = None,
    plot_out: Annotated[Path | None, typer.Option("--plot", help="ROUGE-LSum against length.")] = None,
    dtype: str = "float32",
) -> None:
    with errors_for_users():
        milestones, configs = parse_lengths(lengths), parse_methods(methods)
        reads = {m: [n for n in milestones if c is not None or n <= plain_tokens] for m, c in configs.items()}
        if not all(reads.values()):
            raise ValueError(
                f"--plain-tokens {plain_tokens} leaves none of --lengths {lengths} for plain; raise it"
            )
        tokens = {name: tokenize(model, text, None) for name, text in read_all(texts).items()}
        places_of = {name: starts(name, len(ids), milestones[-1], places) for name, ids in tokens.items()}
    tokenizer = AutoTokenizer.from_pretrained(model_path(model))
    samples = [(tokens[name], start) for name, some in places_of.items() for start in some]
    kwargs: dict[str, Any] = {
        "dtype": dtype,
        "max_num_seqs": AT_ONCE,
        "enforce_eager": True,
        "enable_prefix_caching": True,
    }
    result: dict[str, dict[int, dict[str, Figure]]] = {}
    for method, read in reads.items():
        config = configs[method]
        with method_engine(model, config, read[-1] + WRITTEN, max_num_batched_tokens=2048, **kwargs) as (
            engine,
            _,
        ):
            written = run_jobs(
                engine, [write_on(ids, start, read) for ids, start in samples], method, AT_ONCE
            )
        result[method] = {}
        for number, length in enumerate(read):
            truth = [prompt_and_truth(ids, start, length)[1] for ids, start in samples]
            ours = tokenizer.batch_decode([w[number] for w in written], skip_special_tokens=True)
            result[method][length] = compare(ours, tokenizer.batch_decode(truth, skip_special_tokens=True))
    for metric in METRICS:
        print_table(metric, milestones, result)
    rows = [
        {"method": method, "length": length, "metric": metric, **asdict(figure)}
        for method, by_length in result.items()
        for length, figures in by_length.items()
        for metric, figure in figures.items()
    ]
    write_json(json_out, {"model": model, "prompts": len(samples), "rows": rows})
    if plot_out is not None:
        curves = {
            m: (list(by_length), [f["ROUGE-LSum"].value for f in by_length.values()])
            for m, by_length in result.items()
        }
        plot(plot_out, curves, "tokens read", "ROUGE-LSum")


def print_table(metric: str, milestones: list[int], result: dict[str, dict[int, dict[str, Figure]]]) -> None:
    table = Table("tokens read", *result, title=f"{metric} of {WRITTEN} tokens written, ± 95 % interval")
    for length in milestones:
        figures = [
            by_length[length][metric] if length in by_length else None for by_length in result.values()
        ]
        table.add_row(
            f"{length:,}", *("" if f is None else f"{f.value:.2f} ± {f.error:.2f}" for f in figures)
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    typer.run(main)
