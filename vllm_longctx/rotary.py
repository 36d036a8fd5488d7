"""Exact rotary angles for any position, and turning rotated vectors to another position.

vLLM's table of cosines is as long as the trained length, and its float32 angles err by 6e-3 at one million
tokens. Here every angle is position * frequency in float64, which holds to 1e-6 up to position 2^31.

Frequencies: RoFormer (arXiv 2104.09864, section 3.2.2); the rescalings follow vLLM's rotary classes and
`transformers.modeling_rope_utils`, recomputed in float64.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

SCALINGS = ("default", "llama3", "linear", "dynamic", "ntk", "yarn", "longrope", "proportional")


def inverse_frequencies(
    rotary_dim: int, rope_parameters: Mapping[str, Any], max_positions: int = 0, length: int = 0
) -> Tensor:
    """Radians per token of each rotated pair: float64 [rotary_dim / 2].

    rope_parameters: The entry of that name in a Hugging Face config.
    max_positions: The config's max_position_embeddings. Only dynamic NTK with `max_trained_positions` reads
        it.
    length: The longest distance between a query and a key, in tokens. Only LongRoPE reads it.

    Raises ValueError for a scaling not in SCALINGS, KeyError where a parameter is missing.
    """
    scaling = rope_parameters.get("rope_type", "default")
    if scaling not in SCALINGS:
        raise ValueError(f"rope_type is {scaling!r}; longctx knows {', '.join(SCALINGS)}")
    base = float(rope_parameters.get("rope_theta", 10000.0))
    if scaling == "dynamic":
        base *= _dynamic_ntk_growth(rope_parameters, max_positions) ** (rotary_dim / (rotary_dim - 2))
    if scaling == "ntk":
        return _ntk(rotary_dim, base, rope_parameters)
    frequencies = base ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    if scaling == "linear":
        return frequencies / rope_parameters["factor"]
    if scaling == "longrope":
        is_long = length > rope_parameters["original_max_position_embeddings"]
        factors = rope_parameters["long_factor" if is_long else "short_factor"]
        return frequencies / torch.tensor(factors, dtype=torch.float64)
    if scaling == "proportional":  # pairs past the share do not turn
        pairs = int(rotary_dim * rope_parameters.get("partial_rotary_factor", 1.0)) // 2
        return frequencies.where(torch.arange(len(frequencies)) < pairs, 0.0)
    if scaling == "llama3":
        return _llama3(frequencies, rope_parameters)
    if scaling == "yarn":
        return _yarn(frequencies, base, rope_parameters)
    return frequencies


def attention_factor(rope_parameters: Mapping[str, Any], max_positions: int = 0, length: int = 0) -> float:
    """What rotated queries and keys are multiplied by. Arguments as of `inverse_frequencies`.

    YaRN's (arXiv 2309.00071, section 3.4), LongRoPE's (arXiv 2402.13753, section 3.2), else 1.
    """
    p = rope_parameters
    if p.get("rope_type") == "longrope":
        original = p["original_max_position_embeddings"]
        own = p.get("long_mscale" if length > original else "short_mscale")
        growth = max_positions / original
        return own or (math.sqrt(1 + math.log(growth) / math.log(original)) if growth > 1 else 1.0)
    if p.get("rope_type") != "yarn":
        return 1.0
    if p.get("attention_factor") is not None:
        return float(p["attention_factor"])

    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(p["factor"]) + 1.0 if p["factor"] > 1 else 1.0

    if p.get("mscale") and p.get("mscale_all_dim"):
        return magnitude(p["mscale"]) / magnitude(p["mscale_all_dim"])
    return magnitude(1.0)


def _dynamic_ntk_growth(p: Mapping[str, Any], max_positions: int) -> float:
    """How much dynamic NTK raises the base, before its exponent.

    transformers raises it as a text outgrows the trained length; no distance of ours does. vLLM raises it
    once, for `max_trained_positions` stretched to max_positions; so do we.
    """
    if "alpha" in p:
        return p["alpha"]
    return p["factor"] * max_positions / p.get("max_trained_positions", max_positions) - (p["factor"] - 1)


def _ntk(rotary_dim: int, base: float, p: Mapping[str, Any]) -> Tensor:
    """NTK-aware scaling with a fixed factor, or `mixed_b`'s, which divides faster pairs by less."""
    factor, pairs = p["factor"], torch.arange(0, rotary_dim, 2, dtype=torch.float64)
    if (mixed := p.get("mixed_b")) is None:
        return (base * factor) ** -(pairs / rotary_dim) / factor ** (2 / rotary_dim)
    growth = math.log(factor) / (rotary_dim / 2) ** mixed
    return base ** -(pairs / rotary_dim) / torch.exp(growth * (pairs / 2 + 1) ** mixed)


def _llama3(frequencies: Tensor, p: Mapping[str, Any]) -> Tensor:
    """Long wavelengths are divided by `factor`, short ones kept, those between interpolated."""
    low, high = p["low_freq_factor"], p["high_freq_factor"]
    wavelengths = 2 * math.pi / frequencies
    smooth = (p["original_max_position_embeddings"] / wavelengths - low) / (high - low)
    smooth = smooth.clamp(0, 1)
    return (1 - smooth) * frequencies / p["factor"] + smooth * frequencies


def _yarn(frequencies: Tensor, base: float, p: Mapping[str, Any]) -> Tensor:
    """Pairs that turn often within the original length are kept, those that turn seldom divided by
    `factor`.
    """
    pairs = len(frequencies)

    def pair_turning(rotations: float) -> float:
        return (
            pairs
            * math.log(p["original_max_position_embeddings"] / (rotations * 2 * math.pi))
            / math.log(base)
        )

    low, high = pair_turning(p.get("beta_fast") or 32), pair_turning(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    ramp = (torch.arange(pairs, dtype=torch.float64) - low) / (high - low if high != low else 0.001)
    ramp = ramp.clamp(0, 1)
    return frequencies / p["factor"] * ramp + frequencies * (1 - ramp)


class Rotary(nn.Module):
    """Rotates queries and keys by exact angles; takes the place of vLLM's rotary modules.

    head_size, rotary_dim: elements of a head, and how many of its first ones are rotated.
    neox: pairs are (x[k], x[k + rotary_dim/2]); otherwise (x[2k], x[2k + 1]).
    factor: what rotated elements are multiplied by, see `attention_factor`.
    """

    inverse_frequencies: Tensor
    turns_per_token: Tensor

    def __init__(
        self, head_size: int, rotary_dim: int, neox: bool, inverse_frequencies: Tensor, factor: float = 1.0
    ):
        super().__init__()
        self.head_size, self.rotary_dim, self.neox, self.factor = head_size, rotary_dim, neox, factor
        self.register_buffer("inverse_frequencies", inverse_frequencies, persistent=False)
        # Divided once: torch.compile would divide again, in float64, for every element that it rotates.
        self.register_buffer("turns_per_token", inverse_frequencies / (2 * math.pi), persistent=False)
        self._step: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    @property
    def turns(self) -> bool:
        """False for `no_turn`."""
        return bool(self.inverse_frequencies.any())

    def forward(
        self, positions: Tensor, query: Tensor, key: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Rotate queries and keys; same shapes and dtypes.

        positions: int [tokens]; with M-RoPE [3, tokens], of a text three times the same.
        query, key: [tokens, heads * head_size] or [tokens, heads, head_size].
        """
        cos_sin = self._step_cos_sin(positions)
        return self._rotate_flat(query, cos_sin), None if key is None else self._rotate_flat(key, cos_sin)

    def new_step(self) -> None:
        """Forget the angles of the last step; called before each forward."""
        self._step = None

    def _step_cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled `cos_sin`, computed once for all the layers of a step: they are given the same tensor
        object.
        """
        if torch.compiler.is_compiling():
            return self.scaled_cos_sin(_of_text(positions))
        if self._step is None or self._step[0] is not positions:
            self._step = positions, self.scaled_cos_sin(_of_text(positions))
        return self._step[1]

    def scaled_cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """`cos_sin` times the attention factor: what `forward` rotates by, and what vLLM's own table
        holds.
        """
        cos, sin = self.cos_sin(positions)
        return (cos, sin) if self.factor == 1.0 else (cos * self.factor, sin * self.factor)

    def _rotate_flat(self, x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
        cos, sin = (t.unsqueeze(-2) for t in cos_sin)
        heads = x.unflatten(-1, (-1, self.head_size)) if x.dim() == 2 else x
        return self.rotate(heads, cos, sin).view(x.shape)

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """float32 [*positions, rotary_dim / 2] each, from float64 angles.

        Whole turns are taken off in float64; what is left is at most half a turn, whose float32 sines cost a
        fraction of float64 ones. It matters because torch.compile computes them again for every head of every
        layer.
        """
        turns = positions.unsqueeze(-1) * self.turns_per_token
        angles = ((turns - turns.round()) * (2 * math.pi)).float()
        return angles.cos(), angles.sin()

    def turn(self, x: Tensor, by: Tensor) -> Tensor:
        """x [..., head_size] turned on by `by` positions (int, may be negative), broadcastable to
        x.shape[:-1].

        R(a)·R(b) = R(a + b): turning a vector rotated at position p gives the one rotated at p + by, up to
        one rounding. The attention factor is in a rotated vector once, whatever it is turned by.
        """
        return self.rotate(x, *self.cos_sin(by))

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [..., head_size] rotated by angles at hand: cos, sin as from `cos_sin`, broadcastable to [...,
        rotary_dim / 2].
        """
        rotated = x[..., : self.rotary_dim].to(cos.dtype)
        a, b = rotated.chunk(2, -1) if self.neox else (rotated[..., ::2], rotated[..., 1::2])
        halves = torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)
        rotated = torch.cat(halves, -1) if self.neox else torch.stack(halves, -1).flatten(-2)
        if self.rotary_dim == x.shape[-1]:
            return rotated.to(x.dtype)
        return torch.cat((rotated.to(x.dtype), x[..., self.rotary_dim :]), -1)


def _of_text(positions: Tensor) -> Tensor:
    return positions[0] if positions.dim() == 2 else positions


def no_turn(head_size: int) -> Rotary:
    """A rotation by nothing, for code that turns keys of layers without positions as others."""
    return Rotary(head_size, 2, True, torch.zeros(1, dtype=torch.float64))


def alike(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether queries or keys are the same, up to a share of the largest element of b."""
    return bool((a.float() - b.float()).abs().max() <= tolerance * b.float().abs().max().clamp_min(1e-6))


def rotation_between(
    here: tuple[Tensor, Tensor],
    there: tuple[Tensor, Tensor],
    step: int,
    candidates: Iterable[Rotary],
    tolerance: float,
) -> Rotary | None:
    """The first candidate that turns a layer's queries and keys at one place of a text into those at another.

    here, there: Queries and keys [..., head_size] of the same tokens, there `step` positions farther on.
    tolerance: As of `alike`.

    Queries may be scaled by their position, too, as attention temperatures do; keys may not.
    """
    (query, key), (query_there, key_there) = here, there
    by = torch.tensor(step, device=key.device)
    for rotary in candidates:
        turned = rotary.turn(query, by).float()
        norms = [x.float().norm(dim=-1, keepdim=True).clamp_min(1e-12) for x in (query_there, turned)]
        scaled = turned * norms[0] / norms[1]
        if alike(rotary.turn(key, by), key_there, tolerance) and alike(scaled, query_there, tolerance):
            return rotary
    return None


class NoRotation(nn.Module):
    """Takes the place of a rotary module in layers without positions."""

    def forward(
        self, positions: Tensor, query: Tensor, key: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        return query, key
