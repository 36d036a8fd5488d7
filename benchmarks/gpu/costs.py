"""What kernels must move and compute, by arithmetic: how fast could they be on a card at best?

Bytes are those that cross the card's memory once, with what a kernel writes for the next one. Operations are
those of the tensor cores, with the rows that pad a tile. What else takes time (launches, a last wave of
programs that does not fill the card, exponentials) is left out, so a kernel never gets there.
"""

from dataclasses import dataclass

from gpu.models import BLOCK_SIZE, ITEM_BYTES, N_GLOBAL, Shape

# bfloat16 without sparsity, of an H100 SXM and of an H200; NVIDIA's data sheets.
OPERATIONS_PER_S = 989.4e12
TILE_ROWS, TILE_KEYS = 128, 64  # of a prompt's chunk; (query, head) pairs and keys
DECODE_ROWS = 16
PACKED_BYTES = 8  # of a score with its place


@dataclass(frozen=True)
class Cost:
    moved_bytes: int
    operations: int

    def seconds(self, bytes_per_s: float) -> float:
        """At best. bytes_per_s: of a copy in the card's memory."""
        return max(self.moved_bytes / bytes_per_s, self.operations / OPERATIONS_PER_S)

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.moved_bytes + other.moved_bytes, self.operations + other.operations)


def _queries_and_outputs(shape: Shape, tokens: int) -> int:
    return 2 * tokens * shape.heads * shape.head_size * ITEM_BYTES


def decode(shape: Shape, batch: int, seen: int, splits: int) -> Cost:
    """Of a layer's decode of `batch` requests that see `seen` keys each."""
    keys = batch * (seen * shape.layer_kv_bytes + -(-seen // BLOCK_SIZE) * shape.kv_heads * 4)
    shares = 2 * batch * shape.heads * splits * (shape.head_size + 1) * 4 if splits > 1 else 0
    rows = max(DECODE_ROWS, shape.heads // shape.kv_heads)
    operations = 4 * batch * shape.kv_heads * rows * shape.head_size * seen
    return Cost(keys + shares + _queries_and_outputs(shape, batch), operations)


def prefill(shape: Shape, length: int, queries: int) -> Cost:
    """Of a layer's Λ attention for a text's last queries."""
    group = shape.heads // shape.kv_heads
    per_tile, first = max(TILE_ROWS // group, 1), length - queries
    keys = 0
    for begin in range(first, length, per_tile):
        end = min(begin + per_tile, length)
        start = max(begin - shape.trained + 1, 0)
        keys += -(-(end - start) // TILE_KEYS) * TILE_KEYS + (DECODE_ROWS if start else 0)
    operations = 4 * shape.kv_heads * TILE_ROWS * shape.head_size * keys
    seen = length - max(first - shape.trained + 1, 0) + N_GLOBAL
    return Cost(seen * shape.layer_kv_bytes + _queries_and_outputs(shape, queries), operations)


def lookup(shape: Shape, length: int, k: int, blocks: int | None) -> Cost:
    """Of the best k keys of one query's heads among `length`, and of the attention to them.

    blocks: that each KV head reads after a look at the summaries; None for the exact best, by all keys.
    """
    columns, head = -(-length // BLOCK_SIZE), shape.head_size
    element = ITEM_BYTES if blocks is None else 1  # of a key, or of its summary
    scored = length * shape.kv_heads * head * element
    packed = 2 * shape.heads * columns * PACKED_BYTES
    sets, read = (shape.heads, k) if blocks is None else (shape.kv_heads, blocks)
    singly = min(read, columns) * BLOCK_SIZE
    keys = sets * singly * head * ITEM_BYTES + 2 * shape.heads * singly * PACKED_BYTES
    values = shape.heads * k * head * ITEM_BYTES
    rows = max(DECODE_ROWS, shape.heads // shape.kv_heads)
    operations = 2 * shape.kv_heads * rows * head * length
    return Cost(scored + packed + keys + values + _queries_and_outputs(shape, 1), operations)
