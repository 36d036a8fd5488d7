"""Token ids of a chat's messages, kept from turn to turn: a chat client sends its whole history with each.

Where a text may be cut and still has the same ids is the tokenizer's affair. It is so before tokens that are
looked for before anything else is done to the text: in chat templates, the ones that begin and end a message.
Every text is cut before each of them, and the ids of each piece are kept. Tokenizers without such tokens, or
that do otherwise than transformers' fast ones, see the whole text, as in stock vLLM.
"""

import functools
import re
from array import array
from collections import OrderedDict
from itertools import pairwise
from threading import Lock
from typing import Any

from transformers import TokenizersBackend
from transformers.tokenization_utils_base import AddedToken, PreTrainedTokenizerBase
from vllm.inputs import TextPrompt, TokensPrompt
from vllm.renderers.base import BaseRenderer
from vllm.renderers.params import TokenizeParams

from vllm_longctx.config import KEY
from vllm_longctx.settings import active_settings, plugin_configs

LIMIT_BYTES = 64 << 20  # of pieces and their ids, in one server: some millions of tokens
ENTRY_BYTES = 300  # of Python's objects for a piece


def keep_ids() -> None:
    """Keep the ids of what every longctx engine of this process is asked, in its front end."""
    tokenize_prompt = BaseRenderer._tokenize_prompt
    if hasattr(tokenize_prompt, "__wrapped__"):
        return

    @functools.wraps(tokenize_prompt)
    def tokenize(self: BaseRenderer, prompt: TextPrompt, params: TokenizeParams) -> TokensPrompt:
        if (cache := cache_of(self)) is not None and not params.return_token_offsets:
            options = params.get_encode_kwargs()
            ids = cache.ids(self.get_tokenizer(), prompt["prompt"], options.pop("add_special_tokens"))
            most = options.pop("max_length", None) if options.pop("truncation") else None
            if ids is not None and not options and (most is None or len(ids) <= most):
                return TokensPrompt(prompt_token_ids=ids, **prompt)  # type: ignore[typeddict-item]  # as vLLM does
        return tokenize_prompt(self, prompt, params)

    BaseRenderer._tokenize_prompt = tokenize  # type: ignore[method-assign, assignment]  # a seam


def cache_of(renderer: Any) -> "TokenCache | None":
    """That of a renderer, made the first time; None of an engine without longctx."""
    if not hasattr(renderer, "longctx_token_cache"):
        config = renderer.config
        serves = KEY in plugin_configs(config) and not active_settings(config).mode.is_plain
        renderer.longctx_token_cache = TokenCache(renderer.get_tokenizer()) if serves else None
    return renderer.longctx_token_cache


class TokenCache:
    """Ids of pieces of texts; the ones that were asked for least recently go first. For any threads.

    limit_bytes: of all that is kept.
    """

    def __init__(self, tokenizer: Any, limit_bytes: int = LIMIT_BYTES) -> None:
        self.limit_bytes, self.held_bytes = limit_bytes, 0
        self._kept: OrderedDict[str, array[int]] = OrderedDict()
        self._lock = Lock()
        cuts = safe_cuts(tokenizer)
        self._cut = re.compile("|".join(map(re.escape, cuts))) if cuts else None
        self._adds = bool(cuts) and tokenizer.num_special_tokens_to_add() > 0

    def ids(self, tokenizer: Any, text: str, add_special_tokens: bool) -> list[int] | None:
        """As `tokenizer(text, add_special_tokens=…)` gives them; None where it has to be asked itself."""
        if self._cut is None or (add_special_tokens and self._adds):
            return None
        starts = [match.start() for match in self._cut.finditer(text)]
        pieces = [text[a:b] for a, b in pairwise([0, *starts, len(text)]) if a < b]
        if len(pieces) < 2:
            return None
        found = self._take(pieces)
        if missing := list(dict.fromkeys(p for p, ids in zip(pieces, found, strict=True) if ids is None)):
            given = tokenizer(missing, add_special_tokens=False)["input_ids"]
            new = {piece: array("i", ids) for piece, ids in zip(missing, given, strict=True)}
            self._keep(new)
            found = [new[p] if ids is None else ids for p, ids in zip(pieces, found, strict=True)]
        result: list[int] = []
        for ids in found:
            assert ids is not None
            result += ids
        return result

    def _take(self, pieces: list[str]) -> "list[array[int] | None]":
        with self._lock:
            for piece in pieces:
                if piece in self._kept:
                    self._kept.move_to_end(piece)
            return [self._kept.get(piece) for piece in pieces]

    def _keep(self, new: "dict[str, array[int]]") -> None:
        with self._lock:
            for piece, ids in new.items():
                if piece not in self._kept:
                    self._kept[piece] = ids
                    self.held_bytes += _bytes(piece, ids)
            while self.held_bytes > self.limit_bytes:
                self.held_bytes -= _bytes(*self._kept.popitem(last=False))


def _bytes(piece: str, ids: "array[int]") -> int:
    return ENTRY_BYTES + 4 * len(piece) + ids.itemsize * len(ids)  # four at most for a character


def safe_cuts(tokenizer: Any) -> list[str]:
    """Tokens before which a text may be cut; none for a tokenizer of which that is not known.

    The Rust library finds added tokens, of those that are not normalized the leftmost and longest, before it
    normalizes what is between them, piece by piece. So a cut is safe before a token that is always found:
    no other added token may reach across its beginning, and it must not depend on what stands before it.
    """
    own = [c for c in type(tokenizer).__mro__ if c.__module__ != "vllm.tokenizers.hf"]
    stock = (TokenizersBackend, PreTrainedTokenizerBase)
    tokenizes_itself = any({"__call__", "_encode_plus"} & vars(c).keys() for c in own if c not in stock)
    if not isinstance(tokenizer, TokenizersBackend) or tokenizes_itself or tokenizer.split_special_tokens:
        return []
    tokens = list(tokenizer.added_tokens_decoder.values())
    return [t.content for t in tokens if _always_found(t) and not any(_reaches_into(o, t) for o in tokens)]


def _always_found(token: AddedToken) -> bool:
    content = token.content
    return not (token.normalized or token.single_word or token.lstrip) and content.strip() == content != ""


def _reaches_into(other: AddedToken, token: AddedToken) -> bool:
    """Whether a text may have the other one stand across the beginning of the token."""
    parts = (other.content[k:] for k in range(1, len(other.content)))
    return any(token.content.startswith(part) or part.startswith(token.content) for part in parts)
