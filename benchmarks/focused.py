"""Tables on memories of benchmarks/README.md: Focused Transformers beside other ways to attend, through the
real engine.

    python benchmarks/focused.py TASK MODEL [MODEL ...] --json OUT.json --plot OUT.png

Tasks, after the Focused Transformer (arXiv 2307.03170) and LM-Infinite (arXiv 2308.16137); `TASK --help` has
each one's sizes:

- passkey: a number in filler text, asked for at the end, inside and outside of the windows (`vllm-longctx
passkey`).
- dictionary: values by their keys, for models of `dictionary.py`, which is where the task comes from.
- perplexity: NLL per token of books by position.
- distractors: NLL of a document's last tokens when d - 1 other documents stand before it.
- fewshot: words belong to classes and classes have keys; which is that of two words, after so many examples?
- memory: bytes of KV that a request holds, by its length.
- speed: decode, all engines up at once and taking turns, medians over rounds.

Methods: plain (stock vLLM, its RoPE table enlarged, or it could not read past the trained length at all),
lm-infinite, lm-infinite-top-k (its top-k branch), focused (memory layers see all), focused-top-k,
focused-blocks. A method that the engine refuses is named with the engine's reason. Texts longer than a
method's `--up-to` are spared it.

Results are written when a method is done; a run with the same settings adds to the file that is there (but
for speed). ± is half of a 95 % interval over what was asked.
"""

import random
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from focused_methods import Comparison, Methods, attention_of, bytes_per_block, task_command
from focused_report import Report, Row, Scale, averages
from lm_infinite import decode_speed, token_times
from load import random_tokens
from perplexity import ALL, buckets_by_way
from rich.console import Console
from rich.progress import Progress
from texts import read_directory

from vllm_longctx.cli.engine import Job, PeakBlocks, parse_lengths, run_jobs, tokenizer_of
from vllm_longctx.cli.output import console, errors_for_users
from vllm_longctx.cli.passkey import (
    ANSWER_TOKENS,
    MAX_NUM_SEQS,
    TRIALS_AT_ONCE,
    Task,
    Trial,
    ask,
    tells,
    windows,
)
from vllm_longctx.cli.score import score_in, scoring_params, tokenize

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

WAYS = ("plain", "lm-infinite", "lm-infinite-top-k", "focused", "focused-top-k", "focused-blocks")
ALL_WAYS = ",".join(WAYS)
DICTIONARIES_AT_ONCE = 16
CLASSES, CLASS_WORDS = 6, 32  # TREC has six classes

app = typer.Typer(add_completion=False, help=__doc__.partition("\n")[0], rich_markup_mode=None)

PASSKEY = Scale(
    "length",
    "exact",
    "length (tokens)",
    "keys told, from outside of the windows (share)",
    by="place",
    drawn="outside",
    factor=100,
    form=".0f",
)
DICTIONARY = Scale("tokens", "accuracy", "memory (tokens)", "right answers (share)", factor=100)
PERPLEXITY = Scale("end", "nll", "position (tokens)", "NLL (nats per token)", form=".3f")
DISTRACTORS = Scale("documents", "nll", "documents in the context", "NLL (nats per token)", form=".3f")
FEWSHOT = Scale("examples", "accuracy", "examples in the context", "right classes (share)", factor=100)
MEMORY = Scale(
    "length", "bytes", "length (tokens)", "KV held (bytes)", factor=2**-20, form=".2f", yscale="log"
)
SPEED = Scale("length", "ms_per_token", "memory (tokens)", "decode (ms per token)", form=".2f", yscale="log")


@dataclass(frozen=True)
class Question:
    """One of many that an engine is asked; `row` tells which ones are averaged.

    tokens: of its longest prompt.

    job: its scores by name.
    """

    row: Row
    tokens: int
    job: Callable[[], Job[dict[str, float]]]


def ask_all(
    ways: Methods, report: Report, questions: Mapping[str, Sequence[Question]], at_once: int, **kwargs: Any
) -> None:
    """questions: by model."""
    with errors_for_users():
        longest = {model: ways.longest(q.tokens for q in every) for model, every in questions.items()}

    def rows(engine: "LLMEngine", meter: PeakBlocks, model: str, name: str) -> list[Row]:
        asked = [q for q in questions[model] if ways.within(name, q.tokens)]
        scores = run_jobs(engine, [q.job() for q in asked], f"{Path(model).name}, {name}", at_once)
        return averages([q.row for q in asked], scores, report.scale.y)

    for model in questions:
        ways.measure(report, model, longest[model], rows, max_num_seqs=MAX_NUM_SEQS, **kwargs)


@task_command(app, methods=ALL_WAYS, up_to="plain=8192")
def passkey(
    run: Comparison,
    lengths: str = "512,1024,2048,4096,8192,16384,25600,32768",
    trials: Annotated[int, typer.Option(help="Per length and place of the key.", min=1)] = 20,
    choices: Annotated[
        bool, typer.Option(help="Score ten keys, too: dozens of short requests per trial.")
    ] = False,
    seed: int = 0,
) -> None:
    """How often greedy decoding tells the key, against length."""
    with errors_for_users():
        sizes = parse_lengths(lengths)
        report = run.report("passkey", PASSKEY, lengths=sizes, trials=trials, choices=choices, seed=seed)
        questions = {}
        for model in run.models:
            seen = []
            for config in run.ways.windows:
                with suppress(ValueError):  # the engine will say it again
                    seen += windows(model, [config])
            seen = seen or windows(model, [None])
            task = Task(tokenizer_of(model))
            asked = [trial for size in sizes for trial in task.trials(size, seen, trials, seed)]
            questions[model] = [key_question(trial, choices) for trial in asked]
    ask_all(run.ways, report, questions, TRIALS_AT_ONCE, enable_prefix_caching=True)
    report.show()


def key_question(trial: Trial, choices: bool, options: dict[str, Any] | None = None) -> Question:
    """options: of the request that writes the answer, `config.RequestOptions`."""

    def job() -> Job[dict[str, float]]:
        from vllm import SamplingParams

        if choices:
            outcome = yield from ask(trial)
            return {name: float(value) for name, value in vars(outcome).items()}
        own = None if options is None else {"longctx": options}
        params = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0, extra_args=own)
        (output,) = yield [(trial.prompt, params)]
        return {"exact": float(tells(output.outputs[0].text, trial.key))}

    length = len(trial.prompt)
    return Question({"length": length, "place": trial.place}, length, job)


@task_command(app, methods=ALL_WAYS, kv_gib=1)
def dictionary(
    run: Comparison,
    times: Annotated[
        str, typer.Option(help="Lengths of the dictionary in training contexts.")
    ] = "1,4,16,64,256",
    texts: Annotated[int, typer.Option(help="Dictionaries of each length.", min=2)] = 64,
    questions: Annotated[int, typer.Option(help="After each dictionary.", min=1)] = 16,
    seed: int = 1,
) -> None:
    """Right answers against the length of a dictionary, for the models that dictionary.py trains; give
    both.
    """
    import torch
    from dictionary import CONTEXT, FACTS, Language

    with errors_for_users():
        sizes = parse_lengths(times)
        settings = {"context": CONTEXT, "times": sizes, "texts": texts, "questions": questions, "seed": seed}
        report = run.report("dictionary", DICTIONARY, **settings)
        asked: dict[str, list[Question]] = {}
        for model in run.models:
            language = Language.of(len(tokenizer_of(model)))
            asked[model] = []
            for size in sizes:
                generator = torch.Generator().manual_seed(seed)
                known, ask = language.task(texts, size * FACTS, questions, generator)
                is_value = (language.answers(ask) >= 0).roll(1, 1)
                for text in zip(known.tolist(), ask.tolist(), is_value.tolist(), strict=True):
                    asked[model].append(lookup_question(*text, size))
    ask_all(run.ways, report, asked, DICTIONARIES_AT_ONCE)
    report.show()


def lookup_question(known: list[int], asked: list[int], is_value: list[bool], times: int) -> Question:
    """asked: keys and their values; a value is answered right if it is the likeliest next token."""

    def job() -> Job[dict[str, float]]:
        (output,) = yield [([*known, *asked], scoring_params())]
        ranks = output.prompt_logprobs.ranks[-len(asked) :]
        return {
            "accuracy": statistics.fmean(
                rank == 1 for rank, counts in zip(ranks, is_value, strict=True) if counts
            )
        }

    return Question({"tokens": len(known), "times": times}, len(known) + len(asked), job)


@task_command(app, methods=ALL_WAYS, up_to="plain=8192")
def perplexity(
    run: Comparison,
    texts: Annotated[Path, typer.Option(help="Directory of .txt files.")],
    max_tokens: Annotated[int, typer.Option(help="Of each text.", min=2)] = 65536,
) -> None:
    """NLL per token by position, mean over the texts; every text by itself is in the JSON file."""
    with errors_for_users():
        books = read_directory(texts)
        report = run.report("perplexity", PERPLEXITY, texts=sorted(books), max_tokens=max_tokens)
        tokens = {
            model: {name: tokenize(model, text, max_tokens) for name, text in books.items()}
            for model in run.models
        }
    longest = {name: min(max_tokens, run.ways.up_to.get(name, max_tokens)) for name in run.ways.configs}

    def rows(engine: "LLMEngine", meter: PeakBlocks, model: str, name: str) -> list[Row]:
        read = {text: ids[: longest[name]] for text, ids in tokens[model].items()}
        nll = {text: score_in(engine, meter, ids, f"{name}: {text}").nll for text, ids in read.items()}
        (buckets,) = buckets_by_way({name: nll}).values()
        means = buckets.pop(ALL)
        by_text = [{text: of[number].nll for text, of in buckets.items()} for number in range(len(means))]
        return [{**vars(mean), "texts": texts} for mean, texts in zip(means, by_text, strict=True)]

    for model in run.models:
        run.ways.measure(report, model, longest, rows)
    report.show()


@task_command(app, methods=ALL_WAYS, up_to="plain=8192")
def distractors(
    run: Comparison,
    texts: Annotated[Path, typer.Option(help="Directory of .txt files, two at least.")],
    documents: Annotated[str, typer.Option(help="The paper's d.")] = "1,2,4,8,16,32",
    document_tokens: Annotated[int, typer.Option(help="Best a multiple of the window.", min=2)] = 2048,
    scored_tokens: Annotated[int, typer.Option(help="Of the document's end.", min=1)] = 256,
    places: Annotated[int, typer.Option(help="Documents out of each text.", min=1)] = 6,
    seed: int = 0,
) -> None:
    """NLL of a document's end against d, the documents in the context, which are pieces of the texts.

    The last is its own.
    """
    with errors_for_users():
        counts = parse_lengths(documents)
        books = read_directory(texts)
        sizes = {"document_tokens": document_tokens, "scored_tokens": scored_tokens, "places": places}
        settings = {"documents": counts, **sizes, "seed": seed, "texts": sorted(books)}
        report = run.report("distractors", DISTRACTORS, **settings)
        if scored_tokens >= document_tokens:
            raise ValueError(
                f"--scored-tokens {scored_tokens} leaves nothing of --document-tokens {document_tokens}; "
                f"lower it"
            )
        questions = {}
        for model in run.models:
            tokens = {name: tokenize(model, text, None) for name, text in books.items()}
            first = next(iter(tokens.values()))[0]  # the tokenizer's own
            crowd = crowds(tokens, counts[-1], document_tokens, places, seed)
            questions[model] = [
                end_question(with_distractors(pieces, count, first), scored_tokens, count)
                for pieces in crowd
                for count in counts
            ]
    ask_all(run.ways, report, questions, TRIALS_AT_ONCE)
    report.show()


def crowds(
    texts: Mapping[str, list[int]], most: int, tokens: int, places: int, seed: int
) -> Iterator[list[list[int]]]:
    """`places` documents of each text, evenly spread, each followed by most - 1 different ones of the other
    texts.

    Raises ValueError where texts are too short or few.
    """
    pieces = {
        name: [ids[k : k + tokens] for k in range(0, len(ids) - tokens + 1, tokens)]
        for name, ids in texts.items()
    }
    for name, own in pieces.items():
        others = [piece for other, some in pieces.items() if other != name for piece in some]
        if len(own) < places or len(others) < most - 1:
            raise ValueError(
                f"{name} has {len(own)} documents of {tokens} tokens and the other texts {len(others)}, but "
                f"{places} and "
                f"{most - 1} are needed; lower --places, --documents or --document-tokens"
            )
        for number in range(places):
            chosen = random.Random(f"{seed}/{name}/{number}").sample(others, most - 1)
            yield [own[number * len(own) // places], *chosen]


def with_distractors(pieces: list[list[int]], documents: int, first: int) -> list[int]:
    """The document at the end of the first d pieces, those of a smaller d nearest.

    first: takes the first token's place.
    """
    return [first, *[token for piece in reversed(pieces[:documents]) for token in piece][1:]]


def end_question(prompt: list[int], scored: int, documents: int) -> Question:
    def job() -> Job[dict[str, float]]:
        (output,) = yield [(prompt, scoring_params())]
        return {"nll": -statistics.fmean(output.prompt_logprobs.logprobs[-scored:])}

    return Question({"documents": documents}, len(prompt), job)


@task_command(app, methods=ALL_WAYS, up_to="plain=16384")
def fewshot(
    run: Comparison,
    examples: str = "16,64,256,1024,4096",
    contexts: Annotated[int, typer.Option(help="With classes and names of their own.", min=2)] = 8,
    queries: Annotated[int, typer.Option(help="After each context.", min=1)] = 12,
    seed: int = 0,
) -> None:
    """Right classes of new pairs of words against the examples in the context; beside it what can be known
    from them.
    """
    with errors_for_users():
        sizes = parse_lengths(examples)
        settings = {"examples": sizes, "contexts": contexts, "queries": queries, "seed": seed}
        report = run.report("fewshot", FEWSHOT, **settings, classes=CLASSES, class_words=CLASS_WORDS)
        questions = {}
        for model in run.models:
            task = Task(tokenizer_of(model))
            lessons = [Lesson(task, f"{seed}/{number}") for number in range(contexts)]
            asked = [(lesson, size) for lesson in lessons for size in sizes]
            known = averages(
                [{"examples": size} for _, size in asked],
                [{"accuracy": lesson.known(size, queries)} for lesson, size in asked],
                "accuracy",
            )
            report.add(model, "seen words", rows=known)
            questions[model] = [lesson.question(size, queries) for lesson, size in asked]
    ask_all(run.ways, report, questions, 1, enable_prefix_caching=True)
    report.show()


class Lesson:
    """Classes of words, each class with a number as its key, and examples ("The {word} {word} key is
    {number}.").

    labels: the token of each number that tells it from the others, after the `shared` ones of all numbers.
    Raises ValueError if the tokenizer has too few whole words or numbers that one token does not tell apart.
    """

    def __init__(self, task: Task, seed: str):
        self.task, self.seed = task, seed
        candidates = (token[1:] for token in sorted(task.tokenizer.get_vocab()) if token[0] in "Ġ▁")
        words = [
            word
            for word in candidates
            if len(word) > 2 and word.isascii() and word.isalpha() and word.islower()
        ]
        needed = CLASSES * CLASS_WORDS
        if len(words) < needed:
            raise ValueError(f"the tokenizer has {len(words)} whole words, but {needed} are needed")
        rng = random.Random(seed)
        chosen = rng.sample(words, needed)
        self.words = [chosen[n::CLASSES] for n in range(CLASSES)]
        self.keys = [
            str(10_000 * digit + rng.randrange(10_000)) for digit in rng.sample(range(1, 10), CLASSES)
        ]
        tokens = [task.after("The key is", key) for key in self.keys]
        equal = takewhile(lambda column: len({*column}) == 1, zip(*tokens, strict=False))
        self.shared = [column[0] for column in equal]
        self.labels = [ids[len(self.shared)] for ids in tokens]
        if len({*self.labels}) < CLASSES:
            raise ValueError(
                f"the tokenizer writes {', '.join(self.keys)} with beginnings that are neither one nor "
                f"different"
            )

    def drawn(self, what: str, count: int) -> list[tuple[int, list[str]]]:
        """Numbers of classes, and two words of each. More of them begin with the same ones."""
        rng = random.Random(f"{self.seed}/{what}")
        classes = (rng.randrange(CLASSES) for _ in range(count))
        return [(n, rng.sample(self.words[n], 2)) for n in classes]

    def known(self, examples: int, queries: int) -> float:
        """Share that counting can know: a word of the query's has been seen, or else one guesses."""
        seen = {word for _, words in self.drawn("examples", examples) for word in words}
        return statistics.fmean(
            1.0 if seen & {*words} else 1 / CLASSES for _, words in self.drawn("queries", queries)
        )

    def question(self, examples: int, queries: int) -> Question:
        text = " ".join(
            f"The {' '.join(words)} key is {self.keys[n]}." for n, words in self.drawn("examples", examples)
        )
        asked = self.drawn("queries", queries)
        head = self.task.tokens(text)
        end = f"{self.keys[0]}."  # as of any example
        questions = [self.task.after(end, f"The {' '.join(words)} key is") for _, words in asked]
        prompts = [[*head, *question, *self.shared] for question in questions]

        def job() -> Job[dict[str, float]]:
            from vllm import SamplingParams

            params = SamplingParams(
                max_tokens=1, temperature=0, logprob_token_ids=self.labels, detokenize=False
            )
            outputs = yield [(prompts[0], params)]  # the others find what it has read
            outputs = outputs + (yield [(prompt, params) for prompt in prompts[1:]])
            scores = [[o.outputs[0].logprobs[0][label].logprob for label in self.labels] for o in outputs]
            return {"accuracy": share_right(scores, [n for n, _ in asked])}

        return Question({"examples": examples}, max(map(len, prompts)), job)


def share_right(scores: Sequence[Sequence[float]], classes: Sequence[int]) -> float:
    """Of log-probabilities by query and class: how often the right one's is highest."""
    return statistics.fmean(row.index(max(row)) == right for row, right in zip(scores, classes, strict=True))


@task_command(app, methods="plain,lm-infinite,focused", kv_gib=1)
def memory(run: Comparison, lengths: str = "4096,8192,16384,32768") -> None:
    """MiB of KV that one request holds, and bytes per token between the shortest and the longest."""
    with errors_for_users():
        sizes = parse_lengths(lengths)
        report = run.report("memory", MEMORY, lengths=sizes)
        longest = run.ways.longest(sizes)

    def rows(engine: "LLMEngine", meter: PeakBlocks, model: str, name: str) -> list[Row]:
        block = bytes_per_block(engine, meter)
        result: list[Row] = []
        for size in sizes:
            if run.ways.within(name, size):
                meter.reset()
                token_times(engine, [random_tokens(engine, size, size)], 2)
                result.append({"length": size, "blocks": meter.peak, "bytes": meter.peak * block})
        return result

    for model in run.models:
        run.ways.measure(report, model, longest, rows)
    report.show()
    for model in run.models:
        slopes = {name: slope(rows) for name in run.ways.configs if len(rows := report.rows(model, name)) > 1}
        for name, per_token in slopes.items():
            share = f", {per_token / slopes['plain']:.4f} of plain" if slopes.get("plain") else ""
            Console().print(
                f"{Path(model).name}, {name}: {per_token:,.0f} bytes per token{share}", highlight=False
            )


def slope(rows: Sequence[Row]) -> float:
    """Bytes per token from the first row to the last."""
    return (rows[-1]["bytes"] - rows[0]["bytes"]) / (rows[-1]["length"] - rows[0]["length"])


@task_command(app, methods="plain,focused,focused-top-k,focused-blocks", up_to="plain=131072")
def speed(
    run: Comparison,
    lengths: Annotated[
        str, typer.Option(help="Of the memory, in tokens.")
    ] = "4096,8192,16384,32768,65536,131072",
    batch: Annotated[int, typer.Option(help="Requests that decode at once.", min=1)] = 1,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    written: Annotated[int, typer.Option(help="Tokens that each request writes.", min=2)] = 64,
    enforce_eager: bool = False,
) -> None:
    """Decode, milliseconds per token.

    The texts are random; shorter ones begin the longest, which is read once.
    """
    with errors_for_users():
        sizes = parse_lengths(lengths)
        settings = {"lengths": sizes, "batch": batch, "rounds": rounds, "written": written}
        report = run.report("speed", SPEED, **settings, enforce_eager=enforce_eager)
        report.results.clear()  # side by side, or not at all
        longest = run.ways.longest(sizes)
    kwargs: dict[str, Any] = {
        "max_num_seqs": batch,
        "enable_prefix_caching": True,
        "enforce_eager": enforce_eager,
    }
    for model in run.models:
        with ExitStack() as stack, Progress(console=console) as progress:
            engines = {}
            for name in run.ways.configs:
                running = run.ways.start(stack, report, model, name, longest[name] + written, **kwargs)
                if running is not None:
                    engines[name] = running[0]
            # The longest first: the others find their beginning of it in the prefix cache.
            plan = [(n, name) for n in reversed(sizes) for name in engines if run.ways.within(name, n)]
            task = progress.add_task("", total=len(plan) * rounds)
            found: dict[str, dict[int, list[float]]] = {name: defaultdict(list) for name in engines}
            for number in range(rounds):
                for length, name in plan:
                    progress.update(task, description=f"round {number + 1}: {name} at {length:,}")
                    text = random_tokens(engines[name], sizes[-1], 0)[:length]
                    if number == 0:
                        token_times(engines[name], [text], 1)  # read once for all of the batch
                    found[name][length].append(decode_speed(engines[name], text, batch, written))
                    progress.advance(task)
                for name, engine in engines.items():
                    rows = [
                        speed_row(n, batch, statistics.median(found[name][n]))
                        for n in sizes
                        if n in found[name]
                    ]
                    report.add(model, name, attention=attention_of(engine), rows=rows)
    report.show()
    for model in run.models:
        plain = {row["length"]: row["tokens_per_s"] for row in report.rows(model, "plain")}
        for name in run.ways.configs:
            rows = [row for row in report.rows(model, name) if row["length"] in plain]
            ratios = [
                f"{row['tokens_per_s'] / plain[row['length']]:.2f} at {row['length']:,}" for row in rows
            ]
            if ratios and name != "plain":
                Console().print(f"{Path(model).name}, {name}, × plain: {', '.join(ratios)}", highlight=False)


def speed_row(length: int, batch: int, tokens_per_s: float) -> Row:
    return {"length": length, "tokens_per_s": tokens_per_s, "ms_per_token": 1000 * batch / tokens_per_s}


if __name__ == "__main__":
    app()
