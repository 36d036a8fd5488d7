"""Addresses of versions: equal for equal texts and settings, and for no others."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from safetensors.torch import load_file, save_file

from tests.support.engine_args import create
from vllm_longctx import BOOKLM
from vllm_longctx.config import AdaptationSection, TrainerSection
from vllm_longctx.settings import Adaptation, TrainerSettings, active_settings
from vllm_longctx.temp_lora import address, base_model
from vllm_longctx.temp_lora.blocks import Blocks, example
from vllm_longctx.temp_lora.messages import Recipe

SETTINGS = Adaptation.of(AdaptationSection(block_tokens=8, train_context_tokens=5, rank=4))
ORIGIN = address.untrained(b"model", SETTINGS, Recipe())
# For every field that decides, another value than the default.
OTHERS: dict[str, Any] = {
    "method": "another",
    "block_tokens": 9,
    "train_context_tokens": 6,
    "update_mode": "parallel",
    "device": "cuda:0",
    "attention": "xformers",
    "threads": 2,
}
RECIPES: dict[str, Any] = {
    "rank": 8,
    "alpha": 3.5,
    "dropout": 0.0,
    "learning_rate": 5.0000001e-5,
    "weight_decay": 0.1,
    "adam_eps": 1e-8,
    "grad_clip": 1.0,
    "warmup_blocks": 0,
    "epochs": 3,
    "adapter_seed": 1,
}
texts = st.lists(st.integers(0, 200_000), min_size=20, max_size=60)


def chain(text: list[int], origin: bytes = ORIGIN) -> list[bytes]:
    """The addresses of all versions of a text."""
    blocks, found = Blocks(0, SETTINGS.block_tokens, "cascaded"), [origin]
    while (targets := blocks.targets(len(found))).stop <= len(text):
        tokens = example(text, targets, SETTINGS.train_context_tokens, bos=None)
        found.append(address.trained(found[-1], tokens, len(targets)))
    return found


@given(texts, texts)
def test_texts_that_begin_alike_share_addresses_as_far_as_they_are_alike(one: list[int], other: list[int]):
    a, b = chain(one), chain(one[:20] + other)
    same = next((i for i, (x, y) in enumerate(zip(one, one[:20] + other, strict=False)) if x != y), 1 << 30)
    for version, (x, y) in enumerate(zip(a, b, strict=False)):
        assert (x == y) == (version * SETTINGS.block_tokens < same)
    assert len(set(a)) == len(a)


@given(texts, st.data())
def test_one_token_changes_every_address_from_its_block_on(text: list[int], data: st.DataObject):
    at = data.draw(st.integers(1, (len(text) - 1) // 8 * 8))  # the first token is the target of no block
    other = [*text[:at], text[at] + 1, *text[at + 1 :]]
    block = (at - 1) // 8 + 1
    a, b = chain(text), chain(other)
    assert a[:block] == b[:block]
    assert not set(a[block:]) & set(b[block:])


def test_no_other_cut_of_the_same_tokens_has_the_same_address():
    tokens = list(range(12))
    found = {address.trained(before, tokens, n) for before in (ORIGIN, bytes(32)) for n in range(1, 12)}
    assert len(found) == 22


@pytest.mark.parametrize("name", Recipe.__struct_fields__)
def test_every_field_of_a_recipe_decides(name: str):
    assert address.untrained(b"model", SETTINGS, replace(Recipe(), **{name: RECIPES[name]})) != ORIGIN


def test_every_setting_decides_or_is_known_not_to():
    """A field that is new must be put into one of the lists."""
    recipe = set(Recipe.__struct_fields__)
    assert address.DECIDING | address.NOT_DECIDING | recipe == set(Adaptation.model_fields)
    assert not address.DECIDING & address.NOT_DECIDING and not recipe & address.NOT_DECIDING
    trainer = address.DECIDING_OF_TRAINER, address.NOT_DECIDING_OF_TRAINER
    assert trainer[0] | trainer[1] == set(TrainerSection.model_fields) and not trainer[0] & trainer[1]


@pytest.mark.parametrize("name", sorted(address.DECIDING | address.DECIDING_OF_TRAINER))
def test_every_setting_that_decides_is_in_the_address(name: str):
    values = {name: OTHERS[name]}
    if name in address.DECIDING_OF_TRAINER:
        trainer = TrainerSettings.model_construct(**{**dict(SETTINGS.trainer), **values})
        values = {"trainer": trainer}
    settings = Adaptation.model_construct(**{**dict(SETTINGS), **values})
    assert address.untrained(b"model", settings, Recipe()) != ORIGIN


def test_model_salt_and_content_decide():
    found = {
        address.untrained(model, SETTINGS, Recipe(), salt, content)
        for model in (b"model", b"other")
        for salt in (None, "", "tenant")
        for content in (b"", b"adapter")
    }
    assert ORIGIN in found and len(found) == 12


def test_the_models_identity_is_that_of_its_weights(tmp_path: Path):
    """Neither its name nor its place is in it; one element that differs is."""

    def identity(model: Path | str, **settings: Any) -> bytes:
        section = {"attention": {"method": "none"}, "adaptation": {}}
        config = create(model, {"longctx": section}, **settings)
        assert active_settings(config).mode.adapts
        return base_model.identity(config)

    original = identity(BOOKLM)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in Path(BOOKLM).iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert identity(copy) == original
    assert identity(BOOKLM, dtype="float32") != original
    weights = load_file(copy / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert identity(copy) != original
