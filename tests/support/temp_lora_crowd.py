"""Requests that learn, over Temp-LoRA's schedulers, with a worker and a trainer that compute digests.

The worker is late: it computes what the scheduler sent just before the outputs are looked at. KV is a digest
of a token, of the weights and of the KV before it, in the physical place that the scheduler named; the next
token is a digest of all KV of the pass. So whoever is computed with another version, in another pass, or over
KV of another text, says another text.
"""

import random
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest.mock import MagicMock
from zlib import crc32

import pytest
import torch
from vllm.config import VllmConfig
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput

from tests.support.cuda_engine import BLOCK_SIZE, Core
from vllm_longctx.engine.sliding_kv import LambdaSpec
from vllm_longctx.engine.step import Pass, SlotUse, StepInfo, Weights
from vllm_longctx.engine.stepped_kv import SteppedSpec
from vllm_longctx.geometry import RequestView
from vllm_longctx.scheduling import temp_lora as scheduler
from vllm_longctx.scheduling.temp_lora import AsyncTempLoraScheduler, TempLoraScheduler
from vllm_longctx.settings import active_settings
from vllm_longctx.temp_lora.messages import (
    ANSWERED,
    ANSWERS,
    Began,
    Begin,
    Dead,
    Drop,
    Failed,
    Kept,
    Recall,
    Recalled,
    Report,
    Restarted,
    Resume,
    Save,
    Saved,
    SaveFailed,
    Train,
    Trained,
)

STOP, VOCABULARY = 7, 40


@cache
def window_start(view: RequestView, position: int, n_local: int) -> int:
    return int(view.window_start(torch.tensor([position]), n_local))


def digest(*values: Any) -> int:
    return crc32(repr(values).encode())


@dataclass
class Banks:
    """Of all slots: (owner, version, digest of the weights)."""

    path: str = ""
    modules: dict[str, tuple[int, int]] = field(default_factory=dict)
    max_rank: int = 4
    num_slots: int = 2
    held: dict[tuple[int, int], tuple[int, int, int]] = field(default_factory=dict)

    def read(self, use: SlotUse) -> int:
        if use.weights.bank is None:
            return 0
        owner, version, made = self.held[use.slot, use.weights.bank]
        assert (owner, version) == (use.owner, use.weights.version)
        return made

    def clear(self, slot: int) -> None:
        for bank in range(2):
            self.held.pop((slot, bank), None)


class Trainer:
    """Answers after some polls; what it makes of a text depends on nothing else, but for what it is given in
    `faults`.

    faults: by the number of a poll, Restarted or Dead: then it forgets all it was sent and has made, as a
    process that ends. unsaved: names that cannot be saved. remembers: so
    many versions.
    """

    def __init__(
        self,
        rng: random.Random,
        faults: Mapping[int, Restarted | Dead],
        unsaved: frozenset[str] = frozenset(),
        remembers: int = 8,
    ):
        self.rng, self.faults, self.unsaved, self.polls, self.dead = rng, faults, unsaved, 0, False
        self.slots = Banks()
        self.jobs: deque[tuple[int, Any]] = deque()
        self.made: dict[int, int] = {}  # by owner: a digest of its weights
        self.remembers = remembers
        self.remembered: dict[bytes, int] = {}  # the least recently used first
        self.recalled: list[int] = []  # versions, in answer to Recall
        self.reused = 0  # versions, in answer to Train
        self.saved: dict[str, tuple[int, int]] = {}
        self.reports: list[Report] = []
        self.unanswered: deque[int] = deque()  # owners of jobs
        self.sent: list[tuple[int, Any]] = []  # all jobs, each with the number of the poll before
        self.waits = 0

    def start(self) -> None: ...

    def send(self, job: Any) -> None:
        self.sent.append((self.polls, job))
        if self.dead:
            return
        if isinstance(job, ANSWERED):
            self.unanswered.append(job.owner)
        if not self.jobs and self.rng.random() < 0.5:  # at once, before anybody hears of it
            self.reports += self._do(job)
            return
        at = self.jobs[-1][0] if self.jobs else self.polls
        self.jobs.append((at + self.rng.randrange(4), job))

    def poll(self) -> list[Report]:
        self.polls += 1
        fault = None if self.dead else self.faults.get(self.polls)
        if fault is not None:
            self.jobs.clear()
            self.made.clear()
            self.remembered.clear()
            self.dead = isinstance(fault, Dead)
            self.reports = [
                fault if self.dead else Restarted(self.unanswered[0] if self.unanswered else None)
            ]
            self.unanswered.clear()
        reports, self.reports = self.reports, []
        while self.jobs and self.jobs[0][0] <= self.polls:
            reports += self._do(self.jobs.popleft()[1])
        for _ in range(sum(isinstance(report, ANSWERS) for report in reports)):
            self.unanswered.popleft()
        return reports

    def _do(self, job: Any) -> list[Report]:
        gone = {other.owner for _, other in self.jobs if isinstance(other, Drop)}
        match job:
            case Begin():
                self.made[job.owner] = digest(job.start_from) if job.start_from else 0
                if job.start_from and job.owner not in gone:
                    self.slots.held[job.slot, 0] = job.owner, 0, self.made[job.owner]
                return [Began(job.owner, (job.start_from or "").encode())]
            case Recall() if job.owner not in self.made:
                return [Failed(job.owner, 0, "it has no adapter")]
            case Recall():
                found = ((version, self.remembered.get(named)) for version, named in job.versions)
                version, made = next(((v, made) for v, made in found if made is not None), (0, 0))
                self.recalled.append(version)
                if version and job.owner not in gone:
                    self.made[job.owner] = made
                    self.slots.held[job.slot, job.bank] = job.owner, version, made
                return [Recalled(job.owner, version)]
            case Resume():
                owner, version, made = self.slots.held.get((job.slot, job.bank), (0, 0, 0))
                if (owner, version) != (job.owner, job.version):
                    return [Failed(job.owner, job.version, "StaleSlot")]
                self.made[owner] = made
                return [Began(owner)]
            case Train() | Save() if job.owner not in self.made:
                reason = "it has no adapter"
                failed = isinstance(job, Train)
                return [
                    Failed(job.owner, job.version, reason)
                    if failed
                    else SaveFailed(job.owner, job.name, reason)
                ]
            case Train():
                if digest(job.tokens) % 7 == 0:
                    return [Failed(job.owner, job.version, "it so happens")]
                self.slots.held.pop((job.slot, job.bank), None)  # while it is written
                self.made[job.owner] = made = digest(self.made[job.owner], job.tokens, job.num_targets)
                if job.owner not in gone:
                    self.slots.held[job.slot, job.bank] = job.owner, job.version, made
                remembered = None if job.address is None else self.remembered.get(job.address)
                assert remembered in (None, made)
                losses = [1.0, 1.0] if remembered is None else []
                self.reused += remembered is not None
                kept = [] if job.address is None else self._keep(job, job.address, made)
                return [Trained(job.owner, job.slot, job.bank, job.version, losses, 0.1), *kept]
            case Save():
                if job.name in self.unsaved:
                    return [SaveFailed(job.owner, job.name, "no space left on device")]
                self.saved[job.name] = job.position, self.made[job.owner]
                return [Saved(job.owner, job.name)]
            case Drop():
                self.made.pop(job.owner, None)
        return []

    def _keep(self, job: Train, address: bytes, made: int) -> list[Report]:
        is_new = address not in self.remembered
        self.remembered[address] = made
        for used in job.uses:
            if used in self.remembered:
                self.remembered[used] = self.remembered.pop(used)
        gone = list(self.remembered)[: max(len(self.remembered) - self.remembers, 0)]
        for left in gone:
            del self.remembered[left]
        return [Kept(address, gone)] if is_new else []

    def wait(self, seconds: float, wakes: Sequence[int] = ()) -> None:
        self.waits += 1
        assert self.reports or self.jobs or seconds < 1, "nothing would end it"


class Crowd(Core):
    """Requests as `seed` has them, of which two at once may adapt.

    timing: when the trainer answers, and who leaves when.

    scored: by request and position, what was computed there first.
    num_blocks: of the pool; None for those of the configuration.
    """

    abort_rate, reset_rate = 0.01, 0.0  # per step
    num_blocks: int | None = None

    def __init__(self, config: VllmConfig, seed: int, steps_ahead: int, monkeypatch: pytest.MonkeyPatch):
        rng, self.timing = random.Random(seed), random.Random(f"{seed} {steps_ahead}")
        self.trainer = self.make_trainer()
        monkeypatch.setattr(scheduler, "limit_reader_sleep", lambda **kwargs: None)
        monkeypatch.setattr(scheduler, "trainer_client", lambda *args: self.trainer)
        cls = (TempLoraScheduler, AsyncTempLoraScheduler)[steps_ahead]
        full = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=32, dtype=torch.float32)
        self.geometry = active_settings(config).geometry
        spec: Any = SteppedSpec.from_attention_spec(full, 64)
        if not active_settings(config).temp_lora.has_passes:
            spec = LambdaSpec.from_attention_spec(full, self.geometry)
        num_blocks = self.num_blocks or config.cache_config.num_gpu_blocks
        pool = KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)])
        super().__init__(cls(config, pool, MagicMock(), BLOCK_SIZE, log_stats=True), steps_ahead)
        if not self.trainer.remembers:
            self.scheduler.hasher = None
        self.texts: dict[str, list[int]] = {}
        self.tables: dict[str, list[int]] = {}
        self.slots: dict[str, int] = {}
        self.kv: dict[int, tuple[int, int]] = {}  # by place: the position, and a digest
        self.holds: dict[int, tuple[int, Weights]] = {}
        self.weights: dict[int, int] = {}  # by slot, in the layers
        self.scored: defaultdict[str, dict[int, int]] = defaultdict(dict)
        self.add_requests(rng)

    def make_trainer(self) -> Trainer:
        return Trainer(self.timing, {self.timing.randrange(20, 60): Restarted()})

    def add_requests(self, rng: random.Random) -> None:
        has_passes = active_settings(self.scheduler.vllm_config).temp_lora.has_passes
        for number in range(6):
            options = {
                "temp_lora": True,
                "block_tokens": rng.choice([16, 17, 24]),
                "update_mode": rng.choice(["cascaded", "parallel"]),
                "kv_policy": rng.choice(["reuse", "recompute"]) if has_passes else "keep",
                "epochs": rng.choice([0, 1, 1]),
                "train_on_prompt": rng.random() < 0.7,
                **({"save_as": f"{number}"} if rng.random() < 0.5 else {}),
                **({"start_from": "old"} if rng.random() < 0.3 else {}),
            }
            adapts = {"longctx": options} if rng.random() < 0.6 else None
            stop = [STOP] if rng.random() < 0.5 else None
            prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 100))]
            new = rng.choice([1, 2, rng.randrange(1, 60)])
            self.add(
                f"{number}",
                prompt,
                adapts,
                max_tokens=new,
                stop_token_ids=stop,
                logprobs=None,
                prompt_logprobs=None,
            )

    def compute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        step, firsts = StepInfo.of(output), {}
        for slot in step.freed_slots:
            self.holds.pop(slot, None)
        for new in output.scheduled_new_reqs:
            name, firsts[new.req_id] = new.req_id, new.num_computed_tokens
            self.texts[name], self.tables[name] = list(new.prefill_token_ids), list(new.block_ids[0])
            if name in step.slots:
                self.slots[name] = step.slots[name].slot
        cached = output.scheduled_cached_reqs
        for name, first, blocks in zip(
            cached.req_ids, cached.num_computed_tokens, cached.new_block_ids, strict=True
        ):
            known = [] if name in cached.resumed_req_ids else self.tables[name]
            self.tables[name], firsts[name] = [*known, *(blocks[0] if blocks else [])], first
        for use in step.slots.values():
            if self.holds.get(use.slot) != (use.owner, use.weights):
                self.holds[use.slot] = use.owner, use.weights
                self.weights[use.slot] = self.trainer.slots.read(use)
        tokens = []
        for name, count in output.num_scheduled_tokens.items():
            positions = range(firsts[name], firsts[name] + count)
            tokens.append(self._read(name, positions, step.passes.get(name), step.views.get(name)))
        names = list(output.num_scheduled_tokens)
        return ModelRunnerOutput(names, {name: row for row, name in enumerate(names)}, tokens)

    def _read(self, name: str, positions: range, p: Pass | None, view: RequestView | None) -> list[int]:
        """The token that comes behind them, if that is not known."""
        text, weights = self.texts[name], self.weights[self.slots[name]] if name in self.slots else 0
        first, start, frontier = (0, 0, 0) if p is None else (p.first, p.start, p.frontier)

        def place(position: int) -> int:
            block = self.tables[name][position // BLOCK_SIZE]
            assert block
            return block * BLOCK_SIZE + position % BLOCK_SIZE

        def seen(position: int) -> list[tuple[int, int]]:
            n_global, window = self._sees(position, view)
            where = [*range(first, min(n_global, window)), *range(max(first, window), position + 1)]
            found = [self.kv[place(q)] for q in where]
            assert [at for at, _ in found] == where
            return found

        for position in positions:
            token = text[position if position >= start else position - first]
            before = self.kv[place(position - 1)] if position > first else None
            self.kv[place(position)] = position, digest(token, weights, before, self._sees(position, view))
            if position >= frontier:
                computed = digest(weights, seen(position))
                assert name not in self.slots or position not in self.scored[name]
                assert self.scored[name].setdefault(position, computed) == computed
        if positions.stop < len(text):
            return []
        text.append(digest(seen(positions[-1])) % VOCABULARY)
        return text[-1:]

    def _sees(self, position: int, view: RequestView | None) -> tuple[int, int]:
        """First tokens, and where the window begins."""
        geometry = self.geometry if view is None else view.geometry(self.geometry)
        if geometry.n_local is None:
            return geometry.n_global, 0
        own = view or RequestView(geometry.n_global)
        return geometry.n_global, window_start(own, position, geometry.n_local)

    def run(self) -> None:
        steps = 0
        while self.scheduler.has_requests() or self.under_way:
            self.step()
            steps += 1
            assert steps < 3000, "nobody goes on"
            if self.timing.random() < self.abort_rate:
                self.abort(self.timing.choice(list(self.requests)))
            if self.timing.random() < self.reset_rate:
                self.scheduler.reset_prefix_cache(reset_running_requests=True)
        while self.trainer.jobs:
            self.trainer.poll()
        assert sorted(self.scheduler.free_slots) == [0, 1] and not self.trainer.slots.held
        pool = self.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
