"""One root error and one table from its reasons to gRPC status codes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from grpc import StatusCode

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Reason(StrEnum):
    """Why a call or a job failed; the names of `lowbit.v1.ErrorReason` without prefix."""

    INVALID_FIELD = "INVALID_FIELD"
    CONTEXT_LENGTH_EXCEEDED = "CONTEXT_LENGTH_EXCEEDED"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    JOB_NOT_FOUND = "JOB_NOT_FOUND"
    DEVICE_NOT_FOUND = "DEVICE_NOT_FOUND"
    MODEL_EXISTS = "MODEL_EXISTS"
    REQUEST_ID_REUSED = "REQUEST_ID_REUSED"
    MODEL_NOT_LOADED = "MODEL_NOT_LOADED"
    MODEL_LOADING = "MODEL_LOADING"
    MODEL_IN_USE = "MODEL_IN_USE"
    JOB_NOT_ENDED = "JOB_NOT_ENDED"
    QUEUE_FULL = "QUEUE_FULL"
    CLIENT_STALLED = "CLIENT_STALLED"
    INSUFFICIENT_DEVICE_MEMORY = "INSUFFICIENT_DEVICE_MEMORY"
    SCHEME_UNAVAILABLE = "SCHEME_UNAVAILABLE"
    QUALITY_GATE_FAILED = "QUALITY_GATE_FAILED"
    WORKER_LOST = "WORKER_LOST"
    SOURCE_NOT_ALLOWED = "SOURCE_NOT_ALLOWED"
    SOURCE_NOT_FOUND = "SOURCE_NOT_FOUND"
    SOURCE_UNSUPPORTED = "SOURCE_UNSUPPORTED"
    SOURCE_CORRUPT = "SOURCE_CORRUPT"
    DISK_FULL = "DISK_FULL"
    SHUTTING_DOWN = "SHUTTING_DOWN"
    SERVER_RESTARTED = "SERVER_RESTARTED"
    JOB_PROCESS_LOST = "JOB_PROCESS_LOST"
    CANCELLED = "CANCELLED"
    NOT_IMPLEMENTED = "NOT_IMPLEMENTED"
    INTERNAL = "INTERNAL"
    ARTIFACT_CORRUPT = "ARTIFACT_CORRUPT"
    LOAD_FAILED = "LOAD_FAILED"
    CHECKPOINT_MISMATCH = "CHECKPOINT_MISMATCH"
    JOB_NOT_RESUMABLE = "JOB_NOT_RESUMABLE"
    UNAUTHENTICATED = "UNAUTHENTICATED"


CODES: Mapping[Reason, StatusCode] = {
    Reason.INVALID_FIELD: StatusCode.INVALID_ARGUMENT,
    Reason.CONTEXT_LENGTH_EXCEEDED: StatusCode.INVALID_ARGUMENT,
    Reason.MODEL_NOT_FOUND: StatusCode.NOT_FOUND,
    Reason.JOB_NOT_FOUND: StatusCode.NOT_FOUND,
    Reason.DEVICE_NOT_FOUND: StatusCode.NOT_FOUND,
    Reason.MODEL_EXISTS: StatusCode.ALREADY_EXISTS,
    Reason.REQUEST_ID_REUSED: StatusCode.ALREADY_EXISTS,
    Reason.MODEL_NOT_LOADED: StatusCode.FAILED_PRECONDITION,
    Reason.MODEL_LOADING: StatusCode.UNAVAILABLE,
    Reason.MODEL_IN_USE: StatusCode.FAILED_PRECONDITION,
    Reason.JOB_NOT_ENDED: StatusCode.FAILED_PRECONDITION,
    Reason.QUEUE_FULL: StatusCode.RESOURCE_EXHAUSTED,
    Reason.CLIENT_STALLED: StatusCode.RESOURCE_EXHAUSTED,
    Reason.INSUFFICIENT_DEVICE_MEMORY: StatusCode.RESOURCE_EXHAUSTED,
    Reason.SCHEME_UNAVAILABLE: StatusCode.FAILED_PRECONDITION,
    Reason.QUALITY_GATE_FAILED: StatusCode.FAILED_PRECONDITION,
    Reason.WORKER_LOST: StatusCode.UNAVAILABLE,
    Reason.SOURCE_NOT_ALLOWED: StatusCode.PERMISSION_DENIED,
    Reason.SOURCE_NOT_FOUND: StatusCode.NOT_FOUND,
    Reason.SOURCE_UNSUPPORTED: StatusCode.INVALID_ARGUMENT,
    Reason.SOURCE_CORRUPT: StatusCode.INVALID_ARGUMENT,
    Reason.DISK_FULL: StatusCode.RESOURCE_EXHAUSTED,
    Reason.SHUTTING_DOWN: StatusCode.UNAVAILABLE,
    Reason.SERVER_RESTARTED: StatusCode.ABORTED,
    Reason.JOB_PROCESS_LOST: StatusCode.ABORTED,
    Reason.CANCELLED: StatusCode.CANCELLED,
    Reason.NOT_IMPLEMENTED: StatusCode.UNIMPLEMENTED,
    Reason.INTERNAL: StatusCode.INTERNAL,
    Reason.ARTIFACT_CORRUPT: StatusCode.DATA_LOSS,
    Reason.LOAD_FAILED: StatusCode.FAILED_PRECONDITION,
    Reason.CHECKPOINT_MISMATCH: StatusCode.FAILED_PRECONDITION,
    Reason.JOB_NOT_RESUMABLE: StatusCode.FAILED_PRECONDITION,
    Reason.UNAUTHENTICATED: StatusCode.UNAUTHENTICATED,
}


@dataclass(frozen=True, slots=True)
class Violation:
    """One bad field: its path and what is wrong and allowed."""

    field: str
    description: str


class LowbitError(Exception):
    """The root of all errors that a client or a job record may show."""

    def __init__(  # noqa: PLR0913 - what a status can carry
        self,
        reason: Reason,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[Violation] = (),
        retry_after_s: float | None = None,
        code: StatusCode | None = None,
    ) -> None:
        """Make an error; `code` overrides the table where one reason has two codes."""
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata = dict(metadata or {})
        self.violations = tuple(violations)
        self.retry_after_s = retry_after_s
        self.code = code or CODES[reason]


def invalid(field: str, description: str) -> LowbitError:
    """Return the error for one bad field."""
    return LowbitError(
        Reason.INVALID_FIELD,
        f"{field}: {description}",
        violations=[Violation(field, description)],
    )
