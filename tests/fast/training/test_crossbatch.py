"""Training a memory: the forward of each objective against the float64 reference and against transformers'
own models, exact resumption, and what is refused.
"""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from tests.support import families
from tests.support.architectures import ARCHITECTURES, OWN_WINDOW, made
from tests.support.commands import run
from tests.support.hf_oracle import Oracle
from tests.support.matrix import STEPPED, windows_in_windows
from tests.support.reference_model import ReferenceLlama, focused
from vllm_longctx import BOOKLM
from vllm_longctx.geometry import Branch, SteppedWindows, local_branch, memory_branch
from vllm_longctx.models.longllama import LongLlamaConfig
from vllm_longctx.rotary import Rotary
from vllm_longctx.training.crossbatch import MemoryModel, scheduled
from vllm_longctx.training.data import IGNORED, Batch, Documents
from vllm_longctx.training.trainer import DTYPES, OBJECTIVES, STATE_NAME, Recipe, Trainer, load, save

C = 32
WINDOWS = SteppedWindows(C, C)


@pytest.mark.parametrize("mem_positionals", [True, False])
def test_a_document_of_two_contexts_is_what_the_reference_says(
    tiny_llama: Path, mem_positionals: bool
) -> None:
    ids = torch.randint(512, (3, 2, C))
    memory = MemoryModel(load(tiny_llama), [0, 2], mem_positionals)
    seen = focused(WINDOWS, 2 * C, [0, 2], mem_positionals)
    expected = torch.stack([ReferenceLlama(tiny_llama).logprobs(row.flatten().tolist(), seen) for row in ids])
    ours = memory.crossbatch(ids, documents=1).log_softmax(-1).flatten(1, 2)
    assert torch.allclose(ours.double(), expected, atol=1e-4)


def test_a_text_is_read_as_the_reference_says(tiny_llama: Path) -> None:
    ids, windows = (
        torch.randint(512, (2, 150)),
        SteppedWindows(C, 20),
    )  # the last 20 of the prompt, then 10 more, then a new one
    memory = MemoryModel(load(tiny_llama), [1, 2])
    parts = [logits for _, logits in memory.read(ids, windows, prompt_length=130)]
    seen = focused(windows, 130, [1, 2])
    expected = torch.stack([ReferenceLlama(tiny_llama).logprobs(row.tolist(), seen) for row in ids])
    assert [part.shape[1] for part in parts] == [32, 32, 32, 14, 32, 8]
    assert torch.allclose(torch.cat(parts, 1).log_softmax(-1).double(), expected, atol=1e-4)


# Between them: halves and neighbours, parts of a head, YaRN, LongRoPE and Llama 3's scaling, two rotations in
# one model and none, windows of layers' own, soft caps, sinks, experts.
ROWS = ("Qwen3", "Phi-3", "GPT-NeoX", "GLM", "Gemma 2", "Gemma 3", "SmolLM3", "gpt-oss")


@pytest.mark.parametrize("row", ROWS)
def test_any_decoder_reads_as_transformers_with_our_geometry(row: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[row]
    path, layer = made(architecture, tmp_path).transformers, architecture.memory_layer
    ids = torch.randint(512, (1, 200))
    memory = MemoryModel(load(path), [layer])
    ours = torch.cat([logits for _, logits in memory.read(ids, STEPPED)], 1)
    expected = Oracle(architecture, path, STEPPED.tokens).logprobs(
        ids[0].tolist(), focused(STEPPED, 200, [layer]), windows_in_windows(OWN_WINDOW, 200)
    )
    assert torch.allclose(ours[0].log_softmax(-1).double(), expected, atol=1e-4)
    whole, half = ids[:, :128], SteppedWindows(64, 64)
    read = torch.cat([logits for _, logits in memory.read(whole, half)], 1)
    trained = memory.crossbatch(whole.view(1, 2, 64), documents=1)
    assert torch.allclose(trained.flatten(1, 2), read, atol=1e-4)


@pytest.mark.parametrize("row", ["Qwen2", "Qwen3"])
def test_without_positions_a_scaled_rotation_leaves_nothing(row: str, tmp_path: Path) -> None:
    """Not its factor either, which YaRN has."""
    path = made(ARCHITECTURES[row], tmp_path).transformers
    ids = torch.randint(512, (1, 2, C))
    ours = MemoryModel(load(path), [1, 3], mem_positionals=False).crossbatch(ids, 1).log_softmax(-1)
    seen = focused(WINDOWS, 2 * C, [1, 3], mem_positionals=False)
    expected = ReferenceLlama(path).logprobs(ids.flatten().tolist(), seen)
    assert torch.allclose(ours[0].flatten(0, 1).double(), expected, atol=1e-4)


@pytest.mark.parametrize("row", ["Qwen3", "GPT-NeoX", "GLM", "Gemma 2"])
@pytest.mark.parametrize("mem_positionals", [True, False])
def test_every_weight_of_any_decoder_learns(row: str, mem_positionals: bool, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[row]
    model = load(made(architecture, tmp_path).transformers)
    recipe = Recipe([architecture.memory_layer], C, 1, mem_positionals, rows=2, schedule=[2])
    trainer = Trainer(model, recipe)
    (sums,) = trainer.losses(Batch(*torch.randint(512, (2, 2, 2, C))), documents=2)
    sums.sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert all(g is not None and g.isfinite().all() and g.any() for g in gradients.values())


def test_other_documents_are_seen_and_learn() -> None:
    config = LongLlamaConfig(
        vocab_size=90, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    memory = MemoryModel(LlamaForCausalLM(config), [1])
    ids = (
        torch.randint(30, (3, 2, 8)) + torch.tensor([0, 30, 60])[:, None, None]
    )  # no token is in two documents
    embedding = memory.model.model.embed_tokens.weight
    logits = {}
    for d, learn in ((1, [True, False, False]), (2, [True, False, True]), (3, [True, True, True])):
        logits[d] = memory.crossbatch(ids, d)
        (grad,) = torch.autograd.grad(logits[d][0, 1].logsumexp(-1).sum(), embedding)
        assert [bool(part.any()) for part in grad.split(30)] == learn
    assert torch.equal(logits[1][:, 0], logits[3][:, 0]) and not torch.allclose(
        logits[1][:, 1], logits[2][:, 1]
    )
    with pytest.raises(ValueError, match="d = 4: give 1 to 3, the documents of a batch"):
        memory.crossbatch(ids, 4)


class Memorizing(ReferenceLlama):
    """No gradient flows into keys and values of the memory: each key is there twice, once for each branch."""

    def attend(self, seen: list[Branch], rotary: Rotary | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if len(seen) == 1:
            return super().attend(seen, rotary, q, k, v)
        local, memory = seen
        none = torch.zeros_like(local.visible)
        wide = [
            Branch(torch.cat([none, local.visible], 1), local.distance.repeat(1, 2)),
            Branch(torch.cat([memory.visible, none], 1), memory.distance.repeat(1, 2)),
        ]
        return super().attend(wide, rotary, q, *(torch.cat([x.detach(), x]) for x in (k, v)))


@pytest.mark.parametrize("mem_positionals", [True, False])
@pytest.mark.parametrize(
    ("objective", "oracle", "contexts"), [("crossbatch", ReferenceLlama, 2), ("memorizing", Memorizing, 4)]
)
def test_gradients_are_those_of_the_reference(
    objective: str, oracle: type[ReferenceLlama], contexts: int, mem_positionals: bool, tiny_llama: Path
) -> None:
    model, layers, tokens = load(tiny_llama), [0, 2], 16
    recipe = Recipe(layers, tokens, 1, mem_positionals, contexts, 2, [1], objective=objective)
    batch = Batch(*torch.randint(512, (2, 2, contexts, tokens)))
    losses = []
    for sums in Trainer(model, recipe).losses(batch, documents=1):
        sums.sum().backward()
        losses.append(sums.detach())
    reference = oracle(tiny_llama)
    for weight in reference.weights.values():
        weight.requires_grad_()
    seen = focused(SteppedWindows(tokens, tokens), contexts * tokens, layers, mem_positionals)
    expected = torch.zeros(contexts, dtype=torch.float64)
    for ids, targets in zip(batch.inputs, batch.targets, strict=True):
        logprobs = reference.logprobs(ids.flatten().tolist(), seen)
        chosen = logprobs.gather(1, targets.flatten()[:, None])
        expected = expected - chosen.unflatten(0, (contexts, tokens)).sum((1, 2))
    expected.sum().backward()
    assert torch.allclose(torch.cat(losses).double(), expected, rtol=1e-5)
    for name, parameter in model.named_parameters():
        want = reference.weights[name].grad
        assert parameter.grad is not None and want is not None
        assert (parameter.grad - want).abs().max() <= 1e-4 * want.abs().max(), name


def test_a_memory_of_documents_of_any_length_is_what_the_reference_says(tiny_llama: Path) -> None:
    """The second context of a document sees the first one, and what there is of another document's."""
    mem_layers, short, tokens = [0, 2], 9, 16
    long_ids, short_ids = torch.randint(512, (2 * tokens,)), torch.randint(512, (short,))

    def seen(layer: int, positions: Tensor) -> tuple[list[Branch], bool]:
        """Of the first context, the other document and the second context, one behind the other."""
        text = torch.tensor([0] * tokens + [1] * short + [2] * tokens)
        start = torch.tensor([0, tokens, tokens + short])[text]
        local = local_branch(positions, positions, start)
        if layer not in mem_layers:
            return [local], True
        memory = memory_branch(positions, positions, start)
        return [local, replace(memory, visible=memory.visible & (text == 2)[:, None])], True

    together = torch.cat([long_ids[:tokens], short_ids, long_ids[tokens:]])
    expected = ReferenceLlama(tiny_llama).logprobs(together.tolist(), seen)
    memory, ours = MemoryModel(load(tiny_llama), mem_layers), []
    for padding in (0, 7):
        padded = torch.nn.functional.pad(short_ids, (0, 2 * tokens - short), value=padding)
        ids = torch.stack([long_ids, padded]).unflatten(1, (2, tokens))
        ours.append(memory.crossbatch(ids, 2, torch.tensor([2 * tokens, short])).log_softmax(-1))
    logprobs = torch.cat([ours[0][0, 0], ours[0][1, 0, :short], ours[0][0, 1]])
    assert torch.allclose(logprobs.double(), expected, atol=1e-4)
    assert torch.equal(ours[0][0], ours[1][0])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_layers_that_are_computed_again_learn_the_same(objective: str, tiny_llama: Path) -> None:
    batch = Batch(*torch.randint(512, (2, 3, 3, C)), torch.tensor([3 * C, 2 * C + 1, 5]))
    weights, computed = [], []
    for recompute in (False, True):
        model, calls = load(tiny_llama), []
        recipe = Recipe([0, 2], C, 2, contexts=3, rows=3, schedule=[1], objective=objective)
        trainer = Trainer(model, recipe, recompute)
        model.model.layers[2].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        kept = [trainer.train(batch) for _ in range(2)]
        assert kept[1]["memory"] < kept[0]["memory"]
        weights.append([p.detach() for p in model.parameters()])
        computed.append(len(calls))
    assert computed[1] == 2 * computed[0]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*weights, strict=True))


def test_d_has_equal_shares_of_the_steps() -> None:
    assert [scheduled(step, 7, [1, 2, 8]) for step in range(7)] == [1, 1, 1, 2, 2, 8, 8]


def test_batches_are_consecutive_contexts_of_different_documents() -> None:
    documents = Documents(["a", "b", "c"], [torch.arange(n, n + 300) for n in (1000, 2000, 3000)], [7])
    batch = documents.batch(0, step=3, rows=3, contexts=2, context_tokens=10)
    inputs, targets = batch.inputs, batch.targets
    assert (inputs[:, 0, 0] == 7).all() and sorted((targets[:, 0, 0] // 1000).tolist()) == [1, 2, 3]
    first = targets[:, :1, :1]
    assert torch.equal(targets.flatten(1), (first + torch.arange(20)).flatten(1))
    assert torch.equal(inputs.flatten(1)[:, 1:], targets.flatten(1)[:, :-1])
    assert torch.equal(inputs, documents.batch(0, 3, 3, 2, 10).inputs) and batch.lengths is None
    assert not torch.equal(inputs, documents.batch(0, 4, 3, 2, 10).inputs)


def test_a_short_document_is_whole_in_its_row() -> None:
    documents = Documents(["a", "b"], [torch.arange(1000, 1007), torch.arange(2000, 2300)], [7])
    batch = documents.batch(0, step=1, rows=2, contexts=3, context_tokens=5)
    rows = (batch.inputs[:, 0, 1] >= 2000).tolist()
    inputs, targets = batch.inputs[rows.index(False)].flatten(), batch.targets[rows.index(False)].flatten()
    assert batch.lengths is not None and batch.lengths.tolist() == [15 if long else 7 for long in rows]
    assert inputs.tolist() == [7, *range(1000, 1006), *[0] * 8]
    assert targets.tolist() == [*range(1000, 1007), *[IGNORED] * 8]
    assert batch.counts.tolist() == [10, 7, 5]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts")
    for number in range(4):
        (path / f"{number}.txt").write_text(
            f"Chapter {number}. " + f"It was the {number}th day of the voyage, and no land. " * 9
        )
    return path


def words(texts: Path, out: Path, **options: object) -> list[str]:
    given = {
        "context-tokens": 16,
        "batch": 3,
        "schedule": "1,3",
        "steps": 5,
        "save-every": 2,
        "mem-layers": "4,2",
    } | options
    return [
        "train-focused",
        f"--texts={texts}",
        f"--out={out}",
        *(f"--{name}={value}" for name, value in given.items()),
    ]


def test_a_training_that_was_killed_goes_on_to_the_same_end(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(*words(texts, whole, validation=texts))[0] == 0
    train = Trainer.train

    def killed(self: Trainer, batch: Batch) -> dict[str, float]:
        if self.step == 3:
            raise SystemExit(9)
        return train(self, batch)

    monkeypatch.setattr(Trainer, "train", killed)
    assert run(*words(texts, parts, validation=texts))[0] == 9 and not (parts / "config.json").exists()
    monkeypatch.undo()
    code, output = run(*words(texts, parts, validation=texts, steps=6), "--resume")
    assert code == 2 and "was made with steps = 5, not 6: resume it with that" in output
    assert run(*words(texts, parts, validation=texts), "--resume")[0] == 0
    for name in ("model.safetensors", "losses.jsonl"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()

    rows = [json.loads(line) for line in (whole / "losses.jsonl").read_text().splitlines()]
    assert [row["d"] for row in rows] == [1, 1, 1, 3, 3] and [
        row["step"] for row in rows if "validation" in row
    ] == [2, 4, 5]
    assert (
        rows[-1]["memory"] < rows[0]["memory"]
        and rows[-1]["validation"]["first"] < rows[1]["validation"]["first"]
    )
    assert sorted(path.name for path in whole.iterdir()) == [
        "config.json", "losses.jsonl", "losses.png", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    config = json.loads((whole / "config.json").read_text())
    assert config["architectures"] == ["LongLlamaForCausalLM"] and config["model_type"] == "longllama"
    assert (
        config["mem_layers"] == [2, 4]
        and config["mem_positionals"] is True
        and config["mem_dtype"] == "bfloat16"
    )
    assert config["max_position_embeddings"] == 16 and config["last_context_length"] == 8
    assert (
        AutoTokenizer.from_pretrained(whole)("a")["input_ids"]
        == AutoTokenizer.from_pretrained(BOOKLM)("a")["input_ids"]
    )
    assert load(whole).config.mem_layers == [2, 4]


def test_the_second_stage_goes_on_from_the_first(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    """Documents are shorter than a row. The checkpoint says where its memory is."""
    first, whole, parts = tmp_path / "first", tmp_path / "whole", tmp_path / "parts"
    options = {"steps": 1, "mem-dtype": "float32", "last-context-length": 5, "batch": 1, "schedule": 1}
    assert run(*words(texts, first, **options), "--no-mem-positionals")[0] == 0
    second = {"model": first, "objective": "memorizing", "contexts": 11, "steps": 2, "batch": 1}

    def stage(out: Path) -> list[str]:
        dropped = ("--mem-layers", "--schedule", "--context-tokens")
        given = words(texts, out, **second, **{"save-every": 1})
        return [word for word in given if not word.startswith(dropped)]

    assert run(*stage(whole), "--recompute")[0] == 0
    train = Trainer.train

    def killed(self: Trainer, batch: Batch) -> dict[str, float]:
        if self.step == 1:
            raise SystemExit(9)
        return train(self, batch)

    monkeypatch.setattr(Trainer, "train", killed)
    assert run(*stage(parts))[0] == 9
    monkeypatch.undo()
    code, output = run(*stage(parts), "--objective=crossbatch", "--schedule=1", "--resume")
    assert code == 2 and "was made with objective = memorizing, not crossbatch" in output
    assert run(*stage(parts), "--resume")[0] == 0
    weights = [load_file(path / "model.safetensors") for path in (whole, parts)]
    assert all(torch.allclose(weights[0][name], w, atol=1e-6) for name, w in weights[1].items())
    before, after = (json.loads((path / "config.json").read_text()) for path in (first, whole))
    assert after == before and (after["mem_layers"], after["mem_positionals"]) == ([2, 4], False)
    losses = [json.loads(line) for line in (whole / "losses.jsonl").read_text().splitlines()]
    assert [row["d"] for row in losses] == [1, 1]


def test_a_checkpoint_is_on_disk_before_what_made_it_is_removed(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    synced, at_removal = set(), []
    fsync, unlink = os.fsync, Path.unlink

    def recorded(fd: int) -> None:
        synced.add(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        fsync(fd)

    def removed(path: Path, **kwargs: bool) -> None:
        if path.name == STATE_NAME:
            at_removal.append(set(synced))
        unlink(path, **kwargs)

    monkeypatch.setattr(os, "fsync", recorded)
    monkeypatch.setattr(Path, "unlink", removed)
    assert run(*words(texts, tmp_path / "out", steps=3))[0] == 0
    (before,) = at_removal
    assert before >= {"out", "model.safetensors", "config.json", "tokenizer.json"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mem-layers": "2,6"}, "mem_layers = [2, 6]: give different layers from 0 to 5"),
        ({"mem-layers": "2,x"}, "--mem-layers 2,x: give whole numbers such as 2,4"),
        ({"schedule": "1,4"}, "schedule of d = [1, 4]: a batch of 3 documents has no 4"),
        ({"schedule": "0,1"}, "schedule of d = [0, 1]: give numbers from 1 up"),
        ({"contexts": 1}, "contexts = 1: give at least 2"),
        (
            {"context-tokens": 500},
            "tokens, no more than a context of 500: nothing would be in a memory; join documents, or lower",
        ),
        ({"batch": 5}, "--texts has 4 documents, fewer than --batch 5; lower it"),
        ({"texts": "NOWHERE"}, "no .txt file in"),
        ({"out": "TEXTS"}, "is not empty: give a new directory, or --resume"),
        ({"resume": None}, "--resume: there is no"),
        ({"model": "OTHER"}, "model_type 'gpt2' has no RoPE (rope_parameters): a memory needs it"),
        ({"dtype": "int8"}, "--dtype int8: give one of float32, bfloat16"),
        ({"objective": "mt"}, "--objective mt: give one of crossbatch, memorizing"),
        ({"objective": "memorizing"}, "schedule of d = [1, 3]: with the objective memorizing a context sees"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    options: dict[str, object], message: str, texts: Path, tmp_path: Path
) -> None:
    other = families.save(tmp_path / "other", "GPT2", num_hidden_layers=6)
    places = {"NOWHERE": tmp_path / "none", "TEXTS": texts, "OTHER": other}
    given = {name: places.get(str(value), value) for name, value in options.items()}
    arguments = words(given.pop("texts", texts), given.pop("out", tmp_path / "out"), **given)
    code, output = run(*(word.removesuffix("=None") for word in arguments))
    assert code == 2 and message in output and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("row", "layers", "message"),
    [
        ("Gemma 2", [1, 2], "layer 2 has a window of its own, of 48 tokens: give mem_layers that see all"),
        ("Falcon", [1], "layer 1 does not call transformers' AttentionInterface: it cannot have a memory"),
        ("BLOOM", [1], "model_type 'bloom' has no RoPE"),
        ("Mistral", [1], "do not depend on positions by a rotation that longctx knows"),  # grows with a text
    ],
)
def test_layers_that_cannot_have_a_memory_are_refused(
    row: str, layers: list[int], message: str, tmp_path: Path
) -> None:
    model = load(made(ARCHITECTURES[row], tmp_path).transformers)
    with pytest.raises(ValueError, match=re.escape(message)):
        MemoryModel(model, layers)


def test_contexts_that_longrope_would_rotate_otherwise_are_refused(tmp_path: Path) -> None:
    model = load(made(ARCHITECTURES["Phi-3"], tmp_path).transformers)
    assert Trainer(model, Recipe([3], 64, steps=1)).memory.mem_layers == [3]
    with pytest.raises(
        ValueError, match="contexts of 65 tokens, but past 64 tokens the model's RoPE has other"
    ):
        Trainer(model, Recipe([3], 65, steps=1))


def test_the_command_trains_another_architecture(texts: Path, tmp_path: Path, one_thread: None) -> None:
    model, out = families.save(tmp_path / "model", "Qwen3", vocab_size=8192), tmp_path / "out"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(BOOKLM, name), model)
    assert run(*words(texts, out, model=model, steps=2, **{"mem-layers": 1}))[0] == 0
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"] and config["max_position_embeddings"] == 128
    assert (config["mem_layers"], config["n_local"], config["last_context_length"]) == ([1], 16, 8)
    assert not (out / STATE_NAME).exists() and load(out).config.mem_layers == [1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_architectures_are_written_as_they_are_with_a_memory(dtype: str, tmp_path: Path) -> None:
    path = made(ARCHITECTURES["Mixtral"], tmp_path).transformers
    model = load(path)
    recipe = Recipe([3, 1], C, 1)
    MemoryModel(model, recipe.mem_layers)
    save(model, None, recipe, tmp_path / "out", 20, "float16", DTYPES[dtype])
    before, after = (json.loads((p / "config.json").read_text()) for p in (path, tmp_path / "out"))
    memory = {"mem_layers": [1, 3], "mem_positionals": True, "mem_dtype": "float16"}
    memory |= {"last_context_length": 20, "n_local": C}
    assert after == before | memory | {"dtype": dtype}
    weights = [load_file(p / "model.safetensors") for p in (path, tmp_path / "out")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(w.to(DTYPES[dtype]), weights[1][name]) for name, w in weights[0].items())
