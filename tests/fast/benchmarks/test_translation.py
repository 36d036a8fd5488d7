"""benchmarks/translation.py: the layouts that it reads, what it asks, and what it makes of the answers."""

import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import translation
from rich.console import Console
from transformers import AutoTokenizer
from translation import WAYS, Chapter, Translated, Translator, book_table, read_books

from vllm_longctx import BOOKLM

FIRST = Chapter("0001", ["Eins.", "Zwei.", "Drei."], ["One.", "Two.", "Three."])
SECOND = Chapter("0002", ["Vier.", "Fünf."], ["Four and five."])


def write(directory: Path, name: str, chapter: Chapter, source: str, target: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for suffix, lines in ((source, chapter.source), (target, chapter.target)):
        (directory / f"{name}{suffix}.txt").write_text("\n\n".join(lines) + "\n", encoding="utf-8")


def tags(language: str, book: str) -> str:
    chapters = "".join(
        f'<CHAPTER id="{c.name}">\n' + "\n".join(getattr(c, language)) + "\n</CHAPTER>\n"
        for c in (FIRST, SECOND)
    )
    return f'<BOOK id="{book}">\n{chapters}</BOOK>\n'


@pytest.mark.parametrize(("source", "target"), [(".de", ".en"), ("-DE", "-EN")])
def test_a_file_for_each_chapter(source: str, target: str, tmp_path: Path) -> None:
    """The plain layout, and that of GuoFeng's second corpus."""
    for book in ("a", "b"):
        write(tmp_path / book, "0002", SECOND, source, target)
        write(tmp_path / book, "0001", FIRST, source, target)
    (tmp_path / "README.md").write_text("not a chapter")
    books = read_books(tmp_path, "de", "en")
    assert books == {f"{tmp_path.name}/{book}": [FIRST, SECOND] for book in ("a", "b")}


def test_a_file_for_each_language(tmp_path: Path) -> None:
    """That of GuoFeng's first corpus."""
    for language, suffix in (("source", "zh"), ("target", "en")):
        (tmp_path / f"valid.{suffix}").write_text(tags(language, "1") + tags(language, "2"), encoding="utf-8")
    assert read_books(tmp_path, "zh", "en") == {"valid/1": [FIRST, SECOND], "valid/2": [FIRST, SECOND]}


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no chapters in de and en"):
        read_books(tmp_path, "de", "en")
    write(tmp_path, "0001", FIRST, ".de", ".en")
    (tmp_path / "0002.de.txt").write_text("Vier.")
    with pytest.raises(ValueError, match=r"chapter 0002 of \w+ is there in one language only"):
        read_books(tmp_path, "de", "en")
    (tmp_path / "all.en").write_text("One.")
    with pytest.raises(ValueError, match="has no <CHAPTER id=…> tags"):
        read_books(tmp_path, "de", "en")


def test_aligned_lines_are_translated_some_at_a_time() -> None:
    assert FIRST.parts(2) == [("Eins.\nZwei.", "One.\nTwo."), ("Drei.", "Three.")]
    assert SECOND.parts(1) == [("Vier.\nFünf.", "Four and five.")]


class Engine:
    """Answers each request; takes down what it was asked."""

    def __init__(self, tokenizer: Any, block_tokens: int) -> None:
        adaptation = {"block_tokens": block_tokens}
        self.vllm_config = SimpleNamespace(additional_config={"longctx": {"adaptation": adaptation}})
        self.tokenizer, self.asked, self.waiting = (
            tokenizer,
            list[tuple[str, dict[str, Any], int]](),
            list[Any](),
        )

    def add_request(self, number: str, prompt: Any, params: Any) -> None:
        tokens = prompt["prompt_token_ids"]
        self.asked.append((self.tokenizer.decode(tokens), params.extra_args["longctx"], params.max_tokens))
        answer = SimpleNamespace(text=" One.\n", token_ids=self.tokenizer("One.")["input_ids"])
        logprobs = SimpleNamespace(logprobs=[-1.0] * (len(tokens) - 1))
        self.waiting.append(SimpleNamespace(outputs=[answer], prompt_logprobs=logprobs))

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting)

    def step(self) -> list[Any]:
        return [self.waiting.pop()]


@pytest.mark.parametrize("adapts", [False, True])
def test_each_chapter_begins_with_what_was_learned_before(
    adapts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[int, int]] = []
    monkeypatch.setattr(
        translation, "blocks_are_trained", lambda engine, *bounds: trained.append(bounds) or nullcontext()
    )
    tokenizer = AutoTokenizer.from_pretrained(BOOKLM)
    engine, done = Engine(tokenizer, 16), list[None]()
    translator = Translator(engine, tokenizer, "English", 2, 512)  # type: ignore[arg-type]
    result = translator.book(7, [FIRST, SECOND, SECOND], adapts, lambda: done.append(None))
    assert len(done) == 3 and result.written == ["One.\nOne.", "One.", "One."]
    assert result.references == ["One.\nTwo.\nThree.", "Four and five.", "Four and five."]
    references = [
        len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in result.references[1:]
    ]
    assert [len(nll) for nll in result.nll[1:]] == references
    using = [options.get("start_from") for _, options, _ in engine.asked if options["learn"] == "none"]
    learning = [(text, options) for text, options, _ in engine.asked if options["learn"] == "prompt"]
    if not adapts:
        assert using == [None] * 8 and not learning
        return
    assert using == [None] * 4 + ["book-7-0"] * 2 + ["book-7-1"] * 2 and len(trained) == 2
    assert [(o["save_as"], o.get("start_from")) for _, o in learning] == [
        ("book-7-0", None),
        ("book-7-1", "book-7-0"),
    ]
    assert learning[1][0].startswith(learning[0][0]) and learning[0][0].count("Translate into English") == 2


def test_a_part_that_does_not_fit_is_named() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BOOKLM)
    translator = Translator(Engine(tokenizer, 16), tokenizer, "English", 2, 20)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a part of chapter 0001 does not fit into 20 tokens; lower --lines"):
        translator.book(0, [FIRST], False, lambda: None)


def test_figures_are_of_whole_chapters() -> None:
    text = "The quick brown fox jumps over the lazy dog."
    result = Translated(
        [text] * 3, [text, text, "Nothing of the kind is here, I say."], [[1.0], [1.0, 3.0], [2.0]]
    )
    figures, thirds = result.figures(), result.thirds()
    assert figures["perplexity"] == pytest.approx(math.exp(1.75)) and 30 < figures["BLEU"] < 80
    assert [round(third["BLEU"]) for third in thirds[:2]] == [100, 100] and thirds[2]["BLEU"] < 10
    rows = {
        way: {"a": {**figures, "thirds": thirds, **({"COMET": 0.5} if way == WAYS[1] else {})}}
        for way in WAYS
    }
    console = Console(width=160)
    with console.capture() as shown:
        console.print(book_table(rows))
    assert "0.500" in shown.get() and f"{figures['chrF']:.2f}" in shown.get()
