"""When a failed call is tried again, and after how long. No I/O happens here.

A call is tried again when the server cannot have acted on it, or when acting twice
is the same as acting once:

- The answer carries RetryInfo: the server refused and says when to ask again.
- UNAVAILABLE, and no connection could be made: nothing was sent.
- UNAVAILABLE, and the call is repeatable: it only reads, or a second one has the
  same effect, or its request_id lets the server recognise it.

Streams never get here once their first message has arrived.
"""

from __future__ import annotations

import random
import time
from threading import Lock
from typing import TYPE_CHECKING

import grpc

if TYPE_CHECKING:
    from lowbit.errors import LowbitError
    from lowbit.options import ClientOptions

_REFUND = 0.1
# gRPC's words where every address refused; the Python API has no other sign of it.
_NOT_CONNECTED = "failed to connect to all addresses"


class RetryBudget:
    """Retries that a client has left. Safe to share between threads."""

    def __init__(self, size: int) -> None:
        """Start with `size` retries."""
        self._size = float(size)
        self._left = self._size
        self._lock = Lock()

    def spend(self) -> bool:
        """Take one retry; return whether there was one."""
        with self._lock:
            if self._left < 1:
                return False
            self._left -= 1
            return True

    def refund(self) -> None:
        """Give back a tenth of a retry after a success."""
        if self._left < self._size:
            with self._lock:
                self._left = min(self._size, self._left + _REFUND)


class Retrier:
    """The tries of one call."""

    def __init__(
        self,
        options: ClientOptions,
        budget: RetryBudget,
        *,
        timeout_s: float | None,
        repeatable: bool,
        once: bool = False,
    ) -> None:
        """Start the clock; `timeout_s` bounds all tries together, `once` allows only one."""
        self._options = options
        self._max_attempts = 1 if once else options.max_attempts
        self._budget = budget
        self._repeatable = repeatable
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._tries = 1

    def remaining_s(self) -> float | None:
        """Return the seconds that are left, at least 0; None without a deadline."""
        if self._deadline is None:
            return None
        return max(0.0, self._deadline - time.monotonic())

    def succeeded(self) -> None:
        """Note that the server took the call."""
        self._budget.refund()

    def delay_s(self, error: LowbitError) -> float | None:
        """Return the seconds to wait before the next try; None when there is to be none."""
        if self._tries >= self._max_attempts or not self._is_safe(error):
            return None
        if error.retry_after_s is None:
            delay = backoff_s(self._options, self._tries)
        else:  # later than asked for, never earlier, and not all clients at once
            delay = error.retry_after_s * random.uniform(1.0, 1.1)  # noqa: S311 - no secret
        remaining = self.remaining_s()
        if remaining is not None and delay >= remaining:
            return None
        if not self._budget.spend():
            return None
        self._tries += 1
        return delay

    def _is_safe(self, error: LowbitError) -> bool:
        if error.retry_after_s is not None:
            return True
        if error.code is not grpc.StatusCode.UNAVAILABLE:
            return False
        return self._repeatable or error.message.startswith(_NOT_CONNECTED)


def backoff_s(options: ClientOptions, tries: int) -> float:
    """Return a random wait after so many tries, between half the bound and the bound."""
    bound = min(options.max_backoff_s, options.first_backoff_s * 2.0 ** (tries - 1))
    return bound * random.uniform(0.5, 1.0)  # noqa: S311 - no secret
