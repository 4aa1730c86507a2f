/** Make a smaller copy, show what it costs and load it: node dist/examples/quantize-then-load.js SOURCE TARGET SCHEME. */

import { Client, type SchemeName } from "@lowbit/client";
import { JobPhase } from "@lowbit/client/gen/lowbit/v1/job_pb";

const [source = "", target = "", scheme = ""] = process.argv.slice(2);
const client = new Client();
const job = await client.quantize(source, target, scheme as SchemeName);
for await (const event of client.watchJob(job.id)) {
  const { phase = JobPhase.UNSPECIFIED, done, total } = event.job?.progress ?? {};
  if (total) console.log(`${JobPhase[phase]}: ${done} of ${total}`);
}
await client.waitJob(job.id);
const [before, after] = [await client.getModel(source), await client.getModel(target)];
console.log(`${before.diskBytes} -> ${after.diskBytes} bytes`);
console.log(`perplexity ${after.quality?.basePerplexity.toFixed(2)} -> ${after.quality?.perplexity.toFixed(2)}`);
for (const replica of await client.load(target).wait())
  console.log(`live on ${replica.worker}: ${replica.liveBytes} bytes`);
client.close();
