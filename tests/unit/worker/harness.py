"""The front's side of the private protocol, in its simplest form."""

from __future__ import annotations

import json
import queue
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Self

import grpc

from lowbit.worker.v1 import worker_pb2 as pb
from lowbit.worker.v1.worker_pb2_grpc import WorkerServiceStub
from lowbit_server.quant.schemes import ScriptedScheme
from lowbit_server.store.manifest import MANIFEST_FILE, Manifest

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterable, Iterator
    from pathlib import Path
    from types import TracebackType

DEADLINE_S = 30.0


@dataclass(frozen=True, slots=True)
class WorkerProcess:
    """A worker and where it serves."""

    process: subprocess.Popen[str]
    socket: Path


@dataclass(slots=True)
class Ended:
    """All that came for one request."""

    tokens: list[int] = field(default_factory=list)
    finish: int = 0
    error: str = ""
    queue_us: list[int] = field(default_factory=list)
    ends: int = 0


class Front:
    """One attached stream; events are read in order by the caller."""

    def __init__(self, socket: Path, deadline_s: float = DEADLINE_S) -> None:
        """Dial a socket that may not be there yet; the stream lasts `deadline_s`."""
        self._deadline_s = deadline_s
        options = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 50)]
        self._channel = grpc.insecure_channel(f"unix:{socket}", options=options)
        self._commands: queue.SimpleQueue[pb.AttachRequest | None] = queue.SimpleQueue()
        self.results: dict[int, Ended] = defaultdict(Ended)
        self.steps: list[pb.Step] = []
        self._submitted = 0

    def __enter__(self) -> Self:
        """Attach."""
        stub = WorkerServiceStub(self._channel)
        self._events = stub.Attach(self._sent(), timeout=self._deadline_s, wait_for_ready=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Break the stream."""
        self._commands.put(None)
        self._events.cancel()
        self._channel.close()

    def _sent(self) -> Iterator[pb.AttachRequest]:
        while (command := self._commands.get()) is not None:
            yield command

    def submit(self, model: str, prompt: Iterable[int], max_tokens: int, **fields: Any) -> int:
        """Submit a greedy request and return its number."""
        self._submitted += 1
        plain = {"top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0, "n": 1}
        message = pb.Submit(
            request=self._submitted,
            model=model,
            prompt=prompt,
            max_tokens=max_tokens,
            **(plain | fields),
        )
        self._commands.put(pb.AttachRequest(submit=message))
        return self._submitted

    def cancel(self, request: int) -> None:
        """Cancel a request."""
        self._commands.put(pb.AttachRequest(cancel=pb.Cancel(request=request)))

    def load(self, model: str, path: Path) -> None:
        """Ask for a model."""
        self._commands.put(pb.AttachRequest(load=pb.Load(model=model, path=str(path))))

    def unload(self, model: str) -> None:
        """Take a model off."""
        self._commands.put(pb.AttachRequest(unload=pb.Unload(model=model)))

    def warm_up(self) -> None:
        """Have the libraries imported that weights need."""
        self._commands.put(pb.AttachRequest(warm_up=pb.WarmUp()))

    def ping(self) -> None:
        """Ask for a sign of life."""
        self._commands.put(pb.AttachRequest(ping=pb.Ping()))

    def next_event(self) -> pb.AttachResponse:
        """Return the next event; what a step made is kept in `results` too."""
        event: pb.AttachResponse = next(self._events)
        if event.HasField("step"):
            self.steps.append(event.step)
            for output in event.step.outputs:
                self._keep(output)
        return event

    def _keep(self, output: pb.Output) -> None:
        result = self.results[output.request]
        if output.token_ids and not result.tokens:
            result.queue_us.append(output.queue_us)
        result.tokens += output.token_ids
        if output.finish or output.error:
            result.finish, result.error = output.finish, output.error
            result.ends += 1

    def wait_for(self, kind: str) -> Any:
        """Read events up to the next one of a kind and return it."""
        while True:
            event = self.next_event()
            if event.WhichOneof("event") == kind:
                return getattr(event, kind)

    def finished(self, request: int) -> Ended:
        """Read events until a request has ended; return all that came for it."""
        while not self.results[request].ends:
            self.next_event()
        return self.results[request]

    def produced(self, request: int, tokens: int) -> Ended:
        """Read events until a request has at least so many tokens."""
        while len(self.results[request].tokens) < tokens:
            self.next_event()
        return self.results[request]


def write_scripted(folder: Path, *, context_tokens: int = 2048, **script: object) -> Path:
    """Write an artefact of the scripted engine and return its folder."""
    folder.mkdir()
    config = {
        "model_type": "lowbit_scripted",
        "architectures": ["ScriptedModel"],
        "max_position_embeddings": context_tokens,
        "vocab_size": 1000,
        "script": script,
    }
    manifest = Manifest(
        name=folder.name,
        revision="0" * 64,
        scheme=ScriptedScheme(),
        architecture="ScriptedModel",
        parameters=0,
        context_tokens=context_tokens,
        vocab_size=1000,
        eos_token_ids=(0,),
        files=(),
        source="script",
        source_digest="0" * 64,
        create_time=datetime(2026, 1, 1, tzinfo=UTC),
        libraries={},
    )
    (folder / "config.json").write_text(json.dumps(config))
    (folder / MANIFEST_FILE).write_text(manifest.model_dump_json())
    return folder
