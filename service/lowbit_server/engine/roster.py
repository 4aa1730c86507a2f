"""Which requests wait for slots and which outputs hold one."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

from lowbit_server.engine.finish import finish_reason
from lowbit_server.engine.request import Finish, Output, Running

if TYPE_CHECKING:
    from collections.abc import Callable

    from lowbit_server.engine.request import Request, TokenLogprob


class Roster:
    """The requests of one engine, which is its only owner; no I/O, no clock.

    Each of a request's outputs takes a slot; all get theirs at once.
    """

    def __init__(self, max_running: int) -> None:
        """Make an empty roster of `max_running` slots."""
        self._max_running = max_running
        # First come, first served. Bounded by the front, which counts every request
        # against its admission queue until the request's end has come back.
        self._waiting: deque[list[Running]] = deque()
        self.running: list[Running] = []

    @property
    def waiting(self) -> int:
        """Number of outputs that wait for a slot."""
        return sum(map(len, self._waiting))

    @property
    def has_room(self) -> bool:
        """Whether there is a slot for the next output, with nobody waiting for it."""
        return not self._waiting and len(self.running) < self._max_running

    def submit(self, request: Request, context_tokens: int) -> list[Output]:
        """Put a request at the end of the queue; return its end when it cannot run.

        Each output may have `context_tokens` with the prompt.
        """
        if not request.prompt:
            return [Output(request.id, error="the prompt is empty")]
        if request.n > self._max_running:
            error = f"{request.n} outputs are more than the {self._max_running} that may run"
            return [Output(request.id, error=error)]
        group = [
            Running(request, index=index, context_tokens=context_tokens)
            for index in range(request.n)
        ]
        if len(request.prompt) >= context_tokens:
            return [_ended(one, Finish.CONTEXT_LIMIT) for one in group]
        self._waiting.append(group)
        return []

    def admit(self, now: float, fits: Callable[[list[Running]], bool]) -> list[Running]:
        """Give the outputs of the first request slots if there are and they fit; else none.

        Nobody overtakes: a long request is not starved by short ones that fit.
        """
        if not self._waiting:
            return []
        group = self._waiting[0]
        if len(self.running) + len(group) > self._max_running or not fits(group):
            return []
        self._waiting.popleft()
        for running in group:
            running.slot_at = now
        self.running += group
        return group

    def extend(
        self, running: Running, token: int, now: float, logprob: TokenLogprob | None = None
    ) -> Output:
        """Give an output its next token; it leaves when a finish rule says so."""
        running.tokens.append(token)
        finish = finish_reason(running, now)
        if finish is not None:
            self.running.remove(running)
        request = running.request
        first = len(running.tokens) == 1
        queued = running.slot_at - request.submitted_at
        return Output(
            request.id,
            (token,),
            finish,
            queue_us=round(queued * 1e6) if first else 0,
            index=running.index,
            logprobs=() if logprob is None else (logprob,),
            cached_tokens=running.cached_tokens if first else 0,
        )

    def finish(self, running: Running, last: Output) -> Output:
        """End a request that has all its scores with the last of them."""
        self.running.remove(running)
        return replace(last, finish=Finish.MAX_TOKENS)

    def requeue(self, running: Running) -> None:
        """Let a request wait again, behind all others."""
        self.running.remove(running)
        self._waiting.append([running])

    def preempt(self, running: Running) -> None:
        """Take an output's slot; it is the next to get one."""
        self.running.remove(running)
        self._waiting.appendleft([running])

    def fail(self, running: Running, message: str, *, refused: bool = False) -> Output:
        """End an output that holds a slot with an error."""
        self.running.remove(running)
        return Output(running.request.id, error=message, index=running.index, refused=refused)

    def expire(self, now: float) -> list[Output]:
        """End all requests whose time is up, in a slot or not."""
        return self._end(lambda one: one.request.ends_by <= now, Finish.TIME_LIMIT)

    def cancel(self, request_id: int, index: int | None = None) -> list[Output]:
        """End one request, or one of its outputs; empty when it is not here (any more)."""
        return self._end(
            lambda one: one.request.id == request_id and index in (None, one.index),
            Finish.CANCELLED,
        )

    def cancel_all(self) -> list[Output]:
        """End all requests."""
        return self._end(lambda _: True, Finish.CANCELLED)

    def _end(self, ends: Callable[[Running], bool], finish: Finish) -> list[Output]:
        groups = (self.running, *self._waiting)
        ended = [one for group in groups for one in group if ends(one)]
        if ended:
            for group in groups:
                group[:] = [one for one in group if one not in ended]
            self._waiting = deque(group for group in self._waiting if group)
        return [_ended(one, finish) for one in ended]


def _ended(running: Running, finish: Finish) -> Output:
    return Output(running.request.id, finish=finish, index=running.index)
