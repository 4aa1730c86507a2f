"""The events that wait to be sent to the front."""

from __future__ import annotations

from collections import deque
from threading import Condition
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowbit.worker.v1.worker_pb2 import AttachResponse


class Outbox:
    """A bounded queue from the step loop to one stream; its iterator is the stream.

    When the front reads too slowly the step loop waits in `send`, as there is nobody
    else to make tokens for; when the stream is gone `send` drops the event.
    """

    # A few seconds of steps: enough for a pause of the front, little memory.
    CAPACITY = 1024

    def __init__(self) -> None:
        """Make an open, empty outbox."""
        self._changed = Condition()
        self._events: deque[AttachResponse] = deque()
        self._open = True

    def send(self, event: AttachResponse) -> None:
        """Queue an event; waits while the queue is full."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._events) < self.CAPACITY or not self._open)
            if self._open:
                self._events.append(event)
            self._changed.notify_all()

    def close(self) -> None:
        """End the stream; whatever is queued is dropped."""
        with self._changed:
            self._open = False
            self._events.clear()
            self._changed.notify_all()

    def __iter__(self) -> Outbox:
        """Return itself: there is one stream."""
        return self

    def __next__(self) -> AttachResponse:
        """Wait for the next event; ends when the outbox is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._events or not self._open)
            if not self._open:
                raise StopIteration
            event = self._events.popleft()
            self._changed.notify_all()
            return event
