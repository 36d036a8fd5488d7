"""`make demo`: a model trained on 512 tokens reads 131,072 and writes 2,000, then it learns while it reads.

It reads beside stock vLLM on the same text.

Only its own lines are printed; what vLLM says goes to a file, demo.log. The text is the Python language
reference (the pydoc topics on every machine). Everything runs in the real vLLM engine, in float32; stock vLLM
is given an enlarged RoPE table, or it could not run past the trained length at all.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from texts import python_topics

from vllm_longctx.cli.engine import running_engine
from vllm_longctx.cli.output import console, plot, tables
from vllm_longctx.cli.score import (
    curve,
    score_in,
    score_learning,
    score_table,
    segment_table,
    segments,
    tokenize,
)

STEP = 500


@contextmanager
def own_lines(log: Path) -> Iterator[Console]:
    """Where the demo prints. What else this process writes, and all that it starts, goes to the log."""
    out = tables()
    sys.stdout.flush()
    terminal = [os.fdopen(os.dup(fd), "w") for fd in (1, 2)]
    out.file, console.file = terminal
    with log.open("wb") as file:
        for fd in (1, 2):
            os.dup2(file.fileno(), fd)
    out.print(f"vLLM's log is in {log}.", highlight=False)
    try:
        yield out
    except Exception as e:
        out.print(f"[bold red]The demo failed:[/] {e}\nThe reason is in {log}.", highlight=False)
        raise
    finally:
        for file in terminal:
            file.flush()


def title(out: Console, text: str) -> None:
    out.print(f"\n[bold]{text}[/]", highlight=False)


def write_on(engine: Any, prompt: list[int], max_tokens: int, label: str) -> tuple[str, list[float]]:
    """Text sampled after `prompt`, and the mean NLL of what was written per STEP tokens."""
    from vllm import SamplingParams
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=1.0,
        ignore_eos=True,
        logprobs=0,
        output_kind=RequestOutputKind.DELTA,
    )
    engine.add_request("write", tokens_input(prompt), params)
    text, nll = "", []
    with Progress(console=console) as progress:
        task = progress.add_task(label, total=max_tokens)
        while engine.has_unfinished_requests():
            for output in engine.step():
                (completion,) = output.outputs
                text += completion.text
                pairs = zip(completion.logprobs or [], completion.token_ids, strict=True)
                nll += [-position[token].logprob for position, token in pairs]
                progress.update(task, completed=len(nll))
    return text, [sum(nll[k : k + STEP]) / len(nll[k : k + STEP]) for k in range(0, len(nll), STEP)]


def main(
    read_tokens: int = 131_072,
    stock_tokens: Annotated[int, typer.Option(help="Stock vLLM is quadratic: it reads only so many.")] = 8192,
    prompt_tokens: int = 2048,
    write_tokens: int = 2000,
    learn_tokens: Annotated[int, typer.Option(help="Tokens read with Temp-LoRA.")] = 16_384,
    plot_out: Annotated[Path, typer.Option("--plot")] = Path("demo.png"),
    log: Annotated[Path, typer.Option(help="For what vLLM says.")] = Path("demo.log"),
) -> None:
    kwargs: dict[str, Any] = {"dtype": "float32", "max_num_batched_tokens": 1024, "enforce_eager": True}
    with own_lines(log) as out:
        tokens = tokenize("booklm", python_topics(), read_tokens)
        title(out, f"A model trained on 512 tokens reads {len(tokens):,} tokens of the Python reference")
        engines = {
            "longctx": ({"longctx": {"preset": "lm-infinite"}}, len(tokens), {}),
            "stock vLLM": (
                {},
                stock_tokens,
                {"hf_overrides": {"max_position_embeddings": stock_tokens + write_tokens}},
            ),
        }
        scores, written = {}, {}
        for name, (config, length, extra) in engines.items():
            with running_engine("booklm", config, length + write_tokens, **kwargs, **extra) as (
                engine,
                meter,
            ):
                scores[name] = score_in(engine, meter, tokens[:length], f"{name} reads {length:,} tokens")
                label = f"{name} writes {write_tokens:,} tokens"
                written[name] = write_on(engine, tokens[:prompt_tokens], write_tokens, label)
                block_size = engine.vllm_config.cache_config.block_size
                out.print(
                    f"{name}: at most {meter.peak * block_size:,} tokens of KV cache were held at once",
                    highlight=False,
                )
        out.print(score_table(scores, None))
        plot(
            plot_out,
            {name: curve(s, None) for name, s in scores.items()},
            "position (tokens)",
            "NLL (nats per token)",
        )
        out.print(f"The curves are in {plot_out}.")

        title(out, f"Both write {write_tokens:,} tokens after the first {prompt_tokens:,}")
        table = Table("tokens written", *written, title="NLL of what it writes, nats per token")
        for number in range(len(written["longctx"][1])):
            cells = (f"{nll[number]:.3f}" for _, nll in written.values())
            table.add_row(f"{number * STEP:,} – {(number + 1) * STEP:,}", *cells)
        out.print(table)
        for name, (text, _) in written.items():
            out.print(f"\n[bold]{name}[/], the last 300 characters:")
            out.print(text[-300:], markup=False, highlight=False)

        title(
            out, f"Temp-LoRA: the model learns from {learn_tokens:,} tokens of the text while it reads them"
        )
        config = {"longctx": {"preset": "temp-lora-quality"}}
        with running_engine("booklm", config, learn_tokens + 2, **kwargs) as (engine, meter):
            part, reads = tokens[:learn_tokens], f"reads {learn_tokens:,} tokens"
            labels = f"{reads} without learning", f"{reads} and learns"
            base, learned = score_learning(engine, meter, part, *labels)
        out.print(segment_table(segments(learned, base, None)))


if __name__ == "__main__":
    typer.run(main)
