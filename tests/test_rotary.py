"""Exact angles, against 60 digits of mpmath and against transformers' own frequencies."""

import mpmath
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from vllm_longctx.rotary import Rotary, inverse_frequencies

DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("position", [0, 1, 511, 10**6, 10**7, 2**31 - 1])
def test_angles_are_exact_at_any_position(position: int) -> None:
    frequencies = inverse_frequencies(64, DEFAULT)
    cos, sin = Rotary(64, 64, True, frequencies).cos_sin(torch.tensor([position]))
    with mpmath.workdps(60):
        for f in range(32):
            angle = position * mpmath.mpf(10000) ** (-mpmath.mpf(2 * f) / 64)
            assert abs(float(mpmath.cos(angle)) - float(cos[0, f])) < 2e-6
            assert abs(float(mpmath.sin(angle)) - float(sin[0, f])) < 2e-6


@pytest.mark.parametrize("parameters", [DEFAULT, LLAMA3, {**DEFAULT, "rope_type": "linear", "factor": 4.0}])
def test_frequencies_are_those_of_transformers(parameters: dict) -> None:
    config = LlamaConfig(hidden_size=512, num_attention_heads=8, head_dim=64, rope_parameters=parameters)
    if parameters["rope_type"] == "default":
        theirs = 10000.0 ** (-torch.arange(0, 64, 2) / 64)
    else:
        theirs, _ = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"))
    assert torch.allclose(inverse_frequencies(64, parameters).float(), theirs, rtol=1e-6)


def test_an_unknown_scaling_is_named() -> None:
    with pytest.raises(ValueError, match="rope_type is 'yarn'; longctx knows default, llama3, linear"):
        inverse_frequencies(64, {"rope_type": "yarn"})


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("rotary_dim", [32, 16])
@pytest.mark.parametrize(("at", "by"), [(5, 7), (1_000_000, -999_990), (2**30, 2**29)])
def test_turning_a_rotated_vector_moves_it(neox: bool, rotary_dim: int, at: int, by: int) -> None:
    rotary = Rotary(32, rotary_dim, neox, inverse_frequencies(rotary_dim, DEFAULT))
    x = torch.randn(3, 2, 32)
    moved = rotary.turn(rotary.turn(x, torch.tensor(at)), torch.tensor(by))
    assert torch.allclose(moved, rotary.turn(x, torch.tensor(at + by)), atol=2e-6)
    assert torch.equal(moved[..., rotary_dim:], x[..., rotary_dim:])


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
