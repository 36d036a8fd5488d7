"""Tables "What grows" of benchmarks/README.md and docs/limits.md: bytes that follow from a text's length.

    python benchmarks/growth.py --json OUT.json

An engine in this process, started twice, is searched for arrays and lists:

- **wide**: what is larger where `max_model_len` is larger. vLLM makes it at start, for `max_num_seqs`
  requests. The memory is zeroed pages, which the system hands out when somebody writes to them.
- **grown**: what is larger when a request has read more. The KV cache is left out: it is made at start, and
  `benchmarks/million.py` counts the blocks that a request holds.

Both are straight lines by their lengths, and so the bytes at `--at` tokens follow from two of them.

    python benchmarks/growth.py --tokens 10000000 --json OUT.json

reads so many tokens in one request instead. It prints the time per token read, and per token written at the
end, beside those at `--first` tokens of the same kind.
"""

import os
import random
import re
import statistics
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import typer
from load import add_requests, random_tokens
from rich.console import Console
from rich.table import Table

from vllm_longctx.cli.engine import METHODS, PremiseError, running_engine
from vllm_longctx.cli.options import JsonOut
from vllm_longctx.cli.output import write_json

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

OURS = ("vllm", "numpy", "queue")  # modules whose objects are searched
LEAST = 64  # bytes: what differs by less between two lengths is no array


def parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What an object holds, each with its place: an attribute, a key, or any index."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield (f".{key}" if isinstance(key, str) and key.isidentifier() else "[]"), part
            yield "[]", key
    elif isinstance(value, list | tuple | set | frozenset | deque):
        yield from (("[]", part) for part in value)
    elif type(value).__module__.startswith(OURS):
        slots = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ())]
        named = {name: getattr(value, name) for name in slots if hasattr(value, name)}
        yield from ((f".{name}", part) for name, part in {**named, **getattr(value, "__dict__", {})}.items())


def own_bytes(value: Any) -> tuple[int, int]:
    """(what the memory is known by, its bytes): of all of an array's memory, or of an object."""
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    if isinstance(value, np.ndarray):
        while isinstance(value.base, np.ndarray):
            value = value.base
        return value.ctypes.data, value.nbytes
    return id(value), sys.getsizeof(value)


def sizes(root: Any) -> Counter[str]:
    """Bytes below an object, by place: the shortest way to each, without numbers of layers and requests."""
    found: Counter[str] = Counter()
    seen: set[int] = set()
    waiting = deque([("", root)])
    while waiting:
        place, value = waiting.popleft()
        if isinstance(value, type | bool | None):
            continue
        known, size = own_bytes(value)
        if known in seen:
            continue
        seen |= {known, id(value)}
        found[place] += size
        if not isinstance(value, torch.Tensor | np.ndarray | str | bytes | int | float):
            waiting += [(re.sub(r"\d+", "*", place + more), part) for more, part in parts(value)]
    return found


def lines(few: Counter[str], many: Counter[str], lengths: tuple[int, int], at: int) -> list[dict[str, Any]]:
    """What differs between two lengths, in bytes per token and in all at `at` tokens."""
    step = lengths[1] - lengths[0]
    grown = {place: many[place] - few[place] for place in many if many[place] - few[place] >= LEAST}
    rows = [
        {
            "place": place,
            "bytes_per_token": more / step,
            "bytes": round(many[place] + more / step * (at - lengths[1])),
        }
        for place, more in grown.items()
    ]
    return sorted(rows, key=lambda row: -row["bytes"])


def read_to(engine: "LLMEngine", length: int) -> None:
    """Have one request read so many tokens, and leave it there."""
    engine.add_request("reader", {"prompt_token_ids": random_tokens(engine, length, length)}, _params(99))
    while not any(output.outputs[0].token_ids for output in engine.step()):  # type: ignore[union-attr]
        pass


def _params(tokens: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=tokens, temperature=0, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )


def show(title: str, rows: list[dict[str, Any]], at: int) -> None:
    table = Table("what", "bytes per token", f"MiB at {at:,}", title=title)
    for row in rows:
        table.add_row(row["place"], f"{row['bytes_per_token']:.2f}", f"{row['bytes'] / 2**20:,.1f}")
    table.add_row("together", "", f"{sum(row['bytes'] for row in rows) / 2**20:,.1f}")
    Console(width=200).print(table)


def speed(
    model: str, config: dict[str, Any], tokens: int, first: int, kwargs: dict[str, Any], written: int = 200
) -> dict[str, float]:
    """Microseconds per token read and written, at `first` and at `tokens` tokens."""
    if tokens < 4 * first:
        raise PremiseError(f"{tokens:,} tokens are too near {first:,}; give more --tokens")
    result: dict[str, float] = {}
    with running_engine(model, config, tokens + written + 2, **kwargs) as (engine, meter):
        text, per_step = random_tokens(engine, tokens, 1), kwargs["max_num_batched_tokens"]
        for length in (first, first, tokens):  # the first of them warms up
            add_requests(engine, [text[:length]], written)
            marks = [time.perf_counter()]
            while engine.has_unfinished_requests():
                engine.step()
                marks.append(time.perf_counter())
            took = np.diff(marks)
            reads = -(-length // per_step)
            last = took[max(reads - first // per_step, 1) : reads - 1]
            result[f"read_{length}"] = 1e6 * statistics.median(last) / per_step
            result[f"written_{length}"] = 1e6 * statistics.median(took[reads + 20 :])
            if meter.preemptions:
                raise PremiseError(f"the request was preempted {meter.preemptions} times")
    return result


def main(
    model: str = "booklm",
    method: str = "lm-infinite",
    lengths: Annotated[
        str, typer.Option(help="Two lengths, for the straight lines; of whole steps and one token.")
    ] = "20481,40961",
    at: Annotated[int, typer.Option(help="Tokens that the tables are for.")] = 200_000_000,
    tokens: Annotated[
        int, typer.Option(help="Read so many tokens, for the speed, and leave out the tables.")
    ] = 0,
    first: Annotated[int, typer.Option(help="The length beside which the speed is seen.")] = 100_000,
    prefix_caching: bool = False,
    max_num_batched_tokens: int = 2048,
    dtype: str = "float32",
    json_out: JsonOut = None,
) -> None:
    random.seed(0)
    config = {"longctx": METHODS[method]}
    kwargs: dict[str, Any] = {
        "dtype": dtype,
        "enforce_eager": True,
        "max_num_batched_tokens": max_num_batched_tokens,
        "enable_prefix_caching": prefix_caching,
    }
    if tokens:
        result = speed(model, config, tokens, first, kwargs)
        table = Table("", f"at {first:,}, µs per token", f"at {tokens:,}", "ratio")
        for kind in ("read", "written"):
            few, many = (result[f"{kind}_{length}"] for length in (first, tokens))
            table.add_row(kind, f"{few:.1f}", f"{many:.1f}", f"{many / few:.3f}")
        Console().print(table)
        write_json(json_out, {"model": model, "config": config, "tokens": tokens, "first": first, **result})
        return
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    short, long = (int(word) for word in lengths.split(","))
    found: list[Counter[str]] = []
    grown: list[Counter[str]] = []
    for longest in (2 * long, 4 * long):
        with running_engine(model, config, longest, **kwargs) as (engine, _):
            found.append(sizes(engine))
            if longest == 4 * long:
                for length in (short, long):
                    read_to(engine, length)
                    grown.append(sizes(engine))
                    engine.abort_request(["reader"])
                    engine.step()
    wide_rows = lines(*found, (2 * long, 4 * long), at)
    grown_rows = lines(*grown, (short, long), at)
    show("as wide as max_model_len (max_num_seqs 1)", wide_rows, at)
    show("grown with the text of one request", grown_rows, at)
    write_json(json_out, {"model": model, "config": config, "at": at, "wide": wide_rows, "grown": grown_rows})


if __name__ == "__main__":
    typer.run(main)
