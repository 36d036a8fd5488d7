import functools
import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # Kernels that cannot run are interpreted. Triton looks at the variable when it is first imported (for its
    # own functions) and at the knob when a kernel is decorated; the variable is not left for the processes
    # that tests start.
    os.environ["TRITON_INTERPRET"] = "1"
    import triton

    del os.environ["TRITON_INTERPRET"]
    triton.knobs.propagate_env = False
    triton.knobs.runtime.interpret = True
    triton.knobs.propagate_env = True

    from triton.runtime import interpreter

    # A third of the time, for a check that compiled kernels do not have either.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)

    # What is asked for every operation, and takes longer than many of them.
    scalar_dtype = functools.cache(interpreter._get_np_dtype)
    interpreter._get_np_dtype = lambda dtype: (
        np.dtype(np.uint64) if dtype.scalar.is_ptr() else scalar_dtype(dtype.scalar)
    )
    patch_language = interpreter._patch_lang

    @functools.cache
    def languages_of(function: Callable[..., Any]) -> list[Any]:
        known = (triton.language, triton.language.core)
        return [x for x in function.__globals__.values() if any(x is language for language in known)]

    def patch_language_once(function: Callable[..., Any]) -> Any:
        """A function that a kernel calls finds it patched.

        To look through all of it again takes longer than the function.
        """
        if any(triton.language.core.is_builtin(language.load) for language in languages_of(function)):
            return patch_language(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_language_once

SHARED = Path(os.environ.get("LONGCTX_SHARED", Path(__file__).parents[2] / "shared"))


def pytest_collection_finish() -> None:
    """What is imported by now stays: the garbage collector, which engines call several times a start, need
    not look at it.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or what is freed at the end is said to have leaked


@pytest.fixture(scope="session", autouse=True)
def _models_are_inspected_here() -> Iterator[None]:
    """Classes of models that vLLM has not seen before are inspected here, not in a new process, which takes
    ten seconds.
    """
    registry = sys.modules.get("vllm.model_executor.models.registry")
    if registry is None:  # no test that was chosen imports vLLM
        yield
        return
    from vllm.platforms import current_platform

    platform = current_platform.__class__

    def run(inspect: Callable[[], Any]) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(current_platform, "__class__", platform)  # which a test may have exchanged
            return inspect()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_run_in_subprocess", run)
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread():
    """For models so small that an operation costs less than sharing it out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def goldens() -> Path:
    path = SHARED / "goldens"
    if not path.is_dir():
        pytest.skip(f"the official code's outputs are not on this machine ({path})")
    return path


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, where `vllm-longctx get-model smollm2` has put it."""
    from vllm_longctx.cli.get_model import fetched

    path = fetched("smollm2")
    if path is None:
        pytest.skip("SmolLM2 is not on this machine; run: vllm-longctx get-model smollm2")
    return path


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama, GQA, trained length 128, whose attention is far from uniform."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("tiny_llama")
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        initializer_range=0.08,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            projection.weight.data *= 2.5
    model.save_pretrained(path)
    return path
