"""How the windows of a mode move, and what follows: how far its queries look, and what a request keeps.

A mode's row in `modes.MODES` names its class. Sizes in tokens.
"""

from typing import Self

from vllm.utils.math_utils import cdiv

from vllm_longctx.config import filled
from vllm_longctx.geometry import Geometry
from vllm_longctx.settings import Settings


class Windows:
    """Of a mode without any: queries see the whole text, and a request keeps it.

    geometry: Of sliding layers; plain attention where no windows slide.
    remedy: What to lower so that a request keeps fewer blocks, for messages.
    """

    geometry = Geometry()
    remedy = "max_model_len"

    @classmethod
    def of(cls, settings: Settings) -> Self:
        return cls()

    @property
    def sizes(self) -> dict[str, int]:
        """Those whose defaults are smaller where the pool is small, by their options."""
        return {}

    def kept(self, in_flight: int) -> str:
        """What decides `most_blocks`, for messages. Argument as there."""
        return ", ".join(f"{option} {tokens}" for option, tokens in self.sizes.items())

    def longest_distance(self, trained_length: int) -> int:
        """At which a query of a full layer sees a key."""
        return trained_length

    def most_blocks(self, block_size: int, in_flight: int, max_model_len: int) -> int:
        """KV blocks that a request keeps at once, at most. in_flight: tokens of the steps under way."""
        return cdiv(max_model_len, block_size)

    def largest(self, blocks: int, block_size: int, in_flight: int) -> int | None:
        """The window with which a request keeps just so many blocks; None where it keeps the whole text."""
        return None


class SlidingWindows(Windows):
    """A request keeps the blocks of the first tokens and of its next query's window.

    max_n_global: First tokens of a request that has most of them.
    """

    remedy = "max_num_batched_tokens or attention.n_local"

    def __init__(self, geometry: Geometry, max_n_global: int = 0):
        self.geometry, self.n_local = geometry, filled(geometry.n_local)
        self.max_n_global = max(max_n_global, geometry.n_global)

    @classmethod
    def of(cls, settings: Settings) -> Self:
        a = settings.attention
        geometry = Geometry(filled(a.n_global), filled(a.n_local), a.distance_ceiling, filled(a.distances))
        return cls(geometry, filled(a.max_n_global))

    @property
    def sizes(self) -> dict[str, int]:
        return {"attention.n_local": self.n_local}

    def kept(self, in_flight: int) -> str:
        return f"n_global {self.max_n_global}, n_local {self.n_local}, {in_flight} tokens in flight"

    def longest_distance(self, trained_length: int) -> int:
        if self.geometry.distances == "in_cache":
            return self.max_n_global + self.n_local
        return max(self.n_local, self.geometry.distance_ceiling or trained_length)

    def most_blocks(self, block_size: int, in_flight: int, max_model_len: int) -> int:
        """Those of the first tokens, the last N - 1, tokens in flight, and one ragged block."""
        recent = cdiv(min(self.n_local - 1 + in_flight, max_model_len), block_size) + 1
        return min(cdiv(self.max_n_global, block_size) + recent, cdiv(max_model_len, block_size))

    def largest(self, blocks: int, block_size: int, in_flight: int) -> int:
        first = cdiv(self.max_n_global, block_size)
        return (blocks - 1 - first) * block_size - in_flight + 1


class MemoryWindows(Windows):
    """Stepped ones. What was before them is kept in the memory."""

    def __init__(self, tokens: int):
        self.tokens = tokens

    @classmethod
    def of(cls, settings: Settings) -> Self:
        return cls(settings.memory.windows.tokens)

    def longest_distance(self, trained_length: int) -> int:
        return self.tokens


class DroppedWindows(MemoryWindows):
    """Stepped ones of a model without memory layers. What was before them is nowhere."""

    remedy = "attention.n_local"

    @property
    def sizes(self) -> dict[str, int]:
        return {"attention.n_local": self.tokens}

    def most_blocks(self, block_size: int, in_flight: int, max_model_len: int) -> int:
        """Those of a window, and of the next one: a step ends where its window does, and of two that are
        under way the second may begin one.
        """
        return min(cdiv(2 * self.tokens, block_size) + 1, cdiv(max_model_len, block_size))


class Passes(Windows):
    """Stepped ones of requests that adapt. Others see their whole text, which is as bounded."""

    remedy = "both of these"

    def __init__(self, window_tokens: int, plain_tokens: int):
        self.window_tokens, self.plain_tokens = window_tokens, plain_tokens

    @classmethod
    def of(cls, settings: Settings) -> Self:
        return cls(settings.temp_lora.window_tokens, settings.temp_lora.plain_tokens)

    @property
    def sizes(self) -> dict[str, int]:
        return {
            "adaptation.window_tokens": self.window_tokens,
            "adaptation.plain_tokens": self.plain_tokens,
        }

    def most_blocks(self, block_size: int, in_flight: int, max_model_len: int) -> int:
        longest = max(self.window_tokens, self.plain_tokens)
        return cdiv(min(longest, max_model_len), block_size) + 1

    def largest(self, blocks: int, block_size: int, in_flight: int) -> int:
        return (blocks - 1) * block_size
