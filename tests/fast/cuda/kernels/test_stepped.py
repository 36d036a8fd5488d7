"""Stepped windows: decodes, whose keys are split among programs, and chunks, against float64.

Blocks that nobody may see hold NaN. Interpreted where there is no GPU.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_longctx.cuda.kernels import lambda_decode as decode
from vllm_longctx.cuda.kernels.lambda_tile import Launch, View
from vllm_longctx.cuda.kernels.stepped import stepped_attention
from vllm_longctx.geometry import Geometry

pytestmark = pytest.mark.usefixtures("one_thread")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE, SCALE = 4, 2, 16, 16, 0.3
H100_SMS = 132
# (length, window's start): windows begin inside of a block, at one, with the text, and at the query itself.
# The last row is padding. Windows are shorter and longer than a tile of 16 keys, and not multiples of it.
ROWS = [(70, 37), (48, 16), (33, 0), (65, 64), (17, 1), (0, 5)]


def paged(rows: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [blocks, BLOCK_SIZE, KV_HEADS, HEAD_SIZE] in one tensor, and the block table."""
    columns = max(length for length, _ in rows) // BLOCK_SIZE + 1
    table = torch.zeros(len(rows), columns, dtype=torch.int32)  # 0: the null block
    cache = torch.full((1 + table.numel(), BLOCK_SIZE, KV_HEADS, 2 * HEAD_SIZE), torch.nan)
    free = iter((torch.randperm(table.numel()) + 1).tolist())
    for row, (length, start) in enumerate(rows):
        for column in range(start // BLOCK_SIZE, -(-length // BLOCK_SIZE)):
            table[row, column] = block = next(free)
            cache[block] = torch.randn(BLOCK_SIZE, KV_HEADS, 2 * HEAD_SIZE)
    key, value = cache.to(DEVICE).split(HEAD_SIZE, -1)
    return key, value, table.to(DEVICE)


def expected(
    query: Tensor, position: int, start: int, keys: tuple[Tensor, Tensor], view: View, branch: Any
) -> Tensor:
    """float64 [heads, d] of one query. keys: keys and values [position + 1, kv_heads, d]."""
    key, value = (x[start : position + 1].double().repeat_interleave(HEADS // KV_HEADS, 1) for x in keys)
    scores = torch.einsum("hd,shd->hs", query.double(), key) * SCALE
    if view.soft_cap:
        scores = view.soft_cap * torch.tanh(scores / view.soft_cap)
    if view.alibi_slopes is not None:
        distance = position - torch.arange(start, position + 1)
        scores = scores - view.alibi_slopes.double().cpu()[:, None] * distance
    values = [torch.einsum("hs,shd->hd", (scores - scores.amax(1, True)).exp(), value)]
    tops, sums = [scores.amax(1)], [(scores - scores.amax(1, True)).exp().sum(1)]
    if branch is not None:
        values.append(branch[0].double())
        tops.append(branch[1].double())
        sums.append(branch[1].isfinite().double())
    if view.sinks is not None:
        values.append(torch.zeros_like(values[0]))
        tops.append(view.sinks.double().cpu())
        sums.append(torch.ones(HEADS, dtype=torch.float64))
    weights = (torch.stack(tops) - torch.stack(tops).amax(0)).exp().nan_to_num(0)
    total = (weights * torch.stack(sums)).sum(0)
    return (weights[..., None] * torch.stack(values)).sum(0) / total[:, None]


def branch_of(tokens: int) -> tuple[Tensor, Tensor]:
    """What was found before the windows; nothing for every third token."""
    output, lse = torch.randn(tokens, HEADS, HEAD_SIZE), torch.randn(tokens, HEADS)
    output[::3], lse[::3] = 0, -torch.inf
    return output.to(DEVICE), lse.to(DEVICE)


VIEWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "soft cap": {"soft_cap": 2.0},
    "sinks": {"sinks": torch.tensor([0.0, 3.0, -9.0, 1.0])},
    "ALiBi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])},
}


def of(name: str) -> View:
    on_device = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in VIEWS[name].items()}
    return View(Geometry(), **on_device)


def integers(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("with_branch", [False, True])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("splits", [1, 2, 3, 8])
def test_decodes_are_the_reference(splits: int, view: str, with_branch: bool) -> None:
    key, value, table = paged(ROWS)
    query, seen = torch.randn(len(ROWS), HEADS, HEAD_SIZE, device=DEVICE), of(view)
    branch = branch_of(len(ROWS)) if with_branch else None
    workspace = decode.decode_workspace(len(ROWS), HEADS, HEAD_SIZE, splits, DEVICE).fill_(torch.nan)
    out, lens, starts = torch.empty_like(query), *(integers(x) for x in zip(*ROWS, strict=True))
    launch = Launch(16, 16, 4, 1)
    common = query, key, value, table, lens, None, None, seen, SCALE, out, workspace, splits
    decode.lambda_decode(*common, launch=launch, starts=starts, branch=branch)
    for row, (length, start) in enumerate(ROWS[:-1]):
        keys = tuple(x[table[row].long()].flatten(0, 1)[:length].cpu() for x in (key, value))
        own = None if branch is None else (branch[0][row].cpu(), branch[1][row].cpu())
        want = expected(query[row].cpu(), length - 1, start, keys, seen, own)
        assert (out[row].cpu() - want).abs().max() < 2e-6
    assert out[-1].isfinite().all()  # of padding, which nobody reads


@pytest.mark.parametrize("view", VIEWS)
def test_chunks_are_the_reference(view: str) -> None:
    counts = [21, 3, 17, 1, 5, 0]
    key, value, table = paged(ROWS)
    query, seen, branch = (
        torch.randn(sum(counts), HEADS, HEAD_SIZE, device=DEVICE),
        of(view),
        branch_of(sum(counts)),
    )
    lens, starts = (integers(x) for x in zip(*ROWS, strict=True))
    begins, out = [0, *torch.tensor(counts).cumsum(0).tolist()], torch.empty_like(query)
    more = seen.soft_cap, seen.sinks, seen.alibi_slopes
    stepped_attention(
        query, key, value, table, starts, lens, integers(begins), max(counts), SCALE, out, branch, *more
    )
    for row, (length, start) in enumerate(ROWS[:-1]):
        keys = tuple(x[table[row].long()].flatten(0, 1)[:length].cpu() for x in (key, value))
        for token in range(begins[row], begins[row + 1]):
            position = length - begins[row + 1] + token
            if position < start:
                continue
            own = branch[0][token].cpu(), branch[1][token].cpu()
            want = expected(query[token].cpu(), position, start, keys, seen, own)
            assert (out[token].cpu() - want).abs().max() < 2e-6


class Counted:
    """Of a kernel only its grid."""

    def __init__(self) -> None:
        self.programs: list[int] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.programs.append(int(torch.tensor(grid).prod()))
        return lambda *args, **kwargs: None


@pytest.mark.parametrize(("rows", "window"), [(1, 4096), (1, 24576), (4, 4096), (16, 4096), (132, 4096)])
def test_one_request_fills_the_device(rows: int, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An 8B model has 8 KV heads: without a split a request would be 8 programs on 132 multiprocessors."""
    kv_heads, view, counted = 8, View(Geometry()), Counted()
    monkeypatch.setattr(decode, "_decode", counted)
    monkeypatch.setattr(decode, "_merge", Counted())
    splits = decode.decode_splits(view, rows, kv_heads, H100_SMS, window)
    query = torch.empty(rows, 32, 128, device="meta")
    cache = torch.empty(4, 32, kv_heads, 256, device="meta").split(128, -1)
    lens = torch.empty(rows, dtype=torch.int32, device="meta")
    workspace = decode.decode_workspace(rows, 32, 128, splits, torch.device("meta"))
    table = torch.empty(rows, 1, dtype=torch.int32, device="meta")
    out = torch.empty_like(query)
    decode.lambda_decode(
        query, *cache, table, lens, None, None, view, 1.0, out, workspace, splits, starts=lens
    )
    (programs,) = counted.programs
    assert programs == rows * kv_heads * splits >= H100_SMS
    assert splits == 1 or window / splits >= 2 * decode.SHARE  # no share is too small
