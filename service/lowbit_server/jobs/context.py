"""What every job needs to know about where it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from lowbit_server.jobs.report import Reporter


@dataclass(frozen=True, slots=True)
class Context:
    """Folders and the way to report."""

    staging: Path
    """Folder that the job fills; it may not exist yet."""
    checkpoint: Path
    """Folder of what earlier processes of the job have finished; it may not exist yet."""
    models: Path
    """Folder of the store that holds one folder per model; read only."""
    roots: tuple[Path, ...]
    """Folders that sources may be read from."""
    scripted: bool
    """Whether scripted test models may be imported."""
    reporter: Reporter
    cache: Path
    """Folder of what can be computed again; it may not exist yet."""
    cache_bytes: int
    """What evaluations may keep there."""
