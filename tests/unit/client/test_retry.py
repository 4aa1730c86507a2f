"""When calls are tried again: decisions alone, then over a real connection."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import grpc
import pytest

from lowbit import (
    AsyncClient,
    Client,
    ClientOptions,
    InvalidArgumentError,
    LowbitError,
    ModelLoadingError,
    QueueFullError,
    UnavailableError,
)
from lowbit.retry import Retrier, RetryBudget, backoff_s
from lowbit.v1.job_pb2 import Job
from lowbit.v1.model_pb2 import DeleteModelResponse, GetModelResponse, Model
from lowbit.v1.quantization_pb2 import QuantizeResponse
from tests.unit.client.fake import events, refuse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lowbit.v1.generation_pb2 import GenerateResponse
    from tests.unit.client.fake import FakeServer

UNAVAILABLE = UnavailableError("down", code=grpc.StatusCode.UNAVAILABLE)


def retrier(
    *, tries: int = 4, timeout_s: float | None = None, repeatable: bool = True, budget: int = 10
) -> Retrier:
    options = ClientOptions(max_attempts=tries)
    return Retrier(options, RetryBudget(budget), timeout_s=timeout_s, repeatable=repeatable)


def test_unavailable_is_retried_only_when_repeatable() -> None:
    assert retrier().delay_s(UNAVAILABLE) is not None
    assert retrier(repeatable=False).delay_s(UNAVAILABLE) is None


@pytest.mark.parametrize(
    "code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.ABORTED]
)
def test_other_codes_are_not_retried(code: grpc.StatusCode) -> None:
    assert retrier().delay_s(LowbitError("x", code=code)) is None


def test_retry_info_is_a_lower_bound_and_makes_any_call_safe() -> None:
    error = QueueFullError("x", code=grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after_s=3.0)
    delay = retrier(repeatable=False).delay_s(error)
    assert delay is not None
    assert 3.0 <= delay <= 3.3


def test_tries_are_bounded() -> None:
    three = retrier(tries=3)
    delays = [three.delay_s(UNAVAILABLE) for _ in range(3)]
    assert [delay is None for delay in delays] == [False, False, True]


def test_a_wait_past_the_deadline_is_not_begun() -> None:
    error = QueueFullError("x", retry_after_s=3.0)
    assert retrier(timeout_s=1).delay_s(error) is None
    assert retrier(timeout_s=60).delay_s(error) is not None


def test_the_budget_is_shared_and_refilled_by_successes() -> None:
    budget = RetryBudget(1)
    options = ClientOptions()

    def one() -> Retrier:
        return Retrier(options, budget, timeout_s=None, repeatable=True)

    assert one().delay_s(UNAVAILABLE) is not None
    assert one().delay_s(UNAVAILABLE) is None
    for _ in range(11):
        one().succeeded()
    assert one().delay_s(UNAVAILABLE) is not None
    assert one().delay_s(UNAVAILABLE) is None


def test_backoff_doubles_up_to_its_bound() -> None:
    options = ClientOptions(first_backoff_s=0.1, max_backoff_s=0.3)
    for tries, bound in ((1, 0.1), (2, 0.2), (3, 0.3), (9, 0.3)):
        assert bound / 2 <= backoff_s(options, tries) <= bound


def flaky(
    times: int, answer: Callable[[], object], *, retry_s: float | None = None, reason: str = ""
) -> Callable[[object, grpc.ServicerContext], object]:
    """Refuse the first `times` calls."""
    left = [times]

    def handle(_: object, context: grpc.ServicerContext) -> object:
        if left[0]:
            left[0] -= 1
            refuse(context, grpc.StatusCode.UNAVAILABLE, reason, retry_s=retry_s)
        return answer()

    return handle


def test_a_read_is_retried(server: FakeServer, client: Client) -> None:
    server.on["GetModel"] = flaky(2, lambda: GetModelResponse(model=Model(name="m")))
    assert client.get_model("m").name == "m"
    assert len(server.seen) == 3


def test_retry_info_is_honoured(server: FakeServer, client: Client) -> None:
    server.on["GetModel"] = flaky(1, GetModelResponse, retry_s=0.2, reason="MODEL_LOADING")
    client.get_model("m")
    first, second = server.seen
    assert second.time - first.time >= 0.2


def test_the_last_error_is_raised(server: FakeServer, client: Client) -> None:
    server.on["GetModel"] = flaky(99, GetModelResponse, retry_s=0, reason="MODEL_LOADING")
    with pytest.raises(ModelLoadingError):
        client.get_model("m")
    assert len(server.seen) == 4


def test_a_change_is_not_repeated_blindly(server: FakeServer, client: Client) -> None:
    server.on["DeleteModel"] = flaky(1, DeleteModelResponse)
    with pytest.raises(UnavailableError):
        client.delete_model("m")
    assert len(server.seen) == 1


def test_a_change_is_repeated_when_the_server_says_so(server: FakeServer, client: Client) -> None:
    server.on["DeleteModel"] = flaky(1, DeleteModelResponse, retry_s=0)
    client.delete_model("m")
    assert len(server.seen) == 2


def test_creating_a_job_is_repeatable_by_its_request_id(server: FakeServer, client: Client) -> None:
    server.on["Quantize"] = flaky(1, lambda: QuantizeResponse(job=Job(id="j")))
    assert client.quantize("a", "b", "nf4").id == "j"
    first, second = server.requests("Quantize")
    assert first.request_id
    assert first == second
    client.quantize("a", "b", "nf4")
    assert server.requests("Quantize")[2].request_id != first.request_id


def test_a_refused_connection_is_safe_for_any_call() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        options = ClientOptions(max_attempts=1)
        with Client(address, options) as client, pytest.raises(UnavailableError) as caught:
            client.delete_model("m")
    assert retrier(repeatable=False).delay_s(caught.value) is not None


def test_a_stream_is_retried_before_its_first_message(server: FakeServer, client: Client) -> None:
    server.on["Generate"] = flaky(2, lambda: events("a"), retry_s=0.01, reason="QUEUE_FULL")
    assert client.generate("m", "p").text() == "a"
    assert len(server.seen) == 3


def test_a_stream_is_not_retried_after_its_first_message(
    server: FakeServer, client: Client
) -> None:
    def generate(_: object, context: grpc.ServicerContext) -> Iterator[GenerateResponse]:
        yield next(events())
        refuse(context, grpc.StatusCode.UNAVAILABLE, retry_s=0)

    server.on["Generate"] = generate
    with pytest.raises(UnavailableError):
        client.generate("m", "p").text()
    assert len(server.seen) == 1


def test_a_bad_request_is_not_retried(server: FakeServer, client: Client) -> None:
    server.on["Generate"] = lambda _, context: refuse(
        context, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"
    )
    with pytest.raises(InvalidArgumentError):
        client.generate("m", "p").text()
    assert len(server.seen) == 1


async def test_async_calls_and_streams_are_retried(
    server: FakeServer, aclient: AsyncClient
) -> None:
    server.on["GetModel"] = flaky(1, GetModelResponse)
    server.on["Generate"] = flaky(1, lambda: events("a"), retry_s=0.01, reason="QUEUE_FULL")
    await aclient.get_model("m")
    assert await aclient.generate("m", "p").text() == "a"
    assert len(server.seen) == 4


def test_the_deadline_covers_all_tries(server: FakeServer, client: Client) -> None:
    server.on["GetModel"] = flaky(99, GetModelResponse, retry_s=5, reason="MODEL_LOADING")
    with pytest.raises(ModelLoadingError):
        client.get_model("m", timeout=1)
    assert len(server.seen) == 1
