"""Requests that learn, in a real engine, and what the replay says of them."""

from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.outputs import RequestOutput

from tests.support.engines import logprobs_of, prompt
from tests.support.temp_lora_replay import Options, Replay, replay

RECIPE = {"rank": 8, "dropout": 0.0, "learning_rate": 2e-3, "block_tokens": 32, "train_context_tokens": 64}
STEPPED = {**RECIPE, "window_tokens": 128, "context_tokens": 64}


def asked(options: dict[str, Any] | None) -> dict[str, Any]:
    return {} if options is None else {"extra_args": {"longctx": {"temp_lora": True, **options}}}


def written_together(
    llm: LLM, cases: list[tuple[int, int, dict[str, Any] | None]], **sampling: Any
) -> list[RequestOutput]:
    """All at once, greedily by default; prompts are scored where the request adapts."""
    common = {"temperature": 0, "logprobs": 0, "ignore_eos": True, "detokenize": False, **sampling}
    params = [
        SamplingParams(
            max_tokens=tokens, prompt_logprobs=None if options is None else 0, **common, **asked(options)
        )
        for _, tokens, options in cases
    ]
    prompts = [{"prompt_token_ids": prompt(length, seed)} for seed, (length, _, _) in enumerate(cases)]
    return llm.generate(prompts, params, use_tqdm=False)


def replayed(model: Path, seed: int, case: tuple[int, int, dict[str, Any]], base: dict[str, Any]) -> Replay:
    length, tokens, options = case
    given = {key: value for key, value in {**base, **options}.items() if key != "dropout"}
    return replay(model, prompt(length, seed), tokens, Options(**given))


def assert_equal(output: RequestOutput, expected: Replay) -> None:
    """Every log-probability, and every token up to the first that the replay itself nearly decides
    otherwise.
    """
    assert min(expected.margins) > 1e-4
    assert list(output.outputs[0].token_ids) == expected.tokens
    assert_close(output, expected)


def assert_follows(output: RequestOutput, model: Path, options: dict[str, Any]) -> None:
    """Every log-probability, of the tokens that the engine wrote: they were sampled, or two of them were
    equally likely.
    """
    written = list(output.outputs[0].token_ids)
    prompt_ids = output.prompt_token_ids or []
    given = Options(**{key: value for key, value in options.items() if key != "dropout"})
    assert_close(output, replay(model, prompt_ids, len(written), given, written))


def assert_close(output: RequestOutput, expected: Replay) -> None:
    want = torch.tensor(expected.prompt_logprobs + expected.logprobs, dtype=torch.float64)
    assert output.outputs[0].finish_reason == "length"
    ours = logprobs_of(output)
    torch.testing.assert_close(ours, want[-len(ours) :], rtol=0, atol=1e-4)
