"""What differs between asyncio and threads; sync/_grpc.py has the same names."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import grpc

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_Req = TypeVar("_Req")
_Res = TypeVar("_Res")

Channel: TypeAlias = grpc.aio.Channel
UnaryMethod: TypeAlias = "grpc.aio.UnaryUnaryMultiCallable[_Req, _Res]"
StreamMethod: TypeAlias = "grpc.aio.UnaryStreamMultiCallable[_Req, _Res]"
StreamCall: TypeAlias = "grpc.aio.UnaryStreamCall[Any, _Res]"
Read: TypeAlias = "Callable[[], Awaitable[_Res]]"

EOF: Any = grpc.aio.EOF
"""What a read returns when the stream has ended well."""

LocallyCancelled = asyncio.CancelledError
"""What a read raises when the call, or the task that reads, was cancelled here."""

sleep = asyncio.sleep


class Pause:
    """A wait that can be ended early, once and for all."""

    def __init__(self) -> None:
        """Be not ended."""
        self._ended = asyncio.Event()

    def end(self) -> None:
        """End this wait and all later ones."""
        self._ended.set()

    async def wait(self, seconds: float) -> None:
        """Wait so long, or until the end."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ended.wait()


def open_channel(
    address: str,
    options: list[tuple[str, str | int]],
    credentials: grpc.ChannelCredentials | None,
) -> Channel:
    """Open a channel of the running event loop.

    Raises:
        RuntimeError: when no event loop runs; the channel would belong to another one.

    """
    asyncio.get_running_loop()
    if credentials is None:
        return grpc.aio.insecure_channel(address, options)
    return grpc.aio.secure_channel(address, credentials, options)


def reader(call: StreamCall[_Res]) -> Read[_Res]:
    """Return what reads the next message of a call, or EOF."""
    # grpc's annotation is object: the message or EOF.
    return cast("Read[_Res]", call.read)


def task_is_cancelled() -> bool:
    """Return whether somebody cancels the task that runs this."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
