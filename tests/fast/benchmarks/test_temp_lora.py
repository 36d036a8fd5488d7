"""The pure parts of benchmarks/temp_lora.py and benchmarks/temp_lora_quality.py, and the official loop on a
tiny model.
"""

import math
from pathlib import Path

import pytest
import temp_lora
import temp_lora_quality as quality
from temp_lora import Shape, Sizes


def test_flops_of_a_pass_and_of_training() -> None:
    shape = Shape(weights=10, layers=2, width=3)
    # Token 0 sees one key, token 1 two: 2 FLOPs a weight, 4 a key, layer and unit of width.
    assert shape.forward(0, 2) == 2 * 2 * 10 + 4 * 2 * 3 * (1 + 2)
    assert shape.forward(1, 2) == shape.forward(0, 2) - shape.forward(0, 1)
    plain = shape.per_token(Sizes(block_tokens=8, context_tokens=8, window_tokens=16))
    assert plain == shape.forward(0, 16) / 8
    learning = shape.per_token(Sizes(8, 8, 16, train_context_tokens=4, epochs=2), training_forwards=2)
    assert learning == plain + 2 * 2 * shape.forward(0, 12) / 8


def test_flops_of_the_presets_have_the_papers_sign_and_size() -> None:
    assert temp_lora.LLAMA_2_7B.weights == pytest.approx(6.6e9, rel=0.01)
    economic, best = temp_lora.flops_rows()
    for row in (economic, best):
        assert min(abs(x - row["paper"]) for x in row["change"].values()) < 0.1


def test_the_official_loop_writes_whole_blocks_and_leaves_the_model_as_it_was(tiny_llama: Path) -> None:
    recipe = {
        "rank": 4,
        "dropout": 0.0,
        "block_tokens": 8,
        "epochs": 2,
        "learning_rate": 1e-2,
        "adam_eps": 1e-7,
    }
    recipe |= {"weight_decay": 0.0, "train_context_tokens": 8, "context_tokens": 16}
    write = temp_lora.official_loop(str(tiny_llama), recipe, threads=1)
    first = write(list(range(3, 20)), 24)
    assert len(first) == 24
    assert write(list(range(3, 20)), 24)[:8] == first[:8]


def test_segments_are_fifths_and_the_control_is_there_only_where_it_was_read() -> None:
    base = [math.log(20.0)] * 5 + [math.log(10.0)] * 5
    reading = quality.Reading({"a": [math.log(10.0)] * 10}, {"a": base})
    row = quality.as_row(quality.Setting("reuse", 64), "a", reading)
    assert [(s["start"], s["end"]) for s in row["segments"]] == [(1, 3), (3, 5), (5, 7), (7, 9), (9, 11)]
    assert [round(quality.change(s), 3) for s in row["segments"]] == [
        -0.5,
        -0.5,
        round(10 / math.sqrt(200) - 1, 3),
        0,
        0,
    ]
    assert row["tokens"] == 11 and row["ppl"] == pytest.approx(10) and "ppl_other" not in row
    with_control = quality.as_row(
        quality.Setting("reuse", 64), "a", quality.Reading(reading.learned, reading.base, reading.base)
    )
    assert quality.change(with_control, "ppl_other") == 0
    assert quality.as_row(quality.Setting("reuse", 64), "a", reading.to(6))["ppl_base"] == pytest.approx(20)


def test_settings_are_a_grid_whose_first_is_the_main_one() -> None:
    settings = quality.parse_settings("recompute,keep", "128,64")
    assert [str(s) for s in settings][:2] == ["recompute, Δ = 128", "recompute, Δ = 64"]
    assert (
        len(settings) == 4
        and settings[0].attention["method"] == "none"
        and settings[2].attention["method"] == "lm_infinite"
    )
    with pytest.raises(ValueError, match="unknown policy 'reread'"):
        quality.parse_settings("reuse,reread", "64")
