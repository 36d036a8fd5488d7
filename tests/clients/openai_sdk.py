"""The openai package: options of OpenAI's that vLLM ignores, streams, errors."""

import sys

import openai

client = openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none", max_retries=0)
TALK = [{"role": "developer", "content": "Write."}, {"role": "user", "content": "On books"}]
OURS = {
    "store": True,
    "metadata": {"a": "b"},
    "service_tier": "auto",
    "prompt_cache_key": "k",
    "safety_identifier": "s",
}
OURS = {**OURS, "user": "me", "model": "booklm", "temperature": 0}

answer = client.chat.completions.create(
    **OURS, messages=TALK, max_completion_tokens=4096, verbosity="low", modalities=["text"], prediction=None
)
assert answer.choices[0].finish_reason in ("length", "stop") and answer.usage.total_tokens <= 512, answer
chunks = client.chat.completions.create(
    **OURS,
    messages=TALK,
    max_tokens=9,
    stream=True,
    stream_options={"include_usage": True, "include_obfuscation": False},
)
assert list(chunks)[-1].usage.completion_tokens <= 9
answer = client.completions.create(model="booklm", prompt="On books", best_of=2, max_tokens=5, user="me")
assert answer.usage.completion_tokens <= 5
answer = client.responses.create(**OURS, input="On books", max_output_tokens=4096, text={"verbosity": "low"})
assert answer.status in ("completed", "incomplete") and answer.usage.total_tokens <= 512, answer
body = {"context_management": None, "prompt_cache_retention": "24h"}
events = list(
    client.responses.create(**OURS, input="On books", max_output_tokens=5, stream=True, extra_body=body)
)
assert events[-1].type == "response.completed" and events[-1].response.usage.output_tokens <= 5

wrong = {"vllm_xargs": {"longctx": '{"rnk": 5}'}}
for stream in (False, True):
    for create in (
        lambda **kw: client.chat.completions.create(model="booklm", messages=TALK, **kw),
        lambda **kw: client.completions.create(model="booklm", prompt="x", **kw),
        lambda **kw: client.responses.create(model="booklm", input="x", **kw),
    ):
        refusal = None
        try:
            create(stream=stream, extra_body=wrong)
        except openai.BadRequestError as e:
            refusal = e
        assert refusal is not None and refusal.param == "vllm_xargs.longctx", refusal
        assert "did you mean 'rank'" in refusal.message
