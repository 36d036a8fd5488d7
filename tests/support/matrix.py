"""The columns of the matrix in `docs/models.md`, and which of its cells do not run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.support.architectures import ARCHITECTURES, LAYERS, TRAINED, Architecture
from tests.support.reference_model import Layers, alike, focused, with_top_k
from vllm_longctx.geometry import Branch, Geometry, SteppedWindows, local_branch


@dataclass(frozen=True)
class Method:
    """A column.

    attention: The section of the configuration; None for vLLM without one.
    seen: What layers without a window of their own see, for a prompt of so many tokens.
    seen_by_own: The same of those with one.
    lengths: Of prompts: inside the window, at its edge, and past it.
    scores_prompts: A prompt's tokens are compared, too.
    longest: The distance in tokens that no key exceeds.
    max_model_len: A layer that keeps all keys keeps so many.
    """

    attention: Callable[[Architecture], dict[str, Any] | None]
    seen: Callable[[Architecture, int], Layers]
    lengths: tuple[int, ...] = (1, 31, 63, 64, 65, 97, 200)
    scores_prompts: bool = True
    longest: int = 64
    max_model_len: int = 1024
    seen_by_own: Callable[[Architecture, int], Layers] = lambda row, _: alike(Geometry(0, row.window))


STEPPED = SteppedWindows(64, 32)


def windows_in_windows(own: int, prompt_length: int) -> Layers:
    """A layer's own window of `own` tokens, as far as it is in the query's stepped one."""

    def seen(_: int, positions: Tensor) -> tuple[list[Branch], bool]:
        stepped = torch.tensor([STEPPED.start(i, prompt_length) for i in positions.tolist()])
        return [local_branch(positions, positions, torch.maximum(stepped, positions - own + 1))], True

    return seen


def _sliding(attention: dict[str, Any], geometry: Geometry) -> Method:
    return Method(lambda _: attention, lambda *_: alike(geometry))


METHODS = {
    "vLLM": Method(
        lambda _: None,
        lambda *_: alike(Geometry()),
        (1, 31, 63, 64, 65, 108),
        longest=TRAINED,
        max_model_len=TRAINED,
    ),
    "lm_infinite": _sliding({"n_global": 10, "n_local": 64, "distance_ceiling": 64}, Geometry(10, 64, 64)),
    "streaming": _sliding(
        {"method": "streaming", "n_global": 4, "n_local": 60}, Geometry(4, 60, distances="in_cache")
    ),
    "top_k": Method(
        lambda _: {
            "n_global": 5,
            "n_local": 50,
            "distance_ceiling": TRAINED,
            "top_k": 3,
            "top_k_from_layer": 1,
            "top_k_insert_at": 40,
        },
        lambda _, length: with_top_k(Geometry(5, 50, TRAINED), length, range(1, LAYERS), 3, 40),
        scores_prompts=False,
        longest=TRAINED,
    ),
    "memory": Method(
        lambda row: {
            "method": "focused",
            "n_local": 64,
            "last_context_length": 32,
            "mem_layers": [row.memory_layer],
            "mem_dtype": "float32",
        },
        lambda row, length: focused(STEPPED, length, [row.memory_layer]),
        seen_by_own=lambda row, length: windows_in_windows(row.window, length),
    ),
}
TOLERANCE = 1e-4  # of log-probabilities, in nats
TEMP_LORA = "temp_lora"
COLUMNS = (*METHODS, TEMP_LORA)

ALIBI = "has ALiBi, by which no key looks as if it were elsewhere"
NOT_ADAPTED = "has no LoRA support for its linear layers"
ADAPTED = ("Llama", "Mistral", "Qwen2", "Qwen3")
# Cells that do not run, and a part of the error: vLLM's own where it is in vLLM's column, too, else ours.
REFUSED: dict[tuple[str, str], str] = {
    **{(row, TEMP_LORA): NOT_ADAPTED for row in ARCHITECTURES if row not in ADAPTED},
    **{(row, column): ALIBI for row in ("BLOOM", "MPT", "Falcon, ALiBi") for column in ("top_k", "memory")},
    ("Mistral v0.1", "memory"): "has a window of its own",
    ("Mistral v0.1", "top_k"): "finds nothing to look up: layers 1 to 3 have windows of their own",
    **{("Baichuan", column): "was supported in vLLM until v0.23.0" for column in COLUMNS},
}


def attention_of(row: Architecture, method: Method) -> dict[str, Any] | None:
    """Where all layers have a window of their own, the model was trained on no more than that."""
    section = method.attention(row)
    beyond = {"allow_beyond_trained": True} if len(row.own_windows) == LAYERS else {}
    return None if section is None else {**section, **beyond}
