"""Table "What was learned is remembered": questions about a book that was read, turns of a chat, and what
keeping costs.

    python benchmarks/remembered.py --json OUT.json --plot OUT.png

Engines that remember, with the default `cache_gib`, and engines with `cache_gib` 0, in turn, in one run.
Texts are random tokens, so that nothing depends on a text. Questions learn from what is read (`learn:
prompt`).

- *second question*: time to first token of a question about a book that another question was asked about
  before, median over the questions, against a request that does not learn and has the window's tokens only.
- *turn of a chat*: each turn sends again all that was said, and adds a text block of question and answer.
  Time to first token of the last turn against that of the second, medians over chats.
- *questions one after another*: all of them about one book, the first one's reading included, in the engine
  that remembers; against as many in the other one, where `--cold-questions` are measured, since all
  take the same time.
- *cold request*: a text that nobody has read, medians over rounds, in two engines of either kind.
- *memory*: resident memory of versions that a trainer keeps, measured here, in this process, against the
  formula of docs/temp-lora.md: 12 bytes · rank · (in + out features of all adapted layers) for each version,
  up to `cache_gib`.

A row whose premise does not hold is void and says why: every block must have been trained, or remembered, as
the row's meaning has it.
"""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import psutil
import typer
from load import greedy, random_tokens
from rich.table import Table

from vllm_longctx.cli.engine import PremiseError, blocks_are_trained, model_path, running_engine, step
from vllm_longctx.cli.options import JsonOut
from vllm_longctx.cli.output import console, figure, tables, write_json

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

QUESTION_TOKENS, ANSWER_TOKENS = 24, 8
BYTES_PER_VALUE = 12  # a weight and AdamW's two moments, float32
MIB = 1 << 20


def ask(
    engine: "LLMEngine", prompt: list[int], tokens: int, longctx: dict[str, Any] | None
) -> tuple[float, list[int], int]:
    """Seconds to the first token, the tokens written, and how many text blocks were remembered."""
    from vllm.inputs import tokens_input

    params = greedy(tokens, extra_args=None if longctx is None else {"longctx": longctx})
    begin, first = time.perf_counter(), None
    engine.add_request("one", tokens_input(prompt), params)
    while True:
        for output in step(engine):
            if first is None and output.outputs[0].token_ids:
                first = time.perf_counter() - begin
            if output.finished:
                written = list(output.outputs[0].token_ids)
                if first is None or len(written) != tokens:
                    raise PremiseError(f"a request wrote {len(written)} tokens of {tokens}")
                said = (output.kv_transfer_params or {}).get("longctx", {})
                return first, written, said.get("blocks_remembered", 0)


def expect_remembered(found: int, blocks: int) -> None:
    """Raises PremiseError if not so many blocks were remembered."""
    if found != blocks:
        raise PremiseError(f"{found} blocks were remembered where {blocks} should be")


def blocks_of(engine: "LLMEngine", tokens: int) -> int:
    """Text blocks of a prompt that are trained before its last token is computed."""
    return (tokens - 1) // sizes(engine)["block_tokens"]


def sizes(engine: "LLMEngine") -> dict[str, Any]:
    found: dict[str, Any] = engine.vllm_config.additional_config["longctx"]["adaptation"]
    return found


def questions_about(
    engine: "LLMEngine", book: list[int], questions: int, remembers: bool
) -> tuple[list[float], float]:
    """Seconds to the first token of each question, one after another, and of all of them to their ends.

    Raises PremiseError unless the book is learned once where it is remembered, and else each time.
    """
    blocks = blocks_of(engine, len(book) + QUESTION_TOKENS)
    if blocks != blocks_of(engine, len(book)):
        raise PremiseError("a question must not end a block of the book; use another --book-tokens")
    firsts, begin = [], time.perf_counter()
    for number in range(questions):
        question = random_tokens(engine, QUESTION_TOKENS, f"question {number}")
        with blocks_are_trained(engine, 0 if remembers and number else blocks):
            first, _, found = ask(
                engine, [*book, *question], ANSWER_TOKENS, {"temp_lora": True, "learn": "prompt"}
            )
        expect_remembered(found, blocks if remembers and number else 0)
        firsts.append(first)
    return firsts, time.perf_counter() - begin


def window_alone(engine: "LLMEngine", rounds: int) -> float:
    """Seconds to the first token of a request that does not learn and fills the window: the median."""
    tokens = sizes(engine)["window_tokens"] - ANSWER_TOKENS
    prompts = [random_tokens(engine, tokens, f"window {number}") for number in range(rounds)]
    return statistics.median(ask(engine, prompt, ANSWER_TOKENS, None)[0] for prompt in prompts)


def chat(engine: "LLMEngine", turns: int, remembers: bool, name: str) -> list[float]:
    """Seconds to the first token of each turn.

    A turn is a text block, half of it an answer. Raises PremiseError unless each turn trains what is new, and
    remembers the rest, or trains all where nothing is remembered.
    """
    block = sizes(engine)["block_tokens"]
    text: list[int] = []
    firsts = []
    for turn in range(turns):
        text += random_tokens(engine, block - block // 2, f"{name} turn {turn}")
        # Of the turns before, all blocks have been trained but the last one, whose last target is new.
        known = max(turn - 1, 0) if remembers else 0
        with blocks_are_trained(engine, turn - known):
            first, written, found = ask(engine, text, block // 2, {"temp_lora": True})
        expect_remembered(found, known)
        firsts.append(first)
        text += written
    return firsts


def reading_seconds(engine: "LLMEngine", tokens: int, name: str) -> float:
    """Of a text that is new. Raises PremiseError unless all of it is trained."""
    text, blocks = random_tokens(engine, tokens, name), blocks_of(engine, tokens)
    begin = time.perf_counter()
    with blocks_are_trained(engine, blocks):
        _, _, found = ask(engine, text, 1, {"temp_lora": True, "learn": "prompt"})
    expect_remembered(found, 0)
    return time.perf_counter() - begin


def cold_seconds(engine: "LLMEngine", tokens: int, rounds: int, part: int) -> list[float]:
    return [reading_seconds(engine, tokens, f"{part} {number}") for number in range(rounds)]


def chats_of(engine: "LLMEngine", turns: int, chats: int, remembers: bool) -> list[list[float]]:
    return [chat(engine, turns, remembers, f"chat {number}") for number in range(chats)]


def memory_rows(
    model: str, ranks: Sequence[int], blocks: Sequence[int], limits: Sequence[float]
) -> list[dict[str, float]]:
    """MiB that versions take in this process, and that the formula says, of each rank, text and limit."""
    import torch
    from transformers import AutoModelForCausalLM

    from vllm_longctx.temp_lora.messages import Recipe
    from vllm_longctx.trainer.trainer import Trainer
    from vllm_longctx.trainer.version_cache import VersionCache

    base = AutoModelForCausalLM.from_pretrained(model_path(model), dtype=torch.float32)
    trainer, process, rows = Trainer(base), psutil.Process(), []
    features = sum(map(sum, trainer.modules.values()))
    for owner, rank in enumerate(ranks):
        trainer.begin(owner, Recipe(rank=rank, alpha=rank, epochs=1))
        trainer.train(owner, 1, list(range(3, 20)), 8)
        for kept in blocks:
            for gib in limits:
                cache = VersionCache(int(gib * 2**30))
                gc.collect()
                ctypes.CDLL(None).malloc_trim(0)  # or what was freed is used again, and does not count
                before = process.memory_info().rss
                for number in range(kept):
                    cache.put(number.to_bytes(8, "big"), trainer.state(owner), owner, [])
                taken = (process.memory_info().rss - before) / MIB
                one = BYTES_PER_VALUE * rank * features
                formula = min(kept, int(gib * 2**30) // one) * one / MIB
                row = {"rank": rank, "blocks": kept, "cache_gib": gib, "mib": taken, "formula_mib": formula}
                rows.append(row)
                del cache
        trainer.drop(owner)
    return rows


class Figures:
    """What was measured, by kind of engine and name; or why it is void."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], Any] = {}
        self.void: dict[tuple[str, str], str] = {}

    def measure(self, kind: str, name: str, measure: Callable[..., Any], *args: Any) -> None:
        with console.status(f"{kind}: {name}"):
            try:
                self.found[kind, name] = measure(*args)
            except PremiseError as e:
                self.void[kind, name] = str(e)

    def row(
        self,
        what: str,
        goal: str,
        one: tuple[str, str],
        other: tuple[str, str],
        seconds: Callable[[Any], float],
    ) -> dict[str, Any]:
        """Of two figures, of which `seconds` takes the seconds."""
        if reasons := [self.void[key] for key in (one, other) if key in self.void]:
            return {"what": what, "goal": goal, "void": reasons[0]}
        ours, beside = seconds(self.found[one]), seconds(self.found[other])
        return {"what": what, "goal": goal, "seconds": ours, "beside": beside, "ratio": ours / beside}


def main(
    model: str = "booklm",
    preset: str = "temp-lora-quality",
    book_tokens: int = 50_000,
    questions: Annotated[int, typer.Option(help="About one book, one after another.", min=2)] = 10,
    cold_questions: Annotated[int, typer.Option(help="How many where nothing is kept.", min=1)] = 3,
    turns: Annotated[int, typer.Option(help="Of a chat.", min=4)] = 40,
    chats: int = 3,
    cold_tokens: Annotated[int, typer.Option(help="Of a text that nobody has read.")] = 8192,
    rounds: Annotated[int, typer.Option(help="Such texts for each engine.")] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: to see that it runs.")] = False,
    json_out: JsonOut = None,
    plot_out: Annotated[Path | None, typer.Option("--plot")] = None,
) -> None:
    ranks, blocks, limits = (4, 8, 16, 64), (8, 32, 128), (0.05, 4.0)
    if quick:
        book_tokens, questions, cold_questions, cold_tokens = 2_000, 3, 2, 1_000
        turns, chats, rounds = 6, 1, 1
        ranks, blocks, limits = (8,), (8,), (4.0,)
    memory = memory_rows(model, ranks, blocks, limits)  # first, while the process is small
    kwargs: dict[str, Any] = {"dtype": "float32", "enable_prefix_caching": True, "max_num_seqs": 8}
    room = 2 * max(book_tokens, cold_tokens, 256 * turns) + 1024
    figures, adaptation = Figures(), {}
    for again in (False, True):
        for kind, changes in (("forgets", {"cache_gib": 0}), ("remembers", {})):
            with running_engine(model, longctx(preset, changes), room, **kwargs) as (engine, _):
                adaptation = {**sizes(engine), "adapters_root": None}
                remembers, number = kind == "remembers", int(again)
                reading_seconds(engine, 2 * adaptation["block_tokens"], "warm-up")
                window_alone(engine, 1)
                figures.measure(kind, f"cold {number}", cold_seconds, engine, cold_tokens, rounds, number)
                if again:
                    continue
                book = random_tokens(engine, book_tokens, "book")
                asked = questions if remembers else cold_questions
                figures.measure(kind, "questions", questions_about, engine, book, asked, remembers)
                figures.measure(kind, "window", window_alone, engine, max(rounds, 3))
                figures.measure(kind, "chat", chats_of, engine, turns, chats if remembers else 1, remembers)
    rows = rows_of(figures, questions, turns)
    by_turn = {
        kind: [statistics.median(times) for times in zip(*figures.found[kind, "chat"], strict=True)]
        for kind in ("remembers", "forgets")
        if (kind, "chat") in figures.found
    }
    result = {
        "model": model,
        "adaptation": adaptation,
        "book_tokens": book_tokens,
        "cold_tokens": cold_tokens,
        "rounds": rounds,
        "rows": rows,
        "all_seconds": {" ".join(key): found for key, found in figures.found.items()},
        "memory": memory,
    }
    print_tables(result)
    write_json(json_out, result)
    if plot_out is not None and by_turn:
        draw(plot_out, by_turn)


def rows_of(figures: Figures, questions: int, turns: int) -> list[dict[str, Any]]:
    """The rows of the table, with the goals of each."""
    cold = "cold request, to one without a cache", "≤ 1.02"
    for kind in ("remembers", "forgets"):
        both = [(kind, f"cold {number}") for number in range(2)]
        if all(key in figures.found for key in both):
            figures.found[kind, "cold"] = [second for key in both for second in figures.found[key]]
        else:
            figures.void[kind, "cold"] = next(figures.void[key] for key in both if key in figures.void)
    if ("remembers", "questions") in figures.found:
        firsts, _ = figures.found["remembers", "questions"]
        figures.found["remembers", "second question"] = statistics.median(firsts[1:])
    else:
        figures.void["remembers", "second question"] = figures.void["remembers", "questions"]
    if ("remembers", "chat") in figures.found:
        for name, turn in (("turn 2", 1), ("last turn", -1)):
            times = [firsts[turn] for firsts in figures.found["remembers", "chat"]]
            figures.found["remembers", name] = statistics.median(times)
    else:
        figures.void["remembers", "last turn"] = figures.void["remembers", "chat"]
    one, other = ("remembers", "questions"), ("forgets", "questions")
    return [
        figures.row(*cold, ("remembers", "cold"), ("forgets", "cold"), statistics.median),
        figures.row(
            "second question about a book, to the window alone",
            "≤ 1.5",
            ("remembers", "second question"),
            ("remembers", "window"),
            float,
        ),
        figures.row(
            f"turn {turns} of a chat, to turn 2",
            "≤ 1.5",
            ("remembers", "last turn"),
            ("remembers", "turn 2"),
            float,
        ),
        figures.row(
            f"{questions} cold questions about a book, to as many warm ones",
            "≥ 8",
            other,
            one,
            lambda found: float(found[1]) * questions / len(found[0]),
        ),
    ]


def longctx(preset: str, adaptation: dict[str, Any]) -> dict[str, Any]:
    return {"longctx": {"preset": preset, "adaptation": adaptation}}


def draw(path: Path, by_turn: dict[str, list[float]]) -> None:
    labels = {"xlabel": "turn of a chat", "ylabel": "seconds to the first token"}
    with figure(path, yscale="log", **labels) as axes:
        for name, seconds in by_turn.items():
            axes.plot(range(1, len(seconds) + 1), seconds, marker="o", markersize=3, label=name)


def print_tables(result: dict[str, Any]) -> None:
    table = Table("what", "seconds", "beside", "ratio", "goal", title="What was learned is remembered")
    for row in result["rows"]:
        if "void" in row:
            table.add_row(row["what"], "void", "", "", row["void"])
        else:
            figures = (f"{row[name]:.3f}" for name in ("seconds", "beside", "ratio"))
            table.add_row(row["what"], *figures, row["goal"])
    memory = Table("rank", "blocks", "cache_gib", "MiB", "formula", title="Memory of versions")
    for row in result["memory"]:
        memory.add_row(
            f"{row['rank']}",
            f"{row['blocks']}",
            f"{row['cache_gib']:g}",
            f"{row['mib']:.1f}",
            f"{row['formula_mib']:.1f}",
        )
    for each in (table, memory):
        tables().print(each)


if __name__ == "__main__":
    typer.run(main)
