/** Failures as the transport tells them, made errors of this package. */

import { Code, ConnectError } from "@connectrpc/connect";
import { codeToString } from "@connectrpc/connect/protocol-connect";
import { BY_CODE, BY_REASON, CancelledError } from "./classes.js";
import { LowbitError } from "./errors.js";
import { BadRequestSchema, ErrorInfoSchema, RetryInfoSchema } from "./gen/lowbit/status/v1/status_pb.js";

/** Returns the error of a caller who cancelled. */
export function cancelled(): CancelledError {
  return new CancelledError("cancelled by the caller", { code: "CANCELLED" });
}

/** Turns what a transport threw into the error of a request; `expired` tells a timeout that has passed. */
export function toLowbitError(thrown: unknown, request: object, expired: boolean): LowbitError {
  const error = ConnectError.from(thrown);
  // The schema has google.rpc's messages under names of its own.
  for (const detail of error.details)
    if ("type" in detail) detail.type = detail.type.replace(/^google\.rpc\./, "lowbit.status.v1.");
  const [info] = error.findDetails(ErrorInfoSchema);
  const [bad] = error.findDetails(BadRequestSchema);
  const delay = error.findDetails(RetryInfoSchema)[0]?.retryDelay;
  const code = codeToString(statusCode(error, expired)).toUpperCase().replace("CANCELED", "CANCELLED");
  const facts = {
    code,
    reason: info?.reason ?? "",
    metadata: info?.metadata ?? {},
    violations: bad?.fieldViolations ?? [],
    retryAfter: delay && Number(delay.seconds) + delay.nanos / 1e9,
    requestId: (request as { requestId?: string }).requestId ?? "",
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
