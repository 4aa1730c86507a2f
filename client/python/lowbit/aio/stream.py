"""The streams that a client returns. Each one is cancelled when closed or dropped."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from grpc import StatusCode

from lowbit.chunk import Chunk
from lowbit.errors import CancelledError, UnavailableError
from lowbit.retry import backoff_s
from lowbit.v1.job_pb2 import WatchJobRequest, WatchJobResponse
from lowbit.v1.model_pb2 import LoadResponse

from ._grpc import EOF, sleep

if TYPE_CHECKING:
    from lowbit.v1.generation_pb2 import (
        Completed,
        FinishReason,
        GenerateResponse,
        OutputFinished,
        Started,
        Timings,
        Usage,
    )

    from ._grpc import StreamMethod
    from .transport import AsyncReceiver, AsyncTransport

_Res = TypeVar("_Res")
_Item = TypeVar("_Item")


class _AsyncStream(Generic[_Res, _Item]):
    """The life of a stream: it runs from its creation until its end or `close`."""

    def __init__(self, receiver: AsyncReceiver[Any, _Res]) -> None:
        self._receiver = receiver
        self._ended = False

    def __aiter__(self) -> Self:
        """Return the stream itself; it can be iterated once."""
        return self

    async def __anext__(self) -> _Item:
        """Return the next item; raise LowbitError when the stream failed."""
        raise NotImplementedError

    def close(self) -> None:
        """Cancel the call if it still runs; reading on then raises CancelledError."""
        if not self._ended:
            self._receiver.cancel()

    def cancel(self) -> None:
        """Do what `close` does."""
        self.close()

    async def __aenter__(self) -> Self:
        """Return the stream."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the stream."""
        self.close()

    def __del__(self) -> None:
        """Close a stream that nobody holds any more."""
        # Its event loop or the interpreter may be gone; then so is the call.
        with contextlib.suppress(Exception):
            self.close()


class AsyncStream(_AsyncStream[_Res, _Res]):
    """A stream of messages, as `watch_model` and `watch_runtime` return it."""

    async def __anext__(self) -> _Res:
        """Return the next message; raise LowbitError when the stream failed."""
        if self._ended:
            raise StopAsyncIteration
        message = await self._receiver.read()
        if message is EOF:
            self._ended = True
            raise StopAsyncIteration
        return message


class AsyncLoadStream(AsyncStream[LoadResponse]):
    """Progress of a load. The load is cancelled with its last reader."""

    async def wait(self) -> list[LoadResponse]:
        """Read to the end; return the last message of each replica.

        Raises:
            LowbitError: when the load failed.

        """
        last = {}
        async for message in self:
            last[message.device, message.worker] = message
        return list(last.values())


class AsyncGenerateStream(_AsyncStream["GenerateResponse", Chunk]):
    """A generation. Iterating gives chunks; the attributes fill as it goes on."""

    def __init__(self, receiver: AsyncReceiver[Any, GenerateResponse]) -> None:
        """Follow a call that was started."""
        super().__init__(receiver)
        self.started: Started | None = None
        """Model revision, device and prompt tokens; None until the first read."""
        self.finished: OutputFinished | None = None
        """Why the output ended and at which stop; None until then."""
        self._completed: Completed | None = None
        self._parts: list[str] = []

    async def __anext__(self) -> Chunk:
        """Return the next chunk.

        Raises:
            LowbitError: when the generation failed; `partial_text` keeps what came.

        """
        while not self._ended:
            message = await self._receiver.read()
            if message is EOF:
                self._ended = True
                break
            event = message.WhichOneof("event")
            if event == "delta":
                delta = message.delta
                self._parts.append(delta.text)
                ids = tuple([token.id for token in delta.tokens]) if delta.tokens else ()
                return Chunk(delta.text, ids, delta.output_index)
            if event == "output_finished":
                self.finished = message.output_finished
            elif event == "started":
                self.started = message.started
            elif event == "completed":
                self._completed = message.completed
        raise StopAsyncIteration

    async def text(self) -> str:
        """Read to the end; return the whole text, chunks that were read before included.

        Raises:
            LowbitError: when the generation failed; `partial_text` keeps what came.

        """
        async for _ in self:
            pass
        return self.partial_text

    @property
    def partial_text(self) -> str:
        """Text that has been read so far."""
        return "".join(self._parts)

    @property
    def finish_reason(self) -> FinishReason.ValueType | None:
        """Why the output ended; None until it has."""
        return self.finished.reason if self.finished else None

    @property
    def usage(self) -> Usage | None:
        """Tokens used; None until the stream has ended well."""
        return self._completed.usage if self._completed else None

    @property
    def timings(self) -> Timings | None:
        """Where the time went; None until the stream has ended well."""
        return self._completed.timings if self._completed else None


class AsyncJobStream(_AsyncStream[WatchJobResponse, WatchJobResponse]):
    """Events of a job. A broken connection is opened again after the last event."""

    def __init__(
        self,
        transport: AsyncTransport,
        method: StreamMethod[WatchJobRequest, WatchJobResponse],
        request: WatchJobRequest,
    ) -> None:
        """Start to watch."""
        super().__init__(transport.open(method, request, None))
        self._transport = transport
        self._method = method
        self._request = request
        self._closed = False
        self._seen = False
        self.sequence = request.after_sequence
        """Sequence number of the last event that was read."""

    async def __anext__(self) -> WatchJobResponse:
        """Return the next event.

        Raises:
            LowbitError: when the job cannot be watched; UnavailableError when the server
                cannot be reached at first, or not again within `resume_timeout_s`.

        """
        if self._ended:
            raise StopAsyncIteration
        try:
            event = await self._receiver.read()
        except UnavailableError as error:
            if not self._seen:
                raise
            event = await self._resume(error)
        if event is EOF:
            self._ended = True
            raise StopAsyncIteration
        self._seen = True
        self.sequence = event.sequence
        return event

    def close(self) -> None:
        """Stop watching; the job goes on. Reading on then raises CancelledError."""
        self._closed = True
        super().close()

    async def _resume(self, failure: UnavailableError) -> WatchJobResponse:
        """Open the stream again until it gives an event or the time is over."""
        options = self._transport.options
        deadline = time.monotonic() + options.resume_timeout_s
        tries = 0
        while time.monotonic() < deadline:
            tries += 1
            await sleep(failure.retry_after_s or backoff_s(options, tries))
            if self._closed:
                text = "the stream was closed by its reader"
                raise CancelledError(text, code=StatusCode.CANCELLED)
            self._request = WatchJobRequest(id=self._request.id, after_sequence=self.sequence)
            self._receiver = self._transport.open(self._method, self._request, None)
            try:
                return await self._receiver.read()
            except UnavailableError as error:
                failure = error
        raise failure
