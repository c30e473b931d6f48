// Two turns of a dialog by each client, whole and streamed. Prints one JSON object: from the client's
// name to the two answers.
//
//   node clients.mjs BASE_URL TOKEN MODEL

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";
import OpenAI from "openai";

const [baseURL, apiKey, model] = process.argv.slice(2);
const questions = ["What is the capital of France?", "What is the capital of Japan?"];
const settings = { temperature: 0, seed: 1 };

const openai = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const vercel = createOpenAICompatible({ name: "llama_jax", baseURL, apiKey, includeUsage: true });

/** Ask both questions; `answer` returns the assistant's message, which the dialog goes on with. */
async function dialog(answer) {
  const messages = [];
  for (const content of questions) {
    messages.push({ role: "user", content });
    messages.push(await answer(messages));
  }
  return messages.filter((message) => message.role === "assistant").map(textOf);
}

/** Return a message's text, which the ai package holds in parts. */
function textOf({ content }) {
  if (typeof content === "string") return content;
  return content.map((part) => part.text).join("");
}

const clients = {
  openaiWhole: async (messages) => {
    const done = await openai.chat.completions.create({ model, messages, max_tokens: 16, ...settings });
    return done.choices[0].message;
  },
  openaiStream: async (messages) => {
    const stream = openai.chat.completions.stream({
      model,
      messages,
      max_tokens: 16,
      stream_options: { include_usage: true },
      ...settings,
    });
    const usage = await stream.totalUsage();
    if (usage.completion_tokens !== 9 && messages.length === 1) throw new Error(JSON.stringify(usage));
    return stream.finalMessage();
  },
  vercelWhole: async (messages) => {
    const request = { model: vercel(model), messages, maxOutputTokens: 16, maxRetries: 0 };
    const { response, usage } = await generateText({ ...request, ...settings });
    if (!(usage.totalTokens > 0)) throw new Error("no usage");
    return response.messages[0];
  },
  vercelStream: async (messages) => {
    const request = { model: vercel(model), messages, maxOutputTokens: 16, maxRetries: 0 };
    const result = streamText({ ...request, ...settings, onError: ({ error }) => { throw error; } });
    let text = "";
    for await (const part of result.textStream) text += part;
    if ((await result.finishReason) !== "stop") throw new Error(await result.finishReason);
    if (!((await result.usage).totalTokens > 0)) throw new Error("no usage");
    return { role: "assistant", content: text };
  },
};

const answers = {};
for (const [name, answer] of Object.entries(clients)) answers[name] = await dialog(answer);
console.log(JSON.stringify(answers));
