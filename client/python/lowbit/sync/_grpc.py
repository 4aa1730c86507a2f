"""What differs between threads and asyncio; aio/_grpc.py has the same names."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_Req = TypeVar("_Req")
_Res = TypeVar("_Res")

Channel: TypeAlias = grpc.Channel
UnaryMethod: TypeAlias = "grpc.UnaryUnaryMultiCallable[_Req, _Res]"
StreamMethod: TypeAlias = "grpc.UnaryStreamMultiCallable[_Req, _Res]"
StreamCall: TypeAlias = "Iterator[_Res]"
Read: TypeAlias = "Callable[[], _Res]"

EOF: Any = object()
"""What a read returns when the stream has ended well."""

LocallyCancelled = grpc.FutureCancelledError
"""Threads see a cancelled call as an RpcError; no read raises this."""

sleep = time.sleep


class Pause:
    """A wait that can be ended early, once and for all."""

    def __init__(self) -> None:
        """Be not ended."""
        self._ended = threading.Event()

    def end(self) -> None:
        """End this wait and all later ones."""
        self._ended.set()

    def wait(self, seconds: float) -> None:
        """Wait so long, or until the end."""
        self._ended.wait(seconds)


def open_channel(
    address: str,
    options: list[tuple[str, str | int]],
    credentials: grpc.ChannelCredentials | None,
) -> Channel:
    """Open a channel; it connects with the first call."""
    if credentials is None:
        return grpc.insecure_channel(address, options)
    return grpc.secure_channel(address, credentials, options)


def reader(call: StreamCall[_Res]) -> Read[_Res]:
    """Return what reads the next message of a call, or EOF."""

    def read() -> _Res:
        try:
            return next(call, EOF)
        except RuntimeError as error:
            # A control-C that meets `threading.Condition.wait` when it has let go of its lock
            # and not yet begun its `try` is hidden by the failure to release the lock again.
            if isinstance(error.__context__, KeyboardInterrupt):
                raise error.__context__ from None
            raise

    return read


def task_is_cancelled() -> bool:
    """Return False; a thread cannot be cancelled."""
    return False
