"""Texts that teach a small model the pass-key task inside its trained length; booklm by itself cannot do it
at any length.

    python benchmarks/passkey_texts.py DIR
    python benchmarks/train_booklm.py DIR/train DIR/validation OUT --minutes 15 --init vllm_longctx/booklm
    vllm-longctx passkey --model OUT --methods lm-infinite,streaming,window,plain --stock-tokens 4096

More minutes: again with `--init OUT`, until the answers are right. The figures of benchmarks/README.md had
    1.25 million tokens.

Keys are random, so there is none to be learnt by heart; prompts have at most about 350 tokens of booklm,
answer included.
"""

import random
from pathlib import Path

import typer

from vllm_longctx.cli.passkey import FILLER, KEY, QUESTION, TASK


def solved(rng: random.Random) -> str:
    """A pass-key prompt and its answer."""
    units, key = rng.randrange(11), rng.randrange(10_000, 100_000)
    before = rng.randrange(units + 1)
    filler = [FILLER] * units
    return " ".join([TASK, *filler[:before], KEY.format(key=key), *filler[before:], QUESTION, f"{key}."])


def main(out_dir: Path, prompts: int = 20_000, seed: int = 7) -> None:
    rng = random.Random(seed)
    for part, count in (("train", prompts), ("validation", max(prompts // 50, 1))):
        (out_dir / part).mkdir(parents=True, exist_ok=True)
        (out_dir / part / "passkey.txt").write_text("\n".join(solved(rng) for _ in range(count)))


if __name__ == "__main__":
    typer.run(main)
