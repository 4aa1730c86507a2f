"""One tree of exceptions; failures.py chooses the class by the server's ErrorReason."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc

from lowbit.v1.errors_pb2 import ErrorReason
from lowbit.v1.job_pb2 import Job, JobState

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lowbit.status.v1.status_pb2 import BadRequest


class LowbitError(Exception):
    """A call or a job failed. All other errors of this package derive from it."""

    def __init__(  # noqa: PLR0913 - one argument per fact that an error carries
        self,
        message: str,
        *,
        code: grpc.StatusCode = grpc.StatusCode.UNKNOWN,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        violations: Iterable[BadRequest.FieldViolation] = (),
        retry_after_s: float | None = None,
        request_id: str = "",
    ) -> None:
        """Keep what the server said."""
        self.code = code
        """gRPC status code."""
        self.reason = reason
        """Name of the ErrorReason without its prefix; empty where the server gave none."""
        self.message = message
        """What went wrong, for a person; never holds prompt text."""
        self.metadata = dict(metadata or {})
        """Values that belong to the reason, such as needed and free bytes."""
        self.violations = tuple(violations)
        """Every bad field of the request, each with `field` and `description`."""
        self.retry_after_s = retry_after_s
        """Seconds to wait before the next try; None where the server named none."""
        self.request_id = request_id or self.metadata.get("request_id", "")
        """Name of the request in the server's log; empty where it is not known."""
        super().__init__(message)

    def __str__(self) -> str:
        """Return one line: reason, message and violations."""
        line = f"{self.reason or self.code.name}: {self.message}"
        told = [f"{item.field}: {item.description}" for item in self.violations]
        if untold := "; ".join(text for text in told if text not in self.message):
            line = f"{line} ({untold})"
        return " ".join(line.split())


class InvalidArgumentError(LowbitError):
    """The request is wrong and stays wrong however often it is sent."""


class ContextLengthError(InvalidArgumentError):
    """The prompt has more tokens than the model's context."""


class SourceRejectedError(InvalidArgumentError):
    """What was to be imported is unsafe, damaged or of an unknown format."""


class NotFoundError(LowbitError):
    """There is no such model, job, device or source."""


class ModelNotFoundError(NotFoundError):
    """No model or alias has this name."""


class JobNotFoundError(NotFoundError):
    """No job has this id."""


class AlreadyExistsError(LowbitError):
    """The name or the request id is taken."""


class PermissionDeniedError(LowbitError):
    """The caller may not do this, or the path is outside the import roots."""


class UnauthenticatedError(LowbitError):
    """The server does not know who calls."""


class FailedPreconditionError(LowbitError):
    """The server's state does not allow this now."""


class ModelNotLoadedError(FailedPreconditionError):
    """The model is in the store but not loaded."""


class ModelInUseError(FailedPreconditionError):
    """The model is loaded, or a job reads it."""


class LoadFailedError(FailedPreconditionError):
    """A worker could not make the model live; the message says why."""


class CheckpointMismatchError(FailedPreconditionError):
    """A job's checkpoint was made from other inputs; the message names what differs."""


class JobNotResumableError(FailedPreconditionError):
    """The job has not ended, ended well or would fail again."""


class SchemeUnavailableError(FailedPreconditionError):
    """The scheme cannot be used on this server; the message says what to install."""


class QualityGateError(FailedPreconditionError):
    """Measured quality is outside the allowed values."""


class ResourceExhaustedError(LowbitError):
    """Memory, disk, a queue or a size limit is used up."""


class QueueFullError(ResourceExhaustedError):
    """The admission queue is full; `retry_after_s` says when to ask again."""


class ClientStalledError(ResourceExhaustedError):
    """The stream was not read fast enough and was ended."""


class InsufficientMemoryError(ResourceExhaustedError):
    """The model does not fit; `metadata` has needed and free bytes per device."""


class UnavailableError(LowbitError):
    """The server cannot be reached, or does not take calls now."""


class ModelLoadingError(UnavailableError):
    """The model is being loaded; `retry_after_s` says when to ask again."""


class WorkerLostError(LowbitError):
    """The worker process died. Text that arrived before stays on the stream."""


class CancelledError(LowbitError):
    """The call was cancelled, here or on the server."""


class DeadlineExceededError(LowbitError):
    """The call took longer than its timeout."""


class NotImplementedByServerError(LowbitError):
    """The API defines this; this server does not offer it."""


class DataLossError(LowbitError):
    """Stored data is damaged: a file's digest differs from its manifest."""


class InternalError(LowbitError):
    """A fault of the server; its log has the cause under `request_id`."""


class JobFailedError(LowbitError):
    """A job that was waited for did not succeed; `job` is its last state."""

    def __init__(self, job: Job) -> None:
        """Take reason and message from the job."""
        state = JobState.Name(job.state).removeprefix("JOB_STATE_").lower()
        told = f"job {job.id} {state}"
        if job.error.message:
            told = f"{told}: {job.error.message}"
        super().__init__(
            told,
            code=grpc.StatusCode.ABORTED,
            reason=reason_name(job.error.reason) or JobState.Name(job.state)[10:],
            request_id=job.request_id,
        )
        self.job = job


def reason_name(reason: ErrorReason.ValueType) -> str:
    """Return the reason's name without prefix; empty for UNSPECIFIED."""
    return ErrorReason.Name(reason).removeprefix("ERROR_REASON_") if reason else ""
