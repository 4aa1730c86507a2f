"""One place in a pool: a worker process after another, and what runs on it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import structlog

from lowbit.v1 import model_pb2
from lowbit.worker.v1 import worker_pb2 as wire
from lowbit_server.errors import LowbitError, Reason
from lowbit_server.pool.replica import LoadPhase, Replica, ReplicaState

if TYPE_CHECKING:
    from pathlib import Path

    from lowbit_server.pool.link import Link
    from lowbit_server.pool.stream import RequestStream
    from lowbit_server.signals import Changed

log = structlog.get_logger()


class WorkerState(StrEnum):
    """State of a worker process."""

    STARTING = "STARTING"
    READY = "READY"
    LOST = "LOST"


@dataclass(slots=True, eq=False)
class _Entry:
    """A request that is on its way; `left` of its outputs have not ended."""

    stream: RequestStream
    replica: Replica
    left: int


class Worker:
    """Owns the replicas and requests of one worker.

    The supervisor attaches a link when a process is up and detaches it when the
    process is lost; in between, events change what is here.
    """

    def __init__(self, name: str, device: str, changed: Changed) -> None:
        """Make a worker without a process; `changed` tells the pool of every change."""
        self.name = name
        self.device = device
        self.description = ""
        self.state = WorkerState.STARTING
        self.pid = 0
        self.restarts = 0
        self.warm = False
        """Whether the process has imported the libraries that weights need."""
        self.resident_bytes = 0
        self.total_bytes = 0
        self.free_bytes = 0
        self.waiting = 0
        """Outputs that the worker has not given a slot yet."""
        self.output_tokens = 0
        """Tokens made since the server started."""
        self.last_sign_of_life = time.monotonic()
        self.replicas: dict[str, Replica] = {}
        self._requests: dict[int, _Entry] = {}
        self._link: Link | None = None
        self._warms_up = False
        self._changed = changed

    def __repr__(self) -> str:
        """Return the state in one word per fact."""
        return f"<Worker {self.name} {self.state} requests={len(self._requests)}>"

    @property
    def requests(self) -> int:
        """Outputs of requests that run or wait on it."""
        return sum(entry.left for entry in self._requests.values())

    @property
    def running(self) -> int:
        """Outputs that hold a slot, as of the last step."""
        return max(0, self.requests - self.waiting)

    def submit(self, command: wire.Submit, stream: RequestStream) -> None:
        """Run a request; its outputs go to `stream`. The model must be live here."""
        replica = self.replicas[command.model]
        replica.requests += command.n
        self._requests[command.request] = _Entry(stream, replica, command.n)
        self._send(wire.AttachRequest(submit=command))

    def release(self, request: int) -> None:
        """Forget a request; cancel it when it has not ended."""
        if self._forget(request) is not None:
            self._send(wire.AttachRequest(cancel=wire.Cancel(request=request)))

    def cancel_output(self, request: int, index: int) -> None:
        """Cancel one of a request's outputs."""
        if request in self._requests:
            self._send(wire.AttachRequest(cancel=wire.Cancel(request=request, index=index)))

    def load(self, model: str, path: Path) -> Replica:
        """Begin to load a model and return its replica; return the one that is there."""
        replica = self.replicas.get(model)
        if replica is None:
            replica = self.replicas[model] = Replica(model, path, self.name, self.device)
            self._send_load(replica)
            self._changed.notify()
        return replica

    def unload(self, model: str) -> None:
        """Take a model off or stop its load; its replica becomes GONE."""
        if self._link is None and (replica := self.replicas.get(model)):
            self._gone(replica, None)  # a lost worker has nothing to take off
        self._send(wire.AttachRequest(unload=wire.Unload(model=model)))

    def warm_up(self) -> None:
        """Have this process and the next ones import the libraries that weights need."""
        self._warms_up = True
        self._send(wire.AttachRequest(warm_up=wire.WarmUp()))

    def ping(self) -> None:
        """Ask the step loop for a sign of life."""
        self._send(wire.AttachRequest(ping=wire.Ping()))

    def attach(self, link: Link, pid: int, ready: wire.Ready) -> None:
        """Take a process that is up; load again what was live on the last one.

        The worker is READY with its first pong: only then its free memory is known.
        """
        self._link = link
        self.pid = pid
        self.description = ready.description
        self.last_sign_of_life = time.monotonic()
        if self._warms_up:
            self.warm_up()
        for replica in self.replicas.values():
            self._send_load(replica)
        self.ping()

    def detach(self) -> None:
        """Take note that the process is lost: end its requests, keep what shall be reloaded."""
        if self.state is WorkerState.LOST:
            return
        self._link = None
        self.state, self.warm = WorkerState.LOST, False
        self.pid = self.waiting = self.resident_bytes = 0
        for request in list(self._requests):
            stream = self._requests[request].stream
            self._forget(request)
            stream.fail(LowbitError(Reason.WORKER_LOST, f"worker {self.name} died"))
        for replica in list(self.replicas.values()):
            if replica.wanted and replica.state is ReplicaState.LIVE:
                replica.state, replica.phase = ReplicaState.LOADING, LoadPhase.READ
                replica.fraction, replica.kv_bytes = 0.0, 0
                replica.changed.notify()
            else:  # a load that took the worker with it is not tried again by itself
                self._gone(replica, LowbitError(Reason.WORKER_LOST, f"worker {self.name} died"))
        self._changed.notify()

    def handle(self, event: wire.AttachResponse) -> None:
        """Apply one event of the process."""
        match event.WhichOneof("event"):
            case "step":
                self._step(event.step)
            case "pong":
                self._pong(event.pong)
            case "load_progress":
                self._progress(event.load_progress)
            case "loaded":
                self._loaded(event.loaded)
            case "load_failed":
                self._load_failed(event.load_failed)
            case "unloaded":
                if replica := self.replicas.get(event.unloaded.model):
                    self._gone(replica, None)

    def _step(self, step: wire.Step) -> None:
        self.waiting = step.waiting
        for output in step.outputs:
            self.output_tokens += len(output.token_ids)
            if (entry := self._requests.get(output.request)) is None:
                continue  # released while the step was on its way
            if output.error or (output.finish and entry.left == 1):
                self._forget(output.request)
            elif output.finish:
                entry.left -= 1
                entry.replica.requests -= 1
            entry.stream.put(output)

    def _pong(self, pong: wire.Pong) -> None:
        self.last_sign_of_life = time.monotonic()
        self.resident_bytes = pong.resident_bytes
        self.total_bytes, self.free_bytes = pong.total_bytes, pong.free_bytes
        self.warm = pong.warm
        if self.state is not WorkerState.READY:
            self.state = WorkerState.READY
            self._changed.notify()
        for use in pong.kv:
            if replica := self.replicas.get(use.model):
                replica.kv_bytes = use.kv_bytes

    def _progress(self, progress: wire.LoadProgress) -> None:
        if replica := self.replicas.get(progress.model):
            name = model_pb2.LoadPhase.Name(progress.phase).removeprefix("LOAD_PHASE_")
            replica.phase, replica.fraction = LoadPhase(name), progress.fraction
            replica.changed.notify()

    def _loaded(self, loaded: wire.Loaded) -> None:
        if replica := self.replicas.get(loaded.model):
            if replica.state is ReplicaState.LOADING:  # not when it shall be unloaded again
                replica.state = ReplicaState.LIVE
            replica.phase, replica.fraction = LoadPhase.LIVE, 1.0
            replica.live_bytes, replica.wanted = loaded.live_bytes, True
            replica.context_tokens = loaded.context_tokens
            log.info("model live", model=loaded.model, worker=self.name, bytes=loaded.live_bytes)
            replica.changed.notify()
            self.ping()  # free memory has changed
            self._changed.notify()

    def _load_failed(self, failed: wire.LoadFailed) -> None:
        if replica := self.replicas.get(failed.model):
            reason = (
                Reason.INSUFFICIENT_DEVICE_MEMORY if failed.out_of_memory else Reason.LOAD_FAILED
            )
            free = {f"free_bytes_{self.device}": str(self.free_bytes)}
            metadata = free if failed.out_of_memory else {}
            log.error("load failed", model=failed.model, worker=self.name, error=failed.message)
            self._gone(replica, LowbitError(reason, failed.message, metadata=metadata))

    def _gone(self, replica: Replica, error: LowbitError | None) -> None:
        del self.replicas[replica.model]
        replica.state, replica.error = ReplicaState.GONE, error
        replica.changed.notify()
        self._changed.notify()

    def _forget(self, request: int) -> Replica | None:
        entry = self._requests.pop(request, None)
        if entry is None:
            return None
        replica = entry.replica
        replica.requests -= entry.left
        if not replica.requests:
            replica.changed.notify()
        return replica

    def _send_load(self, replica: Replica) -> None:
        load = wire.Load(model=replica.model, path=str(replica.path))
        self._send(wire.AttachRequest(load=load))

    def _send(self, command: wire.AttachRequest) -> None:
        if self._link is not None:  # a lost worker has nothing to command
            self._link.send(command)
