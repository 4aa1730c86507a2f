"""What an artefact's `lowbit.json` says about it."""

from __future__ import annotations

import re
from datetime import datetime

from pydantic import BaseModel, ConfigDict

from lowbit_server.errors import LowbitError, invalid
from lowbit_server.quant.quality import Quality
from lowbit_server.quant.schemes import Scheme

MANIFEST_FILE = "lowbit.json"
NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]|\.(?!\.)){0,127}")


class FileEntry(BaseModel):
    """One file of an artefact."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    bytes: int
    sha256: str


class Ancestor(BaseModel):
    """A model that another was made from, as it was then."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    revision: str
    scheme: Scheme
    calibration_digest: str = ""
    source: str
    source_revision: str = ""
    source_digest: str
    source_files: tuple[FileEntry, ...] = ()
    files: tuple[FileEntry, ...]


class Manifest(BaseModel):
    """An artefact: what it holds and what it was made from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    revision: str
    """SHA-256 over the paths and digests of all files."""
    scheme: Scheme
    architecture: str
    parameters: int
    context_tokens: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    files: tuple[FileEntry, ...]
    source: str
    """Path or hub id as it was given; name of the parent for quantized models."""
    source_revision: str = ""
    """Commit of the hub that it was imported from."""
    source_digest: str
    source_files: tuple[FileEntry, ...] = ()
    """Files that it was imported from; empty for quantized models."""
    parent: str = ""
    ancestors: tuple[Ancestor, ...] = ()
    """What it was made from, the nearest first; the last is what was imported."""
    calibration_digest: str = ""
    """Digest of the calibration samples; empty where none were used."""
    quality: Quality | None = None
    create_time: datetime
    libraries: dict[str, str]
    """Name and version of the libraries that made the numbers."""

    @property
    def disk_bytes(self) -> int:
        """Size of all files, bytes."""
        return sum(file.bytes for file in self.files)

    @property
    def lineage(self) -> tuple[Ancestor, ...]:
        """The ancestors of what is made from this model: itself and its own."""
        itself = Ancestor(**{name: getattr(self, name) for name in Ancestor.model_fields})
        return (itself, *self.ancestors)


def check_name(field: str, name: str) -> str:
    """Return a model's name as it is; raise INVALID_FIELD when it cannot be one."""
    if NAME.fullmatch(name) is None:
        raise bad_name(field)
    return name


def bad_name(field: str) -> LowbitError:
    """Return the error for a name that cannot be a model's."""
    return invalid(
        field,
        "a name is 1 to 128 letters, digits, '.', '_' or '-', starts with a letter or "
        "digit and has no '..'",
    )
