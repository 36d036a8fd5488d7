"""CrossBatch: the training forward against the float64 reference, exact resumption, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from reference_model import ReferenceLlama, focused
from test_cli import run
from transformers import AutoTokenizer

from vllm_longctx import BOOKLM
from vllm_longctx.geometry import SteppedWindows
from vllm_longctx.models.longllama import LongLlamaConfig
from vllm_longctx.training.crossbatch import MemoryModel, documents_at
from vllm_longctx.training.data import Documents
from vllm_longctx.training.trainer import load_llama

C = 32
WINDOWS = SteppedWindows(C, C)


@pytest.mark.parametrize("mem_positionals", [True, False])
def test_a_document_of_two_contexts_is_what_the_reference_says(tiny_llama: Path, mem_positionals: bool) -> None:
    ids = torch.randint(512, (3, 2, C))
    memory = MemoryModel(load_llama(tiny_llama), [0, 2], mem_positionals)
    seen = focused(WINDOWS, 2 * C, [0, 2], mem_positionals)
    expected = torch.stack([ReferenceLlama(tiny_llama).logprobs(row.flatten().tolist(), seen) for row in ids])
    ours = memory.crossbatch(ids, documents=1).log_softmax(-1).flatten(1, 2)
    assert torch.allclose(ours.double(), expected, atol=1e-4)


def test_a_text_is_read_as_the_reference_says(tiny_llama: Path) -> None:
    ids, windows = torch.randint(512, (2, 150)), SteppedWindows(C, 20)  # the last 20 of the prompt, then 10 more, then a new one
    memory = MemoryModel(load_llama(tiny_llama), [1, 2])
    parts = [memory.model.lm_head(hidden) for _, hidden in memory.read(ids, windows, prompt_length=130)]
    seen = focused(windows, 130, [1, 2])
    expected = torch.stack([ReferenceLlama(tiny_llama).logprobs(row.tolist(), seen) for row in ids])
    assert [part.shape[1] for part in parts] == [32, 32, 32, 14, 32, 8]
    assert torch.allclose(torch.cat(parts, 1).log_softmax(-1).double(), expected, atol=1e-4)
