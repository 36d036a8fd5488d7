"""What `vllm-longctx diagnose` measures, against a direct computation in float64, and what it says of it."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.architectures import ARCHITECTURES, made
from tests.support.commands import run
from tests.support.hf_oracle import Oracle
from vllm_longctx import BOOKLM, diagnosis
from vllm_longctx.diagnosis import (
    FIRST,
    PLAIN,
    STATES,
    Diagnosis,
    Measured,
    Samples,
    apart,
    attention,
    findings,
    loaded,
    lost_without,
    means,
)
from vllm_longctx.geometry import Geometry, branches
from vllm_longctx.reference import _scores_at
from vllm_longctx.reference import attention as reference
from vllm_longctx.rotary import Rotary, inverse_frequencies

TOKENS, TRAINED = 70, 16
LAMBDA = Geometry(2, 11, TRAINED)


class Direct(Oracle):
    """The oracle, which keeps the score of each pair, and queries and keys that are not rotated."""

    def logprobs(self, ids: list[int], *seen: Any) -> Tensor:
        self.scores: list[Tensor] = []
        self.given: list[tuple[Tensor, Tensor, float, Any]] = []
        return super().logprobs(ids, *seen)

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, *own: Any, **more: Any
    ) -> Tensor:
        layer = module.layer_idx
        seen, rotates = self.layers(layer, torch.arange(query.shape[2]))
        rotary = self._rotary(layer) if rotates and layer not in self.architecture.unrotated else None
        q, k = query[0].transpose(0, 1), key[0].transpose(0, 1)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = torch.full((q.shape[1], len(q), len(k)), -torch.inf, dtype=torch.float64)
        for branch in seen:
            scores = torch.where(branch.visible, _scores_at(q, k, branch.distance, rotary) * scale, scores)
        self.scores.append(scores)
        self.given.append((q, k, scale, rotary))
        return super().attend(module, query, key, value, scale, *own, **more)


def direct(oracle: Direct, ids: list[int], geometry: Geometry, samples: Samples) -> Measured:
    """`Measured` by the letter of its docstring."""
    states: list[Tensor] = []
    layers = oracle.model.model.layers[:STATES]
    handles = [
        layer.register_forward_hook(
            lambda *given: states.append((given[2] if isinstance(given[2], Tensor) else given[2][0])[0])
        )
        for layer in layers
    ]
    oracle.logprobs(ids, geometry)
    for handle in handles:
        handle.remove()
    buckets = list(pairwise(samples.edges))
    largest, entropies, first, at_ceilings = [], [], [], []
    for scores, (q, k, scale, rotary) in zip(oracle.scores, oracle.given, strict=True):
        by_distance: list[list[Tensor]] = [[torch.full((len(scores),), -torch.inf)] for _ in buckets]
        entropies.append([])
        first.append([])
        tried = []
        for number, some in enumerate(samples.positions):
            shares = scores[:, some].softmax(-1)
            entropies[-1].append((-shares * shares.clamp_min(1e-300).log()).sum(-1).amax(1))
            first[-1].append(shares[..., : samples.first].mean((0, 1)))
            for i in some:
                for j in range(i + 1):
                    bucket = next(b for b, (near, far) in enumerate(buckets) if near <= i - j < far)
                    by_distance[bucket].append(scores[:, i, j])
            if number >= samples.trained:
                rest = scores[:, some, geometry.n_global :].exp().sum(-1)
                queries, keys = q[some], k[: geometry.n_global]
                distance = torch.ones(len(some), len(keys), dtype=torch.int64)
                weights = [
                    (_scores_at(queries, keys, distance * c, rotary) * scale).exp().sum(-1)
                    for c in samples.ceilings
                ]
                tried.append([(w / (w + rest)).mean() for w in weights])
        largest.append(torch.stack([torch.stack(values).amax(0) for values in by_distance], 1))
        at_ceilings.append(torch.tensor(tried).mean(0))
    return Measured(
        torch.stack(largest),
        torch.stack([torch.stack(rows, 1) for rows in entropies]),
        torch.stack([torch.stack(rows) for rows in first]).mean(0),
        torch.stack(at_ceilings).mean(0),
        torch.stack([s[samples.compared] for s in states]),
    )


@pytest.mark.parametrize("row", ["Llama", "GLM-4", pytest.param("SmolLM3", marks=pytest.mark.slow)])
def test_every_figure_is_what_a_direct_computation_gives(
    row: str, tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With both orders of a rotated pair, and of layers without positions."""
    monkeypatch.setattr(diagnosis, "CHUNK", 20)
    architecture = ARCHITECTURES[row]
    path = made(architecture, tmp_path).transformers
    ids = torch.randint(3, 512, (TOKENS,)).tolist()
    samples = Samples.of(TRAINED, TOKENS, 3)
    done: list[None] = []
    with torch.inference_mode():
        ours = Diagnosis(loaded(str(path), "float32"), samples, LAMBDA)
        for geometry in (PLAIN, LAMBDA):
            found = ours.measure(ids, geometry, lambda: done.append(None))
            wanted = direct(Direct(architecture, path, TOKENS), ids, geometry, samples)
            for name in ("logits", "entropies", "first", "states"):
                a, b = getattr(found, name), getattr(wanted, name)
                torch.testing.assert_close(a.double(), b.double(), rtol=1e-3, atol=2e-3, msg=name)
            if geometry == PLAIN:
                assert found.at_ceilings.isnan().all()
            else:
                torch.testing.assert_close(
                    found.at_ceilings.double(), wanted.at_ceilings, rtol=1e-3, atol=1e-3
                )
    assert len(done) == 2 * len(ours.rotaries)


@pytest.mark.parametrize("geometry", [PLAIN, LAMBDA, Geometry(1, 32, 32), Geometry(40, 7, 30)])
def test_attention_is_the_references(geometry: Geometry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "CHUNK", 33)
    rotary = Rotary(16, 8, True, inverse_frequencies(8, {"rope_theta": 100.0}))
    query, key, value = (torch.randn(heads, TOKENS, 16) for heads in (4, 2, 2))
    positions = torch.arange(TOKENS)
    turned = (rotary.turn(x, positions) for x in (query, key))
    found = attention(*turned, value, geometry, rotary, 0.3)
    seen = branches(geometry, positions, positions)
    wanted = reference(*(x.transpose(0, 1) for x in (query, key, value)), seen, 0.3, rotary)
    torch.testing.assert_close(found.transpose(0, 1).double(), wanted, rtol=1e-4, atol=1e-5)


def test_samples_stand_in_every_doubling() -> None:
    samples = Samples.of(512, 1500, 4)
    assert samples.edges == [0, 8, 16, 32, 64, 128, 256, 512, 1024, 1500]
    assert samples.edges[samples.trained] == 512 and samples.ceilings == [64, 128, 256, 512, 1024, 1500]
    assert all(
        begin <= some[0] and some[-1] < end
        for (begin, end), some in zip(pairwise(samples.edges), samples.positions, strict=True)
    )
    assert samples.positions[-1] == [1083, 1202, 1321, 1440]
    assert samples.first == FIRST and set(range(FIRST)) < set(samples.compared)


def test_lost_attention_is_what_first_tokens_get_beside_others() -> None:
    lost = lost_without([0.5, 0.04, 0.02, 0.02, 0.01, 0.01, 0.02, 0.02])
    ordinary = 0.015
    assert lost[0] == pytest.approx(0.58 - 4 * ordinary) and lost[1] == pytest.approx(0.08 - 3 * ordinary)
    assert lost[4] == 0


def made_up(samples: Samples, logits: list[float], entropies: list[float], sink: float) -> Measured:
    """One layer of ten heads that are alike, a model of 300 elements."""
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(1, len(samples.compared), 300, generator=generator)
    states[0, 0] = 40.0
    first = torch.full((len(samples.edges) - 1, samples.first), 0.001)
    first[:, :2] = torch.tensor([sink, sink / 10])
    at = torch.tensor([0.6, 0.5, 0.45, 0.42, 0.3, 0.2])
    rows = (torch.tensor(x).expand(1, 10, -1) for x in (logits, entropies))
    return Measured(*rows, first, at, states)


def test_what_it_says_follows_from_the_figures() -> None:
    samples = Samples.of(512, 2048, 4)
    trained = [5.0] * samples.trained
    broken = made_up(samples, [*trained, 7.0, 6.0], [*trained, 6.0, 6.5], 0.4)
    ours = made_up(samples, [*trained, 5.5, -math.inf], [*trained, 5.1, 5.2], 0.4)
    found = findings(broken, ours, samples, 4)
    assert [factor.holds for factor in found.factors] == [True, True, True]
    assert "100% of the heads (0% from 256 to 512; with Λ 0%)" in found.factors[0].words
    assert "5.00 nats from 256 to 512 tokens, 6.50 at the end of the text, and there 5.20" in (
        found.factors[1].words
    )
    assert "they get 44% more than as many others, the very first one 40%" in found.factors[2].words
    assert "the states of 1 of 64 are more than 2 times" in found.factors[2].words
    assert (found.n_global, found.distance_ceiling) == (2, 512)
    assert found.shares_at_ceilings[1024] == pytest.approx(0.3)
    sound = replace(ours, first=torch.full_like(ours.first, 0.002))
    found = findings(sound, ours, samples, 4)
    assert [factor.holds for factor in found.factors] == [False, False, False] and found.n_global == 0
    assert math.isnan(means(torch.full((1, 2, 1), -math.inf))[0])
    assert apart(ours.states[0], samples)[0] > 10


TEXT = "The quick brown fox jumps over the lazy dog, and 7 others. " * 120


@pytest.mark.parametrize("draws", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_command_prints_writes_and_draws(draws: bool, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    words = ["diagnose", "--text", str(tmp_path / "text.txt"), "--max-tokens", "1100", "--samples", "2"]
    words += ["--json", str(tmp_path / "out.json"), "--n-local", "256"]
    code, shown = run(*words, *(("--plot", str(tmp_path / "plots")) if draws else ()))
    assert code == 0 and "1. unseen distances: " in shown and "The ceiling should be" in shown
    result = json.loads((tmp_path / "out.json").read_text())
    assert (result["trained"], result["tokens"], result["edges"][-2:]) == (512, 1100, [1024, 1100])
    assert len(result["factors"]) == 3 and result["n_local"] == 256
    layers, buckets = result["plain"]["largest_logits"], len(result["edges"]) - 1
    assert len(layers[0][0]) == buckets and len(result["lambda"]["entropies"]) == len(layers)
    if draws:
        names = {path.name for path in (tmp_path / "plots").iterdir()}
        assert names == {"logits.png", "entropies.png", *(f"states_{k}.png" for k in range(1, STATES + 1))}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "tokens of TEXT are read, but what lies past the trained length, 512, is looked for; give at"),
        (["--n-local", "513"], "--n-local 513: the model was trained on 512 tokens; give no more"),
        (["--max-tokens", "9999", "--dtype", "int8"], "--dtype int8: give one of auto, float32, bfloat16"),
        (["--n-global", "0"], "greater than or equal to 1"),
    ],
)
def test_a_mistake_is_named(words: list[str], message: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT if "--dtype" in words else TEXT[:500])
    code, shown = run("diagnose", "--model", BOOKLM, "--text", str(text), *words)
    assert code == 2 and message in shown.replace(str(text), "TEXT")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("Mistral v0.1", "layer 0 of this model attends with sliding_window"),
        ("Phi-3", "the rope_type is 'longrope', whose frequencies change as a text grows"),
        ("BLOOM", "BloomModel has no list of layers with one rotary embedding for all of them"),
    ],
)
def test_models_that_attend_otherwise_are_refused(row: str, message: str, tmp_path: Path) -> None:
    path = made(ARCHITECTURES[row], tmp_path).transformers
    with pytest.raises(ValueError, match=message):
        Diagnosis(loaded(str(path), "float32"), Samples.of(TRAINED, TOKENS, 2), LAMBDA)
