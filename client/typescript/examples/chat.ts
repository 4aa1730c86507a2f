/** Stream a chat answer: node dist/examples/chat.js MODEL "question". */

import { Client } from "@lowbit/client";

const [model = "", question = ""] = process.argv.slice(2);
const client = new Client();
const stream = client.generate(model, [{ role: "user", content: question }], {
  stopping: { maxTokens: 200 },
  sampling: { temperature: 0.7, seed: 1n },
});
for await (const chunk of stream) process.stdout.write(chunk.text);
console.log(`\n${stream.completed?.usage?.outputTokens} tokens`);
client.close();
