"""Verbs of ModelService."""

# gRPC keeps the deadline, over all tries of a call.
# ruff: noqa: ASYNC109

from __future__ import annotations

from typing import TYPE_CHECKING

from lowbit.messages import duration, model_source, new_request_id
from lowbit.schemes import float_type
from lowbit.v1.model_pb2 import (
    DeleteModelRequest,
    EstimateLoadRequest,
    EstimateLoadResponse,
    GetModelRequest,
    ImportModelRequest,
    ListModelsRequest,
    LoadRequest,
    Model,
    SetAliasRequest,
    UnloadRequest,
    UnloadResponse,
    VerifyModelRequest,
    VerifyModelResponse,
    WatchModelRequest,
    WatchModelResponse,
)
from lowbit.v1.model_pb2_grpc import ModelServiceStub
from lowbit.v1.quantization_pb2 import FLOAT_TYPE_UNSPECIFIED

from .stream import AsyncLoadStream, AsyncStream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from lowbit.v1.job_pb2 import Job

    from .transport import AsyncTransport

_SERVER_DRAIN_S = 30.0


class AsyncModels:
    """Keeps models in the store and puts them onto devices."""

    def __init__(self, transport: AsyncTransport) -> None:
        """Use the transport's channel."""
        self._transport = transport
        self._stub = ModelServiceStub(transport.channel)

    async def import_model(  # noqa: PLR0913 - options of one request
        self,
        name: str,
        *,
        path: str | None = None,
        hub_id: str | None = None,
        type: str | None = None,  # noqa: A002 - the field's name
        request_id: str = "",
        validate_only: bool = False,
        timeout: float | None = None,
    ) -> Job:
        """Start a job that brings a model into the store.

        Args:
            name: name of the new model; must be free.
            path: folder or GGUF file on the server. Give exactly one of path and hub_id.
            hub_id: "org/name" or "org/name@revision" of the Hugging Face hub.
            type: "fp32", "fp16" or "bf16"; type that float weights are stored in.
            request_id: makes the call idempotent; made here when empty.
            validate_only: checks everything and starts nothing; the job has no id.
            timeout: deadline of the call in seconds, not of the job.

        Raises:
            ValueError: when there is not exactly one source, or the type is unknown.
            LowbitError: when the server refuses.

        """
        request = ImportModelRequest(
            model=name,
            source=model_source(path, hub_id),
            type=FLOAT_TYPE_UNSPECIFIED if type is None else float_type(type),
            request_id=request_id or new_request_id(unless=validate_only),
            validate_only=validate_only,
        )
        response = await self._transport.call(
            self._stub.ImportModel, request, timeout_s=timeout, repeatable=True
        )
        return response.job

    async def models(self, *, page_size: int | None = None) -> AsyncIterator[Model]:
        """Iterate over all models by name, fetching page after page.

        Raises:
            LowbitError: when a page could not be fetched.

        """
        request = ListModelsRequest(page_size=page_size)
        while True:
            page = await self._transport.call(self._stub.ListModels, request, repeatable=True)
            for model in page.models:
                yield model
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def get_model(self, model: str, *, timeout: float | None = None) -> Model:
        """Return a model by name or alias; raise ModelNotFoundError when there is none."""
        response = await self._transport.call(
            self._stub.GetModel, GetModelRequest(model=model), timeout_s=timeout, repeatable=True
        )
        return response.model

    async def delete_model(self, model: str, *, timeout: float | None = None) -> None:
        """Remove a model and its aliases from the store.

        Raises:
            ModelInUseError: when it is loaded or a job reads it.
            LowbitError: when the call failed otherwise.

        """
        await self._transport.call(
            self._stub.DeleteModel, DeleteModelRequest(model=model), timeout_s=timeout
        )

    async def verify_model(
        self, model: str, *, timeout: float | None = None
    ) -> VerifyModelResponse:
        """Hash a model's files again; raise DataLossError when one differs."""
        timeout = self._transport.options.slow_call_timeout_s if timeout is None else timeout
        return await self._transport.call(
            self._stub.VerifyModel,
            VerifyModelRequest(model=model),
            timeout_s=timeout,
            repeatable=True,
        )

    async def estimate_load(
        self, model: str, *, timeout: float | None = None
    ) -> EstimateLoadResponse:
        """Return what a model would take on each device once live, from headers only.

        Raises:
            LowbitError: when there is no such model, or its files cannot be read.

        """
        return await self._transport.call(
            self._stub.EstimateLoad,
            EstimateLoadRequest(model=model),
            timeout_s=timeout,
            repeatable=True,
        )

    async def set_alias(self, alias: str, model: str, *, timeout: float | None = None) -> None:
        """Let an alias point at a model, or remove it when model is empty.

        Raises:
            LowbitError: when there is no such model, or a model has the alias's name.

        """
        request = SetAliasRequest(alias=alias, model=model)
        await self._transport.call(self._stub.SetAlias, request, timeout_s=timeout, repeatable=True)

    def load(
        self,
        model: str,
        device: str = "",
        replicas: int = 1,
        *,
        timeout: float | None = None,
    ) -> AsyncLoadStream:
        """Start to load a model and return its progress; call `wait` on it.

        Closing the stream before its end cancels the load, unless others wait for it too. A
        broken connection is opened again.

        Args:
            model: name or alias.
            device: such as "cuda:0"; empty: the one with most free memory.
            replicas: number of workers that hold it.
            timeout: deadline in seconds.

        """
        request = LoadRequest(model=model, device=device, replicas=replicas)
        timeout = self._transport.options.stream_timeout_s if timeout is None else timeout
        return AsyncLoadStream(self._transport, self._stub.Load, request, timeout)

    async def unload(
        self, model: str, *, drain_timeout: float | None = None, force: bool = False
    ) -> UnloadResponse:
        """Take a model off its devices once its streams have ended.

        Args:
            model: name or alias.
            drain_timeout: seconds that running streams may take; then they are cancelled.
            force: cancels running streams at once.

        Raises:
            LowbitError: when the call failed.

        """
        request = UnloadRequest(model=model, drain_timeout=duration(drain_timeout), force=force)
        drain_s = _SERVER_DRAIN_S if drain_timeout is None else drain_timeout
        return await self._transport.call(
            self._stub.Unload, request, timeout_s=drain_s + self._transport.options.call_timeout_s
        )

    def watch_model(self, model: str) -> AsyncStream[WatchModelResponse]:
        """Return the model now and after each change of it, until closed."""
        request = WatchModelRequest(model=model)
        return AsyncStream(self._transport.open(self._stub.WatchModel, request, None))
