"""Λ attention for a chunk of one request's queries (chunked prefill), with no mask over what cannot be seen.

The chunk is cut into tiles of `tile` queries. A tile sees at most tile + N - 1 keys, so its keys are a strided view into one
buffer [the N - 1 keys before the chunk | the chunk], and all tiles share one band mask. The first tokens are a second
branch, one product for the whole chunk. ALiBi's bias is part of the masks.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_longctx.attention.branches import additive, attend, merge
from vllm_longctx.geometry import Geometry, global_branch
from vllm_longctx.rotary import Rotary


@dataclass(frozen=True)
class GlobalPart:
    """The first tokens as some queries see them.

    mask: additive [1, 1 or heads, T, G]. turn_queries [T], turn_keys [G]: positions, or None to leave them.
    """

    mask: Tensor
    turn_queries: Tensor | None
    turn_keys: Tensor | None


@dataclass(frozen=True)
class ChunkPlan:
    """What every layer needs to know of a chunk. local_mask: additive [tiles or 1, 1 or heads, tile, N - 1 + tile]."""

    n_local: int
    tile: int
    num_tiles: int
    local_mask: Tensor
    global_parts: list[GlobalPart]


def tile_size(n_local: int) -> int:
    """Queries in a tile: small against the window, so that few keys are scored in vain, but no smaller than 32."""
    return min(256, max(32, n_local // 8))


def plan_chunk(geometry: Geometry, context: int, length: int, alibi_slopes: Tensor | None = None) -> ChunkPlan:
    """A chunk of `length` queries at positions context .. context + length - 1, all of whose keys are computed.

    alibi_slopes [heads]: for a model that has these instead of a rotation.
    """
    n_local = geometry.n_local
    if n_local is None:
        raise ValueError("tiles are for windows; plain attention has none")
    tile = min(tile_size(n_local), length)
    num_tiles = -(-length // tile)
    row, column = torch.arange(tile)[:, None], torch.arange(n_local - 1 + tile)[None, :]
    distance = row + n_local - 1 - column
    visible = ((distance >= 0) & (distance < n_local))[None]
    if context < n_local - 1:  # the first tiles reach back before the text
        first_position = context - (n_local - 1) + tile * torch.arange(num_tiles)
        visible = visible & (first_position[:, None, None] + column >= 0)
    if alibi_slopes is None:
        global_parts = _turned_global_parts(geometry, context, length)
    else:
        global_parts = _biased_global_parts(geometry, context, length, alibi_slopes)
    return ChunkPlan(n_local, tile, num_tiles, _mask(visible[:, None], distance, alibi_slopes), global_parts)


def _mask(visible: Tensor, distance: Tensor, alibi_slopes: Tensor | None) -> Tensor:
    """visible bool [..., 1, T, S], distance [T, S] -> additive [..., 1 or heads, T, S]."""
    mask = additive(visible)
    return mask if alibi_slopes is None else mask - alibi_slopes[:, None, None] * distance


def _turned_global_parts(geometry: Geometry, context: int, length: int) -> list[GlobalPart]:
    """The global branch in parts whose distances one rotation of queries and one of keys can give.

    Under a ceiling: queries as if at L, keys as if at 0, for pairs beyond it; both as they are, for the others.
    """
    queries, keys = torch.arange(context, context + length), torch.arange(geometry.n_global)
    start = geometry.window_start(queries)
    visible = keys < start[:, None]
    if not visible.any():
        return []
    if geometry.distances == "in_cache":
        unseen = (start - geometry.n_global).clamp_min(0)
        return [GlobalPart(additive(visible)[None, None], -unseen, None)]
    if geometry.distance_ceiling is None:
        return [GlobalPart(additive(visible)[None, None], None, None)]
    beyond = visible & (queries[:, None] - keys >= geometry.distance_ceiling)
    within = visible & ~beyond
    parts = []
    if beyond.any():
        parts.append(GlobalPart(additive(beyond)[None, None], geometry.distance_ceiling - queries, -keys))
    if within.any():
        parts.append(GlobalPart(additive(within)[None, None], None, None))
    return parts


def _biased_global_parts(geometry: Geometry, context: int, length: int, alibi_slopes: Tensor) -> list[GlobalPart]:
    queries, keys = torch.arange(context, context + length), torch.arange(geometry.n_global)
    branch = global_branch(geometry, queries, keys, geometry.window_start(queries))
    if not branch.visible.any():
        return []
    return [GlobalPart(_mask(branch.visible, branch.distance, alibi_slopes)[None], None, None)]


def attend_chunk(
    plan: ChunkPlan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context: tuple[Tensor, Tensor],
    first: tuple[Tensor, Tensor],
    rotary: Rotary | None,
    scale: float,
) -> Tensor:
    """Attention of one layer. query [T, heads, d]; key, value [T, kv_heads, d] of the chunk, rotated at their positions.

    context: (keys, values) [min(N - 1, positions before the chunk), kv_heads, d]; first: those of the first tokens, [G, ...].
    rotary: None for a model without, whose plan has ALiBi's bias.
    Returns [T, heads, d] in the query's dtype, or float32 where branches were merged.
    """
    length = len(query)
    padding = plan.num_tiles * plan.tile - length
    tiled_query = F.pad(query, (0, 0, 0, 0, 0, padding)).unflatten(0, (plan.num_tiles, plan.tile)).transpose(1, 2)
    keys, values = (_windows(plan, before, chunk, padding) for before, chunk in zip(context, (key, value), strict=True))
    output, lse = attend(tiled_query, keys, values, plan.local_mask, scale)
    output, lse = output.transpose(1, 2).flatten(0, 1)[:length], lse.transpose(1, 2).flatten(0, 1)[:length]

    for part in plan.global_parts:
        q, k = _turned(rotary, query, part.turn_queries), _turned(rotary, first[0], part.turn_keys)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, first[1]))
        other, other_lse = attend(q, k, v, part.mask, scale)
        output, lse = merge((output, lse), (other[0].transpose(0, 1), other_lse[0].transpose(0, 1)))
    return output


def _turned(rotary: Rotary | None, x: Tensor, by: Tensor | None) -> Tensor:
    return x if by is None or rotary is None else rotary.turn(x, by[:, None])


def _windows(plan: ChunkPlan, before: Tensor, chunk: Tensor, padding: int) -> Tensor:
    """[tiles, kv_heads, N - 1 + tile, d]: overlapping views of one buffer; rows before the text are zeros."""
    missing = plan.n_local - 1 - len(before)
    buffer = torch.cat((before.new_zeros(missing, *chunk.shape[1:]), before, chunk, chunk.new_zeros(padding, *chunk.shape[1:])))
    row, head, element = buffer.stride()
    size = (plan.num_tiles, buffer.shape[1], plan.n_local - 1 + plan.tile, buffer.shape[2])
    return buffer.as_strided(size, (plan.tile * row, head, row, element))
