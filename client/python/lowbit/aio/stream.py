"""The streams that a client returns. Each one is cancelled when closed or dropped."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from grpc import StatusCode

from lowbit.chunk import Chunk, chunk
from lowbit.errors import CancelledError, LowbitError, UnavailableError
from lowbit.retry import backoff_s
from lowbit.v1.job_pb2 import WatchJobRequest, WatchJobResponse
from lowbit.v1.model_pb2 import LoadRequest, LoadResponse

from ._grpc import EOF, Pause

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

_Req = TypeVar("_Req")
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


class AsyncGenerateStream(_AsyncStream["GenerateResponse", Chunk]):
    """A generation. Iterating gives chunks; the attributes fill as it goes on."""

    def __init__(self, receiver: AsyncReceiver[Any, GenerateResponse]) -> None:
        """Follow a call that was started."""
        super().__init__(receiver)
        self.started: Started | None = None
        """Model revision, device and prompt tokens; None until the first read."""
        self.all_finished: dict[int, OutputFinished] = {}
        """Why each output ended, by its index, and at which stop; those that have."""
        self._completed: Completed | None = None
        self._parts: defaultdict[int, list[str]] = defaultdict(list)

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
                new = chunk(message.delta)
                self._parts[new.output_index].append(new.text)
                return new
            if event == "output_finished":
                self.all_finished[message.output_finished.output_index] = message.output_finished
            elif event == "started":
                self.started = message.started
            elif event == "completed":
                self._completed = message.completed
        raise StopAsyncIteration

    async def text(self) -> str:
        """Read to the end; return the whole text, chunks that were read before included.

        Of several outputs it is the first one's.

        Raises:
            LowbitError: when the generation failed; `partial_text` keeps what came.

        """
        async for _ in self:
            pass
        return self.partial_text

    async def texts(self) -> list[str]:
        """Do what `text` does; return the texts of all outputs, by their index."""
        await self.text()
        return ["".join(self._parts[index]) for index in sorted(self.all_finished)]

    @property
    def partial_text(self) -> str:
        """Text of the first output that has been read so far."""
        return "".join(self._parts[0])

    @property
    def finished(self) -> OutputFinished | None:
        """Why the first output ended and at which stop; None until then."""
        return self.all_finished.get(0)

    @property
    def finish_reason(self) -> FinishReason.ValueType | None:
        """Why the first output ended; None until it has."""
        return self.finished.reason if self.finished else None

    @property
    def usage(self) -> Usage | None:
        """Tokens used; None until the stream has ended well."""
        return self._completed.usage if self._completed else None

    @property
    def timings(self) -> Timings | None:
        """Where the time went; None until the stream has ended well."""
        return self._completed.timings if self._completed else None


class _AsyncResumingStream(_AsyncStream[_Res, _Res], Generic[_Req, _Res]):
    """A stream that is asked for again when its connection breaks after the first message."""

    def __init__(
        self,
        transport: AsyncTransport,
        method: StreamMethod[_Req, _Res],
        request: _Req,
        timeout_s: float | None,
    ) -> None:
        super().__init__(transport.open(method, request, timeout_s))
        self._transport = transport
        self._method = method
        self._request = request
        self._deadline = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        self._pause = Pause()
        self._closed = False
        self._seen = False

    async def __anext__(self) -> _Res:
        """Return the next message.

        Raises:
            LowbitError: when the stream failed; UnavailableError when the server cannot be
                reached at first, or not again within `resume_timeout_s`.

        """
        if self._ended:
            raise StopAsyncIteration
        try:
            message = await self._receiver.read()
        except UnavailableError as error:
            if not self._seen or not _is_broken(error):
                raise
            message = await self._resume(error)
        if message is EOF:
            self._ended = True
            raise StopAsyncIteration
        self._seen = True
        self._note(message)
        return message

    def close(self) -> None:
        """Cancel the call if it still runs; reading on then raises CancelledError."""
        self._closed = True
        self._pause.end()
        super().close()

    def _note(self, message: _Res) -> None:
        """Remember what `_request` must say when it is sent again."""

    async def _resume(self, failure: LowbitError) -> _Res:
        """Open the stream again until it gives a message or the time is over."""
        options = self._transport.options
        deadline = min(self._deadline, time.monotonic() + options.resume_timeout_s)
        tries = 0
        while time.monotonic() < deadline:
            tries += 1
            await self._pause.wait(failure.retry_after_s or backoff_s(options, tries))
            if self._closed:
                text = "the stream was closed by its reader"
                raise CancelledError(text, code=StatusCode.CANCELLED)
            left = None if self._deadline == float("inf") else self._deadline - time.monotonic()
            self._receiver = self._transport.open(self._method, self._request, left, once=True)
            if self._closed:  # meanwhile, when another thread closes
                self._receiver.cancel()
            try:
                return await self._receiver.read()
            except LowbitError as error:
                if not _is_broken(error) and error.retry_after_s is None:
                    raise
                failure = error
        raise failure


def _is_broken(error: LowbitError) -> bool:
    """Whether the connection broke or the server went away: nobody refused anything."""
    return isinstance(error, UnavailableError) and error.reason in ("", "SHUTTING_DOWN")


class AsyncLoadStream(_AsyncResumingStream[LoadRequest, LoadResponse]):
    """Progress of a load. The load is cancelled with its last reader.

    A broken connection is opened again: the load is joined, or begun anew when it was
    cancelled meanwhile, so earlier phases may come again.
    """

    async def wait(self) -> list[LoadResponse]:
        """Read to the end; return the last message of each replica.

        Raises:
            LowbitError: when the load failed.

        """
        last = {}
        async for message in self:
            last[message.device, message.worker] = message
        return list(last.values())


class AsyncJobStream(_AsyncResumingStream[WatchJobRequest, WatchJobResponse]):
    """Events of a job. A broken connection is opened again after the last event."""

    @property
    def sequence(self) -> int:
        """Sequence number of the last event that was read."""
        return self._request.after_sequence

    def _note(self, message: WatchJobResponse) -> None:
        self._request = WatchJobRequest(id=self._request.id, after_sequence=message.sequence)
