"""What the models that others are compared with say of a text, kept on disk.

One folder an entry: the logits as safetensors, in the very type that the model computed
them in, so that figures from the cache are those without it, and `entry.json`. Nothing
here is the only copy of anything: what is damaged or gone is computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from contextlib import suppress
from typing import TYPE_CHECKING
from uuid import uuid4

import structlog
from pydantic import BaseModel, ConfigDict

from lowbit_server.errors import LowbitError
from lowbit_server.store.sealing import file_digest
from lowbit_server.store.sources import shards
from lowbit_server.store.tensors import TensorReader, TensorWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from torch import Tensor

log = structlog.get_logger()

_ENTRY_FILE = "entry.json"
_PART = "part-"
# Room in a file's header; more tensors begin another file.
_EXPECTED_TENSORS = 64
# No job writes an entry for so long; what is older was left by one that was killed.
_PART_AGE_S = 24 * 3600


class Figures(BaseModel):
    """Size and speed of a model that was run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    live_bytes: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float


class _EntryFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    figures: Figures
    digests: dict[str, str]
    """SHA-256 of each file of logits."""
    tensors: int


class Entry:
    """What one model said of one text. Its files are open: it stays when it is evicted."""

    def __init__(self, folder: Path) -> None:
        """Open it; raises OSError, ValueError or LowbitError for one that is damaged."""
        description = _EntryFile.model_validate_json((folder / _ENTRY_FILE).read_bytes())
        for name, digest in description.digests.items():
            if file_digest(folder / name) != digest:
                message = f"{name} is not what was written"
                raise ValueError(message)
        self._figures = description.figures
        self._tensors = description.tensors
        self._reader = TensorReader(shards(folder))

    def figures(self) -> Figures:
        """Return the model's size and speed."""
        return self._figures

    def logits(self) -> Iterator[Tensor]:
        """Yield what was added, in its order."""
        return (self._reader.tensor(str(number)) for number in range(self._tensors))


class BaseCache:
    """Entries by key; those that were used last stay, as far as a number of bytes goes.

    Jobs share it without locks: entries appear by one rename and are never changed.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Keep at most `max_bytes` in a folder, which may not exist yet."""
        self._folder = folder
        self._max_bytes = max_bytes

    def takes(self, size: int) -> bool:
        """Whether an entry of so many bytes may be added and leaves half of the disk's room."""
        if size > self._max_bytes:
            return False
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return 2 * size <= shutil.disk_usage(self._folder).free

    def find(self, key: str) -> Entry | None:
        """Return an entry that is whole; one that is damaged is removed."""
        folder = self._folder / key
        if not folder.exists():
            return None
        try:
            entry = Entry(folder)
            os.utime(folder)
        except (OSError, ValueError, LowbitError) as error:
            log.warning("dropped a damaged evaluation", key=key, error=str(error))
            shutil.rmtree(folder, ignore_errors=True)
            return None
        return entry

    def add(self, key: str, logits: Iterable[Tensor], figures: Callable[[], Figures]) -> None:
        """Store logits as they come, then what `figures` returns; make room by eviction.

        Raises LowbitError(DISK_FULL).
        """
        part = self._folder / f"{_PART}{uuid4().hex}"
        part.mkdir(mode=0o700)
        try:
            count = 0
            with TensorWriter(part, _EXPECTED_TENSORS) as writer:
                for tensor in logits:
                    writer.write(str(count), tensor)
                    count += 1
            digests = {path.name: file_digest(path) for path in shards(part)}
            entry = _EntryFile(figures=figures(), digests=digests, tensors=count)
            (part / _ENTRY_FILE).write_text(entry.model_dump_json(), encoding="utf-8")
            self._make_room(_size(part))
            with suppress(OSError):  # another job has added it meanwhile
                part.rename(self._folder / key)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _make_room(self, size: int) -> None:
        """Remove the entries that were not used for longest, and what killed jobs left."""
        oldest = sorted(self._folder.iterdir(), key=_time)
        entries = [path for path in oldest if not path.name.startswith(_PART)]
        sizes = {path: _size(path) for path in entries}
        left = size + sum(sizes.values())
        for path in entries:
            if left > self._max_bytes:
                shutil.rmtree(path, ignore_errors=True)
                left -= sizes[path]
        for path in set(oldest) - set(entries):
            if time.time() - _time(path) > _PART_AGE_S:
                shutil.rmtree(path, ignore_errors=True)


def key_of(*facts: object) -> str:
    """Return the key of what a model said under these facts, which JSON can hold."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _size(folder: Path) -> int:
    with suppress(FileNotFoundError):  # another job evicts too
        return sum(path.stat().st_size for path in folder.iterdir())
    return 0


def _time(path: Path) -> float:
    with suppress(FileNotFoundError):
        return path.stat().st_mtime
    return 0
