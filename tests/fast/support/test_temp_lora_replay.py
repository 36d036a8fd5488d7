"""The replay that the engine is compared with, itself against plain forwards."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from tests.support.reference_model import ReferenceLlama
from tests.support.temp_lora_replay import Lambda, Learner, Options, Replay, replay
from vllm_longctx.geometry import Geometry

BLOCK = 24
TRAINING = Options(
    block_tokens=BLOCK,
    window_tokens=128,
    context_tokens=64,
    train_context_tokens=20,
    learning_rate=5e-3,
    warmup_blocks=0,
)


def options(base: Options = TRAINING, **changes) -> Options:
    return Options(**{**vars(base), **changes})


def text(length: int, seed: int = 0) -> list[int]:
    return torch.randint(2, 512, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def plain(path: Path, adapter: dict[str, tuple[Tensor, Tensor]] | None = None) -> PreTrainedModel:
    """The model with the adapter merged into its weights."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for module, (a, b) in (adapter or {}).items():
        model.get_submodule(module).weight.data += b @ a
    return model


@torch.no_grad()
def token_logprobs(model: PreTrainedModel, ids: list[int], cache: DynamicCache | None = None) -> list[float]:
    """Of each token but the first."""
    rows = model(torch.tensor([ids]), past_key_values=cache).logits[0, :-1].double().log_softmax(-1)
    return rows.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()


def close(values: list[float]):
    """Float32 rounds differently when the same positions are computed in other pieces."""
    return pytest.approx(values, abs=5e-5)


def test_without_training_inside_the_window_it_is_generate(tiny_llama: Path) -> None:
    prompt, model = text(60), plain(tiny_llama)
    ours = replay(tiny_llama, prompt, 50, options(epochs=0))
    theirs = model.generate(torch.tensor([prompt]), max_new_tokens=50, min_new_tokens=50, do_sample=False)[
        0
    ].tolist()
    assert prompt + ours.tokens == theirs
    assert ours.passes == [(0, 0)]
    assert ours.prompt_logprobs + ours.logprobs == close(token_logprobs(model, theirs))


def test_forced_output_is_scored_as_a_prompt_is(tiny_llama: Path) -> None:
    ids = text(150)
    read = replay(tiny_llama, ids, 0, TRAINING)
    forced = replay(tiny_llama, ids[:40], 110, TRAINING, forced_output=ids[40:])
    assert forced.tokens == ids[40:] and read.tokens == read.logprobs == []
    assert forced.prompt_logprobs + forced.logprobs == close(read.prompt_logprobs)
    assert forced.losses[0] == pytest.approx(read.losses[0])


def test_a_new_pass_is_a_fresh_forward_of_the_kept_and_the_last_tokens(tiny_llama: Path) -> None:
    ids, keep = text(180), 3
    got = replay(tiny_llama, ids, 0, options(epochs=0, keep_first=keep))
    # The live context is full at 128; 64 tokens before it is a multiple of 32. Then at 64 + 125.
    assert got.passes == [(0, 0), (128, 64)]
    rows = token_logprobs(plain(tiny_llama), ids[:keep] + ids[64:])
    assert got.prompt_logprobs[128:] == close(rows[keep + 128 - 64 :])
    assert got.prompt_logprobs[:128] == close(token_logprobs(plain(tiny_llama), ids[:129]))


@pytest.mark.parametrize("policy", ["reuse", "recompute"])
def test_each_block_is_scored_by_what_the_blocks_before_it_taught(tiny_llama: Path, policy: str) -> None:
    ids, chosen = text(2 * BLOCK + 1), options(kv_policy=policy)
    got = replay(tiny_llama, ids, 0, chosen)
    first = replay(tiny_llama, ids[: BLOCK + 1], 0, chosen)
    assert got.versions == [0] * BLOCK + [1] * BLOCK and len(got.losses) == 2 and len(first.losses) == 1
    base, taught = plain(tiny_llama), plain(tiny_llama, first.adapter)
    # The second block's pass computes the first block again, but its rows stay those of the base model.
    assert (
        got.prompt_logprobs[:BLOCK] == first.prompt_logprobs == close(token_logprobs(base, ids[: BLOCK + 1]))
    )
    if policy == "recompute":
        assert got.passes == [(0, 0), (BLOCK, 0)]
        expected = token_logprobs(taught, ids)[BLOCK:]
    else:
        assert got.passes == [(0, 0)]
        cache = DynamicCache()
        token_logprobs(base, ids[:BLOCK], cache)
        expected = token_logprobs(taught, ids[BLOCK:], cache)
    assert got.prompt_logprobs[BLOCK:] == close(expected)
    untaught = token_logprobs(base, ids)[BLOCK:]
    assert max(abs(a - b) for a, b in zip(got.prompt_logprobs[BLOCK:], untaught, strict=True)) > 0.01


def test_within_one_block_recompute_is_reuse(tiny_llama: Path) -> None:
    chosen = options(block_tokens=100)
    one, other = (
        replay(tiny_llama, text(60), 40, options(chosen, kv_policy=p)) for p in ("reuse", "recompute")
    )
    assert one.tokens == other.tokens and one.logprobs == other.logprobs and one.versions == [0] * 99


def test_versions_of_both_update_modes(tiny_llama: Path) -> None:
    prompt = text(30)
    cascaded, parallel = (
        replay(tiny_llama, prompt, 60, options(update_mode=m)) for m in ("cascaded", "parallel")
    )
    assert cascaded.versions == [p // BLOCK for p in range(89)]
    assert parallel.versions == [max(p // BLOCK - 1, 0) for p in range(89)]
    only_output = replay(tiny_llama, prompt, 60, options(train_on_prompt=False))
    assert only_output.versions == [0] * 29 + [p // BLOCK for p in range(60)]
    assert len(cascaded.losses) == 89 // BLOCK and len(only_output.losses) == 60 // BLOCK


def test_parallel_learns_what_cascaded_learns_and_uses_it_a_block_later(tiny_llama: Path) -> None:
    ids = text(4 * BLOCK + 1)
    cascaded, parallel = (
        replay(tiny_llama, ids, 0, options(update_mode=m)) for m in ("cascaded", "parallel")
    )
    assert parallel.losses == cascaded.losses
    assert parallel.prompt_logprobs[: 2 * BLOCK] == close(
        token_logprobs(plain(tiny_llama), ids[: 2 * BLOCK + 1])
    )
    assert parallel.prompt_logprobs[2 * BLOCK :] != close(cascaded.prompt_logprobs[2 * BLOCK :])


def test_the_first_block_warms_up_at_learning_rate_zero(tiny_llama: Path) -> None:
    ids = text(BLOCK + 1)
    cold = replay(tiny_llama, ids, 0, options(warmup_blocks=2))
    assert len(set(cold.losses[0])) == 1 and all(not b.any() for _, b in cold.adapter.values())
    nll = [-x for x in token_logprobs(plain(tiny_llama), ids)]
    assert cold.losses[0][0] == pytest.approx(sum(nll) / BLOCK, abs=1e-5)
    warm = replay(tiny_llama, ids, 0, TRAINING)
    assert warm.losses[0][1] < warm.losses[0][0] == pytest.approx(cold.losses[0][0])
    assert len(warm.adapter) == 3 * 7 and all(b.any() for _, b in warm.adapter.values())


def test_training_examples_begin_with_bos(tiny_llama: Path) -> None:
    ids, chosen = text(2 * BLOCK + 1), options(epochs=1)
    bos = AutoModelForCausalLM.from_pretrained(tiny_llama).config.bos_token_id
    for begin, prefix in ((ids[0], []), (bos, [bos])):
        whole = [begin, *ids[1:]]
        got = replay(tiny_llama, whole, 0, options(chosen, learning_rate=0.0))
        example = prefix + whole[BLOCK + 1 - chosen.train_context_tokens :]
        nll = [-x for x in token_logprobs(plain(tiny_llama), example)[-BLOCK:]]
        assert got.losses[1][0] == pytest.approx(sum(nll) / BLOCK, abs=1e-5)


@pytest.mark.parametrize("distances", ["relative", "in_cache"])
def test_keep_is_dense_lambda_attention(tiny_llama: Path, distances: str) -> None:
    ids = text(90)
    shape = Lambda(n_global=4, n_local=20, distance_ceiling=24, distances=distances)
    got = replay(tiny_llama, ids, 0, options(kv_policy="keep", attention=shape, epochs=0))
    expected = ReferenceLlama(tiny_llama).token_logprobs(
        ids, Geometry(shape.n_global, shape.n_local, shape.distance_ceiling, shape.distances)
    )
    assert got.prompt_logprobs == close(expected.tolist())
    assert got.passes == [(0, 0)]


def test_keep_with_a_window_as_long_as_the_text_is_reuse(tiny_llama: Path) -> None:
    results: list[Replay] = []
    for changes in ({}, {"kv_policy": "keep", "attention": Lambda(4, 128, 128)}):
        results.append(replay(tiny_llama, text(40), 60, options(**changes)))
    reuse, keep = results
    assert keep.logprobs == close(reuse.logprobs) and keep.tokens == reuse.tokens and max(keep.versions) == 4


def test_it_starts_from_a_saved_adapter(tiny_llama: Path, tmp_path: Path) -> None:
    ids = text(2 * BLOCK + 1)
    learner = Learner(tiny_llama, TRAINING, ids)
    learner.version(2)
    learner.model.save_pretrained(tmp_path)
    got = replay(tiny_llama, ids, 0, options(start_from=tmp_path, epochs=0))
    assert got.prompt_logprobs == close(token_logprobs(plain(tiny_llama, learner.adapter()), ids))
