"""A directory of books, read by several engines at once, on one machine or on a cluster of Ray's.

    python examples/ray_corpus.py BOOKS OUT --actors 2
    python examples/ray_corpus.py BOOKS OUT --actors 8 --gpus-per-actor 1 --preset temp-lora-quality

Needs Ray: pip install 'vllm-longctx[ray]'. BOOKS holds .txt files. For each of them OUT gets a JSON file with
its loss (nats per token), what the model wrote after it, and the name of its adapter, if it learned one.

A book that has its file is done: the same command goes on where it was broken off. If an actor dies, Ray
starts another one, which reads again what has no file yet. On several machines, BOOKS and OUT must be on a
disk that all of them see.
"""

import argparse
import fcntl
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from vllm_longctx import BOOKLM

ADAPTERS = "adapters"  # below OUT


def take_cores(count: int) -> list[int]:
    """Cores of this machine that no other actor has. The kernel takes them back when this process ends."""
    taken: list[int] = []
    for core in sorted(os.sched_getaffinity(0)):
        path = Path(tempfile.gettempdir(), f"ray_corpus-{os.getuid()}-core-{core}")
        lock = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)  # never closed: then another one could lock it
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        taken.append(core)
        if len(taken) == count:
            return taken
    raise RuntimeError(f"this machine has {len(taken)} free cores, and an actor takes {count}")


def result_of(out: Path, book: Path) -> Path:
    return out / f"{book.stem}.json"


class Reader:
    """An actor: an engine of its own, which reads the books of a batch at the same time."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.learns = args, args.preset.startswith("temp-lora")
        if not args.gpus_per_actor:
            cores = take_cores(args.cpus_per_actor)
            os.sched_setaffinity(0, cores)
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine ends with its actor
        from vllm import LLM

        longctx: dict[str, Any] = {"preset": args.preset}
        if self.learns:
            longctx["adaptation"] = {"adapters_root": str(args.out / ADAPTERS)}
        model = BOOKLM if args.model == "booklm" else args.model
        self.llm = LLM(model, additional_config={"longctx": longctx}, **json.loads(args.engine))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """batch: the paths of books, under "book"."""
        from vllm import SamplingParams

        tokenizer = self.llm.get_tokenizer()
        books = [Path(book) for book in batch["book"]]
        left = [book for book in books if not result_of(self.args.out, book).exists()]
        texts = [tokenizer.encode(book.read_text(encoding="utf-8", errors="replace")) for book in left]
        asked = tokenizer.encode(self.args.ask, add_special_tokens=False)
        params = [
            SamplingParams(
                max_tokens=self.args.write,
                temperature=0,
                prompt_logprobs=0,
                flat_logprobs=True,
                extra_args={"longctx": {"temp_lora": True, "save_as": book.stem}} if self.learns else None,
            )
            for book in left
        ]
        begin = time.time()
        prompts = [{"prompt_token_ids": text + asked} for text in texts]
        outputs = self.llm.generate(prompts, params, use_tqdm=False) if left else []
        end = time.time()
        for book, text, output in zip(left, texts, outputs, strict=True):
            refusal = (output.kv_transfer_params or {}).get("longctx", {})
            result = {
                "book": book.name,
                "tokens": len(text),
                "nll": -fmean(output.prompt_logprobs.logprobs[: len(text) - 1]),
                "written": output.outputs[0].text,
                "adapter": book.stem if self.learns and "save_error" not in refusal else None,
                "began": begin,
                "ended": end,
            }
            unfinished = result_of(self.args.out, book).with_suffix(f".{os.getpid()}")
            unfinished.write_text(json.dumps(result, indent=1) + "\n")
            unfinished.rename(result_of(self.args.out, book))  # whole, or not there
        return {"book": [book.name for book in books]}


def read(args: argparse.Namespace, books: list[str]) -> None:
    """Until each of these books has its file."""
    try:
        import ray
        from ray.data import ActorPoolStrategy, from_items
    except ImportError as e:
        raise SystemExit(f"Ray is not here ({e}); pip install 'vllm-longctx[ray]'") from None
    ray.init(ignore_reinit_error=True, log_to_driver=args.verbose)
    batches = -(-len(books) // args.at_once)
    done = from_items([{"book": book} for book in books], override_num_blocks=batches).map_batches(
        Reader,
        fn_constructor_args=(args,),
        batch_size=args.at_once,
        compute=ActorPoolStrategy(size=args.actors),
        num_cpus=args.cpus_per_actor,
        num_gpus=args.gpus_per_actor,
    )
    for row in done.iter_rows():
        print(row["book"], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("books", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="booklm", help="a directory or a name; booklm ships with longctx")
    parser.add_argument("--preset", default="lm-infinite", help="of the configuration of longctx")
    parser.add_argument("--engine", default="{}", help="vLLM's engine arguments, as JSON")
    parser.add_argument("--actors", type=int, default=1, help="engines at once")
    parser.add_argument("--cpus-per-actor", type=int, default=1)
    parser.add_argument("--gpus-per-actor", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=4, help="books that an engine reads at the same time")
    parser.add_argument("--ask", default="", help="text after each book, such as a request for a summary")
    parser.add_argument("--write", type=int, default=1, help="tokens to write after it")
    parser.add_argument("--verbose", action="store_true", help="show what the engines log")
    args = parser.parse_args()

    books = sorted(args.books.resolve().glob("*.txt"))
    if not books:
        raise SystemExit(f"{args.books} holds no .txt file")
    args.out = args.out.resolve()
    (args.out / ADAPTERS).mkdir(parents=True, exist_ok=True)
    left = [book for book in books if not result_of(args.out, book).exists()]
    print(f"{len(books) - len(left)} of {len(books)} books are done", flush=True)
    if left:
        read(args, [str(book) for book in left])
    results = {book: json.loads(result_of(args.out, book).read_text()) for book in books}
    tokens = sum(result["tokens"] for result in results.values())
    nll = sum(result["nll"] * result["tokens"] for result in results.values()) / tokens
    print(f"{len(books)} books, {tokens:,} tokens, {nll:.3f} nats per token")
    if new := [results[book] for book in left]:
        seconds = max(result["ended"] for result in new) - min(result["began"] for result in new)
        print(
            f"{sum(result['tokens'] for result in new) / seconds:,.0f} tokens/s, without the start of engines"
        )


if __name__ == "__main__":
    main()
