"""Table "lm-evaluation-harness" of benchmarks/README.md: the same scores with the plugin as without.

    pip install lm_eval==0.4.13
    python benchmarks/harness.py --model smollm2 --json OUT.json

Two tasks inside the trained length, whose data are made here: nothing is downloaded.

- order: the word that comes next in a list that was told before; four words to choose from. Accuracy.
- topics: the beginnings of Python documentation topics. Perplexity by word.

lm_eval asks the same engine as everything else, `--model vllm` of its own. A text that is shorter than the
window is computed as in stock vLLM, so scores differ by rounding at most.
"""

import json
import pydoc_data.topics
import random
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from vllm_longctx.cli.engine import SHUTDOWN_S, load_plugin, model_path
from vllm_longctx.cli.options import JsonOut
from vllm_longctx.cli.output import errors_for_users, tables, write_json

WAYS: dict[str, dict[str, Any]] = {
    "stock vLLM": {},
    "lm-infinite": {"additional_config": {"longctx": {"preset": "lm-infinite"}}},
    "streaming": {"additional_config": {"longctx": {"preset": "streaming"}}},
}
WORDS = ["apple", "bridge", "candle", "door", "engine", "forest", "garden", "hammer", "island", "kettle"]
CHOICES = 4
SCORES = {"order": "acc,none", "topics": "word_perplexity,none"}
TASKS: dict[str, dict[str, Any]] = {
    "order": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "topics": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
}


def order_question(number: int) -> dict[str, Any]:
    """A list of words, told twice, the second time up to one of them."""
    rng = random.Random(number)
    words = rng.sample(WORDS, 8)
    place = rng.randrange(2, len(words))
    choices = rng.sample([word for word in words if word != words[place]], CHOICES - 1)
    label = rng.randrange(CHOICES)
    choices.insert(label, words[place])
    text = f"The list is: {', '.join(words)}.\nOnce more, the list is: {', '.join(words[:place])},"
    return {"text": text, "choices": choices, "label": label}


def write_tasks(directory: Path, questions: int, topics: int, characters: int) -> None:
    """A file of data and one of lm_eval's configurations for each task."""
    texts = [text[:characters] for _, text in sorted(pydoc_data.topics.topics.items())][:topics]
    data = {
        "order": [order_question(number) for number in range(questions)],
        "topics": [{"text": text} for text in texts],
    }
    for name, documents in data.items():
        path = directory / f"{name}.jsonl"
        path.write_text("".join(json.dumps(document) + "\n" for document in documents))
        config = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(path)}},
            "test_split": "test",
            **TASKS[name],
        }
        (directory / f"{name}.yaml").write_text(json.dumps(config))  # JSON is YAML


def evaluate(model: str, way: str, directory: Path, **engine: Any) -> dict[str, float]:
    """The score of each task."""
    from lm_eval import simple_evaluate
    from lm_eval.models.vllm_causallms import VLLM
    from lm_eval.tasks import TaskManager

    asked = VLLM(pretrained=model_path(model), batch_size="auto", **engine, **WAYS[way])
    try:
        result = simple_evaluate(
            model=asked,
            tasks=list(TASKS),
            task_manager=TaskManager(include_path=str(directory), include_defaults=False),
            bootstrap_iters=0,
        )
    finally:  # lm_eval leaves its engine running, and this process would not end
        asked.model.llm_engine.engine_core.shutdown(timeout=SHUTDOWN_S)
    return {task: result["results"][task][score] for task, score in SCORES.items()}


def main(
    model: str = "smollm2",
    questions: Annotated[int, typer.Option(min=1)] = 100,
    topics: Annotated[int, typer.Option(min=1)] = 20,
    characters: Annotated[int, typer.Option(help="Of a topic.", min=1)] = 3000,
    max_model_len: Annotated[int, typer.Option(help="At most the trained length.", min=2)] = 2048,
    dtype: str = "float32",
    json_out: JsonOut = None,
) -> None:
    engine = {
        "dtype": dtype,
        "enforce_eager": True,
        "max_num_seqs": 8,
        "max_model_len": max_model_len,
        "kv_cache_memory_bytes": 1 << 30,
    }
    with errors_for_users(), tempfile.TemporaryDirectory() as temporary:
        load_plugin()
        write_tasks(Path(temporary), questions, topics, characters)
        scores = {way: evaluate(model, way, Path(temporary), **engine) for way in WAYS}
    table = Table("", *WAYS, title="Accuracy, and perplexity by word")
    for task in TASKS:
        table.add_row(task, *(f"{scores[way][task]:.6g}" for way in WAYS))
    tables().print(table)
    write_json(
        json_out,
        {
            "model": model,
            **engine,
            "questions": questions,
            "topics": topics,
            "characters": characters,
            "scores": scores,
        },
    )


if __name__ == "__main__":
    typer.run(main)
