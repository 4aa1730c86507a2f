"""ModelService: the store's models and where they are live."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from lowbit.v1 import model_pb2 as pb
from lowbit.v1.model_pb2_grpc import ModelServiceServicer
from lowbit_server.errors import LowbitError, Reason, invalid
from lowbit_server.jobs.spec import ImportSpec
from lowbit_server.pool.replica import Replica, ReplicaState
from lowbit_server.quant import footprint
from lowbit_server.rpc import convert, estimates, schemes
from lowbit_server.store import sources

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from lowbit_server.config import Config
    from lowbit_server.jobs.manager import JobManager
    from lowbit_server.pool.pool import Pool
    from lowbit_server.rpc.context import Context
    from lowbit_server.scheduler import Scheduler
    from lowbit_server.store.catalog import Catalog
    from lowbit_server.store.manifest import Manifest

PAGE_SIZE = 50
DRAIN_TIMEOUT_S = 30.0


class ModelService(ModelServiceServicer):
    """Thin over the catalog, the pool and the job queue."""

    def __init__(
        self, config: Config, catalog: Catalog, pool: Pool, jobs: JobManager, scheduler: Scheduler
    ) -> None:
        """Serve the models of `catalog`."""
        self._config = config
        self._catalog = catalog
        self._pool = pool
        self._jobs = jobs
        self._scheduler = scheduler

    async def Load(self, request: pb.LoadRequest, context: Context) -> None:  # type: ignore[override]
        """Begin or join a load and send its progress until every replica is live."""
        self._scheduler.check_open()
        manifest = self._catalog.resolve(request.model)
        replicas = await self._pool.load(
            manifest.name,
            self._catalog.path(manifest),
            device=request.device,
            replicas=request.replicas if request.HasField("replicas") else 1,
            needed_bytes=await asyncio.to_thread(self._needed_bytes, manifest, request.device),
        )
        for replica in replicas:
            replica.loaders += 1
        try:
            await _follow(replicas, context)
        finally:
            self._pool.leave(replicas)

    async def Unload(self, request: pb.UnloadRequest, context: Context) -> pb.UnloadResponse:
        """Drain a model and take it off."""
        given = request.HasField("drain_timeout")
        replicas, freed = await self._pool.unload(
            self._catalog.resolve(request.model).name,
            drain_timeout_s=request.drain_timeout.ToMicroseconds() / 1e6
            if given
            else DRAIN_TIMEOUT_S,
            force=request.force,
        )
        return pb.UnloadResponse(replicas=replicas, freed_bytes=freed)

    async def ImportModel(
        self,
        request: pb.ImportModelRequest,
        context: Context,
    ) -> pb.ImportModelResponse:
        """Check the source and queue the job."""
        self._scheduler.check_open()
        spec = ImportSpec(model=request.model, type=schemes.float_type(request.type))
        if request.source.WhichOneof("kind") == "path":
            source = await asyncio.to_thread(
                sources.inspect,
                request.source.path,
                self._config.import_roots,
                scripted=self._config.scripted_models,
            )
            spec = spec.model_copy(update={"path": str(source.path)})
        else:
            spec = spec.model_copy(update={"hub_id": request.source.hub_id})
        job = await self._jobs.submit(spec, request.request_id, validate_only=request.validate_only)
        return pb.ImportModelResponse(job=convert.job(job))

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        """Return one model."""
        return pb.GetModelResponse(model=self._message(self._catalog.resolve(request.model)))

    async def ListModels(
        self,
        request: pb.ListModelsRequest,
        context: Context,
    ) -> pb.ListModelsResponse:
        """Return a page of models by name; the token is the last name of the page before."""
        size = request.page_size if request.HasField("page_size") else PAGE_SIZE
        rest = [one for one in self._catalog.manifests() if one.name > request.page_token]
        page = rest[:size]
        return pb.ListModelsResponse(
            models=[self._message(manifest) for manifest in page],
            next_page_token=page[-1].name if len(rest) > size else "",
        )

    async def DeleteModel(
        self,
        request: pb.DeleteModelRequest,
        context: Context,
    ) -> pb.DeleteModelResponse:
        """Remove a model that nothing uses."""
        user = self._jobs.uses(request.model)
        if user or self._pool.replicas(request.model):
            why = f"job {user} uses it" if user else "it is loaded; unload it first"
            message = f"model {request.model!r} cannot be deleted: {why}"
            raise LowbitError(Reason.MODEL_IN_USE, message, metadata={"model": request.model})
        await self._catalog.delete(request.model)
        return pb.DeleteModelResponse()

    async def VerifyModel(
        self,
        request: pb.VerifyModelRequest,
        context: Context,
    ) -> pb.VerifyModelResponse:
        """Hash a model's files again."""
        files, count = await self._catalog.verify(self._catalog.resolve(request.model).name)
        return pb.VerifyModelResponse(files=files, bytes=count)

    async def EstimateLoad(
        self,
        request: pb.EstimateLoadRequest,
        context: Context,
    ) -> pb.EstimateLoadResponse:
        """Say what a model would take on each device, from its headers."""
        manifest = self._catalog.resolve(request.model)
        headers = await asyncio.to_thread(footprint.read, manifest, self._catalog.path(manifest))
        return estimates.load(headers, self._config.devices, self._pool.workers)

    async def SetAlias(self, request: pb.SetAliasRequest, context: Context) -> pb.SetAliasResponse:
        """Set, move or remove an alias."""
        if request.alias == request.model:
            raise invalid("alias", "an alias needs another name than its model")
        if request.model and (job := self._jobs.uses(request.alias)):
            message = f"job {job} makes a model named {request.alias!r}"
            raise LowbitError(Reason.MODEL_EXISTS, message, metadata={"model": request.alias})
        await self._catalog.set_alias(request.alias, request.model)
        return pb.SetAliasResponse()

    async def WatchModel(self, request: pb.WatchModelRequest, context: Context) -> None:  # type: ignore[override]
        """Send the model now and whenever it has changed, until it is deleted."""
        name = self._catalog.resolve(request.model).name
        sent: pb.Model | None = None
        while True:
            changes = self._catalog.changed.next(), self._pool.changed.next()
            message = self._message(self._catalog.resolve(name))
            if message != sent:
                await context.write(pb.WatchModelResponse(model=message))
                sent = message
            await _first(change.wait() for change in changes)

    def _needed_bytes(self, manifest: Manifest, device: str) -> int:
        """Estimate what a replica takes on its device, or on the one where it takes most."""
        try:
            headers = footprint.read(manifest, self._catalog.path(manifest))
        except LowbitError:  # a scripted model, or files whose load will say what is wrong
            return manifest.disk_bytes
        devices = [device] if device else self._config.devices
        return max(headers.live_bytes(one) for one in devices)

    def _message(self, manifest: Manifest) -> pb.Model:
        return convert.model(
            manifest,
            self._catalog.aliases_of(manifest.name),
            self._pool.replicas(manifest.name),
        )


async def _follow(replicas: Sequence[Replica], context: Context) -> None:
    """Send each change of the replicas' loads until all are live; raise when one is gone."""
    sent: dict[str, pb.LoadResponse] = {}
    while True:
        changes = [replica.changed.next() for replica in replicas]
        live = True
        for replica in replicas:
            if replica.state is ReplicaState.GONE:
                raise replica.error or LowbitError(
                    Reason.CANCELLED, f"the load of {replica.model!r} was stopped"
                )
            # Read with the message: the state may change while that is written.
            live = live and replica.state is ReplicaState.LIVE
            message = convert.load_progress(replica)
            last = sent.get(replica.worker)
            if message != last:
                sent[replica.worker] = message
                for skipped in _passed(last, message):
                    await context.write(skipped)
                await context.write(message)
        if live:
            return
        await _first(change.wait() for change in changes)


def _passed(last: pb.LoadResponse | None, now: pb.LoadResponse) -> Iterator[pb.LoadResponse]:
    """Yield the ends of the phases that began and ended between two messages of a load."""
    if last is not None:
        for phase in range(last.phase + 1, now.phase):
            yield pb.LoadResponse(
                device=now.device,
                worker=now.worker,
                phase=pb.LoadPhase.ValueType(phase),
                fraction=1.0,
            )


async def _first(waits: Iterable[Any]) -> None:
    """Wait for the first of several and stop waiting for the others."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
