"""Table "Under load" of benchmarks/README.md: a real server, 16 clients at once, a fifth of their requests
abandoned at random.

    python benchmarks/soak.py --minutes 10 --json OUT.json

The clients draw from a few prompts of very different lengths, stream half of the time, and write greedily.
Afterwards the server must hold nothing, and every prompt runs alone, past the prefix cache (with a
`cache_salt` of its own). A batch adds up in another order than a single request, so a token may differ where
the two best are all but equal: where outputs differ, the table says how far apart the alternatives were in
the first place that differs. Exit code 1 if a criterion fails.
"""

import asyncio
import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import openai
import typer
from openai import AsyncOpenAI
from rich.console import Console
from rich.table import Table
from server import metrics, running_server
from texts import python_topics

from vllm_longctx.cli.engine import model_path
from vllm_longctx.cli.options import JsonOut
from vllm_longctx.cli.output import console, write_json

NAME = "soaked"
NEAR_TIE = 1e-3
ENDLESS = 500_000


@dataclass
class Case:
    """A prompt, and every output that it had under load with its count."""

    prompt: list[int]
    max_tokens: int
    outputs: Counter[tuple[int, ...]] = field(default_factory=Counter)

    def request(self, max_tokens: int | None = None, **extra: Any) -> dict[str, Any]:
        return {
            "model": NAME,
            "prompt": self.prompt,
            "max_tokens": max_tokens or self.max_tokens,
            "temperature": 0,
            "extra_body": {"ignore_eos": True, "return_token_ids": True, **extra},
        }


@dataclass
class Load:
    """What the clients saw. Lengths in tokens."""

    completed: int = 0
    left: int = 0
    prompt_tokens: int = 0
    written_tokens: int = 0
    errors: list[str] = field(default_factory=list)


def cases_from(model: str, number: int, longest: int, most_written: int) -> list[Case]:
    """Pieces of one text, their lengths spread evenly over the powers of two."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model)(python_topics())["input_ids"]
    cases = []
    for _ in range(number):
        length = round(2 ** random.uniform(4, longest.bit_length() - 1))
        start = random.randrange(len(ids) - length)
        cases.append(
            Case(ids[start : start + length], round(2 ** random.uniform(2, most_written.bit_length() - 1)))
        )
    return cases


async def write(client: AsyncOpenAI, request: dict[str, Any]) -> tuple[int, ...]:
    if random.random() < 0.5:
        return tuple((await client.completions.create(**request)).choices[0].token_ids)
    written: list[int] = []
    async for chunk in await client.completions.create(**request, stream=True):
        for choice in chunk.choices:
            written += choice.token_ids or []
    return tuple(written)


async def one_client(
    client: AsyncOpenAI, cases: list[Case], load: Load, deadline: float, leaving: float, stay_s: float
) -> None:
    while time.monotonic() < deadline:
        case = random.choice(cases)
        leaves = random.random() < leaving
        # Who leaves has asked for more than can be written before.
        request, patience = (
            (case.request(ENDLESS), random.uniform(0, stay_s)) if leaves else (case.request(), None)
        )
        try:
            written = await asyncio.wait_for(write(client, request), patience)
        except TimeoutError:
            load.left += 1
        except openai.OpenAIError as e:
            load.errors.append(f"{type(e).__name__}: {e}")
        else:
            load.completed += 1
            load.prompt_tokens += len(case.prompt)
            load.written_tokens += len(written)
            case.outputs[written] += 1


async def run_load(
    address: str, cases: list[Case], clients: int, seconds: float, leaving: float, stay_s: float
) -> Load:
    load, deadline = Load(), time.monotonic() + seconds
    # One connection pool per client: leaving closes a connection, as a real client does.
    connections = [
        AsyncOpenAI(base_url=f"{address}/v1", api_key="none", timeout=600, max_retries=0)
        for _ in range(clients)
    ]
    await asyncio.gather(*(one_client(c, cases, load, deadline, leaving, stay_s) for c in connections))
    for connection in connections:
        await connection.close()
    return load


def settled(address: str, patience_s: float = 60) -> dict[str, float]:
    """The server's metrics once it runs nothing, or when patience ends."""
    deadline = time.monotonic() + patience_s
    while (now := metrics(address))["num_requests_running"] + now[
        "num_requests_waiting"
    ] and time.monotonic() < deadline:
        time.sleep(0.2)
    return metrics(address)


def run_alone(address: str, cases: list[Case]) -> Counter[str]:
    """Every case alone: how many outputs under load were equal, or differed first at a near tie, or
    elsewhere.
    """
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=600, max_retries=0)
    verdicts: Counter[str] = Counter()
    for number, case in enumerate(cases):
        request = case.request(cache_salt=f"alone {number}", return_tokens_as_token_ids=True)
        (alone,) = client.completions.create(**request, logprobs=5).choices
        for output, count in case.outputs.items():
            verdicts[compare(list(output), alone)] += count
    return verdicts


def compare(output: list[int], alone: Any) -> str:
    expected, logprobs = alone.token_ids, alone.logprobs
    if output == expected:
        return "equal"
    if len(output) != len(expected):
        return "different length"
    at = next(i for i, (a, b) in enumerate(zip(output, expected, strict=True)) if a != b)
    chosen = logprobs.top_logprobs[at].get(f"token_id:{output[at]}")
    near = chosen is not None and logprobs.token_logprobs[at] - chosen < NEAR_TIE
    return "near tie" if near else "different"


def main(
    model: str = "booklm",
    minutes: float = 10,
    clients: int = 16,
    leaving: Annotated[float, typer.Option(help="Share of the requests whose client leaves.")] = 0.2,
    stay_s: Annotated[float, typer.Option(help="A client that leaves does so within so many seconds.")] = 5.0,
    prompts: int = 24,
    longest: Annotated[int, typer.Option(help="Longest prompt in tokens.")] = 8192,
    most_written: Annotated[int, typer.Option(help="Longest completion in tokens.")] = 512,
    pool_blocks: Annotated[int, typer.Option(help="KV blocks of 32 tokens in the pool.")] = 200,
    dtype: str = "float32",
    enforce_eager: bool = False,
    seed: int = 0,
    json_out: JsonOut = None,
    log: Annotated[Path | None, typer.Option(help="Keep the server's log here.")] = None,
) -> None:
    random.seed(seed)
    model = model_path(model)
    cases = cases_from(model, prompts, longest, most_written)
    flags = [
        "--plugin",
        "longctx",
        "--served-model-name",
        NAME,
        "--dtype",
        dtype,
        "--num-gpu-blocks-override",
        str(pool_blocks),
    ]
    flags += [
        "--kv-cache-memory-bytes",
        str(1 << 30),
        "--max-num-seqs",
        str(clients),
        "--max-num-batched-tokens",
        "512",
    ]
    flags += ["--disable-uvicorn-access-log", *(["--enforce-eager"] if enforce_eager else [])]
    with tempfile.TemporaryDirectory() as directory:
        log = log or Path(directory) / "log"
        with running_server(model, log, *flags) as address:
            console.print(f"{clients} clients for {minutes} minutes ...")
            load = asyncio.run(run_load(address, cases, clients, 60 * minutes, leaving, stay_s))
            after = settled(address)
            verdicts = run_alone(address, cases)
        server_errors = [
            line for line in log.read_text().splitlines() if " ERROR " in line or "Traceback" in line
        ]
    criteria = {
        "requests were completed, and abandoned": load.completed > 0 and (load.left > 0 or leaving == 0),
        "no error but the clients' leaving": not load.errors and not server_errors,
        "nothing runs or waits": after["num_requests_running"] + after["num_requests_waiting"] == 0,
        "all blocks are back": after["kv_cache_usage_perc"] == 0,
        "outputs equal those alone": set(verdicts) <= {"equal", "near tie"},
    }
    table = Table(
        "what", "value", title=f"{clients} clients, {minutes} minutes, a pool of {pool_blocks} blocks"
    )
    rows: dict[str, Any] = {
        "requests completed": load.completed,
        "requests abandoned": load.left,
        "prompt tokens of the completed": load.prompt_tokens,
        "tokens written by the completed": load.written_tokens,
        "preemptions": int(after.get("num_preemptions_total", 0)),
        "errors seen by clients": len(load.errors),
        "errors in the server's log": len(server_errors),
        "KV pool in use afterwards": after["kv_cache_usage_perc"],
        **{f"outputs against alone: {verdict}": count for verdict, count in sorted(verdicts.items())},
        **{criterion: "yes" if holds else "NO" for criterion, holds in criteria.items()},
    }
    for what, value in rows.items():
        table.add_row(what, f"{value:,}" if isinstance(value, int) else str(value))
    Console().print(table)
    for error in [*Counter(load.errors).most_common(5), *server_errors[:5]]:
        console.print(error)
    settings = {
        "minutes": minutes,
        "clients": clients,
        "leaving": leaving,
        "stay_s": stay_s,
        "prompts": prompts,
    }
    settings |= {
        "longest": longest,
        "most_written": most_written,
        "pool_blocks": pool_blocks,
        "dtype": dtype,
        "seed": seed,
    }
    write_json(json_out, {"settings": settings, "near_tie": NEAR_TIE, "result": rows})
    if not all(criteria.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
