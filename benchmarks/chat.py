"""Table "An endless chat" of benchmarks/README.md: a chat of many turns against a real server.

    python benchmarks/chat.py --model smollm2 --turns 200 --json OUT.json --plot OUT.png

A real `vllm serve` with lm-infinite, and the openai client. Every turn sends the whole history, as chat
clients do. Its user's message is a part of a text, always of the same number of tokens. Measured are:

- time to the first token, as the client sees it;
- tokens of the history, and how many of them the server found in its cache;
- tokenizing the history: seconds of the server (its route /tokenize, which also applies the chat template),
  and CPU seconds of this process, which others on the machine do not lengthen. It is part of the time to the
  first token;
- NLL of the answer in a fresh window: the chat template around the user's message and the answer alone,
  scored by the same server. An answer that has become noise is unlikely there.

--url asks a server that runs already, which must serve the same --model.
"""

import contextlib
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from openai import OpenAI
from rich.table import Table
from server import running_server
from texts import python_topics

from vllm_longctx.cli.engine import model_path, read_text, tokenizer_of, trained_tokens
from vllm_longctx.cli.options import JsonOut
from vllm_longctx.cli.output import console, counting, errors_for_users, plot, tables, write_json

REQUEST = "Here is the next part of a text. Say in one or two sentences what it is about.\n\n"
EARLY = 20  # the turn with which later ones are compared
AROUND = 5  # turns on either side of which a median is taken


@dataclass(frozen=True)
class Turn:
    """Tokens, seconds, and nats per token; what each is stands at the top of this file."""

    number: int
    history: int
    cached: int
    written: int
    first_token_s: float
    turn_s: float
    server_tokenizing_s: float
    tokenizing_s: float
    nll: float
    answer: str


class Chat:
    """A history that grows turn by turn, and the server that is asked.

    parts: user's messages, of equal numbers of tokens.
    """

    def __init__(self, address: str, tokenizer: Any, parts: list[str], max_tokens: int) -> None:
        self.client = OpenAI(base_url=f"{address}/v1", api_key="none", timeout=3600)
        self.address, self.tokenizer, self.parts, self.max_tokens = address, tokenizer, parts, max_tokens
        self.model = self.client.models.list().data[0].id
        self.history: list[dict[str, str]] = []

    def turn(self, number: int) -> Turn:
        self.history.append({"role": "user", "content": REQUEST + self.parts[number % len(self.parts)]})
        server_tokenizing_s = self.server_tokenizing_s()
        begin = time.process_time()
        self.tokenizer.apply_chat_template(self.history, add_generation_prompt=True)
        tokenizing_s = time.process_time() - begin
        begin, first, answer, usage = time.perf_counter(), None, "", None
        stream = self.client.chat.completions.create(
            model=self.model,
            messages=self.history,  # type: ignore[arg-type]
            max_tokens=self.max_tokens,
            temperature=0.7,
            seed=number,
            stream=True,
            stream_options={"include_usage": True},
        )
        for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                if choice.delta.content:
                    first = first or time.perf_counter()
                    answer += choice.delta.content
        end = time.perf_counter()
        assert usage is not None
        details = usage.prompt_tokens_details
        self.history.append({"role": "assistant", "content": answer})
        return Turn(
            number + 1,
            history=usage.prompt_tokens,
            cached=0 if details is None else details.cached_tokens or 0,
            written=usage.completion_tokens,
            first_token_s=(first or end) - begin,
            turn_s=end - begin,
            server_tokenizing_s=server_tokenizing_s,
            tokenizing_s=tokenizing_s,
            nll=self.nll_alone(),
            answer=answer,
        )

    def server_tokenizing_s(self) -> float:
        body = {"model": self.model, "messages": self.history, "add_generation_prompt": True}
        begin = time.perf_counter()
        httpx.post(f"{self.address}/tokenize", json=body, timeout=600).raise_for_status()
        return time.perf_counter() - begin

    def nll_alone(self) -> float:
        """Of the last answer's tokens, behind its user's message alone; NaN for an empty answer."""
        *_, question, answer = self.history
        before = self.tokenizer.apply_chat_template([question], add_generation_prompt=True, return_dict=False)
        tokens = self.tokenizer(answer["content"], add_special_tokens=False)["input_ids"]
        if not tokens:
            return float("nan")
        body = {
            "model": self.model,
            "prompt": [*before, *tokens],
            "max_tokens": 1,
            "prompt_logprobs": 0,
            "temperature": 0,
        }
        done = httpx.post(f"{self.address}/v1/completions", json=body, timeout=600).raise_for_status()
        scored = done.json()["choices"][0]["prompt_logprobs"][len(before) :]
        return -statistics.fmean(
            position[str(token)]["logprob"] for position, token in zip(scored, tokens, strict=True)
        )


def main(
    model: str = "smollm2",
    turns: Annotated[int, typer.Option(min=2)] = 200,
    text: Annotated[
        Path | None, typer.Option(help="Text of the user's messages. Default: the Python topics.")
    ] = None,
    message_tokens: Annotated[int, typer.Option(help="Of a user's message.", min=1)] = 200,
    max_tokens: Annotated[int, typer.Option(help="Of an answer.", min=1)] = 64,
    n_local: Annotated[int | None, typer.Option(help="Default: the trained length.")] = None,
    dtype: str = "auto",
    url: Annotated[
        str | None, typer.Option(help="Of a server that runs, such as http://localhost:8000")
    ] = None,
    log: Annotated[Path, typer.Option(help="For what the server says.")] = Path("chat.log"),
    json_out: JsonOut = None,
    plot_out: Annotated[Path | None, typer.Option("--plot")] = None,
) -> None:
    with errors_for_users():
        trained = trained_tokens(model)
        words = python_topics() if text is None else read_text(text)
        tokenizer = tokenizer_of(model)
        if tokenizer.chat_template is None:
            raise ValueError(f"--model {model} has no chat template; give a model that was trained to chat")
    ids = tokenizer(words, add_special_tokens=False)["input_ids"][: turns * message_tokens]
    parts = [tokenizer.decode(ids[a:b]) for a, b in pairwise(range(0, len(ids) + 1, message_tokens))]
    about = {
        "model": model,
        "trained": trained,
        "message_tokens": message_tokens,
        "max_tokens": max_tokens,
        "n_local": n_local,
        "dtype": dtype,
    }
    measured: list[Turn] = []
    with served(url, model, n_local, dtype, log) as address, counting() as progress:
        chat = Chat(address, tokenizer, parts, max_tokens)
        for number in progress.track(range(turns), description="turns"):
            measured.append(chat.turn(number))
            write_json(json_out, {**about, "turns": [asdict(turn) for turn in measured]})
    output = tables()
    output.print(turn_table(measured))
    output.print(verdict(measured, trained), highlight=False)
    if plot_out is not None:
        x = [turn.history for turn in measured]
        curves = {
            "first token": (x, [turn.first_token_s for turn in measured]),
            "of it, tokenizing": (x, [turn.server_tokenizing_s for turn in measured]),
        }
        plot(plot_out, curves, "history (tokens)", "seconds")


@contextlib.contextmanager
def served(url: str | None, model: str, n_local: int | None, dtype: str, log: Path) -> Iterator[str]:
    """The address of a server, which is started unless there is one."""
    if url is not None:
        yield url.rstrip("/")
        return
    attention = "" if n_local is None else f', "attention": {{"n_local": {n_local}}}'
    flags = ["--longctx", f'{{"preset": "lm-infinite"{attention}}}', "--dtype", dtype, "--enforce-eager"]
    flags += ["--max-num-batched-tokens", "1024", "--max-num-seqs", "4", "--enable-prompt-tokens-details"]
    flags += ["--kv-cache-memory-bytes", str(1 << 30)]
    console.print(f"vllm serve starts; its log is in {log}", highlight=False)
    with running_server(model_path(model), log, *flags, patience_s=1200) as address:
        yield address


def around(turns: list[Turn], number: int) -> float:
    """Median time to the first token of a turn and its neighbours, in seconds."""
    near = [turn.first_token_s for turn in turns if abs(turn.number - number) <= AROUND]
    return statistics.median(near)


def turn_table(turns: list[Turn]) -> Table:
    table = Table(
        *("turn", "history", "cached", "first token", "tokenizing", "its CPU time", "NLL alone"),
        title="Tokens; seconds; nats per token. Medians of the turns since the row before",
    )
    edges = sorted({*(round(len(turns) * k / 10) for k in range(1, 11))} - {0})
    for begin, end in zip([0, *edges], edges, strict=False):
        part = turns[begin:end]
        last = part[-1]
        table.add_row(
            str(last.number),
            f"{last.history:,}",
            f"{last.cached:,}",
            f"{statistics.median(t.first_token_s for t in part):.2f}",
            f"{statistics.median(t.server_tokenizing_s for t in part):.3f}",
            f"{statistics.median(t.tokenizing_s for t in part):.3f}",
            f"{statistics.median(t.nll for t in part):.2f}",
        )
    return table


def verdict(turns: list[Turn], trained: int) -> str:
    last = turns[-1]
    early = min(EARLY, len(turns) // 2)
    ratio = around(turns, last.number) / around(turns, early)
    return (
        f"The first token of turn {last.number} ({last.history:,} tokens, {last.history / trained:.1f} "
        f"trained lengths) takes {ratio:.2f} times as long as that of turn {early}. Both are medians of up "
        f"to {2 * AROUND + 1} turns.\n"
        f"Tokenizing is {last.server_tokenizing_s / last.first_token_s:.0%} of it in the last turn: "
        f"{1e6 * last.tokenizing_s / last.history:.1f} ms of CPU time per 1,000 tokens."
    )


if __name__ == "__main__":
    typer.run(main)
