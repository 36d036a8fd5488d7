"""Which keys a query sees, and at which distance: pure functions of positions.

Symbols of the papers, named once: G = `n_global`, N = `n_local`, L = `distance_ceiling`, s = window start;
LongLLaMA's C = `SteppedWindows.tokens`, R = `SteppedWindows.last_tokens`. A method is a set of branches; a
branch says which keys it covers and at which distance the position encoding sees them. Branches never
overlap, and attention over them is one softmax.

Sources: LM-Infinite (arXiv 2308.16137, section 3) for the Λ mask and the ceiling min(i - j, L); StreamingLLM
(arXiv 2309.17453, section 3.2) for distances counted in the cache; Focused Transformer (arXiv 2307.03170,
section 3.1) and LongLLaMA's code for stepped windows and the memory before them.
"""

from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Distances = Literal["relative", "in_cache"]


@dataclass(frozen=True)
class Geometry:
    """What a query attends to. All lengths in tokens.

    n_global: the first tokens, visible to every later query.
    n_local: the last tokens a query sees, itself included; None sees all of them (plain attention).
    distance_ceiling: no key looks farther away than this; None for no ceiling.
    distances: `relative` counts distances in the text; `in_cache` counts them among the visible tokens, as
        StreamingLLM does, and needs no ceiling.
    """

    n_global: int = 0
    n_local: int | None = None
    distance_ceiling: int | None = None
    distances: Distances = "relative"

    def window_start(self, query_positions: Tensor) -> Tensor:
        """First position of each query's sliding window. Positions int64, any shape."""
        if self.n_local is None:
            return torch.zeros_like(query_positions)
        return (query_positions - self.n_local + 1).clamp_min(0)

    def unseen_distance(self, query_positions: Tensor, key_positions: Tensor, window_start: Tensor) -> Tensor:
        """How much nearer than in the text a global key looks, in tokens.

        query_positions, window_start [T], key_positions [S]: int64. Returns int64 [T, S].
        """
        i, j = query_positions[:, None], key_positions[None, :]
        if self.distances == "in_cache":
            return (window_start[:, None] - self.n_global).clamp_min(0).expand(-1, len(key_positions))
        ceiling = i - j if self.distance_ceiling is None else self.distance_ceiling
        return (i - j - ceiling).clamp_min(0)


@dataclass(frozen=True)
class RequestView:
    """What the queries of one request see in sliding layers, where the request has chosen that itself.

    n_global: The first tokens, as of `Geometry`; None sees the whole text, in every query (plain attention).
    turns: Positions where turns begin, ascending. A window begins at one of them, if one is inside of it.
    """

    n_global: int | None = None
    turns: tuple[int, ...] = ()

    def geometry(self, of_engine: Geometry) -> Geometry:
        return Geometry() if self.n_global is None else replace(of_engine, n_global=self.n_global)

    def window_start(self, query_positions: Tensor, n_local: int) -> Tensor:
        """First position of each query's window, int64 as the positions: where the first turn begins of those
        that are whole inside of its sliding window. Where the last turn is longer than that, it slides.
        """
        lowest = (query_positions - n_local + 1).clamp_min(0)
        behind = torch.iinfo(torch.int64).max
        turns = torch.tensor([*self.turns, behind])
        first = turns[torch.searchsorted(turns, lowest)]
        return torch.where((lowest > 0) & (first <= query_positions), first, lowest)

    def seen_from(self, first: int, end: int, n_local: int) -> "RequestView":
        """With the turns only that count for queries at first .. end - 1."""
        begin = bisect_left(self.turns, first - n_local + 1)
        return replace(self, turns=self.turns[begin : bisect_left(self.turns, end)])


@dataclass(frozen=True)
class SteppedWindows:
    """LongLLaMA's windows: a query sees the keys since its window began, and memory layers all before it.

    Lengths in tokens.

    tokens: of a whole window. last_tokens: a window begins so far before the end of the prompt, whatever
        stands before it.
    """

    tokens: int
    last_tokens: int

    def last_start(self, prompt_length: int) -> int:
        """Where the window of the prompt's last tokens begins; windows before it do not depend on the
        prompt's length.
        """
        return max(prompt_length - self.last_tokens, 0)

    def start(self, position: int, prompt_length: int) -> int:
        """Where the window of the query at `position` begins, in a request whose prompt has `prompt_length`
        tokens.
        """
        last = self.last_start(prompt_length)
        origin = 0 if position < last else last
        return position - (position - origin) % self.tokens

    def end(self, position: int, prompt_length: int) -> int:
        """Where the next window begins."""
        last = self.last_start(prompt_length)
        end = self.start(position, prompt_length) + self.tokens
        return min(end, last) if position < last else end


@dataclass(frozen=True)
class Branch:
    """visible: bool [queries, keys]; distance: int64 [queries, keys], meaningful where visible.

    best: of its visible keys each query head sees only so many, those with the highest scores; None for all.
    """

    visible: Tensor
    distance: Tensor
    best: int | None = None


def local_branch(queries: Tensor, keys: Tensor, window_start: Tensor) -> Branch:
    """Keys from the window's start up to the query, at their distance in the text.

    queries [T], keys [S]: positions, int64. window_start [T]: `Geometry.window_start` for a sliding window,
    the start of the query's window for a stepped one.
    """
    i, j = queries[:, None], keys[None, :]
    return Branch((window_start[:, None] <= j) & (j <= i), i - j)


def global_branch(geometry: Geometry, queries: Tensor, keys: Tensor, window_start: Tensor) -> Branch:
    """The first `n_global` keys, where the window has left them behind. Arguments as in `local_branch`."""
    i, j, start = queries[:, None], keys[None, :], window_start[:, None]
    visible = (j < geometry.n_global) & (j < start) & (j <= i)
    return Branch(visible, i - j - geometry.unseen_distance(queries, keys, window_start))


def memory_branch(queries: Tensor, keys: Tensor, window_start: Tensor, best: int | None = None) -> Branch:
    """The keys before the query's stepped window, seen as if they were the first in it.

    Arguments as in `local_branch`.
    """
    distance = (queries - window_start)[:, None].expand(-1, len(keys))
    return Branch(keys[None, :] < window_start[:, None], distance, best)


def middle_branch(
    geometry: Geometry, queries: Tensor, keys: Tensor, top_k: int, insert_at: int, first_query: int
) -> Branch:
    """LM-Infinite's top-k branch (its official code): the best keys between the first tokens and the window,
    at `insert_at`.

    Only queries from `first_query` on, the prompt's last, have it, and only once there are top_k such keys.
    """
    assert geometry.n_local is not None
    end = (queries + 1 - geometry.n_local)[:, None]
    active = (queries[:, None] >= first_query) & (end >= geometry.n_global + top_k)
    visible = active & (keys >= geometry.n_global) & (keys < end)
    return Branch(visible, torch.full_like(visible, insert_at, dtype=torch.int64), top_k)


def branches(
    geometry: Geometry, queries: Tensor, keys: Tensor, window_start: Tensor | None = None
) -> list[Branch]:
    """Every branch of the method. queries [T], keys [S]: positions, int64.

    window_start [T] makes the windows stepped; by default they slide with the query.
    """
    start = geometry.window_start(queries) if window_start is None else window_start
    return [local_branch(queries, keys, start), global_branch(geometry, queries, keys, start)]


def alibi_slopes(n_heads: int, bias_max: float = 8) -> Tensor:
    """Slopes of ALiBi (arXiv 2108.12409, section 3): float64 [n_heads]; the bias is -slope * distance.

    bias_max: minus the exponent of the smallest slope, MPT's `alibi_bias_max`.
    """
    power = 2 ** (n_heads.bit_length() - 1)
    slopes = [2 ** (-bias_max * (h + 1) / power) for h in range(power)]
    between = [2 ** (-bias_max / 2 * (h + 1) / power) for h in range(0, 2 * (n_heads - power), 2)]
    return torch.tensor(slopes + between, dtype=torch.float64)
