"""Compiles the Triton kernels on a machine without a GPU, down to machine code; prints what each one takes.

    python tests/support/compile_kernels.py [case ...]       for an H100; every case by default
    python tests/support/compile_kernels.py --all [case ...] for every card of CARDS, by default every kernel
    python tests/support/compile_kernels.py --write          for every card, and writes kernel_resources.json

It exits with 1 where one does not compile, takes more shared memory than a card has, or other registers,
local and shared memory than kernel_resources.json says.

The interpreter runs kernels as numpy and accepts what the compiler refuses (types that do not agree, shapes
that are no power of two) and what the chip refuses (too much shared memory). So for every kernel, add cases
to CASES: functions that call the kernel's public launcher on `meta` tensors of real shapes. Inside
`compiling()` a launch compiles exactly the specialisation that the launch would have run, and runs nothing.
Kernels must have been imported without TRITON_INTERPRET.
"""

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from vllm_longctx.cuda.kernels.lambda_attention import lambda_attention
from vllm_longctx.cuda.kernels.lambda_decode import decode_splits, decode_workspace, lambda_decode
from vllm_longctx.cuda.kernels.lambda_tile import View
from vllm_longctx.cuda.kernels.lookup import Memories, Summaries, attend_best
from vllm_longctx.cuda.kernels.lookup_decode import attend_best_decode, lookup_splits, turned
from vllm_longctx.cuda.kernels.stepped import stepped_attention
from vllm_longctx.cuda.kernels.swap import PaddedCopies
from vllm_longctx.geometry import Geometry

H100_SMS = 132  # multiprocessors
# By compute capability, bytes of shared memory that a program can have: A100, H100, B200.
CARDS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
RESOURCES = Path(__file__).with_name("kernel_resources.json")
TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Compiled:
    """registers: per thread. spilled: bytes of local memory per thread. shared: bytes per program."""

    kernel: str
    registers: int
    spilled: int
    shared: int


@contextlib.contextmanager
def compiling(capability: int = 90) -> Iterator[list[Compiled]]:
    """Inside, launching a kernel only compiles it, and adds what it takes to the list."""
    compiled: list[Compiled] = []

    def run(self: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> None:
        given = dict(zip(self.arg_names, args, strict=False)) | {
            k: v for k, v in kwargs.items() if k in self.arg_names
        }
        options = {k: v for k, v in kwargs.items() if k not in self.arg_names}
        signature, constants, attributes = {}, {}, {}
        for number, parameter in enumerate(self.params):
            value = given.get(parameter.name, parameter.default)
            specialised = not parameter.do_not_specialize
            if (
                parameter.is_constexpr
                or value is None
                or (specialised and isinstance(value, int) and value == 1)
            ):
                signature[parameter.name], constants[parameter.name] = "constexpr", value
                continue
            signature[parameter.name] = _type(value)
            if specialised and (isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)):
                attributes[(number,)] = [["tt.divisibility", 16]]
        source = ASTSource(self, signature, constants, attributes)
        compiled.append(
            _resources(triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options))
        )

    with mock.patch.object(JITFunction, "run", run):
        yield compiled


def _type(value: object) -> str:
    if isinstance(value, Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    assert isinstance(value, int), value
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _resources(kernel: object) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = (
        int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")
    )
    return Compiled(kernel.metadata.name, registers, stack + local, kernel.metadata.shared)


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


RELATIVE, ABOVE = Geometry(10, 4096, 4096), Geometry(10, 4096, 8192)  # ABOVE: a ceiling above the window
IN_CACHE = Geometry(4, 2044, None, "in_cache")


def launch_lambda(
    which: str,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_size: int,
    geometry: Geometry = RELATIVE,
    rotary_dim: int | None = None,
    is_neox: bool = True,
    alibi: bool = False,
    soft_cap: float = 0.0,
    cache_dtype: torch.dtype | None = None,
    rows: int = 16,
    tokens: int = 2048,
    with_lse: bool = False,
    sinks: bool = False,
) -> None:
    """One of the two Λ kernels, `decode` (with its merge) or `prefill`, at a model's shape."""
    rotary_dim = 0 if alibi else head_size if rotary_dim is None else rotary_dim
    slopes = meta(heads, dtype=torch.float32) if alibi else None
    of_heads = meta(heads, dtype=dtype) if sinks else None
    view = View(geometry, rotary_dim, is_neox, slopes, soft_cap, of_heads)
    cache = meta(1000, kv_heads, 32, 2 * head_size, dtype=cache_dtype or dtype).transpose(1, 2)
    queries = rows if which == "decode" else tokens
    query = meta(queries, heads, head_size, dtype=dtype)
    angles = [(meta(n, rotary_dim // 2, dtype=torch.float32),) * 2 for n in (queries, geometry.n_global)]
    lse = meta(queries, heads, dtype=torch.float32) if with_lse else None
    common = (
        *cache.split(head_size, dim=-1),
        meta(rows, 1 << 15, dtype=torch.int32),
        meta(rows, dtype=torch.int32),
    )
    if which == "decode":
        splits = decode_splits(view, rows, kv_heads, H100_SMS, 1 << 20)
        workspace = decode_workspace(rows, heads, head_size, splits, torch.device("meta"))
        lambda_decode(query, *common, *angles, view, 1.0, torch.empty_like(query), workspace, splits, lse=lse)
    else:
        starts = meta(rows + 1, dtype=torch.int32)
        lambda_attention(query, *common, starts, tokens, *angles, view, 1.0, torch.empty_like(query), lse=lse)


F16, BF16, F32, F8 = torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn
CASES: dict[str, Callable[[], None]] = {
    f"lambda {which}, {name}": partial(launch_lambda, which, *arguments, **options)
    for which in ("decode", "prefill")
    for name, arguments, options in (
        ("7B float16", (F16, 32, 32, 128), {}),
        ("8B bfloat16", (BF16, 32, 8, 128), {}),
        ("8B bfloat16, one row", (BF16, 32, 8, 128), {"rows": 1}),
        ("8B bfloat16, ceiling above the window", (BF16, 32, 8, 128), {"geometry": ABOVE}),
        ("8B bfloat16, in the cache", (BF16, 32, 8, 128), {"geometry": IN_CACHE}),
        ("8B bfloat16, no first tokens", (BF16, 32, 8, 128), {"geometry": Geometry(0, 4096)}),
        ("8B bfloat16, one first token", (BF16, 32, 8, 128), {"geometry": Geometry(1, 4096, 4096)}),
        ("8B bfloat16, plain attention", (BF16, 32, 8, 128), {"geometry": Geometry()}),
        ("8B bfloat16, float8 cache", (BF16, 32, 8, 128), {"cache_dtype": F8}),
        ("8B bfloat16, log-sum-exps", (BF16, 32, 8, 128), {"with_lse": True}),
        ("8B float32", (F32, 32, 8, 128), {}),
        (
            "GPT-J bfloat16, partial and interleaved",
            (BF16, 16, 16, 256),
            {"rotary_dim": 64, "is_neox": False},
        ),
        ("MPT float16, ALiBi", (F16, 32, 32, 128), {"alibi": True}),
        ("MPT bfloat16, ALiBi in the cache", (BF16, 32, 32, 128), {"alibi": True, "geometry": IN_CACHE}),
        ("Gemma bfloat16, head 256, soft cap", (BF16, 16, 8, 256), {"soft_cap": 50.0}),
        ("gpt-oss bfloat16, sinks", (BF16, 64, 8, 64), {"sinks": True, "with_lse": True}),
        ("head 32 float32, soft cap and sinks", (F32, 8, 4, 32), {"soft_cap": 50.0, "sinks": True}),
        ("head 80 float16", (F16, 32, 32, 80), {"rotary_dim": 32}),
        ("head 96 bfloat16", (BF16, 32, 32, 96), {}),
        ("head 64 bfloat16, group 7", (BF16, 14, 2, 64), {}),
        ("MQA bfloat16, group 71", (BF16, 71, 1, 64), {}),
        ("head 32 float16", (F16, 8, 4, 32), {}),
        ("head 256 float32", (F32, 16, 8, 256), {}),
    )
}


def launch_lookup(
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_size: int,
    tokens: int = 1,
    block_size: int = 32,
    share: float | None = None,
    soft_cap: float = 0.0,
    sinks: bool = False,
    in_graphs: bool = False,
) -> None:
    """A memory layer's lookup in a million keys and its window: 16 rows that decode, or one that reads
    `tokens` tokens. in_graphs: as decodes do where CUDA graphs can hold their lookup.
    """
    rows = 16 if tokens == 1 else 1
    cache = meta(100, kv_heads, block_size, 2 * head_size, dtype=dtype).transpose(1, 2)
    caches, table = cache.split(head_size, dim=-1), meta(rows, (1 << 20) // block_size, dtype=torch.int32)
    lens, query = meta(rows, dtype=torch.int32), meta(rows, tokens, heads, head_size, dtype=dtype)
    memories = Memories(*caches, table, lens, lens, None, Summaries.like(caches[0]))
    flat = query.flatten(0, 1)
    if in_graphs:
        splits = lookup_splits(table.shape[1], rows, kv_heads, H100_SMS)
        counts = meta(rows, dtype=torch.int64)
        branch = attend_best_decode(flat, memories, 64, 1.0, splits, share, counts, soft_cap)
    else:
        branch = tuple(x.flatten(0, 1) for x in attend_best(query, memories, 64, 1.0, share, soft_cap))
    of_heads = meta(heads, dtype=dtype) if sinks else None
    launch_windows(
        flat, caches, table, rows, tokens, View(Geometry(), soft_cap=soft_cap, sinks=of_heads), branch
    )


def launch_windows(
    query: Tensor,
    caches: tuple[Tensor, ...],
    table: Tensor,
    rows: int,
    tokens: int,
    view: View,
    branch: tuple[Tensor, ...] | None = None,
) -> None:
    """Stepped windows of rows that decode, or that read `tokens` tokens each."""
    starts, lens, begins = (meta(n, dtype=torch.int32) for n in (rows, rows, rows + 1))
    out, (heads, head_size) = torch.empty_like(query), query.shape[1:]
    if tokens > 1:
        common = query, *caches, table, starts, lens, begins, tokens, 1.0, out, branch
        stepped_attention(*common, view.soft_cap, view.sinks, view.alibi_slopes)
        return
    splits = decode_splits(view, rows, caches[0].shape[2], H100_SMS, 4096)
    workspace = decode_workspace(rows, heads, head_size, splits, torch.device("meta"))
    common = query, *caches, table, lens, None, None, view, 1.0, out, workspace, splits
    lambda_decode(*common, starts=starts, branch=branch)


CASES |= {
    f"lookup, {name}": partial(launch_lookup, *arguments, **options)
    for name, arguments, options in (
        ("3B float16", (F16, 32, 32, 100), {}),
        ("8B bfloat16", (BF16, 32, 8, 128), {}),
        ("8B bfloat16 by blocks", (BF16, 32, 8, 128), {"share": 0.1}),
        ("8B bfloat16, chunk", (BF16, 32, 8, 128), {"tokens": 128}),
        ("8B bfloat16, chunk by blocks", (BF16, 32, 8, 128), {"tokens": 128, "share": 0.1}),
        ("8B bfloat16, blocks of 16", (BF16, 32, 8, 128), {"block_size": 16}),
        ("8B bfloat16, blocks of 256", (BF16, 32, 8, 128), {"block_size": 256, "share": 0.1}),
        ("8B bfloat16, soft cap and sinks", (BF16, 32, 8, 128), {"soft_cap": 50.0, "sinks": True}),
        ("8B float32", (F32, 32, 8, 128), {}),
        ("8B float32, chunk by blocks", (F32, 32, 8, 128), {"tokens": 128, "share": 0.1}),
        ("head 80 float16, group 7", (F16, 28, 4, 80), {}),
        ("head 256 bfloat16, chunk", (BF16, 16, 8, 256), {"tokens": 128, "share": 0.1}),
        ("head 256 float32, chunk", (F32, 16, 8, 256), {"tokens": 128}),
    )
}


CASES |= {
    f"lookup in graphs, {name}": partial(launch_lookup, *arguments, in_graphs=True, **options)
    for name, arguments, options in (
        ("3B float16", (F16, 32, 32, 100), {}),
        ("8B bfloat16", (BF16, 32, 8, 128), {}),
        ("8B bfloat16 by blocks", (BF16, 32, 8, 128), {"share": 0.1}),
        ("8B float32 by blocks", (F32, 32, 8, 128), {"share": 0.1}),
        ("70B bfloat16 by blocks", (BF16, 64, 8, 128), {"share": 0.1}),
        ("head 80 float16, group 7", (F16, 28, 4, 80), {}),
    )
}


def launch_turn(dtype: torch.dtype, heads: int, head_size: int, is_neox: bool = True) -> None:
    """Queries turned to the distance of LM-Infinite's top-k branch."""
    angles = (meta(16, head_size // 2, dtype=torch.float32),) * 2
    turned(meta(16, heads, head_size, dtype=dtype), *angles, is_neox)


CASES |= {
    "turn, 8B bfloat16": partial(launch_turn, BF16, 32, 128),
    "turn, head 80 float32": partial(launch_turn, F32, 28, 80),
}


def launch_stepped(
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_size: int,
    tokens: int,
    block_size: int = 32,
    alibi: bool = False,
) -> None:
    """Stepped windows alone: 16 rows of which each reads `tokens` tokens."""
    rows = 16
    cache = meta(100, kv_heads, block_size, 2 * head_size, dtype=dtype).transpose(1, 2)
    table, query = (
        meta(rows, (1 << 20) // block_size, dtype=torch.int32),
        meta(rows * tokens, heads, head_size, dtype=dtype),
    )
    slopes = meta(heads, dtype=torch.float32) if alibi else None
    view = View(Geometry(), alibi_slopes=slopes)
    launch_windows(query, cache.split(head_size, dim=-1), table, rows, tokens, view)


CASES |= {
    f"windows, {name}, {step}": partial(launch_stepped, *arguments, tokens)
    for name, arguments in (
        ("7B bfloat16", (BF16, 32, 32, 128)),
        ("8B bfloat16", (BF16, 32, 8, 128)),
        ("8B float32", (F32, 32, 8, 128)),
        ("head 64 float16, group 7", (F16, 14, 2, 64)),
        ("head 256 float32", (F32, 16, 8, 256)),
    )
    for step, tokens in (("decode", 1), ("chunk", 128))
}
CASES |= {
    f"windows, MPT float16, ALiBi, {step}": partial(launch_stepped, F16, 32, 32, 128, tokens, alibi=True)
    for step, tokens in (("decode", 1), ("chunk", 128))
}


def launch_swap(dtype: torch.dtype) -> None:
    """The copies of an adapter's weights into the layers."""
    table = meta(448, 6, dtype=torch.int64)
    PaddedCopies(table, 172, torch.float32, dtype).copy()


CASES |= {
    f"swap, {name}": partial(launch_swap, dtype) for name, dtype in (("float16", F16), ("bfloat16", BF16))
}


# Cases that have all kernels, for the cards beside an H100.
EVERY_KERNEL = (
    "lambda decode, 8B bfloat16",
    "lambda prefill, 8B bfloat16",
    "lookup, 8B bfloat16",
    "lookup, 8B bfloat16 by blocks",
    "lookup, 8B bfloat16, chunk by blocks",
    "lookup in graphs, 8B bfloat16",
    "lookup in graphs, 8B bfloat16 by blocks",
    "turn, 8B bfloat16",
    "windows, 8B bfloat16, decode",
    "windows, 8B bfloat16, chunk",
    "swap, bfloat16",
)


def resources(name: str, capability: int) -> dict[str, list[int]]:
    """By kernel of a case: registers, bytes spilled, bytes of shared memory; the most of each where a kernel
    is compiled for several sizes.
    """
    found: dict[str, list[int]] = {}
    with compiling(capability) as kernels:
        CASES[name]()
    for k in kernels:
        takes = k.registers, k.spilled, k.shared
        found[k.kernel] = [*map(max, takes, found.get(k.kernel, takes))]
    return found


def stored() -> dict[str, dict[str, dict[str, list[int]]]]:
    """`resources` by card and case. Empty where they are another Triton's."""
    found = json.loads(RESOURCES.read_text())
    return found["resources"] if found["triton"] == triton.__version__ else {}


def differences(name: str, capability: int, found: dict[str, list[int]]) -> list[str]:
    """What is wrong with a case."""
    wrong = [
        f"{kernel} takes {shared} bytes of shared memory, the card has {CARDS[capability]}"
        for kernel, (_, _, shared) in found.items()
        if shared > CARDS[capability]
    ]
    expected = stored().get(str(capability), {}).get(name, found)
    return wrong + ([] if found == expected else [f"{found}, and {RESOURCES.name} has {expected}"])


def main(words: list[str]) -> int:
    writes = "--write" in words
    capabilities = list(CARDS) if writes or "--all" in words else [90]
    given = [word for word in words if not word.startswith("--")]
    failed, table = 0, {}
    for capability in capabilities:
        of_card = table[str(capability)] = {}
        for name in given or (CASES if capability == 90 else EVERY_KERNEL):
            try:
                found = of_card[name] = resources(name, capability)
            except Exception as error:  # whatever the compiler raises, the other cases are of interest
                print(f"{name}: sm_{capability}: {type(error).__name__}: {error}", flush=True)
                failed += 1
                continue
            for kernel, (registers, spilled, shared) in found.items():
                takes = f"{registers} registers, {spilled} bytes spilled, {shared / 1024:.0f} KiB shared"
                print(f"{name}: {kernel}: sm_{capability}: {takes}", flush=True)
            for wrong in [] if writes else differences(name, capability, found):
                print(f"{name}: sm_{capability}: {wrong}", flush=True)
                failed += 1
    if writes:
        lines = ",\n".join(
            f" {json.dumps(card)}: {{\n"
            + ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in of_card.items())
            + "\n }"
            for card, of_card in table.items()
        )
        RESOURCES.write_text(f'{{"triton": "{triton.__version__}", "resources": {{\n{lines}\n}}}}\n')
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
