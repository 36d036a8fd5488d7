"""The lookup of decodes against `lookup`, whose keys it must find, and against dense float64.

Without a GPU, interpreted.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.fast.cuda.kernels.test_lookup import DEVICE, SCALE, attend_dense, memories
from vllm_longctx.cuda.kernels import lookup, lookup_decode
from vllm_longctx.cuda.kernels.lookup import Memories, block_counts
from vllm_longctx.cuda.kernels.lookup_decode import attend_best_decode, fits, highest, in_turn, lookup_splits
from vllm_longctx.rotary import Rotary, inverse_frequencies

pytestmark = pytest.mark.usefixtures("one_thread", "short_lists", "few_blocks")


@pytest.fixture
def few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Are read of a memory, with a share."""
    for module in (lookup_decode, lookup):
        monkeypatch.setattr(module, "SCANNED", 2)


def attended(query: Tensor, m: Memories, k: int, splits: int, **kwargs: Any) -> tuple[Tensor, Tensor]:
    if (share := kwargs.get("share")) is not None:
        group = query.shape[1] // m.kv_heads
        kwargs["counts"] = block_counts(m.begins, m.ends, m.block_size, group, k, share, lookup.SCANNED)
    return attend_best_decode(query, replace(m, longest=None), k, SCALE, splits, **kwargs)


@pytest.mark.parametrize(
    ("dtype", "kv_heads", "group", "d", "block", "k", "splits", "soft_cap"),
    [
        (torch.float32, 2, 2, 16, 16, 3, 2, 0.0),
        (torch.float16, 1, 1, 24, 32, 40, 1, 0.0),  # k beyond a list; a head size that is no power of two
        (torch.bfloat16, 1, 3, 16, 16, 1, 3, 2.0),
    ],
)
def test_decodes_attend_to_their_best_keys(
    dtype: torch.dtype,
    kv_heads: int,
    group: int,
    d: int,
    block: int,
    k: int,
    splits: int,
    soft_cap: float,
) -> None:
    """A memory that ends inside a block, one that begins inside one, an empty one, and a row of padding."""
    keys, values = (torch.randn(4, 6 * block, kv_heads, d).to(dtype) for _ in range(2))
    m = memories(keys, values, [0, 5, 7, 0], [5 * block + 7, 2 * block - 1, 7, 0], block)
    m.block_table[3] = 0
    query = torch.randn(4, kv_heads * group, d).to(dtype).to(DEVICE)
    output, lse = (x.cpu() for x in attended(query, m, k, splits, soft_cap=soft_cap))
    for row in range(2):
        expected, expected_lse, clear = attend_dense(query[row : row + 1], m, row, k, soft_cap)
        assert clear.float().mean() > 0.6
        assert (output[row] - expected[0])[clear[0]].abs().max() < 2e-6
        assert (lse[row] - expected_lse[0])[clear[0]].abs().max() < 2e-6
    assert (output[2:] == 0).all() and lse[2:].isneginf().all()


def test_decodes_read_the_blocks_that_lookup_chooses() -> None:
    """Memories of other lengths, of which one is read whole, since it has no more than k keys."""
    keys = torch.randn(3, 200, 1, 16) * (1.5 * torch.randn(3, 200, 1, 1)).exp()
    m = memories(keys, torch.randn(3, 200, 1, 16), [0, 20, 0], [200, 131, 4], coded=True)
    query = torch.randn(3, 3, 16, device=DEVICE)
    expected = lookup.attend_best(query[:, None], m, 4, SCALE, 0.3)
    for ours, theirs in zip(attended(query, m, 4, 2, share=0.3), expected, strict=True):
        torch.testing.assert_close(ours, theirs[:, 0], atol=1e-6, rtol=1e-6)
    exact = lookup.attend_best(query[:, None], m, 4, SCALE)[1]
    assert not torch.allclose(expected[1], exact)  # so blocks were chosen


def test_of_equal_keys_the_earlier_ones_are_taken() -> None:
    """Also where they stand in the shares of several programs: values tell which."""
    values = torch.arange(90.0)[None, :, None, None].expand(1, 90, 2, 16)
    m = memories(torch.ones(1, 90, 2, 16), values, [3], [90], coded=True)
    query = torch.randn(1, 4, 16, device=DEVICE)
    for share in (None, 0.5):
        output, _ = attended(query, m, 20, 3, share=share)
        torch.testing.assert_close(output.cpu(), torch.full((1, 4, 16), 12.5))  # keys 3 .. 22


def test_a_call_is_replayed_over_other_contents(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA graph keeps of a call is the same for memories that have grown, and rows that are padding
    now.
    """
    keys, values = (torch.randn(3, 120, 1, 16) for _ in range(2))
    m = memories(keys, values, [0, 0, 0], [120, 120, 120], coded=True)
    query = torch.randn(3, 2, 16, device=DEVICE)
    kept: list[list[Any]] = []
    run = type(lookup_decode._highest_kernel).run

    def recorded(self: Any, *args: Any, grid: Any, **kwargs: Any) -> Any:
        scalars = [x for x in (*args, *kwargs.values()) if not isinstance(x, Tensor)]
        kept[-1].append((self.__name__, grid, scalars))
        return run(self, *args, grid=grid, **kwargs)

    for ends in ([20, 0, 1], [120, 64, 0]):
        m.ends.copy_(torch.tensor(ends))
        query.normal_()
        kept.append([])
        with monkeypatch.context() as patched:
            patched.setattr(type(lookup_decode._highest_kernel), "run", recorded)
            got = attended(query, m, 3, 2, share=0.3)
        expected = lookup.attend_best(query[:, None], replace(m, longest=max(ends)), 3, SCALE, 0.3)
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs[:, 0], atol=1e-6, rtol=1e-6)
    assert len(kept[0]) == 6 and kept[0] == kept[1]


def test_highest_is_topk() -> None:
    packed = torch.randint(-(2**62), 2**62, (2, 2, 70), device=DEVICE)
    assert torch.equal(highest(packed, 21), packed.topk(21).values)
    few = highest(packed[..., :5], 9)
    assert torch.equal(few[..., :5], packed[..., :5].sort(descending=True).values)
    assert lookup.unpack(few[..., 5:])[0].isneginf().all()
    assert (highest(few[..., 5:], 2, places=True) == -1).all()


def test_blocks_are_chosen_in_turn() -> None:
    columns = torch.stack([torch.randperm(9)[:6] for _ in range(2 * 6)]).view(2, 6, 6).to(DEVICE)
    counts = torch.tensor([4, 9], device=DEVICE)
    expected = lookup.in_turn(columns[:, None], 2, counts)[:, 0]
    assert torch.equal(in_turn(columns, 2, counts), expected)
    columns[0, :3, 3:] = -1  # a short memory
    columns[0, :3, :3] = torch.tensor([[2, 0, 1], [0, 2, 1], [0, 1, 2]])
    assert in_turn(columns, 2, counts)[0, 0].tolist() == [2, 0, 1, -1, -1, -1]


@pytest.mark.parametrize("neox", [True, False])
def test_queries_are_turned_as_by_their_rotation(neox: bool) -> None:
    rotary = Rotary(24, 16, neox, inverse_frequencies(16, {}))
    query, by = torch.randn(3, 5, 24), torch.tensor([-7, 0, 900])
    cos, sin = rotary.cos_sin(by)
    expected = rotary.rotate(query, cos[:, None], sin[:, None])
    ours = lookup_decode.turned(*(x.to(DEVICE) for x in (query, cos, sin)), neox)
    torch.testing.assert_close(ours.cpu(), expected, atol=1e-6, rtol=1e-6)


def test_which_lookups_graphs_can_hold() -> None:
    million = 1 << 15  # blocks of 32
    assert fits(million, 32, 4, 64, None) and fits(million, 32, 4, 64, 0.1)
    assert fits(million, 32, 8, 64, 0.1) and not fits(million, 32, 16, 64, 0.1)
    assert fits(million, 32, 4, 1024, None) and not fits(million, 32, 4, 1025, None)
    assert lookup_splits(million, 1, 8, 132) == 64 and lookup_splits(million, 16, 8, 132) == 5
    assert lookup_splits(2 * lookup_decode.LIST, 1, 8, 132) == 2 and lookup_splits(million, 1024, 8, 132) == 1
