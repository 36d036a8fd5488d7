"""`vllm-longctx train-focused`: give a model memory layers, by training on texts."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_longctx.cli.engine import model_path, tokenizer_of
from vllm_longctx.cli.output import console, counting, errors_for_users, figure
from vllm_longctx.files import sync

if TYPE_CHECKING:
    from vllm_longctx.training.data import Documents
    from vllm_longctx.training.trainer import CheckpointMemory, Recipe, Trainer

VALIDATION_BATCHES = 2
# Of each objective: d over the steps, and the contexts of a row.
SCHEDULES = {"crossbatch": "1,2,4,8", "memorizing": "1"}
CONTEXTS = {"crossbatch": 2, "memorizing": 8}


def train_focused(
    texts: Annotated[
        list[Path], typer.Option(help="Directory with a document per .txt file. May be given several times.")
    ],
    out: Annotated[Path, typer.Option(help="Directory for the checkpoint and the loss curves.")],
    mem_layers: Annotated[
        str | None,
        typer.Option(
            help="Layers that get a memory, counted from 0, such as 2,4. Default: those of the checkpoint."
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="Directory of a decoder's checkpoint, or `booklm`.")] = "booklm",
    validation: Annotated[
        Path | None, typer.Option(help="Directory of texts to measure the loss on.")
    ] = None,
    objective: Annotated[
        str,
        typer.Option(
            help="crossbatch: a memory of several documents, through which gradients flow. memorizing: a "
            "memory of all of the context's own document, through which none flow."
        ),
    ] = "crossbatch",
    steps: Annotated[int, typer.Option(help="Steps of the optimizer.", min=1)] = 1000,
    batch: Annotated[int, typer.Option(help="Documents in a batch.", min=1)] = 16,
    schedule: Annotated[
        str | None,
        typer.Option(
            help="Values of the paper's d, for equal shares of the steps. Default: 1,2,4,8; memorizing: 1"
        ),
    ] = None,
    context_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of a context. Default: the checkpoint's, or the trained length.", min=2),
    ] = None,
    contexts: Annotated[
        int | None,
        typer.Option(
            help="Consecutive contexts of a document in a row of a batch. Default: 2; memorizing: 8"
        ),
    ] = None,
    mem_positionals: Annotated[
        bool | None,
        typer.Option(help="Rotate queries and keys in memory layers. Default: the checkpoint's, or yes."),
    ] = None,
    mem_dtype: Annotated[
        str | None,
        typer.Option(
            help="Type of memory keys and values in the engine. Default: the checkpoint's, or bfloat16."
        ),
    ] = None,
    last_context_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a prompt's last window in the engine. Default: the checkpoint's, or half.",
            min=1,
        ),
    ] = None,
    learning_rate: Annotated[
        float, typer.Option(help="Largest rate. It rises linearly, and falls by a cosine to a tenth.")
    ] = 3e-4,
    dtype: Annotated[str, typer.Option(help="Type of the written weights: float32 or bfloat16.")] = "float32",
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Multiply in bfloat16, for CPUs with AVX512-BF16 or AMX.")
    ] = False,
    recompute: Annotated[
        bool,
        typer.Option(
            "--recompute", help="Gradient checkpointing: compute layers twice, and keep only their inputs."
        ),
    ] = False,
    save_every: Annotated[
        int, typer.Option(help="Steps between states that --resume can go on from.", min=1)
    ] = 100,
    resume: Annotated[
        bool, typer.Option(help="Go on after a kill: give the same command, and --resume.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads. Give no more than there are free cores.", min=1)
    ] = None,
    seed: int = 0,
) -> None:
    """Train memory layers, by CrossBatch or by the Memorizing Transformer's objective, and write a
    checkpoint.
    """
    import torch

    from vllm_longctx.training.trainer import (
        DTYPES,
        STATE_NAME,
        CheckpointMemory,
        Recipe,
        Trainer,
        load,
        save,
    )

    if threads is not None:
        torch.set_num_threads(threads)
    state = out / STATE_NAME
    with errors_for_users():
        check_words(objective, dtype, mem_dtype)
        check_out(out, state, resume)
        decoder = load(model_path(model))
        before = CheckpointMemory.of(decoder)
        given = of_recipe(before, objective, mem_layers, mem_positionals, context_tokens, contexts, schedule)
        recipe = Recipe(**given, steps=steps, rows=batch, learning_rate=learning_rate, bf16=bf16, seed=seed)
        trainer, tokenizer = Trainer(decoder, recipe, recompute), tokenizer_of(model)
        documents, held_out = read(texts, validation, tokenizer, recipe)
        about = {"model": str(Path(model_path(model)).resolve()), "texts": documents.fingerprint()}
        out.mkdir(parents=True, exist_ok=True)
        (trainer.load_state if resume else trainer.save_state)(state, **about)
        keep_state = partial(trainer.save_state, state, **about)
        rows = train(trainer, documents, held_out, out, save_every, keep_state)
        tokens = recipe.context_tokens
        last = last_context_length or min(before.last_context_tokens or max(tokens // 2, 1), tokens)
        save(decoder, tokenizer, recipe, out, last, mem_dtype or before.dtype, DTYPES[dtype])
    draw(out / "losses.png", rows)
    sync(out)  # before what could make it again is removed
    state.unlink(missing_ok=True)
    console.print(f"checkpoint and loss curves: {out}")


def check_words(objective: str, dtype: str, mem_dtype: str | None) -> None:
    """Raises ValueError for a word that an option does not have."""
    from vllm_longctx.training.trainer import DTYPES, OBJECTIVES

    if objective not in OBJECTIVES:
        raise ValueError(f"--objective {objective}: give one of {', '.join(OBJECTIVES)}")
    for option, word in (("--dtype", dtype), ("--mem-dtype", mem_dtype)):
        if word is not None and word not in DTYPES:
            raise ValueError(f"{option} {word}: give one of {', '.join(DTYPES)}")


def of_recipe(
    before: "CheckpointMemory",
    objective: str,
    mem_layers: str | None,
    mem_positionals: bool | None,
    context_tokens: int | None,
    contexts: int | None,
    schedule: str | None,
) -> dict[str, Any]:
    """Of a `Recipe`, what depends on the checkpoint or on the objective where the user does not say it."""
    return {
        "objective": objective,
        "mem_layers": before.layers if mem_layers is None else numbers("--mem-layers", mem_layers),
        "mem_positionals": before.positionals if mem_positionals is None else mem_positionals,
        "context_tokens": context_tokens or before.context_tokens,
        "contexts": CONTEXTS[objective] if contexts is None else contexts,
        "schedule": numbers("--schedule", SCHEDULES[objective] if schedule is None else schedule),
    }


def check_out(out: Path, state: Path, resume: bool) -> None:
    """Raises ValueError unless a training can begin in `out`, or go on from its state there."""
    if resume and not state.is_file():
        raise ValueError(f"--resume: there is no {state}; a training that is finished has none")
    if not resume and out.is_dir() and any(out.iterdir()):
        raise ValueError(
            f"--out {out} is not empty: give a new directory, or --resume to go on with a training there"
        )


def read(
    texts: Sequence[Path], validation: Path | None, tokenizer: Any, recipe: "Recipe"
) -> tuple["Documents", "Documents | None"]:
    """What to train on, and what to measure the loss on.

    Raises ValueError for documents that are too short, or too few for a batch.
    """
    from vllm_longctx.training.data import Documents

    context = recipe.context_tokens
    with console.status("tokenizing"):
        documents = Documents.read(texts, tokenizer, context)
        held_out = None if validation is None else Documents.read([validation], tokenizer, context)
    if len(documents.names) < recipe.rows:
        raise ValueError(
            f"--texts has {len(documents.names)} documents, fewer than --batch {recipe.rows}; lower it"
        )
    return documents, held_out


def train(
    trainer: "Trainer",
    documents: "Documents",
    held_out: "Documents | None",
    out: Path,
    save_every: int,
    keep_state: Callable[[], None],
) -> list[dict[str, Any]]:
    """Every step that is left. Returns the losses of all steps, which are in a file of `out`, too.

    save_every: Steps after which `keep_state` is called, and the loss on `held_out` is measured.
    """
    from vllm_longctx.training.trainer import LOSSES_NAME

    recipe = trainer.recipe
    rows = rows_until(trainer.step, out / LOSSES_NAME)
    with (out / LOSSES_NAME).open("a") as losses, counting() as progress:
        task = progress.add_task("training", total=recipe.steps, completed=trainer.step)
        while trainer.step < recipe.steps:
            batch = documents.batch(
                recipe.seed, trainer.step, recipe.rows, recipe.contexts, recipe.context_tokens
            )
            row: dict[str, Any] = trainer.train(batch)
            saves = trainer.step % save_every == 0
            if held_out is not None and (saves or trainer.step == recipe.steps):
                row["validation"] = validate(trainer, held_out, int(row["d"]))
            rows.append(row)
            losses.write(json.dumps(row) + "\n")
            losses.flush()
            if saves:
                keep_state()
            label = f"d {row['d']} loss {row['first']:.3f}, with memory {row['memory']:.3f}"
            progress.update(task, completed=trainer.step, description=label)
    return rows


def numbers(option: str, text: str) -> list[int]:
    """Raises ValueError for anything but whole numbers."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} {text}: give whole numbers such as 2,4") from None


def validate(trainer: "Trainer", held_out: "Documents", documents: int) -> dict[str, float]:
    """Mean losses on the same pieces every time, with the step's d as far as there are documents for it."""
    recipe = trainer.recipe
    rows = min(len(held_out.names), recipe.rows)
    batches = [
        held_out.batch(0, k, rows, recipe.contexts, recipe.context_tokens) for k in range(VALIDATION_BATCHES)
    ]
    return trainer.validate(batches, min(documents, rows))


def rows_until(step: int, path: Path) -> list[dict[str, Any]]:
    """The losses that an interrupted training has written up to the step that it goes on from; the file keeps
    no others.
    """
    lines = path.read_text().splitlines(keepends=True)[:step] if path.is_file() else []
    temporary = path.with_suffix(".new")
    temporary.write_text("".join(lines))
    temporary.replace(path)
    return [json.loads(line) for line in lines]


def draw(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Losses against steps: first contexts and those with memory, trained and held out; a line where d
    changes.
    """
    held_out = [row for row in rows if "validation" in row]
    with figure(path, xlabel="step", ylabel="loss (nats per token)") as axes:
        for colour, (kind, label) in zip(
            ("C0", "C1"), (("first", "no memory"), ("memory", "with memory")), strict=True
        ):
            axes.plot([r["step"] for r in rows], [r[kind] for r in rows], colour, lw=0.8, label=label)
            if held_out:
                marks = [r["step"] for r in held_out], [r["validation"][kind] for r in held_out]
                axes.plot(*marks, colour, marker="o", ls="--", label=f"{label}, held out")
        for before, row in zip([None, *rows], rows, strict=False):
            if before is None or before["d"] != row["d"]:
                axes.axvline(row["step"], color="grey", lw=0.8, ls=":")
                axes.text(
                    row["step"],
                    1.0,
                    f" d={row['d']}",
                    transform=axes.get_xaxis_transform(),
                    va="top",
                    fontsize=8,
                )
