"""JobService: follows and controls long work."""

from __future__ import annotations

import re
from contextlib import aclosing
from typing import TYPE_CHECKING

from lowbit.v1 import job_pb2 as pb
from lowbit.v1.job_pb2_grpc import JobServiceServicer
from lowbit_server.errors import invalid
from lowbit_server.jobs.records import JobState
from lowbit_server.rpc import convert

if TYPE_CHECKING:
    from lowbit_server.jobs.manager import JobManager
    from lowbit_server.jobs.records import Job, JobStore
    from lowbit_server.rpc.context import Context

PAGE_SIZE = 50
_PAGE_TOKEN = re.compile(r"[0-9]{1,18}")  # SQLite's integers have 64 bits


class JobService(JobServiceServicer):
    """Thin over the job queue and its records."""

    def __init__(self, jobs: JobManager, records: JobStore) -> None:
        """Serve the jobs of `jobs`."""
        self._jobs = jobs
        self._records = records

    async def GetJob(self, request: pb.GetJobRequest, context: Context) -> pb.GetJobResponse:
        """Return one job."""
        return pb.GetJobResponse(job=self._message(await self._jobs.get(request.id)))

    async def ListJobs(self, request: pb.ListJobsRequest, context: Context) -> pb.ListJobsResponse:
        """Return a page of jobs, newest first; the token is the last job's number."""
        if request.page_token and _PAGE_TOKEN.fullmatch(request.page_token) is None:
            raise invalid("page_token", "use next_page_token of the page before")
        known = set(JobState)  # PAUSED is of the API, but no job of this version is ever so
        states = [state for state in known if state in map(_state, request.states)]
        if request.states and not states:
            return pb.ListJobsResponse()
        page, more = await self._records.page(
            states,
            int(request.page_token) if request.page_token else None,
            request.page_size if request.HasField("page_size") else PAGE_SIZE,
        )
        return pb.ListJobsResponse(
            jobs=[self._message(job) for job in page], next_page_token=str(more) if more else ""
        )

    async def WatchJob(self, request: pb.WatchJobRequest, context: Context) -> None:  # type: ignore[override]
        """Send past and coming events of a job until it has ended."""
        async with aclosing(self._jobs.watch(request.id, request.after_sequence)) as events:
            async for job in events:
                message = convert.job(job, job.queue_position)
                await context.write(pb.WatchJobResponse(sequence=job.sequence, job=message))

    async def CancelJob(
        self, request: pb.CancelJobRequest, context: Context
    ) -> pb.CancelJobResponse:
        """Ask a job to stop."""
        return pb.CancelJobResponse(job=self._message(await self._jobs.cancel(request.id)))

    async def ResumeJob(
        self, request: pb.ResumeJobRequest, context: Context
    ) -> pb.ResumeJobResponse:
        """Belongs to the durability work's next step."""
        raise convert.not_implemented("ResumeJob")

    async def DeleteJob(
        self, request: pb.DeleteJobRequest, context: Context
    ) -> pb.DeleteJobResponse:
        """Remove an ended job's record."""
        await self._jobs.delete(request.id)
        return pb.DeleteJobResponse()

    def _message(self, job: Job) -> pb.Job:
        return convert.job(job, self._jobs.position(job))


def _state(value: int) -> str:
    return pb.JobState.Name(value).removeprefix("JOB_STATE_")  # type: ignore[arg-type]
