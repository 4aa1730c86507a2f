"""A real gRPC server on loopback whose RPCs answer from a table that a test fills."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn, Self

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message_factory import GetMessageClass
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from lowbit.v1 import generation_pb2, job_pb2, model_pb2, quantization_pb2, runtime_pb2
from lowbit.v1.generation_pb2 import (
    FINISH_REASON_EOS,
    Completed,
    Delta,
    GenerateResponse,
    OutputFinished,
    Started,
    Timings,
    Token,
    Usage,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from google.protobuf.message import Message

_FILES = (generation_pb2, job_pb2, model_pb2, quantization_pb2, runtime_pb2)
WAIT_S = 10.0


@dataclass(frozen=True)
class Seen:
    """One call that reached the server."""

    method: str
    request: Any
    metadata: dict[str, str | bytes]
    time: float


@dataclass
class FakeServer:
    """Answers each RPC with `on[method]`, called with the request and the context."""

    on: dict[str, Callable[[Any, grpc.ServicerContext], Any]] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)
    address: str = ""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen on a free port, or again on the one of before."""
        self._server = grpc.server(ThreadPoolExecutor(8))
        for module in _FILES:
            for service in module.DESCRIPTOR.services_by_name.values():
                handlers = {method.name: self._handler(method) for method in service.methods}
                generic = grpc.method_handlers_generic_handler(service.full_name, handlers)
                self._server.add_generic_rpc_handlers((generic,))
        port = self._server.add_insecure_port(self.address or "127.0.0.1:0")
        self.address = f"127.0.0.1:{port}"
        self._server.start()

    def stop(self) -> None:
        """Break all connections at once."""
        self._server.stop(grace=0).wait()

    def requests(self, method: str) -> list[Any]:
        """Return the requests that a method has got."""
        return [call.request for call in self.seen if call.method == method]

    def _handler(self, method: Any) -> grpc.RpcMethodHandler[Any, Any]:
        def unary(request: Message, context: grpc.ServicerContext) -> Any:
            metadata = dict(context.invocation_metadata())
            self.seen.append(Seen(method.name, request, metadata, time.monotonic()))
            return self.on[method.name](request, context)

        def stream(request: Message, context: grpc.ServicerContext) -> Iterator[Any]:
            yield from unary(request, context)

        kind = GetMessageClass(method.input_type)
        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(
                stream, kind.FromString, lambda message: message.SerializeToString()
            )
        return grpc.unary_unary_rpc_method_handler(
            unary, kind.FromString, lambda message: message.SerializeToString()
        )


def refuse(  # noqa: PLR0913 - one argument per detail
    context: grpc.ServicerContext,
    code: grpc.StatusCode,
    reason: str = "",
    *,
    message: str = "refused",
    metadata: dict[str, str] | None = None,
    retry_s: float | None = None,
    violations: dict[str, str] | None = None,
) -> NoReturn:
    """End a call as the real server does, with real google.rpc details."""
    details: list[Message] = []
    if reason:
        details.append(ErrorInfo(reason=reason, domain="lowbit", metadata=metadata))
    if retry_s is not None:
        delay = Duration()
        delay.FromNanoseconds(round(retry_s * 1e9))
        details.append(RetryInfo(retry_delay=delay))
    if violations:
        fields = [
            BadRequest.FieldViolation(field=name, description=text)
            for name, text in violations.items()
        ]
        details.append(BadRequest(field_violations=fields))
    status = Status(code=code.value[0], message=message)
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    context.abort_with_status(rpc_status.to_status(status))


def events(*texts: str) -> Iterator[GenerateResponse]:
    """Return a whole generation with one delta and one token per text."""
    yield GenerateResponse(started=Started(request_id="r1", model="m", prompt_tokens=3))
    for index, text in enumerate(texts):
        yield GenerateResponse(delta=Delta(text=text, tokens=[Token(id=index)]))
    yield GenerateResponse(output_finished=OutputFinished(reason=FINISH_REASON_EOS))
    usage = Usage(prompt_tokens=3, output_tokens=len(texts))
    timings = Timings(time_to_first_token=Duration(nanos=5_000_000), decode=Duration(seconds=2))
    yield GenerateResponse(completed=Completed(usage=usage, timings=timings))


class Endless:
    """A generation that stalls after its first text until the client goes away."""

    def __init__(self) -> None:
        self.gone = threading.Event()

    def __call__(self, _: Any, context: grpc.ServicerContext) -> Iterator[GenerateResponse]:
        context.add_callback(self.gone.set)
        yield GenerateResponse(started=Started(request_id="r1"))
        yield GenerateResponse(delta=Delta(text="first"))
        self.gone.wait(WAIT_S)

    def was_cancelled(self) -> bool:
        """Wait until the server has seen the call end; False when it never did."""
        return self.gone.wait(WAIT_S)
