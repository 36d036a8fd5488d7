"""The dictionary lookup of the Focused Transformer (arXiv 2307.03170, section 4): train small, look up far.

    python benchmarks/dictionary.py OUT_DIR --json OUT.json --plot OUT.png

A dictionary is a list of facts, a key of three tokens and a value of one; then it is asked for: keys again, in another order,
whose values are to be told. In training it fills one context, its questions the next. Two models are trained from nothing by
`vllm_longctx.training`, alike but for the schedule of d: CrossBatch's rises, the other's is 1 throughout, so that its memory
only ever holds its own document. Both are saved as LongLLaMA checkpoints, OUT_DIR/dictionary and OUT_DIR/dictionary-plain, and
asked with dictionaries of up to 256 training contexts in memory, the answer being the likeliest token (chance is 1 in 64).
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from vllm_longctx.cli.engine import plot
from vllm_longctx.geometry import SteppedWindows
from vllm_longctx.models.longllama import LongLlamaConfig
from vllm_longctx.training.crossbatch import MemoryModel
from vllm_longctx.training.trainer import Recipe, Trainer, load_llama, save_longllama

CONTEXT = 48
KEY_TOKENS, FACT_TOKENS = 2, 3
LETTERS, VALUES = 256, 64
FIRST_VALUE = KEY_TOKENS * LETTERS  # tokens before are keys' first letters, then their second ones
FACTS = CONTEXT // FACT_TOKENS
MEM_LAYERS = (1,)
TIMES = (1, 4, 16, 64, 256)


def facts(rows: int, count: int, generator: torch.Generator) -> Tensor:
    """[rows, count, FACT_TOKENS]: no key twice in a row."""
    numbers = torch.stack([torch.randperm(LETTERS**KEY_TOKENS, generator=generator)[:count] for _ in range(rows)])
    key = torch.stack([numbers // LETTERS**k % LETTERS + k * LETTERS for k in range(KEY_TOKENS)], -1)
    value = torch.randint(VALUES, (rows, count, 1), generator=generator) + FIRST_VALUE
    return torch.cat([key, value], -1)


def task(rows: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Dictionaries of `count` facts [rows, tokens], and FACTS questions with their answers [rows, CONTEXT] for each."""
    known = facts(rows, count, generator)
    asked = torch.stack([torch.randperm(count, generator=generator)[:FACTS] for _ in range(rows)])
    return known.flatten(1), known[torch.arange(rows)[:, None], asked].flatten(1)


def answers(questions: Tensor) -> Tensor:
    """Of the next tokens [rows, CONTEXT] those that are values; -100 elsewhere."""
    following = questions.roll(-1, 1)
    return following.where(following >= FIRST_VALUE, -100)


def new_model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LongLlamaConfig(
            vocab_size=FIRST_VALUE + VALUES,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=64,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=False,
            initializer_range=0.08,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def words() -> PreTrainedTokenizerFast:
    """a0 .. a255 b0 .. b255 v0 .. v63, with blanks between."""
    vocabulary = {f"a{n}": n for n in range(LETTERS)} | {f"b{n}": LETTERS + n for n in range(LETTERS)}
    vocabulary |= {f"v{n}": FIRST_VALUE + n for n in range(VALUES)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def train(recipe: Recipe, label: str) -> Trainer:
    torch.manual_seed(recipe.seed)
    trainer = Trainer(new_model(), recipe)
    generator = torch.Generator().manual_seed(recipe.seed)
    for _ in track(range(recipe.steps), label):
        known, questions = task(recipe.rows, FACTS, generator)
        targets = torch.stack([torch.full_like(known, -100), answers(questions)], 1)
        row = trainer.train(torch.stack([known, questions], 1), targets)
        if trainer.step % 50 == 0:
            print(row["step"], row["d"], round(row["memory"], 3), flush=True)
    return trainer


@torch.no_grad()
def accuracy(memory: MemoryModel, times: int, texts: int, seed: int) -> float:
    """Share of right answers with a dictionary of `times` contexts in memory."""
    known, questions = task(texts, times * FACTS, torch.Generator().manual_seed(seed))
    for _, hidden in memory.read(torch.cat([known, questions], 1), SteppedWindows(CONTEXT, CONTEXT)):
        last = hidden
    targets = answers(questions)
    right = memory.model.lm_head(last).argmax(-1) == targets
    return float(right[targets >= 0].float().mean())


def main(
    out_dir: Path,
    steps: int = 1000,
    rows: int = 64,
    schedule: str = "1,2,4,8,16,32,64,64",
    learning_rate: float = 2e-3,
    texts: Annotated[int, typer.Option(help="Dictionaries of each size to ask about, 16 questions each.")] = 64,
    seed: int = 0,
    json_out: Annotated[Path | None, typer.Option("--json")] = None,
    plot_out: Annotated[Path | None, typer.Option("--plot", help="Accuracy against the memory's length.")] = None,
    plain: bool = True,
) -> None:
    ds = [int(word) for word in schedule.split(",")]
    result: dict[str, dict[int, float]] = {}
    for name, documents in {"dictionary": ds, **({"dictionary-plain": [1]} if plain else {})}.items():
        recipe = Recipe(MEM_LAYERS, CONTEXT, steps, False, 2, rows, documents, learning_rate, seed=seed)
        trainer = train(recipe, name)
        save_longllama(trainer.model, words(), recipe, out_dir / name, CONTEXT, "float32", torch.float32)
        memory = MemoryModel(load_llama(out_dir / name), MEM_LAYERS, mem_positionals=False)
        result[name] = {times: accuracy(memory, times, texts, seed + 1) for times in TIMES}
        print(name, result[name])
    print_table(result)
    if json_out is not None:
        rows_out = [
            {"model": m, "times": t, "tokens": t * CONTEXT, "accuracy": a} for m, r in result.items() for t, a in r.items()
        ]
        settings = {
            "context": CONTEXT,
            "steps": steps,
            "rows": rows,
            "schedule": ds,
            "learning_rate": learning_rate,
            "seed": seed,
        }
        json_out.write_text(json.dumps({**settings, "questions": texts * FACTS, "rows": rows_out}, indent=1) + "\n")
    if plot_out is not None:
        curves = {name: ([t * CONTEXT for t in r], list(r.values())) for name, r in result.items()}
        plot(plot_out, curves, "memory (tokens)", "accuracy")


def print_table(result: dict[str, dict[int, float]]) -> None:
    table = Table("memory / training context", *result, title="right answers, %")
    for times in TIMES:
        table.add_row(f"{times} × {CONTEXT}", *(f"{100 * by_times[times]:.1f}" for by_times in result.values()))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
