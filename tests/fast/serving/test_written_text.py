"""Texts of which only the end is kept, beside vLLM's own detokenizer."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer
from vllm import SamplingParams
from vllm.v1.engine.detokenizer import BaseIncrementalDetokenizer, FastIncrementalDetokenizer

from vllm_longctx import BOOKLM
from vllm_longctx.serving import written_text


class Stock(FastIncrementalDetokenizer):
    """As vLLM has it, whatever an engine in this process has wrapped."""

    update = getattr(BaseIncrementalDetokenizer.update, "__wrapped__", BaseIncrementalDetokenizer.update)
    get_next_output_text = getattr(
        BaseIncrementalDetokenizer.get_next_output_text,
        "__wrapped__",
        BaseIncrementalDetokenizer.get_next_output_text,
    )


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BOOKLM)


@pytest.fixture
def wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written_text, "MOST", 60)  # characters, so that a short text is set apart many times
    for name in ("update", "get_next_output_text"):
        monkeypatch.setattr(BaseIncrementalDetokenizer, name, getattr(Stock, name))
    written_text.keep_ends_of_texts()


@pytest.mark.parametrize("delta", [True, False])
def test_every_text_and_stop_is_that_of_vllm(wrapped: None, tokenizer: Any, delta: bool) -> None:
    """Texts of random pieces, read in every step, now and then, or at the end, with long and short stops."""
    stopped = apart = 0
    for seed in range(60):
        rng = random.Random(seed)
        pieces = ["a", "bc", " the", "\n\n", "é", "日本", " end", "x" * 30]
        text = "".join(rng.choices(pieces, k=150))
        ids = tokenizer.encode(text, add_special_tokens=False)
        stop = rng.choice([[], ["end\n\n"], [text[-60:-40], "zz"], [text[200:330]], ["zzz" * 50, text[-5:]]])
        params = SamplingParams(
            stop=stop,
            include_stop_str_in_output=rng.random() < 0.5,
            min_tokens=rng.choice([0, 40]),
            max_tokens=999,
        )
        request: Any = SimpleNamespace(sampling_params=params, request_id="", prompt_token_ids=[5, 6])
        ours, stock = FastIncrementalDetokenizer(tokenizer, request), Stock(tokenizer, request)
        reads, per_step = rng.choice([1.0, 0.1, 0.0]), rng.choice([1, 3])
        for at in range(0, len(ids), per_step):
            step, last = ids[at : at + per_step], at + per_step >= len(ids)
            found, expected = ours.update(step, last), stock.update(step, last)
            assert found == expected and ours.num_output_tokens() == stock.num_output_tokens()
            apart += bool(vars(ours).get(written_text.BEFORE))
            ends = last or found is not None
            if ends or rng.random() < reads:
                assert ours.get_next_output_text(ends, delta) == stock.get_next_output_text(ends, delta)
            if ends:
                stopped += found is not None
                break
        assert ours.output_token_ids == stock.output_token_ids
    assert 5 < stopped < 55 and apart > 100


def test_the_text_that_is_kept_does_not_grow(wrapped: None, tokenizer: Any) -> None:
    request: Any = SimpleNamespace(
        sampling_params=SamplingParams(stop=["zz"]), request_id="", prompt_token_ids=[5]
    )
    detokenizer = FastIncrementalDetokenizer(tokenizer, request)
    given = ""
    for token in tokenizer.encode("one word and another " * 200, add_special_tokens=False):
        detokenizer.update([token], False)
        given += detokenizer.get_next_output_text(False, delta=True)
        assert len(detokenizer.output_text) < 200 and not vars(detokenizer).get(written_text.BEFORE)
    assert len(given) > 4000


def test_wrapped_once(wrapped: None) -> None:
    update = BaseIncrementalDetokenizer.update
    written_text.keep_ends_of_texts()
    assert BaseIncrementalDetokenizer.update is update
