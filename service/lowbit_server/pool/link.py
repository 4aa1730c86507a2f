"""The private bidirectional stream to one worker process."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc

from lowbit.worker.v1.worker_pb2_grpc import WorkerServiceStub

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from lowbit.worker.v1.worker_pb2 import AttachRequest, AttachResponse

_OPTIONS = [
    # A prompt of a million tokens is the largest message; step messages are tiny.
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    # The socket appears some time after the process: look often.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 200),
]


class Link:
    """Sends commands without waiting and yields the worker's events."""

    def __init__(self, address: str) -> None:
        """Prepare a link to the worker at the gRPC target `address`."""
        self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        # Bounded by what is sent: one Submit and one Cancel per admitted request, one
        # Load and one Unload per replica, and pings.
        self._outbox: asyncio.Queue[AttachRequest] = asyncio.Queue()

    async def connect(self) -> None:
        """Wait until the worker serves."""
        await self._channel.channel_ready()

    def send(self, command: AttachRequest) -> None:
        """Queue a command; commands reach the worker in order."""
        self._outbox.put_nowait(command)

    async def events(self) -> AsyncGenerator[AttachResponse]:
        """Attach, write what `send` queues, and yield events until the stream breaks."""
        call = WorkerServiceStub(self._channel).Attach()

        async def write() -> None:
            while True:
                await call.write(await self._outbox.get())

        writer = asyncio.create_task(write())
        try:
            async for event in call:
                yield event
        finally:
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
            call.cancel()

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()
