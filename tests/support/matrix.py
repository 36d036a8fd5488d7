"""The columns of the matrix in `docs/models.md`, and which of its cells do not run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.support.architectures import ARCHITECTURES, LAYERS, TRAINED, Architecture
from tests.support.reference_model import Layers, alike, focused, with_top_k
from vllm_longctx.geometry import Geometry, SteppedWindows


@dataclass(frozen=True)
class Method:
    """A column.

    attention: The section of the configuration; None for vLLM without one.
    seen: What layers without a window of their own see, for a prompt of so many tokens.
    lengths: Of prompts: inside the window, at its edge, and past it.
    scores_prompts: A prompt's tokens are compared, too.
    longest: The distance in tokens that no key exceeds.
    """

    attention: Callable[[Architecture], dict[str, Any] | None]
    seen: Callable[[Architecture, int], Layers]
    lengths: tuple[int, ...] = (1, 31, 63, 64, 65, 97, 200)
    scores_prompts: bool = True
    longest: int = 64


def _sliding(attention: dict[str, Any], geometry: Geometry) -> Method:
    return Method(lambda _: attention, lambda *_: alike(geometry))


METHODS = {
    "vLLM": Method(lambda _: None, lambda *_: alike(Geometry()), (1, 31, 63, 64, 65, 108), longest=TRAINED),
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
            "mem_layers": row.open_layers[-1:],
            "mem_dtype": "float32",
        },
        lambda row, length: focused(SteppedWindows(64, 32), length, row.open_layers[-1:]),
    ),
}
TEMP_LORA = "temp_lora"
COLUMNS = (*METHODS, TEMP_LORA)

# A cell that does not run, and a part of the error: vLLM's own in its column, and ours in the others.
GONE = "was supported in vLLM until v0.23.0"
UNKNOWN = "longctx was not tested with"
OURS = ("Llama", "Mistral", "Qwen2", "Qwen3", "GPT-J", "BLOOM", "MPT")
REFUSED: dict[tuple[str, str], str] = {
    **{("Baichuan", column): GONE for column in COLUMNS},
}
