"""Verbs of JobService."""

# gRPC keeps the deadline, over all tries of a call.
# ruff: noqa: ASYNC109

from __future__ import annotations

from typing import TYPE_CHECKING

from lowbit.errors import JobFailedError
from lowbit.v1.job_pb2 import (
    JOB_STATE_SUCCEEDED,
    CancelJobRequest,
    DeleteJobRequest,
    GetJobRequest,
    Job,
    JobState,
    ListJobsRequest,
    ResumeJobRequest,
    WatchJobRequest,
)
from lowbit.v1.job_pb2_grpc import JobServiceStub

from .stream import AsyncJobStream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from .transport import AsyncTransport


class AsyncJobs:
    """Follows and controls long work."""

    def __init__(self, transport: AsyncTransport) -> None:
        """Use the transport's channel."""
        self._transport = transport
        self._stub = JobServiceStub(transport.channel)

    async def get_job(self, job_id: str, *, timeout: float | None = None) -> Job:
        """Return a job; raise JobNotFoundError when there is none of this id."""
        response = await self._transport.call(
            self._stub.GetJob, GetJobRequest(id=job_id), timeout_s=timeout, repeatable=True
        )
        return response.job

    async def jobs(
        self, states: Iterable[JobState.ValueType] = (), *, page_size: int | None = None
    ) -> AsyncIterator[Job]:
        """Iterate over all jobs, newest first, fetching page after page.

        Args:
            states: only jobs in these states; all when empty.
            page_size: jobs fetched at a time.

        Raises:
            LowbitError: when a page could not be fetched.

        """
        request = ListJobsRequest(states=states, page_size=page_size)
        while True:
            page = await self._transport.call(self._stub.ListJobs, request, repeatable=True)
            for job in page.jobs:
                yield job
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def watch_job(self, job_id: str, after_sequence: int = 0) -> AsyncJobStream:
        """Return a job's events, past ones first, until it ends.

        The stream goes on by itself after a broken connection: no event is missed and
        none comes twice.

        Args:
            job_id: id of the job.
            after_sequence: sends events whose sequence is greater than this.

        """
        request = WatchJobRequest(id=job_id, after_sequence=after_sequence)
        return AsyncJobStream(self._transport, self._stub.WatchJob, request, None)

    async def wait_job(self, job_id: str) -> Job:
        """Wait until a job ends and return it.

        Raises:
            JobFailedError: when it did not succeed.
            LowbitError: when it cannot be watched.

        """
        job = None
        async for event in self.watch_job(job_id):
            job = event.job
        if job is None:
            job = await self.get_job(job_id)
        if job.state != JOB_STATE_SUCCEEDED:
            raise JobFailedError(job)
        return job

    async def cancel_job(self, job_id: str, *, timeout: float | None = None) -> Job:
        """Ask a job to stop; return it. A job that has ended stays as it is."""
        response = await self._transport.call(
            self._stub.CancelJob, CancelJobRequest(id=job_id), timeout_s=timeout, repeatable=True
        )
        return response.job

    async def resume_job(self, job_id: str, *, timeout: float | None = None) -> Job:
        """Go on with a job that was cancelled or interrupted; return it."""
        response = await self._transport.call(
            self._stub.ResumeJob, ResumeJobRequest(id=job_id), timeout_s=timeout
        )
        return response.job

    async def delete_job(self, job_id: str, *, timeout: float | None = None) -> None:
        """Remove the record of an ended job; what it made stays."""
        await self._transport.call(
            self._stub.DeleteJob, DeleteJobRequest(id=job_id), timeout_s=timeout
        )
