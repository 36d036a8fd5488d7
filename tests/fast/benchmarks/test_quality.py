"""The pure parts of benchmarks/quality.py."""

import sys

import absl.logging
import pytest
import quality

# absl, which rouge-score brings, would close pytest's captured stderr once vLLM configures logging.
absl.logging.get_absl_handler().python_handler.setStream(sys.__stderr__)


def test_places_leave_room_for_what_is_written() -> None:
    assert quality.starts("text", 1100, 1000, 3) == [0, 0, 0]
    assert quality.starts("text", 2100, 1000, 3) == [0, 500, 1000]
    with pytest.raises(ValueError, match="text has 1,099 tokens, but 1,100 are needed; lower --lengths"):
        quality.starts("text", 1099, 1000, 3)


def test_the_truth_follows_the_prompt() -> None:
    tokens = list(range(1000))
    prompt, truth = quality.prompt_and_truth(tokens, 500, 200)
    assert prompt == [0, *range(501, 700)] and truth == list(range(700, 800))
    shorter, _ = quality.prompt_and_truth(tokens, 500, 100)
    assert prompt[:100] == shorter


def test_metrics_of_equal_other_and_similar_texts() -> None:
    truth = ["the cat sat on the mat and looked at me", "it was the best of times, it was the worst of times"]
    equal = quality.compare(truth, truth)
    assert equal["BLEU"].value == pytest.approx(100) and equal["ROUGE-LSum"] == quality.Figure(100, 0)
    other = quality.compare(["green ideas sleep", "furiously"], truth)
    assert other["BLEU"].value < 1 and other["ROUGE-LSum"].value == 0
    half = quality.compare([truth[0], "furiously"], truth)
    assert half["ROUGE-LSum"].value == pytest.approx(50) and half["ROUGE-LSum"].error > 50
