"""Load for engines: random texts, and requests that write a given number of tokens after them."""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.v1.engine.llm_engine import LLMEngine


def random_tokens(engine: "LLMEngine", length: int, seed: float | str) -> list[int]:
    vocab = engine.vllm_config.model_config.get_vocab_size()
    return random.Random(seed).choices(range(3, vocab), k=length)


def greedy(tokens: int, **more: Any) -> "SamplingParams":
    """Of a request that writes just so many tokens, as ids alone."""
    from vllm import SamplingParams

    return SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False, **more)


def add_requests(engine: "LLMEngine", prompts: Sequence[list[int]], written: int) -> None:
    """One for each prompt; each step's outputs have that step's tokens alone."""
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind

    params = greedy(written, output_kind=RequestOutputKind.DELTA)
    for number, prompt in enumerate(prompts):
        engine.add_request(f"{number}-{random.random()}", tokens_input(prompt), params)
