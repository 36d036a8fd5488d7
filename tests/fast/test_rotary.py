"""Exact angles, against 60 digits of mpmath and against transformers' own frequencies."""

import mpmath
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope

from vllm_longctx.rotary import (
    Rotary,
    attention_factor,
    inverse_frequencies,
    no_turn,
    rotation_between,
)

DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize("position", [0, 1, 511, 10**6, 10**7, 2**31 - 1])
def test_angles_are_exact_at_any_position(position: int) -> None:
    frequencies = inverse_frequencies(64, DEFAULT)
    cos, sin = Rotary(64, 64, True, frequencies).cos_sin(torch.tensor([position]))
    with mpmath.workdps(60):
        for f in range(32):
            angle = position * mpmath.mpf(10000) ** (-mpmath.mpf(2 * f) / 64)
            assert abs(float(mpmath.cos(angle)) - float(cos[0, f])) < 2e-6
            assert abs(float(mpmath.sin(angle)) - float(sin[0, f])) < 2e-6


SCALED = [
    LLAMA3,
    YARN,
    {**YARN, "beta_fast": 16, "beta_slow": 2, "truncate": False},
    {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2},
    {**YARN, "attention_factor": 0.9},
    {**DEFAULT, "rope_type": "linear", "factor": 4.0},
    {**DEFAULT, "rope_type": "dynamic", "factor": 2.0},
]


@pytest.mark.parametrize("parameters", SCALED)
def test_frequencies_and_factors_are_those_of_transformers(parameters: dict) -> None:
    config = LlamaConfig(hidden_size=512, num_attention_heads=8, head_dim=64, rope_parameters=parameters)
    theirs, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"))
    ours = inverse_frequencies(64, parameters, config.max_position_embeddings)
    assert torch.allclose(ours.float(), theirs, rtol=1e-6)
    assert attention_factor(parameters) == pytest.approx(factor)


DYNAMIC = {**DEFAULT, "rope_type": "dynamic"}


@pytest.mark.parametrize(
    "parameters",
    [
        DEFAULT,
        *SCALED,
        {**DYNAMIC, "factor": 4.0, "max_trained_positions": 256},
        {**DYNAMIC, "alpha": 1000.0},
    ],
)
def test_rotations_are_those_of_vllm(parameters: dict) -> None:
    with set_current_vllm_config(VllmConfig()):
        stock = get_rope(64, 2048, True, parameters, torch.float32)
    rotary = Rotary(64, 64, True, inverse_frequencies(64, parameters, 2048), attention_factor(parameters))
    ours = torch.cat(rotary.scaled_cos_sin(torch.arange(512)), -1)
    assert torch.allclose(ours, stock.cos_sin_cache[:512], atol=1e-4)  # float32 angles of up to 512 radians


def test_turning_does_not_repeat_the_attention_factor() -> None:
    rotary = Rotary(32, 16, True, inverse_frequencies(16, DEFAULT), factor=1.3)
    query = torch.randn(1, 32)
    at_nine, at_five = (rotary(torch.tensor([p]), query)[0] for p in (9, 5))
    rotary.new_step()
    assert torch.allclose(rotary.turn(at_nine, torch.tensor([-4])), at_five, atol=1e-6)
    assert torch.equal(at_nine[:, 16:], query[:, 16:])


def test_an_unknown_scaling_is_named() -> None:
    with pytest.raises(
        ValueError, match="rope_type is 'fourier'; longctx knows default, llama3, linear, dynamic, ntk, yarn"
    ):
        inverse_frequencies(64, {"rope_type": "fourier"})


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("rotary_dim", [32, 16])
@pytest.mark.parametrize(("at", "by"), [(5, 7), (1_000_000, -999_990), (2**30, 2**29)])
def test_turning_a_rotated_vector_moves_it(neox: bool, rotary_dim: int, at: int, by: int) -> None:
    rotary = Rotary(32, rotary_dim, neox, inverse_frequencies(rotary_dim, DEFAULT))
    x = torch.randn(3, 2, 32)
    moved = rotary.turn(rotary.turn(x, torch.tensor(at)), torch.tensor(by))
    assert torch.allclose(moved, rotary.turn(x, torch.tensor(at + by)), atol=2e-6)
    assert torch.equal(moved[..., rotary_dim:], x[..., rotary_dim:])


def test_the_rotation_between_two_places_is_found() -> None:
    """From queries and keys of one shape or another, in any place among the candidates."""
    frequencies = inverse_frequencies(32, DEFAULT)
    none, *pairs = no_turn(32), *(Rotary(32, 32, neox, frequencies) for neox in (True, False))
    for shape in ((16, 4, 32), (1, 4, 16, 32)):
        here = torch.randn(shape), torch.randn(shape)
        for rotary in (none, *pairs):
            query, key = (rotary.turn(x, torch.tensor(50)) for x in here)
            assert rotation_between(here, (query, key), 50, (none, *pairs), 1e-4) is rotary
            assert rotation_between(here, (query * 1.5, key), 50, (none, *pairs), 1e-4) is rotary
            assert rotation_between(here, (query, key * 1.5), 50, (none, *pairs), 1e-4) is None
        assert rotation_between(here, (query, key), 51, pairs, 1e-4) is None


def test_forward_rotates_queries_and_keys_of_a_step() -> None:
    rotary = Rotary(32, 32, True, inverse_frequencies(32, DEFAULT))
    query, key = torch.randn(4, 6 * 32), torch.randn(4, 2 * 32)
    for positions in (torch.tensor([3, 900, 2**30, 0]), torch.tensor([1, 2, 3, 4])):
        q, k = rotary(positions, query, key)
        turned = rotary.turn(query.view(4, 6, 32), positions[:, None])
        assert torch.equal(q.view(4, 6, 32), turned)
        assert k is not None and k.shape == key.shape


def test_a_reused_positions_buffer_is_read_again_in_the_next_step() -> None:
    rotary = Rotary(32, 32, True, inverse_frequencies(32, DEFAULT))
    positions, query = torch.tensor([3]), torch.randn(1, 32)
    rotary(positions, query)
    positions.fill_(9)
    rotary.new_step()
    assert torch.equal(rotary(positions, query)[0], rotary.turn(query, torch.tensor([9])))
