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
"""

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from texts import read_all

from vllm_longctx.cli.engine import METHODS, PremiseError, method_engine, model_path
from vllm_longctx.cli.options import JsonOut
from vllm_longctx.cli.output import plot, write_json
from vllm_longctx.cli.score import Bucket, Score, score_in, scoring_params, tokenize


def score_fresh_windows(
    model: str, texts: dict[str, list[int]], trained: int, **kwargs: Any
) -> dict[str, list[float]]:
    """NLL of every token after the first, each scored in a fresh window."""
    from vllm.inputs import tokens_input

    half = trained // 2
    params = scoring_params()
    result = {}
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
            result[name] = nll
    return result


def main(
    texts: Annotated[
        Path | None, typer.Option(help="Directory of .txt files to read beside the Python topics.")
    ] = None,
    model: str = "booklm",
    max_tokens: int = 32768,
    plain_tokens: Annotated[
        int, typer.Option(help="Plain attention is quadratic: read only so many.")
    ] = 32768,
    json_out: JsonOut = None,
    plot_out: Annotated[Path | None, typer.Option("--plot")] = None,
    dtype: str = "float32",
) -> None:
    trained = json.loads((Path(model_path(model)) / "config.json").read_text())["max_position_embeddings"]
    tokens = {name: tokenize(model, text, max_tokens) for name, text in read_all(texts).items()}
    kwargs: dict[str, Any] = {"dtype": dtype, "max_num_batched_tokens": 2048, "enforce_eager": True}
    nll = {"fresh windows": score_fresh_windows(model, tokens, trained, **kwargs)}
    for way, config in METHODS.items():
        limit = plain_tokens if config is None else max_tokens
        with method_engine(model, config, limit + 2, **kwargs) as (engine, meter):
            nll[way] = {
                name: score_in(engine, meter, t[:limit], f"{way}: {name}").nll for name, t in tokens.items()
            }

    table = buckets_by_way(nll)
    for name in ["all texts", *tokens]:
        print_table(name, {way: rows[name] for way, rows in table.items()})
    pairs = [zip(table["lm-infinite"][t], table["fresh windows"][t], strict=True) for t in tokens]
    worst = max(ours.nll - fresh.nll for buckets in pairs for ours, fresh in buckets)
    Console().print(f"lm-infinite is at most {worst:.3f} nats above fresh windows in any bucket of any text")
    write_json(json_out, {"model": model, "nll": as_json(table)})
    if plot_out is not None:
        curves = {
            w: ([b.end for b in rows["all texts"]], [b.nll for b in rows["all texts"]])
            for w, rows in table.items()
        }
        plot(plot_out, curves, "position (tokens)", "NLL (nats per token)")


def buckets_by_way(nll: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, list[Bucket]]]:
    """Buckets per way and text, and under "all texts" their mean weighted by tokens (texts of equal
    length).
    """
    result: dict[str, dict[str, list[Bucket]]] = {}
    for way, by_text in nll.items():
        rows = {name: Score(values, 0.0, 0, {}).buckets(None) for name, values in by_text.items()}
        shortest = min(len(values) for values in by_text.values())
        mean = [
            sum(column) / len(by_text)
            for column in zip(*(v[:shortest] for v in by_text.values()), strict=True)
        ]
        result[way] = {"all texts": Score(mean, 0.0, 0, {}).buckets(None), **rows}
    return result


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
