/** The client: one connection, the verbs of all services and what of them no table has. */

import { type CallOptions, Calls } from "./calls.js";
import { JobFailedError } from "./errors.js";
import { type Job, JobState, type JobService } from "./gen/lowbit/v1/job_pb.js";
import { ModelService } from "./gen/lowbit/v1/model_pb.js";
import { type ClientOptions, settle } from "./options.js";
import type { In, Out } from "./requests.js";
import { Verbs } from "./verbs.js";

const { unload } = ModelService.method;
type WatchJob = typeof JobService.method.watchJob;

/**
 * A connection to one Lowbit server. Every verb takes the message of its request in literal form; common ones
 * have a short form too. Calls that fail reject with LowbitError, or a class derived from it.
 */
export class Client extends Verbs {
  /**
   * Makes a client; it connects with its first call.
   *
   * @param address HOST:PORT; without one that of LOWBIT_ADDRESS, or else 127.0.0.1:50151.
   * @throws RangeError for an option that makes no sense, with its name.
   */
  constructor(address?: string, options: ClientOptions = {}) {
    super(new Calls(address, settle(options)));
  }

  /** Closes the connection and cancels what still runs. */
  close(): void {
    this.calls.close();
  }

  /** Takes a model off its devices once its streams have ended. */
  unload(model: string | In<typeof unload>, options?: CallOptions): Promise<Out<typeof unload>> {
    const request: In<typeof unload> = typeof model === "string" ? { model } : model;
    const { seconds = 0n, nanos = 0 } = request.drainTimeout ?? { seconds: 30n };
    const drained = this.calls.options.callTimeout + Number(seconds) + nanos / 1e9;
    const timeout = options?.timeout ?? drained;
    return this.calls.one({ ...options, method: unload, request, timeout, once: true });
  }

  /** Waits until a job ends and returns it; rejects with JobFailedError when it did not succeed. */
  async waitJob(id: string | In<WatchJob>, options?: CallOptions): Promise<Job> {
    let job: Job | undefined;
    for await (const event of this.watchJob(id, options)) job = event.job;
    job ??= await this.getJob(typeof id === "string" ? id : (id.id ?? ""), options);
    if (job.state !== JobState.SUCCEEDED) throw new JobFailedError(job);
    return job;
  }
}
