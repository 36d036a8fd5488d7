"""The anthropic package: options of Anthropic's that vLLM ignores, streams, counts, errors."""

import sys

import anthropic

client = anthropic.Anthropic(base_url=sys.argv[1], api_key="none", max_retries=0)
CACHED = {"type": "text", "text": "On books", "cache_control": {"type": "ephemeral"}}
REQUEST = {
    "model": "booklm",
    "messages": [{"role": "user", "content": [CACHED]}],
    "system": [{**CACHED, "text": "Write."}],
    "max_tokens": 4096,
    "metadata": {"user_id": "me"},
}
BODY = {"service_tier": "auto", "context_management": {"edits": []}, "cache_control": {"type": "ephemeral"}}

answer = client.messages.create(**REQUEST, extra_body=BODY)
assert answer.stop_reason in ("max_tokens", "end_turn") and answer.usage.output_tokens <= 512, answer
with client.messages.stream(**{**REQUEST, "max_tokens": 5}, extra_body=BODY) as stream:
    assert stream.get_final_message().usage.output_tokens <= 5
assert client.messages.count_tokens(model="booklm", messages=REQUEST["messages"]).input_tokens > 0
for stream in (False, True):
    body = None
    try:
        client.messages.create(**REQUEST, stream=stream, extra_body={"vllm_xargs": {"longctx": '{"rnk": 5}'}})
    except anthropic.BadRequestError as e:
        body = e.body
    assert body is not None and (body["type"], body["error"]["type"]) == ("error", "invalid_request_error"), (
        body
    )
    assert "did you mean 'rank'" in body["error"]["message"]
