"""A pass of a request that adapts, and the names of its KV blocks: their hashes in vLLM's prefix cache.

KV depends on the tokens of its pass, on where the pass begins, and on the versions that computed them. So the
hash of a block has, beside the hash of the block before and its tokens, the addresses of these versions as
extra keys. Requests share the blocks for which all of this is equal, and no others.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.core.kv_cache_utils import BlockHash, hash_block_tokens

from vllm_longctx.engine.stepped_kv import first_entry
from vllm_longctx.temp_lora.blocks import Blocks, PassStart

NO_HASH = BlockHash(b"")


@dataclass(frozen=True)
class KVHasher:
    """hash_function: vLLM's, of a prefix cache. block_tokens: Of a KV block."""

    hash_function: Callable[[Any], bytes]
    block_tokens: int


@dataclass
class RequestPass:
    """The pass in which a request's window is computed.

    begun: Where it begins, and the version that computes it until a later one is needed.
    first: The first position that it computes. The kept first tokens stand from here to its window's start.
    blocks: Where text blocks lie. None if all is computed with the version of `begun`.
    hasher: None if its KV blocks have no names.
    names: Of its KV blocks, from the first that it computes on, as far as they are known.
    sends_table: Whether the workers still have another block table.
    """

    begun: PassStart
    first: int
    blocks: Blocks | None = None
    hasher: KVHasher | None = None
    names: list[BlockHash] = field(default_factory=list)
    sends_table: bool = False

    @property
    def start(self) -> int:
        """Of its window."""
        return self.begun.start

    @property
    def hashes(self) -> list[BlockHash]:
        """As vLLM counts KV blocks: from the text's first one on. Those before the pass are null blocks."""
        return [NO_HASH] * self.table_index(0) + self.names

    def table_index(self, kv_block: int) -> int:
        """Where the block table has a KV block of the pass."""
        return 0 if self.hasher is None else self.first // self.hasher.block_tokens + kv_block

    def forget_names(self) -> None:
        """It is not what text and versions make of it any more."""
        self.names.clear()
        self.hasher = None

    def end_of(self, kv_block: int) -> int:
        """The position behind a KV block of the pass, from 0 on."""
        assert self.hasher is not None
        size = self.hasher.block_tokens
        return first_entry(self.first, size) + (kv_block + 1) * size

    def extend(self, text: Sequence[int], chain: Sequence[bytes], limit: int) -> None:
        """Name more KV blocks: all that are full of known tokens, computed by versions that have an address.

        text: All token ids of the request, as far as they are known.
        chain: The addresses of its versions.
        limit: The position up to which to name them.
        """
        if self.hasher is None or not chain:
            return
        first, start, limit = self.first, self.begun.start, min(limit, len(text))
        while (end := self.end_of(len(self.names))) <= limit:
            begin = max(end - self.hasher.block_tokens, first)
            runs = list(self._versions(begin, end))
            if runs[-1][1] >= len(chain):
                return
            kept = text[begin - first : start - first] if begin < start else []
            tokens = [*kept, *text[max(begin, start) : end]]
            # The first of them says where the pass begins, too.
            keys = tuple(("version", at, chain[version]) for at, version in runs)
            parent = self.names[-1] if self.names else None
            self.names.append(hash_block_tokens(self.hasher.hash_function, parent, tokens, keys))

    def _versions(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """The versions that compute these positions, each with the first of them."""
        at, before = begin, -1
        while at < end:
            version = self.begun.version
            if self.blocks is not None:
                version = max(version, self.blocks.version_of(at))
            if version != before:
                yield at, version
            before, at = version, end if self.blocks is None else self.blocks.end_of_block(at)
