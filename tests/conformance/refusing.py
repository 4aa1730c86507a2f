"""A server whose Generate fails with the reason that its model names: `python -m ...refusing`.

It uses the real server's own way of ending a call, so each reason of the table can be seen,
also those that no test can bring about. Three models are no reasons: SOMETHING_NEW is one that
clients do not know yet, NO_DETAILS and GARBAGE are what a proxy may make of an answer.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc

from lowbit.v1.generation_pb2_grpc import (
    GenerationServiceServicer,
    add_GenerationServiceServicer_to_server,
)
from lowbit_server.errors import CODES, LowbitError, Reason, Violation
from lowbit_server.rpc.interceptors import STATUS_DETAILS, abort

if TYPE_CHECKING:
    from lowbit.v1 import generation_pb2

VIOLATIONS = (Violation("model", "is bad"), Violation("stopping.strings[0]", "is worse"))


class Refusing(GenerationServiceServicer):
    """Fails every call."""

    async def Generate(  # type: ignore[override]
        self, request: generation_pb2.GenerateRequest, context: Any
    ) -> None:
        """End the call as its model says."""
        if request.model == "NO_DETAILS":
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the proxy has no server")
        if request.model == "GARBAGE":
            trailer = ((STATUS_DETAILS, b"\xff\xff\xff"),)
            await context.abort(grpc.StatusCode.INTERNAL, "broken", trailing_metadata=trailer)
        known = request.model in Reason.__members__
        error = LowbitError(
            Reason(request.model) if known else request.model,  # type: ignore[arg-type]
            "refused — für die Suite",
            metadata={"needed_bytes": "7", "free bytes of cpu": "ü"},
            violations=VIOLATIONS,
            retry_after_s=0.25,
            code=CODES[Reason(request.model)] if known else grpc.StatusCode.NOT_FOUND,
        )
        await abort(context, error, request.request_id)


async def main() -> None:
    """Serve on a free port, print it, and go on until killed."""
    server = grpc.aio.server()
    add_GenerationServiceServicer_to_server(Refusing(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main())
