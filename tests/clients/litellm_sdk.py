"""litellm, which speaks to OpenAI's and Anthropic's routes."""

import sys

import litellm

litellm.telemetry = False
CALL = {
    "messages": [{"role": "user", "content": "On books"}],
    "temperature": 0,
    "user": "me",
    "num_retries": 0,
}
OPENAI = {**CALL, "model": "hosted_vllm/booklm", "api_base": f"{sys.argv[1]}/v1", "api_key": "none"}
ANTHROPIC = {**CALL, "model": "anthropic/booklm", "api_base": sys.argv[1], "api_key": "none"}

for call in (
    {**OPENAI, "extra_body": {"store": True, "metadata": {"a": "b"}, "safety_identifier": "s"}},
    ANTHROPIC,
):
    answer = litellm.completion(**call, max_tokens=4096)
    assert answer.choices[0].finish_reason in ("length", "stop") and answer.usage.completion_tokens <= 512, (
        answer
    )
    chunks = list(
        litellm.completion(**call, max_tokens=5, stream=True, stream_options={"include_usage": True})
    )
    assert any(chunk.choices and chunk.choices[0].finish_reason for chunk in chunks)
refusal = ""
try:
    litellm.completion(**OPENAI, extra_body={"vllm_xargs": {"longctx": '{"rnk": 5}'}})
except litellm.BadRequestError as e:
    refusal = str(e)
assert "did you mean 'rank'" in refusal
