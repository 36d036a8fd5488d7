"""Whether the trainer would be faster if it trained blocks of several requests in one pass.

    python benchmarks/batched_passes.py --json OUT.json

Forward and backward of a request's example, with one request a pass as the trainer does it, and with several:
each row with the adapter of its request (peft's `adapter_names`), and, as a bound, all rows with one adapter.
Medians over rounds.
"""

import statistics
import time
from collections import defaultdict
from typing import Annotated

import torch
import typer
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from vllm_longctx.cli.engine import model_path
from vllm_longctx.cli.options import JsonOut
from vllm_longctx.cli.output import write_json
from vllm_longctx.cli.train_focused import numbers
from vllm_longctx.training.trainer import DTYPES

WAYS = ("one adapter each", "one adapter for all")


def main(
    model: str = "booklm",
    rank: int = 8,
    tokens: Annotated[int, typer.Option(help="Of an example; the later half are its targets.")] = 256,
    rows: Annotated[str, typer.Option(help="Requests in a pass.")] = "1,2,4,8",
    dtype: Annotated[str, typer.Option(help="Of the base's weights; adapters are float32.")] = "float32",
    threads: int = 1,
    rounds: int = 5,
    json_out: JsonOut = None,
) -> None:
    if dtype not in DTYPES:
        raise typer.BadParameter(f"--dtype {dtype}: give one of {', '.join(DTYPES)}")
    torch.set_num_threads(threads)
    counts = numbers("--rows", rows)
    names = [f"request {n}" for n in range(max(counts))]
    config = LoraConfig(
        r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_path(model), dtype=DTYPES[dtype]), config, names[0]
    )
    for name in names[1:]:
        adapted.add_adapter(name, config)
    adapted.eval()
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("lora_" in name)
    ids = torch.randint(
        adapted.config.vocab_size, (len(names), tokens), generator=torch.Generator().manual_seed(0)
    )
    targets = tokens // 2
    seconds = defaultdict(list)
    for number in track(range(rounds + 1), "passes"):  # the first one warms up
        for way in WAYS:
            for count in counts:
                chosen = {"adapter_names": names[:count]} if way == WAYS[0] else {}
                start = time.perf_counter()
                output = adapted(input_ids=ids[:count], use_cache=False, logits_to_keep=targets + 1, **chosen)
                cross_entropy(
                    output.logits[:, :-1].flatten(0, 1), ids[:count, -targets:].flatten()
                ).backward()
                if number:
                    seconds[way, count].append((time.perf_counter() - start) / count)
    table = Table("requests in a pass", *(f"{way}, ms per example" for way in WAYS))
    for count in counts:
        table.add_row(str(count), *(f"{1000 * statistics.median(seconds[way, count]):.0f}" for way in WAYS))
    Console().print(table)
    result = {way: {count: 1000 * statistics.median(seconds[way, count]) for count in counts} for way in WAYS}
    write_json(json_out, {"tokens": tokens, "rank": rank, "dtype": dtype, "threads": threads, "ms": result})


if __name__ == "__main__":
    typer.run(main)
