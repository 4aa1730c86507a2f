"""What a worker's handle and the pool make of a worker's events; no process runs."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from lowbit.v1 import model_pb2
from lowbit.worker.v1 import worker_pb2 as wire
from lowbit_server.config import Config
from lowbit_server.errors import LowbitError, Reason
from lowbit_server.pool.pool import Pool
from lowbit_server.pool.replica import Replica, ReplicaState
from lowbit_server.pool.stream import RequestStream
from lowbit_server.pool.worker import Worker, WorkerState

if TYPE_CHECKING:
    from lowbit_server.pool.launcher import Launcher
    from lowbit_server.pool.link import Link

MODEL, FOLDER = "model", Path("/models/model")


class FakeLink:
    """Keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[wire.AttachRequest] = []

    def send(self, command: wire.AttachRequest) -> None:
        self.sent.append(command)

    def take(self) -> list[str]:
        """Return the kinds of what was sent since the last time; pings left out."""
        kinds = [str(command.WhichOneof("command")) for command in self.sent]
        self.sent.clear()
        return [kind for kind in kinds if kind != "ping"]


def event(**fields: Any) -> wire.AttachResponse:
    return wire.AttachResponse(**fields)


def pong(free_bytes: int = 1 << 30) -> wire.AttachResponse:
    return event(pong=wire.Pong(free_bytes=free_bytes, total_bytes=1 << 31, resident_bytes=1))


def live(worker: Worker) -> Replica:
    """Make the model live on a worker."""
    replica = worker.load(MODEL, FOLDER)
    worker.handle(event(loaded=wire.Loaded(model=MODEL, live_bytes=7)))
    return replica


def attach(worker: Worker) -> FakeLink:
    link = FakeLink()
    worker.attach(cast("Link", link), 42, wire.Ready(device="cpu", description="a processor"))
    worker.handle(pong())
    return link


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    """A pool whose processes nobody starts."""
    return Pool(Config(home=tmp_path), cast("Launcher", None))


@pytest.fixture
def worker(pool: Pool) -> Worker:
    return pool.workers[0]


async def load(pool: Pool, needed_bytes: int = 1) -> list[Replica]:
    return await pool.load(MODEL, FOLDER, device="", replicas=1, needed_bytes=needed_bytes)


async def test_a_worker_is_ready_once_its_free_memory_is_known(pool: Pool, worker: Worker) -> None:
    worker.attach(cast("Link", FakeLink()), 42, wire.Ready(device="cpu"))
    loading = asyncio.create_task(load(pool))
    await asyncio.sleep(0)
    assert not loading.done()  # and not refused for want of memory
    assert not pool.ready
    changed = pool.changed.next()
    worker.handle(pong())
    assert changed.is_set()
    assert pool.ready
    assert (await loading)[0].state is ReplicaState.LOADING


async def test_a_load_does_not_wait_for_a_lost_worker(pool: Pool, worker: Worker) -> None:
    worker.detach()
    with pytest.raises(LowbitError) as caught:
        await load(pool)
    assert caught.value.reason is Reason.WORKER_LOST
    assert caught.value.retry_after_s


async def test_a_load_that_nobody_waits_for_is_stopped_and_joined_by_nobody(
    pool: Pool, worker: Worker
) -> None:
    link = attach(worker)
    (first,) = await load(pool)
    first.loaders += 1
    pool.leave([first])
    assert link.take() == ["load", "unload"]
    again = asyncio.create_task(load(pool))
    await asyncio.sleep(0)
    assert not again.done()
    # The worker was faster than the command that stops it.
    worker.handle(event(loaded=wire.Loaded(model=MODEL)))
    worker.handle(event(unloaded=wire.Unloaded(model=MODEL)))
    (second,) = await again
    assert first.state is ReplicaState.GONE
    assert second is not first
    assert second.state is ReplicaState.LOADING
    assert link.take() == ["load"]


async def test_a_load_goes_on_while_another_caller_waits(pool: Pool, worker: Worker) -> None:
    link = attach(worker)
    (replica,) = await load(pool)
    assert (await load(pool)) == [replica]
    replica.loaders += 2
    pool.leave([replica])
    assert replica.state is ReplicaState.LOADING
    assert link.take() == ["load"]


async def test_a_live_model_stays_when_the_callers_of_its_load_leave(
    pool: Pool, worker: Worker
) -> None:
    attach(worker)
    replica = live(worker)
    replica.loaders += 1
    pool.leave([replica])
    assert replica.state is ReplicaState.LIVE
    assert replica.live_bytes == 7


async def test_a_lost_worker_ends_its_requests_and_reloads_what_was_live(worker: Worker) -> None:
    attach(worker)
    replica = live(worker)
    stream = RequestStream(16, lambda: None)
    worker.submit(wire.Submit(request=1, model=MODEL, n=1), stream)
    assert (replica.requests, worker.requests) == (1, 1)
    worker.detach()
    assert worker.state is WorkerState.LOST
    assert (replica.requests, worker.requests, worker.running) == (0, 0, 0)
    assert replica.state is ReplicaState.LOADING
    with pytest.raises(LowbitError) as caught:
        await stream.take()
    assert caught.value.reason is Reason.WORKER_LOST
    assert attach(worker).take() == ["load"]
    worker.handle(event(loaded=wire.Loaded(model=MODEL, live_bytes=8)))
    assert replica.state is ReplicaState.LIVE


async def test_every_process_of_a_worker_warms_up(pool: Pool, worker: Worker) -> None:
    pool.warm_up()  # no process is up yet
    assert attach(worker).take() == ["warm_up"]
    worker.handle(event(pong=wire.Pong(warm=True)))
    assert worker.warm
    worker.detach()
    assert not worker.warm
    assert attach(worker).take() == ["warm_up"]


async def test_a_load_that_took_its_worker_along_is_not_repeated(worker: Worker) -> None:
    attach(worker)
    replica = worker.load(MODEL, FOLDER)
    worker.detach()
    assert replica.state is ReplicaState.GONE
    assert replica.error is not None
    assert replica.error.reason is Reason.WORKER_LOST
    assert attach(worker).take() == []


async def test_a_model_can_be_unloaded_while_its_worker_is_lost(pool: Pool, worker: Worker) -> None:
    attach(worker)
    live(worker)
    worker.detach()
    async with asyncio.timeout(5):
        assert (await pool.unload(MODEL, drain_timeout_s=1, force=False))[0] == 1
    assert not pool.replicas(MODEL)
    assert attach(worker).take() == []


async def test_a_failed_load_says_why(worker: Worker) -> None:
    attach(worker)
    for out_of_memory, reason in (
        (False, Reason.LOAD_FAILED),
        (True, Reason.INSUFFICIENT_DEVICE_MEMORY),
    ):
        replica = worker.load(MODEL, FOLDER)
        failed = wire.LoadFailed(model=MODEL, message="why", out_of_memory=out_of_memory)
        worker.handle(event(load_failed=failed))
        assert replica.state is ReplicaState.GONE
        assert replica.error is not None
        assert (replica.error.reason, replica.error.message) == (reason, "why")
        assert not worker.replicas


async def test_progress_reaches_the_replica(worker: Worker) -> None:
    attach(worker)
    replica = worker.load(MODEL, FOLDER)
    changed = replica.changed.next()
    progress = wire.LoadProgress(model=MODEL, phase=model_pb2.LOAD_PHASE_PLACE, fraction=0.5)
    worker.handle(event(load_progress=progress))
    assert changed.is_set()
    assert (replica.phase, replica.fraction) == ("PLACE", 0.5)


async def test_releasing_a_request_cancels_it_unless_it_has_ended(worker: Worker) -> None:
    link = attach(worker)
    live(worker)
    link.take()
    stream = RequestStream(16, lambda: None)
    for request, finish in ((1, 0), (2, 3)):
        worker.submit(wire.Submit(request=request, model=MODEL, n=1), stream)
        output = wire.Output(request=request, token_ids=[5], finish=finish)
        worker.handle(event(step=wire.Step(outputs=[output])))
        worker.release(request)
        worker.release(request)
    assert link.take() == ["submit", "cancel", "submit"]
    assert worker.output_tokens == 2
    assert worker.requests == 0
    # A step that was on its way when the request was released.
    worker.handle(event(step=wire.Step(outputs=[wire.Output(request=1, token_ids=[6])])))


async def test_a_request_ends_with_its_last_output(worker: Worker) -> None:
    link = attach(worker)
    replica = live(worker)
    stream = RequestStream(16, lambda: None)
    worker.submit(wire.Submit(request=1, model=MODEL, n=3), stream)
    assert (replica.requests, worker.requests) == (3, 3)
    for left, index in ((2, 1), (1, 0)):
        output = wire.Output(request=1, index=index, token_ids=[5], finish=3)
        worker.handle(event(step=wire.Step(outputs=[output])))
        assert (replica.requests, worker.requests) == (left, left)
    link.take()
    worker.cancel_output(1, 2)
    assert [(one.cancel.request, one.cancel.index) for one in link.sent] == [(1, 2)]
    worker.handle(event(step=wire.Step(outputs=[wire.Output(request=1, index=2, finish=6)])))
    assert (replica.requests, worker.requests) == (0, 0)
    worker.cancel_output(1, 2)
    assert link.take() == ["cancel"]
    assert [output.index for output in await stream.take()] == [1, 0, 2]


async def test_a_failed_output_ends_its_request(worker: Worker) -> None:
    attach(worker)
    replica = live(worker)
    stream = RequestStream(16, lambda: None)
    worker.submit(wire.Submit(request=1, model=MODEL, n=3), stream)
    outputs = [wire.Output(request=1, index=index, error="broken") for index in range(3)]
    worker.handle(event(step=wire.Step(outputs=outputs)))
    assert (replica.requests, worker.requests) == (0, 0)
    assert len(await stream.take()) == 1


async def test_events_of_a_model_that_is_gone_are_ignored(worker: Worker) -> None:
    attach(worker)
    for late in (
        event(loaded=wire.Loaded(model=MODEL)),
        event(load_failed=wire.LoadFailed(model=MODEL)),
        event(load_progress=wire.LoadProgress(model=MODEL, phase=1)),
        event(unloaded=wire.Unloaded(model=MODEL)),
    ):
        worker.handle(late)
    assert not worker.replicas
