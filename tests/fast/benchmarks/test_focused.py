"""The pure parts of benchmarks/focused.py, and what a run leaves in its file."""

import json
from pathlib import Path

import focused
import pytest
from transformers import AutoTokenizer

from vllm_longctx import BOOKLM
from vllm_longctx.cli.passkey import Task, windows

MEMORY = {"mem_layers": [3], "last_context_length": 100}


def parse(
    methods: str = focused.ALL_WAYS, focused_keys: str = "{}", branch: str = "{}", up_to: str = ""
) -> focused.Methods:
    return focused.Methods.parse(methods, 7, focused_keys, branch, up_to, "float32", 1)


def test_methods_are_configurations() -> None:
    ways = parse(
        focused_keys=json.dumps(MEMORY), branch='{"top_k": 5, "top_k_from_layer": 2}', up_to="plain=100"
    )
    assert list(ways.configs) == list(focused.WAYS)
    assert ways.configs["plain"] is None
    assert ways.configs["lm-infinite-top-k"]["attention"] == {
        "method": "lm_infinite",
        "top_k": 5,
        "top_k_from_layer": 2,
    }
    assert ways.configs["focused"]["attention"] == {"method": "focused", **MEMORY}
    assert ways.configs["focused-blocks"]["attention"] == {
        "method": "focused",
        **MEMORY,
        "lookup": "blocks",
        "top_k": 7,
    }
    assert ways.longest([50, 100, 101]) == {name: 100 if name == "plain" else 101 for name in focused.WAYS}


def test_words_that_say_nothing_are_refused() -> None:
    with pytest.raises(
        ValueError,
        match="unknown method 'focussed'; methods: plain, lm-infinite, lm-infinite-top-k, focused,",
    ):
        parse("plain,focussed")
    with pytest.raises(ValueError, match=r"--focused \[3\]: give keys of `attention` as JSON"):
        parse(focused_keys="[3]")
    for words in ("plain", "plain=", "plian=8192", "plain=8k"):
        with pytest.raises(ValueError, match=f"--up-to {words}: give methods and tokens such as plain=8192"):
            parse(up_to=words)
    with pytest.raises(ValueError, match="--up-to plain=10 leaves it none; the shortest has 11 tokens"):
        parse(up_to="plain=10").longest([11, 12])


def test_passkey_knows_stepped_windows() -> None:
    configs = parse("plain,lm-infinite,focused", json.dumps(MEMORY)).configs
    seen = windows("booklm", list(configs.values()))
    assert [(g.n_global, g.n_local) for g in seen] == [(10, 512), (0, 100)]
    task = Task(AutoTokenizer.from_pretrained(BOOKLM))
    by_place = {t.place: t for t in task.trials(1000, seen[1:], 5, seed=0)}
    assert by_place["outside"].key_end <= 900 < by_place["inside"].key_start


def test_averages_by_row() -> None:
    rows = focused.averages(
        [{"d": 1}, {"d": 1}, {"d": 2}],
        [{"y": 1.0, "z": 0.0}, {"y": 2.0, "z": 4.0}, {"y": 5.0, "z": 6.0}],
        "y",
    )
    assert rows == [
        {"d": 1, "asked": 2, "y": 1.5, "z": 2.0, "error": pytest.approx(1.96 * 0.5)},
        {"d": 2, "asked": 1, "y": 5.0, "z": 6.0, "error": None},
    ]


def test_a_documents_neighbours_are_of_other_texts() -> None:
    texts = {name: [n, *range(1000 * n, 1000 * n + 999)] for n, name in enumerate(("a", "b", "c"), 1)}
    crowds = list(focused.crowds(texts, 4, 100, 3, seed=0))
    assert len(crowds) == 9
    for number, pieces in enumerate(crowds):
        own = 1 + number // 3
        assert [len(p) for p in pieces] == [100] * 4 and len({p[0] for p in pieces}) == 4
        assert pieces[0][1] // 1000 == own and all(p[1] // 1000 != own for p in pieces[1:])
        small, large = (focused.with_distractors(pieces, d, -1) for d in (2, 4))
        assert large[-199:] == small[1:] and small[0] == large[0] == -1 and len(large) == 400
        assert small[100:] == pieces[0]
    with pytest.raises(
        ValueError, match="a has 10 documents of 100 tokens and the other texts 20, but 3 and 21 are needed"
    ):
        list(focused.crowds(texts, 22, 100, 3, seed=0))


def test_lessons_teach_what_can_be_known() -> None:
    task = Task(AutoTokenizer.from_pretrained(BOOKLM))
    lesson = focused.Lesson(task, "0/0")
    assert len({w for words in lesson.words for w in words}) == focused.CLASSES * focused.CLASS_WORDS
    assert len({*lesson.labels}) == focused.CLASSES and not lesson.shared
    for key, label in zip(lesson.keys, lesson.labels, strict=True):
        assert len(key) == 5 and f" {key}".startswith(task.tokenizer.decode([label]))
    assert lesson.drawn("examples", 20) == lesson.drawn("examples", 50)[:20]
    assert {n for n, _ in lesson.drawn("examples", 60)} == {*range(focused.CLASSES)}
    shares = [lesson.known(n, 60) for n in (1, 64, 4096)]
    assert 1 / 6 <= shares[0] < 0.3 < shares[1] < shares[2] == 1
    short, long = (lesson.question(n, 3) for n in (6, 60))
    prompts, prefix = [p for p, _ in next(long.job())], next(short.job())[0][0]
    text = task.tokenizer.decode(prompts[0])
    ((number, words), *_, (last, _)), (_, asked) = lesson.drawn("examples", 60), lesson.drawn("queries", 3)[0]
    assert text.startswith(f"<s>The {' '.join(words)} key is {lesson.keys[number]}. The ")
    assert text.endswith(f"{lesson.keys[last]}. The {' '.join(asked)} key is") and text.count(" key is") == 61
    assert prompts[0][:40] == prefix[:40]
    assert long.tokens >= len(prompts[0]) and long.row == {"examples": 60}
    assert focused.share_right([[0.1, 0.2], [0.4, 0.3]], [1, 1]) == 0.5


def test_results_are_added_to_the_file_and_only_to_its_like(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, figure = tmp_path / "out.json", tmp_path / "out.png"
    report = focused.Report("passkey", focused.PASSKEY, {"seed": 0}, out, figure)
    rows = [
        {"length": n, "place": place, "asked": 2, "exact": 0.5, "error": 0.1}
        for n in (8, 16)
        for place in ("in", "out")
    ]
    report.add("/models/one", "plain", attention={"method": "none"}, rows=rows)
    report.refuse("/models/one", "focused", ValueError("model /models/one cannot"))

    again = focused.Report("passkey", focused.PASSKEY, {"seed": 0}, out, figure)
    again.add("/models/one", "plain", attention={"method": "none"}, rows=rows[:3])
    assert again.rows("elsewhere/one", "plain") == rows[:3] and again.rows("one", "focused") == []
    again.show()
    printed = capsys.readouterr().out
    assert "50 ± 10" in printed and "focused was refused: model one cannot" in printed
    assert "/models" not in out.read_text() and figure.stat().st_size > 10_000
    with pytest.raises(
        ValueError, match=r"has settings {'seed': 0}, not {'seed': 1}; give the same, or another file"
    ):
        focused.Report("passkey", focused.PASSKEY, {"seed": 1}, out, None)


def test_bytes_per_token() -> None:
    assert (
        focused.slope(
            [{"length": 100, "bytes": 1000}, {"length": 200, "bytes": 9}, {"length": 300, "bytes": 1400}]
        )
        == 2
    )
