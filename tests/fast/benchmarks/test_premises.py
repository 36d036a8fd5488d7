"""A figure whose premise does not hold is not given."""

import cProfile
import pstats
from types import SimpleNamespace
from typing import Any

import lm_infinite
import perplexity
import profile_step
import pytest
import temp_lora

from vllm_longctx.cli.engine import TRAINER_COUNTS, PremiseError, blocks_are_trained
from vllm_longctx.cli.score import blocks_of_prompt, bucket_edges


class Trains:
    """An engine whose trainer has trained so many blocks, failed at others, and was started again."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(TRAINER_COUNTS, 5)  # of earlier requests

    def add(self, **counts: int) -> None:
        for name, count in counts.items():
            self.counts[name] += count

    def get_metrics(self) -> list[Any]:
        counters = [SimpleNamespace(name=f"vllm:longctx_{n}", value=v) for n, v in self.counts.items()]
        return [*counters, SimpleNamespace(name="a histogram, without a value")]


@pytest.mark.parametrize(
    ("bounds", "found", "reason"),
    [
        ((3,), {"blocks_trained": 3}, None),
        ((3, 4), {"blocks_trained": 4}, None),
        ((0,), {}, None),
        ((3,), {"blocks_trained": 2}, "2 blocks were trained where 3 should be"),
        ((3, 4), {"blocks_trained": 5}, "5 blocks were trained where 3 to 4 should be"),
        ((0,), {"blocks_trained": 1}, "1 blocks were trained where 0 should be"),
        ((3,), {"blocks_trained": 3, "train_failures": 1}, "1 failed"),
        ((3,), {"blocks_trained": 3, "trainer_restarts": 2}, "started again 2 times"),
    ],
)
def test_blocks_are_counted(bounds: tuple[int, ...], found: dict[str, int], reason: str | None) -> None:
    engine: Any = Trains()
    if reason is None:
        with blocks_are_trained(engine, *bounds):
            engine.add(**found)
        return
    with pytest.raises(PremiseError, match=reason), blocks_are_trained(engine, *bounds):
        engine.add(**found)


@pytest.mark.parametrize(("options", "blocks"), [({}, 6), ({"epochs": 2}, 6), ({"epochs": 0}, 0)])
def test_all_blocks_but_a_streams_last_are_trained(
    options: dict[str, Any], blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, prompts = Trains(), [[1], [2]]

    def engine_speed(*args: Any) -> float:
        engine.add(blocks_trained=trained)
        return 1.0

    monkeypatch.setattr(temp_lora, "engine_speed", engine_speed)
    trained = blocks
    assert temp_lora.learning_speed(engine, prompts, 32, 8, options, 2) == 1.0  # type: ignore[arg-type]
    trained = blocks + 1
    with pytest.raises(PremiseError):
        temp_lora.learning_speed(engine, prompts, 32, 8, options, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tokens", "changes", "blocks"),
    [
        (64, {}, (3, 4)),  # the last one only if there is time
        (65, {}, (4, 4)),
        (63, {}, (3, 4)),  # two more tokens are written
        (15, {}, (0, 1)),
        (65, {"update_mode": "parallel"}, (3, 4)),
        (65, {"learn": "output"}, (0, 0)),
        (65, {"learn": "none"}, (0, 0)),
        (65, {"epochs": 0}, (0, 0)),
    ],
)
def test_blocks_of_a_prompt(tokens: int, changes: dict[str, Any], blocks: tuple[int, int]) -> None:
    adaptation = {"block_tokens": 16, "update_mode": "cascaded", "learn": "all", "epochs": 2}
    config = SimpleNamespace(additional_config={"longctx": {"adaptation": {**adaptation, **changes}}})
    engine: Any = SimpleNamespace(vllm_config=config)
    assert blocks_of_prompt(engine, tokens) == blocks


def test_a_stream_that_ends_early_is_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    params: Any = SimpleNamespace(max_tokens=8)
    monkeypatch.setattr(temp_lora, "run_jobs", lambda *args: [8, 7])
    with pytest.raises(PremiseError, match="a stream wrote 7 tokens of 8"):
        temp_lora.engine_speed(object(), [[1], [2]], params, 2)  # type: ignore[arg-type]


def test_decoding_is_timed_where_all_requests_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_infinite, "random_tokens", lambda *args: [1])
    steps = [(0.0, 3), (1.0, 3), (2.0, 3), (12.0, 2), (13.0, 3)]  # one was preempted
    monkeypatch.setattr(lm_infinite, "token_steps", lambda *args: steps)
    engine: Any = object()
    assert lm_infinite.decode_speed(engine, [1, 2], 3, 5) == 3
    with pytest.raises(PremiseError, match="4 requests never decoded at once"):
        lm_infinite.decode_speed(engine, [1, 2], 4, 5)


def test_a_part_that_was_never_called_has_no_time() -> None:
    profile = cProfile.Profile()
    profile.runcall(bucket_edges, 64, 16)
    stats = pstats.Stats(profile)
    assert profile_step.milliseconds(stats, ["bucket_edges"], 1) > 0
    with pytest.raises(PremiseError, match="no function of gone was called"):
        profile_step.milliseconds(stats, ["gone"], 1)


def test_a_token_without_a_score_is_no_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent:
        def __enter__(self) -> tuple[Any, None]:
            return SimpleNamespace(
                add_request=lambda *args: None, has_unfinished_requests=lambda: False
            ), None

        def __exit__(self, *args: object) -> None: ...

    monkeypatch.setattr(perplexity, "method_engine", lambda *args, **kwargs: Silent())
    with pytest.raises(PremiseError, match="left tokens of a without a score"):
        list(perplexity.score_fresh_windows("booklm", {"a": [1, 2, 3]}, 512))
