"""The models that can be named: published artefacts and aliases.

The artefact folders are the truth; the database holds aliases and an index of the
folders, brought in line at start. Lookups are answered from memory.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import sqlalchemy as sa
import structlog

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.signals import Changed
from lowbit_server.store.database import aliases, models
from lowbit_server.store.manifest import Manifest, check_name

if TYPE_CHECKING:
    from pathlib import Path

    from lowbit_server.quant.quality import Quality
    from lowbit_server.store.artifacts import ArtifactStore
    from lowbit_server.store.database import Database

log = structlog.get_logger()


class Catalog:
    """Owns the names of a store."""

    def __init__(self, artifacts: ArtifactStore, database: Database) -> None:
        """Name the models of `artifacts`; call `start` before anything else."""
        self._artifacts = artifacts
        self._database = database
        self._manifests: dict[str, Manifest] = {}
        self._aliases: dict[str, str] = {}
        # One report at a time: each is read, changed and written.
        self._reporting = asyncio.Lock()
        self.changed = Changed()

    async def start(self) -> None:
        """Clear what a crash left behind and read what is really there."""
        for leftover in await asyncio.to_thread(self._artifacts.recover):
            log.warning("removed an unfinished artefact", staging=leftover)
        self._manifests = await asyncio.to_thread(self._artifacts.manifests)

        def query(connection: sa.Connection) -> dict[str, str]:
            known = set(connection.execute(sa.select(models.c.name)).scalars())
            for name in known - self._manifests.keys():
                connection.execute(models.delete().where(models.c.name == name))
            for name in self._manifests.keys() - known:
                connection.execute(_row(self._manifests[name]))
            return {row.alias: row.model for row in connection.execute(sa.select(aliases))}

        self._aliases = await self._database.run(query)

    def resolve(self, name: str) -> Manifest:
        """Return the model of a name or alias; raise MODEL_NOT_FOUND."""
        manifest = self._manifests.get(self._aliases.get(name, name))
        if manifest is None:
            check_name("model", name)
            message = f"no model or alias has the name {name!r}"
            raise LowbitError(Reason.MODEL_NOT_FOUND, message, metadata={"model": name})
        return manifest

    def path(self, manifest: Manifest) -> Path:
        """Return the folder of a model."""
        return self._artifacts.path(manifest.name)

    def manifests(self) -> list[Manifest]:
        """Return all models by name."""
        return [self._manifests[name] for name in sorted(self._manifests)]

    def aliases_of(self, name: str) -> list[str]:
        """Return the names that point at a model, sorted."""
        return sorted(alias for alias, model in self._aliases.items() if model == name)

    def check_free(self, field: str, name: str) -> None:
        """Raise INVALID_FIELD or MODEL_EXISTS when a new model cannot have this name."""
        check_name(field, name)
        if name in self._manifests or name in self._aliases:
            message = f"a model or alias named {name!r} exists; models are never overwritten"
            raise LowbitError(Reason.MODEL_EXISTS, message, metadata={"model": name})

    async def publish(self, job_id: str, name: str) -> Manifest:
        """Make the artefact that a job staged a model; raise MODEL_EXISTS."""
        self.check_free("model", name)
        manifest = await asyncio.to_thread(self._artifacts.publish, job_id, name)
        await self._database.run(lambda connection: connection.execute(_row(manifest)))
        self._manifests[name] = manifest
        self.changed.notify()
        return manifest

    async def set_quality(self, name: str, quality: Quality) -> None:
        """Keep a report with the model it speaks of, if it compares it with its parent.

        Its files and its revision stay. Other reports are their jobs' alone.
        """
        async with self._reporting:
            manifest = self.resolve(name)
            if (quality.base, quality.base_revision) != (manifest.parent, manifest.source_digest):
                return
            manifest = manifest.model_copy(update={"quality": quality})
            await asyncio.to_thread(self._artifacts.rewrite_manifest, manifest)
            self._manifests[manifest.name] = manifest
        self.changed.notify()

    async def discard(self, job_id: str) -> None:
        """Remove what a job staged, if anything."""
        await asyncio.to_thread(self._artifacts.discard, job_id)

    async def delete(self, name: str) -> None:
        """Remove a model, its files and its aliases; raise MODEL_NOT_FOUND for an alias too."""
        if name not in self._manifests:
            message = f"no model has the name {name!r}"
            raise LowbitError(Reason.MODEL_NOT_FOUND, message, metadata={"model": name})
        del self._manifests[name]
        self._aliases = {alias: model for alias, model in self._aliases.items() if model != name}
        await asyncio.to_thread(self._artifacts.delete, name)
        await self._database.run(
            lambda connection: connection.execute(models.delete().where(models.c.name == name))
        )
        self.changed.notify()

    async def verify(self, name: str) -> tuple[int, int]:
        """Hash a model's files again; return their number and bytes or raise ARTIFACT_CORRUPT."""
        return await asyncio.to_thread(self._artifacts.verify, name)

    async def set_alias(self, alias: str, model: str) -> None:
        """Point an alias at a model, or remove it when `model` is empty.

        Raises MODEL_EXISTS when a model has that name, MODEL_NOT_FOUND when there is
        no such model or no such alias to remove.
        """
        check_name("alias", alias)
        if alias in self._manifests:
            message = f"a model is named {alias!r}"
            raise LowbitError(Reason.MODEL_EXISTS, message, metadata={"model": alias})
        target = self.resolve(model or alias).name

        def query(connection: sa.Connection) -> None:
            connection.execute(aliases.delete().where(aliases.c.alias == alias))
            if model:
                connection.execute(aliases.insert().values(alias=alias, model=target))

        await self._database.run(query)
        self._aliases.pop(alias, None)
        if model:
            self._aliases[alias] = target
        self.changed.notify()


def _row(manifest: Manifest) -> sa.Insert:
    return models.insert().values(
        name=manifest.name,
        revision=manifest.revision,
        create_time=manifest.create_time.isoformat(),
    )
