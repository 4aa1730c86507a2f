"""A broadcast: any number of tasks wait for the next change of something."""

from __future__ import annotations

import asyncio


class Changed:
    """Wakes every waiter at each change; holds no state of its own.

    Take `next()` before reading the state that it guards, then wait on it: a change
    between the two is not lost.
    """

    def __init__(self) -> None:
        """Make a signal with no waiters."""
        self._event = asyncio.Event()

    def notify(self) -> None:
        """Wake all that wait now."""
        self._event.set()
        self._event = asyncio.Event()

    def next(self) -> asyncio.Event:
        """Return the event that the next change sets."""
        return self._event
