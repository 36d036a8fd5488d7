"""The Triton lookup against `retrieval`, which it must equal, and against dense float64.

Without a GPU, interpreted.
"""

import pytest
import torch
from torch import Tensor

from vllm_longctx import reference
from vllm_longctx.cpu.kernels import retrieval
from vllm_longctx.cpu.kernels.branches import additive, attend
from vllm_longctx.cuda.kernels import lookup
from vllm_longctx.cuda.kernels.lookup import Memories, Summaries
from vllm_longctx.cuda.kernels.stepped import stepped_attention
from vllm_longctx.geometry import local_branch, memory_branch
from vllm_longctx.rotary import Rotary, inverse_frequencies

pytestmark = pytest.mark.usefixtures("one_thread")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE = 0.4


def merge(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    """One softmax over two branches: outputs [..., d], log-sum-exps [...]; a has keys everywhere.

    float32 [..., d].
    """
    total = torch.logaddexp(a[1], b[1])
    weight_a, weight_b = ((lse - total).exp().unsqueeze(-1) for lse in (a[1], b[1]))
    return torch.addcmul(a[0].float() * weight_a, b[0].float(), weight_b)


def paged(keys: Tensor, values: Tensor, num_blocks: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Key and value caches as vLLM's backends see theirs, NaN where nothing was written, and tables of
    shuffled blocks.

    keys, values [rows, S, kv_heads, d].
    """
    rows, length, kv_heads, d = keys.shape
    table = torch.randperm(num_blocks)[: rows * -(-length // block)].view(rows, -1)
    cache = torch.full((num_blocks, kv_heads, block, 2 * d), torch.nan, dtype=keys.dtype)
    place = torch.arange(length)
    for row in range(rows):
        both = torch.cat((keys[row], values[row]), -1)
        cache[table[row][place // block], :, place % block] = both
    key_cache, value_cache = cache.to(DEVICE).transpose(1, 2).chunk(2, -1)
    return key_cache, value_cache, table.int().to(DEVICE)


def memories(
    keys: Tensor, values: Tensor, begins: list[int], ends: list[int], block: int = 16, coded: bool = False
) -> Memories:
    key_cache, value_cache, table = paged(keys, values, 2 + len(keys) * -(-keys.shape[1] // block), block)
    bounds = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (begins, ends))
    summaries = None
    if coded:
        summaries = Summaries.like(key_cache)
        for row, end in enumerate(ends):
            first = torch.arange(-(-end // block), device=DEVICE)
            summaries.summarise(
                key_cache, table[row, : len(first)].long(), (end - first * block).clamp_max(block)
            )
    return Memories(key_cache, value_cache, table, *bounds, max(ends), summaries)


def on_cpu(m: Memories, row: int) -> retrieval.Memory:
    """A row's memory as `retrieval` takes it, with codes of its own."""
    blocks = torch.stack((m.key_cache, m.value_cache), 1).permute(0, 3, 1, 2, 4).cpu().contiguous()
    num_blocks, kv_heads, _, block, d = blocks.shape
    order = torch.arange(block * d).view(block, d)
    pages = retrieval.Pages(blocks.view(num_blocks, kv_heads, block, 2 * d), (order, order))
    end, codes = int(m.ends[row]), retrieval.Codes.empty(num_blocks, kv_heads, block, d)
    first = torch.arange(-(-end // block))
    codes.summarise(
        pages, m.block_table[row].cpu().long()[: len(first)], (end - first * block).clamp_max(block)
    )
    return retrieval.Memory(pages, m.block_table[row].cpu().long(), int(m.begins[row]), end, codes)


def dense(query: Tensor, m: Memories, row: int, soft_cap: float = 0.0) -> tuple[Tensor, Tensor]:
    """Scores [T, heads, S] and values [S, heads, d] of a row's whole memory, float64."""
    inside = slice(int(m.begins[row]), int(m.ends[row]))
    group = query.shape[1] // m.kv_heads
    keys, values = (
        x[m.block_table[row].long()].flatten(0, 1)[inside].double().cpu().repeat_interleave(group, 1)
        for x in (m.key_cache, m.value_cache)
    )
    scores = torch.einsum("thd,shd->ths", query.double().cpu(), keys) * SCALE
    return soft_cap * torch.tanh(scores / soft_cap) if soft_cap else scores, values


def attend_dense(
    query: Tensor, m: Memories, row: int, k: int, soft_cap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [T, heads, d] and log-sum-exp [T, heads] over the k best, and where the k-th is clearly better
    than the next.
    """
    scores, values = dense(query, m, row, soft_cap)
    best = scores.topk(min(k + 1, scores.shape[-1]), -1)
    clear = torch.ones(scores.shape[:2], dtype=torch.bool)
    if scores.shape[-1] > k:
        clear = best.values[..., k - 1] - best.values[..., k] > 1e-5
    top, places = best.values[..., :k], best.indices[..., :k]
    weights = torch.zeros_like(scores).scatter(-1, places, top.softmax(-1))
    return torch.einsum("ths,shd->thd", weights, values), top.logsumexp(-1), clear


@pytest.mark.parametrize(
    ("dtype", "kv_heads", "group", "d", "block", "length", "k", "soft_cap"),
    [
        (torch.float32, 2, 4, 16, 16, 1, 5, 0.0),  # decode
        (torch.float16, 2, 1, 24, 32, 1, 40, 0.0),  # a head size that is no power of two; no GQA
        (torch.bfloat16, 2, 2, 32, 16, 3, 3, 0.0),  # chunked prefill
        (torch.float32, 1, 5, 16, 32, 13, 2, 0.0),  # two tiles of queries, the second ragged
        (torch.float16, 1, 2, 16, 128, 2, 70, 0.0),
        (torch.float32, 1, 2, 16, 16, 2, 40, 5.0),  # fewer keys than k in one of the memories
    ],
)
def test_kernel_finds_and_attends_to_the_best_keys(
    dtype: torch.dtype, kv_heads: int, group: int, d: int, block: int, length: int, k: int, soft_cap: float
) -> None:
    """A memory that ends inside a block, one that begins inside one, one of whole blocks; the last alone
    where T is large.
    """
    keys, values = (torch.randn(3, 4 * block, kv_heads, d).to(dtype) for _ in range(2))
    m = memories(keys, values, [0, 5, 0], [3 * block + 7, 2 * block - 1, 4 * block], block)
    query = torch.randn(3, length, kv_heads * group, d).to(dtype).to(DEVICE)
    if length > 3:
        m, query = m.rows(slice(2, 3)), query[2:]
    output, lse = (x.cpu() for x in lookup.attend_best(query, m, k, SCALE, soft_cap=soft_cap))
    scores, positions = (x.cpu() for x in lookup.unpack(lookup.top_k(query, m, k)))
    for row in range(len(query)):
        expected, expected_lse, clear = attend_dense(query[row], m, row, k, soft_cap)
        assert clear.float().mean() > 0.9
        assert (output[row] - expected)[clear].abs().max() < 2e-6
        assert (lse[row] - expected_lse).abs().max() < 2e-6
        found = retrieval.top_k(query[row].cpu(), on_cpu(m, row), k, SCALE)
        there = ~found.scores.isneginf()
        assert torch.equal(~scores[row].isneginf(), there)
        assert (scores[row] * SCALE - found.scores)[there].abs().max() < 1e-5
        assert (positions[row] == found.positions)[
            there & clear.unsqueeze(-1)
        ].float().mean() > 0.98  # order of near ties


def test_kernel_with_k_beyond_the_memory_attends_to_all() -> None:
    m = memories(*torch.randn(2, 2, 40, 2, 16), [0, 3], [40, 20])
    query = torch.randn(2, 2, 4, 16)
    output, lse = lookup.attend_best(query.to(DEVICE), m, 64, SCALE)
    for row in range(2):
        scores, values = dense(query[row], m, row)
        assert (
            output[row].cpu() - torch.einsum("ths,shd->thd", scores.softmax(-1), values)
        ).abs().max() < 1e-6
        assert (lse[row].cpu() - scores.logsumexp(-1)).abs().max() < 1e-6


def test_kernel_takes_the_earlier_of_equal_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    m = memories(*torch.ones(2, 1, 90, 2, 16), [3], [90], coded=True)
    query = torch.randn(1, 2, 4, 16, device=DEVICE)
    for workspace in (lookup.WORKSPACE, 16):
        monkeypatch.setattr(lookup, "WORKSPACE", workspace)
        for best in (lookup.top_k(query, m, 20), lookup.best_blocks(query, m, 20, 0.5, least=2)):
            assert torch.equal(lookup.unpack(best)[1].cpu(), torch.arange(3, 23).expand(1, 2, 4, -1))


def test_kernel_of_an_empty_memory_leaves_the_window() -> None:
    """Also beside a row that has one; a row of padding reads nothing."""
    m = memories(*torch.randn(2, 3, 30, 2, 16), [0, 4, 0], [0, 4, 30], coded=True)
    query = torch.randn(3, 1, 4, 16, device=DEVICE)
    for share in (None, 0.5):
        output, lse = lookup.attend_best(query, m, 4, SCALE, share)
        assert (output[:2] == 0).all() and lse[:2].isneginf().all() and lse[2].isfinite().all()
        window = torch.randn(3, 1, 4, 16, device=DEVICE), torch.randn(3, 1, 4, device=DEVICE)
        merged = merge(window, (output, lse))
        assert torch.equal(merged[:2], window[0][:2]) and not torch.equal(merged[2], window[0][2])
    nobody = Memories(m.key_cache, m.value_cache, m.block_table, m.begins, m.begins, 0)
    assert lookup.attend_best(query, nobody, 4, SCALE)[1].isneginf().all()


@pytest.mark.parametrize("share", [None, 0.3])
def test_kernel_results_do_not_depend_on_tiles_or_company(
    monkeypatch: pytest.MonkeyPatch, share: float | None
) -> None:
    m = memories(*torch.randn(2, 3, 200, 2, 16), [0, 5, 0], [200, 150, 9], coded=True)
    query = torch.randn(3, 3, 2, 16, device=DEVICE)
    monkeypatch.setattr(lookup, "SCANNED", 2)
    whole = lookup.attend_best(query, m, 3, SCALE, share)
    monkeypatch.setattr(lookup, "WORKSPACE", 700)
    monkeypatch.setattr(lookup, "QUERY_TILE", 2)
    tiled = lookup.attend_best(query, m, 3, SCALE, share)
    alone = [
        lookup.attend_best(query[row : row + 1], m.rows(slice(row, row + 1)), 3, SCALE, share)
        for row in range(3)
    ]
    for which in (0, 1):
        assert torch.allclose(tiled[which], whole[which], atol=1e-6)
        assert torch.allclose(torch.cat([x[which] for x in alone]), whole[which], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_by_blocks_is_retrievals(dtype: torch.dtype) -> None:
    """The same codes, the same blocks chosen by the same bounds, each row as if alone."""
    keys = torch.randn(2, 330, 2, 16) * (1.5 * torch.randn(2, 330, 1, 1)).exp()
    m = memories(keys.to(dtype), torch.randn(2, 330, 2, 16).to(dtype), [0, 20], [330, 201], coded=True)
    assert m.summaries is not None
    query = torch.randn(2, 3, 8, 16).to(dtype)
    best = lookup.best_blocks(query.to(DEVICE), m, 4, 0.3, least=2)
    scores, positions = (x.cpu() for x in lookup.unpack(best))
    exact = lookup.unpack(lookup.top_k(query.to(DEVICE), m, 4))[1].cpu()
    for row in range(2):
        cpu = on_cpu(m, row)
        assert cpu.codes is not None
        used = cpu.blocks
        assert torch.equal(
            m.summaries.codes[used].cpu().transpose(1, 2), cpu.codes.codes[:, used].transpose(0, 1)
        )
        assert torch.equal(m.summaries.steps[used].cpu(), cpu.codes.steps[:, used].T)
        found = retrieval.best_blocks(query[row], cpu, 4, SCALE, 0.3, least=2)
        assert found.keys_read < 0.35 * 330
        assert torch.equal(positions[row], found.positions)
        assert (scores[row] * SCALE - found.scores).abs().max() < 1e-4
        assert torch.equal(exact[row][found.proven], positions[row][found.proven])
    assert not torch.equal(exact, positions)  # so blocks were chosen


def test_kernel_and_window_are_the_reference() -> None:
    """One softmax over a stepped window and the best keys before it, as if these were the first in it."""
    context, queries, k, d = 50, 6, 9, 16
    rotary = Rotary(d, d, True, inverse_frequencies(d, {"rope_theta": 50.0}))
    query, (key, value) = torch.randn(queries, 4, d), torch.randn(2, context + queries, 2, d)
    keys, positions = torch.arange(context + queries), torch.arange(context, context + queries)
    start = torch.full_like(positions, context)
    local = local_branch(positions, keys, start)
    margins: list[float] = []
    sees = [local, memory_branch(positions, keys, start, k)]
    expected = reference.attention(query, key, value, sees, SCALE, rotary, margins=margins)
    assert min(margins) > 1e-5
    turned = rotary.turn(query, (positions - context)[:, None])
    own = rotary.turn(key[context:], (keys[context:] - context)[:, None])
    by_head = (x.transpose(0, 1)[None] for x in (turned, own, value[context:]))
    output, lse = (
        x[0].transpose(0, 1).to(DEVICE) for x in attend(*by_head, additive(local.visible[:, context:]), SCALE)
    )
    m = memories(key[None, :context], value[None, :context], [0], [context])
    found = lookup.attend_best(turned[None].to(DEVICE), m, k, SCALE)
    assert (merge((output, lse), (found[0][0], found[1][0])).cpu() - expected).abs().max() < 2e-6


@pytest.mark.parametrize(
    ("dtype", "soft_cap", "sinks"),
    [
        (torch.float32, 0.0, None),
        (torch.float16, 0.0, None),
        (torch.float32, 2.0, torch.tensor([0.0, 3.0, -9.0, 9.0])),
    ],
)
def test_kernel_of_stepped_windows_joins_what_was_found(
    dtype: torch.dtype, soft_cap: float, sinks: Tensor | None
) -> None:
    """Two chunks and a decode, whose windows begin inside a block, at one, and at the query; padding at the
    end.
    """
    keys, values = (torch.randn(4, 70, 2, 16).to(dtype) for _ in range(2))
    lens, starts, counts = [70, 45, 33, 0], [37, 16, 32, 0], [21, 3, 1, 0]
    m = memories(keys, values, [0, 0, 0, 0], starts)
    query = torch.randn(sum(counts), 4, 16).to(dtype).to(DEVICE)
    begins = torch.tensor([0, *counts]).cumsum(0).int().to(DEVICE)
    branch = (
        torch.zeros(len(query), 4, 16, device=DEVICE),
        torch.full((len(query), 4), -torch.inf, device=DEVICE),
    )
    first = begins.tolist()
    for row in (0, 2):  # row 1 has nothing to join
        tokens = slice(first[row], first[row + 1])
        for x, found in zip(
            branch,
            lookup.attend_best(query[None, tokens], m.rows(slice(row, row + 1)), 5, SCALE, None, soft_cap),
            strict=True,
        ):
            x[tokens] = found[0]
    bounds = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (starts, lens))
    out = torch.empty_like(query)
    common = (query, m.key_cache, m.value_cache, m.block_table, *bounds, begins, max(counts), SCALE, out)
    stepped_attention(*common, branch, soft_cap, None if sinks is None else sinks.to(DEVICE))
    for row in range(3):
        queries = query[first[row] : first[row + 1]].cpu()
        group = queries.shape[1] // 2
        k, v = (x[row, : lens[row]].double().repeat_interleave(group, 1) for x in (keys, values))
        scores = torch.einsum("thd,shd->ths", queries.double(), k) * SCALE
        positions = torch.arange(lens[row] - counts[row], lens[row])[:, None, None]
        place = torch.arange(lens[row])
        seen = ((place >= starts[row]) & (place <= positions)).expand_as(scores).clone()
        if row != 1:
            best = scores[..., : starts[row]].topk(5, -1).indices
            seen.scatter_(-1, best, True)
        if soft_cap:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        scores = scores.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            of_sinks = sinks.double()[None, :, None].expand(len(scores), -1, -1)
            scores = torch.cat((scores, of_sinks), -1)
        weights = scores.softmax(-1)[..., : lens[row]]
        error = (
            (out[first[row] : first[row + 1]].cpu() - torch.einsum("ths,shd->thd", weights, v)).abs().max()
        )
        assert error < (
            2e-6 if dtype == torch.float32 else 2e-3
        )  # half precision: of the weights and of the output
