"""Keeps one worker alive: start, attach, watch, restart."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from typing import TYPE_CHECKING

import grpc
import structlog

from lowbit_server.pool.link import Link
from lowbit_server.pool.worker import WorkerState

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from lowbit.worker.v1.worker_pb2 import AttachResponse
    from lowbit_server.config import Config
    from lowbit_server.pool.launcher import Launcher, WorkerProcess
    from lowbit_server.pool.worker import Worker

log = structlog.get_logger()

HEALTHY_LIFE_S = 30.0
"""A worker that lived this long is restarted at once; the others wait longer and longer."""
LONGEST_PAUSE_S = 30.0


class Supervisor:
    """Runs one worker's processes, one after another, until it is stopped."""

    def __init__(self, config: Config, launcher: Launcher, worker: Worker) -> None:
        """Supervise `worker`."""
        self._config = config
        self._launcher = launcher
        self._worker = worker

    async def run(self) -> None:
        """Restart the worker whenever it dies or hangs; ends only by cancellation."""
        pause = 0.0
        while True:
            began = time.monotonic()
            try:
                why = await self._live()
            except (OSError, TimeoutError, grpc.RpcError) as error:
                why = f"{type(error).__name__}: {error}"
            finally:
                self._worker.detach()
            log.error("worker lost", worker=self._worker.name, why=why)
            lived = time.monotonic() - began
            pause = 0.0 if lived > HEALTHY_LIFE_S else min(LONGEST_PAUSE_S, pause * 2 or 0.1)
            await asyncio.sleep(pause)
            self._worker.restarts += 1

    async def _live(self) -> str:
        """Run one process to its end and return why it ended."""
        self._worker.state = WorkerState.STARTING
        process = await self._launcher.launch(self._worker.name, self._worker.device)
        link = Link(process.address)
        died = asyncio.create_task(process.wait())
        try:
            async with aclosing(link.events()) as events:
                await self._attach(link, events, process, died)
                read = asyncio.create_task(self._read(events))
                watch = asyncio.create_task(self._watch())
                try:
                    await asyncio.wait({died, read, watch}, return_when=asyncio.FIRST_COMPLETED)
                    return _why(died, read, watch)
                finally:
                    # First of all tell those who wait for tokens: cleaning up may take time.
                    self._worker.detach()
                    read.cancel()
                    watch.cancel()
                    await asyncio.gather(read, watch, return_exceptions=True)
        finally:
            process.kill()
            await died
            await link.close()

    async def _attach(
        self,
        link: Link,
        events: AsyncIterator[AttachResponse],
        process: WorkerProcess,
        died: asyncio.Task[int],
    ) -> None:
        async def greet() -> None:
            await link.connect()
            first = await anext(events)
            self._worker.attach(link, process.pid, first.ready)

        greeting = asyncio.create_task(greet())
        timeout = self._config.worker_start_timeout_s
        try:
            await asyncio.wait(
                {greeting, died}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED
            )
            if not greeting.done():
                what = f"exit code {died.result()}" if died.done() else f"silent for {timeout} s"
                message = f"the worker did not start: {what}"
                raise TimeoutError(message)
            await greeting
        finally:
            greeting.cancel()
            await asyncio.gather(greeting, return_exceptions=True)
        log.info("worker ready", worker=self._worker.name, pid=process.pid)

    async def _read(self, events: AsyncIterator[AttachResponse]) -> None:
        async for event in events:
            self._worker.handle(event)

    async def _watch(self) -> None:
        """Ping the step loop; return when it was silent for too long."""
        while True:
            await asyncio.sleep(self._config.worker_ping_interval_s)
            silent = time.monotonic() - self._worker.last_sign_of_life
            if silent > self._config.worker_hang_timeout_s:
                return
            self._worker.ping()


def _why(died: asyncio.Task[int], read: asyncio.Task[None], watch: asyncio.Task[None]) -> str:
    if died.done():
        return f"exit code {died.result()}"
    if watch.done():
        return "the step loop hangs"
    error = read.exception() if read.done() else None
    return f"the private stream broke: {error}"
