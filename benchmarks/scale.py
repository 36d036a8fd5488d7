"""Many sessions: real schedulers on a simulated clock, with a model and a trainer that take time and compute
nothing.

    python benchmarks/scale.py check --json COSTS.json
    python benchmarks/scale.py cluster --costs COSTS.json --sessions 10000
    python benchmarks/scale.py overhead

- `check` measures what steps and training cost on this machine, at other numbers of streams than it predicts
  for. Then it has streams read, write and learn for real, and predicts the same by the simulation. A stream
  takes turns: each reads new tokens after the text so far, and writes some. Exit code 1 if a prediction is
  further off than `--tolerance`.
- `cluster` predicts what many sessions get of so many engines, from these costs.
- `overhead` measures the Python work of a scheduler in a step, by the number of requests.

What is simulated is time alone. Schedulers, KV managers, prefix caching and the jobs of Temp-LoRA are the
engine's own. A step takes what as many requests took when measured, more for the tokens of prompts and for
adapters, and longer while the trainer works beside it. The trainer does one job after another.
"""

import heapq
import json
import math
import os
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that the scheduler of a real engine can be asked
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from vllm_longctx.cli.engine import (
    LEARNS,
    STOCK,
    PremiseError,
    load_plugin,
    model_path,
    parse_lengths,
    running_engine,
)
from vllm_longctx.cli.options import JsonOut
from vllm_longctx.cli.output import console, write_json

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.llm_engine import LLMEngine

KV_BYTES = 1 << 30
CALIBRATED = (1, 2, 4, 16, 32, 128, 256)  # requests in a step; others than are predicted
app = typer.Typer(help=__doc__, pretty_exceptions_enable=False)


# --- a load -----------------------------------------------------------------------------------------------


@dataclass
class Session:
    """A text that grows by turns.

    turns: That are left. every_s: From the begin of a turn to that of the next, or to the end of its own if
    that is later.
    """

    number: int
    text: list[int]
    learns: bool
    turns: int
    every_s: float
    words: random.Random


@dataclass(frozen=True)
class Turn:
    session: int
    start: float
    end: float
    written: int

    @property
    def seconds(self) -> float:
        return self.end - self.start


class Runner(Protocol):
    """An engine with a clock, real or not."""

    def now(self) -> float: ...

    def rest(self, until: float) -> None:
        """Nothing is to be computed before."""

    def add(self, name: str, prompt: list[int], written: int, learns: bool) -> None: ...

    def step(self) -> dict[str, list[int]]:
        """What the requests have written that ended in it."""


def sessions_of(
    count: int, learn: float, turns: int, history: int, every_s: float, vocabulary: int, seed: int = 0
) -> list[Session]:
    """learn: The share that learns; the first one does, if any."""
    sessions = []
    for number in range(count):
        words = random.Random(f"{seed}/{number}")
        text = words.choices(range(3, vocabulary), k=history)
        learns = math.floor((number + 1) * learn + 0.999) > math.floor(number * learn + 0.999)
        sessions.append(Session(number, text, learns, turns, every_s, words))
    return sessions


def serve(
    runner: Runner, sessions: Sequence[Session], read: int, written: int, vocabulary: int, spread_s: float
) -> list[Turn]:
    """All turns of all sessions.

    read, written: Tokens of a turn. spread_s: In which the first turns begin, evenly.
    """
    due = [(spread_s * s.number / len(sessions) + runner.now(), s.number) for s in sessions]
    heapq.heapify(due)
    by_number = {s.number: s for s in sessions}
    began: dict[str, tuple[float, Session]] = {}
    turns: list[Turn] = []
    while due or began:
        while due and due[0][0] <= runner.now():
            start, number = heapq.heappop(due)
            session = by_number[number]
            session.text += session.words.choices(range(3, vocabulary), k=read)
            session.turns -= 1
            name = f"{number}/{session.turns}"
            began[name] = (start, session)
            runner.add(name, session.text, written, session.learns)
        if not began:
            runner.rest(due[0][0])
            continue
        for name, tokens in runner.step().items():
            start, session = began.pop(name)
            session.text += tokens
            turns.append(Turn(session.number, start, runner.now(), len(tokens)))
            if session.turns:
                heapq.heappush(due, (max(start + session.every_s, runner.now()), session.number))
    return turns


@dataclass(frozen=True)
class Outcome:
    """tokens_per_s: Written, of all together. turn_s, turn_p95_s: Mean and 95th percentile of turns."""

    tokens_per_s: float
    turn_s: float
    turn_p95_s: float

    @classmethod
    def of(cls, turns: Sequence[Turn]) -> "Outcome":
        seconds = sorted(turn.seconds for turn in turns)
        lasted = max(turn.end for turn in turns) - min(turn.start for turn in turns)
        return cls(
            sum(turn.written for turn in turns) / lasted,
            statistics.fmean(seconds),
            seconds[math.ceil(0.95 * len(seconds)) - 1],
        )


# --- simulated --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Costs:
    """Of a machine, in seconds.

    steps: A step in which so many requests get a token.
    token: Beside that, each token of a prompt.
    adapter: Beside that, each request with an adapter.
    request: What a request takes beside its steps, as it comes.
    block: The training of a block while the engine waits. block_beside: While it computes.
    beside: By how much a step is longer while the trainer works.
    """

    steps: dict[int, float]
    token: float
    adapter: float
    request: float
    block: float
    block_beside: float
    beside: float

    @classmethod
    def read(cls, path: Path) -> "Costs":
        given = json.loads(path.read_text())["costs"]
        return cls(**{**given, "steps": {int(n): s for n, s in given["steps"].items()}})

    def step(self, requests: int, tokens: int, adapters: int) -> float:
        numbers = sorted(self.steps)
        longest = self.steps[numbers[-1]] / numbers[-1] * max(requests, numbers[-1])
        known = [self.steps[n] for n in numbers]
        seconds = float(np.interp(requests, numbers, known)) if requests <= numbers[-1] else longest
        return seconds + self.token * (tokens - requests) + self.adapter * adapters


class SimulatedTrainer:
    """What the scheduler knows of a trainer: jobs go in, reports come out, in their order.

    jobs: The first is being done. done: The part of it that is.
    kept: Addresses of remembered versions, of which none is forgotten.
    """

    slots = None
    probe: Sequence[int] = ()

    def __init__(self, simulation: "Simulation"):
        self.simulation = simulation
        self.jobs: deque[Any] = deque()
        self.done = 0.0
        self.reports: list[Any] = []
        self.kept: set[bytes] = set()
        self.trained_s = 0.0

    def start(self) -> None: ...

    def close(self) -> None: ...

    def send(self, job: Any) -> None:
        from vllm_longctx.temp_lora import messages as m

        if isinstance(job, m.Drop):  # a block that is not begun is not trained any more
            first = list(self.jobs)[:1] if self.done else []
            self.jobs = deque(first + [j for j in list(self.jobs)[len(first) :] if j.owner != job.owner])
        else:
            self.jobs.append(job)
        self.work(0.0, 1.0)

    def needs(self, job: Any) -> float:
        """In blocks' trainings."""
        from vllm_longctx.temp_lora import messages as m

        return float(isinstance(job, m.Train) and job.address not in self.kept)

    @property
    def backlog(self) -> float:
        """In blocks' trainings."""
        return sum(map(self.needs, self.jobs)) - self.done

    def work(self, seconds: float, block_s: float) -> None:
        """For so long, where a block takes `block_s`."""
        while self.jobs:
            needed = (self.needs(self.jobs[0]) - self.done) * block_s
            if needed > seconds:
                self.done += seconds / block_s
                self.trained_s += seconds
                return
            seconds -= needed
            self.trained_s += needed
            self.done = 0.0
            self.answer(self.jobs.popleft())

    def answer(self, job: Any) -> None:
        from vllm_longctx.temp_lora import messages as m

        match job:
            case m.Begin():
                self.reports.append(m.Began(job.owner))
            case m.Recall():
                version = next((v for v, address in job.versions if address in self.kept), 0)
                self.reports.append(m.Recalled(job.owner, version))
            case m.Train():
                losses = [0.0] if job.address not in self.kept else []
                self.reports.append(m.Trained(job.owner, job.slot, job.bank, job.version, losses, 0.0))
                if losses and job.address is not None:
                    self.kept.add(job.address)
                    self.reports.append(m.Kept(job.address, []))

    def poll(self) -> list[Any]:
        reports, self.reports = self.reports, []
        return reports

    def wait(self, seconds: float, wakes: Iterable[int] = ()) -> None:
        if not self.reports:
            self.simulation.pass_idle(seconds)


class Simulation:
    """An engine's scheduler whose steps take what they cost.

    python_s: What each step's scheduling took of a core's time.
    most_running: Requests in the largest step.
    """

    def __init__(self, config: "VllmConfig", costs: Costs, kv_bytes: int):
        self.costs, self.clock = costs, 0.0
        self.python_s: list[float] = []
        self.requests: dict[str, Any] = {}
        self.trainer = SimulatedTrainer(self)
        self.scheduler = scheduler_of(config, kv_bytes, self.trainer)
        self.most_running = 0

    @property
    def blocks(self) -> int:
        """Of the pool."""
        return self.scheduler.kv_cache_manager.block_pool.num_gpu_blocks

    def now(self) -> float:
        return self.clock

    def rest(self, until: float) -> None:
        self.trainer.work(until - self.clock, self.costs.block)
        self.clock = until

    def pass_idle(self, seconds: float) -> None:
        """To the end of the trainer's job at the most."""
        left = (
            (self.trainer.needs(self.trainer.jobs[0]) - self.trainer.done) if self.trainer.jobs else math.inf
        )
        passed = min(seconds, left * self.costs.block + 1e-9)
        self.trainer.work(passed, self.costs.block)
        self.clock += passed

    def add(self, name: str, prompt: list[int], written: int, learns: bool) -> None:
        self.requests[name] = request = request_of(self.scheduler, name, prompt, written, learns)
        self.scheduler.add_request(request)
        self.trainer.work(self.costs.request, self.costs.block_beside)
        self.clock += self.costs.request

    def step(self) -> dict[str, list[int]]:
        from vllm.v1.outputs import ModelRunnerOutput

        begin, clock = time.thread_time(), self.clock
        output = self.scheduler.schedule()
        scheduled_s = time.thread_time() - begin
        computed = self.sampled(output)
        names = list(output.num_scheduled_tokens)
        if names:
            self.pass_step(output)
        elif self.clock == clock:
            self.pass_idle(1e-3)
        begin = time.thread_time()
        done = ModelRunnerOutput(names, {name: row for row, name in enumerate(names)}, computed)
        outputs = self.scheduler.update_from_output(output, done)
        if names:
            self.python_s.append(scheduled_s + time.thread_time() - begin)
            self.most_running = max(self.most_running, len(names))
        ended = [
            o.request_id for each in outputs.values() for o in each.outputs if o.finish_reason is not None
        ]
        return {name: list(self.requests.pop(name).output_token_ids) for name in ended}

    def sampled(self, output: "SchedulerOutput") -> list[list[int]]:
        """A token for each request that has read all its tokens."""
        rows = []
        for name, tokens in output.num_scheduled_tokens.items():
            request = self.requests[name]
            read = request.num_computed_tokens - request.num_in_flight_tokens + tokens
            rows.append([7] if read >= request.num_tokens else [])
        return rows

    def pass_step(self, output: "SchedulerOutput") -> None:
        """A step goes by, and the trainer works beside it."""
        scheduled = output.num_scheduled_tokens
        adapters = sum(name in getattr(self.scheduler, "adapting", ()) for name in scheduled)
        alone = self.costs.step(len(scheduled), output.total_num_scheduled_tokens, adapters)
        beside = self.trainer.backlog * self.costs.block_beside  # the trainer works as long as that
        slow = alone * self.costs.beside
        seconds = slow if beside >= slow else beside + alone - beside / self.costs.beside
        self.trainer.work(seconds, self.costs.block_beside)
        self.clock += seconds


def scheduler_of(config: "VllmConfig", kv_bytes: int, trainer: SimulatedTrainer | None = None) -> "Scheduler":
    """The scheduler of an engine of this configuration, over a pool of so many bytes."""
    from unittest.mock import patch

    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import init_none_hash
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    from vllm_longctx.engine import kv_cache
    from vllm_longctx.scheduling import temp_lora
    from vllm_longctx.startup.sizing import specs_of

    kv_cache.register()
    init_none_hash(sha256)
    kinds = specs_of(config)
    block = max(number * spec.page_size_bytes for (_, spec, _), number in kinds.items())
    blocks = config.cache_config.num_gpu_blocks = kv_bytes // block
    groups = [
        KVCacheGroupSpec([f"{name}.{layer}" for layer in range(number)], spec)
        for (name, spec, _), number in kinds.items()
    ]
    size = config.cache_config.block_size
    scheduler = config.scheduler_config.get_scheduler_cls()
    with patch.object(temp_lora, "trainer_client", lambda *args: trainer):
        made: Scheduler = scheduler(
            config,
            KVCacheConfig(blocks, [], groups),
            StructuredOutputManager(config),
            size,
            hash_block_size=size,
            log_stats=True,
        )
    return made


def request_of(scheduler: "Scheduler", name: str, prompt: list[int], written: int, learns: bool) -> Any:
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher
    from vllm.v1.request import Request

    extra_args = {"longctx": LEARNS} if learns else None
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=written, extra_args=extra_args)
    hasher = get_request_block_hasher(scheduler.block_size, sha256)
    return Request(name, list(prompt), params, None, block_hasher=hasher)


# --- real -------------------------------------------------------------------------------------------------


class Real:
    """An engine in this process."""

    def __init__(self, engine: "LLMEngine"):
        self.engine = engine
        self.begin = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self.begin

    def rest(self, until: float) -> None:
        time.sleep(max(until - self.now(), 0.0))

    def add(self, name: str, prompt: list[int], written: int, learns: bool) -> None:
        from load import greedy
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        extra_args = {"longctx": LEARNS} if learns else None
        params = greedy(written, output_kind=RequestOutputKind.FINAL_ONLY, extra_args=extra_args)
        self.engine.add_request(name, tokens_input(list(prompt)), params)

    def step(self) -> dict[str, list[int]]:
        return {o.request_id: list(o.outputs[0].token_ids) for o in self.engine.step() if o.finished}


@dataclass(frozen=True)
class Step:
    """A step of a real engine. trains: The trainer worked when it began and when it ended."""

    requests: int
    tokens: int
    adapters: int
    trains: bool
    seconds: float

    @property
    def is_decode(self) -> bool:
        return self.requests == self.tokens > 0


class Watched(Real):
    """steps: All of the engine's. added_s: What each request took to be added. blocks_s: And each block."""

    def __init__(self, engine: "LLMEngine"):
        super().__init__(engine)
        self.scheduler = engine.engine_core.engine_core.scheduler  # type: ignore[attr-defined]
        self.steps: list[Step] = []
        self.added_s: list[float] = []
        self.blocks_s: list[float] = []
        handle = self.scheduler.jobs.handle

        def watched(report: Any) -> None:
            if getattr(report, "losses", None):  # of a version that was trained, and not remembered
                self.blocks_s.append(report.seconds)
            handle(report)

        self.scheduler.jobs.handle = watched

    def add(self, name: str, prompt: list[int], written: int, learns: bool) -> None:
        begin = time.perf_counter()
        super().add(name, prompt, written, learns)
        self.added_s.append(time.perf_counter() - begin)

    @property
    def trains(self) -> bool:
        return any(adapting.versions.in_training for adapting in self.scheduler.jobs.by_owner.values())

    def step(self) -> dict[str, list[int]]:
        scheduled: list[SchedulerOutput] = []
        schedule = self.scheduler.schedule

        def watched(*args: Any, **kwargs: Any) -> "SchedulerOutput":
            scheduled.append(schedule(*args, **kwargs))
            return scheduled[0]

        self.scheduler.schedule = watched
        trained, begin = self.trains, time.perf_counter()
        try:
            ended = super().step()
        finally:
            del self.scheduler.schedule
        seconds = time.perf_counter() - begin
        for output in scheduled:
            names = output.num_scheduled_tokens
            adapters = sum(name.startswith("learns") for name in names)
            tokens = output.total_num_scheduled_tokens
            self.steps.append(Step(len(names), tokens, adapters, trained and self.trains, seconds))
        return ended

    def run(self, prompts: Sequence[list[int]], written: int, learning: int = 0) -> list[Step]:
        """All at once, to the end of those that do not learn, or of all if all do.

        learning: How many learn, the first ones.
        """
        first = len(self.steps)
        names = []
        for number, prompt in enumerate(prompts):
            names.append(f"{'learns' if number < learning else 'plain'} {random.random()}")
            self.add(names[-1], prompt, written, number < learning)
        left = set(names[learning:] or names)
        while left:
            left -= self.step().keys()
        self.engine.abort_request(names, internal=False)
        while self.engine.has_unfinished_requests():
            self.step()
        return self.steps[first:]


def calibrate(engine: "LLMEngine", length: int, most: int, vocabulary: int) -> Costs:
    """length: Of texts, in tokens. most: Requests in a step."""
    watched, words = Watched(engine), random.Random(1)

    def prompts(count: int) -> list[list[int]]:
        return [words.choices(range(3, vocabulary), k=length) for _ in range(count)]

    def block_s(run: Callable[[], Any]) -> float:
        watched.blocks_s.clear()
        run()
        if not watched.blocks_s:
            raise PremiseError("no block was trained; the log says why")
        return statistics.median(watched.blocks_s)

    watched.run(prompts(2), 40, learning=1)  # warms up
    steps: dict[int, float] = {}
    token_s, tokens = 0.0, 0
    budget = engine.vllm_config.scheduler_config.max_num_batched_tokens
    for number in (n for n in CALIBRATED if n <= most):
        # The first ones write until the last ones have been read.
        done = watched.run(prompts(number), 20 + 2 * number * length // budget)
        steps[number] = statistics.median(s.seconds for s in done if s.is_decode and s.requests == number)
        known = Costs(steps, *[0.0] * 6)
        for step in done:
            if step.tokens > step.requests:
                token_s += step.seconds - known.step(step.requests, step.requests, 0)
                tokens += step.tokens - step.requests
    costs = Costs(steps, token_s / tokens, 0.0, statistics.fmean(watched.added_s), 0.0, 0.0, 1.0)
    alone = block_s(lambda: watched.run(prompts(1), 2 * length, learning=1))
    first = len(watched.steps)
    beside = block_s(lambda: watched.run(prompts(9), 2 * length, learning=1))
    decodes = [s for s in watched.steps[first:] if s.is_decode]
    slower = [s.seconds / costs.step(s.requests, s.tokens, 0) for s in decodes if s.trains and not s.adapters]
    first = len(watched.steps)
    watched.run(prompts(8), length, learning=8)
    adapted = [s for s in watched.steps[first:] if s.is_decode and s.adapters and not s.trains]
    more = [(s.seconds - costs.step(s.requests, s.tokens, 0)) / s.adapters for s in adapted]
    return replace(
        costs,
        adapter=max(statistics.median(more), 0.0),
        block=alone,
        block_beside=max(beside, alone),
        beside=max(statistics.median(slower), 1.0),
    )


# --- the commands -----------------------------------------------------------------------------------------

Learn = Annotated[float, typer.Option(help="The share of sessions that learns.", min=0.0, max=1.0)]
Slots = Annotated[int, typer.Option(help="adaptation.slots of an engine.", min=1)]
Read = Annotated[int, typer.Option(help="Tokens that a turn reads.", min=1)]
Written = Annotated[int, typer.Option(help="Tokens that a turn writes.", min=1)]
History = Annotated[int, typer.Option(help="Tokens of a session's text before its first turn.", min=0)]


def section(slots: int, learns: bool = True) -> dict[str, Any]:
    adaptation = {"adaptation": {"slots": slots, "cache_gib": 1}} if learns else {}
    return {"longctx": {"preset": "lm-infinite", **adaptation}}


def engine_settings(max_num_seqs: int, longest: int) -> dict[str, Any]:
    return {
        "dtype": "float32",
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max(2048, max_num_seqs),
        "max_model_len": longest,
        "enable_prefix_caching": True,
        "kv_cache_memory_bytes": KV_BYTES,
    }


def config_of(model: str, additional_config: dict[str, Any], **settings: Any) -> "VllmConfig":
    load_plugin()
    from vllm.engine.arg_utils import EngineArgs

    if additional_config is STOCK:
        settings["hf_overrides"] = {"max_position_embeddings": settings["max_model_len"]}
    return EngineArgs(
        model=model_path(model), additional_config=additional_config, skip_tokenizer_init=True, **settings
    ).create_engine_config()


@app.command()
def check(
    model: str = "booklm",
    streams: str = "1,8,64,200",
    turns: int = 2,
    history: History = 512,
    read: Read = 128,
    written: Written = 128,
    learn: Learn = 0.125,
    slots: Slots = 16,
    tolerance: float = 0.15,
    enforce_eager: bool = False,
    json_out: JsonOut = None,
) -> None:
    """Predict what a load of real streams takes, and compare."""
    counts = parse_lengths(streams, "--streams")
    most = max(counts)
    settings = engine_settings(max(most, 16), history + turns * (read + written) + 1024)
    longest = settings.pop("max_model_len")
    rows = []
    with running_engine(model, section(slots), longest, enforce_eager=enforce_eager, **settings) as (
        engine,
        _,
    ):
        vocabulary = engine.vllm_config.model_config.get_vocab_size()
        with console.status("measuring steps and training"):
            costs = calibrate(engine, history, most, vocabulary)
        for count in counts:
            outcomes = []
            config = config_of(model, section(slots), max_model_len=longest, **settings)
            simulation = Simulation(config, costs, KV_BYTES)
            if simulation.blocks != engine.vllm_config.cache_config.num_gpu_blocks:
                raise PremiseError(f"the engine has another pool than {simulation.blocks} blocks")
            for runner in (Real(engine), simulation):
                engine.reset_prefix_cache()
                sessions = sessions_of(count, learn, turns, history, 0.0, vocabulary, seed=count)
                with console.status(f"{count} streams, {type(runner).__name__.lower()}"):
                    ended = serve(runner, sessions, read, written, vocabulary, spread_s=0.0)
                outcomes.append(Outcome.of(ended))
            rows.append({"streams": count, "real": asdict(outcomes[0]), "predicted": asdict(outcomes[1])})
    worst = print_check(rows, costs)
    write_json(
        json_out,
        {
            "model": model,
            "load": [turns, history, read, written, learn],
            "costs": asdict(costs),
            "rows": rows,
        },
    )
    if worst > tolerance:
        console.print(f"[red]a prediction is {worst:.0%} off; {tolerance:.0%} were allowed")
        raise typer.Exit(1)


def print_check(rows: Sequence[dict[str, Any]], costs: Costs) -> float:
    """Returns how far the worst prediction is off, as a share of what was measured."""
    table = Table("streams", title="Measured, and predicted by the simulation")
    for name in ("tokens/s", "turn, s", "95 %, s"):
        for column in (name, "predicted", "off"):
            table.add_column(column, justify="right")
    worst = 0.0
    for row in rows:
        cells = [str(row["streams"])]
        for name in ("tokens_per_s", "turn_s", "turn_p95_s"):
            real, predicted = row["real"][name], row["predicted"][name]
            off = predicted / real - 1
            worst = max(worst, abs(off))
            cells += [f"{real:,.2f}", f"{predicted:,.2f}", f"{off:+.1%}"]
        table.add_row(*cells)
    out = Console(width=120)
    out.print(table)
    steps = ", ".join(f"{n}: {1000 * s:.1f}" for n, s in costs.steps.items())
    out.print(
        f"Steps, ms by requests: {steps}. A prompt's token {1e6 * costs.token:.0f} µs, an adapter "
        f"{1e6 * costs.adapter:.0f} µs, a request {1e6 * costs.request:.0f} µs, a block "
        f"{1000 * costs.block:.0f} ms, {1000 * costs.block_beside:.0f} ms beside steps, which are then "
        f"{costs.beside:.2f} × as long.",
        highlight=False,
    )
    return worst


@app.command()
def cluster(
    costs: Annotated[Path, typer.Option(help="What `check --json` has written.")],
    model: str = "booklm",
    sessions: Annotated[int, typer.Option(help="Of all engines together.", min=1)] = 10_000,
    engines: Annotated[str, typer.Option(help="Numbers of engines to try.")] = "50,100,200,400",
    turn_every: Annotated[float, typer.Option(help="Seconds from one turn of a session to its next.")] = 60.0,
    turns: int = 4,
    history: History = 512,
    read: Read = 128,
    written: Written = 128,
    learn: Learn = 0.125,
    slots: Slots = 16,
    max_num_seqs: int = 256,
    json_out: JsonOut = None,
) -> None:
    """Predict what many sessions get of so many engines; each session stays with one engine."""
    known = Costs.read(costs)
    longest = history + turns * (read + written) + 1024
    table = Table(
        *("engines", "sessions each", "tokens/s", "turn, s", "95 %, s", "in a step", "trainer", "Python, ms"),
        title=f"{sessions:,} sessions, a turn of {read} + {written} tokens every {turn_every:g} s",
    )
    rows = []
    for count in parse_lengths(engines, "--engines"):
        config = config_of(model, section(slots, learn > 0), **engine_settings(max_num_seqs, longest))
        each = math.ceil(sessions / count)
        vocabulary = config.model_config.get_vocab_size()
        simulation = Simulation(config, known, KV_BYTES)
        with console.status(f"{count} engines"):
            ended = serve(
                simulation,
                sessions_of(each, learn, turns, history, turn_every, vocabulary),
                *(read, written, vocabulary, turn_every),
            )
        outcome = Outcome.of(ended)
        trainer = simulation.trainer.trained_s / simulation.clock
        python_ms = 1000 * statistics.fmean(simulation.python_s)
        rows.append(
            {
                "engines": count,
                "sessions_each": each,
                **asdict(outcome),
                "most_in_a_step": simulation.most_running,
            }
        )
        rows[-1] |= {"trainer_busy": trainer, "python_ms": python_ms}
        table.add_row(
            f"{count:,}",
            f"{each:,}",
            f"{outcome.tokens_per_s * count:,.0f}",
            f"{outcome.turn_s:,.1f}",
            f"{outcome.turn_p95_s:,.1f}",
            f"{simulation.most_running:,}",
            f"{trainer:.0%}",
            f"{python_ms:.2f}",
        )
    Console(width=120).print(table)
    write_json(json_out, {"sessions": sessions, "rows": rows})


SCHEDULERS: dict[str, tuple[dict[str, Any], float]] = {
    "vLLM's": (STOCK, 0.0),
    "sliding": (section(1, learns=False), 0.0),
    "learning": (section(1), 0.1),
}


@app.command()
def overhead(
    model: str = "booklm",
    requests: str = "200,1000,10000",
    length: Annotated[int, typer.Option(help="Tokens of each request's prompt.", min=1)] = 600,
    steps: int = 30,
    json_out: JsonOut = None,
) -> None:
    """The Python work of a scheduler in a step, while so many requests write, or wait behind 200 that do."""
    counts = parse_lengths(requests, "--requests")
    table = Table(
        "scheduler",
        *(f"{count:,} {what}" for what in ("write", "wait") for count in counts),
        title="Milliseconds of Python in a step, and microseconds of each request",
    )
    rows = []
    for name, (additional_config, learn) in SCHEDULERS.items():
        cells = [name]
        for waits in (False, True):
            for count in counts:
                with console.status(f"{name}, {count:,} requests"):
                    seconds = python_seconds(model, additional_config, learn, count, waits, length, steps)
                cells.append(f"{1000 * seconds:,.2f} ({1e6 * seconds / count:,.1f})")
                rows.append({"scheduler": name, "requests": count, "wait": waits, "seconds": seconds})
        table.add_row(*cells)
    Console(width=140).print(table)
    write_json(json_out, {"length": length, "steps": steps, "rows": rows})


WRITING = 200  # requests, while others wait


def python_seconds(
    model: str,
    additional_config: dict[str, Any],
    learn: float,
    count: int,
    waits: bool,
    length: int,
    steps: int,
) -> float:
    """Median of steps in which requests write."""
    from vllm_longctx.startup.sizing import layers_of

    writing = WRITING if waits else count
    # Those that wait learn, where any do: they wait for a slot, and not for a place among those that run.
    settings = engine_settings(writing + (waits and learn > 0), length + 2 * steps)
    settings["max_num_batched_tokens"] = (writing + 1) * length
    given = section(round(learn * writing)) if learn else additional_config
    config = config_of(model, given, **settings)
    free = Costs({1: 0.0}, *[0.0] * 5, beside=1.0)
    pool = writing * sum(kind.bytes_of(kind.blocks + kind.in_flight + 1) for kind in layers_of(config))
    simulation = Simulation(config, free, pool)
    words = random.Random(0)
    for number in range(writing + count * waits):
        prompt = words.choices(range(3, 4000), k=length)
        learns = learn > 0 and (number >= writing or number % round(1 / learn) == 0)
        simulation.add(str(number), prompt, 2 * steps - 1, learns)
    while len(simulation.python_s) < steps // 3:  # prompts are read
        simulation.step()
    simulation.python_s.clear()
    while len(simulation.python_s) < steps:
        simulation.step()
    return statistics.median(simulation.python_s)


if __name__ == "__main__":
    app()
