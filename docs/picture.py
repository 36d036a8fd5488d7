"""Draws docs/picture.png: which keys a query sees under each method, computed by the package itself, and what
comes of it.

python docs/picture.py [OUT.png]
"""

import json
import sys
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from torch import Tensor

from vllm_longctx.geometry import Geometry, SteppedWindows, branches, local_branch, memory_branch
from vllm_longctx.temp_lora.blocks import Blocks, Window

HERE = Path(__file__).parent
TOKENS, WINDOW, BLOCK = 48, 12, 4
BLUE, ORANGE, GREEN = "#4c78a8", "#f58518", "#54a24b"


def lambda_attention() -> Tensor:
    """1 where a query sees a key in its window, 2 where it is one of the first tokens: int [queries,
    keys].
    """
    positions = torch.arange(TOKENS)
    local, first = branches(
        Geometry(n_global=2, n_local=WINDOW, distance_ceiling=WINDOW), positions, positions
    )
    return local.visible.int() + 2 * first.visible.int()


def temp_lora() -> Tensor:
    """1 + the version that computes a query where it sees a key: int [queries, keys]."""
    blocks, window = Blocks(0, BLOCK, "cascaded"), Window("reuse", WINDOW, WINDOW // 2, 0, 1)
    seen, start = torch.zeros(TOKENS, TOKENS, dtype=torch.int), 0
    for position in range(TOKENS):
        start = window.next_start(start, position, blocks) or start
        seen[position, start : position + 1] = 1 + blocks.version_of(position)
    return seen


def memory() -> Tensor:
    """1 where a query of a memory layer sees a key in its window, 3 where it is in the memory: int [queries,
    keys].
    """
    positions, windows = torch.arange(TOKENS), SteppedWindows(WINDOW, WINDOW)
    starts = torch.tensor([windows.start(int(position), TOKENS) for position in positions])
    local, before = (branch(positions, positions, starts) for branch in (local_branch, memory_branch))
    return local.visible.int() + 3 * before.visible.int()


def draw(axes: Axes, seen: Tensor, colours: ListedColormap, highest: int, title: str) -> None:
    axes.imshow(seen, cmap=colours, vmin=0, vmax=highest, interpolation="nearest")
    axes.set(title=title, xlabel="token that is seen", ylabel="token that sees", xticks=[], yticks=[])


def draw_nll(axes: Axes) -> None:
    """Of benchmarks/results/perplexity.json: the mean of five texts."""
    results = json.loads((HERE.parent / "benchmarks" / "results" / "perplexity.json").read_text())["nll"]
    for way, label, colour in (("plain", "stock vLLM", "grey"), ("lm-infinite", "lm-infinite", BLUE)):
        rows = results[way]["all texts"]
        axes.plot(
            [row["end"] for row in rows],
            [row["nll"] for row in rows],
            color=colour,
            marker="o",
            ms=3,
            label=label,
        )
    axes.axvline(512, color="black", lw=0.8, ls=":", label="trained length")
    axes.set(
        title="what comes of it:\nNLL of a long text",
        xlabel="position (tokens)",
        ylabel="NLL (nats per token)",
        xscale="log",
    )
    axes.legend(fontsize=8)


def main(out: Path) -> None:
    figure, (left, middle, right, last) = pyplot.subplots(1, 4, figsize=(14, 3.6), layout="constrained")
    kinds = ListedColormap(["white", BLUE, ORANGE, GREEN])
    versions = temp_lora()
    newest = int(versions.max())
    shades = pyplot.get_cmap("Blues")(torch.linspace(0.25, 1, newest).numpy())
    draw(left, lambda_attention(), kinds, 3, "Λ attention:\nfirst tokens and a window")
    draw(
        middle,
        versions,
        ListedColormap([(1, 1, 1, 1), *shades]),
        newest,
        "Temp-LoRA:\na newer adapter per block",
    )
    draw(right, memory(), kinds, 3, "memory layer:\na window and all before it")
    draw_nll(last)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "picture.png")
