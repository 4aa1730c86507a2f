"""What the step loop is told: commands of the front and news of the loader."""

from __future__ import annotations

from ctypes import c_int
from dataclasses import dataclass, field
from queue import Queue
from threading import Event
from typing import TYPE_CHECKING, TypeAlias

from lowbit.worker.v1 import worker_pb2 as pb

if TYPE_CHECKING:
    from pathlib import Path

    from lowbit_server.engine.engine import Engine
    from lowbit_server.engine.request import Request
    from lowbit_server.grammar.matcher import Vocabulary
    from lowbit_server.grammar.spec import Grammar
    from lowbit_server.worker.outbox import Outbox


@dataclass(frozen=True, slots=True)
class Attached:
    """A front is there."""

    outbox: Outbox


@dataclass(frozen=True, slots=True)
class Detached:
    """The front of this outbox is gone."""

    outbox: Outbox


@dataclass(frozen=True, slots=True)
class Submission:
    """A request for a model, and the grammar that its outputs follow."""

    model: str
    request: Request
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A submission whose grammar was compiled, into the request; or what was wrong with it."""

    submission: Submission
    request: Request
    error: str = ""


@dataclass(frozen=True, eq=False, slots=True)
class Ticket:
    """One load that is under way; `stop` makes it end at its next check."""

    model: str
    path: Path
    stop: Event = field(default_factory=Event)


@dataclass(frozen=True, slots=True)
class LoadAdvanced:
    """How far a load is; `fraction` of the phase, 0 to 1."""

    ticket: Ticket
    phase: int
    fraction: float


@dataclass(frozen=True, slots=True)
class LoadSucceeded:
    """A model is on the device."""

    ticket: Ticket
    engine: Engine
    live_bytes: int
    vocabulary: Vocabulary | None = None
    """Of models whose outputs can be constrained."""


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """A model could not be loaded, or its load was stopped."""

    ticket: Ticket
    message: str
    out_of_memory: bool


Command: TypeAlias = pb.Cancel | pb.Load | pb.Unload | pb.Ping | pb.WarmUp
Item: TypeAlias = (
    Attached
    | Detached
    | Submission
    | Prepared
    | Command
    | LoadAdvanced
    | LoadSucceeded
    | LoadFailed
)

# One burst of the front: every request that it may have admitted, submitted or cancelled
# at once. A full inbox makes the reader wait, and with it, by flow control, the front.
INBOX_CAPACITY = 4096


class Inbox(Queue[Item]):
    """What waits for the step loop, its only reader."""

    def __init__(self) -> None:
        """Make an empty inbox."""
        super().__init__(INBOX_CAPACITY)
        self.interrupt = c_int(0)
        """Not 0 when a request came after the loop last looked: a step may end early for it."""
