"""Windows, memory and prefix hits over vLLM's schedulers, with a worker that computes digests instead of
attention.

KV of a position is a digest of its token, of where its window began, and of all KV before; memory layers' KV
says whether its window is open. So whoever is given KV of another text, of another cut into windows, or in
another state, is found out.
"""

import random
from typing import Any
from zlib import crc32

import pytest
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from tests.support.scheduler_steps import BS, Steps
from vllm_longctx.engine.memory_kv import MemoryManager, MemorySpec
from vllm_longctx.engine.step import StepInfo, copied_blocks
from vllm_longctx.settings import active_settings

SECTION = {"attention": {"method": "focused", "mem_layers": [1], "n_local": 96, "last_context_length": 70}}
OPEN, MEMORY = "open", "memory"


class Crowd(Steps):
    def __init__(self, seed: int, steps_ahead: int, num_blocks: int, mem_layers: list[int]):
        engine = {
            "enable_prefix_caching": True,
            "max_num_batched_tokens": 80,
            "max_num_seqs": 4,
            "max_model_len": 640,
        }
        section = {"attention": SECTION["attention"] | {"mem_layers": mem_layers}}
        super().__init__(section, steps_ahead, num_blocks, **engine)
        self.rng = random.Random(seed)
        windows = active_settings(self.scheduler.vllm_config).memory.windows
        assert windows is not None
        self.windows = windows
        self.is_memory = [isinstance(manager.kv_cache_spec, MemorySpec) for manager in self.managers]
        self.tables: dict[str, list[list[int]]] = {}
        self.kv: dict[tuple[int, int], Any] = {}  # by group and slot
        self.hits: dict[str, int] = {}

    def compute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        firsts = {}
        for new in output.scheduled_new_reqs:
            firsts[new.req_id], self.tables[new.req_id] = (
                new.num_computed_tokens,
                [list(ids) for ids in new.block_ids],
            )
            self.hits[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for name, first, blocks in zip(
            cached.req_ids, cached.num_computed_tokens, cached.new_block_ids, strict=True
        ):
            firsts[name] = first
            if name in cached.resumed_req_ids:
                self.tables[name] = [[] for _ in self.is_memory]
            for table, ids in zip(self.tables[name], blocks or (), strict=False):
                table.extend(ids)
        self._copy(output)
        names = list(output.num_scheduled_tokens)
        ranges = {
            name: range(firsts[name], firsts[name] + output.num_scheduled_tokens[name]) for name in names
        }
        for name in names:
            self._close(name, StepInfo.of(output).windows[name])
        digests = {name: self._digests(self.requests[name], ranges[name].stop) for name in names}
        for name in names:
            self._write(name, ranges[name], StepInfo.of(output).windows[name].start, digests[name])
        tokens = []
        for name in names:
            self._check(name, ranges[name], StepInfo.of(output).windows[name].start, digests[name])
            is_last = ranges[name].stop == len(digests[name]) == self.requests[name].num_tokens
            tokens.append([digests[name][-1] % 40] if is_last else [])
        return ModelRunnerOutput(names, {name: row for row, name in enumerate(names)}, tokens)

    def _digests(self, request: Request, end: int) -> list[int]:
        """Of what is known of the text before `end`; a step ahead may be of a token that will never come."""
        digests, digest = [], 0
        for position, token in enumerate(request.all_token_ids[:end]):
            digest = crc32(
                repr((digest, token, self.windows.start(position, request.num_prompt_tokens))).encode()
            )
            digests.append(digest)
        return digests

    def _copy(self, output: SchedulerOutput) -> None:
        if copies := copied_blocks(StepInfo.of(output).windows.values()):
            old = dict(self.kv)
            for group, source, target in (
                (g, a, b) for g in self._memory_groups() for a, b in zip(*copies, strict=True)
            ):
                for offset in range(BS):
                    self.kv[group, target * BS + offset] = old.get((group, source * BS + offset))

    def _memory_groups(self) -> list[int]:
        return [group for group, is_memory in enumerate(self.is_memory) if is_memory]

    def _slot(self, name: str, group: int, position: int) -> tuple[int, int]:
        block = self.tables[name][group][position // BS]
        assert block
        return group, block * BS + position % BS

    def _close(self, name: str, window: Any) -> None:
        if window.closes is None:
            return
        for group in self._memory_groups():
            for position in range(window.closes, window.start):
                slot = self._slot(name, group, position)
                assert self.kv[slot][1:] == (OPEN, window.closes)
                self.kv[slot] = (self.kv[slot][0], MEMORY)

    def _write(self, name: str, positions: range, start: int, digests: list[int]) -> None:
        for position in positions[: len(digests) - positions.start]:
            assert self.windows.start(position, self.requests[name].num_prompt_tokens) == start
            for group in range(len(self.is_memory)):
                self.kv[self._slot(name, group, position)] = (digests[position], OPEN, start)

    def _check(self, name: str, positions: range, start: int, digests: list[int]) -> None:
        for group, is_memory in enumerate(self.is_memory):
            for position in range(0 if is_memory else start, len(digests)):
                state = (OPEN, start) if position >= start else (MEMORY,)
                assert self.kv[self._slot(name, group, position)] == (digests[position], *state)

    def run(self) -> None:
        while self.scheduler.has_requests() or self.under_way:
            self.step()
            if self.rng.random() < 0.01:
                self.abort(self.rng.choice(list(self.requests)))


@pytest.mark.parametrize(
    ("num_blocks", "steps_ahead", "mem_layers"),
    [
        (30, 1, [1]),
        (200, 0, [1]),
        (15, 1, []),
        *(pytest.param(*case, [1], marks=pytest.mark.slow) for case in ((30, 0), (200, 1))),
    ],
)
def test_whoever_is_hit_is_given_what_it_would_have_computed(
    steps_ahead: int, num_blocks: int, mem_layers: list[int]
) -> None:
    """Chats whose turns are written again, by many at once, over a pool that is too small, or not."""
    core = Crowd(1, steps_ahead, num_blocks, mem_layers)
    texts, number = [[core.rng.randrange(40) for _ in range(300)] for _ in range(3)], 0
    for _ in range(25):
        for _ in range(core.rng.randrange(1, 4)):
            text = core.rng.choice(texts)
            prompt = text[: core.rng.randint(1, core.rng.choice([len(text), 150]))]
            tail = [core.rng.randrange(40) for _ in range(core.rng.choice([0, 3, 50]))]
            core.add(
                f"{number}", prompt + tail, max_tokens=core.rng.choice([1, 20, 150]), prompt_logprobs=None
            )
            number += 1
        for _ in range(core.rng.randrange(1, 25)):
            core.step()
        texts[core.rng.randrange(3)] = list(core.rng.choice(list(core.requests.values())).all_token_ids)[:450]
    core.run()
    hits = list(core.hits.values())
    windows = core.windows
    assert any(0 < hit < windows.tokens for hit in hits)
    assert any(hit >= windows.tokens for hit in hits)
    assert all(hit % windows.tokens == 0 for hit in hits if hit > windows.tokens)
    preempted = any(request.num_preemptions for request in core.requests.values())
    assert preempted == (num_blocks < 200)
    for manager in core.managers:
        assert not manager.req_to_blocks
        if isinstance(manager, MemoryManager):
            assert not (manager._open or manager._to_copy or manager._copies)
    pool = core.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == num_blocks - 1
