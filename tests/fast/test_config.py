"""What users may write, and the message each mistake gets."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_longctx.config import PRESETS, LongContextConfig, LongContextError, RequestOptions
from vllm_longctx.geometry import Geometry
from vllm_longctx.settings import Adaptation, Settings, for_model

TRAINED = 4096
KV_BLOCK = 32
NUM_LAYERS = 6


def geometry(value: object) -> Geometry:
    return Settings.of(for_model(LongContextConfig.parse(value), TRAINED, KV_BLOCK, NUM_LAYERS, {})).geometry


@pytest.mark.parametrize("value", [{}, {"preset": "lm-infinite"}, '{"attention": {"method": "lm_infinite"}}'])
def test_lm_infinite_takes_its_lengths_from_the_model(value: object) -> None:
    assert geometry(value) == Geometry(10, 4096, 4096, "relative")


def test_streaming_takes_its_lengths_from_the_model() -> None:
    assert geometry({"preset": "streaming"}) == Geometry(4, 4092, None, "in_cache")


def test_keys_override_the_preset() -> None:
    value = {"preset": "streaming", "attention": {"n_global": 8, "n_local": 100}}
    assert geometry(value) == Geometry(8, 100, None, "in_cache")


def test_a_filled_in_configuration_survives_the_way_to_another_process() -> None:
    for value in ({}, {"preset": "streaming"}, {"attention": {"n_local": 64, "n_global": 0}}):
        filled = LongContextConfig.parse(value).for_model(TRAINED, KV_BLOCK, NUM_LAYERS, {})
        assert Settings.of(LongContextConfig.parse(filled.dump())) == Settings.of(filled)


def test_method_none_changes_nothing() -> None:
    assert LongContextConfig.parse({"attention": {"method": "none"}}).mode.is_plain


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"atention": {}}, r"longctx: unknown key 'atention'; did you mean 'attention'\?"),
        (
            {"attention": {"n_globl": 1}},
            r"longctx.attention: unknown key 'n_globl'; did you mean 'n_global'\?",
        ),
        ({"attention": {"zzz": 1}}, r"longctx.attention: unknown key 'zzz'; known keys: method, n_global"),
        ({"preset": "lm-infinit"}, r"longctx: unknown preset 'lm-infinit'; presets: lm-infinite, streaming"),
        (
            {"attention": {"method": "magic"}},
            r"longctx.attention.method = 'magic': Input should be 'lm_infinite'",
        ),
        (
            {"attention": {"n_local": 0}},
            r"longctx.attention.n_local = 0: Input should be greater than or equal to 1",
        ),
        (
            {"attention": {"n_local": "4096"}},
            r"longctx.attention.n_local = '4096': Input should be a valid integer",
        ),
        ({"attention": {"n_global": -1}}, r"longctx.attention.n_global = -1: Input should be greater"),
        (
            {"attention": {"n_global": 9, "n_local": 8}},
            r"n_global = 9 is more than n_local = 8; lower n_global",
        ),
        (
            {"attention": {"method": "focused", "n_global": 4}},
            r"n_global has no effect with method focused; leave it out",
        ),
        (
            {"attention": {"mem_layers": [1]}},
            r"mem_layers has no effect with method lm_infinite; leave it out",
        ),
        ({"attention": {"method": "focused", "lookup": "top_k"}}, r"lookup = 'top_k' needs top_k; give both"),
        (
            {"attention": {"method": "focused", "top_k": 8}},
            r"top_k = 8 needs lookup top_k or blocks; give both",
        ),
        (
            {"attention": {"method": "focused", "top_k": 0}},
            r"longctx.attention.top_k = 0: Input should be greater",
        ),
        (
            {"attention": {"n_global": 10, "max_n_global": 5}},
            r"n_global = 10 is more than max_n_global = 5; lower n_global",
        ),
        ({"adaptation": {"rnk": 8}}, r"longctx.adaptation: unknown key 'rnk'; did you mean 'rank'\?"),
        ({"adaptation": {"rank": 0}}, r"longctx.adaptation.rank = 0: Input should be greater"),
        (
            {"adaptation": {"trainer": {"threads": "2"}}},
            r"longctx.adaptation.trainer.threads = '2': Input should be",
        ),
        (
            {"attention": {"method": "streaming", "distances": "relative"}},
            r"for relative distances use lm_infinite",
        ),
        (
            {"attention": {"method": "streaming", "distance_ceiling": 5}},
            r"distance_ceiling = 5 has no effect",
        ),
        (
            {"attention": {"method": "none", "n_local": 5}},
            r"method none takes no other keys, but n_local was given",
        ),
        ({"attention": 5}, r"longctx.attention = 5"),
        (
            {"serving": {"default_max_tokens": 0}},
            r"longctx.serving.default_max_tokens = 0: Input should be greater",
        ),
        (
            {"serving": {}, "attention": {"method": "none"}},
            r"longctx: serving has no effect with attention.method none",
        ),
        ([], r"longctx: expected a mapping such as \{'preset': 'lm-infinite'\}, got \[\]"),
        ("{", r"longctx: not valid JSON .* at character 1\): \{"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(value: object, message: str) -> None:
    with pytest.raises(LongContextError, match=message):
        LongContextConfig.parse(value)


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (
            {"n_local": 8192},
            r"attention.n_local = 8192, but the model was trained on 4096 tokens; lower it, or set",
        ),
        (
            {"distance_ceiling": 5000},
            r"attention.distance_ceiling = 5000, but the model was trained on 4096 tokens",
        ),
        (
            {"method": "streaming", "n_local": 4096},
            r"n_global \+ attention.n_local = 4100, but the model was trained",
        ),
        ({"n_global": 5000}, r"attention.n_global = 5000 is more than attention.n_local = 4096"),
    ],
)
def test_lengths_beyond_the_trained_length_need_an_explicit_override(attention: dict, message: str) -> None:
    with pytest.raises(LongContextError, match=message):
        geometry({"attention": attention})


@pytest.mark.parametrize(
    ("trained", "given", "caches_prefixes", "n_local"),
    [
        (4096, None, True, 4096),
        (4100, None, True, 4096),
        (4100, None, False, 4100),
        (4100, 500, False, 500),
        (20, None, True, 20),
    ],
)
def test_stepped_windows_are_whole_blocks_where_prefixes_are_cached(
    trained: int, given: int | None, caches_prefixes: bool, n_local: int
) -> None:
    attention = {"method": "focused", "mem_layers": [1]} | ({} if given is None else {"n_local": given})
    config = LongContextConfig.parse({"attention": attention}).for_model(
        trained, KV_BLOCK, NUM_LAYERS, {}, caches_prefixes
    )
    assert config.attention.n_local == n_local


def test_who_asks_for_a_memory_says_where() -> None:
    config = LongContextConfig.parse({"attention": {"method": "focused"}})
    with pytest.raises(LongContextError, match=r"needs memory layers, .*\[8, 16, 24\], or \[\] for windows"):
        config.for_model(TRAINED, KV_BLOCK, NUM_LAYERS, {})


@pytest.mark.parametrize(("given", "n_local"), [({}, 480), ({"n_local": 64}, 64)])
def test_a_checkpoint_says_what_it_was_trained_for(given: dict[str, int], n_local: int) -> None:
    checkpoint = {"mem_layers": [1], "mem_positionals": False, "last_context_length": 40, "n_local": 500}
    config = LongContextConfig.parse({"attention": {"method": "focused", **given}})
    filled = config.for_model(TRAINED, KV_BLOCK, NUM_LAYERS, checkpoint).attention
    assert (filled.n_local, filled.last_context_length) == (n_local, 40)
    assert filled.mem_layers == [1] and filled.mem_positionals is False
    with pytest.raises(LongContextError, match=r"attention.n_local = 'x': Input should be a valid integer"):
        config.for_model(TRAINED, KV_BLOCK, NUM_LAYERS, checkpoint | {"n_local": "x"})


@pytest.mark.parametrize(("n_local", "near"), [(500, "480 or 512"), (20, "32")])
def test_a_stepped_window_that_would_never_be_hit_is_refused(n_local: int, near: str) -> None:
    value = {"attention": {"method": "focused", "mem_layers": [1], "n_local": n_local}}
    with pytest.raises(
        LongContextError,
        match=rf"n_local = {n_local} is no multiple of block_size = 32, .*; give {near}, or turn",
    ):
        LongContextConfig.parse(value).for_model(TRAINED, KV_BLOCK, NUM_LAYERS, {})


def test_the_explicit_override() -> None:
    attention = {"n_local": 8192, "distance_ceiling": 6000, "allow_beyond_trained": True}
    assert geometry({"attention": attention}) == Geometry(10, 8192, 6000)


def adaptation(value: dict) -> Adaptation:
    return Settings.of(for_model(LongContextConfig.parse(value), TRAINED, KV_BLOCK, NUM_LAYERS, {})).temp_lora


def sizes(trained: int, adaptation: dict[str, Any], room: int | None = None, **value: Any) -> Adaptation:
    config = LongContextConfig.parse({"preset": "temp-lora-quality", **value, "adaptation": adaptation})
    return Settings.of(for_model(config, trained, KV_BLOCK, NUM_LAYERS, {}, room=room)).temp_lora


SIZES = ("window_tokens", "plain_tokens", "block_tokens", "context_tokens", "train_context_tokens")


@pytest.mark.parametrize(
    ("preset", "trained", "expected"),
    [
        ("temp-lora-quality", 128, (128, 128, 32, 64, 32)),
        ("temp-lora-quality", 512, (512, 512, 128, 256, 128)),
        ("temp-lora-economic", 512, (512, 512, 256, 224, 255)),
        ("temp-lora-quality", 4095, (4095, 4095, 1023, 2047, 1023)),
        ("temp-lora-quality", 4100, (4100, 4100, 1024, 2050, 1024)),
        ("temp-lora-quality", 24576, (24576, 24576, 1024, 12288, 1024)),
        ("temp-lora-quality", 24577, (24576, 24577, 1024, 12288, 1024)),
        ("temp-lora-quality", 131072, (24576, 131072, 1024, 12288, 1024)),
        ("temp-lora-economic", 4096, (4096, 4096, 2048, 2016, 2047)),
        ("temp-lora-economic", 4097, (4096, 4097, 2048, 2016, 2048)),
        ("temp-lora-economic", 131072, (4096, 131072, 2048, 2016, 2048)),
    ],
)
def test_default_sizes_are_the_papers_whatever_more_a_model_was_trained_on(
    preset: str, trained: int, expected: tuple[int, ...]
) -> None:
    found = sizes(trained, {}, preset=preset)
    assert tuple(getattr(found, name) for name in SIZES) == expected


@given(
    preset=st.sampled_from([*PRESETS, None]),
    adapts=st.booleans(),
    trained=st.integers(64, 10_000_000),
    room=st.none() | st.integers(64, 10_000_000),
)
def test_every_default_goes_with_every_trained_length(
    preset: str | None, adapts: bool, trained: int, room: int | None
) -> None:
    value = ({} if preset is None else {"preset": preset}) | ({"adaptation": {}} if adapts else {})
    config = LongContextConfig.parse(value)
    room = None if room is None else max(room, min(trained, 1024))  # as `startup.pool` gives it
    filled = for_model(config, trained, KV_BLOCK, NUM_LAYERS, {}, room=room)
    windows = [filled.attention.n_local]
    if (a := filled.adaptation) is not None:
        assert a.block_tokens is not None and a.block_tokens <= 2048
        assert a.train_context_tokens is not None and a.train_context_tokens + a.block_tokens < trained
        windows += [a.window_tokens, a.plain_tokens if filled.attention.method == "none" else None]
    assert all(window <= min(trained, room or trained) for window in windows if window is not None)


def test_a_default_window_has_room_for_the_users_own_sizes() -> None:
    assert sizes(131072, {"block_tokens": 8192}).window_tokens == 32768
    assert sizes(131072, {"context_tokens": 20000}).window_tokens == 40000
    assert sizes(32768, {"context_tokens": 20000}).window_tokens == 32768
    assert sizes(131072, {"block_tokens": 3000}, preset="temp-lora-economic").window_tokens == 6000


def test_default_windows_are_those_that_the_kv_cache_holds() -> None:
    room = 10_000
    found = sizes(131072, {}, room)
    assert [getattr(found, name) for name in SIZES] == [10_000, 10_000, 1024, 5000, 1024]
    config = LongContextConfig.parse({}).for_model(131072, KV_BLOCK, NUM_LAYERS, {}, room=room)
    assert Settings.of(config).geometry == Geometry(10, 10_000, 131072)
    for own in (9_000, 20_000):
        config = LongContextConfig.parse({"attention": {"n_local": own}})
        assert config.for_model(131072, KV_BLOCK, NUM_LAYERS, {}, room=room).attention.n_local == own
        assert sizes(131072, {"window_tokens": own, "plain_tokens": own}, room).plain_tokens == own
        assert sizes(131072, {"window_tokens": own}, room).window_tokens == own


def test_temp_lora_takes_its_sizes_from_the_window() -> None:
    quality, economic = (
        adaptation({"preset": "temp-lora-quality"}),
        adaptation({"preset": "temp-lora-economic"}),
    )
    assert (quality.block_tokens, quality.context_tokens, quality.window_tokens, quality.kv_policy) == (
        1024,
        2048,
        4096,
        "reuse",
    )
    assert (economic.block_tokens, economic.context_tokens, economic.window_tokens) == (2048, 2016, 4096)
    assert (quality.rank, quality.learning_rate, quality.warmup_blocks, quality.epochs) == (64, 5e-5, 2, 2)
    sliding = adaptation({"attention": {"n_local": 512}, "adaptation": {}})
    assert (sliding.kv_policy, sliding.block_tokens, sliding.train_context_tokens) == ("keep", 128, 128)


@pytest.mark.parametrize(
    ("attention", "section", "message"),
    [
        (
            "none",
            {"window_tokens": 8192},
            r"adaptation.window_tokens = 8192, but the model was trained on 4096 tokens; lower it",
        ),
        (
            "none",
            {"plain_tokens": 4097},
            r"adaptation.plain_tokens = 4097, but the model was trained on 4096 tokens; lower it",
        ),
        (
            "lm_infinite",
            {"plain_tokens": 64},
            r"plain_tokens has no effect beside attention.method lm_infinite",
        ),
        (
            "none",
            {"window_tokens": 1000, "context_tokens": 968},
            r"in adaptation.window_tokens = 1000: .*; give at most 967, or raise window_tokens",
        ),
        (
            "none",
            {"window_tokens": 33},
            r"window_tokens = 33: .*; give a smaller block_size or keep_first, or raise window_tokens",
        ),
        (
            "none",
            {"context_tokens": 4090},
            r"context_tokens = 4090 leaves no room in adaptation.window_tokens = 4096",
        ),
        (
            "none",
            {"kv_policy": "keep"},
            r"kv_policy = 'keep', but attention.method none takes reuse or recompute",
        ),
        (
            "lm_infinite",
            {"kv_policy": "reuse"},
            r"Λ attention \(attention.method lm_infinite or streaming\) goes with keep",
        ),
        (
            "lm_infinite",
            {"context_tokens": 64},
            r"context_tokens has no effect beside attention.method lm_infinite",
        ),
        (
            "none",
            {"block_tokens": 4096},
            r"train_context_tokens \+ adaptation.block_tokens \+ 1 = 4097, but",
        ),
        (
            "none",
            {"rank": 64, "max_rank": 8},
            r"adaptation.rank = 64 is above adaptation.max_rank = 8; raise max_rank",
        ),
        (
            "none",
            {"keep_first": 40},
            r"adaptation.keep_first = 40 is more than a KV block of 32 tokens; lower it",
        ),
    ],
)
def test_sizes_that_do_not_go_together_are_named(attention: str, section: dict, message: str) -> None:
    with pytest.raises(LongContextError, match=message):
        adaptation({"attention": {"method": attention}, "adaptation": section})


def test_requests_adapt_when_they_ask_or_when_all_do() -> None:
    asks, silent, declines = RequestOptions(temp_lora=True), RequestOptions(), RequestOptions(temp_lora=False)
    opt_in, everyone = (
        adaptation({"preset": "temp-lora-quality", "adaptation": {"requests": r}}) for r in ("opt_in", "all")
    )
    adapting = [
        s.for_request(o, TRAINED, KV_BLOCK) is not None
        for s in (opt_in, everyone)
        for o in (asks, silent, declines)
    ]
    assert adapting == [True, False, False, True, True, False]
    with pytest.raises(
        LongContextError, match="rank has no effect without temp_lora; set temp_lora true, or leave it out"
    ):
        opt_in.for_request(RequestOptions(rank=8), TRAINED, KV_BLOCK)


@pytest.mark.parametrize(
    ("options", "sizes_of_request"),
    [
        ({"block_tokens": 1024}, (1024, 1024)),
        ({"block_tokens": 16}, (16, 1024)),
        ({"block_tokens": 1500}, (1500, 548)),
        ({"block_tokens": 2048}, (2048, 0)),
        ({"block_tokens": 1025, "train_context_tokens": 1023}, (1025, 1023)),
        ({"train_context_tokens": 1025}, 2049),
        ({"block_tokens": 2049}, 2049),
        ({"block_tokens": 100_000}, 100_000),
    ],
)
def test_a_request_trains_on_no_more_at_once_than_memory_was_counted_for(
    options: dict[str, int], sizes_of_request: tuple[int, int] | int
) -> None:
    server, asked = sizes(131072, {}), RequestOptions(temp_lora=True, **options)
    if isinstance(sizes_of_request, tuple):
        own = server.for_request(asked, 131072, KV_BLOCK)
        assert own is not None
        assert (own.block_tokens, own.train_context_tokens) == sizes_of_request
    else:
        message = (
            f"block_tokens \\+ train_context_tokens = {sizes_of_request} .*; give at most 2048 .adaptation"
        )
        with pytest.raises(LongContextError, match=message):
            server.for_request(asked, 131072, KV_BLOCK)


def test_a_request_may_always_train_on_a_little() -> None:
    server = sizes(TRAINED, {"block_tokens": 32, "train_context_tokens": 0})
    own = server.for_request(RequestOptions(temp_lora=True, block_tokens=512), TRAINED, KV_BLOCK)
    assert own is not None and own.block_tokens == 512
    with pytest.raises(LongContextError, match=r"train_context_tokens = 513 .*; give at most 512"):
        server.for_request(RequestOptions(temp_lora=True, block_tokens=513), TRAINED, KV_BLOCK)


def test_what_is_learned_has_two_names() -> None:
    def learn(of_server: dict[str, Any], **asked: Any) -> str:
        server = adaptation({"preset": "temp-lora-quality", "adaptation": of_server})
        own = server.for_request(RequestOptions(temp_lora=True, **asked), TRAINED, KV_BLOCK)
        assert own is not None
        return own.learn

    assert [learn({}), learn({"train_on_prompt": False}), learn({"learn": "none"})] == [
        "all",
        "output",
        "none",
    ]
    assert learn({"learn": "prompt"}, train_on_prompt=True) == "all"
    assert learn({"learn": "prompt"}, train_on_prompt=False) == "output"
    assert learn({}, learn="prompt") == "prompt"
    with pytest.raises(LongContextError, match="train_on_prompt = false contradicts learn = 'prompt'; leave"):
        learn({}, learn="prompt", train_on_prompt=False)
    with pytest.raises(LongContextError, match=r"adaptation.train_on_prompt = false contradicts adaptation"):
        learn({"learn": "all", "train_on_prompt": False})
