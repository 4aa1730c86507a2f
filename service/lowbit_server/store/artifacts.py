"""The artefacts on disk: one folder per model, published whole or not at all.

A job fills `staging/<job id>`; only `publish` makes it a model, by one rename. Whatever
lies in `staging` when the server starts is half-done and goes.
"""

from __future__ import annotations

import shutil
import uuid
from typing import TYPE_CHECKING

from pydantic import ValidationError

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.store.manifest import MANIFEST_FILE, Manifest, check_name
from lowbit_server.store.sealing import check_files, disk_full_is_named, sync, write_manifest

if TYPE_CHECKING:
    from pathlib import Path


class ArtifactStore:
    """Keeps models below `home`; its owner is the front, which calls it from threads."""

    def __init__(self, home: Path) -> None:
        """Create `home/models` and `home/staging`, readable for their owner only."""
        self._models = home / "models"
        self._staging = home / "staging"
        with disk_full_is_named(home if home.exists() else home.parent):
            for folder in (home, self._models, self._staging):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    @property
    def models(self) -> Path:
        """Folder that holds one folder per model."""
        return self._models

    def staging(self, job_id: str) -> Path:
        """Return the folder that a job fills; it is not created here."""
        return self._staging / check_name("job", job_id)

    def path(self, name: str) -> Path:
        """Return a model's folder, whether it exists or not."""
        return self._models / check_name("model", name)

    def publish(self, job_id: str, name: str) -> Manifest:
        """Make a staged artefact a model and return its manifest.

        Raises MODEL_EXISTS, ARTIFACT_CORRUPT when the staged files are not those of their
        manifest, DISK_FULL.
        """
        staged, target = self.staging(job_id), self.path(name)
        manifest = _read_manifest(staged)
        if manifest is None or manifest.name != name:
            raise LowbitError(
                Reason.ARTIFACT_CORRUPT,
                f"job {job_id} left no valid {MANIFEST_FILE} for model {name}",
            )
        check_files(staged, manifest, digests=False)
        if target.exists():
            raise _exists(name)
        with disk_full_is_named(self._models):
            staged.chmod(0o700)
            try:
                staged.rename(target)
            except OSError as error:
                # Renaming onto a folder that is not empty fails, so nothing is overwritten
                # even where two publish at the same time.
                if target.exists():
                    raise _exists(name) from error
                raise
            sync(self._models)
            sync(self._staging)
        return manifest

    def rewrite_manifest(self, manifest: Manifest) -> None:
        """Put another manifest in the place of a model's, whole or not at all.

        It is written in staging first: a model's folder holds only what its manifest lists.
        Raises MODEL_NOT_FOUND, DISK_FULL.
        """
        self.manifest(manifest.name)
        folder = self._staging / f"manifest-{uuid.uuid4().hex}"
        with disk_full_is_named(self._staging):
            folder.mkdir(mode=0o700)
            try:
                write_manifest(folder, manifest)
                (folder / MANIFEST_FILE).replace(self.path(manifest.name) / MANIFEST_FILE)
                sync(self.path(manifest.name))
            finally:
                shutil.rmtree(folder)

    def discard(self, job_id: str) -> None:
        """Remove what a job staged, if anything."""
        shutil.rmtree(self.staging(job_id), ignore_errors=True)

    def manifest(self, name: str) -> Manifest:
        """Return a model's manifest; raises MODEL_NOT_FOUND."""
        manifest = _read_manifest(self.path(name))
        if manifest is None or manifest.name != name:
            raise LowbitError(
                Reason.MODEL_NOT_FOUND, f"no model is named {name}", metadata={"model": name}
            )
        return manifest

    def manifests(self) -> dict[str, Manifest]:
        """Return the manifests of all models by name, read from the disk.

        A folder without a valid manifest of its own name is not a model.
        """
        found = ((path.name, _read_manifest(path)) for path in sorted(self._models.iterdir()))
        return {
            name: manifest
            for name, manifest in found
            if manifest is not None and manifest.name == name
        }

    def recover(self) -> list[str]:
        """Remove everything half-done and return its names; call before any job starts."""
        names = sorted(path.name for path in self._staging.iterdir())
        for name in names:
            path = self._staging / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        sync(self._staging)
        return names

    def delete(self, name: str) -> None:
        """Remove a model; raises MODEL_NOT_FOUND.

        It moves to staging first, so that a half-deleted model is never seen as one.
        """
        self.manifest(name)
        trash = self._staging / f"trash-{uuid.uuid4().hex}"
        self.path(name).rename(trash)
        sync(self._models)
        shutil.rmtree(trash)

    def verify(self, name: str) -> tuple[int, int]:
        """Hash a model's files again and return how many files and bytes are right.

        Raises MODEL_NOT_FOUND, ARTIFACT_CORRUPT that names the file and both digests.
        """
        manifest = self.manifest(name)
        check_files(self.path(name), manifest, digests=True)
        return len(manifest.files), manifest.disk_bytes


def _read_manifest(folder: Path) -> Manifest | None:
    try:
        return Manifest.model_validate_json((folder / MANIFEST_FILE).read_bytes())
    except (OSError, ValidationError):
        return None


def _exists(name: str) -> LowbitError:
    return LowbitError(
        Reason.MODEL_EXISTS, f"a model named {name} exists", metadata={"model": name}
    )
