"""A model on one worker, as the front knows it."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from lowbit_server.signals import Changed

if TYPE_CHECKING:
    from pathlib import Path

    from lowbit_server.errors import LowbitError


class ReplicaState(StrEnum):
    """State of a replica."""

    LOADING = "LOADING"
    LIVE = "LIVE"
    DRAINING = "DRAINING"
    GONE = "GONE"


class LoadPhase(StrEnum):
    """Stage of a load."""

    READ = "READ"
    PLACE = "PLACE"
    WARM_UP = "WARM_UP"
    LIVE = "LIVE"


class Replica:
    """Owned by its worker's handle; everybody else reads it and waits for `changed`."""

    def __init__(self, model: str, path: Path, worker: str, device: str) -> None:
        """Describe a replica whose load begins now."""
        self.model = model
        self.path = path
        self.worker = worker
        self.device = device
        self.state = ReplicaState.LOADING
        self.phase = LoadPhase.READ
        self.fraction = 0.0
        self.live_bytes = 0
        self.context_tokens = 0
        """Most tokens of prompt and output together; 0 until live."""
        self.kv_bytes = 0
        self.requests = 0
        """Outputs of requests that run or wait on it."""
        self.wanted = False
        """Whether it was live once: then it is reloaded when its worker dies."""
        self.loaders = 0
        """Calls that wait for its load."""
        self.error: LowbitError | None = None
        """Why it is GONE, when it was not unloaded."""
        self.changed = Changed()

    def __repr__(self) -> str:
        """Return the state in one word per fact."""
        return f"<Replica {self.model} on {self.worker} {self.state} requests={self.requests}>"
