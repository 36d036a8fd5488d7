"""Requests that have chosen what their queries see: with the prefix cache they say what they say without.

Over both of vLLM's schedulers, with the worker of `tests.support.temp_lora_crowd`, whose KV is a digest of
what was seen.
"""

import random
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.v1.core.kv_cache_utils import hash_block_tokens
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput

from tests.support.temp_lora_crowd import VOCABULARY, Crowd
from vllm_longctx.engine import view_hashes
from vllm_longctx.serving.attention_options import TURNS

SEEDS = 6
pytestmark = [
    pytest.mark.parametrize("steps_ahead", [pytest.param(0, marks=pytest.mark.slow), 1]),
    pytest.mark.parametrize("configs", ["keep"], indirect=True),
]


class Choosers(Crowd):
    """Requests of two texts: each reads a part of one, and sees what it has chosen."""

    abort_rate = 0.0
    num_blocks = 120

    def __init__(self, *args: Any, shares: bool):
        self.shares, self.found = shares, dict[str, int]()
        super().__init__(*args)

    def add_requests(self, rng: random.Random) -> None:
        if not self.shares:
            self.scheduler.view_hash = None
        texts = [[rng.randrange(VOCABULARY) for _ in range(180)] for _ in range(2)]
        turns = sorted(rng.sample(range(3, 180), 12))
        for number in range(16):
            prompt = texts[rng.random() < 0.2][: rng.choice([60, 100, 150, rng.randrange(20, 181)])]
            begun = [turn for turn in turns if turn < len(prompt)]
            if rng.random() < 0.3:  # a header that goes on behind the prompt is none
                begun = begun[:-1]
            kind = rng.choice(["none", "n_global", "drop", "plain"])
            options: dict[str, Any] = {"n_global": rng.choice([0, 20])} if kind == "n_global" else {}
            given: dict[str, Any] = {"longctx": options}
            if kind == "drop" and begun:
                given = {"longctx": {"drop": "turns"}, TURNS: begun}
            if kind == "plain":
                options["attention"] = "plain"
            new = {"max_tokens": rng.randrange(1, 40), "prompt_logprobs": None, "logprobs": None}
            request = self.make(f"{number}", prompt, given, **new)
            request.cache_salt = rng.choice([None, None, None, "tenant"])
            self.scheduler.add_request(request)

    @property
    def hits(self) -> int:
        """Tokens that those who have chosen something found in the cache."""
        asked = self.requests
        return sum(n for name, n in self.found.items() if asked[name].sampling_params.extra_args["longctx"])

    def compute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        self.found |= {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        return super().compute(output)


def said(crowd: Choosers) -> dict[str, list[int]]:
    return {name: list(request.output_token_ids) for name, request in crowd.requests.items()}


def run(config: VllmConfig, seed: int, steps_ahead: int, patch: pytest.MonkeyPatch, shares: bool) -> Choosers:
    crowd = Choosers(config, seed, steps_ahead, patch, shares=shares)
    crowd.run()
    return crowd


def test_blocks_are_shared_by_those_who_have_chosen_the_same(
    steps_ahead: int, configs: list[VllmConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    hits = 0
    for seed in range(SEEDS):
        alone, sharing = (
            run(configs[steps_ahead], seed, steps_ahead, monkeypatch, shares) for shares in (False, True)
        )
        assert said(alone) == said(sharing)
        assert alone.hits == 0
        hits += sharing.hits
    assert hits > 16 * SEEDS


@pytest.mark.parametrize("left_out", ["choice", "turns"])
def test_blocks_whose_hashes_leave_out_what_was_chosen_are_found_out(
    steps_ahead: int, configs: list[VllmConfig], monkeypatch: pytest.MonkeyPatch, left_out: str
) -> None:
    def hash_block(function: Any, parent: Any, tokens: Any, keys: Any) -> Any:
        *others, chosen = keys
        kept = (chosen[:-1],) if left_out == "turns" else ()
        return hash_block_tokens(function, parent, tokens, (*others, *kept) or None)

    def say_the_same(seed: int) -> bool:
        try:
            alone, sharing = (
                run(configs[steps_ahead], seed, steps_ahead, monkeypatch, shares) for shares in (False, True)
            )
        except AssertionError:  # also where KV is that of other positions
            return False
        return said(alone) == said(sharing)

    monkeypatch.setattr(view_hashes, "hash_block_tokens", hash_block)
    assert not all(say_the_same(seed) for seed in range(SEEDS))
