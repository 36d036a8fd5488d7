"""Real vLLM engines on the CPU: real processes, one start shared by the tests of a module."""

import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import psutil
import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.outputs import RequestOutput

VOCAB = 512
# For the tests' models, which have none of their own.
CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"


@contextmanager
def running(
    model: str | Path,
    attention: dict[str, Any] | None,
    adaptation: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Iterator[LLM]:
    """An engine with these sections of the configuration, or stock vLLM without `attention`."""
    settings: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_num_seqs": 8,
        "max_model_len": 4096,
        "max_num_batched_tokens": 128,
        "num_gpu_blocks_override": 200,
        "kv_cache_memory_bytes": 1 << 28,
        "disable_log_stats": False,
        "skip_tokenizer_init": True,
        **kwargs,
    }
    if attention is not None:
        config = (
            {"attention": attention}
            if adaptation is None
            else {"attention": attention, "adaptation": adaptation}
        )
        settings["additional_config"] = {"longctx": config}
    llm = LLM(str(model), **settings)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


@contextmanager
def engines_in_this_process() -> Iterator[None]:
    """Inside, who starts an engine starts no processes for it."""
    cores = os.sched_getaffinity(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        try:
            yield
        finally:
            os.sched_setaffinity(0, cores)  # vLLM's worker binds the process that it is in


@contextmanager
def running_here(*args: Any, **kwargs: Any) -> Iterator[LLM]:
    """As `running`, but all in this process: for tests of numbers, not of processes.

    Starts in a third of the time.
    """
    gc.freeze()  # vLLM collects garbage several times, each time among all of torch and transformers
    with engines_in_this_process(), running(*args, **kwargs) as llm:
        yield llm


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(3, VOCAB, (length,), generator=generator).tolist()


def generate(
    llm: LLM,
    prompts: list[list[int]],
    max_tokens: int,
    options: Sequence[dict[str, Any]] | None = None,
    **kwargs: Any,
) -> list[RequestOutput]:
    """Greedy by default; prompts are token ids. options: Of ours, of each request.

    Log-probabilities of the tokens written come with the output.
    """
    kwargs = {"temperature": 0, "logprobs": 0, "ignore_eos": True, "detokenize": False, **kwargs}
    own = [{}] * len(prompts) if options is None else [{"extra_args": {"longctx": one}} for one in options]
    params = [SamplingParams(max_tokens=max_tokens, **kwargs, **of_one) for of_one in own]
    return llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)


def poison(llm: LLM, **params: Any) -> None:
    """NaN wherever a request that overflows can leave it: in all blocks of an idle engine, and in what is
    made of them.

    params: Of that request.
    """
    overflowing = 2

    def embed(model: Any, value: torch.Tensor | None = None) -> torch.Tensor:
        row = model.model.embed_tokens.weight.data[overflowing]
        before = row.clone()
        row.copy_(torch.full_like(row, torch.nan) if value is None else value)
        return before

    def fill(worker: Any) -> None:
        for layer in worker.vllm_config.compilation_config.static_forward_context.values():
            layer.kv_cache.fill_(torch.nan)

    (before,) = llm.apply_model(embed)
    generate(llm, [[overflowing] * n for n in (3, 40, 75, 130, 170, 300)], 40, logprobs=None, **params)
    llm.apply_model(lambda model: embed(model, before))
    assert llm.reset_prefix_cache()
    llm.collective_rpc(fill)


def tokens_of(output: RequestOutput) -> list[int]:
    return list(output.prompt_token_ids or []) + list(output.outputs[0].token_ids)


def logprobs_of(output: RequestOutput) -> torch.Tensor:
    """float64: of every token after the first where the prompt was scored, else of the tokens written."""
    written = zip(output.outputs[0].logprobs or [], output.outputs[0].token_ids, strict=True)
    values = [position[token].logprob for position, token in written]
    if output.prompt_logprobs is not None:
        scored = zip(output.prompt_logprobs[1:], (output.prompt_token_ids or [])[1:], strict=True)
        values = [position[token].logprob for position, token in scored if position is not None] + values
    return torch.tensor(values, dtype=torch.float64)


def metric(llm: LLM, name: str) -> float:
    return sum(m.value for m in llm.get_metrics() if m.name == name and hasattr(m, "value"))


def sidecars() -> list[psutil.Process]:
    """The trainers below this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # ended since, or a zombie
            if "vllm_longctx.trainer.sidecar" in process.cmdline():
                found.append(process)
    return found


def wait_until(holds: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds:g} s")
        time.sleep(0.1)
