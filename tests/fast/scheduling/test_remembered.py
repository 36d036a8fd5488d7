"""Texts that begin like earlier ones: with remembered versions they say what they say without.

Over both of vLLM's schedulers, with the worker and the trainer of `tests.support.temp_lora_crowd`, which
compute digests: who is computed with another version, or over KV of another one, says another text.
"""

import random
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.v1.core.kv_cache_utils import hash_block_tokens

from tests.support.temp_lora_crowd import VOCABULARY, Crowd, Trainer
from vllm_longctx.scheduling import request_pass
from vllm_longctx.settings import active_settings
from vllm_longctx.temp_lora.messages import Dead, Recall, Restarted, Train

SEEDS = 6
pytestmark = pytest.mark.parametrize("steps_ahead", [pytest.param(0, marks=pytest.mark.slow), 1])


class Again(Crowd):
    """Requests of two texts: each reads a part of one, sometimes with another token in it."""

    abort_rate = 0.0
    remembers = 8
    faults: Mapping[int, Restarted | Dead] = MappingProxyType({})

    def __init__(self, *args: Any, **given: Any):
        vars(self).update(given)
        super().__init__(*args)

    def make_trainer(self) -> Trainer:
        return Trainer(self.timing, self.faults, remembers=self.remembers)

    def add_requests(self, rng: random.Random) -> None:
        slides = not active_settings(self.scheduler.vllm_config).temp_lora.has_passes
        texts = [[rng.randrange(VOCABULARY) for _ in range(180)] for _ in range(2)]
        self.salts = {}
        modes = [
            {
                "block_tokens": rng.choice([16, 17, 24]),
                "update_mode": rng.choice(["cascaded", "parallel"]),
                "kv_policy": "keep" if slides else rng.choice(["reuse", "recompute"]),
                "learn": rng.choice(["all", "all", "prompt", "output"]),
                **({"start_from": "old"} if rng.random() < 0.2 else {}),
            }
            for _ in range(2)
        ]
        for number in range(8):
            prompt = texts[rng.random() < 0.2][: rng.choice([40, 100, 150, 150, rng.randrange(1, 181)])]
            if rng.random() < 0.4:
                prompt[rng.randrange(len(prompt))] = VOCABULARY
            scored = rng.random() < 0.2
            options = {"temp_lora": True, **modes[rng.random() < 0.3]}
            new = {"max_tokens": rng.randrange(1, 40), "prompt_logprobs": 0 if scored else None}
            request = self.make(f"{number}", prompt, {"longctx": options}, logprobs=None, **new)
            request.cache_salt = rng.choice([None, None, None, "tenant"])
            self.scheduler.add_request(request)

    @property
    def trained(self) -> list[Train]:
        return [job for _, job in self.trainer.sent if isinstance(job, Train)]


def assert_same(one: Again, other: Again) -> None:
    for name, request in one.requests.items():
        assert list(other.requests[name].output_token_ids) == list(request.output_token_ids)
        for position in one.scored[name].keys() & other.scored[name].keys():
            assert one.scored[name][position] == other.scored[name][position]


def test_remembered_versions_change_no_text(
    steps_ahead: int, configs: list[VllmConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    recalled, reused, computed = 0, 0, []
    for seed in range(SEEDS):
        crowds = [
            Again(configs[steps_ahead], seed, steps_ahead, monkeypatch, remembers=n, num_blocks=blocks)
            for n, blocks in ((0, None), (4, None), (100, 200))
        ]
        for crowd in crowds:
            crowd.run()
            assert_same(crowds[0], crowd)
        recalled += sum(version > 0 for version in crowds[-1].trainer.recalled)
        reused += crowds[-1].trainer.reused
        computed.append([sum(map(len, crowd.scored.values())) for crowd in crowds])
    none, few, all_ = (sum(of_crowd) for of_crowd in zip(*computed, strict=True))
    assert recalled > SEEDS and reused > SEEDS and none > few > all_


def test_kv_whose_names_leave_out_what_computed_it_is_found_out(
    steps_ahead: int, configs: list[VllmConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a version or a later pass has computed poisons the cache then."""

    def hash_block(function: Any, parent: Any, tokens: Any, keys: Any) -> Any:
        return hash_block_tokens(function, parent, tokens)

    def say_the_same(seed: int) -> bool:
        crowds = [
            Again(configs[steps_ahead], seed, steps_ahead, monkeypatch, remembers=n, num_blocks=200)
            for n in (0, 100)
        ]
        try:
            for crowd in crowds:
                crowd.run()
            assert_same(*crowds)
        except AssertionError:  # also where KV is that of other positions
            return False
        return True

    monkeypatch.setattr(request_pass, "hash_block_tokens", hash_block)
    assert not all(say_the_same(seed) for seed in range(SEEDS))


def test_a_cache_that_is_lost_is_only_a_miss(
    steps_ahead: int, configs: list[VllmConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Restarts at any time, one of them while a version is recalled.

    A request that learns then loses its optimizer's state, which no digest shows.
    """
    for seed in range(SEEDS // 2):
        calm = Again(configs[steps_ahead], seed, steps_ahead, monkeypatch)
        calm.run()
        recalls = [poll + 1 for poll, job in calm.trainer.sent if isinstance(job, Recall)]
        for at in {*recalls[:2], random.Random(seed).randrange(2, calm.trainer.polls)}:
            crowd = Again(configs[steps_ahead], seed, steps_ahead, monkeypatch, faults={at: Restarted()})
            crowd.run()
            assert_same(calm, crowd)
            dead = Again(configs[steps_ahead], seed, steps_ahead, monkeypatch, faults={at: Dead("gone")})
            dead.run()
            for request in dead.requests.values():
                if "start_from" not in request.sampling_params.extra_args["longctx"]:  # else it may end here
                    assert request.num_output_tokens == request.max_tokens


def test_other_salts_share_nothing(
    steps_ahead: int, configs: list[VllmConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    by_salt: dict[str | None, set[bytes]] = {}
    for seed in range(5):
        crowd = Again(configs[steps_ahead], seed, steps_ahead, monkeypatch)
        owners = {a.owner: a.request.cache_salt for a in crowd.scheduler.adapting.values()}
        crowd.run()
        for job in crowd.trained:
            if job.address is not None:
                by_salt.setdefault(owners[job.owner], set()).add(job.address)
    assert by_salt[None] and by_salt["tenant"] and not by_salt[None] & by_salt["tenant"]
