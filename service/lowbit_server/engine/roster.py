"""Which requests wait for a slot and which hold one."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from lowbit_server.engine.finish import finish_reason
from lowbit_server.engine.request import Finish, Output, Running

if TYPE_CHECKING:
    from collections.abc import Callable

    from lowbit_server.engine.request import Request


class Roster:
    """The requests of one engine, which is its only owner; no I/O, no clock."""

    def __init__(self, max_running: int, context_tokens: int) -> None:
        """Make an empty roster of `max_running` slots."""
        self._max_running = max_running
        self._context_tokens = context_tokens
        # First come, first served. Bounded by the front, which counts every request
        # against its admission queue until the request's end has come back.
        self._waiting: deque[Running] = deque()
        self.running: list[Running] = []

    @property
    def waiting(self) -> int:
        """Number of requests that wait for a slot."""
        return len(self._waiting)

    def submit(self, request: Request) -> list[Output]:
        """Put a request at the end of the queue; return its end when it cannot run."""
        if not request.prompt:
            return [Output(request.id, error="the prompt is empty")]
        if len(request.prompt) >= self._context_tokens:
            return [Output(request.id, finish=Finish.CONTEXT_LIMIT)]
        self._waiting.append(Running(request))
        return []

    def admit(self, now: float, fits: Callable[[Running], bool]) -> Running | None:
        """Give the first in the queue a slot if there is one and it `fits`; else None.

        Nobody overtakes: a long request is not starved by short ones that fit.
        """
        full = len(self.running) >= self._max_running
        if full or not self._waiting or not fits(self._waiting[0]):
            return None
        running = self._waiting.popleft()
        running.slot_at = now
        self.running.append(running)
        return running

    def extend(self, running: Running, token: int, now: float) -> Output:
        """Give a request its next token; it leaves when a finish rule says so."""
        running.tokens.append(token)
        finish = finish_reason(running, self._context_tokens, now)
        if finish is not None:
            self.running.remove(running)
        request = running.request
        first = len(running.tokens) == 1
        queued = running.slot_at - request.submitted_at
        queue_us = round(queued * 1e6) if first else 0
        return Output(request.id, (token,), finish, queue_us)

    def fail(self, running: Running, message: str) -> Output:
        """End a request that holds a slot with an error."""
        self.running.remove(running)
        return Output(running.request.id, error=message)

    def expire(self, now: float) -> list[Output]:
        """End all requests whose time is up, in a slot or not."""
        return self._end(lambda request: request.ends_by <= now, Finish.TIME_LIMIT)

    def cancel(self, request_id: int) -> list[Output]:
        """End one request; empty when it is not here (any more)."""
        return self._end(lambda request: request.id == request_id, Finish.CANCELLED)

    def cancel_all(self) -> list[Output]:
        """End all requests."""
        return self._end(lambda _: True, Finish.CANCELLED)

    def _end(self, ends: Callable[[Request], bool], finish: Finish) -> list[Output]:
        ended = [one for one in (*self.running, *self._waiting) if ends(one.request)]
        for one in ended:
            (self.running if one in self.running else self._waiting).remove(one)
        return [Output(one.request.id, finish=finish) for one in ended]
