"""Turns the status of a failed call into the exception to raise; one table."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar, cast

import grpc
from google.protobuf.message import DecodeError, Message

from lowbit.errors import (
    AlreadyExistsError,
    CancelledError,
    CheckpointMismatchError,
    ClientStalledError,
    ContextLengthError,
    DataLossError,
    DeadlineExceededError,
    FailedPreconditionError,
    InsufficientMemoryError,
    InternalError,
    InvalidArgumentError,
    JobNotFoundError,
    JobNotResumableError,
    LoadFailedError,
    LowbitError,
    ModelInUseError,
    ModelLoadingError,
    ModelNotFoundError,
    ModelNotLoadedError,
    NotFoundError,
    NotImplementedByServerError,
    PermissionDeniedError,
    QualityGateError,
    QueueFullError,
    ResourceExhaustedError,
    SchemeUnavailableError,
    SourceRejectedError,
    UnauthenticatedError,
    UnavailableError,
    WorkerLostError,
)
from lowbit.status.v1.status_pb2 import BadRequest, ErrorInfo, RetryInfo, Status

if TYPE_CHECKING:
    from collections.abc import Iterable

_DETAILS_KEY = "grpc-status-details-bin"
_M = TypeVar("_M", bound=Message)

_BY_CODE: dict[grpc.StatusCode, type[LowbitError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidArgumentError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExistsError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPreconditionError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhaustedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.CANCELLED: CancelledError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.UNIMPLEMENTED: NotImplementedByServerError,
    grpc.StatusCode.DATA_LOSS: DataLossError,
    grpc.StatusCode.INTERNAL: InternalError,
}

# Reasons with a class of their own. The others have the class of their code.
_BY_REASON: dict[str, type[LowbitError]] = {
    "CONTEXT_LENGTH_EXCEEDED": ContextLengthError,
    "MODEL_NOT_FOUND": ModelNotFoundError,
    "JOB_NOT_FOUND": JobNotFoundError,
    "MODEL_NOT_LOADED": ModelNotLoadedError,
    "MODEL_LOADING": ModelLoadingError,
    "MODEL_IN_USE": ModelInUseError,
    "LOAD_FAILED": LoadFailedError,
    "CHECKPOINT_MISMATCH": CheckpointMismatchError,
    "JOB_NOT_RESUMABLE": JobNotResumableError,
    "QUEUE_FULL": QueueFullError,
    "CLIENT_STALLED": ClientStalledError,
    "INSUFFICIENT_DEVICE_MEMORY": InsufficientMemoryError,
    "SCHEME_UNAVAILABLE": SchemeUnavailableError,
    "QUALITY_GATE_FAILED": QualityGateError,
    "WORKER_LOST": WorkerLostError,
    "SOURCE_UNSUPPORTED": SourceRejectedError,
    "SOURCE_CORRUPT": SourceRejectedError,
}


def from_rpc(error: grpc.RpcError, request_id: str = "") -> LowbitError:
    """Turn a failed call's status and details into the exception to raise."""
    code, details = error.code(), _details(error)
    info = _find(details, ErrorInfo) or ErrorInfo()
    retry, bad = _find(details, RetryInfo), _find(details, BadRequest)
    kind = _BY_REASON.get(info.reason) or _BY_CODE.get(code, LowbitError)
    return kind(
        error.details() or "no message",
        code=code,
        reason=info.reason,
        metadata=info.metadata,
        violations=bad.field_violations if bad else (),
        retry_after_s=retry.retry_delay.ToNanoseconds() / 1e9 if retry else None,
        request_id=request_id,
    )


def _details(error: grpc.RpcError) -> Status:
    trailers = cast("Iterable[tuple[str, str | bytes]]", error.trailing_metadata() or ())
    for key, value in trailers:
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                return Status.FromString(value)
            except DecodeError:
                break
    return Status()


def _find(status: Status, kind: type[_M]) -> _M | None:
    """Unpack the first detail of a kind, found by the last part of its type's name."""
    for detail in status.details:
        if detail.type_url.rsplit(".", 1)[-1] == kind.DESCRIPTOR.name:
            try:
                return kind.FromString(detail.value)
            except DecodeError:
                return None
    return None
