"""What scheme `auto` has measured, kept on disk from one process of a job to the next."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from lowbit_server.jobs.spec import Trial
from lowbit_server.quant.schemes import Scheme
from lowbit_server.store.checkpoint import compare
from lowbit_server.store.sealing import disk_full_is_named, replace_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

TRIALS_FILE = "trials.json"


class Made(BaseModel):
    """A candidate that was made and measured and is not the one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scheme: Scheme
    trial: Trial
    disk_bytes: int
    losses: tuple[float, ...]
    """What GPTQ lost in each decoder layer; empty for other methods."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    fingerprint: dict[str, str]
    made: tuple[Made, ...] = ()


class TrialLog:
    """The candidates of one job that were found wanting, in order."""

    def __init__(self, folder: Path, fingerprint: Mapping[str, str]) -> None:
        """Go on with what is in a folder; `fingerprint` is what it depends on, by name.

        Raises LowbitError: CHECKPOINT_MISMATCH that names what differs, DISK_FULL.
        """
        self._folder = folder
        with disk_full_is_named(folder.parent):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._record = _Record(fingerprint=dict(fingerprint))
        try:
            found = _Record.model_validate_json((folder / TRIALS_FILE).read_bytes())
        except (OSError, ValidationError):
            return  # nothing was measured yet, or it is measured again
        compare(found.fingerprint, fingerprint)
        self._record = found

    def __len__(self) -> int:
        """Return how many candidates there are."""
        return len(self._record.made)

    def __iter__(self) -> Iterator[Made]:
        """Yield them."""
        return iter(self._record.made)

    def add(self, made: Made) -> None:
        """Add one; it is durable when this returns. Raises LowbitError(DISK_FULL)."""
        self._record = self._record.model_copy(update={"made": (*self._record.made, made)})
        with disk_full_is_named(self._folder):
            replace_file(self._folder / TRIALS_FILE, self._record.model_dump_json())
