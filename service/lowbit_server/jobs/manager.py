"""The job queue: starts one process per job and records what it reports.

A job process fills a staging folder and reports; only this side publishes, so a job
can be killed at any moment and nothing half-done is ever loadable.
"""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING
from uuid import uuid4

import structlog
from pydantic import ValidationError

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.jobs.records import ENDED, Job, JobState, JobStore, now
from lowbit_server.jobs.spec import JOB_REPORT, Failed, ImportSpec, JobSpec, Progress, QuantizeSpec
from lowbit_server.signals import Changed
from lowbit_server.store.sealing import disk_full_is_named

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from lowbit_server.config import Config
    from lowbit_server.store.catalog import Catalog

log = structlog.get_logger()

REPORT_BYTES = 1 << 20
"""Longest line that a job process may report."""


class JobManager:
    """Owns the queue and every job process."""

    def __init__(self, config: Config, catalog: Catalog, records: JobStore) -> None:
        """Run jobs on the store at `config.home`; call `start` before anything else."""
        self._config = config
        self._catalog = catalog
        self._records = records
        self._submitting = asyncio.Lock()
        # Bounded by config.max_queued_jobs in `submit`.
        self._queue: deque[str] = deque()
        self._active: dict[str, Job] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self.changed = Changed()

    async def start(self) -> None:
        """Fail the jobs that a stopped server left running; queue those that waited."""
        left, _ = await self._records.page(
            [state for state in JobState if state not in ENDED], None, sys.maxsize - 1
        )
        for job in reversed(left):
            self._active[job.id] = job
            if job.state is JobState.QUEUED:
                self._queue.append(job.id)
            elif job.state is JobState.CANCELLING:
                await self._end(job, JobState.CANCELLED)
            else:
                await self._end(job, JobState.FAILED, _restarted())
        self._pump()

    async def stop(self) -> None:
        """End every job process; their jobs fail with SERVER_RESTARTED."""
        self._queue.clear()
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def counts(self) -> tuple[int, int]:
        """Jobs that run and jobs that wait."""
        return len(self._running), len(self._queue)

    def position(self, job: Job) -> int:
        """Return the job's place in the queue from 1, or 0."""
        return self._queue.index(job.id) + 1 if job.id in self._queue else 0

    def uses(self, model: str) -> str | None:
        """Return the id of a job that reads or makes a model, if there is one."""
        for job in self._active.values():
            if model == job.spec.model or (
                isinstance(job.spec, QuantizeSpec) and job.spec.source == model
            ):
                return job.id
        return None

    async def submit(self, spec: JobSpec, request_id: str, *, validate_only: bool) -> Job:
        """Queue a job and return it; with a known `request_id`, return the job it made.

        Raises REQUEST_ID_REUSED, MODEL_EXISTS, INVALID_FIELD or QUEUE_FULL.
        """
        async with self._submitting:
            if request_id and (known := await self._records.find(request_id)):
                if known.spec != spec:
                    message = f"request_id {request_id!r} was used for another request"
                    raise LowbitError(Reason.REQUEST_ID_REUSED, message, metadata={"job": known.id})
                return known
            self._catalog.check_free("target" if spec.kind == "quantize" else "model", spec.model)
            if any(job.spec.model == spec.model for job in self._active.values()):
                message = f"a job that makes {spec.model!r} is under way"
                raise LowbitError(Reason.MODEL_EXISTS, message, metadata={"model": spec.model})
            if len(self._queue) >= self._config.max_queued_jobs:
                message = f"{len(self._queue)} jobs wait already"
                raise LowbitError(Reason.QUEUE_FULL, message, retry_after_s=30)
            job = Job(
                id=uuid4().hex,
                spec=spec,
                request_id=request_id,
                queue_position=len(self._queue) + 1,
                create_time=now(),
            )
            if validate_only:
                return job.model_copy(update={"id": ""})
            await self._records.create(job)
            self._active[job.id] = job
            self._queue.append(job.id)
        log.info("job queued", job=job.id, kind=spec.kind, model=spec.model)
        self._pump()
        return job

    async def watch(self, job_id: str, after: int) -> AsyncGenerator[Job]:
        """Yield the job as it was at each event after `after`; end with the job.

        Every watcher reads the same stored events, so all see the same sequence.
        """
        while True:
            changed = self.changed.next()
            job = await self._records.get(job_id)
            for event in await self._records.events(job_id, after):
                after = event.sequence
                yield event
            if job.ended:
                return
            await changed.wait()

    async def get(self, job_id: str) -> Job:
        """Return a job; raise JOB_NOT_FOUND."""
        return self._active.get(job_id) or await self._records.get(job_id)

    async def cancel(self, job_id: str) -> Job:
        """Ask a job to stop; an ended job stays as it is."""
        job = await self.get(job_id)
        if job_id in self._queue:
            self._queue.remove(job_id)
            return await self._end(job, JobState.CANCELLED)
        if job.state in {JobState.QUEUED, JobState.RUNNING}:
            job = await self._change(job, state=JobState.CANCELLING)
            if process := self._processes.get(job_id):
                _kill(process)
        return job

    async def delete(self, job_id: str) -> None:
        """Remove an ended job's record; raise JOB_NOT_FOUND or JOB_NOT_ENDED."""
        await self._records.delete(job_id)
        self.changed.notify()

    def _pump(self) -> None:
        while self._queue and len(self._running) < self._config.max_running_jobs:
            job_id = self._queue.popleft()
            self._running[job_id] = asyncio.create_task(self._run(job_id), name=f"job {job_id}")

    async def _run(self, job_id: str) -> None:
        # Its log lines are the job's, not those of the call that happened to start it.
        structlog.contextvars.clear_contextvars()
        error: Failed | None
        try:
            job = self._active[job_id]
            if job.state is JobState.QUEUED:
                await self._change(job, state=JobState.RUNNING, queue_position=0, start_time=now())
                error = await self._work(job_id)
            else:  # it was cancelled between its turn and this task's first step
                error = _cancelled()
        except asyncio.CancelledError:
            error = _restarted()
        except LowbitError as failure:
            error = Failed(reason=failure.reason, message=failure.message)
        except Exception:
            log.exception("job failed", job=job_id)
            error = Failed(reason=Reason.INTERNAL, message="the server failed; see its log")
        del self._running[job_id]
        job = self._active[job_id]
        if error is None:
            await self._end(job, JobState.SUCCEEDED)
        elif job.state is JobState.CANCELLING:
            await self._end(job, JobState.CANCELLED)
        else:
            await self._end(job, JobState.FAILED, error)
        self._pump()

    async def _work(self, job_id: str) -> Failed | None:
        """Run the job's process to its end; return None once the artefact is published."""
        job = self._active[job_id]
        folder = self._config.home / "jobs"
        folder.mkdir(mode=0o700, exist_ok=True)
        spec = folder / f"{job.id}.json"
        with disk_full_is_named(folder):
            spec.write_text(job.spec.model_dump_json())
        process = await asyncio.create_subprocess_exec(
            *self._command(spec, job.id),
            stdin=asyncio.subprocess.PIPE,  # its end tells the process that we are gone
            stdout=asyncio.subprocess.PIPE,
            limit=REPORT_BYTES,
        )
        self._processes[job.id] = process
        try:
            if self._active[job.id].state is JobState.CANCELLING:
                _kill(process)
            error = await self._follow(process, job.id)
            if self._active[job.id].state is JobState.CANCELLING:
                return _cancelled()
            if error is not None:
                return error
            await self._catalog.publish(job.id, job.spec.model)
            return None
        finally:
            _kill(process)
            await process.wait()
            del self._processes[job.id]
            spec.unlink(missing_ok=True)
            await self._catalog.discard(job.id)

    async def _follow(self, process: asyncio.subprocess.Process, job_id: str) -> Failed | None:
        assert process.stdout is not None  # noqa: S101 - it was asked for
        with suppress(ValueError, ValidationError):  # a report that cannot be read is no report
            async for line in process.stdout:
                report = JOB_REPORT.validate_json(line)
                if isinstance(report, Failed):
                    return report
                if not isinstance(report, Progress):
                    return None
                await self._change(self._active[job_id], progress=report)
        _kill(process)
        code = await process.wait()
        return Failed(
            reason=Reason.JOB_PROCESS_LOST, message=f"the job's process ended with code {code}"
        )

    def _command(self, spec: Path, job_id: str) -> list[str]:
        command = [sys.executable, "-m", "lowbit_server.jobs.process", "--spec", str(spec)]
        command += ["--staging", str(self._config.home / "staging" / job_id)]
        command += ["--models", str(self._config.home / "models")]
        for root in self._config.import_roots:
            command += ["--root", str(root)]
        if self._config.scripted_models:
            command += ["--scripted"]
        return command

    async def _end(self, job: Job, state: JobState, error: Failed | None = None) -> Job:
        job = await self._change(job, state=state, error=error, queue_position=0, end_time=now())
        del self._active[job.id]
        log.info(
            "job ended",
            job=job.id,
            state=state,
            reason=error and error.reason,
            model=job.spec.model,
        )
        return job

    async def _change(self, job: Job, **values: object) -> Job:
        job = job.model_copy(update={**values, "sequence": job.sequence + 1})
        self._active[job.id] = job
        await self._records.update(job)
        self.changed.notify()
        return job


def describe_source(spec: ImportSpec | QuantizeSpec) -> str:
    """Return what a job reads, as it was given."""
    return spec.source if isinstance(spec, QuantizeSpec) else spec.path or spec.hub_id or ""


def _restarted() -> Failed:
    return Failed(
        reason=Reason.SERVER_RESTARTED, message="the server stopped while the job ran; ask again"
    )


def _cancelled() -> Failed:
    return Failed(reason=Reason.CANCELLED, message="the job was cancelled")


def _kill(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        process.kill()
