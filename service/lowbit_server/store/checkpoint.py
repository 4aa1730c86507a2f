"""What a job has finished, kept on disk from one process to the next.

    HOME/checkpoints/<job>/checkpoint.json    what counts: fingerprint, files and their digests
                           block-00003/       the tensors that block 3 became
                           state-00003/       what the method needs after block 3

A block is synced before checkpoint.json names it, and that file is replaced by one rename:
whatever moment a process dies at, the blocks that count are whole. A checkpoint whose files
were damaged later, which their digests show, is begun anew.

Imports torch: for job processes only.
"""

from __future__ import annotations

import hashlib
import shutil
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.store.manifest import FileEntry
from lowbit_server.store.sealing import disk_full_is_named, replace_file, seal_files, sync
from lowbit_server.store.tensors import TensorReader, TensorWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    import torch

CHECKPOINT_FILE = "checkpoint.json"

_Part = tuple[FileEntry, ...]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    fingerprint: dict[str, str]
    threads: int
    blocks: tuple[_Part, ...] = ()
    state: _Part = ()


class _Sealed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str
    record: _Record


class Checkpoint:
    """The finished blocks of one job and the state after the last of them."""

    def __init__(self, folder: Path, fingerprint: Mapping[str, str], threads: int) -> None:
        """Go on with the checkpoint in a folder, or begin one there.

        `fingerprint` is everything that the blocks' bits depend on, by name. `threads` is
        kept for a checkpoint that begins here.

        Raises LowbitError: CHECKPOINT_MISMATCH that names what differs, DISK_FULL.
        """
        self._folder = folder
        with disk_full_is_named(folder.parent.parent):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = _read(folder)
        if found is not None:
            compare(found.fingerprint, fingerprint)
        if found is None or not self._is_whole(found):
            found = _Record(fingerprint=dict(fingerprint), threads=threads)
        self._record = found
        self._clear()

    def __len__(self) -> int:
        """Return how many blocks are finished."""
        return len(self._record.blocks)

    @property
    def threads(self) -> int:
        """Compute threads of the first process; sums depend on how they are split up."""
        return self._record.threads

    @property
    def bytes(self) -> int:
        """Size of the finished blocks on disk."""
        return sum(file.bytes for part in self._record.blocks for file in part)

    def commit(
        self,
        tensors: Iterable[tuple[str, torch.Tensor]],
        state: Callable[[], Mapping[str, torch.Tensor]],
        expected_tensors: int,
    ) -> None:
        """Write the next block as its tensors come; it is durable when this returns.

        `state` is called behind the last tensor. Raises LowbitError(DISK_FULL).
        """
        number = len(self)
        block = self._write(self._block(number), tensors, expected_tensors)
        values = state()
        part = self._write(self._state(number), values.items(), len(values)) if values else ()
        blocks = (*self._record.blocks, block)
        record = self._record.model_copy(update={"blocks": blocks, "state": part})
        with disk_full_is_named(self._folder):
            sealed = _Sealed(sha256=_digest(record), record=record)
            replace_file(self._folder / CHECKPOINT_FILE, sealed.model_dump_json())
        self._record = record
        if number:
            shutil.rmtree(self._state(number - 1), ignore_errors=True)

    def block(self, number: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield names and tensors of a finished block; their memory is the mapped file's."""
        with TensorReader(_shards(self._block(number))) as reader:
            for name in reader.entries:
                yield name, reader.tensor(name)

    def state(self) -> dict[str, torch.Tensor]:
        """Return the state after the last finished block; empty where there is none."""
        if not self._record.state:
            return {}
        with TensorReader(_shards(self._state(len(self) - 1))) as reader:
            return {name: reader.tensor(name) for name in reader.entries}

    def _write(
        self, folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], expected: int
    ) -> _Part:
        with disk_full_is_named(self._folder):
            folder.mkdir(mode=0o700)
        with TensorWriter(folder, expected) as writer:
            for name, tensor in tensors:
                writer.write(name, tensor)
        part = seal_files(folder)
        with disk_full_is_named(self._folder):
            sync(folder)
        return part

    def _is_whole(self, record: _Record) -> bool:
        # All or nothing: only the newest state is kept, and no earlier block goes on without.
        return all(
            _holds(self._block(number), part) for number, part in enumerate(record.blocks)
        ) and (not record.state or _holds(self._state(len(record.blocks) - 1), record.state))

    def _clear(self) -> None:
        """Remove what the record does not name."""
        kept = {self._block(number).name for number in range(len(self))}
        if kept:
            kept |= {CHECKPOINT_FILE, self._state(len(self) - 1).name}
        for path in self._folder.iterdir():
            if path.name in kept:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _block(self, number: int) -> Path:
        return self._folder / f"block-{number:05}"

    def _state(self, number: int) -> Path:
        return self._folder / f"state-{number:05}"


def _read(folder: Path) -> _Record | None:
    try:
        sealed = _Sealed.model_validate_json((folder / CHECKPOINT_FILE).read_bytes())
    except (OSError, ValidationError):
        return None
    return sealed.record if sealed.sha256 == _digest(sealed.record) else None


def _digest(record: _Record) -> str:
    return hashlib.sha256(record.model_dump_json().encode()).hexdigest()


def _holds(folder: Path, part: _Part) -> bool:
    try:
        return folder.is_dir() and seal_files(folder) == part
    except (OSError, LowbitError):
        return False


def _shards(folder: Path) -> list[Path]:
    # A block without tensors has no file.
    return sorted(folder.glob("*.safetensors"))


def compare(found: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    """Raise CHECKPOINT_MISMATCH that names how two fingerprints differ, if they do."""
    fields = [
        name for name in sorted(found.keys() | wanted.keys()) if found.get(name) != wanted.get(name)
    ]
    if fields:
        differing = (
            f"{name} was {found.get(name, 'not set')}, is {wanted.get(name, 'not set')}"
            for name in fields
        )
        raise LowbitError(
            Reason.CHECKPOINT_MISMATCH,
            f"the checkpoint was made from other inputs: {'; '.join(differing)}",
            metadata={"fields": ", ".join(fields)},
        )
