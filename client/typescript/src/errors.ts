/** The root of all errors, and that of a job. The other classes are a table: classes.ts. */

import { ErrorReason } from "./gen/lowbit/v1/errors_pb.js";
import { type Job, JobState } from "./gen/lowbit/v1/job_pb.js";

/** A bad field of a request and what is wrong with it. */
export interface Violation {
  readonly field: string;
  readonly description: string;
}

/** A call or a job failed. All other errors of this package derive from it; none holds prompt text. */
export class LowbitError extends Error {
  /** Name of the gRPC status, such as "NOT_FOUND". */
  readonly code: string = "UNKNOWN";
  /** Name of the ErrorReason without prefix; empty where the server gave none. */
  readonly reason: string = "";
  /** Values that belong to the reason, such as needed and free bytes. */
  readonly metadata: Readonly<Record<string, string>> = {};
  /** Every bad field of the request. */
  readonly violations: readonly Violation[] = [];
  /** Seconds to wait before the next try; undefined where the server named none. */
  readonly retryAfter: number | undefined;
  /** Name of the request in the server's log; empty where it is not known. */
  readonly requestId: string = "";

  constructor(message: string, facts: Partial<Facts> = {}, cause?: unknown) {
    super(message, { cause });
    Object.assign(this, facts);
    this.name = new.target.name;
    this.requestId ||= this.metadata["request_id"] ?? "";
  }

  /** One line: reason, message and violations. */
  override toString(): string {
    const told = this.violations.map((bad) => `${bad.field}: ${bad.description}`);
    const untold = told.filter((text) => !this.message.includes(text)).join("; ");
    return `${this.reason || this.code}: ${this.message}${untold && ` (${untold})`}`.replace(/\s+/g, " ");
  }
}

/** A job that was waited for did not succeed; `job` is its last state. */
export class JobFailedError extends LowbitError {
  constructor(readonly job: Job) {
    const state = JobState[job.state] ?? "";
    const told = `job ${job.id} ${state.toLowerCase()}`;
    const reason = job.error?.reason ? (ErrorReason[job.error.reason] ?? "") : state;
    const facts = { code: "ABORTED", reason, requestId: job.requestId };
    super(job.error?.message ? `${told}: ${job.error.message}` : told, facts);
  }
}

/** What an error carries beside its message. */
export type Facts = Pick<LowbitError, "code" | "reason" | "metadata" | "violations" | "retryAfter" | "requestId">;
