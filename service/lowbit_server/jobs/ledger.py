"""The jobs that have not ended, and every change of a job as an event that is stored."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

from lowbit_server.jobs.records import ENDED, Job, JobState
from lowbit_server.signals import Changed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lowbit_server.jobs.records import JobStore


class Ledger:
    """Knows the present state of every active job; what it is told it stores in that order."""

    def __init__(self, records: JobStore) -> None:
        """Write into `records`; call `load` before anything else."""
        self._records = records
        self._active: dict[str, Job] = {}
        self.changed = Changed()

    async def load(self) -> None:
        """Take up the jobs that have not ended."""
        states = [state for state in JobState if state not in ENDED]
        left, _ = await self._records.page(states, None, sys.maxsize - 1)
        self._active = {job.id: job for job in reversed(left)}

    def __iter__(self) -> Iterator[Job]:
        """Yield the active jobs, oldest first."""
        return iter(list(self._active.values()))

    def __getitem__(self, job_id: str) -> Job:
        """Return an active job as it is now."""
        return self._active[job_id]

    async def get(self, job_id: str) -> Job:
        """Return a job, active or not; raise JOB_NOT_FOUND."""
        return self._active.get(job_id) or await self._records.get(job_id)

    async def add(self, job: Job) -> None:
        """Store a new job."""
        await self._records.create(job)
        self._active[job.id] = job

    def put(self, job: Job) -> None:
        """Let a job be as it is given at once; the caller stores it soon."""
        self._active[job.id] = job

    async def change(self, job: Job, **values: object) -> Job:
        """Store a job's next event and return it."""
        job = job.next(**values)
        await self.store([job])
        return job

    async def store(self, jobs: Sequence[Job]) -> None:
        """Make each job's next event its state; it is stored even if the caller is cancelled."""
        for job in jobs:
            if job.ended:
                self._active.pop(job.id, None)
            else:
                self._active[job.id] = job
        await asyncio.shield(self._write(jobs))

    async def _write(self, jobs: Sequence[Job]) -> None:
        await self._records.update(*jobs)
        self.changed.notify()
