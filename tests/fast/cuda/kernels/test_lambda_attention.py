"""Λ attention kernels against the dense float64 reference: compiled where there is a GPU, interpreted
elsewhere.
"""

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_longctx import reference
from vllm_longctx.cuda.kernels.lambda_attention import lambda_attention
from vllm_longctx.cuda.kernels.lambda_decode import decode_splits, decode_workspace, lambda_decode
from vllm_longctx.cuda.kernels.lambda_tile import Launch, View
from vllm_longctx.geometry import Geometry, alibi_slopes, branches
from vllm_longctx.rotary import Rotary, inverse_frequencies

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter computes with numpy, which has no bfloat16: its dot product multiplies the bit patterns.
HALVES = [torch.float16, torch.bfloat16] if DEVICE.type == "cuda" else [torch.float16]
SMALL = Launch(rows=32, keys=16, num_warps=4, num_stages=2)  # many tiles in short texts

LAMBDA = Geometry(n_global=5, n_local=24, distance_ceiling=24)
IN_CACHE = Geometry(n_global=5, n_local=24, distances="in_cache")
DECODES = ((70, 1), (24, 1), (25, 1), (1, 1))
MIXED = ((70, 33), (24, 24), (31, 9), (1, 1))


@dataclass(frozen=True)
class Case:
    """A batch. lens: of each row the tokens in the cache, the step's included, and those of the step."""

    geometry: Geometry = LAMBDA
    lens: tuple[tuple[int, int], ...] = DECODES
    heads: int = 2
    kv_heads: int = 1
    head_size: int = 32
    rotary_dim: int | None = None
    is_neox: bool = True
    alibi: bool = False
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    slots_first: bool = False
    soft_cap: float = 0.0
    sinks: torch.dtype | None = None
    launch: Launch | None = SMALL

    def rotary(self) -> Rotary | None:
        if self.alibi:
            return None
        rotary_dim = self.rotary_dim or self.head_size
        return Rotary(
            self.head_size, rotary_dim, self.is_neox, inverse_frequencies(rotary_dim, {"rope_theta": 50.0})
        )

    def slopes(self) -> Tensor | None:
        return alibi_slopes(self.heads).float() if self.alibi else None

    def of_sinks(self) -> Tensor | None:
        """One far below its head's scores, one far above, the others among them."""
        return None if self.sinks is None else torch.linspace(-6, 6, self.heads).roll(1).to(self.sinks)


CASES = {
    "Λ": Case(),
    "ceiling above the window": Case(Geometry(5, 24, 40)),
    "ceiling below the window": Case(Geometry(5, 24, 10)),
    "no ceiling": Case(Geometry(5, 24)),
    "in the cache": Case(IN_CACHE),
    "sliding window": Case(Geometry(0, 24)),
    "plain": Case(Geometry()),
    "one first token, odd window": Case(Geometry(1, 23, 23)),
    "more first tokens than a tile has": Case(Geometry(70, 20, 100), ((200, 1), (95, 1), (75, 1))),
    "as many first tokens as the window has": Case(Geometry(24, 24, 24)),
    "groups of 1": Case(heads=2, kv_heads=2),
    "group of 3": Case(heads=3),
    "groups of 4": Case(heads=8, kv_heads=2, launch=None),
    "group of 8": Case(heads=8, launch=None),
    "group of 24": Case(heads=24, lens=((70, 1), (24, 1)), launch=None),
    "head 64, partial": Case(head_size=64, rotary_dim=16),
    "head 80, partial, interleaved": Case(head_size=80, rotary_dim=32, is_neox=False),
    "head 96": Case(head_size=96),
    "head 128, as launched": Case(head_size=128, launch=None),
    "head 256, interleaved": Case(Geometry(5, 24, 40), head_size=256, is_neox=False, launch=None),
    "interleaved, in the cache": Case(IN_CACHE, is_neox=False),
    "ALiBi": Case(alibi=True),
    "ALiBi, ceiling above the window": Case(Geometry(5, 24, 40), alibi=True),
    "ALiBi in the cache": Case(IN_CACHE, alibi=True),
    "soft cap": Case(Geometry(), soft_cap=2.0),
    "sinks": Case(IN_CACHE, heads=4, sinks=torch.float32),
    "soft cap and sinks": Case(Geometry(5, 24, 40), heads=8, kv_heads=2, soft_cap=2.0, sinks=torch.bfloat16),
    "blocks of 32": Case(block_size=32),
    "blocks of 48": Case(block_size=48),
    "slots before heads": Case(heads=4, kv_heads=2, slots_first=True),
    **{f"{str(dtype)[6:]}": Case(Geometry(5, 24, 40), dtype=dtype) for dtype in HALVES},
    **{f"{str(dtype)[6:]}, ALiBi": Case(dtype=dtype, alibi=True, launch=None) for dtype in HALVES},
}
cases = pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])


@dataclass(frozen=True)
class Batch:
    """Texts in a paged cache of which every slot that nobody may see is NaN.

    expected: float64 [tokens, heads, head_size].
    """

    case: Case
    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_table: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    positions: Tensor
    expected: Tensor

    def decode(self, splits: int, lse: Tensor | None = None) -> Tensor:
        c, out = self.case, torch.full_like(self.query, torch.nan)
        workspace = decode_workspace(len(self.query), c.heads, c.head_size, splits, DEVICE).fill_(torch.nan)
        common = (self.query, self.key_cache, self.value_cache, self.block_table, self.seq_lens)
        lambda_decode(
            *common,
            *self.turns(),
            self.view(),
            c.head_size**-0.5,
            out,
            workspace,
            splits,
            lse=lse,
            launch=c.launch,
        )
        return out.cpu().double()

    def attention(self, lse: Tensor | None = None) -> Tensor:
        c, out = self.case, torch.full_like(self.query, torch.nan)
        common = (
            self.query,
            self.key_cache,
            self.value_cache,
            self.block_table,
            self.seq_lens,
            self.query_start_loc,
        )
        longest = max(step for _, step in c.lens)
        lambda_attention(
            *common, longest, *self.turns(), self.view(), c.head_size**-0.5, out, lse=lse, launch=c.launch
        )
        return out.cpu().double()

    def view(self) -> View:
        slopes, rotary = self.case.slopes(), self.case.rotary()
        on_device = None if slopes is None else slopes.to(DEVICE)
        sinks = self.case.of_sinks()
        return View(
            self.case.geometry,
            rotary.rotary_dim if rotary else 0,
            self.case.is_neox,
            on_device,
            self.case.soft_cap,
            None if sinks is None else sinks.to(DEVICE),
        )

    def turns(self) -> list[tuple[Tensor, ...] | None]:
        """cos and sin for queries and first keys, as a backend makes them."""
        view, rotary = self.view(), self.case.rotary()
        by = (view.query_turn(self.positions), view.key_turn())
        return [None if p is None else tuple(t.to(DEVICE) for t in rotary.cos_sin(p)) for p in by]


def batch_of(case: Case) -> Batch:
    torch.manual_seed(0)
    rotary, bs, d = case.rotary(), case.block_size, case.head_size
    columns = max(-(-length // bs) for length, _ in case.lens) + 1
    num_blocks = 1 + len(case.lens) * columns
    shape = (
        (num_blocks, bs, case.kv_heads, 2 * d) if case.slots_first else (num_blocks, case.kv_heads, bs, 2 * d)
    )
    cache = torch.full(shape, torch.nan, dtype=case.dtype)
    cache = cache if case.slots_first else cache.transpose(1, 2)
    free = (1 + torch.randperm(num_blocks - 1)).tolist()
    block_table = torch.zeros(len(case.lens), columns, dtype=torch.int32)
    queries, positions, expected = [], [], []
    for row, (length, step) in enumerate(case.lens):
        at, keys = torch.arange(length - step, length), torch.arange(length)
        query, key, value = (
            torch.randn(n, h, d).to(case.dtype)
            for n, h in ((step, case.heads), (length, case.kv_heads), (length, case.kv_heads))
        )
        seen = branches(case.geometry, at, keys)
        own = {"soft_cap": case.soft_cap, "sinks": case.of_sinks()}
        expected.append(reference.attention(query, key, value, seen, d**-0.5, rotary, case.slopes(), **own))
        if rotary is not None:
            query, key = rotary.turn(query, at[:, None]), rotary.turn(key, keys[:, None])
        queries.append(query)
        positions.append(at)
        live = (seen[0].visible | seen[1].visible).any(0)
        for block in range(-(-length // bs)):
            slots = slice(block * bs, min((block + 1) * bs, length))
            if live[slots].any():
                block_table[row, block] = number = free.pop()
                cache[number, : slots.stop - slots.start] = torch.cat((key[slots], value[slots]), -1)
                cache[number, : slots.stop - slots.start][~live[slots]] = torch.nan
    steps = torch.tensor([step for _, step in case.lens])
    key_cache, value_cache = cache.to(DEVICE).split(d, dim=-1)
    return Batch(
        case,
        torch.cat(queries).to(DEVICE),
        key_cache,
        value_cache,
        block_table.to(DEVICE),
        torch.tensor([length for length, _ in case.lens], dtype=torch.int32, device=DEVICE),
        torch.cat((torch.zeros(1), steps.cumsum(0))).to(torch.int32).to(DEVICE),
        torch.cat(positions),
        torch.cat(expected),
    )


def tolerance(dtype: torch.dtype) -> float:
    """Scores of rotated keys carry a rounding of the key, those under the ceiling two; outputs are averages
    of size 1.
    """
    return 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps


def largest_error(got: Tensor, batch: Batch) -> float:
    error = float((got - batch.expected).abs().max())
    print(f"error {error:.1e}")
    return error


@cases
def test_the_decode_kernel_equals_the_reference(case: Case) -> None:
    batch = batch_of(case)
    assert largest_error(batch.decode(splits=3), batch) < tolerance(case.dtype)


@pytest.mark.parametrize("splits", [1, 2, 50])
def test_the_decode_kernel_equals_the_reference_however_split(splits: int) -> None:
    batch = batch_of(Case(lens=((70, 1), (24, 1)), sinks=torch.float32))
    assert largest_error(batch.decode(splits), batch) < 1e-5


@cases
def test_the_mixed_batch_kernel_equals_the_reference(case: Case) -> None:
    batch = batch_of(replace(case, lens=MIXED) if case.lens == DECODES else case)
    assert largest_error(batch.attention(), batch) < tolerance(case.dtype)


lengths = st.one_of(st.integers(1, 100), st.sampled_from([15, 16, 17, 31, 32, 33, 48]))


@settings(deadline=None, max_examples=8)
@given(
    st.builds(Geometry, st.integers(0, 20), st.integers(1, 50), st.integers(1, 70) | st.none()),
    st.lists(st.tuples(lengths, st.integers(1, 40)), min_size=1, max_size=3),
)
@example(Geometry(20, 1, 1), [(40, 1), (21, 21), (22, 2)])  # a window of the query alone
def test_the_kernels_at_any_length_equal_the_reference(
    geometry: Geometry, rows: list[tuple[int, int]]
) -> None:
    case = Case(
        geometry, tuple((length, min(step, length)) for length, step in rows), kv_heads=1, head_size=16
    )
    batch = batch_of(case)
    assert largest_error(batch.attention(), batch) < 1e-5
    batch = batch_of(replace(case, lens=tuple((length, 1) for length, _ in rows)))
    assert largest_error(batch.decode(2), batch) < 1e-5


def test_padding_rows_of_the_decode_kernel_give_zeros() -> None:
    batch = batch_of(Case(lens=((70, 1), (30, 1), (1, 1))))
    seq_lens = batch.seq_lens.clone()
    seq_lens[1] = 0
    batch.block_table[1] = 0
    for splits in (1, 3):
        got = replace(batch, seq_lens=seq_lens).decode(splits)
        assert not got[1].any()
        assert largest_error(got[[0, 2]], replace(batch, expected=batch.expected[[0, 2]])) < 1e-5


def test_padding_rows_and_tokens_of_the_mixed_kernel_are_left_alone() -> None:
    batch = batch_of(Case(lens=MIXED))
    tokens = len(batch.query)
    padded = replace(
        batch,
        query=torch.cat((batch.query, torch.full_like(batch.query[:7], torch.nan))),
        positions=torch.cat((batch.positions, torch.zeros(7, dtype=torch.int64))),
        seq_lens=torch.cat((batch.seq_lens, batch.seq_lens.new_zeros(2))),
        block_table=torch.cat((batch.block_table, torch.zeros_like(batch.block_table[:2]))),
        query_start_loc=torch.cat((batch.query_start_loc, batch.query_start_loc[-1:].expand(2))),
    )
    got = padded.attention()
    assert got[tokens:].isnan().all()
    assert largest_error(got[:tokens], batch) < 1e-5


@pytest.mark.parametrize("sinks", [None, torch.float32])
def test_the_kernels_give_log_sum_exps_of_their_scores(sinks: torch.dtype | None) -> None:
    """By which an attention over other keys, the memory's say, is joined."""
    batch = batch_of(Case(Geometry(0, 8), ((30, 1), (5, 1)), sinks=sinks))
    of_sinks, expected = batch.case.of_sinks(), []
    for row, (length, _) in enumerate(batch.case.lens):
        seen = torch.arange(max(length - 8, 0), length)
        keys = batch.key_cache.cpu()[batch.block_table[row].cpu()[seen // 16].long(), seen % 16, 0].double()
        expected.append((batch.query[row].cpu().double() @ keys.T * batch.case.head_size**-0.5).logsumexp(-1))
    if of_sinks is not None:
        expected = [torch.logaddexp(lse, of_sinks.double()) for lse in expected]
    for run in (batch.attention, partial(batch.decode, 1), partial(batch.decode, 3)):
        lse = torch.full(batch.query.shape[:2], torch.nan, device=DEVICE)
        run(lse=lse)
        assert (lse.cpu() - torch.stack(expected)).abs().max() < 1e-5


def test_the_kernels_write_into_strided_outputs() -> None:
    batch = batch_of(Case(lens=MIXED))
    tokens, heads, d = batch.query.shape
    wide = torch.zeros(tokens, 3 * heads, d, device=DEVICE)
    wide[:, heads : 2 * heads] = batch.query
    got = replace(batch, query=wide[:, heads : 2 * heads]).attention()
    assert largest_error(got, batch) < 1e-5


def test_the_kernels_read_float8_caches_with_their_scales() -> None:
    batch = batch_of(Case(lens=MIXED))
    k_scale, v_scale = 0.5, 2.0
    caches = [
        (c / s).to(torch.float8_e4m3fn) for c, s in ((batch.key_cache, k_scale), (batch.value_cache, v_scale))
    ]
    both = torch.cat(caches, -1)
    rounded = [c.float() * s for c, s in zip(both.split(32, -1), (k_scale, v_scale), strict=True)]
    expected = replace(batch, key_cache=rounded[0], value_cache=rounded[1].contiguous())
    expected = expected.attention()
    got = torch.full_like(batch.query, torch.nan)
    common = (batch.query, *both.split(32, -1), batch.block_table, batch.seq_lens, batch.query_start_loc, 33)
    lambda_attention(*common, *batch.turns(), batch.view(), 32**-0.5, got, k_scale, v_scale, launch=SMALL)
    assert (got.cpu().double() - expected).abs().max() < 1e-5


def test_the_kernels_refuse_what_they_would_misread() -> None:
    batch = batch_of(Case())
    with pytest.raises(ValueError, match="equal strides"):
        replace(batch, value_cache=batch.value_cache.contiguous()).attention()
    with pytest.raises(ValueError, match="must be contiguous float32"):
        replace(batch, positions=batch.positions[1:]).attention()
    view, out = batch.view(), torch.empty_like(batch.query)
    common = (batch.query, batch.key_cache, batch.value_cache, batch.block_table, batch.seq_lens)
    with pytest.raises(ValueError, match="were not given"):
        lambda_decode(*common, None, None, view, 1.0, out, out, 1)
    with pytest.raises(ValueError, match=r"sinks must be contiguous \(2,\), got \(3,\)"):
        lambda_decode(*common, *batch.turns(), replace(view, sinks=torch.empty(3)), 1.0, out, out, 1)
    with pytest.raises(ValueError, match="lse must be contiguous"):
        batch.attention(lse=torch.empty(3))
    with pytest.raises(ValueError, match="the workspace has"):
        lambda_decode(*common, *batch.turns(), view, 1.0, out, torch.empty(10), 2)


@pytest.mark.parametrize(("rows", "kv_heads"), [(1, 8), (1, 32), (16, 8), (16, 32), (256, 8), (0, 8)])
def test_decode_kernel_programs_fill_the_device_and_each_has_work(rows: int, kv_heads: int) -> None:
    view, sms, tiles = View(Geometry(10, 4096, 4096)), 132, 65
    splits = decode_splits(view, rows, kv_heads, sms, 1 << 20)
    share = -(-tiles // splits)
    assert share * (splits - 1) < tiles  # the last one is not idle
    assert rows * kv_heads * splits >= sms or share == 2
    assert decode_splits(view, rows, kv_heads, sms, 128) == 1  # texts too short to split
