"""The simulation of many sessions, where it can be computed by hand."""

from dataclasses import replace

import pytest
from scale import Costs, Outcome, Simulation, config_of, engine_settings, section, serve, sessions_of

STEP, TOKEN, BLOCK = 0.01, 0.0001, 0.5
COSTS = Costs({1: STEP, 100: STEP}, TOKEN, 0.0, 0.0, BLOCK, BLOCK, beside=1.0)
READ, WRITTEN, HISTORY, VOCABULARY = 64, 64, 256, 4000


def outcome(count: int, learn: float, turns: int = 1, costs: Costs = COSTS) -> tuple[Outcome, Simulation]:
    config = config_of("booklm", section(4), **engine_settings(16, 4096))
    simulation = Simulation(config, costs, 1 << 28)
    sessions = sessions_of(count, learn, turns, HISTORY, 0.0, VOCABULARY)
    ended = serve(simulation, sessions, READ, WRITTEN, VOCABULARY, spread_s=0.0)
    assert len(ended) == count * turns and {turn.written for turn in ended} == {WRITTEN}
    return Outcome.of(ended), simulation


def test_streams_read_and_write_together() -> None:
    seen, simulation = outcome(4, learn=0.0)
    read = 4 * (HISTORY + READ - 1) * TOKEN
    assert seen.turn_s == pytest.approx(WRITTEN * STEP + read, rel=0.01)
    assert seen.tokens_per_s == pytest.approx(4 * WRITTEN / seen.turn_s)
    assert simulation.most_running == 4


def test_a_later_turn_finds_its_text_in_the_prefix_cache() -> None:
    seen, _ = outcome(1, learn=0.0, turns=2)
    first, second = HISTORY + READ, READ + 32  # blocks of 32 tokens
    assert seen.turn_s == pytest.approx(WRITTEN * STEP + (first + second) / 2 * TOKEN, rel=0.02)


def test_a_stream_that_learns_waits_for_its_trainer() -> None:
    seen, simulation = outcome(1, learn=1.0)
    blocks = (HISTORY + READ + WRITTEN - 1) // 128  # the last one computes nothing more
    computed = WRITTEN * STEP + (HISTORY + READ) * TOKEN
    assert seen.turn_s == pytest.approx(computed + blocks * BLOCK, rel=0.05)
    assert simulation.trainer.trained_s == pytest.approx(blocks * BLOCK)


def test_what_was_learned_is_not_learned_again() -> None:
    _, simulation = outcome(1, learn=1.0, turns=3)
    blocks = (HISTORY + 3 * (READ + WRITTEN)) // 128
    assert simulation.trainer.trained_s <= blocks * BLOCK + 1e-6


def test_a_trainer_beside_makes_steps_longer() -> None:
    slow = replace(COSTS, beside=2.0, block=10.0, block_beside=10.0)
    alone, _ = outcome(8, learn=0.0, costs=slow)
    beside, _ = outcome(8, learn=0.125, costs=slow)
    assert beside.turn_p95_s > beside.turn_s > 1.5 * alone.turn_s
