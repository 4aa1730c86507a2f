"""The job queue: starts processes for jobs, in order, and records what they report.

A job process fills a staging folder and reports; only this side publishes, so a job
can be killed at any moment and nothing half-done is ever loadable. What a quantization
has finished stays in its checkpoint, from which its next process goes on.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections import defaultdict, deque
from typing import TYPE_CHECKING
from uuid import uuid4

import structlog

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.jobs.attempt import Attempt
from lowbit_server.jobs.records import ENDED, Job, JobState, JobStore, now
from lowbit_server.jobs.spec import Failed, JobSpec, Measured, Progress, Result, Tried
from lowbit_server.quant import gate
from lowbit_server.signals import Changed

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

    from lowbit_server.config import Config
    from lowbit_server.quant.quality import Quality
    from lowbit_server.store.catalog import Catalog
    from lowbit_server.store.manifest import Manifest

log = structlog.get_logger()

MAX_LOST_PROCESSES = 3
"""So many processes in a row may die without a block finished before their job fails."""


class JobManager:
    """Owns the queues, one per device, and every job process."""

    def __init__(self, config: Config, catalog: Catalog, records: JobStore) -> None:
        """Run jobs on the store at `config.home`; call `start` before anything else."""
        self._config = config
        self._catalog = catalog
        self._records = records
        self._checkpoints = config.home / "checkpoints"
        self._submitting = asyncio.Lock()
        # By device; bounded by config.max_queued_jobs in `_check_room`.
        self._queues: defaultdict[str, deque[str]] = defaultdict(deque)
        self._active: dict[str, Job] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._attempts: dict[str, Attempt] = {}
        self.changed = Changed()

    async def start(self) -> None:
        """Go on with the jobs of a server that stopped or died: those that ran come first."""
        await self._remove_leftovers()
        left, _ = await self._records.page(
            [state for state in JobState if state not in ENDED], None, sys.maxsize - 1
        )
        self._active = {job.id: job for job in reversed(left)}
        models = {manifest.name: manifest for manifest in self._catalog.manifests()}
        interrupted: list[Job] = []
        queued: list[Job] = []
        for job in list(self._active.values()):
            if job.spec.kind != "evaluate" and (made := models.get(job.spec.model)):
                # The name was the job's own, so it died between publishing and its last event.
                error = _missed(job.spec, made)
                known = job.model_copy(update={"quality": made.quality})
                await self._end(known, JobState.FAILED if error else JobState.SUCCEEDED, error)
            elif job.state is JobState.CANCELLING:
                await self._end(job, JobState.CANCELLED)
            else:
                (queued if job.state is JobState.QUEUED else interrupted).append(job)
        await self._store([self._enqueue(job) for job in (*interrupted, *queued)])
        self._pump()

    async def stop(self) -> None:
        """Pause the jobs that run and end their processes; the next start goes on with them."""
        self._queues.clear()
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def counts(self) -> tuple[int, int]:
        """Jobs that run and jobs that wait."""
        return len(self._running), sum(map(len, self._queues.values()))

    def uses(self, model: str) -> str | None:
        """Return the id of a job that reads or makes a model, if there is one."""
        for job in self._active.values():
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
        """Ask a job to stop; an ended job stays as it is. Its checkpoint is kept."""
        job = await self.get(job_id)
        queue = self._queues[job.spec.device]
        if job_id in queue:
            queue.remove(job_id)
            job = await self._end(job, JobState.CANCELLED)
            await self._renumber(job.spec.device)
        elif job.state in {JobState.QUEUED, JobState.RUNNING}:
            if attempt := self._attempts.get(job_id):
                attempt.kill()
            job = await self._change(job, state=JobState.CANCELLING)
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
            await self._store([job])
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
            await self._remove_checkpoint(job_id)
        self.changed.notify()

    def _check_name(self, spec: JobSpec) -> None:
        if spec.kind == "evaluate":
            return
        self._catalog.check_free("target" if spec.kind == "quantize" else "model", spec.model)
        if any(job.spec.model == spec.model for job in self._active.values()):
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
            running = sum(self._active[one].spec.device == device for one in self._running)
            for _ in range(min(len(queue), self._config.max_running_jobs - running)):
                job_id = queue.popleft()
                self._running[job_id] = asyncio.create_task(self._run(job_id), name=f"job {job_id}")

    async def _run(self, job_id: str) -> None:
        # Its log lines are the job's, not those of the call that happened to start it.
        structlog.contextvars.clear_contextvars()
        error = None
        try:
            state, error = await self._work(job_id)
        except asyncio.CancelledError:
            cancelling = self._active[job_id].state is JobState.CANCELLING
            state = JobState.CANCELLED if cancelling else JobState.PAUSED
        except LowbitError as failure:
            state = JobState.FAILED
            error = Failed(reason=failure.reason, message=failure.message)
        except Exception:
            log.exception("job failed", job=job_id)
            state = JobState.FAILED
            error = Failed(reason=Reason.INTERNAL, message="the server failed; see its log")
        del self._running[job_id]
        job = self._active[job_id]
        if state is JobState.PAUSED:
            await self._change(job, state=state)
        else:
            await self._end(job, state, error)
        self._pump()

    async def _work(self, job_id: str) -> tuple[JobState, Failed | None]:
        """Run processes until one gets to an end; return the state and error of the job."""
        job = self._active[job_id]
        if job.state is JobState.CANCELLING:  # between its turn and this task's first step
            return JobState.CANCELLED, None
        await self._change(job, state=JobState.RUNNING, queue_position=0, start_time=now())
        await self._renumber(job.spec.device)
        finished = len(job.trials), 0  # of several candidates, each begins with its first block
        lost = 0

        async def on_report(report: Progress | Tried) -> None:
            nonlocal finished
            if isinstance(report, Tried):
                finished = len(report.trials), 0
                await self._change(self._active[job_id], trials=report.trials)
                return
            if report.phase == "quantize":
                finished = max(finished, (finished[0], report.done))
            await self._change(self._active[job_id], progress=report)

        while True:
            before = finished
            state, error = await self._attempt(job_id, on_report)
            if error is None or error.reason is not Reason.JOB_PROCESS_LOST:
                return state, error
            lost = 0 if finished > before else lost + 1
            if lost == MAX_LOST_PROCESSES:
                return state, error
            log.warning("job process lost, another one goes on", job=job_id, error=error.message)

    async def _attempt(
        self, job_id: str, on_report: Callable[[Progress | Tried], Awaitable[None]]
    ) -> tuple[JobState, Failed | None]:
        """Run one process of a job and publish what it staged."""
        job = self._active[job_id]
        if job.state is JobState.CANCELLING:
            return JobState.CANCELLED, None
        attempt = self._attempts[job_id] = Attempt(self._config, job)
        try:
            result = await attempt.run(on_report)
            if self._active[job_id].state is JobState.CANCELLING:
                return JobState.CANCELLED, None
            return await self._take(result, job_id)
        finally:
            del self._attempts[job_id]
            await self._catalog.discard(job_id)

    async def _take(self, result: Result, job_id: str) -> tuple[JobState, Failed | None]:
        """Publish what a job made or measured; return the state and error that it ends with."""
        if isinstance(result, Failed):
            return JobState.FAILED, result
        job = self._active[job_id]
        if isinstance(result, Measured):
            quality: Quality | None = result.quality
            await self._catalog.set_quality(job.spec.model, result.quality)
            error = None
        else:
            manifest = await self._catalog.publish(job_id, job.spec.model)
            quality, error = manifest.quality, _missed(job.spec, manifest)
        # No event of its own: it is said with the job's end.
        self._active[job_id] = self._active[job_id].model_copy(update={"quality": quality})
        return JobState.FAILED if error else JobState.SUCCEEDED, error

    async def _add(self, job: Job) -> None:
        await self._records.create(job)
        self._active[job.id] = job
        self._queues[job.spec.device].append(job.id)
        self._pump()

    def _enqueue(self, job: Job) -> Job:
        """Put a job at the end of its queue and return its next event."""
        queue = self._queues[job.spec.device]
        queue.append(job.id)
        place = {"state": JobState.QUEUED, "queue_position": len(queue)}
        self._active[job.id] = _next(job, **place, error=None, end_time=None)
        return self._active[job.id]

    async def _renumber(self, device: str) -> None:
        """Tell the jobs that wait for a device their places."""
        waiting = [self._active[job_id] for job_id in self._queues[device]]
        await self._store(
            [
                _next(job, queue_position=place)
                for place, job in enumerate(waiting, 1)
                if job.queue_position != place
            ]
        )

    async def _end(self, job: Job, state: JobState, error: Failed | None = None) -> Job:
        end = {"state": state, "error": error, "queue_position": 0, "end_time": now()}
        if _next(job, **end).not_resumable:
            await self._remove_checkpoint(job.id)
        # A cancel may have come between: one more event, and too late.
        job = job.model_copy(update={"sequence": self._active[job.id].sequence})
        job = await self._change(job, **end)
        log.info(
            "job ended",
            job=job.id,
            state=state,
            reason=error and error.reason,
            model=job.spec.model,
        )
        return job

    async def _change(self, job: Job, **values: object) -> Job:
        job = _next(job, **values)
        await self._store([job])
        return job

    async def _store(self, jobs: Sequence[Job]) -> None:
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

    async def _remove_checkpoint(self, job_id: str) -> None:
        await asyncio.to_thread(shutil.rmtree, self._checkpoints / job_id, ignore_errors=True)

    async def _remove_leftovers(self) -> None:
        """Remove the checkpoints that no job can go on from."""
        self._checkpoints.mkdir(mode=0o700, exist_ok=True)
        for folder in list(self._checkpoints.iterdir()):
            try:
                job = await self._records.get(folder.name)
            except LowbitError:
                why = "there is no such job"
            else:
                why = job.not_resumable if job.ended else ""
            if why:
                log.warning("removed a checkpoint", job=folder.name, why=why)
                await self._remove_checkpoint(folder.name)


def _next(job: Job, **values: object) -> Job:
    """Return the job as it is at its next event."""
    return job.model_copy(update={**values, "sequence": job.sequence + 1})


def _missed(spec: JobSpec, made: Manifest) -> Failed | None:
    """Return the limits that a published artefact misses, which was to be kept all the same."""
    if spec.kind == "quantize" and spec.gate is not None:
        try:
            gate.check(spec.gate, made.quality, made.disk_bytes)
        except LowbitError as error:
            return Failed(reason=error.reason, message=error.message)
    return None
