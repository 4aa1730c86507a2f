"""Verbs of RuntimeService."""

# gRPC keeps the deadline, over all tries of a call.
# ruff: noqa: ASYNC109

from __future__ import annotations

from typing import TYPE_CHECKING

from lowbit.messages import duration
from lowbit.v1.runtime_pb2 import (
    Device,
    GetServerInfoRequest,
    GetServerInfoResponse,
    ListDevicesRequest,
    WatchRuntimeRequest,
    WatchRuntimeResponse,
)
from lowbit.v1.runtime_pb2_grpc import RuntimeServiceStub

from .stream import AsyncStream

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .transport import AsyncTransport


class AsyncRuntime:
    """Shows what the server runs on and how busy it is."""

    def __init__(self, transport: AsyncTransport) -> None:
        """Use the transport's channel."""
        self._transport = transport
        self._stub = RuntimeServiceStub(transport.channel)

    async def devices(self, *, timeout: float | None = None) -> Sequence[Device]:
        """Return the devices with their memory, workers and live models."""
        response = await self._transport.call(
            self._stub.ListDevices, ListDevicesRequest(), timeout_s=timeout, repeatable=True
        )
        return response.devices

    async def info(self, *, timeout: float | None = None) -> GetServerInfoResponse:
        """Return the server's versions, limits and import roots."""
        return await self._transport.call(
            self._stub.GetServerInfo, GetServerInfoRequest(), timeout_s=timeout, repeatable=True
        )

    def watch_runtime(self, interval: float | None = None) -> AsyncStream[WatchRuntimeResponse]:
        """Return snapshots of memory, queues and throughput, until closed.

        Args:
            interval: seconds between two snapshots, at least 0.1.

        """
        request = WatchRuntimeRequest(interval=duration(interval))
        return AsyncStream(self._transport.open(self._stub.WatchRuntime, request, None))
