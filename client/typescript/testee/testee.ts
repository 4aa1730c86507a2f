/** The testee of the TypeScript SDK; tests/conformance/README.md has its protocol. */

import { readFileSync } from "node:fs";
import { createInterface } from "node:readline";
import {
  type DescMethod,
  type JsonObject,
  type JsonValue,
  type Message,
  createRegistry,
  fromJson,
  isMessage,
  toJson,
} from "@bufbuild/protobuf";
import { type CallOptions, type Chunk, Client, type ClientOptions, GenerateStream, LowbitError } from "../src/index.js";
import { GenerationService, file_lowbit_v1_generation } from "../src/gen/lowbit/v1/generation_pb.js";
import { JobService, file_lowbit_v1_job } from "../src/gen/lowbit/v1/job_pb.js";
import { ModelService, file_lowbit_v1_model } from "../src/gen/lowbit/v1/model_pb.js";
import { QuantizationService, file_lowbit_v1_quantization } from "../src/gen/lowbit/v1/quantization_pb.js";
import { RuntimeService, file_lowbit_v1_runtime } from "../src/gen/lowbit/v1/runtime_pb.js";

const types = createRegistry(
  file_lowbit_v1_generation,
  file_lowbit_v1_job,
  file_lowbit_v1_model,
  file_lowbit_v1_quantization,
  file_lowbit_v1_runtime,
);

const METHODS: Record<string, DescMethod> = {
  ...GenerationService.method,
  ...JobService.method,
  ...ModelService.method,
  ...QuantizationService.method,
  ...RuntimeService.method,
  // Verbs whose names are not those of their methods.
  models: ModelService.method.listModels,
  jobs: JobService.method.listJobs,
  waitJob: JobService.method.watchJob,
  devices: RuntimeService.method.listDevices,
  info: RuntimeService.method.getServerInfo,
};

/** Verbs that take only the options of the call. */
const WITHOUT_REQUEST = ["devices", "info", "listSchemes"];

type Line = Record<string, JsonValue>;
type Verb = (this: Client, ...args: unknown[]) => unknown;

const running = new Map<number, AbortController>();

function write(id: number, event: string, keys: object = {}): void {
  process.stdout.write(`${JSON.stringify({ id, event, ...keys })}\n`);
}

function camel(name: string): string {
  return name.replace(/_(.)/g, (_, letter: string) => letter.toUpperCase());
}

function json(message: Message): JsonValue {
  const type = types.getMessage(message.$typeName);
  if (!type) throw new Error(`unknown type ${message.$typeName}`);
  return toJson(type, message, { registry: types });
}

/** Takes keys off a line; throws for those that are left. */
function taken<K extends string>(line: Line, ...keys: K[]): Partial<Record<K, JsonValue>> {
  const unknown = Object.keys(line).filter((key) => !keys.includes(key as K));
  if (unknown.length) throw new Error(`unknown keys: ${unknown.join(", ")}`);
  return line as Partial<Record<K, JsonValue>>;
}

function optionsOf(line: JsonObject): ClientOptions {
  const numbers = ["call_timeout_s", "slow_call_timeout_s", "stream_timeout_s", "resume_timeout_s"];
  numbers.push("max_message_bytes", "keepalive_interval_s", "keepalive_timeout_s", "max_attempts");
  numbers.push("first_backoff_s", "max_backoff_s", "retry_budget");
  const { tls, traceparent, token, ...rest } = taken(line, ...numbers, "token", "traceparent", "tls");
  const options: Record<string, unknown> = { token };
  for (const [key, value] of Object.entries(rest)) options[camel(key.replace(/_s$/, ""))] = value;
  if (traceparent !== undefined) options["traceparent"] = () => traceparent;
  if (tls !== undefined) {
    const names = taken(tls as Line, "ca_file", "certificate_file", "key_file", "server_name");
    const entries = Object.entries(names).map(([key, value]) =>
      key === "server_name" ? ["serverName", value] : [key.replace("_file", ""), readFileSync(String(value))],
    );
    options["tls"] = Object.fromEntries(entries);
  }
  return options;
}

async function run(id: number, line: Line): Promise<void> {
  const controller = new AbortController();
  running.set(id, controller);
  const keys = ["target", "verb", "request", "options", "timeout_s", "cancel_after", "drop_after"] as const;
  const call = taken(line, ...keys);
  const name = camel(String(call.verb));
  const method = METHODS[name];
  if (!method) throw new Error(`unknown verb ${name}`);
  const request = fromJson(method.input, call.request ?? {});
  const options: CallOptions = { signal: controller.signal, timeout: call.timeout_s as number | undefined };
  let client: Client;
  try {
    client = new Client(String(call.target), optionsOf((call.options ?? {}) as JsonObject));
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
    const empty = { code: "", reason: "", metadata: {}, violations: [], retry_after_s: null, request_id: "" };
    return write(id, "error", { ...empty, class: "ValueError", message: error.message });
  }
  const verb = client[name as keyof Client] as Verb;
  let stream: unknown;
  const told = new Set<string>();
  const tell = (...facts: ("started" | "finished" | "completed")[]) => {
    for (const fact of facts) {
      const message = stream instanceof GenerateStream ? stream[fact] : undefined;
      if (message && !told.has(fact)) write(id, fact, { message: json(message) });
      if (message) told.add(fact);
    }
  };
  try {
    stream = verb.apply(client, WITHOUT_REQUEST.includes(name) ? [options] : [request, options]);
    let count = 0;
    for await (const item of items(stream)) {
      tell("started");
      if (stream instanceof GenerateStream) {
        const { text, outputIndex, tokenIds, tokens } = item as Chunk;
        const logprobs = tokens.flatMap(({ logprob }) => logprob ?? []);
        write(id, "delta", { text, output_index: outputIndex, token_ids: tokenIds, logprobs });
      } else write(id, "message", { message: isMessage(item) ? json(item) : item });
      count++;
      if (count === call.cancel_after) controller.abort();
      if (count === call.drop_after) break;
    }
    if (count > 0 && count === call.drop_after) return write(id, "dropped"); // the client stays open
    tell("started", "finished", "completed");
    write(id, "end");
  } catch (error) {
    if (!(error instanceof LowbitError)) throw error;
    tell("started", "finished", "completed");
    const { code, reason, message, metadata, violations, requestId } = error;
    write(id, "error", {
      class: error.name,
      ...{ code, reason, message, metadata },
      violations: violations.map(({ field, description }) => ({ field, description })),
      retry_after_s: error.retryAfter ?? null,
      request_id: requestId,
      partial_text: stream instanceof GenerateStream ? stream.partialText : "",
    });
  }
  client.close();
}

/** Gives what a verb returns one by one, leaving a stream when it is left. */
function items(result: unknown): AsyncIterable<unknown> {
  if (typeof result === "object" && result !== null && Symbol.asyncIterator in result)
    return result as AsyncIterable<unknown>;
  return (async function* () {
    const value = await result;
    if (value !== undefined)
      yield* Array.isArray(value) ? value : [typeof value === "string" ? { text: value } : value];
  })();
}

function fail(error: unknown): never {
  console.error(error);
  process.exit(1);
}

for await (const text of createInterface(process.stdin)) {
  const { id, cancel, ...line } = JSON.parse(text) as { id: number; cancel?: boolean } & Line;
  if (cancel) running.get(id)?.abort();
  else run(id, line).catch(fail);
}
process.exit(0);
