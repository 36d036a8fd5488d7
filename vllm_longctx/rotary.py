"""Exact rotary angles for any position, and turning rotated vectors to another position.

vLLM's table of cosines is as long as the trained length, and its float32 angles err by 6e-3 at one million tokens. Here
every angle is position * frequency in float64, which holds to 1e-6 up to position 2^31.

Frequencies: RoFormer (arXiv 2104.09864, section 3.2.2); the rescaling of Llama 3 and linear interpolation follow
`transformers.modeling_rope_utils`, recomputed in float64.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

SCALINGS = ("default", "llama3", "linear")


def inverse_frequencies(rotary_dim: int, rope_parameters: Mapping[str, Any]) -> Tensor:
    """Radians per token of each rotated pair: float64 [rotary_dim / 2].

    rope_parameters: the entry of that name in a Hugging Face config. Raises ValueError for a scaling not in SCALINGS.
    """
    scaling = rope_parameters.get("rope_type", "default")
    if scaling not in SCALINGS:
        raise ValueError(f"rope_type is {scaling!r}; longctx knows {', '.join(SCALINGS)}")
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim
    frequencies = float(rope_parameters.get("rope_theta", 10000.0)) ** -exponents
    if scaling == "linear":
        return frequencies / rope_parameters["factor"]
    if scaling == "llama3":
        return _llama3(frequencies, rope_parameters)
    return frequencies


def _llama3(frequencies: Tensor, p: Mapping[str, Any]) -> Tensor:
    """Long wavelengths are divided by `factor`, short ones kept, those between interpolated."""
    low, high = p["low_freq_factor"], p["high_freq_factor"]
    wavelengths = 2 * math.pi / frequencies
    smooth = (p["original_max_position_embeddings"] / wavelengths - low) / (high - low)
    smooth = smooth.clamp(0, 1)
    return (1 - smooth) * frequencies / p["factor"] + smooth * frequencies


class Rotary(nn.Module):
    """Rotates queries and keys by exact angles; takes the place of vLLM's rotary modules.

    head_size, rotary_dim: elements of a head, and how many of its first ones are rotated.
    neox: pairs are (x[k], x[k + rotary_dim/2]); otherwise (x[2k], x[2k + 1]).
    """

    inverse_frequencies: Tensor

    def __init__(self, head_size: int, rotary_dim: int, neox: bool, inverse_frequencies: Tensor):
        super().__init__()
        self.head_size, self.rotary_dim, self.neox = head_size, rotary_dim, neox
        self.register_buffer("inverse_frequencies", inverse_frequencies, persistent=False)
        self._step: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    def forward(self, positions: Tensor, query: Tensor, key: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """positions [tokens], int; query, key [tokens, heads * head_size]: returned rotated, same shape and dtype."""
        cos_sin = self._step_cos_sin(positions)
        return self._rotate_flat(query, cos_sin), None if key is None else self._rotate_flat(key, cos_sin)

    def new_step(self) -> None:
        """Forget the angles of the last step; called before each forward."""
        self._step = None

    def _step_cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """`cos_sin`, computed once for all the layers of a step: they are given the same tensor object."""
        if torch.compiler.is_compiling():
            return self.cos_sin(positions.flatten())
        if self._step is None or self._step[0] is not positions:
            self._step = positions, self.cos_sin(positions.flatten())
        return self._step[1]

    def _rotate_flat(self, x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
        cos, sin = (t.unsqueeze(-2) for t in cos_sin)
        return self._rotate(x.unflatten(-1, (-1, self.head_size)), cos, sin).view(x.shape)

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """float32 [*positions, rotary_dim / 2] each, from float64 angles."""
        angles = positions.unsqueeze(-1) * self.inverse_frequencies
        return angles.cos().float(), angles.sin().float()

    def turn(self, x: Tensor, by: Tensor) -> Tensor:
        """x [..., head_size] turned on by `by` positions (int, may be negative), broadcastable to x.shape[:-1].

        R(a)·R(b) = R(a + b): turning a vector rotated at position p gives the one rotated at p + by, up to one rounding.
        """
        cos, sin = self.cos_sin(by)
        return self._rotate(x, cos, sin)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rotated = x[..., : self.rotary_dim].to(cos.dtype)
        a, b = rotated.chunk(2, -1) if self.neox else (rotated[..., ::2], rotated[..., 1::2])
        halves = torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)
        rotated = torch.cat(halves, -1) if self.neox else torch.stack(halves, -1).flatten(-2)
        if self.rotary_dim == x.shape[-1]:
            return rotated.to(x.dtype)
        return torch.cat((rotated.to(x.dtype), x[..., self.rotary_dim :]), -1)
