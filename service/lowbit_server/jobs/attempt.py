"""One process of a job as the front sees it: started, followed, killed."""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from pydantic import ValidationError

from lowbit_server.errors import Reason
from lowbit_server.jobs.spec import JOB_REPORT, Failed, Progress, QuantizeSpec, Tried
from lowbit_server.store.sealing import disk_full_is_named

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from lowbit_server.config import Config
    from lowbit_server.jobs.records import Job
    from lowbit_server.jobs.spec import Result

REPORT_BYTES = 1 << 20
"""Longest line that a job process may report."""


class Attempt:
    """One try at a job."""

    def __init__(self, config: Config, job: Job) -> None:
        """Describe the process; `run` starts it."""
        self._config = config
        self._job = job
        self._process: asyncio.subprocess.Process | None = None
        self._killed = False

    async def run(self, on_report: Callable[[Progress | Tried], Awaitable[None]]) -> Result:
        """Run the process to its end and return how it ended.

        A process that ends without a word has failed with JOB_PROCESS_LOST.
        """
        folder = self._config.home / "jobs"
        folder.mkdir(mode=0o700, exist_ok=True)
        # The process locks this file, so it keeps its name from one try to the next.
        spec = folder / f"{self._job.id}.json"
        with disk_full_is_named(folder):
            spec.write_text(self._job.spec.model_dump_json())
        process = await asyncio.create_subprocess_exec(
            *command(self._config, spec, self._job),
            stdin=asyncio.subprocess.PIPE,  # its end tells the process that we are gone
            stdout=asyncio.subprocess.PIPE,
            limit=REPORT_BYTES,
        )
        self._process = process
        try:
            if self._killed:
                self.kill()
            return await _follow(process, on_report)
        finally:
            self.kill()
            await process.wait()
            spec.unlink(missing_ok=True)

    def kill(self) -> None:
        """End the process at once, also one that is being started."""
        self._killed = True
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()


async def _follow(
    process: asyncio.subprocess.Process, on_report: Callable[[Progress | Tried], Awaitable[None]]
) -> Result:
    assert process.stdout is not None  # noqa: S101 - it was asked for
    with suppress(ValueError, ValidationError):  # a report that cannot be read is no report
        async for line in process.stdout:
            report = JOB_REPORT.validate_json(line)
            if not isinstance(report, Progress | Tried):
                return report
            await on_report(report)
    with suppress(ProcessLookupError):
        process.kill()
    code = await process.wait()
    return Failed(
        reason=Reason.JOB_PROCESS_LOST, message=f"the job's process ended with code {code}"
    )


def command(config: Config, spec: Path, job: Job) -> list[str]:
    """Return the command line of a job's process."""
    python: str | Path | None = sys.executable
    if isinstance(job.spec, QuantizeSpec) and job.spec.provider == "gptqmodel":
        python = config.gptqmodel_python
    line = [str(python), "-m", "lowbit_server.jobs.process", "--spec", str(spec)]
    line += ["--staging", str(config.home / "staging" / job.id)]
    line += ["--checkpoint", str(config.home / "checkpoints" / job.id)]
    line += ["--models", str(config.home / "models")]
    line += ["--cache", str(config.home / "cache")]
    line += ["--cache-bytes", str(config.evaluation_cache_bytes)]
    for root in config.import_roots:
        line += ["--root", str(root)]
    if config.scripted_models:
        line += ["--scripted"]
    return line
