"""llama-index with a server that is like OpenAI's."""

import sys

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

llm = OpenAILike(
    model="booklm",
    api_base=f"{sys.argv[1]}/v1",
    api_key="none",
    is_chat_model=True,
    max_tokens=4096,
    temperature=0.0,
    max_retries=0,
    additional_kwargs={"store": True, "user": "me", "safety_identifier": "s"},
)
messages = [ChatMessage(role="system", content="Write."), ChatMessage(role="user", content="On books")]
assert llm.chat(messages).raw.usage.total_tokens <= 512
assert list(llm.stream_chat(messages))
assert llm.complete("On books").text is not None
