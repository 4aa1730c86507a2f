"""Which exception each refusal of the server becomes."""

from __future__ import annotations

import grpc
import pytest

import lowbit
from lowbit import Client, JobFailedError, LowbitError
from lowbit.v1.errors_pb2 import ERROR_REASON_DISK_FULL, ErrorReason
from lowbit.v1.job_pb2 import JOB_STATE_FAILED, Job, JobError
from tests.unit.client.fake import FakeServer, refuse

Code = grpc.StatusCode

# Every reason of the API, with the code that errors.proto gives it.
REASONS = {
    "INVALID_FIELD": (Code.INVALID_ARGUMENT, lowbit.InvalidArgumentError),
    "CONTEXT_LENGTH_EXCEEDED": (Code.INVALID_ARGUMENT, lowbit.ContextLengthError),
    "MODEL_NOT_FOUND": (Code.NOT_FOUND, lowbit.ModelNotFoundError),
    "JOB_NOT_FOUND": (Code.NOT_FOUND, lowbit.JobNotFoundError),
    "DEVICE_NOT_FOUND": (Code.NOT_FOUND, lowbit.NotFoundError),
    "MODEL_EXISTS": (Code.ALREADY_EXISTS, lowbit.AlreadyExistsError),
    "REQUEST_ID_REUSED": (Code.ALREADY_EXISTS, lowbit.AlreadyExistsError),
    "MODEL_NOT_LOADED": (Code.FAILED_PRECONDITION, lowbit.ModelNotLoadedError),
    "MODEL_LOADING": (Code.UNAVAILABLE, lowbit.ModelLoadingError),
    "MODEL_IN_USE": (Code.FAILED_PRECONDITION, lowbit.ModelInUseError),
    "LOAD_FAILED": (Code.FAILED_PRECONDITION, lowbit.LoadFailedError),
    "JOB_NOT_ENDED": (Code.FAILED_PRECONDITION, lowbit.FailedPreconditionError),
    "CHECKPOINT_MISMATCH": (Code.FAILED_PRECONDITION, lowbit.CheckpointMismatchError),
    "JOB_NOT_RESUMABLE": (Code.FAILED_PRECONDITION, lowbit.JobNotResumableError),
    "QUEUE_FULL": (Code.RESOURCE_EXHAUSTED, lowbit.QueueFullError),
    "CLIENT_STALLED": (Code.RESOURCE_EXHAUSTED, lowbit.ClientStalledError),
    "INSUFFICIENT_DEVICE_MEMORY": (Code.RESOURCE_EXHAUSTED, lowbit.InsufficientMemoryError),
    "SCHEME_UNAVAILABLE": (Code.FAILED_PRECONDITION, lowbit.SchemeUnavailableError),
    "QUALITY_GATE_FAILED": (Code.FAILED_PRECONDITION, lowbit.QualityGateError),
    "WORKER_LOST": (Code.INTERNAL, lowbit.WorkerLostError),
    "SOURCE_NOT_ALLOWED": (Code.PERMISSION_DENIED, lowbit.PermissionDeniedError),
    "SOURCE_NOT_FOUND": (Code.NOT_FOUND, lowbit.NotFoundError),
    "SOURCE_UNSUPPORTED": (Code.INVALID_ARGUMENT, lowbit.SourceRejectedError),
    "SOURCE_CORRUPT": (Code.INVALID_ARGUMENT, lowbit.SourceRejectedError),
    "DISK_FULL": (Code.RESOURCE_EXHAUSTED, lowbit.ResourceExhaustedError),
    "SHUTTING_DOWN": (Code.UNAVAILABLE, lowbit.UnavailableError),
    "SERVER_RESTARTED": (Code.ABORTED, lowbit.LowbitError),
    "JOB_PROCESS_LOST": (Code.ABORTED, lowbit.LowbitError),
    "CANCELLED": (Code.CANCELLED, lowbit.CancelledError),
    "NOT_IMPLEMENTED": (Code.UNIMPLEMENTED, lowbit.NotImplementedByServerError),
    "INTERNAL": (Code.INTERNAL, lowbit.InternalError),
    "ARTIFACT_CORRUPT": (Code.DATA_LOSS, lowbit.DataLossError),
    "UNAUTHENTICATED": (Code.UNAUTHENTICATED, lowbit.UnauthenticatedError),
}


def test_every_reason_of_the_api_is_in_the_table() -> None:
    names = {name.removeprefix("ERROR_REASON_") for name, value in ErrorReason.items() if value}
    assert names == set(REASONS)


@pytest.mark.parametrize("reason", REASONS)
def test_reason_chooses_the_class(server: FakeServer, reason: str) -> None:
    code, kind = REASONS[reason]
    server.on["GetModel"] = lambda _, context: refuse(
        context, code, reason, message="what went wrong", metadata={"needed": "7"}
    )
    options = lowbit.ClientOptions(max_attempts=1)
    with Client(server.address, options) as client, pytest.raises(LowbitError) as caught:
        client.get_model("m")
    error = caught.value
    assert type(error) is kind
    assert (error.code, error.reason, error.message) == (code, reason, "what went wrong")
    assert error.metadata == {"needed": "7"}
    assert error.violations == ()
    assert error.retry_after_s is None
    assert str(error) == f"{reason}: what went wrong"


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (Code.INVALID_ARGUMENT, lowbit.InvalidArgumentError),
        (Code.UNAUTHENTICATED, lowbit.UnauthenticatedError),
        (Code.DEADLINE_EXCEEDED, lowbit.DeadlineExceededError),
        (Code.UNIMPLEMENTED, lowbit.NotImplementedByServerError),
        (Code.UNKNOWN, lowbit.LowbitError),
    ],
)
def test_without_details_the_code_chooses(
    server: FakeServer, client: Client, code: grpc.StatusCode, kind: type[LowbitError]
) -> None:
    server.on["GetModel"] = lambda _, context: context.abort(code, "plain")
    with pytest.raises(LowbitError) as caught:
        client.get_model("m")
    assert type(caught.value) is kind
    assert str(caught.value) == f"{code.name}: plain"


def test_an_unknown_reason_falls_back_to_the_code(server: FakeServer, client: Client) -> None:
    server.on["GetModel"] = lambda _, context: refuse(context, Code.NOT_FOUND, "OF_TOMORROW")
    with pytest.raises(lowbit.NotFoundError) as caught:
        client.get_model("m")
    assert caught.value.reason == "OF_TOMORROW"


def test_all_violations_are_kept(server: FakeServer, client: Client) -> None:
    fields = {"sampling.top_p": "must be at most 1", "model": "is empty"}
    server.on["Tokenize"] = lambda _, context: refuse(
        context,
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
        message="two\nbad fields",
        violations=fields,
    )
    with pytest.raises(lowbit.InvalidArgumentError) as caught:
        client.tokenize("", "secret prompt")
    assert {item.field: item.description for item in caught.value.violations} == fields
    assert str(caught.value) == (
        "INVALID_FIELD: two bad fields (sampling.top_p: must be at most 1; model: is empty)"
    )


def test_a_violation_that_the_message_tells_is_not_repeated(
    server: FakeServer, client: Client
) -> None:
    server.on["GetModel"] = lambda _, context: refuse(
        context,
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
        message="model: is empty",
        violations={"model": "is empty"},
    )
    with pytest.raises(lowbit.InvalidArgumentError) as caught:
        client.get_model("")
    assert str(caught.value) == "INVALID_FIELD: model: is empty"


def test_the_request_id_is_kept(server: FakeServer, client: Client) -> None:
    server.on["Generate"] = lambda _, context: refuse(context, Code.INTERNAL, "INTERNAL")
    with pytest.raises(lowbit.InternalError) as caught:
        client.generate("m", "p", request_id="mine").text()
    assert caught.value.request_id == "mine"
    server.on["Generate"] = lambda _, context: refuse(
        context, Code.INTERNAL, "INTERNAL", metadata={"request_id": "theirs"}
    )
    with pytest.raises(lowbit.InternalError) as caught:
        client.generate("m", "p").text()
    assert caught.value.request_id == "theirs"


async def test_async_calls_raise_the_same(server: FakeServer, aclient: lowbit.AsyncClient) -> None:
    server.on["GetModel"] = lambda _, context: refuse(
        context, Code.NOT_FOUND, "MODEL_NOT_FOUND", retry_s=None, violations={"model": "gone"}
    )
    with pytest.raises(lowbit.ModelNotFoundError) as caught:
        await aclient.get_model("m")
    assert caught.value.violations[0].description == "gone"


def test_damaged_details_do_not_hide_the_error(server: FakeServer, client: Client) -> None:
    def damaged(_: object, context: grpc.ServicerContext) -> None:
        context.set_trailing_metadata((("grpc-status-details-bin", b"\xff\xff\xff"),))
        context.abort(Code.NOT_FOUND, "gone")

    server.on["GetModel"] = damaged
    with pytest.raises(lowbit.NotFoundError, match="gone"):
        client.get_model("m")


def test_a_failed_job_has_its_reason() -> None:
    job = Job(
        id="j1",
        state=JOB_STATE_FAILED,
        error=JobError(reason=ERROR_REASON_DISK_FULL, message="no space"),
    )
    error = JobFailedError(job)
    assert error.reason == "DISK_FULL"
    assert error.job == job
    assert str(error) == "DISK_FULL: job j1 failed: no space"
