"""The job queue: which jobs wait, which run, and what may be done with each.

A job that has its turn is at work in a `Run`; its events go through the `Ledger`.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from typing import TYPE_CHECKING
from uuid import uuid4

import structlog

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.jobs.checkpoints import Checkpoints
from lowbit_server.jobs.ledger import Ledger
from lowbit_server.jobs.records import Job, JobState, JobStore, now
from lowbit_server.jobs.run import Run, missed
from lowbit_server.jobs.spec import Failed, JobSpec

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from lowbit_server.config import Config
    from lowbit_server.store.catalog import Catalog

log = structlog.get_logger()


class JobManager:
    """Owns the queues, one per device, and every job process."""

    def __init__(self, config: Config, catalog: Catalog, records: JobStore) -> None:
        """Run jobs on the store at `config.home`; call `start` before anything else."""
        self._config = config
        self._catalog = catalog
        self._records = records
        self._ledger = Ledger(records)
        self._checkpoints = Checkpoints(config.home / "checkpoints", records)
        self._submitting = asyncio.Lock()
        # By device; bounded by config.max_queued_jobs in `_check_room`.
        self._queues: defaultdict[str, deque[str]] = defaultdict(deque)
        self._runs: dict[str, Run] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def start(self) -> None:
        """Go on with the jobs of a server that stopped or died: those that ran come first."""
        await self._checkpoints.remove_leftovers()
        await self._ledger.load()
        models = {manifest.name: manifest for manifest in self._catalog.manifests()}
        interrupted: list[Job] = []
        queued: list[Job] = []
        for job in self._ledger:
            if job.spec.kind != "evaluate" and (made := models.get(job.spec.model)):
                # The name was the job's own, so it died between publishing and its last event.
                error = missed(job.spec, made)
                known = job.model_copy(update={"quality": made.quality})
                await self._end(known, JobState.FAILED if error else JobState.SUCCEEDED, error)
            elif job.state is JobState.CANCELLING:
                await self._end(job, JobState.CANCELLED)
            else:
                (queued if job.state is JobState.QUEUED else interrupted).append(job)
        await self._ledger.store([self._enqueue(job) for job in (*interrupted, *queued)])
        self._pump()

    async def stop(self) -> None:
        """Pause the jobs that run and end their processes; the next start goes on with them."""
        self._queues.clear()
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def counts(self) -> tuple[int, int]:
        """Jobs that run and jobs that wait."""
        return len(self._runs), sum(map(len, self._queues.values()))

    def uses(self, model: str) -> str | None:
        """Return the id of a job that reads or makes a model, if there is one."""
        for job in self._ledger:
            if model == job.spec.model or model in job.spec.reads:
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
            self._check_name(spec)
            self._check_room()
            job = Job(
                id=uuid4().hex,
                spec=spec,
                request_id=request_id,
                queue_position=len(self._queues[spec.device]) + 1,
                create_time=now(),
            )
            if validate_only:
                return job.model_copy(update={"id": ""})
            await asyncio.shield(self._add(job))
        log.info("job queued", job=job.id, kind=spec.kind, model=spec.model)
        return job

    async def watch(self, job_id: str, after: int) -> AsyncGenerator[Job]:
        """Yield the job as it was at each event after `after`; end with the job.

        Every watcher reads the same stored events, so all see the same sequence.
        """
        while True:
            changed = self._ledger.changed.next()
            job = await self._records.get(job_id)
            for event in await self._records.events(job_id, after):
                after = event.sequence
                yield event
            if job.ended:
                return
            await changed.wait()

    async def get(self, job_id: str) -> Job:
        """Return a job; raise JOB_NOT_FOUND."""
        return await self._ledger.get(job_id)

    async def cancel(self, job_id: str) -> Job:
        """Ask a job to stop; an ended job stays as it is. Its checkpoint is kept."""
        job = await self.get(job_id)
        queue = self._queues[job.spec.device]
        if job_id in queue:
            queue.remove(job_id)
            job = await self._end(job, JobState.CANCELLED)
            await self._renumber(job.spec.device)
        elif job.state in {JobState.QUEUED, JobState.RUNNING}:
            if run := self._runs.get(job_id):
                run.kill()
            job = await self._ledger.change(job, state=JobState.CANCELLING)
        return job

    async def resume(self, job_id: str) -> Job:
        """Queue an ended job again and return it.

        Raises JOB_NOT_FOUND, JOB_NOT_RESUMABLE, MODEL_EXISTS when its name has been taken,
        MODEL_NOT_FOUND when its source is gone, or QUEUE_FULL.
        """
        async with self._submitting:
            job = await self.get(job_id)
            self._check_resumable(job)
            self._check_room()
            job = self._enqueue(job)
            self._pump()
            await self._ledger.store([job])
        log.info("job resumed", job=job.id, model=job.spec.model)
        return job

    def resumable(self, job: Job) -> bool:
        """Return whether `resume` would take a job now, if there is room in the queue."""
        try:
            self._check_resumable(job)
        except LowbitError:
            return False
        return True

    async def delete(self, job_id: str) -> None:
        """Remove an ended job's record and checkpoint; raise JOB_NOT_FOUND or JOB_NOT_ENDED."""
        async with self._submitting:
            await self._records.delete(job_id)
            await self._checkpoints.remove(job_id)
        self._ledger.changed.notify()

    def _check_name(self, spec: JobSpec) -> None:
        if spec.kind == "evaluate":
            return
        self._catalog.check_free("target" if spec.kind == "quantize" else "model", spec.model)
        if any(job.spec.model == spec.model for job in self._ledger):
            message = f"a job that makes {spec.model!r} is under way"
            raise LowbitError(Reason.MODEL_EXISTS, message, metadata={"model": spec.model})

    def _check_room(self) -> None:
        _, waiting = self.counts
        if waiting >= self._config.max_queued_jobs:
            message = f"{waiting} jobs wait already"
            raise LowbitError(Reason.QUEUE_FULL, message, retry_after_s=30)

    def _check_resumable(self, job: Job) -> None:
        if why := job.not_resumable:
            raise LowbitError(Reason.JOB_NOT_RESUMABLE, f"job {job.id} cannot be resumed: {why}")
        self._check_name(job.spec)
        for model in job.spec.reads:
            self._catalog.resolve(model)

    def _pump(self) -> None:
        for device, queue in self._queues.items():
            running = sum(self._ledger[one].spec.device == device for one in self._runs)
            for _ in range(min(len(queue), self._config.max_running_jobs - running)):
                job_id = queue.popleft()
                self._runs[job_id] = Run(self._config, self._catalog, self._ledger, job_id)
                self._tasks[job_id] = asyncio.create_task(self._run(job_id), name=f"job {job_id}")

    async def _run(self, job_id: str) -> None:
        # Its log lines are the job's, not those of the call that happened to start it.
        structlog.contextvars.clear_contextvars()
        error = None
        try:
            job = self._ledger[job_id]
            if job.state is not JobState.CANCELLING:  # since its turn came
                begin = {"state": JobState.RUNNING, "queue_position": 0, "start_time": now()}
                await self._ledger.change(job, **begin)
                await self._renumber(job.spec.device)
            state, error = await self._runs[job_id].to_end()
        except asyncio.CancelledError:
            cancelling = self._ledger[job_id].state is JobState.CANCELLING
            state = JobState.CANCELLED if cancelling else JobState.PAUSED
        except LowbitError as failure:
            state = JobState.FAILED
            error = Failed(reason=failure.reason, message=failure.message)
        except Exception:
            log.exception("job failed", job=job_id)
            state = JobState.FAILED
            error = Failed(reason=Reason.INTERNAL, message="the server failed; see its log")
        del self._runs[job_id], self._tasks[job_id]
        job = self._ledger[job_id]
        if state is JobState.PAUSED:
            await self._ledger.change(job, state=state)
        else:
            await self._end(job, state, error)
        self._pump()

    async def _add(self, job: Job) -> None:
        await self._ledger.add(job)
        self._queues[job.spec.device].append(job.id)
        self._pump()

    def _enqueue(self, job: Job) -> Job:
        """Put a job at the end of its queue and return its next event."""
        queue = self._queues[job.spec.device]
        queue.append(job.id)
        place = {"state": JobState.QUEUED, "queue_position": len(queue)}
        job = job.next(**place, error=None, end_time=None)
        self._ledger.put(job)
        return job

    async def _renumber(self, device: str) -> None:
        """Tell the jobs that wait for a device their places."""
        waiting = [self._ledger[job_id] for job_id in self._queues[device]]
        await self._ledger.store(
            [
                job.next(queue_position=place)
                for place, job in enumerate(waiting, 1)
                if job.queue_position != place
            ]
        )

    async def _end(self, job: Job, state: JobState, error: Failed | None = None) -> Job:
        end = {"state": state, "error": error, "queue_position": 0, "end_time": now()}
        if job.next(**end).not_resumable:
            await self._checkpoints.remove(job.id)
        # A cancel may have come between: one more event, and too late.
        job = job.model_copy(update={"sequence": self._ledger[job.id].sequence})
        job = await self._ledger.change(job, **end)
        log.info(
            "job ended",
            job=job.id,
            state=state,
            reason=error and error.reason,
            model=job.spec.model,
        )
        return job
