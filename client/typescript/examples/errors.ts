/** What goes wrong has a class and a reason: node dist/examples/errors.js. */

import { Client, InvalidArgumentError, LowbitError, ModelNotFoundError } from "@lowbit/client";

const client = new Client();
try {
  await client.generate("no-such-model", "hello").text();
} catch (error) {
  if (!(error instanceof ModelNotFoundError)) throw error;
  console.log(String(error));
}
try {
  await client.generate("no-such-model", "hello", { sampling: { temperature: -1, topP: 2 } }).text();
} catch (error) {
  if (!(error instanceof InvalidArgumentError)) throw error;
  for (const { field, description } of error.violations) console.log(`${field}: ${description}`);
}
try {
  await client.load("no-such-model").wait();
} catch (error) {
  if (!(error instanceof LowbitError)) throw error;
  console.log(`${error.code}: ${error.reason}`);
}
client.close();
