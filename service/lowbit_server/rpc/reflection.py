"""Server reflection: the schema of the API, for clients that have no stubs.

grpcio-reflection has v1alpha only and does not find methods, which clients look up by
`package.Service.Method`. Both are added here. The messages of v1 are those of v1alpha.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import grpc
from google.protobuf import descriptor_pool
from grpc_reflection.v1alpha import reflection, reflection_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable

    from google.protobuf.descriptor import FileDescriptor
    from google.protobuf.descriptor_pool import DescriptorPool

V1 = "grpc.reflection.v1.ServerReflection"


class _Symbols:
    """The default pool, which finds the file of a method too."""

    def __init__(self) -> None:
        self._pool = descriptor_pool.Default()
        self.FindFileByName = self._pool.FindFileByName
        self.FindMessageTypeByName = self._pool.FindMessageTypeByName
        self.FindExtensionByNumber = self._pool.FindExtensionByNumber
        self.FindAllExtensions = self._pool.FindAllExtensions

    def FindFileContainingSymbol(self, symbol: str) -> FileDescriptor:
        """Return the file; raise KeyError when there is none."""
        try:
            return self._pool.FindFileContainingSymbol(symbol)
        except KeyError:
            return self._pool.FindMethodByName(symbol).containing_service.file


def add_reflection(services: Iterable[str], server: grpc.aio.Server) -> None:
    """Let clients ask for the schema of services, with both versions of the protocol.

    v1 itself is not listed, since its own schema is not there to be asked for.
    """
    names = [*services, reflection.SERVICE_NAME]
    pool = cast("DescriptorPool", _Symbols())
    reflection.enable_server_reflection(names, server, pool)
    handler = grpc.stream_stream_rpc_method_handler(
        reflection.aio.ReflectionServicer(names, pool).ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    v1 = grpc.method_handlers_generic_handler(V1, {"ServerReflectionInfo": handler})
    server.add_generic_rpc_handlers((v1,))
