"""The type of what gRPC hands to each call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import grpc

# A streaming RPC is written as a coroutine that awaits `context.write`, not as an async
# generator: when the call is cancelled the coroutine itself sees it and its `finally`
# runs at once. The stubs only know the generator, hence `type: ignore[override]`.
#
# Quoted: the class takes type arguments only in its stubs.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
