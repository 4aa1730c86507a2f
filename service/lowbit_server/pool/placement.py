"""Which workers a load goes to. A plain decision, no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowbit_server.errors import LowbitError, Reason, invalid

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker as the placement sees it."""

    worker: str
    device: str
    ready: bool
    free_bytes: int
    """Free memory of its device, bytes."""
    models: int
    """Models that it holds or loads."""
    has_model: bool
    """Whether it holds or loads the model in question."""


def place(
    candidates: Sequence[Candidate], *, device: str, replicas: int, needed_bytes: int
) -> list[str]:
    """Return the names of the `replicas` workers that shall hold a model.

    Workers that hold it already come first, so that a repeated load changes nothing.
    Without a `device`, the ones whose devices have most free memory are taken. Each
    further replica on a device is counted against what is free there.

    Raises DEVICE_NOT_FOUND, INVALID_FIELD (more replicas than workers), WORKER_LOST
    (no worker is up) or INSUFFICIENT_DEVICE_MEMORY with the bytes of every device.
    """
    if device and all(candidate.device != device for candidate in candidates):
        known = ", ".join(sorted({candidate.device for candidate in candidates}))
        message = f"no device is named {device!r}; there are: {known}"
        raise LowbitError(Reason.DEVICE_NOT_FOUND, message, metadata={"device": device})
    usable = [one for one in candidates if device in ("", one.device)]
    chosen = [one.worker for one in usable if one.has_model][:replicas]
    if replicas > len(usable):
        message = f"each replica needs a worker of its own, and there are {len(usable)}"
        raise invalid("replicas", message)
    free = {one.device: one.free_bytes for one in usable}
    rest = [one for one in usable if one.ready and not one.has_model]
    while len(chosen) < replicas:
        if not rest:
            message = "no worker is up to take the model"
            raise LowbitError(Reason.WORKER_LOST, message, retry_after_s=1)
        best = max(rest, key=lambda one: (free[one.device], -one.models))
        if free[best.device] < needed_bytes:
            raise _too_big(needed_bytes, free)
        free[best.device] -= needed_bytes
        rest.remove(best)
        chosen.append(best.worker)
    return chosen


def _too_big(needed_bytes: int, free: dict[str, int]) -> LowbitError:
    listed = ", ".join(f"{name} {count}" for name, count in sorted(free.items()))
    metadata = {f"free_bytes_{name}": str(count) for name, count in free.items()}
    return LowbitError(
        Reason.INSUFFICIENT_DEVICE_MEMORY,
        f"a replica needs {needed_bytes} bytes; free: {listed}",
        metadata=metadata | {"needed_bytes": str(needed_bytes)},
    )
