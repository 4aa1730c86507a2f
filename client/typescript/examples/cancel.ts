/** Leave a stream early, by leaving its loop and by a signal; its slot is free at once: node dist/examples/cancel.js MODEL. */

import { CancelledError, Client } from "@lowbit/client";

const [model = ""] = process.argv.slice(2);
const client = new Client();
let chunks = 0;
for await (const chunk of client.generate(model, "Once upon a time")) {
  process.stdout.write(chunk.text);
  if (++chunks === 5) break;
}
console.log("\nleft early");

const controller = new AbortController();
try {
  for await (const _ of client.generate(model, "Once upon a time", { signal: controller.signal })) controller.abort();
} catch (error) {
  if (!(error instanceof CancelledError)) throw error;
  console.log("cancelled");
}
client.close();
