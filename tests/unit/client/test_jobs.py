"""Job verbs: watching that survives a broken connection, waiting, paging."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING

import grpc
import pytest

from lowbit import (
    AsyncClient,
    CancelledError,
    Client,
    ClientOptions,
    JobFailedError,
    JobNotFoundError,
)
from lowbit.v1.errors_pb2 import ERROR_REASON_QUALITY_GATE_FAILED
from lowbit.v1.job_pb2 import (
    JOB_STATE_CANCELLED,
    JOB_STATE_FAILED,
    JOB_STATE_RUNNING,
    JOB_STATE_SUCCEEDED,
    CancelJobResponse,
    GetJobResponse,
    Job,
    JobError,
    JobState,
    ListJobsRequest,
    ListJobsResponse,
    ResumeJobResponse,
    WatchJobRequest,
    WatchJobResponse,
)
from tests.unit.client.fake import WAIT_S, refuse

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.unit.client.fake import FakeServer

LAST = 4


def event(sequence: int) -> WatchJobResponse:
    state = JOB_STATE_SUCCEEDED if sequence == LAST else JOB_STATE_RUNNING
    return WatchJobResponse(sequence=sequence, job=Job(id="j", state=state, sequence=sequence))


def whole(request: WatchJobRequest, _: grpc.ServicerContext) -> Iterator[WatchJobResponse]:
    yield from map(event, range(request.after_sequence + 1, LAST + 1))


class Breaking:
    """Sends two events a call and then fails, until all are sent."""

    def __call__(
        self, request: WatchJobRequest, context: grpc.ServicerContext
    ) -> Iterator[WatchJobResponse]:
        first = request.after_sequence + 1
        yield from map(event, range(first, min(first + 2, LAST + 1)))
        if first + 1 < LAST:
            refuse(context, grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")


def test_watching_goes_on_after_the_last_event(server: FakeServer, client: Client) -> None:
    server.on["WatchJob"] = Breaking()
    stream = client.watch_job("j")
    assert [item.sequence for item in stream] == [1, 2, 3, 4]
    assert stream.sequence == 4
    assert [item.after_sequence for item in server.requests("WatchJob")] == [0, 2]
    assert {item.id for item in server.requests("WatchJob")} == {"j"}


def test_watching_survives_a_restart_of_the_server(server: FakeServer, client: Client) -> None:
    hold = threading.Event()

    def stall(request: WatchJobRequest, _: grpc.ServicerContext) -> Iterator[WatchJobResponse]:
        yield event(1)
        hold.wait(WAIT_S)

    server.on["WatchJob"] = stall
    stream = client.watch_job("j")
    assert next(stream).sequence == 1
    server.stop()
    hold.set()
    server.on["WatchJob"] = whole
    server.start()
    assert [item.sequence for item in stream] == [2, 3, 4]


async def test_async_watching_goes_on_too(server: FakeServer, aclient: AsyncClient) -> None:
    server.on["WatchJob"] = Breaking()
    stream = aclient.watch_job("j")
    assert [item.sequence async for item in stream] == [1, 2, 3, 4]


def test_watching_can_join_late(server: FakeServer, client: Client) -> None:
    server.on["WatchJob"] = whole
    assert [item.sequence for item in client.watch_job("j", after_sequence=3)] == [4]


def test_a_job_that_does_not_exist_is_not_waited_for(server: FakeServer, client: Client) -> None:
    server.on["WatchJob"] = lambda _, context: refuse(
        context, grpc.StatusCode.NOT_FOUND, "JOB_NOT_FOUND"
    )
    with pytest.raises(JobNotFoundError):
        next(client.watch_job("j"))
    assert len(server.seen) == 1


def test_closing_stops_watching(server: FakeServer, client: Client) -> None:
    gone = threading.Event()

    def stall(_: object, context: grpc.ServicerContext) -> Iterator[WatchJobResponse]:
        context.add_callback(gone.set)
        yield event(1)
        gone.wait(WAIT_S)

    server.on["WatchJob"] = stall
    with client.watch_job("j") as stream:
        next(stream)
    assert gone.wait(WAIT_S)
    with pytest.raises(CancelledError):
        next(stream)


async def test_async_closing_is_heard_while_the_server_is_away(server: FakeServer) -> None:
    def once(request: WatchJobRequest, context: grpc.ServicerContext) -> Iterator[WatchJobResponse]:
        yield event(request.after_sequence + 1)
        refuse(context, grpc.StatusCode.UNAVAILABLE)

    server.on["WatchJob"] = once
    options = ClientOptions(first_backoff_s=WAIT_S, max_backoff_s=WAIT_S)
    async with AsyncClient(server.address, options) as client:
        stream = client.watch_job("j")
        await anext(stream)
        read = asyncio.create_task(anext(stream))
        await asyncio.sleep(0.2)  # it waits for its next try, which nobody can see
        began = time.monotonic()
        stream.close()
        with pytest.raises(CancelledError):
            await read
    assert time.monotonic() - began < WAIT_S / 4


def test_waiting_returns_the_last_state(server: FakeServer, client: Client) -> None:
    server.on["WatchJob"] = whole
    assert client.wait_job("j").sequence == LAST


@pytest.mark.parametrize("state", [JOB_STATE_FAILED, JOB_STATE_CANCELLED])
def test_waiting_raises_when_the_job_did_not_succeed(
    server: FakeServer, client: Client, state: JobState.ValueType
) -> None:
    job = Job(id="j", state=state)
    if state == JOB_STATE_FAILED:
        job.error.CopyFrom(
            JobError(reason=ERROR_REASON_QUALITY_GATE_FAILED, message="perplexity 18 > 17")
        )
    server.on["WatchJob"] = lambda *_: iter([WatchJobResponse(sequence=1, job=job)])
    with pytest.raises(JobFailedError) as caught:
        client.wait_job("j")
    assert caught.value.job == job
    expected = "QUALITY_GATE_FAILED" if state == JOB_STATE_FAILED else "CANCELLED"
    assert caught.value.reason == expected


async def test_async_waiting(server: FakeServer, aclient: AsyncClient) -> None:
    server.on["WatchJob"] = whole
    jobs = await asyncio.gather(*[aclient.wait_job("j") for _ in range(3)])
    assert [job.sequence for job in jobs] == [LAST] * 3


def pages(request: ListJobsRequest, _: object) -> ListJobsResponse:
    """Two jobs a page, three pages."""
    page = int(request.page_token or 0)
    jobs = [Job(id=f"{page}{name}") for name in "ab"]
    return ListJobsResponse(jobs=jobs, next_page_token=str(page + 1) if page < 2 else "")


def test_all_pages_are_listed(server: FakeServer, client: Client) -> None:
    server.on["ListJobs"] = pages
    jobs = client.jobs([JOB_STATE_RUNNING], page_size=2)
    assert [job.id for job in jobs] == ["0a", "0b", "1a", "1b", "2a", "2b"]
    requests = server.requests("ListJobs")
    assert [list(item.states) for item in requests] == [[JOB_STATE_RUNNING]] * 3
    assert [item.page_size for item in requests] == [2] * 3


def test_pages_are_fetched_when_they_are_needed(server: FakeServer, client: Client) -> None:
    server.on["ListJobs"] = pages
    jobs = client.jobs()
    assert server.seen == []
    assert [next(jobs).id for _ in range(3)] == ["0a", "0b", "1a"]
    assert len(server.seen) == 2


async def test_async_pages(server: FakeServer, aclient: AsyncClient) -> None:
    server.on["ListJobs"] = pages
    assert [job.id async for job in aclient.jobs()] == ["0a", "0b", "1a", "1b", "2a", "2b"]


def test_control(server: FakeServer, client: Client) -> None:
    server.on["GetJob"] = lambda request, _: GetJobResponse(job=Job(id=request.id))
    server.on["CancelJob"] = lambda request, _: CancelJobResponse(job=Job(id=request.id))
    server.on["ResumeJob"] = lambda request, _: ResumeJobResponse(job=Job(id=request.id))
    assert client.get_job("j").id == "j"
    assert client.cancel_job("j").id == "j"
    assert client.resume_job("j").id == "j"
