"""How windows of each mode move, and what a request keeps for them."""

from typing import Any

import pytest

from vllm_longctx.config import LongContextConfig
from vllm_longctx.geometry import Geometry
from vllm_longctx.modes import MODES, load
from vllm_longctx.settings import Settings, for_model
from vllm_longctx.windows import MemoryWindows, Passes, SlidingWindows, Windows

TRAINED, BLOCK = 4096, 32
ANY = 1 << 30  # tokens


def windows(value: dict[str, Any]) -> Windows:
    return Settings.of(for_model(LongContextConfig.parse(value), TRAINED, BLOCK, 6, {})).windows


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_what_a_row_names_is_there(mode: Any) -> None:
    assert issubclass(load(f"windows.{mode.windows}"), Windows)
    assert all(callable(load(f"startup.checks.{check}")) for check in mode.checks)


@pytest.mark.parametrize(
    ("value", "distance"),
    [
        ({"attention": {"method": "none"}}, TRAINED),
        ({"preset": "temp-lora-quality", "adaptation": {"window_tokens": 512}}, TRAINED),
        ({"attention": {"n_local": 512}}, TRAINED),
        ({"attention": {"n_local": 512, "distance_ceiling": 1024}}, 1024),
        ({"attention": {"n_local": 512, "distance_ceiling": 256}}, 512),
        ({"preset": "streaming", "attention": {"n_local": 512}}, 516),
        ({"attention": {"method": "focused", "mem_layers": [2], "n_local": 512}}, 512),
        ({"attention": {"method": "focused", "mem_layers": [], "n_local": 512}}, 512),
    ],
)
def test_the_longest_distance(value: dict[str, Any], distance: int) -> None:
    assert windows(value).longest_distance(TRAINED) == distance


def test_geometry_is_of_sliding_layers() -> None:
    assert windows({"attention": {"n_local": 512}}).geometry == Geometry(10, 512, TRAINED)
    assert windows({"attention": {"method": "focused", "mem_layers": [2]}}).geometry == Geometry()
    assert Passes(512, 512).geometry == MemoryWindows(512).geometry == Geometry()


@pytest.mark.parametrize("in_flight", [1, 32, 33, 2048])
@pytest.mark.parametrize("blocks", [80, 81, 1000])
@pytest.mark.parametrize("n_global", [0, 1, 32, 33])
def test_the_largest_window_keeps_just_so_many_blocks(in_flight: int, blocks: int, n_global: int) -> None:
    def sliding(n_local: int) -> Windows:
        return SlidingWindows(Geometry(n_global, n_local))

    for make in (sliding, lambda tokens: Passes(tokens, tokens)):
        largest = make(BLOCK).largest(blocks, BLOCK, in_flight)
        assert largest is not None
        assert make(largest).most_blocks(BLOCK, in_flight, ANY) == blocks
        assert make(largest + 1).most_blocks(BLOCK, in_flight, ANY) == blocks + 1


def test_no_request_keeps_more_than_its_text() -> None:
    assert Windows().most_blocks(BLOCK, 2048, 100) == 4
    assert SlidingWindows(Geometry(10, 512)).most_blocks(BLOCK, 2048, 100) == 4
    assert Passes(512, 64).most_blocks(BLOCK, 2048, 100) == 4 + 1  # as a pass may begin inside a block
    assert Passes(64, 80).most_blocks(BLOCK, 2048, 100) == 3 + 1
