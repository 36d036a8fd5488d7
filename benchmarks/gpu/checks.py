"""Are the kernels right on this card?

Their own tests, compiled; and real shapes at real lengths against float64.

A check holds only the keys that its queries may see: the others' blocks are the null block, full of NaN.
Stored keys are rotated and rounded; the reference starts from just these numbers, turned back in float64, so
that an error is the kernel's own. The first keys are larger than the others, or nobody would notice them
among thousands. Values are of size 1, and so are errors.
"""

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import triton
from gpu.kernels import K, Plan, device, in_host_memory, integers, look_up, of_name, shapes, turns, view_of
from gpu.models import BLOCK_SIZE, N_GLOBAL, Shape
from torch import Tensor

if TYPE_CHECKING:
    from gpu.report import Record
    from gpu.run_all import Setting

Run = Callable[[Shape, Tensor, Tensor, Tensor, int], Tensor]
ROOT = Path(__file__).parents[2]
SAMPLED = 4  # queries of a chunk that are compared
# Scores of first keys come from two vectors that were turned, so rounded, again; probabilities and the output
# are rounded once.
ROUNDINGS = 8

# Those that run on a GPU where there is one.
TESTS = ("cuda/**/test_*.py", "**/test_*_gpu.py")


def tests_plan(setting: "Setting") -> Plan:
    files = {
        str(path.relative_to(ROOT)) for pattern in TESTS for path in (ROOT / "tests" / "fast").glob(pattern)
    }
    return [{"file": name} for name in sorted(files)]


def tests(record: "Record", plan: Plan, setting: "Setting") -> None:
    """The tests of what runs on a GPU, kernels compiled, all files at once.

    Raises RuntimeError if one fails or none ran.
    """
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    start = partial(
        subprocess.Popen, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    running = [start([*command, row["file"]]) for row in plan]
    wrong = [] if plan else ["tests/ is not there"]
    for row, process in zip(plan, running, strict=True):
        output = process.communicate()[0]
        print(output)
        counts = outcome(output)
        record.add(**row, **counts)
        if process.returncode or not counts["passed"]:
            wrong += re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE) or [
                f"{row['file']} did not run"
            ]
    record.note(failed=len(wrong))
    if wrong:
        raise RuntimeError(f"{len(wrong)} tests fail, the first is {wrong[0]}")


def outcome(output: str) -> dict[str, int]:
    """Counts from pytest's last line."""
    last = output.strip().rpartition("\n")[2]
    found = {name: re.search(rf"(\d+) {name}", last) for name in ("passed", "failed", "skipped")}
    return {name: int(match[1]) if match else 0 for name, match in found.items()}


def checks_plan(setting: "Setting") -> Plan:
    plan: Plan = []
    for s, dtype in itertools.product(shapes(setting), ("float16", "bfloat16")):
        lengths = (s.trained // 2, 4 * s.trained, 1 << 20)
        kernels = [("decode", 1, n) for n in lengths] + [
            ("prefill", min(512, s.trained // 4), n) for n in lengths
        ]
        kernels += [("lookup", 1, 1 << 17), ("lookup", 3, 1 << 17), ("lookup in host memory", 1, 1 << 17)]
        plan += [
            {"kernel": k, "shape": s.name, "dtype": dtype, "length": n, "queries": q} for k, q, n in kernels
        ]
    return plan


def checks(record: "Record", plan: Plan, setting: "Setting") -> None:
    """Largest errors. Raises RuntimeError at the end if one is not tolerated."""
    torch.manual_seed(0)
    wrong = []
    for row in plan:
        shape, dtype = of_name(setting, row["shape"]), getattr(torch, row["dtype"])
        check = CHECKS.get(row["kernel"], lambda_error)
        error = check(shape, dtype, row["length"], row["queries"])
        tolerated = ROUNDINGS * torch.finfo(dtype).eps
        record.add(**row, error=error, error_to_tolerance=error / tolerated)
        if not error <= tolerated:
            wrong.append(row)
    if wrong:
        raise RuntimeError(f"{len(wrong)} of {len(plan)} checks fail, the first is {wrong[0]}")


def lambda_error(
    shape: Shape, dtype: torch.dtype, length: int, queries: int, run: Run | None = None
) -> float:
    """Of the last `queries` tokens of a text, by the decode kernel if there is one and by the kernel for
    chunks otherwise.

    run: something else, called as `run_lambda` is.
    """
    from vllm_longctx import reference
    from vllm_longctx.geometry import branches
    from vllm_longctx.rotary import Rotary, inverse_frequencies

    frequencies, view = inverse_frequencies(shape.head_size, {"rope_theta": shape.rope_theta}), view_of(shape)
    at = torch.arange(length - queries, length)
    first_seen = max(int(at[0]) - shape.trained + 1, N_GLOBAL)
    keys_at = torch.cat((torch.arange(min(N_GLOBAL, length)), torch.arange(first_seen, length)))
    query = rotated(2 * torch.randn(queries, shape.heads, shape.head_size), at, frequencies).to(dtype)
    key = torch.randn(len(keys_at), shape.kv_heads, shape.head_size)
    key[:N_GLOBAL] *= 1.5
    key = rotated(key, keys_at, frequencies).to(dtype)
    value = torch.randn(key.shape).to(dtype)
    sample = torch.linspace(0, queries - 1, min(queries, SAMPLED)).long()
    expected = reference.attention(
        rotated(query[sample], -at[sample], frequencies),
        rotated(key, -keys_at, frequencies),
        value,
        branches(view.geometry, at[sample], keys_at),
        shape.scale,
        Rotary(shape.head_size, shape.head_size, True, frequencies),
    )
    cache, table = paged(key, value, keys_at, length)
    got = (run or run_lambda)(shape, query.to(device()), cache, table, length)
    return float((got[sample].cpu().double() - expected).abs().max().nan_to_num(torch.inf))


def run_lambda(shape: Shape, query: Tensor, cache: Tensor, table: Tensor, length: int) -> Tensor:
    from vllm_longctx.cuda.kernels.lambda_attention import lambda_attention
    from vllm_longctx.cuda.kernels.lambda_decode import decode_workspace, lambda_decode

    view, out, splits = view_of(shape), torch.full_like(query, torch.nan), 4
    common = query, *cache.chunk(2, -1), table, integers([length])
    turn, key_turn = turns(shape, view, torch.arange(length - len(query), length))
    if len(query) == 1:
        workspace = decode_workspace(1, shape.heads, shape.head_size, splits, device())
        lambda_decode(*common, turn, key_turn, view, shape.scale, out, workspace, splits)
    else:
        starts = integers([0, len(query)])
        lambda_attention(*common, starts, len(query), turn, key_turn, view, shape.scale, out)
    return out


def lookup_error(shape: Shape, dtype: torch.dtype, length: int, queries: int, apart: bool = False) -> float:
    """Of the attention to a memory's exactly best keys, of one query as decodes in CUDA graphs have it.

    apart: in host memory.
    """
    from vllm_longctx.cuda.kernels.lookup import Memories

    group = shape.heads // shape.kv_heads
    query = torch.randn(1, queries, shape.heads, shape.head_size, device=device()).to(dtype)
    size = triton.cdiv(length, BLOCK_SIZE), BLOCK_SIZE, shape.kv_heads, 2 * shape.head_size
    cache = torch.randn(size, device=device()).to(dtype)
    key_cache, value_cache = cache.chunk(2, -1)
    order = torch.randperm(len(cache), device=device())
    with in_host_memory(cache) if apart else nullcontext(cache) as read:
        memories = Memories(*read.chunk(2, -1), order.int()[None], integers([0]), integers([length]), length)
        output = look_up(query, memories, shape.scale, None)[0].cpu().to(device())  # waits
    worst = 0.0
    for head in range(shape.heads):  # one at a time: all in float64 would not fit
        key, value = (
            x[order, :, head // group].flatten(0, 1)[:length].double() for x in (key_cache, value_cache)
        )
        best = (query[0, :, head].double() @ key.T * shape.scale).topk(K, -1)
        expected = torch.einsum("tk,tkd->td", best.values.softmax(-1), value[best.indices])
        worst = max(worst, float((output[:, head].double() - expected).abs().max().nan_to_num(torch.inf)))
    return worst


CHECKS = {"lookup": lookup_error, "lookup in host memory": partial(lookup_error, apart=True)}


def rotated(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """x [n, heads, head_size] turned by positions [n], in float64 throughout."""
    angles = (positions[:, None] * frequencies.double())[:, None]
    a, b = x.double().chunk(2, -1)
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)


def paged(key: Tensor, value: Tensor, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """A cache [blocks, BLOCK_SIZE, kv_heads, 2 * head_size] of keys at `positions`, else NaN; its table [1,
    columns].
    """
    used = positions.div(BLOCK_SIZE, rounding_mode="floor").unique()
    table = torch.zeros(1, triton.cdiv(length, BLOCK_SIZE), dtype=torch.int32)
    table[0, used] = (torch.randperm(len(used)) + 1).int()
    cache = torch.full(
        (len(used) + 1, BLOCK_SIZE, key.shape[1], 2 * key.shape[2]), torch.nan, dtype=key.dtype
    )
    cache[table[0, positions // BLOCK_SIZE].long(), positions % BLOCK_SIZE] = torch.cat((key, value), -1)
    return cache.to(device()), table.to(device())
