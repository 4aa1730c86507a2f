"""One channel and its calls: deadlines, retries and typed errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

from grpc import RpcError, StatusCode

from lowbit.errors import CancelledError, LowbitError
from lowbit.failures import from_rpc
from lowbit.options import (
    ClientOptions,
    call_metadata,
    channel_credentials,
    channel_options,
    check_token,
    default_address,
)
from lowbit.retry import Retrier, RetryBudget

from ._grpc import LocallyCancelled, Pause, open_channel, reader, sleep, task_is_cancelled

if TYPE_CHECKING:
    from ._grpc import StreamMethod, UnaryMethod

_Req = TypeVar("_Req")
_Res = TypeVar("_Res")


class AsyncTransport:
    """A channel to one server."""

    def __init__(self, address: str | None, options: ClientOptions | None) -> None:
        """Make the channel; it connects with the first call."""
        self.address = address or default_address()
        self.options = options or ClientOptions()
        check_token(self.address, self.options)
        self.channel = open_channel(
            self.address,
            channel_options(self.address, self.options),
            channel_credentials(self.options),
        )
        self._budget = RetryBudget(self.options.retry_budget)

    async def close(self) -> None:
        """Close the channel; calls that still run are cancelled."""
        await self.channel.close()

    async def call(
        self,
        method: UnaryMethod[_Req, _Res],
        request: _Req,
        *,
        timeout_s: float | None = None,
        repeatable: bool = False,
    ) -> _Res:
        """Make a call with one answer.

        Args:
            method: the stub's method.
            request: its request.
            timeout_s: deadline over all tries; None is `call_timeout_s`.
            repeatable: whether a second call has the effect of one.

        Raises:
            LowbitError: when it failed and may not be tried again.

        """
        timeout_s = self.options.call_timeout_s if timeout_s is None else timeout_s
        retrier = self.retrier(timeout_s, repeatable=repeatable)
        while True:
            try:
                response = await method(
                    request, timeout=retrier.remaining_s(), metadata=call_metadata(self.options)
                )
            except RpcError as error:
                failure = from_rpc(error, getattr(request, "request_id", ""))
                delay = retrier.delay_s(failure)
                if delay is None:
                    raise failure from error
            else:
                retrier.succeeded()
                return response
            await sleep(delay)

    def open(
        self,
        method: StreamMethod[_Req, _Res],
        request: _Req,
        timeout_s: float | None,
        *,
        once: bool = False,
    ) -> AsyncReceiver[_Req, _Res]:
        """Start a call with a stream of answers; it runs from now on, `once` without retries."""
        retrier = self.retrier(timeout_s, repeatable=True, once=once)
        return AsyncReceiver(method, request, retrier, self.options)

    def retrier(self, timeout_s: float | None, *, repeatable: bool, once: bool = False) -> Retrier:
        """Return what counts the tries of one call."""
        return Retrier(
            self.options, self._budget, timeout_s=timeout_s, repeatable=repeatable, once=once
        )


class AsyncReceiver(Generic[_Req, _Res]):
    """A server stream, tried again until its first message has arrived."""

    def __init__(
        self,
        method: StreamMethod[_Req, _Res],
        request: _Req,
        retrier: Retrier,
        options: ClientOptions,
    ) -> None:
        """Start the call."""
        self._method = method
        self._request = request
        self._retrier = retrier
        self._options = options
        self._pause = Pause()
        self._cancelled = False
        self._started = False
        self._open()

    async def read(self) -> _Res:
        """Return the next message, or EOF when the stream has ended well.

        Raises:
            LowbitError: when the stream failed; CancelledError after `cancel`.

        """
        try:
            message = await self._read()
        except RpcError as error:
            failure = from_rpc(error, getattr(self._request, "request_id", ""))
            if self._started or self._cancelled:
                raise failure from error
            return await self._again(failure)
        except LocallyCancelled:
            if task_is_cancelled():
                raise
            raise _cancelled_here() from None
        if not self._started:
            self._started = True
            self._retrier.succeeded()
        return message

    def cancel(self) -> None:
        """End the call; does nothing when it has ended."""
        self._cancelled = True
        self._pause.end()
        self._call.cancel()

    def _open(self) -> None:
        self._call = self._method(
            self._request,
            timeout=self._retrier.remaining_s(),
            metadata=call_metadata(self._options),
        )
        self._read = reader(self._call)
        if self._cancelled:  # meanwhile, when another thread cancels
            self._call.cancel()

    async def _again(self, failure: LowbitError) -> _Res:
        delay = self._retrier.delay_s(failure)
        if delay is None:
            raise failure
        await self._pause.wait(delay)
        if self._cancelled:
            raise _cancelled_here()
        self._open()
        return await self.read()


def _cancelled_here() -> CancelledError:
    return CancelledError("the stream was closed by its reader", code=StatusCode.CANCELLED)
