"""Does the Memorizing Transformer's objective help after CrossBatch? It, and as much more of CrossBatch.

    python benchmarks/second_stage.py OUT_DIR --texts BOOKS --held-out DIR

Two trainings go on from a model with a memory, for as many steps on the same batches: `crossbatch` as before,
and `memorizing`. Their texts are the books of BOOKS and pass keys (`focused_texts.py`). So it is with a model
that looks up dictionaries (`dictionary.py`), on as many tokens: under CrossBatch a dictionary fills one
context, since only the context before is in the memory.

`focused.py` asks the model before, and both after, through the engine: pass keys, perplexity of the books in
DIR, dictionaries. It prints the tables. Models, figures and the losses of trainings are in OUT_DIR. If a run
was broken off, give another OUT_DIR.
"""

import shutil
from pathlib import Path
from typing import Annotated

import dictionary
import focused
import focused_texts
import torch
import typer

from vllm_longctx.cli.engine import model_path
from vllm_longctx.cli.train_focused import numbers, train_focused
from vllm_longctx.training.trainer import OBJECTIVES, Recipe, Trainer, load, save

BOOKLM_MEMORY = Path(__file__).parent / "booklm-memory"
CONTEXT = 512  # booklm's trained length
LITTLE = 90  # tokens by which a document is longer than its row, since `focused_texts` counts about


def books_and_keys(
    out_dir: Path, model: str, texts: Path, steps: int, batch: int, contexts: int, learning_rate: float,
    documents: int, threads: int | None, bf16: bool,
) -> list[Path]:  # fmt: skip
    """The model before, and after each objective."""
    keys = out_dir / "keys"
    focused_texts.main(keys, documents, tokens=contexts * CONTEXT + LITTLE)
    before = out_dir / "before"
    shutil.copytree(model_path(model), before)
    for objective in OBJECTIVES:
        train_focused(
            texts=[texts, keys],
            out=out_dir / objective,
            model=str(before),
            objective=objective,
            schedule=str(batch if objective == "crossbatch" else 1),
            steps=steps,
            batch=batch,
            contexts=contexts,
            learning_rate=learning_rate,
            threads=threads,
            bf16=bf16,
        )
    return [before, *(out_dir / objective for objective in OBJECTIVES)]


def dictionaries(
    out_dir: Path, first_steps: int, steps: int, contexts: int, learning_rate: float
) -> list[Path]:
    """The model before, and after each objective, on as many tokens of each."""
    layers, size, schedule = dictionary.MEM_LAYERS, dictionary.CONTEXT, numbers("", dictionary.SCHEDULE)
    d = max(schedule)
    tokens = 2 * d * size
    paths = [out_dir / f"dictionary-{name}" for name in ("before", *OBJECTIVES)]
    first = Recipe(layers, size, first_steps, False, 2, d, schedule, dictionary.LEARNING_RATE)
    trainer = dictionary.train(first, numbers("", dictionary.SIZES), "dictionary, before")
    save(trainer.model, dictionary.Language().tokenizer(), first, paths[0], size, "float32", torch.float32)
    for path, objective in zip(paths[1:], OBJECTIVES, strict=True):
        is_first = objective == "crossbatch"
        filled, documents = (2, d) if is_first else (contexts, 1)
        recipe = Recipe(
            layers, size, steps, False, filled, d, [documents], learning_rate, seed=1, objective=objective
        )
        trainer = Trainer(load(paths[0]), recipe)
        dictionary.learn(trainer, [(filled - 1) * dictionary.FACTS], f"dictionary, {objective}", tokens)
        save(trainer.model, dictionary.Language().tokenizer(), recipe, path, size, "float32", torch.float32)
    return paths


def main(
    out_dir: Annotated[Path, typer.Argument(help="A new directory.")],
    texts: Annotated[Path, typer.Option(help="Directory of .txt files, books to train on.")],
    held_out: Annotated[Path, typer.Option(help="Directory of .txt files, books to measure on.")],
    model: Annotated[str, typer.Option(help="With a memory, and booklm's tokenizer.")] = str(BOOKLM_MEMORY),
    steps: Annotated[int, typer.Option(help="Of each training.", min=1)] = 150,
    batch: Annotated[int, typer.Option(help="Documents; CrossBatch's d, too.", min=2)] = 8,
    contexts: Annotated[int, typer.Option(help="Of a document.", min=2)] = 8,
    learning_rate: float = 1e-4,
    documents: Annotated[int, typer.Option(help="With pass keys.", min=1)] = 700,
    dictionary_steps: Annotated[
        str, typer.Option(help="Of the first stage, and of each second one.")
    ] = "160,80",
    dictionary_contexts: Annotated[int, typer.Option(help="Of a dictionary and its questions.", min=2)] = 9,
    lengths: Annotated[str, typer.Option(help="Of prompts with a pass key.")] = "1024,4096,8192,25600",
    trials: Annotated[int, typer.Option(help="Per length and place of the key.", min=1)] = 20,
    max_tokens: Annotated[int, typer.Option(help="Of each book, for perplexity.", min=2)] = 16384,
    times: Annotated[str, typer.Option(help="Dictionaries, in training contexts.")] = "1,16,256",
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="As of train-focused.")] = False,
) -> None:
    out_dir.mkdir(parents=True)
    read = books_and_keys(
        out_dir, model, texts, steps, batch, contexts, learning_rate, documents, threads, bf16
    )
    first_steps, second_steps = numbers("--dictionary-steps", dictionary_steps)
    looked_up = dictionaries(out_dir, first_steps, second_steps, dictionary_contexts, learning_rate)
    ask(out_dir, "passkey", read, "--lengths", lengths, "--trials", str(trials))
    ask(out_dir, "perplexity", read, "--texts", str(held_out), "--max-tokens", str(max_tokens))
    ask(out_dir, "dictionary", looked_up, "--times", times)


def ask(out_dir: Path, task: str, models: list[Path], *words: str) -> None:
    """Prints a table of focused.py's."""
    given = ["--methods", "focused", "--json", str(out_dir / f"{task}.json")]
    focused.app([task, *map(str, models), *words, *given], standalone_mode=False)


if __name__ == "__main__":
    typer.run(main)
