"""The tasks that benchmarks/harness.py makes for lm_eval."""

import json
from pathlib import Path

import yaml
from harness import CHOICES, SCORES, TASKS, order_question, write_tasks


def test_a_question_has_one_right_answer() -> None:
    for number in range(50):
        question = order_question(number)
        told, again = question["text"].split("\n")
        words = told.removeprefix("The list is: ").removesuffix(".").split(", ")
        begun = again.removeprefix("Once more, the list is: ").removesuffix(",").split(", ")
        assert words[: len(begun)] == begun
        assert len({*question["choices"]}) == CHOICES
        assert question["choices"][question["label"]] == words[len(begun)]
    assert order_question(3) == order_question(3) != order_question(4)


def test_each_task_has_its_data_and_a_configuration(tmp_path: Path) -> None:
    write_tasks(tmp_path, questions=5, topics=2, characters=100)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{task}.{suffix}" for task in TASKS for suffix in ("yaml", "jsonl")
    }
    for task in TASKS:
        config = yaml.safe_load((tmp_path / f"{task}.yaml").read_text())
        lines = Path(config["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()
        documents = [json.loads(line) for line in lines]
        assert config["task"] == task and len(documents) == {"order": 5, "topics": 2}[task]
        assert all(document["text"] for document in documents)
        assert SCORES[task].split(",")[0] == config["metric_list"][0]["metric"]
