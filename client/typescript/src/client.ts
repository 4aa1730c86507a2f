/** The client: one connection and the verbs of all services. */

import type { DescMessage, MessageInitShape, MessageShape } from "@bufbuild/protobuf";
import { openTransport } from "#transport";
import { type CallOptions, Calls, type How, type Method } from "./calls.js";
import { JobFailedError } from "./errors.js";
import { GenerationService } from "./gen/lowbit/v1/generation_pb.js";
import { type Job, JobService, JobState } from "./gen/lowbit/v1/job_pb.js";
import { type Model, ModelService } from "./gen/lowbit/v1/model_pb.js";
import { QuantizationService, type SchemeInfo } from "./gen/lowbit/v1/quantization_pb.js";
import { type Device, RuntimeService } from "./gen/lowbit/v1/runtime_pb.js";
import { type ClientOptions, settle } from "./options.js";
import {
  type In,
  type Out,
  type Prompt,
  type Rest,
  type SchemeName,
  byId,
  form,
  input,
  kindOf,
  named,
  withId,
} from "./requests.js";
import { GenerateStream, LoadStream, Stream } from "./stream.js";

const Text = GenerationService.method;
const Models = ModelService.method;
const Quantization = QuantizationService.method;
const Jobs = JobService.method;
const Runtime = RuntimeService.method;

/**
 * A connection to one Lowbit server. Every verb takes the message of its request in literal form; common ones
 * have a short form too. Calls that fail reject with LowbitError, or a class derived from it.
 */
export class Client {
  readonly #calls: Calls;

  /**
   * Makes a client; it connects with its first call.
   *
   * @param address HOST:PORT; without one that of LOWBIT_ADDRESS, or else 127.0.0.1:50151.
   * @throws RangeError for an option that makes no sense, with its name.
   */
  constructor(address?: string, options: ClientOptions = {}) {
    const settled = settle(options);
    const { transport } = settled;
    this.#calls = new Calls(transport ? { transport, close: () => {} } : openTransport(address, settled), settled);
  }

  /** Closes the connection and cancels what still runs. */
  close(): void {
    this.#calls.close();
  }

  /** Generates with a loaded model. */
  generate(model: string, prompt: Prompt, rest?: Rest<typeof Text.generate, "model" | "input">): GenerateStream;
  generate(request: In<typeof Text.generate>, options?: CallOptions): GenerateStream;
  generate(first: string | In<typeof Text.generate>, second?: Prompt | CallOptions, rest?: object): GenerateStream {
    const [request, options] = form(first, second, rest, (model) => ({
      model,
      input: input(second as Prompt),
    }));
    return new GenerateStream(this.#open(Text.generate, request, { ...this.#long(options), again: true }));
  }

  /** Returns the token ids of a prompt, as `generate` would make them. */
  tokenize(
    model: string,
    prompt: Prompt,
    rest?: Rest<typeof Text.tokenize, "model" | "input">,
  ): Promise<Out<typeof Text.tokenize>>;
  tokenize(request: In<typeof Text.tokenize>, options?: CallOptions): Promise<Out<typeof Text.tokenize>>;
  tokenize(
    first: string | In<typeof Text.tokenize>,
    second?: Prompt | CallOptions,
    rest?: object,
  ): Promise<Out<typeof Text.tokenize>> {
    const [request, options] = form(first, second, rest, (model) => ({
      model,
      input: input(second as Prompt),
    }));
    return this.#call(Text.tokenize, request, options);
  }

  /** Returns the text of token ids. */
  async detokenize(request: In<typeof Text.detokenize>, options?: CallOptions): Promise<string> {
    return (await this.#call(Text.detokenize, request, options)).text;
  }

  /** Returns the natural log-probabilities of continuations, given as token ids. */
  score(request: In<typeof Text.score>, options?: CallOptions): Promise<Out<typeof Text.score>> {
    return this.#call(Text.score, request, this.#slow(options));
  }

  /** Starts a job that brings a model into the store; the short form takes one from the server's disk. */
  importModel(model: string, path: string, rest?: Rest<typeof Models.importModel, "model" | "source">): Promise<Job>;
  importModel(request: In<typeof Models.importModel>, options?: CallOptions): Promise<Job>;
  async importModel(
    first: string | In<typeof Models.importModel>,
    second?: string | CallOptions,
    rest?: object,
  ): Promise<Job> {
    const main = (name: string) => ({
      model: name,
      source: { kind: { case: "path" as const, value: second as string } },
    });
    const [request, options] = form(first, second, rest, main);
    return some((await this.#call(Models.importModel, withId(request), options)).job);
  }

  /** Iterates over all models by name, fetching page after page. */
  async *models(
    request: In<typeof Models.listModels> = {},
    options?: CallOptions,
  ): AsyncGenerator<Model, void, undefined> {
    for (let pageToken = request.pageToken ?? ""; ; ) {
      const page = await this.#call(Models.listModels, { ...request, pageToken }, options);
      yield* page.models;
      if (!(pageToken = page.nextPageToken)) return;
    }
  }

  /** Returns a model by name or alias. */
  async getModel(name: string | In<typeof Models.getModel>, options?: CallOptions): Promise<Model> {
    return some((await this.#call(Models.getModel, named(name), options)).model);
  }

  /** Removes a model and its aliases from the store. */
  async deleteModel(name: string | In<typeof Models.deleteModel>, options?: CallOptions): Promise<void> {
    await this.#call(Models.deleteModel, named(name), options, false);
  }

  /** Hashes a model's files again; rejects with DataLossError when one differs. */
  verifyModel(
    name: string | In<typeof Models.verifyModel>,
    options?: CallOptions,
  ): Promise<Out<typeof Models.verifyModel>> {
    return this.#call(Models.verifyModel, named(name), this.#slow(options));
  }

  /** Returns what a model would take on each device once live, from headers only. */
  estimateLoad(
    name: string | In<typeof Models.estimateLoad>,
    options?: CallOptions,
  ): Promise<Out<typeof Models.estimateLoad>> {
    return this.#call(Models.estimateLoad, named(name), options);
  }

  /** Lets an alias point at a model, or removes it when the model is empty. */
  async setAlias(request: In<typeof Models.setAlias>, options?: CallOptions): Promise<void> {
    await this.#call(Models.setAlias, request, options);
  }

  /** Loads a model while its stream is read, or waited for; resumes after a broken connection. */
  load(name: string | In<typeof Models.load>, options?: CallOptions): LoadStream {
    return new LoadStream(
      this.#open(Models.load, named(name), { ...this.#long(options), again: true, resume: () => {} }),
    );
  }

  /** Takes a model off its devices once its streams have ended. */
  unload(name: string | In<typeof Models.unload>, options?: CallOptions): Promise<Out<typeof Models.unload>> {
    const request: In<typeof Models.unload> = named(name);
    const { seconds = 0n, nanos = 0 } = request.drainTimeout ?? { seconds: 30n };
    const timeout = this.#calls.options.callTimeout + Number(seconds) + nanos / 1e9;
    return this.#call(Models.unload, request, { timeout, ...options }, false);
  }

  /** Gives a model now and after each change of it, until left. */
  watchModel(
    name: string | In<typeof Models.watchModel>,
    options?: CallOptions,
  ): Stream<Out<typeof Models.watchModel>> {
    return new Stream(this.#open(Models.watchModel, named(name), { ...options, again: true }));
  }

  /** Starts a job that makes a smaller copy of a model. */
  quantize(
    source: string,
    target: string,
    scheme: SchemeName,
    rest?: Rest<typeof Quantization.quantize, "source" | "target" | "scheme">,
  ): Promise<Job>;
  quantize(request: In<typeof Quantization.quantize>, options?: CallOptions): Promise<Job>;
  async quantize(
    first: string | In<typeof Quantization.quantize>,
    second?: string | CallOptions,
    scheme?: SchemeName,
    rest?: object,
  ): Promise<Job> {
    const main = (source: string) => ({
      source,
      target: second as string,
      scheme: { kind: kindOf(scheme as SchemeName) },
    });
    const [request, options] = form(first, second, rest, main);
    return some((await this.#call(Quantization.quantize, withId(request), options)).job);
  }

  /** Returns all schemes and, per device, whether they can be used and if not why. */
  async listSchemes(options?: CallOptions): Promise<SchemeInfo[]> {
    return (await this.#call(Quantization.listSchemes, {}, options)).schemes;
  }

  /** Returns bytes and time of a quantization before any work, from headers only. */
  estimateQuantization(
    request: In<typeof Quantization.estimateQuantization>,
    options?: CallOptions,
  ): Promise<Out<typeof Quantization.estimateQuantization>> {
    return this.#call(Quantization.estimateQuantization, request, options);
  }

  /** Starts a job that measures a model against another on held-out text. */
  async evaluate(name: string | In<typeof Quantization.evaluate>, options?: CallOptions): Promise<Job> {
    return some((await this.#call(Quantization.evaluate, withId(named(name)), options)).job);
  }

  /** Returns a job. */
  async getJob(id: string | In<typeof Jobs.getJob>, options?: CallOptions): Promise<Job> {
    return some((await this.#call(Jobs.getJob, byId(id), options)).job);
  }

  /** Iterates over all jobs, newest first, fetching page after page. */
  async *jobs(request: In<typeof Jobs.listJobs> = {}, options?: CallOptions): AsyncGenerator<Job, void, undefined> {
    for (let pageToken = request.pageToken ?? ""; ; ) {
      const page = await this.#call(Jobs.listJobs, { ...request, pageToken }, options);
      yield* page.jobs;
      if (!(pageToken = page.nextPageToken)) return;
    }
  }

  /** Gives a job's events, past ones first, until it ends; resumes without gap or repeat after a broken connection. */
  watchJob(id: string | In<typeof Jobs.watchJob>, options?: CallOptions): Stream<Out<typeof Jobs.watchJob>> {
    const resume: How<typeof Jobs.watchJob.input, typeof Jobs.watchJob.output>["resume"] = (request, last) => {
      request.afterSequence = last.sequence;
    };
    return new Stream(this.#open(Jobs.watchJob, byId(id), { ...options, again: true, resume }));
  }

  /** Waits until a job ends and returns it; rejects with JobFailedError when it did not succeed. */
  async waitJob(id: string | In<typeof Jobs.watchJob>, options?: CallOptions): Promise<Job> {
    const request: In<typeof Jobs.watchJob> = byId(id);
    let last: Job | undefined;
    for await (const event of this.watchJob(request, options)) last = event.job;
    last ??= await this.getJob(request.id ?? "", options);
    if (last.state !== JobState.SUCCEEDED) throw new JobFailedError(last);
    return last;
  }

  /** Asks a job to stop; returns it. A job that has ended stays as it is. */
  async cancelJob(id: string | In<typeof Jobs.cancelJob>, options?: CallOptions): Promise<Job> {
    return some((await this.#call(Jobs.cancelJob, byId(id), options)).job);
  }

  /** Goes on with a job that was cancelled or interrupted; returns it. */
  async resumeJob(id: string | In<typeof Jobs.resumeJob>, options?: CallOptions): Promise<Job> {
    return some((await this.#call(Jobs.resumeJob, byId(id), options, false)).job);
  }

  /** Removes the record of an ended job; what it made stays. */
  async deleteJob(id: string | In<typeof Jobs.deleteJob>, options?: CallOptions): Promise<void> {
    await this.#call(Jobs.deleteJob, byId(id), options, false);
  }

  /** Returns the devices with their memory, workers and live models. */
  async devices(options?: CallOptions): Promise<Device[]> {
    return (await this.#call(Runtime.listDevices, {}, options)).devices;
  }

  /** Returns the server's versions, limits and import roots. */
  info(options?: CallOptions): Promise<Out<typeof Runtime.getServerInfo>> {
    return this.#call(Runtime.getServerInfo, {}, options);
  }

  /** Gives snapshots of memory, queues and throughput, until left. */
  watchRuntime(
    request: In<typeof Runtime.watchRuntime> = {},
    options?: CallOptions,
  ): Stream<Out<typeof Runtime.watchRuntime>> {
    return new Stream(this.#open(Runtime.watchRuntime, request, { ...options, again: true }));
  }

  #open<I extends DescMessage, O extends DescMessage>(
    method: Method<I, O>,
    request: MessageInitShape<I>,
    how: How<I, O>,
  ) {
    return (controller: AbortController) => this.#calls.messages(controller, method, request, how);
  }

  async #call<I extends DescMessage, O extends DescMessage>(
    method: Method<I, O>,
    request: MessageInitShape<I>,
    options: CallOptions = {},
    again = true,
  ): Promise<MessageShape<O>> {
    const how = { ...options, timeout: options.timeout ?? this.#calls.options.callTimeout, again };
    for await (const message of this.#calls.messages(new AbortController(), method, request, how)) return message;
    throw new Error("a call with one answer ended without it");
  }

  #slow(options: CallOptions = {}): CallOptions {
    return { ...options, timeout: options.timeout ?? this.#calls.options.slowCallTimeout };
  }

  #long(options: CallOptions = {}): CallOptions {
    return { ...options, timeout: options.timeout ?? this.#calls.options.streamTimeout };
  }
}

/** Returns what a response of this server always has. */
function some<T>(value: T | undefined): T {
  if (value === undefined) throw new Error("the response lacks its message");
  return value;
}
