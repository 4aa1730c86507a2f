"""A server whose Generate fails with the reason that its model names: `python -m ...refusing`.

It uses the real server's own way of ending a call, so each reason of the table can be seen,
also those that no test can bring about. Three models are no reasons: SOMETHING_NEW is one that
clients do not know yet, NO_DETAILS and GARBAGE are what a proxy may make of an answer. Its
WatchJob breaks behind the first event, and refuses the next call of each watcher once.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc

from lowbit.v1.generation_pb2_grpc import (
    GenerationServiceServicer,
    add_GenerationServiceServicer_to_server,
)
from lowbit.v1.job_pb2 import WatchJobResponse
from lowbit.v1.job_pb2_grpc import JobServiceServicer, add_JobServiceServicer_to_server
from lowbit_server.errors import CODES, LowbitError, Reason, Violation
from lowbit_server.rpc.interceptors import STATUS_DETAILS, abort

if TYPE_CHECKING:
    from lowbit.v1 import generation_pb2, job_pb2

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


class Breaking(JobServiceServicer):
    """Gives the two events of a job, with a break and a refusal between them."""

    def __init__(self) -> None:
        """Refuse nobody yet."""
        self._refused: set[str] = set()

    async def WatchJob(self, request: job_pb2.WatchJobRequest, context: Any) -> None:  # type: ignore[override]
        """Give one event; break behind the first."""
        if request.after_sequence and request.id not in self._refused:
            self._refused.add(request.id)
            error = LowbitError(Reason.QUEUE_FULL, "too many watchers", retry_after_s=0.25)
            await abort(context, error, "")
        await context.write(WatchJobResponse(sequence=request.after_sequence + 1))
        if not request.after_sequence:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the proxy lost the server")


async def main() -> None:
    """Serve on a free port, print it, and go on until killed."""
    server = grpc.aio.server()
    add_GenerationServiceServicer_to_server(Refusing(), server)
    add_JobServiceServicer_to_server(Breaking(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main())
