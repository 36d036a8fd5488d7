"""What the Λ kernels share: a layer's view of the text, and one online softmax over tiles of the paged KV
cache.

Branches and distances are those of `geometry`. A tile is a few queries of one KV head (its whole group of
query heads, so that each key is read once) against a few keys. The keys a tile may see are two ranges: the
first tokens that every window has left behind, and the windows. Nothing else is read: blocks between them may
be freed.

Running maxima and sums (FlashAttention-2, arXiv 2307.08691, section 3.1) are float32 and in base 2.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_longctx.geometry import Geometry

MAX_HEAD_SIZE = 256
LOG2_E = 1.4426950408889634
UNBOUNDED = 2**31 - 1


@dataclass(frozen=True)
class View:
    """What the queries of a layer see, and how positions enter their scores.

    rotary_dim, is_neox: as in `rotary.Rotary`; rotary_dim is 0 for a model without rotation. alibi_slopes:
    float32 [heads] on the device, or None. soft_cap: scores become cap * tanh(score / cap); 0 for no cap.
    sinks: scores of one more key per head, whose value is zero; [heads] on the device, or None.
    """

    geometry: Geometry
    rotary_dim: int = 0
    is_neox: bool = True
    alibi_slopes: Tensor | None = None
    soft_cap: float = 0.0
    sinks: Tensor | None = None

    @property
    def window(self) -> int:
        return UNBOUNDED if self.geometry.n_local is None else self.geometry.n_local

    @property
    def ceiling(self) -> int:
        """The farthest a first token looks; UNBOUNDED where distances are counted in the cache."""
        limit = self.geometry.distance_ceiling
        return UNBOUNDED if limit is None or self.geometry.distances == "in_cache" else limit

    @property
    def turns_queries(self) -> bool:
        """Whether first tokens look nearer than they are to a rotated query, which is then turned back."""
        moved = self.geometry.distances == "in_cache" or self.geometry.distance_ceiling is not None
        return (
            moved and self.rotary_dim > 0 and self.geometry.n_global > 0 and self.geometry.n_local is not None
        )

    @property
    def turns_keys(self) -> bool:
        return self.turns_queries and self.geometry.distances == "relative"

    def query_turn(self, positions: Tensor) -> Tensor | None:
        """By how many positions to turn the queries at `positions` (int64, any shape); None for not at
        all.
        """
        if not self.turns_queries:
            return None
        if self.geometry.distances == "in_cache":
            return (self.geometry.n_global - self.geometry.window_start(positions)).clamp_max(0)
        return self.ceiling - positions

    def key_turn(self) -> Tensor | None:
        """By how many positions to turn the first keys: int64 [n_global]; None for not at all."""
        return -torch.arange(self.geometry.n_global) if self.turns_keys else None


@dataclass(frozen=True)
class Launch:
    """The shape of a program.

    rows: of a tile, (query, head) pairs; keys: of a tile. All powers of two, rows and keys >= 16.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int

    def arguments(self) -> dict[str, int]:
        return {
            "ROWS": self.rows,
            "KEYS": self.keys,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


Turn = tuple[Tensor, Tensor] | None


def stride_arguments(
    query: Tensor, out: Tensor, block_table: Tensor, key_cache: Tensor, value_cache: Tensor
) -> tuple[int, ...]:
    """Strides: of the queries, the outputs (token, head), the block table (row), and both caches (block,
    slot, head).

    The caches are halves of one tensor. Raises ValueError if they differ in their strides.
    """
    if key_cache.stride() != value_cache.stride() or key_cache.stride(3) != 1:
        raise ValueError(
            f"caches must have equal strides, the last 1; got {key_cache.stride()} and {value_cache.stride()}"
        )
    return *query.stride()[:2], *out.stride()[:2], block_table.stride(0), *key_cache.stride()[:3]


def turn_arguments(view: View, turn: Turn, key_turn: Turn, tokens: int, unused: Tensor) -> tuple[Tensor, ...]:
    """cos and sin of the queries' turn, then of the first keys': contiguous float32 [vectors, rotary_dim /
    2].

    A turn that the view does not have is replaced by any tensor. Raises ValueError for one that is missing or
    wrong.
    """
    return (
        *_one_turn(view.turns_queries, turn, tokens, view.rotary_dim, unused),
        *_one_turn(view.turns_keys, key_turn, view.geometry.n_global, view.rotary_dim, unused),
    )


def _one_turn(
    turns: bool, turn: Turn, vectors: int, rotary_dim: int, unused: Tensor
) -> tuple[Tensor, Tensor]:
    if not turns:
        return unused, unused
    if turn is None:
        raise ValueError(
            "the view turns queries or keys towards each other, but their cosines and sines were not given"
        )
    shape = vectors, rotary_dim // 2
    for t in turn:
        if t.shape != shape or t.dtype != torch.float32 or not t.is_contiguous():
            raise ValueError(f"a turn must be contiguous float32 {shape}, got {t.dtype} {tuple(t.shape)}")
    return turn


def lse_arguments(lse: Tensor | None, shape: tuple[int, int], unused: Tensor) -> Tensor:
    """Where to write log-sum-exps, float32 [tokens, heads] contiguous; any tensor where nobody asks for
    them.
    """
    if lse is None:
        return unused
    if lse.shape != shape or lse.dtype != torch.float32 or not lse.is_contiguous():
        raise ValueError(f"lse must be contiguous float32 {shape}, got {lse.dtype} {tuple(lse.shape)}")
    return lse


def sinks_argument(sinks: Tensor | None, heads: int) -> Tensor | None:
    """Sinks as kernels take them: without, a kernel has no such parameter.

    Raises ValueError for other sinks than [heads], contiguous.
    """
    if sinks is not None and (sinks.shape != (heads,) or not sinks.is_contiguous()):
        raise ValueError(f"sinks must be contiguous ({heads},), got {tuple(sinks.shape)}")
    return sinks


def view_arguments(view: View, scale: float, v_scale: float) -> tuple[int | float, ...]:
    """scale: of the scores, with the one of the cache's keys."""
    scale = scale if view.soft_cap else scale * LOG2_E
    return view.geometry.n_global, view.window, view.ceiling, scale, view.soft_cap, v_scale


def view_constants(view: View, head_size: int, block_size: int) -> dict[str, int | bool]:
    """The constants of a specialisation that come from the view and the cache."""
    first_keys = min(64, triton.next_power_of_2(max(view.geometry.n_global, 16)))
    return {
        **cache_constants(head_size, block_size),
        "FIRST_KEYS": first_keys,
        "ROTARY_DIM": view.rotary_dim if view.turns_queries else 0,
        "IS_NEOX": view.is_neox,
        "TURN_QUERIES": view.turns_queries,
        "TURN_KEYS": view.turns_keys,
        "BOTH_PRODUCTS": view.turns_keys and view.ceiling > view.window,
        "IN_CACHE": view.geometry.distances == "in_cache",
        "ALIBI": view.alibi_slopes is not None,
        "SOFT_CAP": view.soft_cap > 0,
    }


def cache_constants(head_size: int, block_size: int) -> dict[str, int]:
    padded_head = max(16, triton.next_power_of_2(head_size))
    return {"HEAD_SIZE": head_size, "PADDED_HEAD": padded_head, "BLOCK_SIZE": block_size}


class Cache(NamedTuple):
    """Keys and values of one request and KV head: pointers to the head in the first block, and the row of
    block ids.
    """

    key_ptr: tl.tensor
    value_ptr: tl.tensor
    table: tl.tensor
    stride_block: tl.tensor
    stride_slot: tl.tensor


class Softmax(NamedTuple):
    """What a tile's queries have seen so far.

    top, total [rows]: the highest score, in base 2, and the sum of the weights. acc [rows, PADDED_HEAD]: of
    weighted values.
    """

    top: tl.tensor
    total: tl.tensor
    acc: tl.tensor


@triton.jit
def cache_of(
    key_cache, value_cache, block_table, row, kv_head, stride_table, stride_block, stride_slot, stride_head
):
    table = block_table + row.to(tl.int64) * stride_table
    head = kv_head.to(tl.int64) * stride_head
    return Cache(key_cache + head, value_cache + head, table, stride_block, stride_slot)


@triton.jit
def nothing_seen(ROWS: tl.constexpr, PADDED_HEAD: tl.constexpr):
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    return Softmax(top, tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, PADDED_HEAD), tl.float32))


@triton.jit
def sinks_seen(softmax, sinks, heads, active):
    """The heads' sinks in the same softmax, once for a query. sinks: None for a layer without."""
    if sinks is not None:
        score = tl.load(sinks + heads, mask=active, other=float("-inf")).to(tl.float32) * 1.4426950408889634
        top = tl.maximum(softmax.top, score)
        base = tl.where(top == float("-inf"), 0.0, top)
        kept = tl.exp2(softmax.top - base)
        softmax = Softmax(top, softmax.total * kept + tl.exp2(score - base), softmax.acc * kept[:, None])
    return softmax


@triton.jit
def further_seen(
    softmax, further, further_lse, token, heads, mask, active, d, num_heads, HEAD_SIZE: tl.constexpr
):
    """Where attention over further keys ended, as the softmax to go on with. further: None for no such keys.

    further float32 [tokens, num_heads, HEAD_SIZE]: its output. further_lse float32 [tokens, num_heads]: its
    log-sum-exp, -inf where there are no keys. The rest as of `load_queries`.
    """
    if further is not None:
        place = token * num_heads + heads
        top = tl.load(further_lse + place, mask=active, other=float("-inf")) * 1.4426950408889634
        total = tl.where(top > float("-inf"), 1.0, 0.0)
        acc = tl.load(further + place[:, None] * HEAD_SIZE + d[None, :], mask=mask, other=0.0)
        softmax = Softmax(top, total, acc)
    return softmax


@triton.jit
def load_queries(query_ptr, token, heads, mask, d, stride_query, stride_query_head):
    """Queries [rows, PADDED_HEAD], and where each begins [rows, 1].

    token: int64, of the batch, one or [rows]. heads [rows]: of the queries. mask: which elements there are.
    """
    pointers = query_ptr + (token * stride_query + heads * stride_query_head)[:, None]
    return tl.load(pointers + d[None, :], mask=mask, other=0.0), pointers


@triton.jit
def load_slopes(alibi_slopes, heads, active, ALIBI: tl.constexpr):
    """For scores in base 2."""
    slopes = tl.zeros(heads.shape, tl.float32)
    if ALIBI:
        slopes = tl.load(alibi_slopes + heads, mask=active, other=0.0) * 1.4426950408889634
    return slopes


@triton.jit
def store_output(out_ptr, acc, token, heads, mask, d, stride_out, stride_out_head):
    """token, heads, mask: as of `load_queries`."""
    out_pointers = out_ptr + (token * stride_out + heads * stride_out_head)[:, None] + d[None, :]
    tl.store(out_pointers, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_lse(lse, softmax, token, heads, active, GROUP: tl.constexpr):
    """The scores' log-sum-exps, in base e, of float32 [tokens, heads]."""
    places = token * (tl.num_programs(1) * GROUP) + heads
    tl.store(lse + places, log_sum_exp(softmax.top, softmax.total) * 0.6931471805599453, mask=active)


@triton.jit
def places(cache, keys, present, BLOCK_SIZE: tl.constexpr):
    """Offsets of keys in the cache: int64 [keys]."""
    blocks = tl.load(cache.table + keys // BLOCK_SIZE, mask=present, other=0).to(tl.int64)
    return blocks * cache.stride_block + (keys % BLOCK_SIZE) * cache.stride_slot


@triton.jit
def element_pairs(d, ROTARY_DIM: tl.constexpr, IS_NEOX: tl.constexpr):
    """For each element of a head: the other of its pair, the pair, and the sign of the sine it is rotated
    with.
    """
    if IS_NEOX:
        first = d < ROTARY_DIM // 2
        other = tl.where(first, d + ROTARY_DIM // 2, d - ROTARY_DIM // 2)
        pair = tl.where(first, d, d - ROTARY_DIM // 2)
    else:
        first = d % 2 == 0
        other = tl.where(first, d + 1, d - 1)
        pair = d // 2
    rotated = d < ROTARY_DIM
    return tl.where(rotated, other, d), tl.where(rotated, pair, 0), tl.where(first, -1.0, 1.0)


@triton.jit
def rotate(x, other, cos, signed_sin):
    return (x.to(tl.float32) * cos + other.to(tl.float32) * signed_sin).to(x.dtype)


@triton.jit
def load_turned(pointers, x, mask, cos, sin, vectors, d, ROTARY_DIM: tl.constexpr, IS_NEOX: tl.constexpr):
    """x [rows, PADDED_HEAD], loaded from pointers [rows, 1] + d, turned by the angles of `vectors` [rows]."""
    other, pair, sign = element_pairs(d, ROTARY_DIM, IS_NEOX)
    others = tl.load(pointers + other[None, :], mask=mask, other=0.0).to(x.dtype)
    angles = vectors.to(tl.int64)[:, None] * (ROTARY_DIM // 2) + pair[None, :]
    rotated = mask & (d < ROTARY_DIM)[None, :]
    cosines = tl.load(cos + angles, mask=rotated, other=1.0)
    sines = tl.load(sin + angles, mask=rotated, other=0.0)
    return rotate(x, others, cosines, sines * sign[None, :])


@triton.jit
def tanh_of_ratio(scores, soft_cap):
    """tanh(score / cap), as 1 - 2 / (1 + e^2x)."""
    return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * scores / soft_cap))


@triton.jit
def finish_scores(products, scale, soft_cap, SOFT_CAP: tl.constexpr):
    """Products to scores in base 2. scale: of the scores, times log2(e) where they are not capped."""
    scores = products * scale
    if SOFT_CAP:
        scores = soft_cap * 1.4426950408889634 * tanh_of_ratio(scores, soft_cap)
    return scores


@triton.jit
def accumulate(scores, values, softmax):
    """One more tile. scores [rows, keys] in base 2, -inf where unseen."""
    new_top = tl.maximum(softmax.top, tl.max(scores, 1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - base[:, None])
    kept = tl.exp2(softmax.top - base)
    total = softmax.total * kept + tl.sum(weights, 1)
    acc = tl.dot(weights.to(values.dtype), values, softmax.acc * kept[:, None], input_precision="ieee")
    return Softmax(new_top, total, acc)


@triton.jit
def log_sum_exp(top, total):
    """In base 2; -inf where nothing was seen, whose top is -inf."""
    return top + tl.log2(tl.where(total > 0, total, 1.0))


@triton.jit
def attend_first(
    query, turned_query, positions, slopes, softmax, cache, key_cos, key_sin, begin, end,
    n_global, n_local, ceiling, scale, soft_cap,
    HEAD_SIZE: tl.constexpr, PADDED_HEAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, FIRST_KEYS: tl.constexpr,
    ROTARY_DIM: tl.constexpr, IS_NEOX: tl.constexpr, TURN_QUERIES: tl.constexpr, TURN_KEYS: tl.constexpr,
    BOTH_PRODUCTS: tl.constexpr, IN_CACHE: tl.constexpr, ALIBI: tl.constexpr, SOFT_CAP: tl.constexpr,
):  # fmt: skip
    """The first tokens from `begin` up to `end`, exclusive.

    Each is seen by the queries whose window has left it behind (`geometry.global_branch`).

    positions [rows]: of the queries. end: no larger than n_global and the last query's window start.
    """
    d = tl.arange(0, PADDED_HEAD)
    window_start = tl.maximum(positions - n_local + 1, 0)
    for first in tl.range(
        begin, end, FIRST_KEYS, num_stages=1
    ):  # one or two tiles: nothing to overlap them with
        keys = first + tl.arange(0, FIRST_KEYS)
        present = keys < end
        place = places(cache, keys, present, BLOCK_SIZE)
        mask = present[:, None] & (d < HEAD_SIZE)[None, :]
        key_pointers = cache.key_ptr + place[:, None]
        key = tl.load(key_pointers + d[None, :], mask=mask, other=0.0).to(query.dtype)
        value = tl.load(cache.value_ptr + place[:, None] + d[None, :], mask=mask, other=0.0).to(query.dtype)
        if TURN_QUERIES:
            if TURN_KEYS:
                turned_key = load_turned(
                    cache.key_ptr + place[:, None], key, mask, key_cos, key_sin, keys, d, ROTARY_DIM, IS_NEOX
                )
            else:
                turned_key = key
            products = tl.dot(turned_query, tl.trans(turned_key), input_precision="ieee")
            if BOTH_PRODUCTS:
                beyond = positions[:, None] - keys[None, :] > ceiling
                products = tl.where(beyond, products, tl.dot(query, tl.trans(key), input_precision="ieee"))
        else:
            products = tl.dot(query, tl.trans(key), input_precision="ieee")
        scores = finish_scores(products, scale, soft_cap, SOFT_CAP)
        if ALIBI:
            distance = positions[:, None] - keys[None, :]
            distance = tl.minimum(distance, ceiling)
            if IN_CACHE:
                distance -= tl.maximum(window_start - n_global, 0)[:, None]
            scores = scores - slopes[:, None] * distance
        scores = tl.where(present[None, :] & (keys[None, :] < window_start[:, None]), scores, float("-inf"))
        softmax = accumulate(scores, value, softmax)
    return softmax


@triton.jit
def attend_window(
    query, positions, slopes, softmax, cache, begin, end, n_local, scale, soft_cap,
    KEYS: tl.constexpr, MASKED: tl.constexpr, HEAD_SIZE: tl.constexpr, PADDED_HEAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, ALIBI: tl.constexpr, SOFT_CAP: tl.constexpr,
):  # fmt: skip
    """Keys begin .. end - 1 for the queries in whose window they are (`geometry.local_branch`).

    MASKED: False where every query sees all of them, and they are whole tiles.
    """
    d = tl.arange(0, PADDED_HEAD)
    for first in range(begin, end, KEYS):
        keys = first + tl.arange(0, KEYS)
        present = keys < end if MASKED else tl.full((KEYS,), True, tl.int1)
        place = places(cache, keys, present, BLOCK_SIZE)
        mask = present[:, None]
        if HEAD_SIZE != PADDED_HEAD:
            mask = mask & (d < HEAD_SIZE)[None, :]
        key = tl.load(cache.key_ptr + place[:, None] + d[None, :], mask=mask, other=0.0).to(query.dtype)
        value = tl.load(cache.value_ptr + place[:, None] + d[None, :], mask=mask, other=0.0).to(query.dtype)
        scores = finish_scores(
            tl.dot(query, tl.trans(key), input_precision="ieee"), scale, soft_cap, SOFT_CAP
        )
        distance = positions[:, None] - keys[None, :]
        if ALIBI:
            scores = scores - slopes[:, None] * distance
        if MASKED:
            scores = tl.where(
                present[None, :] & (distance >= 0) & (distance < n_local), scores, float("-inf")
            )
        softmax = accumulate(scores, value, softmax)
    return softmax
