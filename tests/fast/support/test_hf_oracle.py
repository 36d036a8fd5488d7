from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.architectures import ARCHITECTURES, OWN_WINDOW, made
from tests.support.hf_oracle import Exact, Oracle, in_float64

# Past own windows, and past the length for which LongRoPE has its short factors; before any other scaling
# that depends on the length.
TOKENS = 80


@pytest.mark.parametrize(
    ("row", "tokens"),
    [*((row, TOKENS) for row in ARCHITECTURES), pytest.param("Phi-3", 60, id="Phi-3, short")],
)
def test_with_plain_attention_it_is_transformers_model(
    row: str, tokens: int, tmp_path: Path, one_thread: None
) -> None:
    """All that a row says of its layers, and all that the oracle computes itself, is in here."""
    plain = replace(ARCHITECTURES[row], scaled_at=None, window=OWN_WINDOW)
    path = made(plain, tmp_path).transformers
    ids = torch.randint(3, 512, (tokens,))
    # Eager attention adds Falcon's ALiBi twice.
    model = in_float64(plain, path, "sdpa" if plain.family == "Falcon" else "eager")
    with Exact(), torch.no_grad():
        theirs = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
    assert theirs.dtype == torch.float64
    assert (Oracle(plain, path, tokens).logprobs(ids.tolist()) - theirs).abs().max() < 1e-11
