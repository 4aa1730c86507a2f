"""Bearer tokens, checked before anything else of a call is looked at."""

from __future__ import annotations

import hmac
from contextvars import ContextVar
from hashlib import sha256
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import grpc
import structlog

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.rpc.interceptors import abort

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

    from lowbit_server.rpc.context import Context

log = structlog.get_logger()

HEALTH = "/grpc.health.v1.Health/"
SCHEME = "bearer "

# A call's interceptors and its method run in one task, and so in one context.
_caller: ContextVar[bytes] = ContextVar("caller", default=b"")


def cache_salt(salt: str) -> bytes:
    """Return a digest of who makes this call, if tokens tell, and of the salt they gave."""
    return sha256(_caller.get() + salt.encode()).digest()


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls without a known token with UNAUTHENTICATED; health checks need none."""

    def __init__(self, tokens: Iterable[str]) -> None:
        """Keep only the tokens' digests."""
        self._digests = tuple(_digest(token) for token in tokens)
        # No message is read, so one handler serves calls of every shape.
        self._refusal: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(
            _refuse
        )

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Return the method's handler, or the one that refuses."""
        method = handler_call_details.method
        if method.startswith(HEALTH) or self._known(handler_call_details.invocation_metadata):
            return await continuation(handler_call_details)
        log.info("rpc", method=method, code="UNAUTHENTICATED", reason=Reason.UNAUTHENTICATED)
        return self._refusal

    def _known(self, metadata: Iterable[tuple[str, str | bytes]] | None) -> bool:
        given = [str(value) for key, value in metadata or () if key == "authorization"]
        if len(given) != 1 or given[0][: len(SCHEME)].lower() != SCHEME:
            return False
        digest = _digest(given[0][len(SCHEME) :])
        _caller.set(digest)
        # All are compared, each in constant time: how long it takes tells nothing.
        return sum(hmac.compare_digest(digest, one) for one in self._digests) > 0


def _digest(token: str) -> bytes:
    return sha256(token.encode()).digest()


async def _refuse(_: AsyncIterator[bytes], context: Context) -> None:
    message = "the call needs a bearer token that this server knows"
    await abort(context, LowbitError(Reason.UNAUTHENTICATED, message), uuid4().hex)
