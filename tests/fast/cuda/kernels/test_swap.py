"""The copies of a swap, interpreted where there is no GPU."""

import pytest
import torch

from vllm_longctx.cuda.kernels.swap import ELEMENTS, PaddedCopies

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Sizes of sources and targets, of less and more than a program's part.
SIZES = [
    ((1, 1), (1, 1)),
    ((4, 20), (8, 20)),
    ((ELEMENTS // 8, 3), (ELEMENTS // 8, 8)),
    ((ELEMENTS // 8 + 1, 8), (ELEMENTS // 8 + 1, 8)),
    ((7, ELEMENTS + 1), (8, ELEMENTS + 1)),
    ((5, 2), (ELEMENTS, 3)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_matrix_is_copied_and_padded(dtype: torch.dtype) -> None:
    # Numbers that every dtype has: Triton's interpreter cuts off where a GPU rounds.
    sources = [torch.randn(size, device=DEVICE).bfloat16().float() for size, _ in SIZES]
    targets = [torch.full(size, torch.nan, dtype=dtype, device=DEVICE) for _, size in SIZES]
    PaddedCopies.of(sources, targets).copy()
    for source, target in zip(sources, targets, strict=True):
        expected = torch.zeros(target.shape, dtype=dtype, device=DEVICE)
        expected[: source.shape[0], : source.shape[1]] = source
        assert torch.equal(target, expected)


def test_neighbours_stay_as_they_are() -> None:
    """Layers' weights of several adapters lie behind each other."""
    stacked = torch.full((3, 1, 5, 7), 9.0, device=DEVICE)
    source = torch.ones(2, 7, device=DEVICE)
    PaddedCopies.of([source], [stacked[1, 0]]).copy()
    assert (stacked[[0, 2]] == 9).all() and (stacked[1, 0, :2] == 1).all() and not stacked[1, 0, 2:].any()


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (torch.ones(3, 4), torch.ones(2, 4)),
        (torch.ones(3, 5), torch.ones(3, 4)),
        (torch.ones(4, 3).T, torch.ones(3, 4)),
        (torch.ones(3, 4), torch.ones(3, 8)[:, :4]),
    ],
)
def test_what_is_no_such_copy_is_refused(source: torch.Tensor, target: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="is not copied into"):
        PaddedCopies.of([source], [target])
