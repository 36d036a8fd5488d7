"""langchain-openai, over chat completions and over responses."""

import sys

from langchain_openai import ChatOpenAI

COMMON = {
    "model": "booklm",
    "base_url": f"{sys.argv[1]}/v1",
    "api_key": "none",
    "max_retries": 0,
    "temperature": 0,
}
COMMON = {
    **COMMON,
    "max_tokens": 4096,
    "stream_usage": True,
    "metadata": {"a": "b"},
    "service_tier": "auto",
    "store": True,
}

for responses in (False, True):
    model = ChatOpenAI(**COMMON, use_responses_api=responses, verbosity="low")
    answer = model.invoke([("system", "Write."), ("user", "On books")])
    assert answer.usage_metadata["total_tokens"] <= 512
    assert list(model.stream("On books"))
