"""What users may write, and the message each mistake gets."""

import pytest

from vllm_longctx.config import LongContextConfig, LongContextError
from vllm_longctx.geometry import Geometry

TRAINED = 4096


def geometry(value: object) -> Geometry:
    return LongContextConfig.parse(value).for_model(TRAINED).geometry


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
        filled = LongContextConfig.parse(value).for_model(TRAINED)
        assert LongContextConfig.parse(filled.dump()).geometry == filled.geometry


def test_method_none_changes_nothing() -> None:
    assert not LongContextConfig.parse({"attention": {"method": "none"}}).changes_attention


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"atention": {}}, r"longctx: unknown key 'atention'; did you mean 'attention'\?"),
        ({"attention": {"n_globl": 1}}, r"longctx.attention: unknown key 'n_globl'; did you mean 'n_global'\?"),
        ({"attention": {"zzz": 1}}, r"longctx.attention: unknown key 'zzz'; known keys: method, n_global"),
        ({"preset": "lm-infinit"}, r"longctx: unknown preset 'lm-infinit'; presets: lm-infinite, streaming"),
        ({"attention": {"method": "magic"}}, r"longctx.attention.method = 'magic': Input should be 'lm_infinite'"),
        ({"attention": {"n_local": 0}}, r"longctx.attention.n_local = 0: Input should be greater than or equal to 1"),
        ({"attention": {"n_local": "4096"}}, r"longctx.attention.n_local = '4096': Input should be a valid integer"),
        ({"attention": {"n_global": -1}}, r"longctx.attention.n_global = -1: Input should be greater"),
        ({"attention": {"n_global": 9, "n_local": 8}}, r"n_global = 9 is more than n_local = 8; lower n_global"),
        ({"attention": {"method": "focused"}}, r"longctx.attention: Focused Transformer .* is not built yet"),
        ({"attention": {"top_k": 5}}, r"longctx.attention: top_k = 5: the top-k branch .* is not built yet"),
        ({"adaptation": {"method": "temp_lora"}}, r"longctx: Temp-LoRA \(adaptation\) is not built yet"),
        ({"attention": {"method": "streaming", "distances": "relative"}}, r"for relative distances use lm_infinite"),
        ({"attention": {"method": "streaming", "distance_ceiling": 5}}, r"distance_ceiling = 5 has no effect"),
        ({"attention": {"method": "none", "n_local": 5}}, r"method none takes no other keys, but n_local was given"),
        ({"attention": 5}, r"longctx.attention = 5"),
        ({"serving": {"default_max_tokens": 0}}, r"longctx.serving.default_max_tokens = 0: Input should be greater"),
        ({"serving": {}, "attention": {"method": "none"}}, r"longctx: serving has no effect with attention.method none"),
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
        ({"n_local": 8192}, r"attention.n_local = 8192, but the model was trained on 4096 tokens; lower it, or set"),
        ({"distance_ceiling": 5000}, r"attention.distance_ceiling = 5000, but the model was trained on 4096 tokens"),
        ({"method": "streaming", "n_local": 4096}, r"n_global \+ attention.n_local = 4100, but the model was trained"),
        ({"n_global": 5000}, r"attention.n_global = 5000 is more than attention.n_local = 4096"),
    ],
)
def test_lengths_beyond_the_trained_length_need_an_explicit_override(attention: dict, message: str) -> None:
    with pytest.raises(LongContextError, match=message):
        geometry({"attention": attention})


def test_the_explicit_override() -> None:
    attention = {"n_local": 8192, "distance_ceiling": 6000, "allow_beyond_trained": True}
    assert geometry({"attention": attention}) == Geometry(10, 8192, 6000)
