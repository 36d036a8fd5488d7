"""`make demo`: a model reads, chats or writes, and learns, far past the length that it was trained on.

With network, the model is SmolLM2-135M-Instruct, which is fetched once (`vllm-longctx get-model smollm2`):

- It reads 12,288 tokens, beside stock vLLM on the same text. Its trained length is 8,192.
- It chats until the history is longer than that.
- It learns by Temp-LoRA while it reads.

Without network, or with `--model booklm`, it is the small model that ships with longctx. It was trained on
512 tokens, reads 131,072, writes 2,000 and learns.

Only the demo's own lines are printed; what vLLM says goes to a file, demo.log. The text is the Python
language reference (the pydoc topics on every machine), or `--text FILE`. Everything runs in the real vLLM
engine; stock vLLM is given an enlarged RoPE table, or it could not run past the trained length at all.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from texts import python_topics

from vllm_longctx.cli.engine import (
    STOCK,
    PeakBlocks,
    read_text,
    running_engine,
    step,
    tokenizer_of,
)
from vllm_longctx.cli.get_model import get
from vllm_longctx.cli.output import console, counting, plot, tables
from vllm_longctx.cli.score import (
    Score,
    curve,
    score_in,
    score_learning,
    score_table,
    segment_table,
    segments,
    tokenize,
)

STEP = 500
TEMPLATE_TOKENS = 60  # of a turn, at most: the question and the chat template's own
QUESTION = "Here is the next part of a text. Say in one short sentence what it is about.\n\n"


@dataclass(frozen=True)
class Show:
    """What a model can show in some minutes on two cores.

    Numbers of tokens, but for `turns` of the chat, which takes the place of a text to write where there are
    any. bf16: whether it is computed in bfloat16 where the CPU has instructions for it.
    """

    trained: int
    read: int
    stock: int
    learn: int
    prompt: int = 0
    write: int = 0
    turns: int = 0
    part: int = 700
    answer: int = 40
    bucket: int | None = None
    bf16: bool = False
    attention: dict[str, Any] = field(default_factory=dict)
    adaptation: dict[str, Any] = field(default_factory=dict)


SHOWS = {
    "smollm2": Show(
        trained=8192,
        read=12_288,
        stock=9216,
        learn=2560,
        turns=14,
        bucket=1024,
        bf16=True,
        attention={"n_local": 2048},
        adaptation={
            "rank": 16,
            "learning_rate": 2e-4,
            "window_tokens": 2048,
            "block_tokens": 256,
            "train_context_tokens": 256,
        },
    ),
    "booklm": Show(trained=512, read=131_072, stock=8192, learn=16_384, prompt=2048, write=2000),
}


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


def chat(
    engine: Any, tokenizer: Any, text: list[int], show: Show, label: str
) -> tuple[list[tuple[int, int, float]], str]:
    """(tokens of the history, tokens of it that were cached, seconds to the first token) of each turn, and
    the last answer. The whole history is sent every time.
    """
    from vllm import SamplingParams
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(max_tokens=show.answer, temperature=0, output_kind=RequestOutputKind.DELTA)
    history: list[dict[str, str]] = []
    turns, answer = [], ""
    with counting() as progress:
        for number in progress.track(range(show.turns), description=label):
            part = tokenizer.decode(text[number * show.part : (number + 1) * show.part])
            history.append({"role": "user", "content": QUESTION + part})
            prompt = tokenizer.apply_chat_template(history, add_generation_prompt=True, return_dict=False)
            start, first, answer, cached = time.perf_counter(), 0.0, "", 0
            engine.add_request(f"turn {number}", tokens_input(prompt), params)
            while engine.has_unfinished_requests():
                for output in step(engine):
                    first = first or time.perf_counter() - start
                    cached = max(cached, output.num_cached_tokens or 0)
                    answer += output.outputs[0].text
            history.append({"role": "assistant", "content": answer})
            turns.append((len(prompt), cached, first))
    return turns, answer


def chosen(model: str | None, out: Console) -> str:
    """The model to show: SmolLM2 if none is named and it is there or can be fetched."""
    if model is not None:
        return model
    try:
        get("smollm2")
    except (ValueError, OSError) as e:
        out.print(f"SmolLM2 could not be fetched:\n{e}", highlight=False)
        out.print("So the model is booklm, which ships with longctx.")
        return "booklm"
    return "smollm2"


def dtype_of(show: Show) -> str:
    """bfloat16 is several times slower than float32 where the CPU has no instructions for it."""
    has_bf16 = torch.cuda.is_available() or "bf16" in Path("/proc/cpuinfo").read_text()
    return "bfloat16" if show.bf16 and has_bf16 else "float32"


def main(
    model: Annotated[
        str | None, typer.Option(help="smollm2 or booklm. Default: smollm2, or booklm without network.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Text to read. Default: the Python language reference.")
    ] = None,
    read_tokens: int | None = None,
    stock_tokens: Annotated[
        int | None, typer.Option(help="Stock vLLM is quadratic: it reads only so many.")
    ] = None,
    prompt_tokens: int | None = None,
    write_tokens: int | None = None,
    chat_turns: Annotated[int | None, typer.Option(help="Instead of writing, if any.")] = None,
    learn_tokens: Annotated[int | None, typer.Option(help="Tokens read with Temp-LoRA.")] = None,
    plot_out: Annotated[Path, typer.Option("--plot")] = Path("demo.png"),
    log: Annotated[Path, typer.Option(help="For what vLLM says.")] = Path("demo.log"),
) -> None:
    with own_lines(log) as out:
        begin = time.perf_counter()
        model = chosen(model, out)
        given = {
            "read": read_tokens,
            "stock": stock_tokens,
            "prompt": prompt_tokens,
            "write": write_tokens,
            "turns": chat_turns,
            "learn": learn_tokens,
        }
        show = replace(SHOWS[model], **{name: n for name, n in given.items() if n is not None})
        words = python_topics() if text is None else read_text(text)
        tokens = tokenize(model, words, show.read)
        kwargs: dict[str, Any] = {
            "dtype": dtype_of(show),
            "max_num_batched_tokens": 1024,
            "enforce_eager": True,
        }
        title(out, f"A model trained on {show.trained:,} tokens reads {len(tokens):,} tokens of a text")
        read_and_write(out, model, show, tokens, plot_out, kwargs)
        if show.learn:
            learn(out, model, show, tokens[: show.learn], kwargs)
        out.print(f"\nAll that took {(time.perf_counter() - begin) / 60:.1f} minutes.", highlight=False)


def read_and_write(
    out: Console, model: str, show: Show, tokens: list[int], plot_out: Path, kwargs: dict[str, Any]
) -> None:
    """Both engines read. Then both write after the text's beginning, or longctx chats about its parts."""
    attention = {"preset": "lm-infinite", "attention": show.attention}
    stock = min(show.stock, len(tokens))
    longest = max(len(tokens), show.turns * (show.part + show.answer + TEMPLATE_TOKENS)) + show.write + 2
    enlarged = {"hf_overrides": {"max_position_embeddings": stock + show.write + 2}}
    engines: dict[str, tuple[dict[str, Any], int, int, dict[str, Any]]] = {
        "longctx": ({"longctx": attention}, len(tokens), longest, {}),
        "stock vLLM": (STOCK, stock, stock + show.write + 2, enlarged),
    }
    scores: dict[str, Score] = {}
    written: dict[str, tuple[str, list[float]]] = {}
    turns: list[tuple[int, int, float]] = []
    answer = ""
    for name, (config, length, max_model_len, extra) in engines.items():
        chats = name == "longctx" and show.turns > 0
        engine_kwargs = {**kwargs, **extra, "enable_prefix_caching": chats}
        with running_engine(model, config, max_model_len, **engine_kwargs) as (engine, meter):
            scores[name] = score_in(engine, meter, tokens[:length], f"{name} reads {length:,} tokens")
            say_what_was_held(out, name, engine, meter)
            if chats:
                turns, answer = chat(engine, tokenizer_of(model), tokens, show, "longctx chats")
            elif show.write:
                label = f"{name} writes {show.write:,} tokens"
                written[name] = write_on(engine, tokens[: show.prompt], show.write, label)
    out.print(score_table(scores, show.bucket))
    plot(
        plot_out,
        {name: curve(s, show.bucket) for name, s in scores.items()},
        "position (tokens)",
        "NLL (nats per token)",
    )
    out.print(f"The curves are in {plot_out}.")
    if turns:
        title(out, f"A chat about the text goes on past {show.trained:,} tokens")
        out.print(turn_table(turns))
        out.print("\nThe last answer:")
        out.print(answer, markup=False, highlight=False)
    if written:
        title(out, f"Both write {show.write:,} tokens after the first {show.prompt:,}")
        out.print(written_table(written))
        for name, (text, _) in written.items():
            out.print(f"\n[bold]{name}[/], the last 300 characters:")
            out.print(text[-300:], markup=False, highlight=False)


def learn(out: Console, model: str, show: Show, tokens: list[int], kwargs: dict[str, Any]) -> None:
    title(out, f"Temp-LoRA: the model learns from {len(tokens):,} tokens of the text while it reads them")
    config = {"longctx": {"preset": "temp-lora-quality", "adaptation": show.adaptation}}
    with running_engine(model, config, len(tokens) + 2, **kwargs) as (engine, meter):
        reads = f"reads {len(tokens):,} tokens"
        labels = f"{reads} without learning", f"{reads} and learns"
        base, learned = score_learning(engine, meter, tokens, *labels)
    out.print(segment_table(segments(learned, base, None)))


def say_what_was_held(out: Console, name: str, engine: Any, meter: PeakBlocks) -> None:
    held = meter.peak * engine.vllm_config.cache_config.block_size
    out.print(f"{name}: at most {held:,} tokens of KV cache were held at once", highlight=False)


def turn_table(turns: list[tuple[int, int, float]]) -> Table:
    table = Table("turn", "history", "cached", "first token", title="Tokens, and seconds to the first one")
    for number, (history, cached, first) in enumerate(turns, 1):
        table.add_row(str(number), f"{history:,}", f"{cached:,}", f"{first:.2f} s")
    return table


def written_table(written: dict[str, tuple[str, list[float]]]) -> Table:
    table = Table("tokens written", *written, title="NLL of what it writes, nats per token")
    columns = [nll for _, nll in written.values()]
    for number, row in enumerate(zip(*columns, strict=True)):
        table.add_row(f"{number * STEP:,} – {(number + 1) * STEP:,}", *(f"{nll:.3f}" for nll in row))
    return table


if __name__ == "__main__":
    typer.run(main)
