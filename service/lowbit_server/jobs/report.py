"""What a job process tells the front: progress, at a bounded rate, and how it ended."""

from __future__ import annotations

import resource
import time
from typing import TYPE_CHECKING, TextIO

from lowbit_server.jobs.spec import Progress

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydantic import BaseModel

    from lowbit_server.jobs.spec import Phase

MIN_INTERVAL_S = 0.1


class Reporter:
    """Writes reports as JSON lines; about ten a second and every change of phase."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        """Write to `stream`; `clock` gives seconds."""
        self._stream = stream
        self._clock = clock
        self._phase: Phase = "download"
        self._total = self._before = 0
        self._started = self._sent = clock()

    def phase(self, phase: Phase, total: int = 0, done: int = 0, done_bytes: int = 0) -> None:
        """Begin a phase of `total` units, 0 while unknown, behind what was done before."""
        self._phase, self._total, self._before = phase, total, done
        self._started = self._clock()
        self._progress(done, done_bytes)

    def progress(self, done: int, done_bytes: int = 0) -> None:
        """Say how many units and bytes of the phase are done."""
        if done == self._total or self._clock() - self._sent >= MIN_INTERVAL_S:
            self._progress(done, done_bytes)

    def send(self, report: BaseModel) -> None:
        """Write one report and flush it."""
        self._stream.write(report.model_dump_json() + "\n")
        self._stream.flush()

    def _progress(self, done: int, done_bytes: int) -> None:
        self._sent = self._clock()
        # The time that the rest takes at the pace of this phase so far.
        here = done - self._before
        known = here > 0 and done <= self._total
        eta_s = (self._sent - self._started) / here * (self._total - done) if known else None
        self.send(
            Progress(
                phase=self._phase,
                done=done,
                total=self._total,
                bytes=done_bytes,
                eta_s=eta_s,
                peak_memory_bytes=peak_memory_bytes(),
            )
        )


def peak_memory_bytes() -> int:
    """Return the highest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
