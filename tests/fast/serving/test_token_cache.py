"""Ids of a chat that are kept from turn to turn are the tokenizer's own."""

import asyncio
import inspect
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast
from vllm.engine.arg_utils import EngineArgs
from vllm.renderers.base import BaseRenderer
from vllm.renderers.params import ChatParams, TokenizeParams
from vllm.renderers.registry import renderer_from_config
from vllm.tokenizers.hf import get_cached_tokenizer, maybe_make_thread_pool

from vllm_longctx.cli.engine import load_plugin
from vllm_longctx.serving import token_cache
from vllm_longctx.serving.token_cache import TokenCache, keep_ids, safe_cuts

TEXT = "the quick brown fox jumps over the lazy dog and the other quick foxes, in 1999; It's  user assistant"
MESSAGE = ("<|im_start|>", "<|im_end|>")
OTHERS = [
    AddedToken("<stripped>", special=True, lstrip=True, rstrip=True),
    AddedToken("fox", special=False, normalized=True),
    AddedToken("dog", special=False, normalized=False, single_word=True),
]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return trained(
        tokenizer, trainers.BpeTrainer(vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    )


def prepending() -> Tokenizer:
    """Llama 2's: all of a text between added tokens is one word."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return trained(tokenizer, trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>"]))


def metaspace() -> Tokenizer:
    """Puts a space before the first word of a text, and before no other."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return trained(
        tokenizer, trainers.UnigramTrainer(vocab_size=80, special_tokens=["<unk>"], unk_token="<unk>")
    )


def words() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return trained(tokenizer, trainers.WordPieceTrainer(vocab_size=120, special_tokens=["<unk>"]))


def trained(tokenizer: Tokenizer, trainer: Any) -> Tokenizer:
    tokenizer.train_from_iterator([TEXT] * 20, trainer)
    return tokenizer


def of_transformers(tokenizer: Tokenizer, **options: Any) -> Any:
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)
    wrapped.add_tokens([AddedToken(token, special=True) for token in MESSAGE], special_tokens=True)
    wrapped.add_tokens(OTHERS)
    return wrapped


TOKENIZERS = {make.__name__: of_transformers(make()) for make in (byte_level, prepending, metaspace, words)}
PIECES = [
    *MESSAGE,
    *(token.content for token in OTHERS),
    "<|im_",
    "end|>",
    "▁",
    "é",
    "  ",
    "\n",
    "It's",
    "fo",
    "x",
]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text("the dogx1 \n<|é\u0301", max_size=12), max_size=30).map(
    "".join
)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=40, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=4))
def test_ids_are_those_of_the_whole_text(name: str, texts: list[str]) -> None:
    """Of chats that grow, whatever stands in a message."""
    tokenizer = TOKENIZERS[name]
    cache = TokenCache(tokenizer, limit_bytes=5000)
    assert set(safe_cuts(tokenizer)) >= set(MESSAGE)
    chat = ""
    for text in texts:
        chat += text
        ids = cache.ids(tokenizer, chat, add_special_tokens=False)
        assert ids in (None, tokenizer(chat, add_special_tokens=False)["input_ids"])
        assert cache.held_bytes <= 5000


class Counting:
    """A tokenizer that takes down what it is asked for."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.asked = tokenizer, list[str]()

    def __call__(self, text: Any, **options: Any) -> Any:
        self.asked += [text] if isinstance(text, str) else text
        return self.tokenizer(text, **options)


def turns(count: int) -> list[str]:
    return [f"<|im_start|>user\nquestion {k}<|im_end|>\n<|im_start|>assistant\n" for k in range(count)]


def test_only_what_is_new_is_tokenized_and_little_is_kept() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    counting, cache = Counting(tokenizer), TokenCache(tokenizer, limit_bytes=20_000)
    chat, most = "", 0
    for turn in turns(100):
        counting.asked.clear()
        chat += turn
        assert cache.ids(counting, chat, False) == tokenizer(chat, add_special_tokens=False)["input_ids"]
        most = max(most, cache.held_bytes)
        if cache.held_bytes < 15_000:
            assert sum(map(len, counting.asked)) <= len(turn) + len("<|im_start|>assistant\n<|im_end|>\n")
    assert 15_000 < most <= 20_000


def test_threads_share_it() -> None:
    tokenizer = maybe_make_thread_pool(get_cached_tokenizer(of_transformers(byte_level())), 3)
    cache = TokenCache(tokenizer, limit_bytes=3000)
    chats = ["".join(turns(30)[k : k + 12]) for k in range(12)] * 4
    wanted = [tokenizer(chat, add_special_tokens=False)["input_ids"] for chat in chats]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda chat: cache.ids(tokenizer, chat, False), chats)) == wanted
    assert cache.held_bytes <= 3000


def test_the_plain_way_where_a_cut_may_not_be_safe() -> None:
    class Own(PreTrainedTokenizerFast):
        def _encode_plus(self, *args: Any, **options: Any) -> Any:
            return super()._encode_plus(*args, **options)

    assert safe_cuts(Own(tokenizer_object=byte_level(), eos_token="</s>")) == []
    assert safe_cuts(Counting(TOKENIZERS["words"])) == []
    assert safe_cuts(of_transformers(byte_level(), split_special_tokens=True)) == []
    reaching = of_transformers(byte_level())
    reaching.add_tokens([AddedToken("y<|im", special=True)], special_tokens=True)
    assert safe_cuts(reaching) == ["y<|im"]  # it may hide the beginning of both others
    adding = byte_level()
    adding.add_special_tokens(["<s>"])
    adding.post_processor = processors.TemplateProcessing(
        "<s> $A", None, [("<s>", adding.token_to_id("<s>"))]
    )
    tokenizer = of_transformers(adding)
    cache, chat = TokenCache(tokenizer), "".join(turns(2))
    assert cache.ids(tokenizer, chat, True) is None
    assert cache.ids(tokenizer, chat, False) == tokenizer(chat, add_special_tokens=False)["input_ids"]
    assert cache.ids(tokenizer, "no message", False) is None


class Renderer(BaseRenderer[Any]):
    """vLLM's, without all that needs an engine."""

    def __init__(self, config: Any, tokenizer: Any) -> None:
        self.config, self.tokenizer = config, tokenizer

    def render_messages(self, *args: Any) -> Any: ...


@pytest.mark.parametrize("longctx", [True, False])
def test_renderers_of_longctx_engines_use_it(longctx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And truncate, refuse and report offsets as vLLM does."""
    monkeypatch.setattr(BaseRenderer, "_tokenize_prompt", inspect.unwrap(BaseRenderer._tokenize_prompt))
    active = SimpleNamespace(mode=SimpleNamespace(is_plain=False))
    monkeypatch.setattr(token_cache, "active_settings", lambda config: active)
    monkeypatch.setattr(token_cache, "plugin_configs", lambda config: {"longctx": {}} if longctx else {})
    stock = BaseRenderer._tokenize_prompt
    keep_ids()
    keep_ids()
    tokenizer = get_cached_tokenizer(of_transformers(byte_level()))
    renderer, chat = Renderer(SimpleNamespace(), tokenizer), "".join(turns(6))
    for options in ({}, {"truncate_prompt_tokens": 20}, {"return_token_offsets": True}):
        params = TokenizeParams(max_total_tokens=500, add_special_tokens=False, **options)
        given = renderer._tokenize_prompt({"prompt": chat}, params)
        assert given == stock(renderer, {"prompt": chat}, params) and given["prompt"] == chat
    held = getattr(renderer.longctx_token_cache, "held_bytes", None)
    assert (held or 0) > 1000 if longctx else held is None


def test_a_server_renders_smollm2s_chats_as_stock_vllm_does(smollm2: Path) -> None:
    def rendered(config: dict[str, Any]) -> tuple[list[list[int]], Any]:
        vllm_config = EngineArgs(model=str(smollm2), additional_config=config).create_engine_config()
        renderer = renderer_from_config(vllm_config)
        # As the server asks for it (`preprocess_chat`).
        params = ChatParams(chat_template_kwargs={"add_generation_prompt": True, "tokenize": False})
        history: list[Any] = []
        ids = []
        for turn in range(6):
            history.append({"role": "user", "content": f" Question {turn}? <|im_end|> It's 12.\n"})
            _, (prompt,) = asyncio.run(renderer.render_chat_async([history], params))
            ids.append(prompt["prompt_token_ids"])
            history.append({"role": "assistant", "content": f"Answer {turn}.  "})
        return ids, getattr(renderer, "longctx_token_cache", None)

    load_plugin()
    ours, cache = rendered({"longctx": {"preset": "lm-infinite"}})
    stock, no_cache = rendered({})
    assert ours == stock and len(ours[-1]) > 100
    assert cache.held_bytes > 0 and no_cache is None
