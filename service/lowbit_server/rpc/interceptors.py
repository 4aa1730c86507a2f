"""What every public RPC shares: validation, the error table, and one log line."""

from __future__ import annotations

import asyncio
import re
import time
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import grpc
import protovalidate
import structlog
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from lowbit_server.errors import LowbitError, Reason, Violation

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from google.protobuf.message import Message

    from lowbit_server.rpc.context import Context

log = structlog.get_logger()

PUBLIC = "/lowbit.v1."
DOMAIN = "lowbit"
STATUS_DETAILS = "grpc-status-details-bin"

# W3C Trace Context, section 3.2; another version may append fields. Anything else is ignored.
TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?P<trace_id>(?!0{32})[0-9a-f]{32})-(?P<parent_id>(?!0{16})[0-9a-f]{16})"
    r"-[0-9a-f]{2}(-.*)?"
)

# gRPC drops an answer whose trailers have more than 8 KiB, and with it the reason. Message
# and details repeat what the client sent, so each part of them is bounded.
MAX_MESSAGE_BYTES = 1000
MAX_METADATA_BYTES = 256
MAX_VIOLATIONS = 20


class PublicInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the handlers of lowbit.v1; health and reflection pass through."""

    def __init__(self) -> None:
        """Make the validator once; it compiles each message's rules on first use."""
        self._validator = protovalidate.Validator()
        self._handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Return the wrapped handler of a public RPC."""
        method = handler_call_details.method
        if (wrapped := self._handlers.get(method)) is None:
            handler = await continuation(handler_call_details)
            if handler is None or not method.startswith(PUBLIC):
                return handler
            wrapped = self._handlers[method] = self._wrap(method, handler)
        return wrapped

    def _wrap(
        self, method: str, handler: grpc.RpcMethodHandler[Any, Any]
    ) -> grpc.RpcMethodHandler[Any, Any]:
        make: Any = grpc.unary_unary_rpc_method_handler
        behavior: Any = handler.unary_unary
        if handler.response_streaming:
            make, behavior = grpc.unary_stream_rpc_method_handler, handler.unary_stream

        async def call(request: Message, context: Context) -> Any:
            return await self._call(method, behavior, request, context)

        return make(  # type: ignore[no-any-return]
            call,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    async def _call(
        self,
        method: str,
        behavior: Callable[[Any, Any], Awaitable[Any]],
        request: Any,
        context: Context,
    ) -> Any:
        began = time.monotonic()
        request_id = getattr(request, "request_id", "") or uuid4().hex
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(
            method=method,
            request_id=request_id,
            model=getattr(request, "model", "") or None,
            **_caller(context),
        )
        code, reason = "OK", None
        try:
            self._validate(request)
            return await behavior(request, context)
        except asyncio.CancelledError:
            code = "CANCELLED"
            raise
        except grpc.aio.BaseError as error:  # a write to a client that is gone
            code = "CANCELLED"
            raise asyncio.CancelledError from error
        except LowbitError as error:
            code, reason = error.code.name, error.reason
            await abort(context, error, request_id)
        except Exception:
            log.exception("rpc failed")
            failure = LowbitError(Reason.INTERNAL, "the server failed; see its log")
            code, reason = failure.code.name, failure.reason
            await abort(context, failure, request_id)
        finally:
            milliseconds = round((time.monotonic() - began) * 1000, 1)
            log.info("rpc", code=code, reason=reason, ms=milliseconds)

    def _validate(self, request: Message) -> None:
        violations = self._validator.collect_violations(request)
        if violations:
            found = [_violation(violation.proto) for violation in violations[:MAX_VIOLATIONS]]
            message = "; ".join(f"{one.field}: {one.description}" for one in found)
            if len(violations) > len(found):
                message = f"{len(violations)} violations, the first of them: {message}"
            raise LowbitError(Reason.INVALID_FIELD, message, violations=found)


def _caller(context: Context) -> dict[str, str]:
    """Return what the log tells about the caller: its user agent and its place in a trace."""
    metadata = dict(context.invocation_metadata() or ())
    told = {"user_agent": _cut(str(metadata.get("user-agent", "")), MAX_METADATA_BYTES)}
    if trace := TRACEPARENT.fullmatch(str(metadata.get("traceparent", ""))):
        told |= {"trace_id": trace["trace_id"], "parent_id": trace["parent_id"]}
    return told


async def abort(context: Context, error: LowbitError, request_id: str) -> None:
    """End an RPC with an error and its details."""
    info = error_details_pb2.ErrorInfo(
        reason=error.reason,
        domain=DOMAIN,
        metadata={
            key: _cut(value, MAX_METADATA_BYTES)
            for key, value in (error.metadata | {"request_id": request_id}).items()
        },
    )
    message = _cut(error.message, MAX_MESSAGE_BYTES)
    details: list[Message] = [info]
    if error.violations:
        details.append(
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(
                        field=one.field, description=one.description
                    )
                    for one in error.violations
                ]
            )
        )
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(round(error.retry_after_s * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=error.code.value[0], message=message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    trailer = ((STATUS_DETAILS, status.SerializeToString()),)
    await context.abort(error.code, message, trailing_metadata=trailer)


def _cut(text: str, limit_bytes: int) -> str:
    """Return text of at most so many bytes of UTF-8, whole characters only."""
    data = text.encode(errors="replace")
    if len(data) <= limit_bytes:
        return text
    return data[: limit_bytes - 3].decode(errors="ignore") + "..."


def _violation(violation: Any) -> Violation:
    path = ""
    for element in violation.field.elements:
        path += f".{element.field_name}" if path else element.field_name
        if element.subscript is not None:
            path += f"[{element.subscript.value}]"
    return Violation(path or "request", violation.message)
