"""The translation half of the Temp-LoRA paper (arXiv 2401.11504, section 4.2): a book is translated chapter
by chapter, with an adapter that learns what was translated, and without.

    python benchmarks/translation.py DIR --source zh --target en --model MODEL --json OUT.json

DIR has chapters in two languages, in one of these layouts; LANG is --source or --target, in any case:

- One file a chapter, NAME.LANG.txt or NAME-LANG.txt, as 0001.zh.txt beside 0001.en.txt. A folder is a book.
  GuoFeng's second corpus is so (https://github.com/longyuewangdcu/GuoFeng-Webnovel), with --source CH and
  --target DE: 1-ac/15-jlws_0001-CH.txt beside 1-ac/15-jlws_0001-DE.txt.
- One file a language, NAME.LANG, with <BOOK id="…"> and <CHAPTER id="…"> around each book and chapter. Its
  first corpus is so: train.zh beside train.en.

Chapters whose lines are aligned, which is where both languages have as many, are translated --lines at a
time.

After each chapter the adapter learns what was translated: the text of all requests and answers so far, in
blocks. The next chapter's requests use it and learn nothing. Without, they are asked of the same engine in
the same windows. What is compared:

- BLEU and chrF (sacrebleu) of whole chapters, the corpus's measure; and by thirds of a book's chapters, for
  an adapter can only help where something was learned before;
- perplexity of the reference translation behind the same request;
- COMET of chapters, with --comet and the package unbabel-comet.
"""

import itertools
import json
import math
import re
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from vllm_longctx.cli.engine import blocks_are_trained, running_engine, step, tokenizer_of, trained_tokens
from vllm_longctx.cli.options import JsonOut
from vllm_longctx.cli.output import counting, errors_for_users, tables, write_json
from vllm_longctx.cli.score import scoring_params

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.llm_engine import LLMEngine

WAYS = ("without", "Temp-LoRA")
REQUEST = "Translate into {target}:\n\n{text}"
LONGER = 3  # times as many tokens as the source has, which a translation may have
THIRDS = 3


@dataclass(frozen=True)
class Chapter:
    """source, target: its lines, without empty ones."""

    name: str
    source: list[str]
    target: list[str]

    def parts(self, lines: int) -> list[tuple[str, str]]:
        """What is translated at once, and its reference: so many lines if both are aligned, else all."""
        if len(self.source) != len(self.target):
            return [("\n".join(self.source), "\n".join(self.target))]
        edges = range(0, len(self.source), lines)
        return [("\n".join(self.source[k : k + lines]), "\n".join(self.target[k : k + lines])) for k in edges]


def read_books(directory: Path, source: str, target: str) -> dict[str, list[Chapter]]:
    """Chapters in order, by book. Raises ValueError where a chapter is there in one language only."""
    texts: dict[str, dict[tuple[str, str], list[str]]] = {source: {}, target: {}}
    for language, found in texts.items():
        pattern = re.compile(rf"(.+)[.-]{re.escape(language)}\.txt", re.IGNORECASE)
        for path in sorted(directory.rglob("*")):
            book = str(path.parent.relative_to(directory.parent))
            if named := pattern.fullmatch(path.name):
                found[book, named[1]] = lines_of(path.read_text(encoding="utf-8"))
            elif path.suffix.lower() == f".{language.lower()}":
                for (inner, chapter), lines in tagged(path.read_text(encoding="utf-8"), path):
                    found[f"{path.stem}/{inner}", chapter] = lines
    alone = texts[source].keys() ^ texts[target].keys()
    if alone:
        book, chapter = min(alone)
        raise ValueError(f"{directory}: chapter {chapter} of {book} is there in one language only")
    if not texts[source]:
        raise ValueError(f"{directory} has no chapters in {source} and {target}; the layouts are in --help")
    books: dict[str, list[Chapter]] = {}
    for (book, name), lines in texts[source].items():
        books.setdefault(book, []).append(Chapter(name, lines, texts[target][book, name]))
    return books


def lines_of(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def tagged(text: str, path: Path) -> Iterator[tuple[tuple[str, str], list[str]]]:
    """(book, chapter) and lines. Raises ValueError for a text without such tags."""
    if "<CHAPTER" not in text:
        raise ValueError(f"{path} has no <CHAPTER id=…> tags")
    book = ""
    for piece in re.split(r"(?=<BOOK|<CHAPTER)", text):
        if opened := re.match(r'<BOOK id="([^"]*)">', piece):
            book = opened[1]
        elif opened := re.match(r'<CHAPTER id="([^"]*)">', piece):
            yield (book, opened[1]), lines_of(re.sub(r"</?(BOOK|CHAPTER)[^>]*>", "", piece))


@dataclass
class Translated:
    """By chapter: what was written, the reference, and the NLL (nats) of each of its tokens."""

    written: list[str] = field(default_factory=list)
    references: list[str] = field(default_factory=list)
    nll: list[list[float]] = field(default_factory=list)

    def figures(self, begin: int = 0, end: int | None = None) -> dict[str, float]:
        """BLEU, chrF and perplexity of some chapters."""
        from sacrebleu.metrics import BLEU, CHRF

        written, references = self.written[begin:end], [self.references[begin:end]]
        nll = [x for chapter in self.nll[begin:end] for x in chapter]
        return {
            "BLEU": BLEU().corpus_score(written, references).score,
            "chrF": CHRF().corpus_score(written, references).score,
            "perplexity": math.exp(statistics.fmean(nll)),
        }

    def thirds(self) -> list[dict[str, float]]:
        edges = [len(self.written) * k // THIRDS for k in range(THIRDS + 1)]
        return [self.figures(a, b) for a, b in itertools.pairwise(edges) if b > a]


class Translator:
    """An engine that adapts, and the requests that it is asked.

    room: tokens of a request and its answer, the engine's window.
    """

    def __init__(self, engine: "LLMEngine", tokenizer: Any, target: str, lines: int, room: int) -> None:
        self.engine, self.tokenizer, self.target = engine, tokenizer, target
        self.lines, self.room, self.asked = lines, room, 0
        self.adaptation = engine.vllm_config.additional_config["longctx"]["adaptation"]

    def request(self, text: str) -> list[int]:
        """Tokens that ask for a translation, in the model's chat template if it has one."""
        words = REQUEST.format(target=self.target, text=text)
        if self.tokenizer.chat_template is None:
            return list(self.tokenizer(f"{words}\n\n")["input_ids"])
        return list(
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": words}], add_generation_prompt=True, return_dict=False
            )
        )

    def tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def ask(self, prompt: list[int], params: "SamplingParams") -> "RequestOutput":
        from vllm.inputs import tokens_input

        self.asked += 1
        self.engine.add_request(str(self.asked), tokens_input(prompt), params)
        output = None
        while self.engine.has_unfinished_requests():
            output = next(step(self.engine), output)
        assert output is not None
        return output

    def chapter(self, chapter: Chapter, adapter: str | None, into: Translated) -> list[int]:
        """Translate it and score its reference, adding both; the tokens of requests and answers.

        adapter: saved, with which to begin. Raises ValueError for a part that does not fit into the window.
        """
        from vllm import SamplingParams

        options = {"temp_lora": True, "learn": "none", **({} if adapter is None else {"start_from": adapter})}
        written, nll, text = [], [], []
        for source, reference in chapter.parts(self.lines):
            prompt, wanted = self.request(source), self.tokens(reference)
            longest = min(LONGER * len(self.tokens(source)), self.room - len(prompt) - 1)
            if longest < 1 or len(prompt) + len(wanted) >= self.room:
                raise ValueError(
                    f"a part of chapter {chapter.name} does not fit into {self.room} tokens; lower --lines"
                )
            params = SamplingParams(
                max_tokens=longest,
                temperature=0,
                stop=["\n\n"] if self.tokenizer.chat_template is None else None,
                extra_args={"longctx": options},
            )
            answer = self.ask(prompt, params).outputs[0]
            written.append(answer.text.strip())
            text += [*prompt, *answer.token_ids]
            scored = self.ask([*prompt, *wanted], scoring_params(options)).prompt_logprobs
            assert scored is not None
            nll += [-x for x in scored.logprobs[-len(wanted) :]]  # type: ignore[attr-defined]  # flat ones
        into.written.append("\n".join(written))
        into.references.append("\n".join(chapter.target))
        into.nll.append(nll)
        return text

    def learn(self, history: list[int], before: str | None, name: str) -> None:
        """Train on what there is of a book, from a saved adapter on, and save that of the name.

        Raises PremiseError if blocks were not trained.
        """
        from vllm import SamplingParams

        size = self.adaptation["block_tokens"]
        options = {"temp_lora": True, "learn": "prompt", "save_as": name}
        if before is not None:
            options["start_from"] = before
        params = SamplingParams(max_tokens=1, temperature=0, extra_args={"longctx": options})
        with blocks_are_trained(self.engine, 0, len(history) // size + 1):
            self.ask(history, params)

    def book(self, number: int, chapters: Sequence[Chapter], adapts: bool, each: Any) -> Translated:
        """number: of the book, in the names of its adapters. each is called after every chapter."""
        result, history, adapter = Translated(), list[int](), None
        for place, chapter in enumerate(chapters):
            history += self.chapter(chapter, adapter, result)
            if adapts and len(history) > self.adaptation["block_tokens"] and place + 1 < len(chapters):
                saved = f"book-{number}-{place}"
                self.learn(history, adapter, saved)
                adapter = saved
            each()
        return result


def comet(model: Path, sources: Sequence[str], translated: Translated) -> float:
    """COMET's score of chapters. Raises ValueError if its package is not installed."""
    try:
        from comet import load_from_checkpoint
    except ImportError:
        raise ValueError("--comet needs the package unbabel-comet: pip install unbabel-comet") from None
    data = [
        {"src": source, "mt": written, "ref": reference}
        for source, written, reference in zip(sources, translated.written, translated.references, strict=True)
    ]
    return float(load_from_checkpoint(str(model)).predict(data, gpus=0).system_score)


def main(
    directory: Annotated[Path, typer.Argument(help="Chapters in two languages; the layouts stand above.")],
    source: Annotated[str, typer.Option(help="Language of the originals, as in the names of files.")] = "zh",
    target: Annotated[str, typer.Option(help="Language of the translations.")] = "en",
    target_name: Annotated[str, typer.Option(help="As the request calls it.")] = "English",
    model: str = "smollm2",
    lines: Annotated[int, typer.Option(help="Lines of an aligned chapter, translated at once.", min=1)] = 10,
    chapters: Annotated[int | None, typer.Option(help="Of each book, only the first.", min=1)] = None,
    adaptation: Annotated[str, typer.Option(help="Keys of adaptation beside the preset's, as JSON.")] = (
        '{"block_tokens": 256, "rank": 16, "learning_rate": 2e-4}'
    ),
    comet_model: Annotated[Path | None, typer.Option("--comet", help="A checkpoint of COMET's.")] = None,
    dtype: str = "auto",
    json_out: JsonOut = None,
) -> None:
    with errors_for_users():
        books = {name: some[:chapters] for name, some in read_books(directory, source, target).items()}
        own = {"slots": 1, "cache_gib": 0, **json.loads(adaptation)}
        room = trained_tokens(model)
        translated: dict[str, dict[str, Translated]] = {way: {} for way in WAYS}
        with tempfile.TemporaryDirectory() as root, counting() as progress:
            config = {
                "longctx": {"preset": "temp-lora-quality", "adaptation": {**own, "adapters_root": root}}
            }
            task = progress.add_task("chapters", total=len(WAYS) * sum(map(len, books.values())))
            longest = room * (1 + max(map(len, books.values())))
            with running_engine(model, config, longest, dtype=dtype, max_num_seqs=2) as (engine, _):
                window = engine.vllm_config.additional_config["longctx"]["adaptation"]["window_tokens"]
                translator = Translator(engine, tokenizer_of(model), target_name, lines, window)
                for way, (number, name) in itertools.product(WAYS, enumerate(books)):
                    progress.update(task, description=f"{way}: {name}")
                    translated[way][name] = translator.book(
                        number, books[name], way == WAYS[1], lambda: progress.advance(task)
                    )
        rows = {
            way: {name: {**result.figures(), "thirds": result.thirds()} for name, result in by_book.items()}
            for way, by_book in translated.items()
        }
        if comet_model is not None:
            for way, (name, some) in itertools.product(WAYS, books.items()):
                originals = ["\n".join(chapter.source) for chapter in some]
                rows[way][name]["COMET"] = comet(comet_model, originals, translated[way][name])
    tables().print(book_table(rows))
    about = {"model": model, "source": source, "target": target, "lines": lines, "adaptation": own}
    write_json(json_out, {**about, "chapters": {n: len(c) for n, c in books.items()}, "books": rows})


def book_table(rows: dict[str, dict[str, dict[str, Any]]]) -> Table:
    table = Table(
        *("book", "way", "BLEU", "chrF", "perplexity", "COMET", "BLEU by thirds", "perplexity by thirds"),
        title="Chapters translated; perplexity of the references",
    )
    for name in rows[WAYS[0]]:
        for way in WAYS:
            row = rows[way][name]
            table.add_row(
                name,
                way,
                *(f"{row[measure]:.2f}" for measure in ("BLEU", "chrF", "perplexity")),
                f"{row['COMET']:.3f}" if "COMET" in row else "",
                *(
                    ", ".join(f"{t[measure]:.2f}" for t in row["thirds"])
                    for measure in ("BLEU", "perplexity")
                ),
            )
        table.add_section()
    return table


if __name__ == "__main__":
    typer.run(main)
