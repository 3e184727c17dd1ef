// Node's clients against a head: `node clients.mjs BASE KEY CHAT_MODEL EMBEDDING_MODEL`. Prints how many checks each passed.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { embedMany, generateText, streamText } from "ai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { ChatOpenAI } from "@langchain/openai";

const [baseURL, apiKey, chat, embed] = process.argv.slice(2);
const messages = [{ role: "user", content: "Who wrote Hamlet?" }];
const passed = {};
const ok = (name) => (passed[name] = (passed[name] ?? 0) + 1);

const openai = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const whole = await openai.chat.completions.create({ model: chat, messages, max_tokens: 24, temperature: 0 });
assert.match(whole.choices[0].message.content, /Shakespeare/);
ok("openai");
let text = "";
for await (const chunk of await openai.chat.completions.create({ model: chat, messages, max_tokens: 24, temperature: 0, stream: true })) {
  text += chunk.choices[0]?.delta?.content ?? "";
}
assert.equal(text, whole.choices[0].message.content);
ok("openai");
const vectors = await openai.embeddings.create({ model: embed, input: ["one", "two"] });
assert.deepEqual(vectors.data.map((each) => each.embedding.length), [384, 384]);
ok("openai");
await assert.rejects(openai.chat.completions.create({ model: "gpt-9", messages }), OpenAI.NotFoundError);
ok("openai");

const mesh = createOpenAICompatible({ name: "mesh", baseURL, apiKey, includeUsage: true });
const generated = await generateText({ model: mesh(chat), messages, maxOutputTokens: 24, temperature: 0, maxRetries: 0 });
assert.match(generated.text, /Shakespeare/);
assert.ok(generated.usage.outputTokens > 0);
ok("ai");
const streamed = streamText({ model: mesh(chat), messages, maxOutputTokens: 24, temperature: 0, maxRetries: 0 });
let pieces = "";
for await (const piece of streamed.textStream) pieces += piece;
assert.equal(pieces, generated.text);
assert.ok((await streamed.usage).outputTokens > 0);
ok("ai");
const many = await embedMany({ model: mesh.textEmbeddingModel(embed), values: ["one", "two"], maxRetries: 0 });
assert.deepEqual(many.embeddings.map((each) => each.length), [384, 384]);
ok("ai");

const langchain = new ChatOpenAI({ model: chat, apiKey, temperature: 0, maxTokens: 24, maxRetries: 0, configuration: { baseURL } });
const answer = await langchain.invoke([["human", "Who wrote Hamlet?"]]);
assert.match(answer.content, /Shakespeare/);
ok("langchain");
let all = "";
for await (const chunk of await langchain.stream([["human", "Who wrote Hamlet?"]])) all += chunk.content;
assert.equal(all, answer.content);
ok("langchain");

console.log(JSON.stringify(passed));
