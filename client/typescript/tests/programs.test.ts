/** The quick start and the programs run as they are printed, against a real server. */

import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { readFile, writeFile } from "node:fs/promises";
import { after, before, suite, test } from "node:test";
import { promisify } from "node:util";
import { SDK, type Server, startServer } from "./server.js";

suite("programs", () => {
  let server: Server;
  before(async () => {
    server = await startServer({ smollm2: { step_ms: 1 }, slow: { step_ms: 5 } });
  });
  after(() => server.stop());

  async function printed(program: string, ...args: string[]): Promise<string> {
    const env = { ...process.env, LOWBIT_ADDRESS: server.address };
    const { stdout } = await promisify(execFile)("node", [`${SDK}dist/${program}`, ...args], { env, timeout: 60_000 });
    return stdout;
  }

  test("the quick start of the README", async () => {
    const code = /```ts\n(.*?)```/s.exec(await readFile(`${SDK}README.md`, "utf8"))?.[1] ?? "";
    assert.ok(code.trim().split("\n").filter(Boolean).length <= 6, "it has grown");
    await writeFile(`${SDK}dist/quickstart.js`, code);
    assert.equal(await printed("quickstart.js"), "The capital of F");
  });

  test("chat", async () => {
    const out = await printed("examples/chat.js", "smollm2", "hello");
    assert.ok(out.startsWith("<user>hello") && out.endsWith("\n200 tokens\n"), out);
  });

  test("cancel", async () => {
    assert.equal(await printed("examples/cancel.js", "slow"), "Once \nleft early\ncancelled\n");
  });

  test("errors", async () => {
    const out = await printed("examples/errors.js");
    assert.equal(out.match(/MODEL_NOT_FOUND/g)?.length, 2);
    assert.match(out, /^sampling\.temperature: /m);
    assert.match(out, /^sampling\.top_p: /m);
  });

  test("throughput", async () => {
    const out = JSON.parse(await printed("throughput/throughput.js", server.address, "smollm2", "4", "50"));
    assert.equal(out.tokens, 200);
    assert.ok(out.seconds > 0);
  });
});
