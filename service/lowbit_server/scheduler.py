"""Admission of requests and choice of their worker."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from lowbit_server.errors import LowbitError, Reason, invalid
from lowbit_server.pool.replica import Replica, ReplicaState
from lowbit_server.pool.stream import RequestStream
from lowbit_server.signals import Changed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lowbit.worker.v1.worker_pb2 import Submit
    from lowbit_server.config import Config
    from lowbit_server.pool.pool import Pool

RETRY_QUEUE_S = 0.5
RETRY_LOADING_S = 1.0
RETRY_DRAINING_S = 5.0


def choose(model: str, replicas: Sequence[Replica]) -> Replica:
    """Return the live replica with the fewest requests.

    Raises MODEL_LOADING while none is live but one is on its way, else MODEL_NOT_LOADED.
    """
    live = [replica for replica in replicas if replica.state is ReplicaState.LIVE]
    if live:
        return min(live, key=lambda replica: replica.requests)
    if any(replica.state is ReplicaState.LOADING for replica in replicas):
        message = f"model {model!r} is being loaded"
        raise LowbitError(
            Reason.MODEL_LOADING,
            message,
            metadata={"model": model},
            retry_after_s=RETRY_LOADING_S,
        )
    message = f"model {model!r} is not loaded; call Load first"
    raise LowbitError(Reason.MODEL_NOT_LOADED, message, metadata={"model": model})


class Admission:
    """Places among the admitted requests; they end once, whoever ends them first."""

    def __init__(self, count: Callable[[int], None], places: int, context_tokens: int) -> None:
        """Take some places; `count` adds to the number of places taken."""
        self._count = count
        self._places = places
        self.context_tokens = context_tokens
        """Most tokens of prompt and output together."""
        self._ended = False
        count(places)

    def end(self) -> None:
        """Give the places back."""
        if not self._ended:
            self._ended = True
            self._count(-self._places)


class Run(NamedTuple):
    """A request on a worker."""

    replica: Replica
    stream: RequestStream
    cancel_output: Callable[[int], None]
    """Cancels the output with this index; the others go on."""


class Scheduler:
    """Owns the admission count; everything else it asks of the pool."""

    def __init__(self, config: Config, pool: Pool) -> None:
        """Admit requests to the models of `pool`."""
        self._limit = config.max_admitted_requests
        self._most_outputs = min(config.max_admitted_requests, config.max_running_requests)
        self._buffer_tokens = config.stream_buffer_tokens
        self._pool = pool
        self._numbers = itertools.count(1)
        self.admitted = 0
        """Requests that run or wait; each of a request's outputs counts as one."""
        self.draining = False
        """Set by the server when it shall admit nothing new."""
        self._left = Changed()

    @contextmanager
    def admit(self, model: str, outputs: int = 1) -> Iterator[Admission]:
        """Hold an admission for a request of some outputs to a model while the block runs.

        Raises SHUTTING_DOWN, QUEUE_FULL, MODEL_LOADING or MODEL_NOT_LOADED at once: nothing
        waits for admission. Raises INVALID_FIELD for more outputs than ever run at one time.
        """
        self.check_open()
        if outputs > self._most_outputs:
            message = f"this server runs at most {self._most_outputs} outputs of a request"
            raise invalid("sampling.n", message)
        if self.admitted + outputs > self._limit:
            message = f"{self.admitted} requests run or wait already"
            raise LowbitError(Reason.QUEUE_FULL, message, retry_after_s=RETRY_QUEUE_S)
        replica = choose(model, self._pool.replicas(model))
        admission = Admission(self._count, outputs, replica.context_tokens)
        try:
            yield admission
        finally:
            admission.end()

    @contextmanager
    def run(self, admission: Admission, submit: Submit) -> Iterator[Run]:
        """Run an admitted request on the best replica while the block runs.

        Leaving the block early cancels the request. So does a reader that stalls: its
        slot and its admission are free at once, although its call cannot end before
        the client reads or goes away. Raises as `admit`, since the replica may be gone.
        """
        replica = choose(submit.model, self._pool.replicas(submit.model))
        worker = self._pool.worker(replica.worker)
        submit.request = next(self._numbers)

        def free() -> None:
            worker.release(submit.request)
            admission.end()

        stream = RequestStream(self._buffer_tokens * submit.n, on_stall=free)
        worker.submit(submit, stream)
        try:
            yield Run(replica, stream, partial(worker.cancel_output, submit.request))
        finally:
            worker.release(submit.request)

    def _count(self, change: int) -> None:
        self.admitted += change
        self._left.notify()

    async def wait_idle(self, timeout_s: float) -> None:
        """Return when no request is left, or after `timeout_s`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.admitted:
                    await self._left.next().wait()

    def check_open(self) -> None:
        """Raise SHUTTING_DOWN when the server drains."""
        if self.draining:
            message = "the server is shutting down"
            raise LowbitError(Reason.SHUTTING_DOWN, message, retry_after_s=RETRY_DRAINING_S)
