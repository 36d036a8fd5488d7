"""Tables on memories of benchmarks/README.md: Focused Transformers beside other ways to attend, through the real engine.

    python benchmarks/focused.py TASK MODEL [MODEL ...] --json OUT.json --plot OUT.png

Tasks, after the Focused Transformer (arXiv 2307.03170) and LM-Infinite (arXiv 2308.16137); `TASK --help` has each one's sizes:

- passkey: a number in filler text, asked for at the end, inside and outside of the windows (`vllm-longctx passkey`).
- dictionary: values by their keys, for models of `dictionary.py`, which is where the task comes from.
- perplexity: NLL per token of books by position.
- distractors: NLL of a document's last tokens when d - 1 other documents stand before it.
- fewshot: words belong to classes and classes have keys; which is that of two words, after so many examples?
- memory: bytes of KV that a request holds, by its length.
- speed: decode, all engines up at once and taking turns, medians over rounds.

Methods: plain (stock vLLM, its RoPE table enlarged, or it could not read past the trained length at all), lm-infinite,
lm-infinite-top-k (its top-k branch), focused (memory layers see all), focused-top-k, focused-blocks. A method that the engine
refuses is named with the engine's reason. Texts longer than a method's `--up-to` are spared it.

Results are written when a method is done; a run with the same settings adds to the file that is there (but for speed). ± is
half of a 95 % interval over what was asked.
"""

import json
import random
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from lm_infinite import decode_speed, token_times
from load import random_tokens
from perplexity import buckets_by_way
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from texts import read_directory

from vllm_longctx.cli.engine import METHODS, Job, PeakBlocks, method_engine, model_path, parse_lengths, parse_methods, run_jobs
from vllm_longctx.cli.output import console, errors_for_users, plot
from vllm_longctx.cli.passkey import ANSWER_TOKENS, MAX_NUM_SEQS, TRIALS_AT_ONCE, Task, Trial, ask, tells, windows
from vllm_longctx.cli.score import score_in, scoring_params, tokenize

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

Config = dict[str, Any] | None
Row = dict[str, Any]

WAYS = ("plain", "lm-infinite", "lm-infinite-top-k", "focused", "focused-top-k", "focused-blocks")
DICTIONARIES_AT_ONCE = 16
WRITTEN = ANSWER_TOKENS  # at most, by any task but speed
CLASSES, CLASS_WORDS = 6, 32  # TREC has six classes

app = typer.Typer(add_completion=False, help=__doc__.partition("\n")[0], rich_markup_mode=None)

Models = Annotated[list[str], typer.Argument(help="Model directories; `booklm` is the small one that ships with longctx.")]
Ways = Annotated[str, typer.Option("--methods", help="Some of these, separated by commas.")]
TopK = Annotated[int, typer.Option(help="Keys that a query head finds, for focused-top-k and focused-blocks.", min=1)]
Focused = Annotated[str, typer.Option(help="Keys of `attention` for the focused methods, where the checkpoint has none.")]
Branch = Annotated[str, typer.Option(help="Keys of `attention` for lm-infinite-top-k.")]
UpTo = Annotated[str, typer.Option(help="Longest text in tokens by method: plain=8192,focused=131072")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
KvGib = Annotated[float, typer.Option(help="Of each engine's pool.")]
JsonOut = Annotated[Path | None, typer.Option("--json", help="Write the results to this file, or add to it.")]
PlotOut = Annotated[Path | None, typer.Option("--plot", help="Draw them.")]
ALL_WAYS = ",".join(WAYS)
BRANCH = '{"top_k": 5}'


@dataclass(frozen=True)
class Scale:
    """How rows become a table and a plot: their keys x, y and, where there are rows of several kinds, `by`.

    drawn: the kind that is plotted. factor: of y in the table.
    """

    x: str
    y: str
    xlabel: str
    ylabel: str
    by: str | None = None
    drawn: str | None = None
    factor: float = 1
    form: str = ".1f"
    yscale: str = "linear"


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
MEMORY = Scale("length", "bytes", "length (tokens)", "KV held (bytes)", factor=2**-20, form=".2f", yscale="log")
SPEED = Scale("length", "ms_per_token", "memory (tokens)", "decode (ms per token)", form=".2f", yscale="log")


class Report:
    """What was found, by model and method, in a JSON file that is written again with every addition.

    Raises ValueError if the file is there and was made with other settings, which are the task's sizes.
    """

    def __init__(self, task: str, scale: Scale, settings: Mapping[str, Any], json_out: Path | None, plot_out: Path | None):
        self.about = {"task": task, "settings": dict(settings)}
        self.scale, self.json_out, self.plot_out = scale, json_out, plot_out
        self.results: list[dict[str, Any]] = []
        if json_out is None or not json_out.exists():
            return
        before = json.loads(json_out.read_text())
        for name, value in self.about.items():
            if before.get(name) != value:
                raise ValueError(f"{json_out} has {name} {before.get(name)}, not {value}; give the same, or another file")
        self.results = before["results"]

    def add(self, model: str, method: str, **found: Any) -> None:
        """rows and attention, what the engine made of the configuration, or refused, its reason."""
        name = Path(model).name
        self.results = [r for r in self.results if (r["model"], r["method"]) != (name, method)]
        self.results.append({"model": name, "method": method, **found})
        if self.json_out is not None:
            self.json_out.write_text(json.dumps({**self.about, "results": self.results}, indent=1) + "\n")

    def refuse(self, model: str, method: str, error: Exception) -> None:
        reason = str(error).replace(model_path(model), Path(model).name)
        console.print(f"[yellow]{method} was refused:[/] {reason}", highlight=False)
        self.add(model, method, refused=reason)

    def rows(self, model: str, method: str) -> list[Row]:
        found = (r for r in self.results if (r["model"], r["method"]) == (Path(model).name, method))
        return next((r.get("rows", []) for r in found), [])

    def show(self) -> None:
        """The table of all that is in the file, and the plot."""
        scale, several = self.scale, len({r["model"] for r in self.results}) > 1
        names = [f"{r['model']}: {r['method']}" if several else r["method"] for r in self.results]
        columns = [{(row[scale.x], row.get(scale.by or "")): row for row in r.get("rows", [])} for r in self.results]
        table = Table(scale.xlabel, *([scale.by] if scale.by else []), *names, title=self.about["task"])
        for x, by in sorted({key for column in columns for key in column}, key=lambda key: (key[1] or "", key[0])):
            cells = [self.cell(column.get((x, by))) for column in columns]
            table.add_row(f"{x:,}", *([by] if scale.by else []), *cells)
        Console(width=150).print(table)
        for name, result in zip(names, self.results, strict=True):
            if "refused" in result:
                Console().print(f"{name} was refused: {result['refused']}", highlight=False, markup=False)
        if self.plot_out is not None:
            curves = {}
            for name, column in zip(names, columns, strict=True):
                points = [(x, row[scale.y]) for (x, by), row in column.items() if by == scale.drawn]
                curves[name] = [x for x, _ in points], [y for _, y in points]
            plot(self.plot_out, curves, scale.xlabel, scale.ylabel, scale.yscale)

    def cell(self, row: Row | None) -> str:
        if row is None:
            return ""
        scale = self.scale
        value, error = row[scale.y] * scale.factor, row.get("error")
        return f"{value:{scale.form}}" if error is None else f"{value:{scale.form}} ± {error * scale.factor:{scale.form}}"


@dataclass(frozen=True)
class Methods:
    """What is compared: configurations by name, the longest text of each in tokens where it has a limit, and the engine.

    windows: the configurations whose windows pass keys are placed by, whatever is compared.
    """

    configs: dict[str, Config]
    windows: list[Config]
    up_to: dict[str, int]
    engine: dict[str, Any]

    @classmethod
    def parse(cls, methods: str, top_k: int, focused: str, branch: str, up_to: str, dtype: str, kv_gib: float) -> "Methods":
        """Raises ValueError naming the option that says nothing of sense."""
        section = {"method": "focused", **keys_of("--focused", focused)}
        known: dict[str, Config] = {
            "plain": None,
            "lm-infinite": METHODS["lm-infinite"],
            "lm-infinite-top-k": {"attention": {"method": "lm_infinite", **keys_of("--branch", branch)}},
            "focused": {"attention": section},
            "focused-top-k": {"attention": {**section, "lookup": "top_k", "top_k": top_k}},
            "focused-blocks": {"attention": {**section, "lookup": "blocks", "top_k": top_k}},
        }
        limits = {}
        for word in up_to.split(",") if up_to else ():
            name, _, tokens = word.partition("=")
            if name not in known or not tokens.isdecimal():
                raise ValueError(f"--up-to {up_to}: give methods and tokens such as plain=8192; methods: {ALL_WAYS}")
            limits[name] = int(tokens)
        engine = {"dtype": dtype, "kv_cache_memory_bytes": int(kv_gib * 2**30), "max_num_batched_tokens": 2048}
        return cls(parse_methods(methods, known), [known["lm-infinite"], known["focused"]], limits, engine)

    def within(self, name: str, tokens: int) -> bool:
        return tokens <= self.up_to.get(name, tokens)

    def longest(self, lengths: Iterable[int]) -> dict[str, int]:
        """Of texts of such lengths, by method. Raises ValueError where `--up-to` leaves none."""
        lengths = list(lengths)
        for name in self.configs:
            if not self.within(name, min(lengths)):
                raise ValueError(f"--up-to {name}={self.up_to[name]} leaves it none; the shortest has {min(lengths)} tokens")
        return {name: max(n for n in lengths if self.within(name, n)) for name in self.configs}

    def start(
        self, stack: ExitStack, report: Report, model: str, name: str, longest: int, **engine_kwargs: Any
    ) -> tuple["LLMEngine", PeakBlocks] | None:
        """A method's engine for prompts of up to `longest` tokens, until the stack ends; None if it was refused."""
        context = method_engine(model, self.configs[name], longest + WRITTEN, **self.engine, **engine_kwargs)
        try:
            return stack.enter_context(context)
        except (ValueError, OSError, RuntimeError) as e:  # RuntimeError: the engine's process ended while it started
            report.refuse(model, name, e)
            return None

    def measure(
        self,
        report: Report,
        model: str,
        longest: Mapping[str, int],
        rows: Callable[["LLMEngine", PeakBlocks, str, str], list[Row]],
        **engine_kwargs: Any,
    ) -> None:
        """`rows` of each method's engine, one after the other; it is given the model and the method, too."""
        for name in self.configs:
            with ExitStack() as stack:
                running = self.start(stack, report, model, name, longest[name], enforce_eager=True, **engine_kwargs)
                if running is not None:
                    report.add(model, name, attention=attention_of(running[0]), rows=rows(*running, model, name))


def keys_of(option: str, text: str) -> dict[str, Any]:
    try:
        keys = json.loads(text)
    except json.JSONDecodeError:
        keys = None
    if not isinstance(keys, dict):
        raise ValueError(f"""{option} {text}: give keys of `attention` as JSON, such as '{{"top_k": 5}}'""")
    return keys


def attention_of(engine: "LLMEngine") -> dict[str, Any]:
    return engine.vllm_config.additional_config["longctx"]["attention"]


@dataclass(frozen=True)
class Question:
    """One of many that an engine is asked; `row` tells which ones are averaged. tokens: of its longest prompt.

    job: its scores by name.
    """

    row: Row
    tokens: int
    job: Callable[[], Job[dict[str, float]]]


def ask_all(ways: Methods, report: Report, questions: Mapping[str, Sequence[Question]], at_once: int, **kwargs: Any) -> None:
    """questions: by model."""
    with errors_for_users():
        longest = {model: ways.longest(q.tokens for q in every) for model, every in questions.items()}

    def rows(engine: "LLMEngine", meter: PeakBlocks, model: str, name: str) -> list[Row]:
        asked = [q for q in questions[model] if ways.within(name, q.tokens)]
        scores = run_jobs(engine, [q.job() for q in asked], f"{Path(model).name}, {name}", at_once)
        return averages([q.row for q in asked], scores, report.scale.y)

    for model in questions:
        ways.measure(report, model, longest[model], rows, max_num_seqs=MAX_NUM_SEQS, **kwargs)


def averages(keys: Sequence[Row], scores: Sequence[dict[str, float]], y: str) -> list[Row]:
    """A row for each different key: its keys, the means of its scores, and half of y's 95 % interval."""
    groups: dict[tuple[Any, ...], list[dict[str, float]]] = defaultdict(list)
    for key, score in zip(keys, scores, strict=True):
        groups[tuple(key.items())].append(score)
    result = []
    for key, group in groups.items():
        means = {name: statistics.fmean(score[name] for score in group) for name in group[0]}
        spread = [1.96 * statistics.stdev(score[y] for score in group) / len(group) ** 0.5] if len(group) > 1 else [None]
        result.append({**dict(key), "asked": len(group), **means, "error": spread[0]})
    return result


@app.command()
def passkey(
    models: Models,
    lengths: str = "512,1024,2048,4096,8192,16384,25600,32768",
    trials: Annotated[int, typer.Option(help="Per length and place of the key.", min=1)] = 20,
    choices: Annotated[bool, typer.Option(help="Score ten keys, too: dozens of short requests per trial.")] = False,
    seed: int = 0,
    methods: Ways = ALL_WAYS,
    top_k: TopK = 32,
    focused: Focused = "{}",
    branch: Branch = BRANCH,
    up_to: UpTo = "plain=8192",
    dtype: Dtype = "float32",
    kv_gib: KvGib = 2,
    json_out: JsonOut = None,
    plot_out: PlotOut = None,
) -> None:
    """How often greedy decoding tells the key, against length."""
    from transformers import AutoTokenizer

    with errors_for_users():
        sizes = parse_lengths(lengths)
        ways = Methods.parse(methods, top_k, focused, branch, up_to, dtype, kv_gib)
        settings = {"lengths": sizes, "trials": trials, "choices": choices, "seed": seed, "dtype": dtype}
        report = Report("passkey", PASSKEY, settings, json_out, plot_out)
        questions = {}
        for model in models:
            seen = []
            for config in ways.windows:
                with suppress(ValueError):  # the engine will say it again
                    seen += windows(model, [config])
            seen = seen or windows(model, [None])
            task = Task(AutoTokenizer.from_pretrained(model_path(model), model_max_length=1 << 60))
            asked = [trial for size in sizes for trial in task.trials(size, seen, trials, seed)]
            questions[model] = [key_question(trial, choices) for trial in asked]
    ask_all(ways, report, questions, TRIALS_AT_ONCE, enable_prefix_caching=True)
    report.show()


def key_question(trial: Trial, choices: bool) -> Question:
    def job() -> Job[dict[str, float]]:
        from vllm import SamplingParams

        if choices:
            outcome = yield from ask(trial)
            return {name: float(value) for name, value in vars(outcome).items()}
        (output,) = yield [(trial.prompt, SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0))]
        return {"exact": float(tells(output.outputs[0].text, trial.key))}

    length = len(trial.prompt)
    return Question({"length": length, "place": trial.place}, length, job)


@app.command()
def dictionary(
    models: Models,
    times: Annotated[str, typer.Option(help="Lengths of the dictionary in training contexts.")] = "1,4,16,64,256",
    texts: Annotated[int, typer.Option(help="Dictionaries of each length, 16 questions each.", min=2)] = 64,
    seed: int = 1,
    methods: Ways = ALL_WAYS,
    top_k: TopK = 32,
    focused: Focused = "{}",
    branch: Branch = BRANCH,
    up_to: UpTo = "",
    dtype: Dtype = "float32",
    kv_gib: KvGib = 1,
    json_out: JsonOut = None,
    plot_out: PlotOut = None,
) -> None:
    """Right answers against the length of a dictionary, for the models that dictionary.py trains; give both."""
    import torch
    from dictionary import CONTEXT, FACTS, answers, task

    with errors_for_users():
        sizes = parse_lengths(times)
        ways = Methods.parse(methods, top_k, focused, branch, up_to, dtype, kv_gib)
        settings = {"context": CONTEXT, "times": sizes, "texts": texts, "seed": seed, "dtype": dtype}
        report = Report("dictionary", DICTIONARY, settings, json_out, plot_out)
        questions = []
        for size in sizes:
            known, asked = task(texts, size * FACTS, FACTS, torch.Generator().manual_seed(seed))
            is_value = (answers(asked) >= 0).roll(1, 1)
            for text in zip(known.tolist(), asked.tolist(), is_value.tolist(), strict=True):
                questions.append(lookup_question(*text, size))
    ask_all(ways, report, dict.fromkeys(models, questions), DICTIONARIES_AT_ONCE)
    report.show()


def lookup_question(known: list[int], asked: list[int], is_value: list[bool], times: int) -> Question:
    """asked: keys and their values; a value is answered right if it is the likeliest next token."""

    def job() -> Job[dict[str, float]]:
        (output,) = yield [([*known, *asked], scoring_params())]
        ranks = output.prompt_logprobs.ranks[-len(asked) :]
        return {"accuracy": statistics.fmean(rank == 1 for rank, counts in zip(ranks, is_value, strict=True) if counts)}

    return Question({"tokens": len(known), "times": times}, len(known) + len(asked), job)


@app.command()
def perplexity(
    models: Models,
    texts: Annotated[Path, typer.Option(help="Directory of .txt files.")],
    max_tokens: Annotated[int, typer.Option(help="Of each text.", min=2)] = 65536,
    methods: Ways = ALL_WAYS,
    top_k: TopK = 32,
    focused: Focused = "{}",
    branch: Branch = BRANCH,
    up_to: UpTo = "plain=8192",
    dtype: Dtype = "float32",
    kv_gib: KvGib = 2,
    json_out: JsonOut = None,
    plot_out: PlotOut = None,
) -> None:
    """NLL per token by position, mean over the texts; every text by itself is in the JSON file."""
    with errors_for_users():
        ways = Methods.parse(methods, top_k, focused, branch, up_to, dtype, kv_gib)
        books = read_directory(texts)
        report = Report(
            "perplexity", PERPLEXITY, {"texts": sorted(books), "max_tokens": max_tokens, "dtype": dtype}, json_out, plot_out
        )
        tokens = {model: {name: tokenize(model, text, max_tokens) for name, text in books.items()} for model in models}
    longest = {name: min(max_tokens, ways.up_to.get(name, max_tokens)) for name in ways.configs}

    def rows(engine: "LLMEngine", meter: PeakBlocks, model: str, name: str) -> list[Row]:
        read = {text: ids[: longest[name]] for text, ids in tokens[model].items()}
        nll = {text: score_in(engine, meter, ids, f"{name}: {text}").nll for text, ids in read.items()}
        (buckets,) = buckets_by_way({name: nll}).values()
        means = buckets.pop("all texts")
        by_text = [{text: of[number].nll for text, of in buckets.items()} for number in range(len(means))]
        return [{**vars(mean), "texts": texts} for mean, texts in zip(means, by_text, strict=True)]

    for model in models:
        ways.measure(report, model, longest, rows)
    report.show()


@app.command()
def distractors(
    models: Models,
    texts: Annotated[Path, typer.Option(help="Directory of .txt files, two at least.")],
    documents: Annotated[str, typer.Option(help="The paper's d.")] = "1,2,4,8,16,32",
    document_tokens: Annotated[int, typer.Option(help="Best a multiple of the window.", min=2)] = 2048,
    scored_tokens: Annotated[int, typer.Option(help="Of the document's end.", min=1)] = 256,
    places: Annotated[int, typer.Option(help="Documents out of each text.", min=1)] = 6,
    seed: int = 0,
    methods: Ways = ALL_WAYS,
    top_k: TopK = 32,
    focused: Focused = "{}",
    branch: Branch = BRANCH,
    up_to: UpTo = "plain=8192",
    dtype: Dtype = "float32",
    kv_gib: KvGib = 2,
    json_out: JsonOut = None,
    plot_out: PlotOut = None,
) -> None:
    """NLL of a document's end against d, the documents in the context, which are pieces of the texts. The last is its own."""
    with errors_for_users():
        counts = parse_lengths(documents)
        ways = Methods.parse(methods, top_k, focused, branch, up_to, dtype, kv_gib)
        books = read_directory(texts)
        settings = {
            "documents": counts,
            "document_tokens": document_tokens,
            "scored_tokens": scored_tokens,
            "places": places,
            "seed": seed,
            "texts": sorted(books),
            "dtype": dtype,
        }
        report = Report("distractors", DISTRACTORS, settings, json_out, plot_out)
        if scored_tokens >= document_tokens:
            raise ValueError(f"--scored-tokens {scored_tokens} leaves nothing of --document-tokens {document_tokens}; lower it")
        questions = {}
        for model in models:
            tokens = {name: tokenize(model, text, None) for name, text in books.items()}
            first = next(iter(tokens.values()))[0]  # the tokenizer's own
            crowd = crowds(tokens, counts[-1], document_tokens, places, seed)
            questions[model] = [
                end_question(with_distractors(pieces, count, first), scored_tokens, count)
                for pieces in crowd
                for count in counts
            ]
    ask_all(ways, report, questions, TRIALS_AT_ONCE)
    report.show()


def crowds(texts: Mapping[str, list[int]], most: int, tokens: int, places: int, seed: int) -> Iterator[list[list[int]]]:
    """`places` documents of each text, evenly spread, each followed by most - 1 different ones of the other texts.

    Raises ValueError where texts are too short or few.
    """
    pieces = {name: [ids[k : k + tokens] for k in range(0, len(ids) - tokens + 1, tokens)] for name, ids in texts.items()}
    for name, own in pieces.items():
        others = [piece for other, some in pieces.items() if other != name for piece in some]
        if len(own) < places or len(others) < most - 1:
            raise ValueError(
                f"{name} has {len(own)} documents of {tokens} tokens and the other texts {len(others)}, but {places} and "
                f"{most - 1} are needed; lower --places, --documents or --document-tokens"
            )
        for number in range(places):
            chosen = random.Random(f"{seed}/{name}/{number}").sample(others, most - 1)
            yield [own[number * len(own) // places], *chosen]


def with_distractors(pieces: list[list[int]], documents: int, first: int) -> list[int]:
    """The document at the end of the first d pieces, those of a smaller d nearest. first: takes the first token's place."""
    return [first, *[token for piece in reversed(pieces[:documents]) for token in piece][1:]]


def end_question(prompt: list[int], scored: int, documents: int) -> Question:
    def job() -> Job[dict[str, float]]:
        (output,) = yield [(prompt, scoring_params())]
        return {"nll": -statistics.fmean(output.prompt_logprobs.logprobs[-scored:])}

    return Question({"documents": documents}, len(prompt), job)


@app.command()
def fewshot(
    models: Models,
    examples: str = "16,64,256,1024,4096",
    contexts: Annotated[int, typer.Option(help="With classes and names of their own.", min=2)] = 8,
    queries: Annotated[int, typer.Option(help="After each context.", min=1)] = 12,
    seed: int = 0,
    methods: Ways = ALL_WAYS,
    top_k: TopK = 32,
    focused: Focused = "{}",
    branch: Branch = BRANCH,
    up_to: UpTo = "plain=16384",
    dtype: Dtype = "float32",
    kv_gib: KvGib = 2,
    json_out: JsonOut = None,
    plot_out: PlotOut = None,
) -> None:
    """Right classes of new pairs of words against the examples in the context; beside it what can be known from them."""
    from transformers import AutoTokenizer

    with errors_for_users():
        sizes = parse_lengths(examples)
        ways = Methods.parse(methods, top_k, focused, branch, up_to, dtype, kv_gib)
        settings = {"examples": sizes, "contexts": contexts, "queries": queries, "seed": seed}
        settings |= {"classes": CLASSES, "class_words": CLASS_WORDS, "dtype": dtype}
        report = Report("fewshot", FEWSHOT, settings, json_out, plot_out)
        questions = {}
        for model in models:
            task = Task(AutoTokenizer.from_pretrained(model_path(model), model_max_length=1 << 60))
            lessons = [Lesson(task, f"{seed}/{number}") for number in range(contexts)]
            asked = [(lesson, size) for lesson in lessons for size in sizes]
            known = averages(
                [{"examples": size} for _, size in asked],
                [{"accuracy": lesson.known(size, queries)} for lesson, size in asked],
                "accuracy",
            )
            report.add(model, "seen words", rows=known)
            questions[model] = [lesson.question(size, queries) for lesson, size in asked]
    ask_all(ways, report, questions, 1, enable_prefix_caching=True)
    report.show()


class Lesson:
    """Classes of words, each class with a number as its key, and examples: "The {word} {word} key is {number}."

    labels: the token of each number that tells it from the others, after the `shared` ones of all numbers. Raises
    ValueError if the tokenizer has too few whole words or numbers that one token does not tell apart.
    """

    def __init__(self, task: Task, seed: str):
        self.task, self.seed = task, seed
        candidates = (token[1:] for token in sorted(task.tokenizer.get_vocab()) if token[0] in "Ġ▁")
        words = [word for word in candidates if len(word) > 2 and word.isascii() and word.isalpha() and word.islower()]
        needed = CLASSES * CLASS_WORDS
        if len(words) < needed:
            raise ValueError(f"the tokenizer has {len(words)} whole words, but {needed} are needed")
        rng = random.Random(seed)
        chosen = rng.sample(words, needed)
        self.words = [chosen[n::CLASSES] for n in range(CLASSES)]
        self.keys = [str(10_000 * digit + rng.randrange(10_000)) for digit in rng.sample(range(1, 10), CLASSES)]
        tokens = [task.after("The key is", key) for key in self.keys]
        equal = takewhile(lambda column: len({*column}) == 1, zip(*tokens, strict=False))
        self.shared = [column[0] for column in equal]
        self.labels = [ids[len(self.shared)] for ids in tokens]
        if len({*self.labels}) < CLASSES:
            raise ValueError(f"the tokenizer writes {', '.join(self.keys)} with beginnings that are neither one nor different")

    def drawn(self, what: str, count: int) -> list[tuple[int, list[str]]]:
        """Numbers of classes, and two words of each. More of them begin with the same ones."""
        rng = random.Random(f"{self.seed}/{what}")
        classes = (rng.randrange(CLASSES) for _ in range(count))
        return [(n, rng.sample(self.words[n], 2)) for n in classes]

    def known(self, examples: int, queries: int) -> float:
        """Share that counting can know: a word of the query's has been seen, or else one guesses."""
        seen = {word for _, words in self.drawn("examples", examples) for word in words}
        return statistics.fmean(1.0 if seen & {*words} else 1 / CLASSES for _, words in self.drawn("queries", queries))

    def question(self, examples: int, queries: int) -> Question:
        text = " ".join(f"The {' '.join(words)} key is {self.keys[n]}." for n, words in self.drawn("examples", examples))
        asked = self.drawn("queries", queries)
        head = self.task.tokens(text)
        end = f"{self.keys[0]}."  # as of any example
        questions = [self.task.after(end, f"The {' '.join(words)} key is") for _, words in asked]
        prompts = [[*head, *question, *self.shared] for question in questions]

        def job() -> Job[dict[str, float]]:
            from vllm import SamplingParams

            params = SamplingParams(max_tokens=1, temperature=0, logprob_token_ids=self.labels, detokenize=False)
            outputs = yield [(prompts[0], params)]  # the others find what it has read
            outputs = outputs + (yield [(prompt, params) for prompt in prompts[1:]])
            scores = [[o.outputs[0].logprobs[0][label].logprob for label in self.labels] for o in outputs]
            return {"accuracy": share_right(scores, [n for n, _ in asked])}

        return Question({"examples": examples}, max(map(len, prompts)), job)


def share_right(scores: Sequence[Sequence[float]], classes: Sequence[int]) -> float:
    """Of log-probabilities by query and class: how often the right one's is highest."""
    return statistics.fmean(row.index(max(row)) == right for row, right in zip(scores, classes, strict=True))


@app.command()
def memory(
    models: Models,
    lengths: str = "4096,8192,16384,32768",
    methods: Ways = "plain,lm-infinite,focused",
    top_k: TopK = 32,
    focused: Focused = "{}",
    branch: Branch = BRANCH,
    up_to: UpTo = "",
    dtype: Dtype = "float32",
    kv_gib: KvGib = 1,
    json_out: JsonOut = None,
    plot_out: PlotOut = None,
) -> None:
    """MiB of KV that one request holds, and bytes per token between the shortest and the longest."""
    with errors_for_users():
        sizes = parse_lengths(lengths)
        ways = Methods.parse(methods, top_k, focused, branch, up_to, dtype, kv_gib)
        report = Report("memory", MEMORY, {"lengths": sizes, "dtype": dtype}, json_out, plot_out)
        longest = ways.longest(sizes)

    def rows(engine: "LLMEngine", meter: PeakBlocks, model: str, name: str) -> list[Row]:
        from vllm_longctx.engine.kv_cache import bytes_per_layer_block

        layer = bytes_per_layer_block(engine.vllm_config)
        block = layer * round(ways.engine["kv_cache_memory_bytes"] / meter.num_blocks / layer)  # of a group of layers
        result: list[Row] = []
        for size in sizes:
            if ways.within(name, size):
                meter.reset()
                token_times(engine, [random_tokens(engine, size, size)], 2)
                result.append({"length": size, "blocks": meter.peak, "bytes": meter.peak * block})
        return result

    for model in models:
        ways.measure(report, model, longest, rows)
    report.show()
    for model in models:
        slopes = {name: slope(rows) for name in ways.configs if len(rows := report.rows(model, name)) > 1}
        for name, per_token in slopes.items():
            share = f", {per_token / slopes['plain']:.4f} of plain" if slopes.get("plain") else ""
            Console().print(f"{Path(model).name}, {name}: {per_token:,.0f} bytes per token{share}", highlight=False)


def slope(rows: Sequence[Row]) -> float:
    """Bytes per token from the first row to the last."""
    return (rows[-1]["bytes"] - rows[0]["bytes"]) / (rows[-1]["length"] - rows[0]["length"])


@app.command()
def speed(
    models: Models,
    lengths: Annotated[str, typer.Option(help="Of the memory, in tokens.")] = "4096,8192,16384,32768,65536,131072",
    batch: Annotated[int, typer.Option(help="Requests that decode at once.", min=1)] = 1,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    written: Annotated[int, typer.Option(help="Tokens that each request writes.", min=2)] = 64,
    enforce_eager: bool = False,
    methods: Ways = "plain,focused,focused-top-k,focused-blocks",
    top_k: TopK = 32,
    focused: Focused = "{}",
    branch: Branch = BRANCH,
    up_to: UpTo = "plain=131072",
    dtype: Dtype = "float32",
    kv_gib: KvGib = 2,
    json_out: JsonOut = None,
    plot_out: PlotOut = None,
) -> None:
    """Decode, milliseconds per token. The texts are random; shorter ones begin the longest, which is read once."""
    with errors_for_users():
        sizes = parse_lengths(lengths)
        ways = Methods.parse(methods, top_k, focused, branch, up_to, dtype, kv_gib)
        settings = {"lengths": sizes, "batch": batch, "rounds": rounds, "written": written}
        settings |= {"enforce_eager": enforce_eager, "dtype": dtype}
        report = Report("speed", SPEED, settings, json_out, plot_out)
        report.results.clear()  # side by side, or not at all
        longest = ways.longest(sizes)
    kwargs: dict[str, Any] = {"max_num_seqs": batch, "enable_prefix_caching": True, "enforce_eager": enforce_eager}
    for model in models:
        with ExitStack() as stack, Progress(console=console) as progress:
            engines = {}
            for name in ways.configs:
                running = ways.start(stack, report, model, name, longest[name] + written, **kwargs)
                if running is not None:
                    engines[name] = running[0]
            # The longest first: the others find their beginning of it in the prefix cache.
            plan = [(n, name) for n in reversed(sizes) for name in engines if ways.within(name, n)]
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
                    rows = [speed_row(n, batch, statistics.median(found[name][n])) for n in sizes if n in found[name]]
                    report.add(model, name, attention=attention_of(engine), rows=rows)
    report.show()
    for model in models:
        plain = {row["length"]: row["tokens_per_s"] for row in report.rows(model, "plain")}
        for name in ways.configs:
            rows = [row for row in report.rows(model, name) if row["length"] in plain]
            ratios = [f"{row['tokens_per_s'] / plain[row['length']]:.2f} at {row['length']:,}" for row in rows]
            if ratios and name != "plain":
                Console().print(f"{Path(model).name}, {name}, × plain: {', '.join(ratios)}", highlight=False)


def speed_row(length: int, batch: int, tokens_per_s: float) -> Row:
    return {"length": length, "tokens_per_s": tokens_per_s, "ms_per_token": 1000 * batch / tokens_per_s}


if __name__ == "__main__":
    app()
