"""Pass-key prompts and scores, and the loop that runs jobs in batches, without an engine."""

import math
import random
import re
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import passkey_texts
import pytest
import torch
from transformers import AutoTokenizer

from vllm_longctx import BOOKLM
from vllm_longctx.cli.engine import parse_lengths, parse_methods, run_jobs
from vllm_longctx.cli.passkey import (
    ANSWER_TOKENS,
    CHOICES,
    FILLER,
    KEY,
    QUESTION,
    TASK,
    Outcome,
    Task,
    Trial,
    ask,
    cycle,
    outcome,
    rows,
)
from vllm_longctx.geometry import Geometry, branches

LAMBDA = Geometry(10, 512, 512)
STREAMING = Geometry(4, 508, None, "in_cache")


class Words:
    """A tokenizer of words that ends every text with an end-of-text token."""

    eos_token_id = 0

    def __init__(self) -> None:
        self.ids: dict[str, int] = {"</s>": 0}

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [self.ids.setdefault(w, len(self.ids)) for w in [*text.split(), "</s>"]]}


class WholeTexts(Words):
    """A tokenizer that takes no notice of sentences."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [self.ids.setdefault(text, len(self.ids))]}


@pytest.fixture(scope="module")
def task() -> Task:
    return Task(AutoTokenizer.from_pretrained(BOOKLM))


@pytest.mark.parametrize("length", [300, 512, 777, 5000])
def test_the_key_stands_where_the_trial_says(task: Task, length: int) -> None:
    trials = task.trials(length, [LAMBDA, STREAMING], 10, seed=0)
    assert {t.place for t in trials} == ({"inside"} if length < 600 else {"inside", "outside"})
    assert len({(t.key, t.key_start) for t in trials}) > len(trials) / 2
    for trial in trials:
        assert len(trial.prompt) == len(trial.keyless) == length
        text = task.tokenizer.decode(trial.prompt)
        assert text.startswith("<s>" + TASK) and text.endswith(QUESTION) and text.count(trial.key) == 2
        told = task.tokenizer.decode(trial.prompt[trial.key_start : trial.key_end])
        assert told == " " + KEY.format(key=trial.key)
        keyless = task.tokenizer.decode(trial.keyless)
        assert not any(character.isdigit() for character in keyless)
        assert keyless.startswith("<s>" + TASK) and keyless.endswith(f"{FILLER} {QUESTION}")
        assert len(trial.choices) == CHOICES and trial.key in trial.choices
        for key, tokens in trial.choices.items():
            assert task.tokenizer.decode(tokens) == f" {key}"


@pytest.mark.parametrize("geometry", [LAMBDA, STREAMING, Geometry(100, 300, 512)])
def test_inside_is_seen_and_outside_is_not(task: Task, geometry: Geometry) -> None:
    length = 1500
    queries = torch.arange(length - 1, length + ANSWER_TOKENS - 1)
    trials = task.trials(length, [geometry], 20, seed=3)
    assert {t.place for t in trials} == {"inside", "outside"}
    for trial in trials:
        local, first = branches(geometry, queries, torch.arange(trial.key_start, trial.key_end))
        seen = local.visible | first.visible
        assert seen.all() if trial.place == "inside" else not seen.any()


def test_a_trial_depends_on_the_seed_and_on_nothing_else(task: Task) -> None:
    few, many, other = (task.trials(900, [LAMBDA], *n) for n in ((3, 1), (5, 1), (3, 2)))
    assert [t for t in many if t in few] == few
    assert not any(t in few for t in other)


def test_lengths_that_hold_no_key_are_refused(task: Task) -> None:
    with pytest.raises(ValueError, match=r"length 60 is too short: the task alone takes 8\d tokens"):
        task.trials(60, [LAMBDA], 1, seed=0)
    with pytest.raises(ValueError, match="length 128 has no place for a key inside or outside"):
        task.trials(128, [Geometry(0, 64)], 1, seed=0)


def test_other_tokenizers() -> None:
    tokenizer = Words()
    (trial,) = Task(tokenizer).trials(200, [LAMBDA], 1, seed=0)
    words = {i: w for w, i in tokenizer.ids.items()}
    told = [words[i] for i in trial.prompt[trial.key_start : trial.key_end]]
    assert told == KEY.format(key=trial.key).split() and 0 not in trial.prompt
    with pytest.raises(ValueError, match="tokens run across the end of"):
        Task(WholeTexts())


def test_filler_ends_with_a_whole_unit() -> None:
    assert [cycle([1, 2, 3], n) for n in range(5)] == [[], [3], [2, 3], [1, 2, 3], [3, 1, 2, 3]]


def test_scores() -> None:
    keyless = {"11111": -3.0, "22222": -9.0, "33333": -6.0}
    after = {
        "11111": -3.0,
        "22222": -5.0,
        "33333": -6.5,
    }  # less likely than another key, but it has gained most
    assert outcome("22222", " 22222.", after, keyless) == Outcome(exact=True, choice=1.0, gain=4.25)
    assert outcome("11111", "I know: 2, 11111", after, keyless) == Outcome(
        exact=False, choice=0.0, gain=-1.75
    )
    forgotten = outcome("33333", "", {k: v + 1e-4 * k.count("1") for k, v in keyless.items()}, keyless)
    assert not forgotten.exact and forgotten.choice == pytest.approx(1 / 3) and abs(forgotten.gain) < 1e-3


def test_rows_are_means_by_length_and_place() -> None:
    def trial(place: str, length: int) -> Trial:
        return Trial(place, "1", [0] * length, [0] * length, 0, 1, {})

    trials = [trial("inside", 5), trial("inside", 5), trial("outside", 5), trial("inside", 7)]
    found = rows(
        trials,
        [
            Outcome(True, 1.0, 4.0),
            Outcome(False, 0.5, 2.0),
            Outcome(False, 0.1, 0.0),
            Outcome(True, 1.0, 1.0),
        ],
    )
    assert [(r.length, r.place, r.trials) for r in found] == [
        (5, "inside", 2),
        (5, "outside", 1),
        (7, "inside", 1),
    ]
    assert (found[0].exact, found[0].choice, found[0].gain, found[0].gain_error) == (
        0.5,
        0.75,
        3.0,
        pytest.approx(1.0),
    )


def logprob(prompt: tuple[int, ...], token: int) -> float:
    return -random.Random(f"{prompt} {token}").random()


class Engine:
    """Answers every request after a few steps, in an order of its own; remembers how many jobs were running
    at once.
    """

    def __init__(self) -> None:
        self.waiting: list[tuple[str, list[int], Any]] = []
        self.most_jobs = 0

    def add_request(self, request_id: str, prompt: Any, params: Any) -> None:
        self.waiting.append((request_id, prompt["prompt_token_ids"], params))
        self.most_jobs = max(self.most_jobs, len({name.partition("/")[0] for name, _, _ in self.waiting}))

    def step(self) -> list[Any]:
        request_id, prompt, params = self.waiting.pop(len(self.waiting) // 2)
        wanted = params.logprob_token_ids or []
        logprobs = [{t: SimpleNamespace(logprob=logprob(tuple(prompt), t)) for t in wanted}]
        completion = SimpleNamespace(text=" 12345", token_ids=[len(prompt)], logprobs=logprobs)
        unfinished = SimpleNamespace(request_id=request_id, finished=False, outputs=[])
        return [unfinished, SimpleNamespace(request_id=request_id, finished=True, outputs=[completion])]


def test_jobs_run_side_by_side_and_return_in_order() -> None:
    from vllm import SamplingParams

    def job(number: int) -> Generator[Any, Any, list[int]]:
        lengths = []
        for _ in range(number % 3):
            outputs = yield [([1] * (10 * number + k), SamplingParams()) for k in range(1, 4)]
            lengths += [o.outputs[0].token_ids[0] - 10 * number for o in outputs]
        return lengths

    engine = Engine()
    results = run_jobs(engine, [job(number) for number in range(20)], "test", 4)  # type: ignore[arg-type]
    assert results == [[1, 2, 3] * (number % 3) for number in range(20)]
    assert engine.most_jobs == 4 and not engine.waiting
    assert run_jobs(engine, [], "test", 4) == []  # type: ignore[arg-type]


def test_keys_are_scored_token_by_token(task: Task) -> None:
    (trial,) = task.trials(300, [LAMBDA], 1, seed=0)
    (found,) = run_jobs(Engine(), [ask(trial)], "test", 1)  # type: ignore[arg-type]

    def total(prompt: list[int], tokens: list[int]) -> float:
        return math.fsum(logprob((*prompt, *tokens[:k]), token) for k, token in enumerate(tokens))

    after, keyless = (
        {key: total(p, t) for key, t in trial.choices.items()} for p in (trial.prompt, trial.keyless)
    )
    expected = outcome(trial.key, " 12345", after, keyless)
    assert found.exact == expected.exact and found.choice == expected.choice
    assert found.gain == pytest.approx(expected.gain)


def test_lists_on_the_command_line() -> None:
    assert parse_lengths("2048,512,512") == [512, 2048]
    assert list(parse_methods("plain,window")) == ["plain", "window"]
    for words in ("", "512,", "1k", "0", "-5,512"):
        with pytest.raises(ValueError, match=f"--lengths {words}: give numbers of tokens such as 512,1024"):
            parse_lengths(words)


def test_texts_that_teach_the_task_fit_the_trained_length(task: Task, tmp_path: Path) -> None:
    passkey_texts.main(tmp_path, prompts=50)
    prompts = (tmp_path / "train" / "passkey.txt").read_text().split("\n")
    assert len(prompts) == 50 and (tmp_path / "validation" / "passkey.txt").exists()
    for prompt in prompts:
        key = re.search(r"pass key is (\d{5})\.$", prompt)
        assert key is not None and prompt.count(key[1]) == 3 and len(task.tokens(prompt)) < 512
