/**
 * Reads streams at the same time and prints how many tokens came in how many seconds, as a line of JSON:
 * node dist/throughput/throughput.js ADDRESS MODEL STREAMS TOKENS.
 */

import { Client } from "@lowbit/client";

const [address, model = "", streams, tokens] = process.argv.slice(2);
const client = new Client(address);

async function read(maxTokens: number): Promise<number> {
  const stream = client.generate(model, "measure", { stopping: { maxTokens, ignoreEos: true } });
  for await (const _ of stream);
  return stream.completed?.usage?.outputTokens ?? 0;
}

await read(1); // connects
const began = performance.now();
const counts = await Promise.all(Array.from({ length: Number(streams) }, () => read(Number(tokens))));
const seconds = (performance.now() - began) / 1000;
console.log(JSON.stringify({ tokens: counts.reduce((sum, count) => sum + count, 0), seconds }));
client.close();
