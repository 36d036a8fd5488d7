"""openai-agents, over chat completions and over responses."""

import asyncio
import sys

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    set_tracing_disabled,
)
from openai import AsyncOpenAI

set_tracing_disabled(True)
client = AsyncOpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none", max_retries=0)
SETTINGS = ModelSettings(
    temperature=0, max_tokens=4096, store=True, metadata={"a": "b"}, verbosity="low", include_usage=True
)


async def main() -> None:
    for model in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
        agent = Agent("writer", instructions="Write.", model=model("booklm", client), model_settings=SETTINGS)
        result = await Runner.run(agent, "On books")
        assert isinstance(result.final_output, str)
        streamed = Runner.run_streamed(agent, "On books")
        assert [event async for event in streamed.stream_events()]


asyncio.run(main())
