"""Temp-LoRA under faults: streams that learn, leave at random and lose their trainer, in one engine, for a
long time.

    python benchmarks/temp_lora_soak.py --minutes 30 --json OUT.json

Requests of mixed lengths come as others end; two thirds adapt, more than there are slots; a fifth of these
leave in the middle. Every so often the trainer process is killed, or stopped until it counts as hung.
Afterwards: every request that stayed has exactly the tokens it asked for, all slots and KV blocks are free,
requests that do not adapt wrote the same every time, and the engine leaves no process, no directory of the
trainer's and no shared memory. Exit code 1 if anything of this does not hold.
"""

import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import psutil
import typer
from load import random_tokens
from rich.console import Console
from rich.progress import Progress
from temp_lora import writing

from vllm_longctx.cli.engine import LEARNS, running_engine
from vllm_longctx.cli.options import JsonOut
from vllm_longctx.cli.output import console, write_json

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

AT_ONCE = 10
SLOTS = 4
LEAVES = 0.2
PLAIN_PROMPTS = 4  # those that do not adapt come again and again, to be compared
TRAINER = {
    "timeout_s": 20.0,
    "start_timeout_s": 90.0,
    "max_restarts": 10,
}  # the second is for one stopped while it starts
GRACE_S = 10


@dataclass
class Stream:
    """A request: how many tokens it is to write, and after how many it leaves (None: it stays)."""

    prompt: list[int]
    tokens: int
    adapts: bool
    leaves_after: int | None


def new_stream(engine: "LLMEngine", rng: random.Random) -> Stream:
    if rng.random() < 1 / 3:
        number = rng.randrange(PLAIN_PROMPTS)
        return Stream(random_tokens(engine, 40 + 30 * number, number), 120, False, None)
    tokens = rng.randint(64, 600)
    leaves_after = rng.randint(1, tokens - 1) if rng.random() < LEAVES else None
    return Stream(random_tokens(engine, rng.randint(1, 1500), rng.random()), tokens, True, leaves_after)


def add(engine: "LLMEngine", name: str, stream: Stream) -> None:
    from vllm.inputs import tokens_input

    params = writing(stream.tokens, LEARNS if stream.adapts else None)
    engine.add_request(name, tokens_input(stream.prompt), params)


def trainer() -> psutil.Process | None:
    processes = psutil.Process().children(recursive=True)
    return next((p for p in processes if "vllm_longctx.trainer.sidecar" in " ".join(p.cmdline())), None)


def sum_of(engine: "LLMEngine", name: str) -> float:
    from vllm.v1.metrics.reader import get_metrics_snapshot

    return sum(m.value for m in get_metrics_snapshot() if m.name == f"vllm:{name}" and hasattr(m, "value"))


def main(
    minutes: float = 30,
    model: str = "booklm",
    fault_every_s: Annotated[float, typer.Option(help="Seconds between faults, on average.")] = 60,
    seed: int = 0,
    json_out: JsonOut = None,
) -> None:
    rng, counts, problems = random.Random(seed), Counter[str](), []
    adaptation = {"slots": SLOTS, "block_tokens": 64, "trainer": TRAINER}
    config = {"longctx": {"preset": "temp-lora-quality", "adaptation": adaptation}}
    kwargs: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_num_seqs": AT_ONCE,
        "enable_prefix_caching": True,
    }
    plain: dict[int, list[int]] = {}
    directory = tempfile.mkdtemp(prefix="soak-")
    os.environ["TMPDIR"] = directory  # other engines on this machine leave theirs elsewhere
    with running_engine(model, config, 4096, **kwargs) as (engine, _), Progress(console=console) as progress:
        task = progress.add_task("soaking", total=minutes * 60)
        streams: dict[str, Stream] = {}
        start = time.monotonic()
        next_fault = start + rng.uniform(0.5, 1.5) * fault_every_s
        while (now := time.monotonic()) < start + minutes * 60 or streams:
            progress.update(task, completed=min(now - start, minutes * 60))
            while len(streams) < AT_ONCE + 2 and now < start + minutes * 60:
                name = f"{counts['started']}"
                streams[name] = new_stream(engine, rng)
                add(engine, name, streams[name])
                counts["started"] += 1
            if now > next_fault and now < start + minutes * 60 and (process := trainer()) is not None:
                kind = rng.choice([signal.SIGKILL, signal.SIGSTOP])
                process.send_signal(kind)
                counts[kind.name] += 1
                next_fault = now + rng.uniform(0.5, 1.5) * fault_every_s
            for output in engine.step():
                stream, ids = streams[output.request_id], list(output.outputs[0].token_ids)
                if output.finished:
                    del streams[output.request_id]
                    counts["finished"] += 1
                    if len(ids) != stream.tokens:
                        problems.append(f"{output.request_id} wrote {len(ids)} tokens of {stream.tokens}")
                    if not stream.adapts and plain.setdefault(len(stream.prompt), ids) != ids:
                        problems.append(
                            f"{output.request_id}, which does not adapt, wrote something else than before"
                        )
                elif stream.leaves_after is not None and len(ids) >= stream.leaves_after:
                    engine.abort_request([output.request_id])
                    del streams[output.request_id]
                    counts["left"] += 1
        add(engine, "last", Stream([5], 2, False, None))  # what was aborted last is counted in the next step
        while engine.has_unfinished_requests():
            engine.step()
        for what in ("longctx_adapter_slots_in_use", "longctx_num_requests_held", "kv_cache_usage_perc"):
            if (value := sum_of(engine, what)) != 0:
                problems.append(f"{what} is {value} at the end")
        for what in ("longctx_blocks_trained", "longctx_train_failures", "longctx_trainer_restarts"):
            counts[what] = int(sum_of(engine, what))
        # Where nothing went wrong, nothing was shown.
        happened = ("SIGKILL", "SIGSTOP", "left", "longctx_blocks_trained", "longctx_trainer_restarts")
        problems += [f"{what} is 0: soak for longer" for what in happened if not counts[what]]
        last = trainer()
    if last is not None and psutil.wait_procs([last], timeout=GRACE_S)[1]:
        problems.append(f"the trainer still runs {GRACE_S} s after the engine ended")
    problems += [f"{path.name} was left" for path in Path(directory).glob("longctx-*")]
    shutil.rmtree(directory)
    out = Console()
    out.print({**counts}, problems or "no problem", highlight=False)
    write_json(json_out, {"minutes": minutes, "counts": counts, "problems": problems})
    raise typer.Exit(bool(problems))


if __name__ == "__main__":
    typer.run(main)
