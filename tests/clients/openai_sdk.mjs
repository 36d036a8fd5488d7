// The openai package for Node.
import assert from "node:assert";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "On books" }];
const ours = { model: "booklm", temperature: 0, store: true, metadata: { a: "b" }, service_tier: "auto", safety_identifier: "s" };

const answer = await client.chat.completions.create({ ...ours, messages, max_tokens: 4096, verbosity: "low", prompt_cache_key: "k" });
assert(answer.usage.total_tokens <= 512);
let last;
const stream_options = { include_usage: true, include_obfuscation: false };
for await (const chunk of await client.chat.completions.create({ ...ours, messages, max_tokens: 5, stream: true, stream_options }))
  last = chunk;
assert(last.usage.completion_tokens <= 5);
for await (const event of await client.responses.create({ ...ours, input: "On books", max_output_tokens: 5, stream: true }))
  last = event;
assert.equal(last.type, "response.completed");
for (const stream of [false, true]) {
  const wrong = { model: "booklm", stream, vllm_xargs: { longctx: '{"rnk": 5}' } };
  for (const refused of [client.chat.completions.create({ ...wrong, messages }), client.responses.create({ ...wrong, input: "x" })])
    await assert.rejects(refused, (e) => e.status === 400 && /did you mean 'rank'/.test(e.message) && e.param === "vllm_xargs.longctx");
}
