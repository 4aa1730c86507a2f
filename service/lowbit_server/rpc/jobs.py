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
    from lowbit_server.scheduler import Scheduler

PAGE_SIZE = 50
_PAGE_TOKEN = re.compile(r"[0-9]{1,18}")  # SQLite's integers have 64 bits


class JobService(JobServiceServicer):
    """Thin over the job queue and its records."""

    def __init__(self, jobs: JobManager, records: JobStore, scheduler: Scheduler) -> None:
        """Serve the jobs of `jobs`."""
        self._jobs = jobs
        self._records = records
        self._scheduler = scheduler

    async def GetJob(self, request: pb.GetJobRequest, context: Context) -> pb.GetJobResponse:
        """Return one job."""
        return pb.GetJobResponse(job=self._message(await self._jobs.get(request.id)))

    async def ListJobs(self, request: pb.ListJobsRequest, context: Context) -> pb.ListJobsResponse:
        """Return a page of jobs, newest first; the token is the last job's number."""
        if request.page_token and _PAGE_TOKEN.fullmatch(request.page_token) is None:
            raise invalid("page_token", "use next_page_token of the page before")
        page, more = await self._records.page(
            [_state(state) for state in request.states],
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
                message = pb.WatchJobResponse(sequence=job.sequence, job=convert.job(job))
                await context.write(message)

    async def CancelJob(
        self, request: pb.CancelJobRequest, context: Context
    ) -> pb.CancelJobResponse:
        """Ask a job to stop."""
        return pb.CancelJobResponse(job=self._message(await self._jobs.cancel(request.id)))

    async def ResumeJob(
        self, request: pb.ResumeJobRequest, context: Context
    ) -> pb.ResumeJobResponse:
        """Queue an ended job again."""
        self._scheduler.check_open()
        return pb.ResumeJobResponse(job=self._message(await self._jobs.resume(request.id)))

    async def DeleteJob(
        self, request: pb.DeleteJobRequest, context: Context
    ) -> pb.DeleteJobResponse:
        """Remove an ended job's record and checkpoint."""
        await self._jobs.delete(request.id)
        return pb.DeleteJobResponse()

    def _message(self, job: Job) -> pb.Job:
        message = convert.job(job)
        # An event tells what was so then, this what is so now: its source may be gone.
        message.resumable = self._jobs.resumable(job)
        return message


def _state(value: pb.JobState.ValueType) -> JobState:
    return JobState(pb.JobState.Name(value).removeprefix("JOB_STATE_"))
