/** Calls over one transport: deadlines, retries, resumption and typed errors. */

import type {
  DescMessage,
  DescMethodServerStreaming,
  DescMethodUnary,
  MessageInitShape,
  MessageShape,
} from "@bufbuild/protobuf";
import { create } from "@bufbuild/protobuf";
import { createAsyncIterable } from "@connectrpc/connect/protocol";
import { type LowbitError, cancelled, toLowbitError } from "./errors.js";
import { type Settled, USER_AGENT } from "./options.js";
import type { Opened } from "./transport.js";

/** Options of one call. */
export interface CallOptions {
  /** Cancels the call, whatever it is waiting for. */
  readonly signal?: AbortSignal | undefined;
  /** Seconds after which it fails with DeadlineExceededError, over all tries; the server knows them. */
  readonly timeout?: number | undefined;
}

/** A method whose answer is one message or a stream of them. @internal */
export type Method<I extends DescMessage, O extends DescMessage> =
  | DescMethodUnary<I, O>
  | DescMethodServerStreaming<I, O>;

/** How a call is made. @internal */
export interface How<I extends DescMessage, O extends DescMessage> extends CallOptions {
  /** Whether a second call has the effect of one. */
  readonly again: boolean;
  /** Makes the stream resume: turns the request into that of what follows a message. */
  readonly resume?: (request: MessageShape<I>, last: MessageShape<O>) => void;
}

/** All calls of one client. @internal */
export class Calls {
  readonly #running = new Set<AbortController>();
  #closed = false;
  #budget: number;

  constructor(
    private readonly opened: Opened,
    readonly options: Settled,
  ) {
    this.#budget = options.retryBudget;
  }

  /** Closes the connection and cancels what still runs. */
  close(): void {
    this.#closed = true;
    for (const controller of this.#running) controller.abort();
    this.opened.close();
  }

  /** Gives the messages of a call; whoever leaves early or aborts the controller cancels it. */
  async *messages<I extends DescMessage, O extends DescMessage>(
    controller: AbortController,
    method: Method<I, O>,
    init: MessageInitShape<I>,
    how: How<I, O>,
  ): AsyncGenerator<MessageShape<O>> {
    const abort = () => controller.abort();
    if (this.#closed || how.signal?.aborted) abort();
    how.signal?.addEventListener("abort", abort);
    this.#running.add(controller);
    try {
      yield* this.#tries(controller.signal, method, create(method.input, init), how);
    } finally {
      this.#running.delete(controller);
      how.signal?.removeEventListener("abort", abort);
      abort();
    }
  }

  async *#tries<I extends DescMessage, O extends DescMessage>(
    signal: AbortSignal,
    method: Method<I, O>,
    request: MessageShape<I>,
    how: How<I, O>,
  ): AsyncGenerator<MessageShape<O>> {
    const { resumeTimeout, maxAttempts, firstBackoff, maxBackoff, retryBudget } = this.options;
    const deadline = now() + (how.timeout ?? Infinity);
    let seen = false; // whether a message of any try has come
    let resumeBy: number | undefined; // when a broken stream is given up
    for (let tries = 1; ; tries++) {
      try {
        for await (const message of await this.#send(signal, method, request, deadline)) {
          if (signal.aborted) throw cancelled();
          if (!seen) this.#budget = Math.min(retryBudget, this.#budget + 0.1);
          seen = true;
          resumeBy = undefined;
          tries = 0;
          how.resume?.(request, message);
          yield message;
          if (signal.aborted) throw cancelled();
        }
        return;
      } catch (thrown) {
        if (signal.aborted) throw cancelled();
        const id = (request as { requestId?: string }).requestId ?? "";
        const error = toLowbitError(thrown, id, now() >= deadline);
        const bound = Math.min(maxBackoff, firstBackoff * 2 ** (Math.max(tries, 1) - 1));
        // Later than the server asked for, never earlier, and not all clients at once.
        const wait = error.retryAfter === undefined ? bound * between(0.5, 1) : error.retryAfter * between(1, 1.1);
        if (now() + wait >= deadline) throw error;
        if (seen) {
          const refused = resumeBy !== undefined && error.retryAfter !== undefined;
          resumeBy ??= now() + resumeTimeout;
          if (!how.resume || !(isBroken(error) || refused) || now() + wait >= resumeBy) throw error;
        } else {
          const safe =
            error.retryAfter !== undefined || (error.code === "UNAVAILABLE" && (how.again || isUnconnected(error)));
          if (!safe || tries >= maxAttempts || this.#budget < 1) throw error;
          this.#budget -= 1;
        }
        await sleep(wait, signal);
      }
    }
  }

  /** Makes one try. */
  async #send<I extends DescMessage, O extends DescMessage>(
    signal: AbortSignal,
    method: Method<I, O>,
    request: MessageShape<I>,
    deadline: number,
  ): Promise<AsyncIterable<MessageShape<O>> | [MessageShape<O>]> {
    if (signal.aborted) throw cancelled();
    const { token, traceparent } = this.options;
    const parent = traceparent?.();
    const header = {
      "user-agent": USER_AGENT,
      ...(token !== undefined && { authorization: `Bearer ${token}` }),
      ...(parent && { traceparent: parent }),
    };
    const { transport } = this.opened;
    // 0 would be none at all.
    const timeoutMs = deadline === Infinity ? undefined : Math.max(1, Math.ceil((deadline - now()) * 1000));
    const input = request as MessageInitShape<I>;
    return method.methodKind === "unary"
      ? [(await transport.unary(method, signal, timeoutMs, header, input)).message]
      : (await transport.stream(method, signal, timeoutMs, header, createAsyncIterable([input]))).message;
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

function now(): number {
  return performance.now() / 1000;
}

function between(low: number, high: number): number {
  return low + Math.random() * (high - low);
}

/** Waits so many seconds; throws CancelledError at once when the signal aborts. */
async function sleep(seconds: number, signal: AbortSignal): Promise<void> {
  let wake = () => {};
  const woken = new Promise<void>((resolve) => (wake = resolve));
  const timer = setTimeout(wake, seconds * 1000);
  signal.addEventListener("abort", wake);
  if (!signal.aborted) await woken;
  signal.removeEventListener("abort", wake);
  clearTimeout(timer);
  if (signal.aborted) throw cancelled();
}
