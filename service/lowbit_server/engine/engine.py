"""What the step loop asks of an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from lowbit_server.engine.request import Output, Request


class Status(NamedTuple):
    """How an engine stands."""

    due: float | None
    """When its next step is due, seconds of the monotonic clock; None without work."""
    running: int
    waiting: int
    kv_bytes: int


class Engine(Protocol):
    """Runs the requests of one live model. All calls come from the step loop's thread."""

    context_tokens: int
    """Most tokens of prompt and output together."""

    def submit(self, request: Request) -> list[Output]:
        """Queue a request; return its end when it cannot run."""

    def cancel(self, request_id: int, index: int | None = None) -> list[Output]:
        """End one request now, or one of its outputs; empty when it is unknown."""

    def cancel_all(self) -> list[Output]:
        """End all requests now and return their ends."""

    def step(self) -> list[Output]:
        """Make at most one token for each output that holds a slot.

        A failure ends the requests it concerns with an error and is not raised.
        """

    def status(self) -> Status:
        """Return how the engine stands."""
