"""Makes a folder of files durable and describes it: digests, fsync, `lowbit.json`."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.store.manifest import MANIFEST_FILE, FileEntry, Manifest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def disk_full_is_named(folder: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Turn "no space left" into DISK_FULL with the needed and the free bytes.

    Raises LowbitError(DISK_FULL).
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        free_bytes = shutil.disk_usage(folder).free
        needed = "" if needed_bytes is None else f" {needed_bytes} bytes were to be written,"
        message = f"the disk of {folder} is full:{needed} {free_bytes} bytes are free"
        metadata = {"free_bytes": str(free_bytes)}
        if needed_bytes is not None:
            metadata["needed_bytes"] = str(needed_bytes)
        raise LowbitError(Reason.DISK_FULL, message, metadata=metadata) from error


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal_files(folder: Path) -> tuple[FileEntry, ...]:
    """Hash and fsync every file of a folder, sorted by path; `lowbit.json` is left out.

    Raises LowbitError(DISK_FULL).
    """
    entries = []
    with disk_full_is_named(folder):
        for path in _files(folder):
            sync(path)
            relative = path.relative_to(folder).as_posix()
            entries.append(
                FileEntry(path=relative, bytes=path.stat().st_size, sha256=file_digest(path))
            )
    return tuple(entries)


def revision_of(entries: Iterable[FileEntry]) -> str:
    """Return the SHA-256 over the sorted paths and digests of an artefact's files."""
    lines = sorted(f"{entry.path}\0{entry.sha256}\n" for entry in entries)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `lowbit.json` as the last file of a folder and fsync both.

    Raises LowbitError(DISK_FULL).
    """
    path = folder / MANIFEST_FILE
    with disk_full_is_named(folder):
        path.write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        sync(path)
        sync(folder)


def check_files(folder: Path, manifest: Manifest, *, digests: bool) -> None:
    """Compare a folder with its manifest: names, sizes and, when asked for, digests.

    Raises LowbitError(ARTIFACT_CORRUPT) that names the file.
    """
    found = {path.relative_to(folder).as_posix() for path in _files(folder)}
    listed = {entry.path for entry in manifest.files}
    for path in sorted(found ^ listed):
        what = "is missing" if path in listed else "is not in the manifest"
        raise _corrupt(manifest.name, path, what)
    for entry in manifest.files:
        size = (folder / entry.path).stat().st_size
        if size != entry.bytes:
            raise _corrupt(
                manifest.name, entry.path, f"has {size} bytes, the manifest says {entry.bytes}"
            )
        if digests and (digest := file_digest(folder / entry.path)) != entry.sha256:
            raise _corrupt(
                manifest.name, entry.path, f"has SHA-256 {digest}, the manifest says {entry.sha256}"
            )


def replace_file(path: Path, text: str) -> None:
    """Write a file, or nothing of it: the old one is there until the new one is durable.

    Whatever else is in its folder by then reaches the disk before it.
    """
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    sync(part)
    sync(path.parent)
    part.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST_FILE
    )


def _corrupt(name: str, path: str, what: str) -> LowbitError:
    return LowbitError(
        Reason.ARTIFACT_CORRUPT,
        f"model {name}: file {path} {what}",
        metadata={"model": name, "file": path},
    )
