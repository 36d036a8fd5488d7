"""Requests that have chosen what their queries see, and the hashes of their KV blocks in vLLM's prefix cache.

What queries see decides the keys of all layers behind the first. So the hash of a block has what was chosen
as an extra key. Requests share the blocks of those that have chosen the same, and no others.
"""

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

from vllm.v1.core.kv_cache_utils import BlockHash, generate_block_hash_extra_keys, hash_block_tokens
from vllm.v1.request import Request

from vllm_longctx.geometry import RequestView


class ViewHashes(list[BlockHash]):
    """The hashes of a request. vLLM looks them up without the request, so they say what it needs.

    n_global: First tokens that a hit must have beside its window; None: all.
    """

    def __init__(self, view: RequestView):
        super().__init__()
        self.n_global = view.n_global


def view_hasher(
    view: RequestView, hash_function: Callable[[Any], bytes], block_tokens: int
) -> Callable[[Request], list[BlockHash]]:
    """Hashes the blocks of a request of text that are full and have no hash yet, as vLLM's hasher does."""

    def hashes(request: Request) -> list[BlockHash]:
        known, new = request.block_hashes, []
        parent = known[-1] if known else None
        for begin in range(len(known) * block_tokens, request.num_tokens - block_tokens + 1, block_tokens):
            end = begin + block_tokens
            keys, _ = generate_block_hash_extra_keys(request, begin, end, 0)
            # Tokens of the next block may decide whether a turn begins in this one.
            turns = view.turns[bisect_left(view.turns, begin) : bisect_left(view.turns, end)]
            chosen = ("view", view.n_global, turns)
            tokens = request.all_token_ids[begin:end]
            parent = hash_block_tokens(hash_function, parent, tokens, (*(keys or ()), chosen))
            new.append(parent)
        return new

    return hashes
