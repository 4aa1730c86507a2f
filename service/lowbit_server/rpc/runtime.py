"""RuntimeService: what the server runs on and how busy it is."""

from __future__ import annotations

import asyncio
import time
from importlib import metadata
from typing import TYPE_CHECKING

from lowbit.v1 import runtime_pb2 as pb
from lowbit.v1.runtime_pb2_grpc import RuntimeServiceServicer
from lowbit_server.rpc import convert

if TYPE_CHECKING:
    from datetime import datetime

    from lowbit_server.config import Config
    from lowbit_server.jobs.manager import JobManager
    from lowbit_server.pool.pool import Pool
    from lowbit_server.rpc.context import Context
    from lowbit_server.scheduler import Scheduler

INTERVAL_S = 1.0
LIBRARIES = ("bitsandbytes", "safetensors", "tokenizers", "torch", "transformers")


class RuntimeService(RuntimeServiceServicer):
    """Reads what the pool, the scheduler and the job queue know."""

    def __init__(
        self,
        config: Config,
        pool: Pool,
        scheduler: Scheduler,
        jobs: JobManager,
        start_time: datetime,
    ) -> None:
        """Describe a server that started at `start_time`."""
        self._config = config
        self._pool = pool
        self._scheduler = scheduler
        self._jobs = jobs
        self._start_time = start_time

    async def ListDevices(
        self,
        request: pb.ListDevicesRequest,
        context: Context,
    ) -> pb.ListDevicesResponse:
        """Return every configured device."""
        return pb.ListDevicesResponse(devices=self._devices())

    async def GetServerInfo(
        self,
        request: pb.GetServerInfoRequest,
        context: Context,
    ) -> pb.GetServerInfoResponse:
        """Return versions and limits."""
        message = pb.GetServerInfoResponse(
            version=metadata.version("lowbit-server"),
            libraries=[
                pb.LibraryVersion(name=name, version=metadata.version(name)) for name in LIBRARIES
            ],
            limits=pb.Limits(
                max_message_bytes=self._config.max_message_bytes,
                max_admitted_requests=self._config.max_admitted_requests,
            ),
            import_roots=[str(root) for root in self._config.import_roots],
            draining=self._scheduler.draining,
        )
        message.start_time.FromDatetime(self._start_time)
        return message

    async def WatchRuntime(self, request: pb.WatchRuntimeRequest, context: Context) -> None:  # type: ignore[override]
        """Send a snapshot now and then at each interval."""
        given = request.HasField("interval")
        interval_s = request.interval.ToMicroseconds() / 1e6 if given else INTERVAL_S
        tokens, before = self._output_tokens(), time.monotonic()
        while True:
            made, now = self._output_tokens(), time.monotonic()
            rate = (made - tokens) / (now - before) if now > before else 0.0
            tokens, before = made, now
            await context.write(self._snapshot(rate))
            await asyncio.sleep(interval_s)

    def _snapshot(self, tokens_per_second: float) -> pb.WatchRuntimeResponse:
        running_jobs, queued_jobs = self._jobs.counts
        slots = sum(worker.running for worker in self._pool.workers)
        message = pb.WatchRuntimeResponse(
            devices=self._devices(),
            admitted_requests=self._scheduler.admitted,
            waiting_requests=max(0, self._scheduler.admitted - slots),
            output_tokens_per_second=tokens_per_second,
            running_jobs=running_jobs,
            queued_jobs=queued_jobs,
        )
        message.time.GetCurrentTime()
        return message

    def _devices(self) -> list[pb.Device]:
        return [
            convert.device(name, [one for one in self._pool.workers if one.device == name])
            for name in self._config.devices
        ]

    def _output_tokens(self) -> int:
        return sum(worker.output_tokens for worker in self._pool.workers)
