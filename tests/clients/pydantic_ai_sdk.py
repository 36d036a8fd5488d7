"""pydantic-ai, over chat completions and over responses."""

import asyncio
import sys

from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIChatModelSettings, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

provider = OpenAIProvider(base_url=f"{sys.argv[1]}/v1", api_key="none")
SETTINGS = OpenAIChatModelSettings(
    max_tokens=400, temperature=0.0, openai_user="me", openai_service_tier="auto"
)


async def main() -> None:
    for model in (OpenAIChatModel, OpenAIResponsesModel):
        agent = Agent(model("booklm", provider=provider), instructions="Write.", model_settings=SETTINGS)
        assert (await agent.run("On books")).output
        async with agent.run_stream("On books") as result:
            assert await result.get_output()


asyncio.run(main())
