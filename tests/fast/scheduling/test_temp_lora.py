"""Temp-LoRA's scheduler over both of vLLM's: with a step ahead of the outputs, every text is what it is
without.
"""

import pytest
from vllm.config import VllmConfig
from vllm.v1.request import RequestStatus

from tests.support.temp_lora_crowd import STOP, Crowd

SEEDS = 20


def test_a_step_ahead_every_text_is_the_same(
    configs: list[VllmConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = stale = waits = 0
    for seed in range(SEEDS):
        crowds = [Crowd(configs[ahead], seed, ahead, monkeypatch) for ahead in (0, 1)]
        for crowd in crowds:
            crowd.run()
        stale += len(crowds[1].stale)
        waits += sum(crowd.trainer.waits for crowd in crowds)
        for name, request in crowds[0].requests.items():
            other = crowds[1].requests[name]
            if RequestStatus.FINISHED_ABORTED in (request.status, other.status):
                continue
            compared += 1
            assert (other.status, list(other.output_token_ids)) == (
                request.status,
                list(request.output_token_ids),
            )
            assert crowds[0].trainer.saved.get(name) == crowds[1].trainer.saved.get(name)
            length = request.num_tokens - 1  # what a step in vain computes nobody reads
            for crowd in crowds:
                assert sorted(crowd.scored[name])[:length] == list(range(length))
            assert all(crowds[0].scored[name][i] == crowds[1].scored[name][i] for i in range(length))
    assert compared > 4 * SEEDS and stale and waits


@pytest.mark.parametrize("steps_ahead", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_windows_computed_again_by_force_count_once(
    steps_ahead: int, configs: list[VllmConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever of a step under way was computed when all requests are preempted: the text goes on where it
    was.
    """
    monkeypatch.setattr(Crowd, "reset_rate", 0.03)
    monkeypatch.setattr(Crowd, "abort_rate", 0.0)
    stale = set()
    for seed in range(SEEDS):
        crowd = Crowd(configs[steps_ahead], seed, steps_ahead, monkeypatch)
        adapting = set(crowd.scheduler.adapting)
        crowd.run()
        stale |= crowd.stale & adapting
        for name, request in crowd.requests.items():
            length = request.num_tokens - 1
            assert sorted(crowd.scored[name])[:length] == list(range(length))
            assert request.num_output_tokens == request.max_tokens or request.output_token_ids[-1] == STOP
    assert bool(stale) == bool(steps_ahead)
