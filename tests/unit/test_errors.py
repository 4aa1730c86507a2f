"""The one error table."""

from __future__ import annotations

from grpc import StatusCode

from lowbit.v1.errors_pb2 import ErrorReason
from lowbit_server.errors import CODES, LowbitError, Reason, Violation, invalid


def test_the_reasons_are_those_of_the_api() -> None:
    names = {name.removeprefix("ERROR_REASON_") for name in ErrorReason.keys()}  # noqa: SIM118
    assert names - {"UNSPECIFIED"} == set(Reason)


def test_every_reason_has_a_code() -> None:
    assert set(CODES) == set(Reason)
    assert StatusCode.OK not in CODES.values()
    assert StatusCode.UNKNOWN not in CODES.values()


def test_an_error_takes_its_code_from_the_table_unless_told_otherwise() -> None:
    assert LowbitError(Reason.WORKER_LOST, "gone").code is StatusCode.UNAVAILABLE
    late = LowbitError(Reason.WORKER_LOST, "gone", code=StatusCode.INTERNAL)
    assert late.code is StatusCode.INTERNAL


def test_a_bad_field_is_named_in_message_and_violation() -> None:
    error = invalid("sampling.top_p", "at most 1")
    assert error.message == "sampling.top_p: at most 1"
    assert error.violations == (Violation("sampling.top_p", "at most 1"),)
