"""One job at work: process after process, until one gets to an end, and what it made.

A job process fills a staging folder and reports; only this side publishes, so a job
can be killed at any moment and nothing half-done is ever loadable. What a quantization
has finished stays in its checkpoint, from which its next process goes on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.jobs.attempt import Attempt
from lowbit_server.jobs.records import JobState
from lowbit_server.jobs.spec import Failed, JobSpec, Measured, Progress, Result, Tried
from lowbit_server.quant import gate

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from lowbit_server.config import Config
    from lowbit_server.jobs.ledger import Ledger
    from lowbit_server.quant.quality import Quality
    from lowbit_server.store.catalog import Catalog
    from lowbit_server.store.manifest import Manifest

log = structlog.get_logger()

MAX_LOST_PROCESSES = 3
"""So many processes in a row may die without a block finished before their job fails."""


class Run:
    """A job's turn; its state and progress go through the ledger."""

    def __init__(self, config: Config, catalog: Catalog, ledger: Ledger, job_id: str) -> None:
        """Describe it; `to_end` starts processes."""
        self._config = config
        self._catalog = catalog
        self._ledger = ledger
        self._job_id = job_id
        self._attempt: Attempt | None = None

    def kill(self) -> None:
        """End the process at once; the job's state says whether another one follows."""
        if self._attempt is not None:
            self._attempt.kill()

    async def to_end(self) -> tuple[JobState, Failed | None]:
        """Run processes until one gets to an end; return the state and error of the job.

        Raises what publishing raises.
        """
        # Of several candidates, each begins with its first block.
        finished = len(self._ledger[self._job_id].trials), 0
        lost = 0

        async def on_report(report: Progress | Tried) -> None:
            nonlocal finished
            job = self._ledger[self._job_id]
            if isinstance(report, Tried):
                finished = len(report.trials), 0
                await self._ledger.change(job, trials=report.trials)
                return
            if report.phase == "quantize":
                finished = max(finished, (finished[0], report.done))
            await self._ledger.change(job, progress=report)

        while True:
            before = finished
            state, error = await self._try(on_report)
            if error is None or error.reason is not Reason.JOB_PROCESS_LOST:
                return state, error
            lost = 0 if finished > before else lost + 1
            if lost == MAX_LOST_PROCESSES:
                return state, error
            log.warning(
                "job process lost, another one goes on", job=self._job_id, error=error.message
            )

    async def _try(
        self, on_report: Callable[[Progress | Tried], Awaitable[None]]
    ) -> tuple[JobState, Failed | None]:
        """Run one process and publish what it staged."""
        if self._cancelling:
            return JobState.CANCELLED, None
        self._attempt = Attempt(self._config, self._ledger[self._job_id])
        try:
            result = await self._attempt.run(on_report)
            return (JobState.CANCELLED, None) if self._cancelling else await self._take(result)
        finally:
            self._attempt = None
            await self._catalog.discard(self._job_id)

    async def _take(self, result: Result) -> tuple[JobState, Failed | None]:
        """Publish what the job made or measured; return the state and error that it ends with."""
        if isinstance(result, Failed):
            return JobState.FAILED, result
        spec = self._ledger[self._job_id].spec
        if isinstance(result, Measured):
            quality: Quality | None = result.quality
            await self._catalog.set_quality(spec.model, result.quality)
            error = None
        else:
            manifest = await self._catalog.publish(self._job_id, spec.model)
            quality, error = manifest.quality, missed(spec, manifest)
        # No event of its own: it is said with the job's end.
        self._ledger.put(self._ledger[self._job_id].model_copy(update={"quality": quality}))
        return JobState.FAILED if error else JobState.SUCCEEDED, error

    @property
    def _cancelling(self) -> bool:
        return self._ledger[self._job_id].state is JobState.CANCELLING


def missed(spec: JobSpec, made: Manifest) -> Failed | None:
    """Return the limits that a published artefact misses, which was to be kept all the same."""
    if spec.kind == "quantize" and spec.gate is not None:
        try:
            gate.check(spec.gate, made.quality, made.disk_bytes)
        except LowbitError as error:
            return Failed(reason=error.reason, message=error.message)
    return None
