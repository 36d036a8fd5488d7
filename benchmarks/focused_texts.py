"""Texts that teach a small model to look things up in its memory; booklm cannot even repeat what stands in its window.

    python benchmarks/focused_texts.py DIR --apart 512
    vllm-longctx train-focused --model booklm --texts DIR --texts BOOKS ...

Endless-looking documents of three kinds of sentences. Facts: pass keys as in `vllm-longctx passkey`, and the same of other keys
with names of their own, asked for later. Lists of random words, said again later: every one of their words can be looked up,
which teaches the lookup itself much sooner than five digits in a text do. And the task's filler, which is neither.

With --task-only documents hold one pass key and filler, and ask for the key again and again: for a model that knows the task
inside its window (`passkey_texts.py`) and is to learn that what it looks for may stand in the memory.
"""

import heapq
import random
from pathlib import Path
from typing import Annotated

import typer
from transformers import AutoTokenizer

from vllm_longctx.cli.engine import model_path
from vllm_longctx.cli.passkey import FILLER, KEY, QUESTION, TASK

PASS_SHARE = 0.15  # of the facts, how many are of the pass key itself
LONGEST_LIST = 24  # words


def about(text: str, name: str) -> str:
    return text.replace("pass key", f"{name} key")


def document(rng: random.Random, tokenizer: object, words: list[str], tokens: int, apart: int, share: dict[str, float]) -> str:
    """About `tokens` tokens; what is looked up stands half to one and a half times `apart` tokens before, on average once.

    share: of the sentences, by kind; they sum to 1.
    """
    parts, length, due = [TASK], 0, []
    pass_key_until = 0

    def say(text: str) -> None:
        nonlocal length
        parts.append(text)
        length += len(tokenizer(text, add_special_tokens=False)["input_ids"])

    while length < tokens:
        if due and due[0][0] <= length:
            say(heapq.heappop(due)[1])
            continue
        kind = rng.choices(list(share), list(share.values()))[0]
        later = length + round(apart * rng.uniform(0.5, 1.5))
        if kind == "fact":
            name, key = " ".join(rng.sample(words, 2)), rng.randrange(10_000, 100_000)
            if rng.random() < PASS_SHARE and length >= pass_key_until:
                name, pass_key_until = "pass", later + apart  # two different ones in reach would contradict each other
            say(about(KEY.format(key=key), name))
            heapq.heappush(due, (later, about(f"{QUESTION} {key}.", name)))
        elif kind == "list":
            text = " ".join(rng.choices(words, k=rng.randint(8, LONGEST_LIST))) + "."
            say(text)
            heapq.heappush(due, (later, text))
        else:
            say(" ".join([FILLER] * rng.randint(1, max(apart // 64, 1))))
    return " ".join(parts)


def task_document(rng: random.Random, tokenizer: object, tokens: int) -> str:
    """About `tokens` tokens: one pass key somewhere in the first three fifths, asked for about every seventh sentence after."""
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
    documents: int = 32,
    tokens: Annotated[int, typer.Option(help="Of a document, about.")] = 100_000,
    apart: Annotated[int, typer.Option(help="Tokens between a thing and its repetition: a context's length.")] = 512,
    lists: Annotated[float, typer.Option(help="Share of the sentences that are lists; half of the rest are facts.")] = 0.4,
    task_only: Annotated[bool, typer.Option("--task-only", help="One pass key in each document; --tokens 1110 suits.")] = False,
    model: str = "booklm",
    seed: int = 11,
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path(model), model_max_length=1 << 60)
    candidates = (token.removeprefix("Ġ") for token in sorted(tokenizer.get_vocab()) if token.startswith("Ġ"))
    words = [word for word in candidates if word.isalpha() and word.islower() and len(word) > 2]
    share = {"list": lists, "fact": (1 - lists) / 2, "filler": (1 - lists) / 2}
    out_dir.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        rng = random.Random(f"{seed}/{number}")
        text = task_document(rng, tokenizer, tokens) if task_only else document(rng, tokenizer, words, tokens, apart, share)
        (out_dir / f"{number:03}.txt").write_text(text)


if __name__ == "__main__":
    typer.run(main)
