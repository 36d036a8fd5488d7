"""How many kernels one layer launches for a decode of 16 requests. Needs no GPU: tensors have no contents.

    python benchmarks/gpu/launches.py

Each Triton kernel counts as one, and each operation of PyTorch that is more than another view of a tensor; on
a GPU some of these (sorting, for one) are several. Launches of `in graphs` can be held by a CUDA graph. Those
of `eager` are how layers decode where they cannot.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import typer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu.models import BLOCK_SIZE, GQA_8B

ROWS, LONGEST, K, SHARE, N_GLOBAL, WINDOW = 16, 1 << 20, 64, 0.1, 10, 4096
META, DTYPE = torch.device("meta"), torch.bfloat16
# What only makes tensors, or other views of them.
FREE = ("empty", "view", "slice", "select", "unsqueeze", "squeeze", "transpose", "split", "detach", "alias")


class Operations(TorchDispatchMode):
    """Those of PyTorch that launch a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.strip("_")
        if not func.is_view and not name.startswith(FREE):
            self.names.append(name)
        return func(*args, **kwargs or {})


@contextmanager
def launches() -> Iterator[list[str]]:
    """The names of kernels and operations that are launched inside. Triton's run nothing."""
    from vllm_longctx.cuda.kernels.swap import _copy_padded

    with Operations() as operations:

        def launch(kernel: Any, *args: Any, **kwargs: Any) -> None:
            operations.names.append(kernel.__name__)

        with mock.patch.object(type(_copy_padded), "run", launch):
            yield operations.names


def meta(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def layer(in_graphs: bool, kind: str) -> Callable[[], None]:
    """A decode of a layer: `top_k` or `blocks` of a memory layer, or the `branch` of LM-Infinite."""
    from vllm_longctx.cuda.kernels.decode_lookups import DecodeLookup
    from vllm_longctx.cuda.kernels.lambda_decode import decode_workspace
    from vllm_longctx.cuda.kernels.lookup import Summaries
    from vllm_longctx.cuda.kernels.lookup_decode import lookup_splits
    from vllm_longctx.cuda.memory import LookupImpl, LookupMetadata
    from vllm_longctx.cuda.sliding import Decodes, LambdaImpl
    from vllm_longctx.cuda.top_k import Middles, TopKImpl, TopKMetadata
    from vllm_longctx.geometry import Geometry
    from vllm_longctx.rotary import Rotary
    from vllm_longctx.settings import Lookup, TopK

    heads, kv_heads, d = GQA_8B.heads, GQA_8B.kv_heads, GQA_8B.head_size
    rotary = Rotary(d, d, True, meta(d // 2, dtype=torch.float64))
    stock = LambdaImpl(heads, d, d**-0.5, kv_heads)
    is_branch = kind == "branch"
    geometry = Geometry(N_GLOBAL, WINDOW, WINDOW) if is_branch else Geometry()
    stock.take_over(geometry, rotary if is_branch else None, META)
    table, lens = meta(ROWS, LONGEST // BLOCK_SIZE), meta(ROWS)
    splits = lookup_splits(table.shape[1], ROWS, kv_heads, 132)
    counts = meta(ROWS, dtype=torch.int64) if kind == "blocks" else None
    lookup = DecodeLookup(table, meta(ROWS), meta(ROWS), splits, None if in_graphs else LONGEST, counts)
    workspace, angles = (
        decode_workspace(ROWS, heads, d, 4, META),
        meta(2, ROWS, d // 2, dtype=torch.float32).unbind(),
    )
    impl: Any
    metadata: Any
    if is_branch:
        impl = TopKImpl.of(stock, top_k=TopK(K, WINDOW // 2, range(1)))
        decodes = Decodes(table, lens, angles, 4)
        metadata = TopKMetadata(ROWS, decodes, None, workspace, Middles(lookup, *angles))
    else:
        share = SHARE if kind == "blocks" else None
        cache = meta(1000, BLOCK_SIZE, kv_heads, d, dtype=DTYPE)
        impl = LookupImpl.of(stock, lookup=Lookup(K, share), summaries=Summaries.like(cache))
        metadata = LookupMetadata(ROWS, ROWS, table, meta(ROWS), lens, meta(1), 1, 4, workspace, lookup)
    query, output = (meta(ROWS, heads, d, dtype=DTYPE) for _ in range(2))
    kv_cache = meta(1000, kv_heads, BLOCK_SIZE, 2 * d, dtype=DTYPE)
    scales = SimpleNamespace(_k_scale_float=1.0, _v_scale_float=1.0)
    return lambda: impl.forward(scales, query, query, query, kv_cache, metadata, output)


LAYERS = {
    "memory layer, lookup top_k": "top_k",
    "memory layer, lookup blocks": "blocks",
    "layer with LM-Infinite's top-k branch": "branch",
}


def launched(kind: str, in_graphs: bool) -> list[str]:
    call = layer(in_graphs, kind)
    with launches() as names:
        call()
    return list(names)


def main() -> None:
    print("| launches of a decode | in graphs | eager |\n|---|---|---|")
    for name, kind in LAYERS.items():
        print(f"| {name} | {len(launched(kind, True))} | {len(launched(kind, False))} |")


if __name__ == "__main__":
    typer.run(main)
