/** Calls over one transport: deadlines, retries, resumption and typed errors. */

import { type DescMethodServerStreaming, type DescMethodUnary, create } from "@bufbuild/protobuf";
import type { Transport } from "@connectrpc/connect";
import { createAsyncIterable } from "@connectrpc/connect/protocol";
import { openTransport } from "#transport";
import type { LowbitError } from "./errors.js";
import { cancelled, toLowbitError } from "./failures.js";
import { type Settled, USER_AGENT } from "./options.js";
import type { In, Out } from "./requests.js";

/** Options of one call. */
export interface CallOptions {
  /** Cancels the call, whatever it is waiting for. */
  readonly signal?: AbortSignal | undefined;
  /** Seconds after which it fails with DeadlineExceededError, over all tries; the server knows them. */
  readonly timeout?: number | undefined;
}

/** A method whose answer is one message or a stream of them. @internal */
export type Method = DescMethodUnary | DescMethodServerStreaming;

/** What is called and how. @internal */
export interface Call<M extends Method> extends CallOptions {
  readonly method: M;
  readonly request: In<M>;
  /** The option that bounds it where `timeout` does not. */
  readonly within?: "callTimeout" | "slowCallTimeout" | "streamTimeout";
  /** Whether a second call may have more effect than one. */
  readonly once?: boolean;
  /** Makes the stream resume: gives what differs in the request for what follows a message. */
  readonly resume?: (last: Out<M>) => In<M>;
}

/** All calls of one client. @internal */
export class Calls {
  readonly #running = new Set<AbortController>();
  readonly #closing = new AbortController();
  readonly #transport: Transport;
  readonly options: Settled;
  #budget: number;

  constructor(address: string | undefined, options: Settled) {
    this.options = options;
    this.#transport = options.transport ?? openTransport(address, options, this.#closing.signal);
    this.#budget = options.retryBudget;
  }

  /** Closes the connection and cancels what still runs. */
  close(): void {
    this.#closing.abort();
    for (const controller of this.#running) controller.abort();
  }

  /** Makes a call with one answer and returns it. */
  async one<M extends DescMethodUnary>(call: Call<M>): Promise<Out<M>> {
    for await (const message of this.messages(new AbortController(), call)) return message;
    throw new Error("a call with one answer ended without it");
  }

  /** Gives the messages of a call; whoever leaves early or aborts the controller cancels it. */
  async *messages<M extends Method>(controller: AbortController, call: Call<M>): AsyncGenerator<Out<M>> {
    const abort = () => controller.abort();
    if (this.#closing.signal.aborted || call.signal?.aborted) abort();
    call.signal?.addEventListener("abort", abort);
    this.#running.add(controller);
    try {
      yield* this.#tries(controller.signal, call);
    } finally {
      this.#running.delete(controller);
      call.signal?.removeEventListener("abort", abort);
      abort();
    }
  }

  async *#tries<M extends Method>(signal: AbortSignal, call: Call<M>): AsyncGenerator<Out<M>> {
    const { resumeTimeout, maxAttempts, firstBackoff, maxBackoff, retryBudget } = this.options;
    const deadline = now() + (call.timeout ?? (call.within && this.options[call.within]) ?? Infinity);
    let request = create(call.method.input, call.request) as In<M>;
    let seen = false; // whether a message of any try has come
    let failures = 0; // since the last message
    let resumeBy = Infinity; // when a broken stream is given up
    for (;;) {
      try {
        signal.throwIfAborted();
        for await (const message of await this.#send(signal, call.method, request, deadline)) {
          if (!seen) this.#budget = Math.min(retryBudget, this.#budget + 0.1);
          seen = true;
          failures = 0;
          if (call.resume) request = { ...request, ...call.resume(message) };
          yield message;
          signal.throwIfAborted();
        }
        return;
      } catch (thrown) {
        if (signal.aborted) throw cancelled();
        const error = toLowbitError(thrown, request, now() >= deadline);
        const { retryAfter } = error;
        const backoff = Math.min(maxBackoff, firstBackoff * 2 ** failures++);
        // Later than the server asked for, never earlier, and not all clients at once.
        const wait = retryAfter === undefined ? backoff * between(0.5, 1) : retryAfter * between(1, 1.1);
        if (now() + wait >= deadline) throw error;
        if (seen) {
          if (failures === 1) resumeBy = now() + resumeTimeout;
          const lost = isBroken(error) || (retryAfter !== undefined && failures > 1);
          if (!call.resume || !lost || now() + wait >= resumeBy) throw error;
        } else {
          const safe = error.code === "UNAVAILABLE" && (!call.once || isUnconnected(error));
          if (retryAfter === undefined && !safe) throw error;
          if (failures >= maxAttempts || this.#budget < 1) throw error;
          this.#budget -= 1;
        }
        await sleep(wait, signal);
      }
    }
  }

  /** Makes one try. */
  async #send<M extends Method>(signal: AbortSignal, method: M, request: In<M>, deadline: number) {
    const { token, traceparent } = this.options;
    const header = new Headers({ "user-agent": USER_AGENT });
    if (token !== undefined) header.set("authorization", `Bearer ${token}`);
    const parent = traceparent?.();
    if (parent) header.set("traceparent", parent);
    // 0 would be none at all.
    const timeoutMs = deadline === Infinity ? undefined : Math.max(1, Math.ceil((deadline - now()) * 1000));
    const answer =
      method.methodKind === "unary"
        ? [(await this.#transport.unary(method, signal, timeoutMs, header, request)).message]
        : (await this.#transport.stream(method, signal, timeoutMs, header, createAsyncIterable([request]))).message;
    return answer as AsyncIterable<Out<M>> | Out<M>[];
  }
}

/** Whether the connection broke under a stream or the server goes away, so that it may be taken up again. */
function isBroken(error: LowbitError): boolean {
  return error.code === "UNAVAILABLE" && (error.reason === "" || error.reason === "SHUTTING_DOWN");
}

/** Whether no connection could be made, so that nothing was sent. */
function isUnconnected(error: LowbitError): boolean {
  for (let cause: unknown = error.cause; cause instanceof Error; cause = cause.cause)
    if ("syscall" in cause && ["connect", "getaddrinfo"].includes(String(cause.syscall))) return true;
  return false;
}

const now = () => performance.now() / 1000;
const between = (low: number, high: number) => low + Math.random() * (high - low);

/** Waits so many seconds, or until the signal aborts. */
function sleep(seconds: number, signal: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    const wake = () => {
      clearTimeout(timer);
      signal.removeEventListener("abort", wake);
      resolve();
    };
    const timer = setTimeout(wake, seconds * 1000);
    signal.addEventListener("abort", wake);
  });
}
