"""Jobs and their events, kept in the database."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING

import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.jobs.spec import Failed, JobSpec, Progress, Trial
from lowbit_server.quant.quality import Quality
from lowbit_server.store.database import job_events, jobs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lowbit_server.store.database import Database


class JobState(StrEnum):
    """State of a job."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    CANCELLING = "CANCELLING"
    PAUSED = "PAUSED"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


ENDED = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})
RESUMABLE = frozenset(
    {
        Reason.JOB_PROCESS_LOST,
        Reason.SERVER_RESTARTED,  # in the records of an older version
        Reason.DISK_FULL,
        Reason.INSUFFICIENT_DEVICE_MEMORY,
        Reason.SCHEME_UNAVAILABLE,
        Reason.SOURCE_NOT_FOUND,
        Reason.CHECKPOINT_MISMATCH,
        Reason.INTERNAL,
    }
)
"""What a job may fail with through no fault of its own: the machine or the store can change."""


class Job(BaseModel):
    """A job as it was at one event."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    spec: JobSpec
    state: JobState = JobState.QUEUED
    progress: Progress | None = None
    error: Failed | None = None
    quality: Quality | None = None
    """What was measured, once it has ended."""
    trials: tuple[Trial, ...] = ()
    """What scheme `auto` has tried."""
    request_id: str = ""
    queue_position: int = 0
    """Place among the jobs that wait for its device, from 1; 0 once it runs."""
    create_time: datetime
    start_time: datetime | None = None
    end_time: datetime | None = None
    sequence: int = 1

    @property
    def ended(self) -> bool:
        """Whether the state will not change again."""
        return self.state in ENDED

    @property
    def not_resumable(self) -> str:
        """Why nobody can go on with it; empty where somebody can."""
        if not self.ended:
            return f"it is {self.state} and goes on by itself"
        if self.state is JobState.SUCCEEDED:
            return "it ended well"
        if self.error is not None and self.error.reason not in RESUMABLE:
            return f"it failed with {self.error.reason} and would fail again"
        return ""

    def next(self, **values: object) -> Job:
        """Return the job as it is at its next event."""
        return self.model_copy(update={**values, "sequence": self.sequence + 1})


def now() -> datetime:
    """Return the present time in UTC."""
    return datetime.now(UTC)


class JobStore:
    """The jobs of a store; each change is an event with the next sequence number."""

    def __init__(self, database: Database) -> None:
        """Keep the jobs in `database`."""
        self._database = database

    async def create(self, job: Job) -> None:
        """Add a job with its first event."""

        def query(connection: sa.Connection) -> None:
            record = job.model_dump_json()
            connection.execute(
                jobs.insert().values(
                    id=job.id, state=job.state, request_id=job.request_id or None, record=record
                )
            )
            connection.execute(
                job_events.insert().values(job=job.id, sequence=job.sequence, record=record)
            )

        await self._database.run(query)

    async def find(self, request_id: str) -> Job | None:
        """Return the job that was made with `request_id`, if there is one."""

        def query(connection: sa.Connection) -> Job | None:
            row = connection.execute(
                sa.select(jobs.c.record).where(jobs.c.request_id == request_id)
            ).first()
            return Job.model_validate_json(row.record) if row is not None else None

        return await self._database.run(query)

    async def update(self, *changed: Job) -> None:
        """Store the next event of each job; its sequence is one more than the last."""

        def query(connection: sa.Connection) -> None:
            for job in changed:
                record = job.model_dump_json()
                connection.execute(
                    jobs.update().where(jobs.c.id == job.id).values(state=job.state, record=record)
                )
                connection.execute(
                    job_events.insert().values(job=job.id, sequence=job.sequence, record=record)
                )

        await self._database.run(query)

    async def get(self, job_id: str) -> Job:
        """Return a job; raise JOB_NOT_FOUND when there is none."""

        def query(connection: sa.Connection) -> Job:
            row = connection.execute(sa.select(jobs.c.record).where(jobs.c.id == job_id)).first()
            if row is None:
                raise not_found(job_id)
            return Job.model_validate_json(row.record)

        return await self._database.run(query)

    async def page(
        self, states: Sequence[JobState], before: int | None, size: int
    ) -> tuple[list[Job], int | None]:
        """Return up to `size` jobs, newest first, and where the next page begins."""

        def query(connection: sa.Connection) -> tuple[list[Job], int | None]:
            select = sa.select(jobs.c.number, jobs.c.record).order_by(jobs.c.number.desc())
            if states:
                select = select.where(jobs.c.state.in_(states))
            if before is not None:
                select = select.where(jobs.c.number < before)
            rows = connection.execute(select.limit(size + 1)).all()
            more = rows[size - 1].number if len(rows) > size else None
            return [Job.model_validate_json(row.record) for row in rows[:size]], more

        return await self._database.run(query)

    async def events(self, job_id: str, after: int) -> list[Job]:
        """Return the job as it was at each event after sequence `after`."""

        def query(connection: sa.Connection) -> list[Job]:
            rows = connection.execute(
                sa.select(job_events.c.record)
                .where(job_events.c.job == job_id, job_events.c.sequence > after)
                .order_by(job_events.c.sequence)
            )
            return [Job.model_validate_json(row.record) for row in rows]

        return await self._database.run(query)

    async def delete(self, job_id: str) -> None:
        """Remove an ended job; raise JOB_NOT_FOUND or JOB_NOT_ENDED."""

        def query(connection: sa.Connection) -> None:
            row = connection.execute(sa.select(jobs.c.state).where(jobs.c.id == job_id)).first()
            if row is None:
                raise not_found(job_id)
            if row.state not in ENDED:
                message = f"job {job_id} is {row.state}; cancel it or wait for its end"
                raise LowbitError(Reason.JOB_NOT_ENDED, message)
            connection.execute(jobs.delete().where(jobs.c.id == job_id))

        await self._database.run(query)


def not_found(job_id: str) -> LowbitError:
    """Return the error for an id that no job has."""
    return LowbitError(Reason.JOB_NOT_FOUND, f"no job has the id {job_id!r}")
