"""Table "Temp-LoRA speed": many streams that learn while they write, against the same streams one after
another.

    python benchmarks/temp_lora.py --json OUT.json --plot OUT.png

In one run, round by round, medians over rounds, every way writing the same number of tokens in as many
streams:

- official: the loop of the official code on Hugging Face transformers and peft, stream by stream: `generate`
  a block from the last tokens of context with a KV cache, train on the block, repeat. Same model, sizes,
  recipe and, by default, every core.
- longctx: our engine with 1, 2, ... streams at once; 1 is our own engine running them one after another.
  With `--streams 1` that is all.
- bystanders: tokens/s of streams that did not opt in while as many others learn, against the same mix with
  the trainer idle (`epochs` 0).

Only what is written is trained on, and the last block is not: nobody would use what it taught. Prompts are
random tokens, so that nothing depends on a text.

**Swaps and holds** are read from the engine's metrics: the time to put all modules of one version in place,
on a second engine at `--swap-rank`, and empty steps per second while every request waits for the trainer.

**FLOPs per token** are computed, not measured, with Δ, L_X, W, L_T the sizes of a preset. A pass begins with
L_X tokens recomputed and ends at W, so W - L_X tokens of text cost W token-forwards; token-forward i of them
costs 2 FLOPs a weight and 4·i·heads·head_dim a layer. Training costs each block `epochs` times 3 forwards of
L_T + Δ tokens; 3 counts the gradients of the frozen weights, which LoRA does not need and autograd does not
compute: beside it stands 2, without them. The paper's comparison (arXiv 2401.11504, section 4) is with the
plain model in a window of 24K tokens, moved on by 1K at a time, without any training: -70.5% for the economic
preset (Δ = 2K, W = 4K) and +17% for quality (Δ = 1K, W = 24K). Computed here for the shape of Llama-2-7B. The
paper gives neither its formula nor every size: expect agreement in size, not in digits.
"""

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from load import greedy, random_tokens
from rich.console import Console
from rich.table import Table

from vllm_longctx.cli.engine import (
    Job,
    PremiseError,
    blocks_are_trained,
    model_path,
    run_jobs,
    running_engine,
)
from vllm_longctx.cli.options import JsonOut
from vllm_longctx.cli.output import console, plot, write_json

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.v1.engine.llm_engine import LLMEngine

TRAINING_FORWARDS = {"forward and both gradients": 3, "no gradients of frozen weights": 2}


@dataclass(frozen=True)
class Sizes:
    """In tokens; epochs a block. No training: epochs 0."""

    block_tokens: int
    context_tokens: int
    window_tokens: int
    train_context_tokens: int = 0
    epochs: int = 0


@dataclass(frozen=True)
class Shape:
    """weights: of the linear layers, lm_head included. width: heads times head_dim."""

    weights: float
    layers: int
    width: int

    def forward(self, first: int, last: int) -> float:
        """FLOPs of the forwards of tokens first .. last - 1 of a pass."""
        keys = (last * (last + 1) - first * (first + 1)) / 2
        return 2 * self.weights * (last - first) + 4 * self.width * self.layers * keys

    def per_token(self, sizes: Sizes, training_forwards: float = 3) -> float:
        """FLOPs per token of a text much longer than the window."""
        reading = self.forward(0, sizes.window_tokens) / (sizes.window_tokens - sizes.context_tokens)
        example = self.forward(0, sizes.train_context_tokens + sizes.block_tokens)
        return reading + sizes.epochs * training_forwards * example / sizes.block_tokens


LLAMA_2_7B = Shape(32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096, 32, 4096)
K = 1024
PAPER_BASE = Sizes(K, 23 * K, 24 * K)
PAPER = {  # sizes, change in FLOPs
    "temp-lora-economic": (Sizes(2 * K, 2 * K, 4 * K, 2 * K, 2), -0.705),
    "temp-lora-quality": (Sizes(K, 23 * K, 24 * K, K, 2), 0.17),
}


def flops_rows() -> list[dict[str, Any]]:
    """Change in FLOPs per token of each preset at the paper's sizes, computed both ways, and the paper's."""
    base = LLAMA_2_7B.per_token(PAPER_BASE)
    return [
        {
            "preset": preset,
            "sizes": vars(sizes),
            "change": {
                way: LLAMA_2_7B.per_token(sizes, n) / base - 1 for way, n in TRAINING_FORWARDS.items()
            },
            "paper": paper,
        }
        for preset, (sizes, paper) in PAPER.items()
    ]


def writing(max_tokens: int, longctx: dict[str, Any] | None) -> "SamplingParams":
    return greedy(max_tokens, extra_args=None if longctx is None else {"longctx": longctx})


def official_loop(model: str, recipe: dict[str, Any], threads: int) -> Callable[[list[int], int], list[int]]:
    """`official_writer` for a checkpoint, on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    return official_writer(
        AutoModelForCausalLM.from_pretrained(model_path(model), dtype=torch.float32), recipe
    )


def official_writer(base: Any, recipe: dict[str, Any]) -> Callable[[list[int], int], list[int]]:
    """A function that lets one stream write so many tokens, block by block, throws its adapter away and
    returns the tokens.

    base: a model of transformers', on any device.
    """
    import torch
    from transformers import GenerationConfig

    block = recipe["block_tokens"]
    greedy = GenerationConfig(max_new_tokens=block, do_sample=False, use_cache=True, pad_token_id=0)

    def write(prompt: list[int], tokens: int) -> list[int]:
        stream, train = official_stream(base, recipe)
        text = list(prompt)
        for written in range(0, tokens, block):
            if written:
                train(text, block)
            context = text[-recipe["context_tokens"] :] if written else text
            ids = torch.tensor([context], device=base.device)
            text += stream.generate(ids, generation_config=greedy)[0, len(context) :].tolist()
        stream.unload()
        return text[len(prompt) :]

    return write


def official_reader(base: Any, recipe: dict[str, Any]) -> Callable[[list[int]], list[float]]:
    """A function that returns the NLL (nats) of each token of a text but the first, every block scored behind
    its context before it is trained on.
    """
    import torch

    def read(text: list[int]) -> list[float]:
        stream, train = official_stream(base, recipe)
        found: list[float] = []
        for first in range(1, len(text), recipe["block_tokens"]):
            upto = min(first + recipe["block_tokens"], len(text))
            context = text[max(0, first - recipe["context_tokens"]) : upto]
            ids, count = torch.tensor([context], device=base.device), upto - first
            with torch.no_grad():
                logits = stream(input_ids=ids).logits[0, -count - 1 : -1].float().log_softmax(-1)
            found += (-logits.gather(-1, ids[0, -count:, None])[:, 0]).tolist()
            train(text[:upto], count)
        stream.unload()
        return found

    return read


def official_stream(base: Any, recipe: dict[str, Any]) -> tuple[Any, Callable[[list[int], int], None]]:
    """The model with a fresh adapter, and a function that trains it on the last tokens of a text, as many as
    it is told.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=recipe["rank"],
        lora_alpha=recipe.get("alpha") or recipe["rank"],
        lora_dropout=recipe["dropout"],
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    stream = get_peft_model(base, config).eval()
    optimizer = torch.optim.AdamW(
        (p for p in stream.parameters() if p.requires_grad),
        lr=recipe["learning_rate"],
        eps=recipe["adam_eps"],
        weight_decay=recipe["weight_decay"],
    )

    def train(text: list[int], targets: int) -> None:
        stream.train()
        first = len(text) - targets
        example = text[max(0, first - recipe["train_context_tokens"]) :]
        labels = [-100] * (len(example) - targets) + text[first:]
        for _ in range(recipe["epochs"]):
            ids, wanted = (torch.tensor([x], device=base.device) for x in (example, labels))
            loss = stream(input_ids=ids, labels=wanted).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        stream.eval()

    return stream, train


def engine_speed(
    engine: "LLMEngine", prompts: Sequence[list[int]], params: "SamplingParams", at_once: int
) -> float:
    """Tokens/s of all streams together, `at_once` at a time.

    Raises PremiseError for a stream that ended early.
    """

    def stream(prompt: list[int]) -> Job[int]:
        (output,) = yield [(prompt, params)]
        return len(output.outputs[0].token_ids)

    start = time.perf_counter()
    written = run_jobs(engine, [stream(p) for p in prompts], f"longctx, {at_once} at once", at_once)
    seconds = time.perf_counter() - start
    if short := [count for count in written if count != params.max_tokens]:
        raise PremiseError(f"a stream wrote {short[0]} tokens of {params.max_tokens}")
    return sum(written) / seconds


def learning_speed(
    engine: "LLMEngine",
    prompts: Sequence[list[int]],
    tokens: int,
    block_tokens: int,
    options: dict[str, Any],
    at_once: int,
) -> float:
    """`engine_speed` of streams that learn what they write, `tokens` each: whole blocks, all but the last
    trained.

    options: of the requests; with `epochs` 0 nothing is to be trained. Raises PremiseError if it was
    otherwise.
    """
    blocks = len(prompts) * (tokens // block_tokens - 1) if options.get("epochs") != 0 else 0
    with blocks_are_trained(engine, blocks):
        return engine_speed(engine, prompts, writing(tokens, options), at_once)


def bystander_speed(
    engine: "LLMEngine",
    learners: Sequence[list[int]],
    bystanders: Sequence[list[int]],
    tokens: int,
    longctx: dict[str, Any],
) -> float:
    """Tokens/s of `bystanders` while learners of options `longctx` write all the time.

    Each writes `tokens`, or as many as a request may that does not adapt, which ends at the trained length.
    Raises PremiseError if blocks of the learners failed, or if none was trained although they learn.
    """
    from vllm.inputs import tokens_input

    from vllm_longctx.models.properties import trained_length

    tokens = min(tokens, trained_length(engine.vllm_config.model_config) - max(map(len, bystanders)))
    room = engine.vllm_config.model_config.max_model_len
    for number, prompt in enumerate(learners):
        engine.add_request(f"learner {number}", tokens_input(prompt), writing(room - len(prompt), longctx))
    started: set[str] = set()
    while len(started) < len(learners):
        started |= {o.request_id for o in engine.step()}
    for number, prompt in enumerate(bystanders):
        engine.add_request(f"bystander {number}", tokens_input(prompt), writing(tokens, None))
    blocks = (0, 0) if longctx.get("epochs") == 0 else (1, room * len(learners))
    with blocks_are_trained(engine, *blocks):
        left, start = len(bystanders), time.perf_counter()
        while left:
            finished = [o.request_id for o in engine.step() if o.finished]
            if any(name.startswith("learner") for name in finished):
                raise SystemExit(
                    "a learner reached max_model_len before the bystanders were done; lower --written"
                )
            left -= len(finished)
        seconds = time.perf_counter() - start
    engine.abort_request([f"learner {number}" for number in range(len(learners))])
    return len(bystanders) * tokens / seconds


def swaps_and_holds(engine: "LLMEngine") -> dict[str, float]:
    """Milliseconds of a swap of all modules, and empty steps per second with every request held; from the
    engine's metrics.

    Of an engine that has only ever run one request at a time: when it is held, every request is. Raises
    PremiseError where nothing was swapped or held.
    """
    metrics = {m.name: m for m in engine.get_metrics()}
    swaps, idle, holds = (
        metrics[f"vllm:longctx_{n}"] for n in ("swap_time_seconds", "idle_steps", "hold_time_seconds")
    )
    if not swaps.count or not holds.count:
        raise PremiseError(f"there were {swaps.count} swaps and {holds.count} holds; write more blocks")
    return {"swap_ms": 1000 * swaps.sum / swaps.count, "empty_steps_per_s": idle.value / holds.sum}


def main(
    model: str = "booklm",
    preset: str = "temp-lora-quality",
    adaptation: Annotated[str, typer.Option(help="Keys of adaptation beside the preset's, as JSON.")] = "{}",
    streams: Annotated[
        int, typer.Option(help="Texts written in each way; as many may write at once.", min=1)
    ] = 8,
    prompt_tokens: int = 64,
    written: Annotated[int, typer.Option(help="Tokens that each stream writes; whole blocks.")] = 1024,
    rounds: int = 3,
    threads: Annotated[int, typer.Option(help="Threads of the official loop.")] = os.cpu_count() or 1,
    swap_rank: Annotated[int, typer.Option(help="Rank of the adapters whose swap is timed.")] = 64,
    dtype: Annotated[str, typer.Option(help="Of the engine. The official loop has float32.")] = "float32",
    max_model_len: int = 65536,
    enforce_eager: bool = False,
    json_out: JsonOut = None,
    plot_out: Annotated[Path | None, typer.Option("--plot")] = None,
) -> None:
    chosen = {"slots": streams, "cache_gib": 0, **json.loads(adaptation)}  # every round learns anew
    kwargs: dict[str, Any] = {"dtype": dtype, "enforce_eager": enforce_eager, "max_num_seqs": 2 * streams}
    learning = {"temp_lora": True, "train_on_prompt": False}
    counts = [n for n in (1 << k for k in range(16)) if n < streams] + [streams]
    speeds: dict[str, list[float]] = {}
    with running_engine(model, longctx(preset, chosen), max_model_len, **kwargs) as (engine, _):
        recipe = engine.vllm_config.additional_config["longctx"]["adaptation"]
        if written % recipe["block_tokens"]:
            raise SystemExit(
                f"--written {written} is not a multiple of block_tokens = {recipe['block_tokens']}"
            )
        official = official_loop(model, recipe, threads)
        for number in range(rounds + 1):  # the first one warms up
            prompts = [random_tokens(engine, prompt_tokens, f"{number}/{k}") for k in range(streams)]
            if number == 0:
                prompts, tokens = prompts[:2], recipe["block_tokens"]
            else:
                tokens = written
            with console.status("official loop"):
                start = time.perf_counter()
                count = sum(len(official(prompt, tokens)) for prompt in prompts)
                figures = {"official": count / (time.perf_counter() - start)}
            if count != len(prompts) * tokens:
                raise PremiseError(f"the official loop wrote {count} tokens of {len(prompts) * tokens}")
            for at_once in counts:
                figures[f"longctx {at_once}"] = learning_speed(
                    engine, prompts, tokens, recipe["block_tokens"], learning, at_once
                )
            half = len(prompts) // 2  # none beside a stream alone
            for name, epochs in (("bystanders, idle trainer", 0), ("bystanders", recipe["epochs"]))[
                : 2 * half
            ]:
                options = {**learning, "epochs": epochs}
                figures[name] = bystander_speed(engine, prompts[:half], prompts[half:], tokens, options)
            for name, speed in figures.items() if number else ():
                speeds.setdefault(name, []).append(speed)
    wide = longctx(preset, {**chosen, "rank": swap_rank})
    with running_engine(model, wide, max_model_len, **kwargs) as (engine, _):
        block = recipe["block_tokens"]
        learning_speed(engine, [random_tokens(engine, prompt_tokens, 0)], 8 * block, block, learning, 1)
        engine_metrics = swaps_and_holds(engine)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    result = {
        "preset": preset,
        "adaptation": {**recipe, "adapters_root": None},
        "streams": streams,
        "written": written,
        "rounds": rounds,
        "threads": threads,
        "tokens_per_s": medians,
        "ratios": ratios(medians, streams),
        "swap_rank": swap_rank,
        **engine_metrics,
        "flops": flops_rows(),
    }
    print_tables(result)
    write_json(json_out, result)
    if plot_out is not None:
        draw(plot_out, counts, medians)


def ratios(medians: dict[str, float], streams: int) -> dict[str, float]:
    """Of tokens/s."""
    found = {"to official": medians[f"longctx {streams}"] / medians["official"]}
    if streams > 1:
        found["to one after another"] = medians[f"longctx {streams}"] / medians["longctx 1"]
        found["bystanders to idle trainer"] = medians["bystanders"] / medians["bystanders, idle trainer"]
    return found


def longctx(preset: str, adaptation: dict[str, Any]) -> dict[str, Any]:
    return {"longctx": {"preset": preset, "adaptation": adaptation}}


def draw(path: Path, counts: list[int], medians: dict[str, float]) -> None:
    ours = [medians[f"longctx {n}"] for n in counts]
    curves = {
        "longctx": (counts, ours),
        "official loop, one stream after another": (counts, [medians["official"]] * len(counts)),
    }
    plot(path, curves, "streams at once", "tokens/s, all streams together")


def print_tables(result: dict[str, Any]) -> None:
    table = Table(
        "way", "tokens/s", title=f"{result['streams']} streams that write {result['written']:,} tokens each"
    )
    for name, speed in result["tokens_per_s"].items():
        table.add_row(name, f"{speed:,.1f}")
    table.add_section()
    for name, ratio in result["ratios"].items():
        table.add_row(f"ratio {name}", f"{ratio:.2f}")
    table.add_section()
    table.add_row(f"swap at rank {result['swap_rank']}", f"{result['swap_ms']:.2f} ms")
    table.add_row("empty steps while all are held", f"{result['empty_steps_per_s']:.0f}/s")
    flops = Table(
        "preset",
        *TRAINING_FORWARDS,
        "paper",
        title="FLOPs per token against a 24K window, sizes of the paper",
    )
    for row in result["flops"]:
        flops.add_row(row["preset"], *(f"{x:+.1%}" for x in row["change"].values()), f"{row['paper']:+.1%}")
    for each in (table, flops):
        Console(width=110).print(each)


if __name__ == "__main__":
    typer.run(main)
