"""The gRPC side of a worker: commands into the inbox, the outbox onto the stream."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import grpc

from lowbit.worker.v1 import worker_pb2_grpc
from lowbit_server.worker import convert
from lowbit_server.worker.inbox import Attached, Detached, Submission
from lowbit_server.worker.outbox import Outbox

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lowbit.worker.v1 import worker_pb2 as pb
    from lowbit_server.worker.inbox import Inbox

# A prompt of the largest context that the public API allows and continuations as long in all,
# 2^20 tokens of 5 bytes each, with what else a request may have.
MAX_COMMAND_BYTES = 16 << 20


class WorkerService(worker_pb2_grpc.WorkerServiceServicer):
    """Lets one front at a time drive the step loop."""

    def __init__(self, inbox: Inbox) -> None:
        """Make a service for the loop that reads this inbox."""
        self._inbox = inbox
        self._free = threading.Lock()

    def Attach(  # noqa: N802  (the name of the RPC)
        self, request_iterator: Iterator[pb.AttachRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.AttachResponse]:
        """Carry commands and events until the stream breaks; see `worker.proto`."""
        if not self._free.acquire(blocking=False):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "another front is attached")
        outbox = Outbox()
        threading.Thread(
            target=self._read, args=(request_iterator, outbox), name="reader", daemon=True
        ).start()
        return outbox

    def _read(self, commands: Iterator[pb.AttachRequest], outbox: Outbox) -> None:
        """Own the session: it lasts as long as commands can come."""
        self._inbox.put(Attached(outbox))
        try:
            for message in commands:
                if (command := convert.command(message, time.monotonic())) is not None:
                    self._inbox.put(command)
                    if isinstance(command, Submission):
                        self._inbox.interrupt.value = 1
        except grpc.RpcError:
            pass
        finally:
            # Closed first: the loop may be waiting for room in it.
            outbox.close()
            self._inbox.put(Detached(outbox))
            self._free.release()


def serve(socket: str, inbox: Inbox) -> grpc.Server:
    """Serve on a unix socket that only its owner may open, and return at once."""
    # Two threads: the front that is attached, and one to refuse another.
    server = grpc.server(
        ThreadPoolExecutor(2, "rpc"),
        options=[("grpc.max_receive_message_length", MAX_COMMAND_BYTES)],
    )
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(WorkerService(inbox), server)
    umask = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix:{socket}")
    finally:
        os.umask(umask)
    server.start()
    return server
