import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { after, before, suite, test } from "node:test";
import { Code, ConnectError, createRouterTransport } from "@connectrpc/connect";
import {
  Client,
  type ClientOptions,
  CancelledError,
  LowbitError,
  ModelNotFoundError,
  UnavailableError,
} from "../src/index.js";
import { GenerationService } from "../src/gen/lowbit/v1/generation_pb.js";
import { USER_AGENT } from "../src/options.js";
import { SDK, type Server, startServer, until } from "./server.js";

suite("a client of a real server", () => {
  let server: Server;
  let client: Client;

  before(async () => {
    server = await startServer({ echo: { step_ms: 0 }, slow: { step_ms: 20 } });
    client = new Client(server.address);
  });
  after(async () => {
    client.close();
    await server.stop();
  });

  const running = async () =>
    (await client.devices()).flatMap((device) => device.workers).reduce((sum, one) => sum + one.runningRequests, 0);
  const busy = () => until(async () => (await running()) === 1);
  const freed = () => until(async () => (await running()) === 0);

  test("streams whole characters and knows how it ended", async () => {
    const stream = client.generate("echo", "héllo €", { stopping: { maxTokens: 10 }, output: { tokenIds: true } });
    const ids: number[] = [];
    for await (const chunk of stream) ids.push(...chunk.tokenIds);
    assert.equal(stream.partialText, "héllo €".slice(0, stream.partialText.length));
    assert.equal(stream.started?.device, "cpu");
    assert.equal(stream.finished?.reason, 3);
    assert.equal(stream.completed?.usage?.outputTokens, 10);
    assert.equal(ids.length, 10);
    assert.deepEqual(await stream.next(), { done: true, value: undefined });
  });

  test("gives each output its text and its end", async () => {
    const stream = client.generate("echo", "abc", { sampling: { n: 2 }, stopping: { maxTokens: 3 } });
    assert.deepEqual([stream.partialText, stream.finished], ["", undefined]);
    assert.deepEqual(await stream.texts(), ["abc", "bca"]);
    assert.equal(await stream.text(), "abc");
    assert.equal(stream.finished?.outputIndex, 0);
    assert.equal(stream.allFinished.get(1)?.outputIndex, 1);
  });

  test("has chats, long forms and every unary verb of a model", async () => {
    const turns = [{ role: "user", content: "hi" }] as const;
    const { tokenIds, text } = await client.tokenize("echo", turns);
    assert.equal(text, "<user>hi\n<assistant>");
    assert.equal(await client.detokenize({ model: "echo", tokenIds }), text);
    const said = client.generate("echo", turns, { stopping: { maxTokens: 4 } });
    assert.equal(await said.text(), "<use");
    assert.throws(() => client.generate("echo", [{ role: "robot" as "user", content: "hi" }]), RangeError);
    await client.setAlias({ alias: "mirror", model: "echo" });
    const long = client.generate({ model: "mirror", input: { case: "text", value: "abc" } }, { timeout: 10 });
    assert.equal((await long.next()).done, false);
    await long.return();
    assert.equal((await client.getModel("mirror")).name, "echo");
    const names: string[] = [];
    for await (const model of client.models({ pageSize: 1 })) names.push(model.name);
    assert.deepEqual(names, ["echo", "slow"]);
    assert.ok((await client.listSchemes()).some((scheme) => scheme.name === "nf4"));
    assert.ok((await client.info()).version);
    await freed();
  });

  for (const [how, leave] of Object.entries({
    "leaving the loop": async () => {
      for await (const _ of client.generate("slow", "abcdef")) {
        await busy();
        break;
      }
    },
    "a signal": async () => {
      const controller = new AbortController();
      const stream = client.generate("slow", "abcdef", { signal: controller.signal });
      await stream.next();
      await busy();
      const pending = stream.next();
      controller.abort();
      await pending
        .then(() => stream.next())
        .then(
          () => assert.fail(),
          (error: unknown) => {
            assert.ok(error instanceof CancelledError);
            assert.equal(error.reason, "");
          },
        );
      assert.deepEqual(await stream.next(), { done: true, value: undefined });
    },
    "closing the client": async () => {
      const other = new Client(server.address);
      const stream = other.generate("slow", "abcdef");
      await stream.next();
      await busy();
      other.close();
      await assert.rejects(stream.text(), CancelledError);
      await assert.rejects(other.info(), CancelledError);
    },
    "dropping it": async () => {
      await (async () => void (await client.generate("slow", "abcdef").next()))(); // its frame would hold it
      await until(async () => {
        globalThis.gc?.();
        return (await running()) === 0;
      });
    },
  }))
    test(`${how} frees the slot`, async () => {
      await leave();
      await freed();
    });

  test("leaves no listener on a signal that lives on", async () => {
    const { signal } = new AbortController();
    let listeners = 0;
    const add = signal.addEventListener.bind(signal);
    const remove = signal.removeEventListener.bind(signal);
    signal.addEventListener = (...args: Parameters<typeof add>) => (listeners++, add(...args));
    signal.removeEventListener = (...args: Parameters<typeof remove>) => (listeners--, remove(...args));
    await client.info({ signal });
    await client.generate("echo", "a", { signal, stopping: { maxTokens: 2 } }).text();
    for await (const _ of client.watchRuntime({}, { signal })) break;
    await assert.rejects(client.getModel("no", { signal }), ModelNotFoundError);
    assert.equal(listeners, 0);
  });

  test("tells what failed in one line", async () => {
    const error = await client.getModel("no").catch((error: unknown) => error);
    assert.ok(error instanceof ModelNotFoundError);
    assert.match(String(error), /^MODEL_NOT_FOUND: .*no/);
    assert.equal(error.code, "NOT_FOUND");
    const bad = await client
      .generate("", "secret", { stopping: { maxTokens: 0 } })
      .text()
      .catch((error: unknown) => error);
    assert.ok(bad instanceof LowbitError);
    assert.deepEqual(bad.violations.map((one) => one.field).sort(), ["model", "stopping.max_tokens"]);
    assert.ok(!`${bad}${bad.stack}${JSON.stringify(bad)}`.includes("secret"));
  });

  test("makes, loads and removes a model", async () => {
    const job = await client.importModel("copy", (await client.getModel("echo")).source);
    assert.equal((await client.waitJob(job.id)).model, "copy");
    const [replica] = await client.load("copy").wait();
    assert.equal(replica?.device, "cpu");
    await client.unload("copy");
    assert.ok((await client.verifyModel("copy")).files > 0);
    await client.deleteModel("copy");
    const found: string[] = [];
    for await (const one of client.jobs()) found.push(one.id);
    assert.ok(found.includes(job.id));
    await client.deleteJob(job.id);
    await assert.rejects(client.quantize("echo", "small", "int9" as "int8"), RangeError);
  });
});

suite("options", () => {
  test("that make no sense are refused by name", () => {
    const bad: ClientOptions[] = [
      { callTimeout: 0 },
      { streamTimeout: -1 },
      { maxAttempts: 0 },
      { maxMessageBytes: 1.5 },
      { retryBudget: Number.NaN },
      { tls: { key: "" + "k" } },
      { token: "two words" },
      { token: "garçon" },
      { token: "two\nlines" },
      { token: "a=b" },
      { token: "" },
    ];
    for (const options of bad)
      assert.throws(() => new Client("127.0.0.1:1", options), {
        name: "RangeError",
        message: new RegExp(Object.keys(options)[0]!),
      });
  });

  test("send a token in plain text only to loopback", () => {
    for (const address of ["127.0.0.1:1", "localhost:1", "[::1]:1", "unix:/run/lowbit.sock"])
      new Client(address, { token: "t" }).close();
    for (const address of ["10.0.0.1:1", "localhost.example:1", "example:1"])
      assert.throws(() => new Client(address, { token: "t" }), /token/);
    new Client("example:1", { token: "t", tls: {} }).close();
  });

  test("name the version of the package", async () => {
    const { version } = JSON.parse(await readFile(`${SDK}package.json`, "utf8"));
    assert.equal(USER_AGENT, `lowbit-typescript/${version}`);
  });
});

suite("retries", () => {
  /** A client of a server that fails as it is told, and the headers it saw. */
  function failing(fail: (tries: number) => ConnectError | undefined, options: ClientOptions = {}) {
    const seen: Headers[] = [];
    const transport = createRouterTransport(({ service }) =>
      service(GenerationService, {
        detokenize(_, context) {
          seen.push(context.requestHeader);
          const error = fail(seen.length);
          if (error) throw error;
          return { text: "ok" };
        },
      }),
    );
    return { seen, client: new Client(undefined, { transport, firstBackoff: 0.001, ...options }) };
  }
  const unavailable = () => new ConnectError("away", Code.Unavailable);

  test("stop at the last attempt", async () => {
    const { seen, client } = failing(unavailable);
    await assert.rejects(client.detokenize({}), UnavailableError);
    assert.equal(seen.length, 4);
  });

  test("end with the budget, which successes fill up again", async () => {
    const { seen, client } = failing((tries) => (tries > 2 ? undefined : unavailable()), { retryBudget: 1 });
    await assert.rejects(client.detokenize({}), UnavailableError);
    assert.equal(seen.length, 2);
    for (let call = 0; call < 10; call++) assert.equal(await client.detokenize({}), "ok");
  });

  test("ask for a traceparent each time", async () => {
    let calls = 0;
    const traceparent = () => `00-0af7651916cd43dd8448eb211c80319c-000000000000000${++calls}-01`;
    const { seen, client } = failing((tries) => (tries > 1 ? undefined : unavailable()), { traceparent, token: "t" });
    await client.detokenize({});
    const ends = seen.map((header) => header.get("traceparent")?.slice(-5));
    assert.deepEqual(ends, ["01-01", "02-01"]);
    assert.equal(seen[0]?.get("authorization"), "Bearer t");
    assert.equal(seen[0]?.get("user-agent"), USER_AGENT);
  });

  test("are left at once by a signal", async () => {
    const { client } = failing(unavailable, { firstBackoff: 60, maxBackoff: 60, callTimeout: 600 });
    const controller = new AbortController();
    const call = client.detokenize({}, { signal: controller.signal });
    setImmediate(() => controller.abort());
    await assert.rejects(call, CancelledError);
  });
});
