"""A pool too small for its requests: vLLM preempts, recomputes, and every log-probability is still the
reference's.
"""

from pathlib import Path

from tests.support.engines import generate, logprobs_of, metric, prompt, running_here, tokens_of
from tests.support.reference_model import ReferenceLlama
from vllm_longctx.geometry import Geometry


def test_preempted_requests_are_recomputed_exactly(tiny_llama: Path) -> None:
    attention = {"n_global": 10, "n_local": 64, "distance_ceiling": 64}
    with running_here(tiny_llama, attention, num_gpu_blocks_override=22) as llm:
        outputs = generate(llm, [prompt(n, seed=4) for n in (30, 34, 38, 42, 46, 50, 54, 58, 500)], 200)
        assert metric(llm, "vllm:num_preemptions") > 0
        assert metric(llm, "vllm:kv_cache_usage_perc") == 0
    reference = ReferenceLlama(tiny_llama)
    for output in outputs:
        expected = reference.token_logprobs(tokens_of(output), Geometry(10, 64, 64))[-200:]
        assert (logprobs_of(output) - expected).abs().max() <= 1e-4


def test_a_request_of_any_length_fits_the_smallest_pool(tiny_llama: Path) -> None:
    """20,000 tokens read and 300 written on 9 blocks of 32 tokens; a second request of that length waits its
    turn.
    """
    attention = {"n_global": 10, "n_local": 64, "distance_ceiling": 64}
    with running_here(tiny_llama, attention, num_gpu_blocks_override=9, max_model_len=1_000_000) as llm:
        outputs = generate(llm, [prompt(20_000, seed=s) for s in (1, 2)], 300)
    assert [len(o.outputs[0].token_ids) for o in outputs] == [300, 300]
