"""`vllm-longctx score`: teacher-forced log-probabilities of a text, by position, through the real engine.

With a configuration that adapts, the text is scored twice in one engine: learning nothing, then with
    Temp-LoRA.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from vllm_longctx.cli.engine import (
    LEARNS,
    PeakBlocks,
    adapts,
    blocks_are_trained,
    longctx_config,
    method_engine,
    read_text,
    running_engine,
    step,
    tokenizer_of,
)
from vllm_longctx.cli.options import BatchedTokens, Dtype, EnforceEager, JsonOut, Longctx, Model, Preset
from vllm_longctx.cli.output import counting, errors_for_users, plot, tables, write_json

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.v1.engine.llm_engine import LLMEngine


@dataclass(frozen=True)
class Bucket:
    """Mean NLL, in nats per token, of the tokens at positions start .. end - 1."""

    start: int
    end: int
    nll: float


@dataclass(frozen=True)
class Score:
    """nll: of each token after the first, in nats. kv_blocks_peak: most KV blocks held after any step."""

    nll: list[float]
    tokens_per_s: float
    kv_blocks_peak: int
    config: dict[str, Any]

    def buckets(self, bucket_tokens: int | None) -> list[Bucket]:
        return self.means(bucket_edges(len(self.nll) + 1, bucket_tokens))

    def means(self, edges: list[int]) -> list[Bucket]:
        return [
            Bucket(a, b, sum(part) / len(part))
            for a, b in pairwise(edges)
            if (part := self.nll[max(a, 1) - 1 : b - 1])
        ]


def bucket_edges(tokens: int, bucket_tokens: int | None) -> list[int]:
    """Equal buckets, or by default ones that double from 256 on."""
    if bucket_tokens is not None:
        inner = list(range(bucket_tokens, tokens, bucket_tokens))
    else:
        inner = [256 << k for k in range(64) if 256 << k < tokens]
    return [0, *inner, tokens]


@dataclass(frozen=True)
class Segment:
    """Perplexity of the tokens at positions start .. end - 1, with Temp-LoRA and without."""

    start: int
    end: int
    ppl: float
    ppl_base: float


SEGMENTS = 5
BASE: dict[str, Any] = {**LEARNS, "epochs": 0}  # the same engine without learning, in the same windows


def segments(score: Score, base: Score, bucket_tokens: int | None) -> list[Segment]:
    """Of `bucket_tokens` each, by default fifths of the text."""
    tokens = len(score.nll) + 1
    edges = bucket_edges(tokens, bucket_tokens or math.ceil(tokens / SEGMENTS))
    pairs = zip(score.means(edges), base.means(edges), strict=True)
    return [Segment(own.start, own.end, math.exp(own.nll), math.exp(other.nll)) for own, other in pairs]


def scoring_params(options: dict[str, Any] | None = None, max_tokens: int = 1) -> "SamplingParams":
    """Of a request for its prompt's log-probabilities, those of every token after the first.

    options: of the request, `config.RequestOptions`. max_tokens: to write; vLLM wants one at least.
    """
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=max_tokens,
        prompt_logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        ignore_eos=True,
        temperature=0,
        extra_args=None if options is None else {"longctx": options},
    )


def score_tokens(
    model: str, tokens: list[int], additional_config: dict[str, Any], label: str, **engine_kwargs: Any
) -> Score:
    """Log-probabilities of `tokens` from a fresh engine, in one pass over them."""
    with running_engine(model, additional_config, len(tokens) + 2, **engine_kwargs) as (engine, meter):
        return score_in(engine, meter, tokens, label)


def score_in(
    engine: "LLMEngine",
    meter: PeakBlocks,
    tokens: list[int],
    label: str,
    each_step: Callable[[int], None] | None = None,
    options: dict[str, Any] | None = None,
    written: int = 2,
) -> Score:
    """The same in an engine that runs already.

    each_step is told how many tokens have been read. options: of the request, `config.RequestOptions`.
    written: tokens, at least two, so that the blocks held after the last chunk are seen, too.
    """
    from vllm.inputs import tokens_input
    from vllm.logprobs import FlatLogprobs

    from vllm_longctx.settings import plugin_configs

    engine.add_request("score", tokens_input(tokens), scoring_params(options, max_tokens=written))
    config = plugin_configs(engine.vllm_config).get("longctx", {})
    attention = config.get("attention", {})
    chunk = engine.vllm_config.scheduler_config.max_num_batched_tokens
    if attention.get("method") == "focused":  # no step goes past the end of a window
        chunk = min(chunk, attention["n_local"])
    start, output = time.perf_counter(), None
    meter.reset()
    with counting() as progress:
        task = progress.add_task(label, total=len(tokens) if options is None else None)
        while engine.has_unfinished_requests():
            output = next(step(engine), output)
            read = min(meter.steps * chunk, len(tokens))
            if options is None:
                progress.update(task, completed=read)
            else:  # steps are as long as its blocks allow, and tokens of a new pass are computed again
                progress.update(task, description=f"{label}: step {meter.steps:,}")
            if each_step is not None:
                each_step(read)
        progress.update(task, description=label, total=len(tokens), completed=len(tokens))
    elapsed = time.perf_counter() - start
    assert output is not None and isinstance(output.prompt_logprobs, FlatLogprobs)
    nll = [-x for x in output.prompt_logprobs.logprobs]
    assert len(nll) == len(tokens) - 1
    return Score(nll, len(tokens) / elapsed, meter.peak, config)


def blocks_of_prompt(engine: "LLMEngine", tokens: int, block_tokens: int | None = None) -> tuple[int, int]:
    """The least and the most text blocks that are trained while a prompt of so many tokens is read.

    The last block is trained only if there is time for it: nothing is computed with what it teaches.

    block_tokens: the request's, by default the engine's.
    """
    from vllm_longctx.settings import plugin_configs
    from vllm_longctx.temp_lora.blocks import Blocks

    adaptation = plugin_configs(engine.vllm_config)["longctx"]["adaptation"]
    if adaptation["epochs"] == 0 or adaptation["learn"] == "none":
        return 0, 0
    size = block_tokens or adaptation["block_tokens"]
    blocks = Blocks.of_prompt(tokens, size, adaptation["update_mode"], adaptation["learn"])
    return blocks.version_of(tokens - 1), (tokens + 1 - blocks.origin) // size


def score_learning(
    engine: "LLMEngine", meter: PeakBlocks, tokens: list[int], base_label: str, label: str
) -> tuple[Score, Score]:
    """Scores in an engine that adapts: learning nothing, then with Temp-LoRA.

    Raises PremiseError if a block was not trained.
    """
    with blocks_are_trained(engine, 0):
        base = score_in(engine, meter, tokens, base_label, options=BASE)
    with blocks_are_trained(engine, *blocks_of_prompt(engine, len(tokens))):
        return base, score_in(engine, meter, tokens, label, options=LEARNS)


def score_baseline(model: str, tokens: list[int], **engine_kwargs: Any) -> Score:
    """Stock vLLM on the same tokens."""
    with method_engine(model, None, len(tokens) + 2, **engine_kwargs) as (engine, meter):
        return score_in(engine, meter, tokens, "stock vLLM")


def score(
    text: Annotated[Path, typer.Option(help="Text file to score.")],
    model: Model = "booklm",
    max_tokens: Annotated[
        int | None, typer.Option(help="Score only the first tokens of the text.", min=2)
    ] = None,
    longctx: Longctx = None,
    preset: Preset = None,
    baseline: Annotated[bool, typer.Option(help="Score with stock vLLM, too.")] = False,
    bucket_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a bucket. Default: buckets that double.", min=1)
    ] = None,
    json_out: JsonOut = None,
    plot_out: Annotated[Path | None, typer.Option("--plot", help="Draw NLL against position.")] = None,
    dtype: Dtype = "auto",
    max_num_batched_tokens: BatchedTokens = 2048,
    enforce_eager: EnforceEager = False,
) -> None:
    """Print how well a model predicts a text: the mean NLL by position, in nats per token."""
    with errors_for_users():
        additional_config = longctx_config(longctx, preset)
        tokens = tokenize(model, read_text(text), max_tokens)
        kwargs = {
            "dtype": dtype,
            "max_num_batched_tokens": max_num_batched_tokens,
            "enforce_eager": enforce_eager,
        }
        if adapts(additional_config):
            with running_engine(model, additional_config, len(tokens) + 2, **kwargs) as (engine, meter):
                labels = "base, without learning", "Temp-LoRA"
                base, ours = score_learning(engine, meter, tokens, *labels)
            scores = {"base": base, "Temp-LoRA": ours}
        else:
            ours = score_tokens(model, tokens, additional_config, "longctx", **kwargs)
            scores = {"longctx": ours}
        if baseline:
            scores["stock vLLM"] = score_baseline(model, tokens, **kwargs)
    output = tables()
    output.print(score_table(scores, bucket_tokens))
    result = {"model": model, "text": str(text), "tokens": len(tokens), **as_json(ours, bucket_tokens)}
    if "base" in scores:
        parts = segments(ours, scores["base"], bucket_tokens)
        output.print(segment_table([*parts, *segments(ours, scores["base"], len(tokens))]))
        result["segments"] = [asdict(part) for part in parts]
    if "stock vLLM" in scores:
        result["baseline"] = as_json(scores["stock vLLM"], bucket_tokens)
    write_json(json_out, result)
    if plot_out is not None:
        plot(
            plot_out,
            {name: curve(s, bucket_tokens) for name, s in scores.items()},
            "position",
            "NLL (nats per token)",
        )


def tokenize(model: str, text: str, max_tokens: int | None) -> list[int]:
    """Token ids with the tokenizer's own first token, at most `max_tokens`.

    Raises ValueError for fewer than two.
    """
    tokens = tokenizer_of(model)(text)["input_ids"][:max_tokens]
    if len(tokens) < 2:
        raise ValueError(f"the text has {len(tokens)} tokens; at least 2 are needed")
    return tokens


def curve(score: Score, bucket_tokens: int | None) -> tuple[list[float], list[float]]:
    buckets = score.buckets(bucket_tokens)
    return [b.end for b in buckets], [b.nll for b in buckets]


def as_json(score: Score, bucket_tokens: int | None) -> dict[str, Any]:
    return {
        "buckets": [asdict(b) for b in score.buckets(bucket_tokens)],
        "tokens_per_s": score.tokens_per_s,
        "kv_blocks_peak": score.kv_blocks_peak,
        "config": score.config,
    }


def segment_table(parts: list[Segment]) -> Table:
    caption = "base has the same windows and learns nothing"
    table = Table("positions", "base", "Temp-LoRA", "change", title="perplexity", caption=caption)
    for p in parts:
        table.add_row(
            f"{p.start:,} – {p.end:,}", f"{p.ppl_base:.2f}", f"{p.ppl:.2f}", f"{p.ppl / p.ppl_base - 1:+.1%}"
        )
    return table


def score_table(scores: dict[str, Score], bucket_tokens: int | None) -> Table:
    """A row per bucket of the longest score, a column per score."""
    table = Table("positions", *scores, title="NLL, nats per token")
    columns = [{(b.start, b.end): b.nll for b in s.buckets(bucket_tokens)} for s in scores.values()]
    for start, end in max(columns, key=len):
        cells = [f"{column[start, end]:.3f}" if (start, end) in column else "" for column in columns]
        table.add_row(f"{start:,} – {end:,}", *cells)
    table.add_section()
    table.add_row("tokens/s", *(f"{s.tokens_per_s:,.0f}" for s in scores.values()))
    table.add_row("peak KV blocks", *(f"{s.kv_blocks_peak:,}" for s in scores.values()))
    return table
