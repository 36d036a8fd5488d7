"""Table "Reading past the trained length" of benchmarks/README.md: NLL per token by position, for each way to
attend.

    python benchmarks/perplexity.py --texts DIR --json OUT.json --plot OUT.png

Reads the .txt files of DIR and the Python documentation topics through the real engine, in float32 by
default:

- lm-infinite, streaming: the presets.
- window: the last tokens only, no first tokens.
- plain: stock vLLM, its RoPE table enlarged so that it can run past the trained length at all.
- fresh windows: stock vLLM inside the trained length: every token is scored in a window that starts with the
  tokenizer's first token, windows half the trained length apart, so that every token has at least half a
  window before it.

`--n-local 4096,2048` adds lm-infinite with these windows. The JSON file is written after every way and every
text. The same command goes on with what is in it.
"""

import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from texts import read_all, read_directory

from vllm_longctx.cli.engine import (
    METHODS,
    PremiseError,
    method_engine,
    parse_lengths,
    parse_methods,
    trained_tokens,
)
from vllm_longctx.cli.options import JsonOut
from vllm_longctx.cli.output import errors_for_users, plot, write_json
from vllm_longctx.cli.score import Bucket, Score, score_in, scoring_params, tokenize

FRESH = "fresh windows"
ALL = "all texts"


def score_fresh_windows(
    model: str, texts: dict[str, list[int]], trained: int, **kwargs: Any
) -> Iterator[tuple[str, list[float]]]:
    """NLL of every token after the first, each scored in a fresh window; by text."""
    from vllm.inputs import tokens_input

    half = trained // 2
    params = scoring_params()
    # One more for the token that every request must generate.
    with method_engine(model, None, trained + 1, max_num_seqs=16, **kwargs) as (engine, _):
        for name, tokens in texts.items():
            nll = [math.nan] * (len(tokens) - 1)  # what no window scores would else make the mean better
            starts = range(0, max(len(tokens) - half, 1), half)
            for start in starts:
                window = [tokens[0], *tokens[start + 1 : start + trained]]
                engine.add_request(str(start), tokens_input(window), params)
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if not output.finished:
                        continue
                    start = int(output.request_id.split("-")[0])
                    scored = output.prompt_logprobs.logprobs
                    skip = half - 1 if start else 0
                    for offset, logprob in enumerate(scored[skip:], start + skip):
                        nll[offset] = -logprob
            if any(map(math.isnan, nll)):
                raise PremiseError(f"fresh windows left tokens of {name} without a score")
            yield name, nll


def main(
    texts: Annotated[
        Path | None, typer.Option(help="Directory of .txt files to read beside the Python topics.")
    ] = None,
    topics: Annotated[bool, typer.Option(help="Read the Python topics, too.")] = True,
    model: str = "booklm",
    max_tokens: int = 32768,
    plain_tokens: Annotated[
        int, typer.Option(help="Plain attention is quadratic: read only so many.")
    ] = 32768,
    ways: Annotated[str, typer.Option(help="Some of these.")] = ",".join([FRESH, *METHODS]),
    n_local: Annotated[str | None, typer.Option(help="Windows of further lm-infinite.")] = None,
    json_out: JsonOut = None,
    plot_out: Annotated[Path | None, typer.Option("--plot")] = None,
    dtype: str = "float32",
) -> None:
    with errors_for_users():
        configs = chosen_ways(ways, n_local)
        if texts is None and not topics:
            raise ValueError("--no-topics without --texts leaves nothing to read")
        books = read_all(texts) if topics else read_directory(texts)
        tokens = {name: tokenize(model, text, max_tokens) for name, text in books.items()}
        trained = trained_tokens(model)
    kwargs: dict[str, Any] = {"dtype": dtype, "max_num_batched_tokens": 2048, "enforce_eager": True}
    about = {"model": model, "dtype": dtype, "max_tokens": max_tokens, "plain_tokens": plain_tokens}
    with errors_for_users():
        table = read_before(json_out, about)
    for way, config in configs.items():
        rows = table.setdefault(way, {})
        unread = {name: t for name, t in tokens.items() if name not in rows}
        for name, nll in read(model, way, config, unread, plain_tokens, trained, kwargs):
            rows[name] = Score(nll, 0.0, 0, {}).buckets(None)
            write_json(json_out, {**about, "nll": as_json({w: with_mean(r) for w, r in table.items()})})
    shown = {way: with_mean({name: table[way][name] for name in tokens}) for way in configs}
    for name in [ALL, *tokens]:
        print_table(name, {way: rows[name] for way, rows in shown.items()})
    if {"lm-infinite", FRESH} <= {*shown}:
        pairs = [zip(shown["lm-infinite"][t], shown[FRESH][t], strict=True) for t in tokens]
        worst = max(ours.nll - fresh.nll for buckets in pairs for ours, fresh in buckets)
        Console().print(f"lm-infinite is at most {worst:.3f} nats above {FRESH} in any bucket of any text")
    if plot_out is not None:
        curves = {w: ([b.end for b in rows[ALL]], [b.nll for b in rows[ALL]]) for w, rows in shown.items()}
        plot(plot_out, curves, "position (tokens)", "NLL (nats per token)")


def read(
    model: str,
    way: str,
    config: dict[str, Any] | None,
    texts: dict[str, list[int]],
    plain_tokens: int,
    trained: int,
    kwargs: dict[str, Any],
) -> Iterator[tuple[str, list[float]]]:
    """The NLL of each token after the first, by text, as soon as a text is read."""
    if not texts:
        return
    if way == FRESH:
        yield from score_fresh_windows(model, texts, trained, **kwargs)
        return
    longest = max(map(len, texts.values()))
    limit = min(longest, plain_tokens) if config is None else longest
    with method_engine(model, config, limit + 2, **kwargs) as (engine, meter):
        for name, tokens in texts.items():
            yield name, score_in(engine, meter, tokens[:limit], f"{way}: {name}").nll


def read_before(path: Path | None, about: dict[str, Any]) -> dict[str, dict[str, list[Bucket]]]:
    """Buckets by way and text from the file of a run that was broken off.

    Raises ValueError if it was made with other settings.
    """
    if path is None or not path.is_file():
        return {}
    before = json.loads(path.read_text())
    nll = before.pop("nll", {})
    if before != about:
        raise ValueError(f"--json {path} was made with {before}, not {about}: give another file")
    return {
        way: {name: [Bucket(**b) for b in rows] for name, rows in texts.items() if name != ALL}
        for way, texts in nll.items()
    }


def chosen_ways(ways: str, n_local: str | None) -> dict[str, dict[str, Any] | None]:
    """Configurations by way, in order. Raises ValueError for an unknown one."""
    known: dict[str, dict[str, Any] | None] = {FRESH: None, **METHODS}
    chosen = parse_methods(ways, known)
    for window in parse_lengths(n_local, "--n-local")[::-1] if n_local else []:
        config = {"preset": "lm-infinite", "attention": {"n_local": window}}
        chosen[f"lm-infinite {window:,}"] = config
    return chosen


def buckets_by_way(nll: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, list[Bucket]]]:
    """Buckets per way and text, and under ALL their mean."""
    return {
        way: with_mean({name: Score(values, 0.0, 0, {}).buckets(None) for name, values in by_text.items()})
        for way, by_text in nll.items()
    }


def with_mean(by_text: dict[str, list[Bucket]]) -> dict[str, list[Bucket]]:
    """Also the mean, under ALL, of the buckets that all texts have."""
    columns = [{(b.start, b.end): b.nll for b in rows} for rows in by_text.values()]
    edges = [key for key in columns[0] if all(key in column for column in columns)]
    mean = [Bucket(*key, statistics.fmean(column[key] for column in columns)) for key in edges]
    return {ALL: mean, **by_text}


def print_table(title: str, by_way: dict[str, list[Bucket]]) -> None:
    table = Table("positions", *by_way, title=title)
    longest = max(by_way.values(), key=len)
    for number, bucket in enumerate(longest):
        cells = [f"{rows[number].nll:.3f}" if number < len(rows) else "" for rows in by_way.values()]
        table.add_row(f"{bucket.start:,} – {bucket.end:,}", *cells)
    Console(width=110).print(table)


def as_json(table: dict[str, dict[str, list[Bucket]]]) -> dict[str, Any]:
    return {
        way: {name: [vars(b) for b in rows] for name, rows in texts.items()} for way, texts in table.items()
    }


if __name__ == "__main__":
    typer.run(main)
