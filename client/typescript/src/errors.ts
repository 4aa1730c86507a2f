/** One tree of errors; a table chooses the class by the server's ErrorReason. */

import { type DescMessage, type MessageShape, fromBinary } from "@bufbuild/protobuf";
import { Code, ConnectError } from "@connectrpc/connect";
import { BadRequestSchema, ErrorInfoSchema, RetryInfoSchema } from "./gen/lowbit/status/v1/status_pb.js";
import { ErrorReason } from "./gen/lowbit/v1/errors_pb.js";
import { type Job, JobState } from "./gen/lowbit/v1/job_pb.js";

/** A bad field of a request and what is wrong with it. */
export interface Violation {
  readonly field: string;
  readonly description: string;
}

/** What an error carries beside its message. */
export interface Facts {
  /** Name of the gRPC status, such as "NOT_FOUND". */
  readonly code: string;
  /** Name of the ErrorReason without prefix; empty where the server gave none. */
  readonly reason: string;
  /** Values that belong to the reason, such as needed and free bytes. */
  readonly metadata: Readonly<Record<string, string>>;
  /** Every bad field of the request. */
  readonly violations: readonly Violation[];
  /** Seconds to wait before the next try; undefined where the server named none. */
  readonly retryAfter: number | undefined;
  /** Name of the request in the server's log; empty where it is not known. */
  readonly requestId: string;
}

/** A call or a job failed. All other errors of this package derive from it; none holds prompt text. */
export class LowbitError extends Error implements Facts {
  readonly code: string;
  readonly reason: string;
  readonly metadata: Readonly<Record<string, string>>;
  readonly violations: readonly Violation[];
  readonly retryAfter: number | undefined;
  readonly requestId: string;

  constructor(message: string, facts: Partial<Facts> = {}, cause?: unknown) {
    super(message, { cause });
    this.name = new.target.name;
    this.code = facts.code ?? "UNKNOWN";
    this.reason = facts.reason ?? "";
    this.metadata = facts.metadata ?? {};
    this.violations = facts.violations ?? [];
    this.retryAfter = facts.retryAfter;
    this.requestId = facts.requestId || (this.metadata["request_id"] ?? "");
  }

  /** One line: reason, message and violations. */
  override toString(): string {
    const told = this.violations.map((bad) => `${bad.field}: ${bad.description}`);
    const untold = told.filter((text) => !this.message.includes(text)).join("; ");
    return `${this.reason || this.code}: ${this.message}${untold && ` (${untold})`}`.replace(/\s+/g, " ");
  }
}

/** The request is wrong and stays wrong however often it is sent. */
export class InvalidArgumentError extends LowbitError {}
/** The prompt has more tokens than the model's context. */
export class ContextLengthError extends InvalidArgumentError {}
/** What was to be imported is unsafe, damaged or of an unknown format. */
export class SourceRejectedError extends InvalidArgumentError {}
/** There is no such model, job, device or source. */
export class NotFoundError extends LowbitError {}
/** No model or alias has this name. */
export class ModelNotFoundError extends NotFoundError {}
/** No job has this id. */
export class JobNotFoundError extends NotFoundError {}
/** The name or the request id is taken. */
export class AlreadyExistsError extends LowbitError {}
/** The caller may not do this, or the path is outside the import roots. */
export class PermissionDeniedError extends LowbitError {}
/** The server does not know who calls. */
export class UnauthenticatedError extends LowbitError {}
/** The server's state does not allow this now. */
export class FailedPreconditionError extends LowbitError {}
/** The model is in the store but not loaded. */
export class ModelNotLoadedError extends FailedPreconditionError {}
/** The model is loaded, or a job reads it. */
export class ModelInUseError extends FailedPreconditionError {}
/** A worker could not make the model live; the message says why. */
export class LoadFailedError extends FailedPreconditionError {}
/** A job's checkpoint was made from other inputs; the message names what differs. */
export class CheckpointMismatchError extends FailedPreconditionError {}
/** The job has not ended, ended well or would fail again. */
export class JobNotResumableError extends FailedPreconditionError {}
/** The scheme cannot be used on this server; the message says what to install. */
export class SchemeUnavailableError extends FailedPreconditionError {}
/** Measured quality is outside the allowed values. */
export class QualityGateError extends FailedPreconditionError {}
/** Memory, disk, a queue or a size limit is used up. */
export class ResourceExhaustedError extends LowbitError {}
/** The admission queue is full; `retryAfter` says when to ask again. */
export class QueueFullError extends ResourceExhaustedError {}
/** The stream was not read fast enough and was ended. */
export class ClientStalledError extends ResourceExhaustedError {}
/** The model does not fit; `metadata` has needed and free bytes per device. */
export class InsufficientMemoryError extends ResourceExhaustedError {}
/** The server cannot be reached, or does not take calls now. */
export class UnavailableError extends LowbitError {}
/** The model is being loaded; `retryAfter` says when to ask again. */
export class ModelLoadingError extends UnavailableError {}
/** The worker process died. Text that arrived before stays on the stream. */
export class WorkerLostError extends LowbitError {}
/** The call was cancelled, here or on the server. */
export class CancelledError extends LowbitError {}
/** The call took longer than its timeout. */
export class DeadlineExceededError extends LowbitError {}
/** The API defines this; this server does not offer it. */
export class NotImplementedByServerError extends LowbitError {}
/** Stored data is damaged: a file's digest differs from its manifest. */
export class DataLossError extends LowbitError {}
/** A fault of the server; its log has the cause under `requestId`. */
export class InternalError extends LowbitError {}

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

const BY_CODE: Partial<Record<Code, typeof LowbitError>> = {
  [Code.InvalidArgument]: InvalidArgumentError,
  [Code.OutOfRange]: InvalidArgumentError,
  [Code.NotFound]: NotFoundError,
  [Code.AlreadyExists]: AlreadyExistsError,
  [Code.PermissionDenied]: PermissionDeniedError,
  [Code.Unauthenticated]: UnauthenticatedError,
  [Code.FailedPrecondition]: FailedPreconditionError,
  [Code.ResourceExhausted]: ResourceExhaustedError,
  [Code.Unavailable]: UnavailableError,
  [Code.Canceled]: CancelledError,
  [Code.DeadlineExceeded]: DeadlineExceededError,
  [Code.Unimplemented]: NotImplementedByServerError,
  [Code.DataLoss]: DataLossError,
  [Code.Internal]: InternalError,
};

/** Reasons with a class of their own. The others have the class of their code. */
const BY_REASON: Readonly<Record<string, typeof LowbitError>> = {
  CONTEXT_LENGTH_EXCEEDED: ContextLengthError,
  MODEL_NOT_FOUND: ModelNotFoundError,
  JOB_NOT_FOUND: JobNotFoundError,
  MODEL_NOT_LOADED: ModelNotLoadedError,
  MODEL_LOADING: ModelLoadingError,
  MODEL_IN_USE: ModelInUseError,
  LOAD_FAILED: LoadFailedError,
  CHECKPOINT_MISMATCH: CheckpointMismatchError,
  JOB_NOT_RESUMABLE: JobNotResumableError,
  QUEUE_FULL: QueueFullError,
  CLIENT_STALLED: ClientStalledError,
  INSUFFICIENT_DEVICE_MEMORY: InsufficientMemoryError,
  SCHEME_UNAVAILABLE: SchemeUnavailableError,
  QUALITY_GATE_FAILED: QualityGateError,
  WORKER_LOST: WorkerLostError,
  SOURCE_UNSUPPORTED: SourceRejectedError,
  SOURCE_CORRUPT: SourceRejectedError,
};

/** Returns the error of a caller who cancelled. @internal */
export function cancelled(): CancelledError {
  return new CancelledError("cancelled by the caller", { code: "CANCELLED" });
}

/** Turns what a transport threw into the error to throw; `expired` tells a timeout that has passed. @internal */
export function toLowbitError(thrown: unknown, requestId: string, expired: boolean): LowbitError {
  if (thrown instanceof LowbitError) return thrown;
  const error = ConnectError.from(thrown);
  const code = statusCode(error, expired);
  const info = detail(error, ErrorInfoSchema);
  const delay = detail(error, RetryInfoSchema)?.retryDelay;
  const facts: Facts = {
    code: Code[code]
      .replace(/(?<=[a-z])[A-Z]/g, "_$&")
      .toUpperCase()
      .replace("CANCELED", "CANCELLED"),
    reason: info?.reason ?? "",
    metadata: info?.metadata ?? {},
    violations: detail(error, BadRequestSchema)?.fieldViolations ?? [],
    retryAfter: delay && Number(delay.seconds) + delay.nanos / 1e9,
    requestId,
  };
  const kind = BY_REASON[facts.reason] ?? BY_CODE[code] ?? LowbitError;
  return new kind(error.rawMessage || "no message", facts, thrown);
}

/** Tells statuses of the server, which come with headers, from failures of the library and the connection. */
function statusCode(error: ConnectError, expired: boolean): Code {
  const local = error.metadata.keys().next().done === true;
  const broken = local && error.code !== Code.DeadlineExceeded;
  if (expired && (broken || error.code === Code.Canceled)) return Code.DeadlineExceeded;
  if (!broken || error.rawMessage.includes("MaxBytes")) return error.code;
  return error.rawMessage.startsWith("serialize") ? Code.InvalidArgument : Code.Unavailable;
}

/** Unpacks the first detail of a kind, found by the last part of its type's name. */
function detail<D extends DescMessage>(error: ConnectError, schema: D): MessageShape<D> | undefined {
  for (const found of error.details)
    if ("type" in found && found.type.split(".").at(-1) === schema.name) {
      try {
        return fromBinary(schema, found.value);
      } catch {
        return undefined; // the status says enough without it
      }
    }
  return undefined;
}
