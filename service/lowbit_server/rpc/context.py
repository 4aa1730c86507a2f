"""The type of what gRPC hands to each call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import grpc

# Quoted: the class takes type arguments only in its stubs.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
