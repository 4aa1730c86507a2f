"""The tokens of one request on their way from a worker to its RPC."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from lowbit_server.errors import LowbitError, Reason

if TYPE_CHECKING:
    from collections.abc import Callable

    from lowbit.worker.v1.worker_pb2 import Output


class RequestStream:
    """A bounded buffer: the worker's reader puts, the RPC takes.

    The bound is in tokens. A reader that lags further behind is failed, since waiting
    for it would stall every other stream of the worker.
    """

    def __init__(self, limit_tokens: int, on_stall: Callable[[], object]) -> None:
        """Hold at most `limit_tokens`; call `on_stall` once when more would be needed."""
        self._limit = limit_tokens
        self._on_stall = on_stall
        self._pending: list[Output] = []
        self._tokens = 0
        self._error: LowbitError | None = None
        self._wake = asyncio.Event()
        self.stalled = False

    def put(self, output: Output) -> None:
        """Add what a step made."""
        if self.stalled:
            return
        self._tokens += len(output.token_ids)
        if self._tokens > self._limit:
            self.stalled = True
            self._pending.clear()
            self.fail(_stalled(self._limit))
            self._on_stall()
            return
        self._pending.append(output)
        self._wake.set()

    def fail(self, error: LowbitError) -> None:
        """End the stream with an error, after what is pending."""
        self._error = error
        self._wake.set()

    async def take(self) -> list[Output]:
        """Wait for outputs and return all that are pending; raise the stream's error."""
        if not self._pending and self._error is None:
            self._wake.clear()
            await self._wake.wait()
        if not self._pending and self._error is not None:
            raise self._error
        pending, self._pending, self._tokens = self._pending, [], 0
        return pending


def _stalled(limit: int) -> LowbitError:
    return LowbitError(
        Reason.CLIENT_STALLED,
        f"the client left more than {limit} tokens unread; read faster or ask for fewer",
    )
