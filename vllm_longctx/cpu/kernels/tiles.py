"""Λ attention for a chunk of one request's queries past its window (chunked prefill), with no mask over what
cannot be seen.

The chunk is cut into tiles of `tile` queries. A tile sees at most tile + N - 1 keys, so its keys are a
strided view into one buffer [the N - 1 keys before the chunk | the chunk], and all tiles share one band mask.
The first tokens are a second branch, one product for the whole chunk. ALiBi's bias is part of the masks.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_longctx.cpu.kernels.branches import additive, attend, merge, scores_of, with_sinks
from vllm_longctx.cpu.kernels.retrieval import merge_selected
from vllm_longctx.geometry import Geometry, global_branch
from vllm_longctx.rotary import Rotary


@dataclass(frozen=True)
class GlobalPart:
    """The first tokens as some queries see them.

    mask: additive [T, 1 or heads, G]. turn_queries [T], turn_keys [G]: positions, or None to leave them.
    """

    mask: Tensor
    turn_queries: Tensor | None
    turn_keys: Tensor | None


@dataclass(frozen=True)
class ChunkPlan:
    """What every layer needs to know of a chunk. local_mask: additive [1 or tiles, 1 or heads, tile, N - 1 +
    tile].

    context: position of the first query.
    """

    context: int
    n_local: int
    tile: int
    num_tiles: int
    local_mask: Tensor
    global_parts: list[GlobalPart]


def tile_size(n_local: int) -> int:
    """Queries in a tile: small against the window, so that few keys are scored in vain, but no smaller than
    32.
    """
    return min(256, max(32, n_local // 8))


def plan_chunk(
    geometry: Geometry,
    context: int,
    length: int,
    alibi_slopes: Tensor | None = None,
    starts: Tensor | None = None,
) -> ChunkPlan:
    """A chunk of `length` queries from position `context` on, all of them past the window: context >= N.

    alibi_slopes [heads]: for a model that has these instead of a rotation. starts int64 [length]: where each
    query's window begins, inside of the sliding one; by default where that does.
    """
    n_local = geometry.n_local
    if n_local is None or context < n_local:
        raise ValueError(
            f"tiles are for queries past the window, but n_local is {n_local} and context is {context}"
        )
    tile = min(tile_size(n_local), length)
    row, column = torch.arange(tile)[:, None], torch.arange(n_local - 1 + tile)[None, :]
    distance = row + n_local - 1 - column
    local_mask = additive((distance >= 0) & (distance < n_local))[None]
    if alibi_slopes is not None:
        local_mask = local_mask - alibi_slopes[:, None, None] * distance
    local_mask, num_tiles = local_mask[None], -(-length // tile)
    queries = torch.arange(context, context + length)
    if starts is None:
        starts = geometry.window_start(queries)
    else:
        # In a tile, keys are counted from the first one that its first query's sliding window holds.
        hidden = F.pad(starts - (queries - n_local + 1), (0, num_tiles * tile - length)).view(-1, tile, 1)
        local_mask = local_mask + additive(column >= hidden + row)[:, None]
    parts = global_parts(geometry, queries, starts, alibi_slopes)
    return ChunkPlan(context, n_local, tile, num_tiles, local_mask, parts)


def global_parts(
    geometry: Geometry, queries: Tensor, start: Tensor, alibi_slopes: Tensor | None
) -> list[GlobalPart]:
    """The global branch in parts whose distances one rotation of queries and one of keys can give.

    queries: positions [T], all past the window. start [T]: of their windows.

    Under a ceiling: queries as if at L, keys as if at 0, for pairs beyond it; both as they are, for the
    others.
    """
    keys = torch.arange(geometry.n_global)
    branch = global_branch(geometry, queries, keys, start)
    if not branch.visible.any():
        return []
    mask = additive(branch.visible)[:, None]
    if alibi_slopes is not None:
        return [GlobalPart(mask - alibi_slopes[:, None] * branch.distance[:, None], None, None)]
    if geometry.distances == "in_cache":
        return [GlobalPart(mask, (geometry.n_global - start).clamp_max(0), None)]
    if geometry.distance_ceiling is None:
        return [GlobalPart(mask, None, None)]
    beyond = queries[:, None] - keys >= geometry.distance_ceiling
    at_ceiling = GlobalPart(
        additive(branch.visible & beyond)[:, None], geometry.distance_ceiling - queries, -keys
    )
    in_text = GlobalPart(additive(branch.visible & ~beyond)[:, None], None, None)
    return [part for part in (at_ceiling, in_text) if not torch.isneginf(part.mask).all()]


def attend_chunk(
    plan: ChunkPlan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context: tuple[Tensor, Tensor],
    first: tuple[Tensor, Tensor],
    rotary: Rotary | None,
    scale: float,
    further: tuple[Tensor, Tensor] | None = None,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of one layer.

    query [T, heads, d]; key, value [T, kv_heads, d] of the chunk, rotated at their positions.

    context: (keys, values) [N - 1, kv_heads, d] right before the chunk; first: those of the first tokens, [G,
        ...].
    rotary: None for a model without, whose plan has ALiBi's bias. further: scores [T, heads, k] and values
    [T, heads, k, d] of keys of each query and head's own, capped already. soft_cap, sinks: as in `branches`.
    Returns [T, heads, d] in the query's dtype, or float32 where branches were merged or there are sinks.
    """
    length = len(query)
    padding = plan.num_tiles * plan.tile - length
    tiled_query = (
        F.pad(query, (0, 0, 0, 0, 0, padding)).unflatten(0, (plan.num_tiles, plan.tile)).transpose(1, 2)
    )
    keys, values = (
        _windows(plan, before, chunk, padding) for before, chunk in zip(context, (key, value), strict=True)
    )
    output, lse = attend(tiled_query, keys, values, plan.local_mask, scale, soft_cap)
    output, lse = output.transpose(1, 2).flatten(0, 1)[:length], lse.transpose(1, 2).flatten(0, 1)[:length]
    output, lse = with_sinks((output, lse), sinks)
    if not plan.global_parts and further is None:
        return output
    scores = [
        scores_of(
            _turned(rotary, query, part.turn_queries),
            _turned(rotary, first[0], part.turn_keys),
            scale,
            soft_cap,
        )
        + part.mask
        for part in plan.global_parts
    ]
    if further is None:
        return merge((output, lse), torch.cat(scores, -1), torch.cat([first[1]] * len(scores)))
    group = query.shape[1] // first[1].shape[1]
    values = first[1].repeat_interleave(group, 1).transpose(0, 1).expand(length, -1, -1, -1)
    return merge_selected(
        (output, lse),
        torch.cat([*scores, further[0]], -1),
        torch.cat([*[values] * len(scores), further[1]], 2),
    )


def _turned(rotary: Rotary | None, x: Tensor, by: Tensor | None) -> Tensor:
    return x if by is None or rotary is None else rotary.turn(x, by[:, None])


def _windows(plan: ChunkPlan, before: Tensor, chunk: Tensor, padding: int) -> Tensor:
    """[tiles, kv_heads, N - 1 + tile, d]: overlapping views of one buffer."""
    buffer = torch.cat((before, chunk, chunk.new_zeros(padding, *chunk.shape[1:])))
    row, head, element = buffer.stride()
    size = (plan.num_tiles, buffer.shape[1], plan.n_local - 1 + plan.tile, buffer.shape[2])
    return buffer.as_strided(size, (plan.tile * row, head, row, element))
