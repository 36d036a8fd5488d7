"""A memory's best keys for each query, and attention over just those: exactly, or by a few blocks.

The memory is a range of one request's text whose un-rotated keys stand in the paged KV cache. Queries come
rotated by the distance at which the memory is seen. `engine.lookup` has the rule of which keys they get.

`top_k` is exact. `best_blocks` reads few keys: it scores every block by an upper bound of its keys' products,
reads the best blocks in full, and says for which queries the result is proven exact. Elementwise minima and
maxima of a block's keys (Quest, arXiv 2406.10774) are too loose a bound for 32 keys: a tenth of the blocks
held 57 to 76 % of a trained model's best keys among 131,072. With the keys in 7 bits and one step per block
they hold over 99 % (`benchmarks/lookup.py`), and the bounds are an integer product.

Equal products go to the earlier key. Nothing here depends on how queries or keys are tiled but the last bits
of products.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_longctx.cpu.kernels.branches import capped
from vllm_longctx.engine.lookup import LEVELS, SCANNED, SHARE, pack, place_of, score_of, weigh

TILE = 1 << 21  # elements of a temporary: 8 MiB of float32
QUERY_TILE = 32
FINE = 254  # a query's second code divides the step of its first one by this


@dataclass(frozen=True)
class Pages:
    """One layer's KV cache [num_blocks, kv_heads, block_size, 2 * head_size], contiguous, packed as `places`
    says.

    places: for keys and for values, where element [offset, dim] stands in its half of a block and head; int64
    [block_size, head_size] each (`cpu.kernels.scratch.packed_order`).
    """

    cache: Tensor
    places: tuple[Tensor, Tensor]

    @functools.cached_property
    def halves(self) -> Tensor:
        """[num_blocks * kv_heads * 2, block_size * head_size]: of each block and head first the keys, then
        the values.
        """
        return self.cache.view(-1, self.places[0].numel())

    @functools.cached_property
    def transposed(self) -> Tensor | None:
        """Where the elements of keys [head_size, block_size] stand; None if they stand in that order
        already.
        """
        order = self.places[0].T.flatten()
        return None if torch.equal(order, torch.arange(len(order))) else order

    def keys(self, blocks: Tensor, head: int) -> Tensor:
        """float32 [n, head_size, block_size] of blocks int64 [n]; no copy if the blocks follow each other."""
        kv_heads = self.cache.shape[1]
        if is_run(blocks):
            first = int(blocks[0])
            halves = self.halves.view(-1, 2 * kv_heads, self.halves.shape[1])[
                first : first + len(blocks), 2 * head
            ]
        else:
            halves = self.halves.index_select(0, (blocks * kv_heads + head) * 2)
        if self.transposed is not None:
            halves = halves.index_select(1, self.transposed)
        return halves.float().unflatten(1, self.places[0].T.shape)

    def values(self, blocks: Tensor, offsets: Tensor) -> Tensor:
        """The values of single keys.

        blocks, offsets int64 [T, heads, k] -> [T, heads, k, head_size] in the cache's dtype.
        """
        kv_heads, heads = self.cache.shape[1], blocks.shape[1]
        kv_head = torch.arange(heads)[:, None] // (heads // kv_heads)
        start = ((blocks * kv_heads + kv_head) * 2 + 1) * self.halves.shape[1]
        return self.halves.view(-1).take(start.unsqueeze(-1) + self.places[1][offsets])


@dataclass(frozen=True)
class Codes:
    """The summaries of one layer's blocks, by block id: the keys in 7 bits, so that every key is code * step
    up to step / 2.

    codes int8 [kv_heads, num_blocks, block_size, head_size]; steps float32 [kv_heads, num_blocks].
    """

    codes: Tensor
    steps: Tensor

    @classmethod
    def empty(cls, num_blocks: int, kv_heads: int, block_size: int, head_size: int) -> "Codes":
        codes = torch.zeros(kv_heads, num_blocks, block_size, head_size, dtype=torch.int8)
        return cls(codes, torch.zeros(kv_heads, num_blocks))

    def summarise(self, pages: Pages, blocks: Tensor, filled: Tensor | None = None) -> None:
        """Write the codes of blocks, int64 [n], whose first `filled` keys are there; int64 [n], by default
        all of them.

        A block must be summarised again before keys that it got since are looked up. Keys that no lookup is
        to see (the first tokens of the text, say) may be in it: its bound holds all the same.
        """
        per_tile = max(1, TILE // self.codes[0, 0].numel())
        for head in range(len(self.codes)):
            for begin in range(0, len(blocks), per_tile):
                tile = slice(begin, begin + per_tile)
                keys = pages.keys(blocks[tile], head).transpose(1, 2)
                if filled is not None:
                    missing = torch.arange(keys.shape[1]) >= filled[tile, None]
                    keys = keys.masked_fill(missing.unsqueeze(-1), 0)
                steps = keys.abs().amax((1, 2)) / LEVELS
                self.codes[head, blocks[tile]] = (
                    (keys / steps.clamp_min(1e-30)[:, None, None]).round().to(torch.int8)
                )
                self.steps[head, blocks[tile]] = steps

    def bounds(self, query: Tensor, blocks: Tensor) -> Tensor:
        """No key of a block has a higher product with a query: query [T, heads, d], blocks int64 [n] ->
        [kv_heads, T, g, n].

        The query is split in two codes of 8 bits, coarse and fine. With q^ and k^ for the coded ones and |.|
        for sums of absolutes, q·k = q^·k^ + q^·(k - k^) + (q - q^)·k, and of these the second is at most step
        * |q^| / 2 and the third at most half a fine step times |k|, which is no more than d * LEVELS * step.
        The integer products are exact.
        """
        kv_heads, _, block_size, head_size = self.codes.shape
        length, first = len(query), int(blocks[0])
        is_slice = is_run(blocks)
        grouped = query.float().unflatten(1, (kv_heads, -1)).permute(1, 0, 2, 3)
        fine_step = grouped.abs().amax(-1, keepdim=True).clamp_min(1e-30) / (127 * FINE)
        both = (grouped / fine_step).round()
        coarse = (both / FINE).round()
        halves = torch.stack((coarse, both - FINE * coarse), 1).flatten(2, 3).to(torch.int8)
        margin = grouped.abs().sum(-1) / 2 + fine_step.squeeze(-1) * (head_size * (LEVELS + 1) / 2)
        bounds = torch.empty(kv_heads, length, grouped.shape[2], len(blocks))
        rows = halves.shape[1] * halves.shape[2]
        per_tile = max(1, TILE // (block_size * max(rows, head_size // 4)))
        for head in range(kv_heads):
            for begin in range(0, len(blocks), per_tile):
                tile = slice(begin, min(begin + per_tile, len(blocks)))
                codes, steps = self.codes[head], self.steps[head]
                if is_slice:
                    where = slice(first + tile.start, first + tile.stop)
                    codes, steps = codes[where], steps[where]
                else:  # indexing would copy element by element
                    codes, steps = (x.index_select(0, blocks[tile]) for x in (codes, steps))
                high, low = torch._int_mm(halves[head].flatten(0, 1), codes.flatten(0, 1).T).chunk(2)
                best = (
                    high.mul_(FINE)
                    .add_(low)
                    .unflatten(1, (-1, block_size))
                    .amax(-1)
                    .unflatten(0, (length, -1))
                )
                bounds[head, ..., tile] = (best * fine_step[head] + margin[head].unsqueeze(-1)) * steps
        return bounds


@dataclass(frozen=True)
class Memory:
    """The tokens begin .. end - 1 of a request's text, in one layer.

    block_table: the request's blocks by their place in the text, int64 [at least the blocks up to end].
    codes: its layer's summaries, those of the memory's blocks up to date; only `best_blocks` needs them.
    """

    pages: Pages
    block_table: Tensor
    begin: int
    end: int
    codes: Codes | None = None

    @property
    def block_size(self) -> int:
        return self.pages.places[0].shape[0]

    @functools.cached_property
    def first_block(self) -> int:
        return self.begin // self.block_size

    @functools.cached_property
    def blocks(self) -> Tensor:
        """Ids of the blocks that hold the memory."""
        return (
            self.block_table[self.first_block : -(-self.end // self.block_size)]
            if self.end > self.begin
            else NO_BLOCKS
        )

    def positions(self, blocks: Tensor) -> Tensor:
        """The positions in the text of each key, blocks counted from the memory's first: [...] -> int64 [...,
        block_size].
        """
        return (blocks + self.first_block).unsqueeze(-1) * self.block_size + torch.arange(self.block_size)

    def values(self, positions: Tensor) -> Tensor:
        """Values at positions [T, heads, k]: float32 [T, heads, k, d]."""
        if self.end <= self.begin:
            return torch.zeros(*positions.shape, self.pages.places[0].shape[1])
        return self.pages.values(
            self.block_table[positions // self.block_size], positions % self.block_size
        ).float()


NO_BLOCKS = torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class Selection:
    """The best keys found, best first.

    scores: float32 [T, heads, k], scaled products, -inf where there are fewer keys. positions: int64 [T,
    heads, k], in the text; the memory's begin where there are fewer. proven: bool [T, heads], whether no
    better key can be. keys_read: by each query, for the heads that share a KV head.
    """

    scores: Tensor
    positions: Tensor
    proven: Tensor
    keys_read: int


def top_k(query: Tensor, memory: Memory, k: int, scale: float) -> Selection:
    """The k keys with the highest q·k of each query and head, in all of the memory.

    query [T, heads, d], any float dtype.

    A single query of a memory with codes reads only the blocks whose bound is not below a k-th product
    already found.
    """
    if len(query) > 1 or memory.codes is None or len(memory.blocks) < SCANNED:
        return _scan(query, memory, k, scale)
    bounds = memory.codes.bounds(query, memory.blocks)
    found, _ = _read(query, memory, bounds, _chosen_count(query, memory, k, SHARE, 1), k)
    kth = score_of(found[0, :, -1]).view(len(bounds), -1, 1)
    return _scan(query, memory, k, scale, (bounds[:, 0] >= kth).any(1))


def _scan(query: Tensor, memory: Memory, k: int, scale: float, wanted: Tensor | None = None) -> Selection:
    """`top_k` by a look at every key, or those of the blocks that a KV head wants: bool [kv_heads, n]."""
    kv_heads = memory.pages.cache.shape[1]
    blocks, bs, d = memory.blocks, memory.block_size, query.shape[2]
    found = []
    for tile in query.split(QUERY_TILE):
        rows = tile.float().unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(1, 2)
        per_tile = max(1, TILE // (bs * max(rows.shape[1], d)))
        best = []
        for head in range(kv_heads):
            of_head = rows.new_empty((rows.shape[1], 0), dtype=torch.int64)
            numbers = torch.arange(len(blocks)) if wanted is None else wanted[head].nonzero().flatten()
            for begin in range(0, len(numbers), per_tile):
                number = numbers[begin : begin + per_tile]
                positions = memory.positions(number)
                keys = memory.pages.keys(blocks[number], head)
                products = torch.bmm(rows[head].expand(len(number), -1, -1), keys).transpose(0, 1)
                of_head = _best(_visible(products, positions, memory), positions, k, of_head)
            best.append(_filled(of_head, k))
        found.append(torch.stack(best).unflatten(1, (len(tile), -1)).transpose(0, 1).flatten(1, 2))
    scores, positions = _unpack(torch.cat(found), memory)
    read = memory.end - memory.begin if wanted is None else int(wanted.sum(1).max()) * bs
    return Selection(scores * scale, positions, torch.ones(query.shape[:2], dtype=torch.bool), read)


def best_blocks(
    query: Tensor, memory: Memory, k: int, scale: float, share: float = SHARE, least: int = SCANNED
) -> Selection:
    """The k best keys of each query and head, in the blocks with the highest bounds. query [T, heads, d].

    Of the memory's blocks each query reads at most the given share, or `least` if that is more, but never
    more than twice as many as its heads could want keys from. The query heads of a KV head choose in turn and
    see each other's blocks.
    """
    assert memory.codes is not None
    blocks = memory.blocks
    count = _chosen_count(query, memory, k, share, least)
    if share >= 1 or count == len(blocks):
        return _scan(query, memory, k, scale)
    found, proven = [], []
    per_tile = min(QUERY_TILE, max(1, TILE // (count * memory.pages.halves.shape[1])))
    for tile in query.split(max(per_tile, min(QUERY_TILE, TILE // (query.shape[1] * len(blocks))))):
        all_bounds = memory.codes.bounds(tile, blocks)
        for part, bounds in zip(tile.split(per_tile), all_bounds.split(per_tile, 1), strict=True):
            best, is_proven = _read(part, memory, bounds, count, k)
            found.append(best)
            proven.append(is_proven)
    scores, positions = _unpack(torch.cat(found), memory)
    return Selection(scores * scale, positions, torch.cat(proven), count * memory.block_size)


def _chosen_count(query: Tensor, memory: Memory, k: int, share: float, least: int) -> int:
    """How many blocks each query reads for the heads of a KV head."""
    group = query.shape[1] // memory.pages.cache.shape[1]
    return min(max(int(len(memory.blocks) * share), least), 2 * group * k, len(memory.blocks))


def _read(query: Tensor, memory: Memory, bounds: Tensor, count: int, k: int) -> tuple[Tensor, Tensor]:
    """The best keys of the `count` blocks with the highest bounds [kv_heads, T, g, n], packed: int64 [T,
    heads, k].

    And whether no key of the other blocks is better: bool [T, heads].
    """
    chosen = _in_turn(bounds, count)
    grouped = query.float().unflatten(1, (len(bounds), -1)).transpose(0, 1).unsqueeze(2)
    products = torch.empty(*bounds.shape[:2], count, bounds.shape[2], memory.block_size)
    for head, numbers in enumerate(chosen):
        keys = memory.pages.keys(memory.blocks[numbers.flatten()], head).unflatten(0, numbers.shape)
        products[head] = torch.matmul(grouped[head], keys)
    products = products.transpose(2, 3)
    positions = memory.positions(chosen).unsqueeze(2)
    best = _filled(_best(_visible(products, positions, memory), positions, k), k)
    rejected = bounds.scatter(3, chosen.unsqueeze(2).expand(-1, -1, bounds.shape[2], -1), -torch.inf).amax(-1)
    proven = rejected <= score_of(best[..., -1])
    return best.transpose(0, 1).flatten(1, 2), proven.transpose(0, 1).flatten(1, 2)


def attend_best(
    query: Tensor,
    memory: Memory,
    branch: tuple[Tensor, Tensor],
    k: int,
    scale: float,
    share: float | None = None,
    soft_cap: float = 0.0,
) -> Tensor:
    """One softmax over a branch and the memory's k best keys of each query and head: float32 [T, heads, d].

    query [T, heads, d]; branch: output [T, heads, d] and log-sum-exp [T, heads]. share: of the blocks to read
    (`best_blocks`), or None to find the best keys exactly. soft_cap: as in `branches`; it does not change
    which keys are best. Extra memory does not grow with T or the memory.
    """
    look_up = functools.partial(top_k, memory=memory, k=k, scale=scale)
    if share is not None:
        look_up = functools.partial(best_blocks, memory=memory, k=k, scale=scale, share=share)
    merged = []
    per_tile = max(1, TILE // (query.shape[1] * query.shape[2] * k))
    for tile, output, lse in zip(*(x.split(QUERY_TILE) for x in (query, *branch)), strict=True):
        best = look_up(tile)
        scores = capped(best.scores, soft_cap)
        for part in zip(*(x.split(per_tile) for x in (output, lse, scores, best.positions)), strict=True):
            merged.append(merge_selected(part[:2], part[2], memory.values(part[3])))
    return torch.cat(merged)


def merge_selected(branch: tuple[Tensor, Tensor], scores: Tensor, values: Tensor) -> Tensor:
    """The softmax over a branch and further keys of each query and head's own: float32 [T, heads, d].

    branch: output [T, heads, d] and log-sum-exp [T, heads]. scores [T, heads, k], -inf for no key; values [T,
        heads, k, d].
    """
    weights, rest = weigh(branch[1], scores)
    added = torch.matmul(weights.unsqueeze(2), values.float()).squeeze(2)
    return torch.addcmul(added, branch[0].float(), rest)


def recall(found: Selection, exact: Selection) -> Tensor:
    """The share of the exactly best keys that were found, equal ones being as good: float32 [T, heads].

    Nan where the memory is empty. Products of the same key may differ by some units of the last place.
    """
    there = ~exact.scores.isneginf()
    worst = exact.scores.where(there, torch.inf).amin(-1, keepdim=True)
    good = (found.scores >= worst - 1e-5 * worst.abs()) & ~found.scores.isneginf()
    return good.sum(-1) / there.sum(-1)


def is_run(blocks: Tensor) -> bool:
    return bool((blocks.diff() == 1).all())


def _in_turn(bounds: Tensor, count: int) -> Tensor:
    """Blocks that heads choose one after the other, none twice: bounds [kv_heads, T, g, n] -> int64
    [kv_heads, T, count].
    """
    order = bounds.topk(count, -1).indices.transpose(2, 3).flatten(2)
    turn = torch.arange(order.shape[2]).expand_as(order)
    never = torch.full((*bounds.shape[:2], bounds.shape[3]), order.shape[2])
    first = never.scatter_reduce(2, order, turn, "amin")
    return first.topk(count, -1, largest=False).indices.sort(-1).values


def _visible(products: Tensor, positions: Tensor, memory: Memory) -> Tensor:
    """Products [..., n, block_size] without those of the first and the last block that are not in the
    memory.
    """
    hidden = (positions < memory.begin) | (positions >= memory.end)
    return products.masked_fill(hidden, -torch.inf) if hidden.any() else products


def _best(products: Tensor, positions: Tensor, k: int, before: Tensor | None = None) -> Tensor:
    """The best keys of products [..., n, block_size] and those found before, packed, at most k: int64 [...,
    at most k].

    They stand in the k blocks with the best ones, or in the fewer that beat the k-th found before, at an
    earlier place: only these are looked at twice.
    """
    n, best = products.shape[-2], products.amax(-1)
    count = min(k, n)
    if before is not None and before.shape[-1] == k:
        count = min(count, int((best > score_of(before[..., -1:])).sum(-1).amax()))
    if count < n:
        blocks = place_of(_highest(pack(best, torch.arange(n)), count))
        index = blocks.unsqueeze(-1).expand(*blocks.shape, products.shape[-1])
        products = products.gather(-2, index)
        positions = positions.expand(*blocks.shape[:-1], *positions.shape[-2:]).gather(-2, index)
    packed = pack(products, positions).flatten(-2)
    return _highest(packed if before is None else torch.cat((before, packed), -1), k)


def _highest(packed: Tensor, k: int) -> Tensor:
    return packed.topk(min(k, packed.shape[-1]), -1).values


def _filled(packed: Tensor, k: int) -> Tensor:
    """Packed keys [..., at most k], filled up to k with ones that are none."""
    missing = torch.full((*packed.shape[:-1], k - packed.shape[-1]), -torch.inf)
    return torch.cat((packed, pack(missing, torch.tensor(0))), -1)


def _unpack(packed: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
    scores = score_of(packed)
    return scores, place_of(packed).masked_fill(scores.isneginf(), memory.begin)
