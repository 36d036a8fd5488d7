"""instructor: an object by a JSON schema."""

import sys
from typing import Literal

import instructor
import openai
from pydantic import BaseModel


class Opinion(BaseModel):
    verdict: Literal["good", "bad"]


client = instructor.from_openai(
    openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none", max_retries=0),
    mode=instructor.Mode.JSON_SCHEMA,
)
opinion = client.chat.completions.create(
    model="booklm",
    messages=[{"role": "user", "content": "On books"}],
    response_model=Opinion,
    max_tokens=300,
    max_retries=0,
    temperature=0,
    store=True,
    metadata={"a": "b"},
)
assert opinion.verdict in ("good", "bad")
