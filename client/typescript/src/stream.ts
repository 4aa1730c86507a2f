/** The streams that a client returns. Each begins with its first read and is cancelled when it is left. */

import type { Completed, GenerateResponse, OutputFinished, Started, Token } from "./gen/lowbit/v1/generation_pb.js";
import type { LoadResponse } from "./gen/lowbit/v1/model_pb.js";

/** Cancels the calls of streams that nobody holds any more. */
const dropped = new FinalizationRegistry<AbortController>((controller) => controller.abort());

/** Messages of a call, to be read once; leaving a `for await` over it cancels the call on the server. */
export class Stream<T, M = T> implements AsyncIterableIterator<T> {
  readonly #controller = new AbortController();
  readonly #messages: AsyncGenerator<M>;

  /** @internal */
  constructor(start: (controller: AbortController) => AsyncGenerator<M>) {
    this.#messages = start(this.#controller);
    dropped.register(this, this.#controller);
  }

  /** Returns the stream itself. */
  [Symbol.asyncIterator](): this {
    return this;
  }

  /** Reads the next item; rejects with a LowbitError when the call failed. */
  async next(): Promise<IteratorResult<T, undefined>> {
    for (;;) {
      const { done, value } = await this.#messages.next();
      if (done) return { done: true, value: undefined };
      const item = this.take(value);
      if (item !== undefined) return { done: false, value: item };
    }
  }

  /** Cancels the call if it still runs; reading on gives CancelledError once, then the end. */
  cancel(): void {
    this.#controller.abort();
  }

  /** Cancels the call and ends the stream; `for await` calls it when it is left. */
  async return(): Promise<IteratorReturnResult<undefined>> {
    this.#controller.abort();
    await this.#messages.return(undefined);
    return { done: true, value: undefined };
  }

  /** Makes an item of a message; undefined where there is nothing to give. @internal */
  protected take(message: M): T | undefined {
    return message as unknown as T;
  }
}

/** Progress of a load. The load is cancelled with its last reader. */
export class LoadStream extends Stream<LoadResponse> {
  /** Reads to the end; returns the last message of each replica. */
  async wait(): Promise<LoadResponse[]> {
    const last = new Map<string, LoadResponse>();
    for await (const message of this) last.set(`${message.device} ${message.worker}`, message);
    return [...last.values()];
  }
}

/** What one message of the server added to an output. */
export interface Chunk {
  /** Text that follows what came before; whole characters, may be empty. */
  readonly text: string;
  /** Ids of the tokens that made it, when `output.tokenIds` asked for them. */
  readonly tokenIds: readonly number[];
  /** The same with their log-probabilities, when `output.logprobs` asked for these. */
  readonly tokens: readonly Token[];
  /** Which output it belongs to, from 0. */
  readonly outputIndex: number;
}

/** A generation. Iterating gives chunks; the properties fill as it goes on and stay after a failure. */
export class GenerateStream extends Stream<Chunk, GenerateResponse> {
  /** Model revision, device and prompt tokens; undefined until the first read. */
  started: Started | undefined;
  /** Why each output ended and at which stop, by its index; those that have. */
  readonly allFinished = new Map<number, OutputFinished>();
  /** Tokens used and where the time went; undefined until the stream has ended well. */
  completed: Completed | undefined;
  readonly #texts: string[] = [];

  /** Why output 0 ended and at which stop; undefined until then. */
  get finished(): OutputFinished | undefined {
    return this.allFinished.get(0);
  }

  /** Text of output 0 that has been read so far. */
  get partialText(): string {
    return this.#texts[0] ?? "";
  }

  /** Reads to the end; returns the whole text of output 0, chunks that were read before included. */
  async text(): Promise<string> {
    for await (const _ of this);
    return this.partialText;
  }

  /** Does what `text` does; returns the texts of all outputs, by their index. */
  async texts(): Promise<string[]> {
    await this.text();
    return [...this.#texts];
  }

  /** @internal */
  protected override take({ event }: GenerateResponse): Chunk | undefined {
    if (event.case === "delta") {
      const { text, tokens, outputIndex } = event.value;
      this.#texts[outputIndex] = (this.#texts[outputIndex] ?? "") + text;
      return { text, tokenIds: tokens.map((token) => token.id), tokens, outputIndex };
    }
    if (event.case === "outputFinished") {
      this.#texts[event.value.outputIndex] ??= "";
      this.allFinished.set(event.value.outputIndex, event.value);
    } else if (event.case === "started") this.started = event.value;
    else if (event.case === "completed") this.completed = event.value;
    return undefined;
  }
}
