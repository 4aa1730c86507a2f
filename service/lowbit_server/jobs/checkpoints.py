"""The folder of checkpoints: which are kept, and for how long."""

from __future__ import annotations

import asyncio
import shutil
from typing import TYPE_CHECKING

import structlog

from lowbit_server.errors import LowbitError

if TYPE_CHECKING:
    from pathlib import Path

    from lowbit_server.jobs.records import JobStore

log = structlog.get_logger()


class Checkpoints:
    """Removes what job processes have kept once nobody can go on from it."""

    def __init__(self, folder: Path, records: JobStore) -> None:
        """Own a folder that holds one for each job of `records`."""
        self._folder = folder
        self._records = records

    async def remove(self, job_id: str) -> None:
        """Remove a job's checkpoint, if it has one."""
        await asyncio.to_thread(shutil.rmtree, self._folder / job_id, ignore_errors=True)

    async def remove_leftovers(self) -> None:
        """Remove the checkpoints that no job can go on from."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        for folder in list(self._folder.iterdir()):
            try:
                job = await self._records.get(folder.name)
            except LowbitError:
                why = "there is no such job"
            else:
                why = job.not_resumable if job.ended else ""
            if why:
                log.warning("removed a checkpoint", job=folder.name, why=why)
                await self.remove(folder.name)
