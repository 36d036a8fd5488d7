// The Vercel AI SDK, over chat completions and over messages.
import assert from "node:assert";
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";

const wrong = { vllm_xargs: { longctx: '{"rnk": 5}' } };
// Both providers send what stands in the body that their `fetch` is given.
const withWrong = (url, init) => fetch(url, { ...init, body: JSON.stringify({ ...JSON.parse(init.body), ...wrong }) });

for (const [create, url] of [[(o) => createOpenAICompatible({ name: "longctx", ...o }), "/v1"], [createAnthropic, "/v1"]]) {
  const options = { baseURL: process.argv[2] + url, apiKey: "none" };
  const call = { model: create(options)("booklm"), prompt: "On books", maxOutputTokens: 4096, temperature: 0, maxRetries: 0 };
  const { text } = await generateText(call);
  assert(text.length > 0);
  let streamed = "";
  for await (const piece of streamText(call).textStream) streamed += piece;
  assert.equal(streamed, text);
  const refused = { ...call, model: create({ ...options, fetch: withWrong })("booklm") };
  await assert.rejects(generateText(refused), (e) => e.statusCode === 400 && /did you mean 'rank'/.test(e.message));
  let error;
  await streamText({ ...refused, onError: (e) => (error = e.error) }).consumeStream();
  assert(error.statusCode === 400 && /did you mean 'rank'/.test(error.message));
}
