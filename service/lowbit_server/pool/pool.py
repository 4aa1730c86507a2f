"""All workers of all devices: loading, unloading and who has which model."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.pool.placement import Candidate, place
from lowbit_server.pool.replica import Replica, ReplicaState
from lowbit_server.pool.supervisor import Supervisor
from lowbit_server.pool.worker import Worker, WorkerState
from lowbit_server.signals import Changed

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lowbit_server.config import Config
    from lowbit_server.pool.launcher import Launcher


class Pool:
    """Owns the workers and their supervisors."""

    def __init__(self, config: Config, launcher: Launcher) -> None:
        """Make the workers of every configured device; `start` brings them up."""
        self.changed = Changed()
        self.workers = [
            Worker(f"{device}/{index}", device, self.changed)
            for device in config.devices
            for index in range(config.workers_per_device)
        ]
        self._supervisors = [Supervisor(config, launcher, worker) for worker in self.workers]
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Start every worker; returns at once, `ready` tells when one is up."""
        self._tasks = [
            asyncio.create_task(supervisor.run(), name="supervisor")
            for supervisor in self._supervisors
        ]

    async def stop(self) -> None:
        """End every worker."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def warm_up(self) -> None:
        """Have all workers import the libraries that weights need, once they are up."""
        for worker in self.workers:
            worker.warm_up()

    @property
    def ready(self) -> bool:
        """Whether a worker takes requests."""
        return any(worker.state is WorkerState.READY for worker in self.workers)

    def replicas(self, model: str) -> list[Replica]:
        """Return the replicas of a model, whatever their state."""
        return [worker.replicas[model] for worker in self.workers if model in worker.replicas]

    def worker(self, name: str) -> Worker:
        """Return the worker of this name."""
        return next(worker for worker in self.workers if worker.name == name)

    async def load(
        self, model: str, path: Path, *, device: str, replicas: int, needed_bytes: int
    ) -> list[Replica]:
        """Begin to load a model, or join its load; return the replicas.

        `needed_bytes` is checked against what is free. Raises as `placement.place`.
        Follow each with `follow`.
        """
        await asyncio.gather(
            *(
                _wait_gone(replica)
                for replica in self.replicas(model)
                if replica.state is ReplicaState.DRAINING
            )
        )
        if len(self.replicas(model)) < replicas:
            await self._wait_started(device)
        names = place(
            [_candidate(worker, model) for worker in self.workers],
            device=device,
            replicas=replicas,
            needed_bytes=needed_bytes,
        )
        return [self.worker(name).load(model, path) for name in names]

    async def _wait_started(self, device: str) -> None:
        """Wait while workers start: the supervisor sees to it that this ends."""
        while True:
            changed = self.changed.next()
            if not any(
                worker.state is WorkerState.STARTING and device in ("", worker.device)
                for worker in self.workers
            ):
                return
            await changed.wait()

    def leave(self, replicas: Sequence[Replica]) -> None:
        """Count a caller of a load out; stop the loads that nobody waits for any more."""
        for replica in replicas:
            replica.loaders -= 1
            if (
                replica.loaders == 0
                and replica.state is ReplicaState.LOADING
                and not replica.wanted
            ):
                # No longer LOADING, so that nobody joins what is being stopped.
                self._drain(replica)
                self.worker(replica.worker).unload(replica.model)

    async def unload(self, model: str, *, drain_timeout_s: float, force: bool) -> tuple[int, int]:
        """Take a model off every worker; return how many replicas and bytes that was.

        Takes no new requests at once; cancels those that still run after the timeout.
        """
        replicas = self.replicas(model)
        if not replicas:
            message = f"model {model!r} is not loaded"
            raise LowbitError(Reason.MODEL_NOT_LOADED, message, metadata={"model": model})
        freed = sum(replica.live_bytes for replica in replicas)
        for replica in replicas:
            self._drain(replica)
        if not force:
            idle = asyncio.gather(*(_wait_idle(replica) for replica in replicas))
            with suppress(TimeoutError):
                await asyncio.wait_for(idle, drain_timeout_s)
        for replica in replicas:
            if replica.state is not ReplicaState.GONE:
                self.worker(replica.worker).unload(model)
        await asyncio.gather(*(_wait_gone(replica) for replica in replicas))
        return len(replicas), freed

    def _drain(self, replica: Replica) -> None:
        """Let a replica take nothing new."""
        replica.state = ReplicaState.DRAINING
        replica.changed.notify()
        self.changed.notify()


def _candidate(worker: Worker, model: str) -> Candidate:
    return Candidate(
        worker=worker.name,
        device=worker.device,
        ready=worker.state is WorkerState.READY,
        free_bytes=worker.free_bytes,
        models=len(worker.replicas),
        has_model=model in worker.replicas,
    )


async def _wait_idle(replica: Replica) -> None:
    while True:
        changed = replica.changed.next()
        if not replica.requests:
            return
        await changed.wait()


async def _wait_gone(replica: Replica) -> None:
    while True:
        changed = replica.changed.next()
        if replica.state is ReplicaState.GONE:
            return
        await changed.wait()
