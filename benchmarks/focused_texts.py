"""Texts that teach a model which finds pass keys in its window (`passkey_texts.py`) that they may stand in
its memory.

    python benchmarks/focused_texts.py TEXTS
    vllm-longctx train-focused --model TAUGHT --texts TEXTS --texts BOOKS ...

Each document is the task of `vllm-longctx passkey` with one pass key, and asks for it again and again. One
key: two in a document, or in a document and its distractor, would contradict each other.
"""

import random
from pathlib import Path
from typing import Annotated

import typer
from transformers import PreTrainedTokenizerBase

from vllm_longctx.cli.engine import tokenizer_of
from vllm_longctx.cli.passkey import FILLER, KEY, QUESTION, TASK


def document(rng: random.Random, tokenizer: PreTrainedTokenizerBase, tokens: int) -> str:
    """About `tokens` tokens: a pass key somewhere in the first three fifths, asked for about every seventh
    sentence after.
    """
    key, at, told, length = rng.randrange(10_000, 100_000), rng.uniform(0, 0.6) * tokens, False, 0
    parts = [TASK]
    while (length := length + len(tokenizer(parts[-1], add_special_tokens=False)["input_ids"])) < tokens:
        if not told and length >= at:
            told = True
            parts.append(KEY.format(key=key))
        else:
            parts.append(f"{QUESTION} {key}." if told and rng.random() < 1 / 7 else FILLER)
    return " ".join(parts)


def main(
    out_dir: Path,
    documents: Annotated[int, typer.Option(min=1)] = 2800,
    tokens: Annotated[
        int, typer.Option(help="Of a document, about: two contexts and a little.", min=1)
    ] = 1110,
    model: Annotated[str, typer.Option(help="Whose tokenizer counts.")] = "booklm",
    seed: int = 11,
) -> None:
    tokenizer = tokenizer_of(model)
    out_dir.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        (out_dir / f"{number:04}.txt").write_text(
            document(random.Random(f"{seed}/{number}"), tokenizer, tokens)
        )


if __name__ == "__main__":
    typer.run(main)
