"""Clients without stubs find the schema, with both versions of the reflection protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha.reflection_pb2 import (
    ExtensionRequest,
    ServerReflectionRequest,
    ServerReflectionResponse,
)

from lowbit_server.server import SERVICES

if TYPE_CHECKING:
    from tests.integration.conftest import Service


@pytest.fixture(params=["v1", "v1alpha"])
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def ask(
    service: Service, version: str, request: ServerReflectionRequest
) -> ServerReflectionResponse:
    method = service.channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        ServerReflectionRequest.SerializeToString,
        ServerReflectionResponse.FromString,
    )
    return next(iter(method(iter([request]), timeout=10)))


def files(response: ServerReflectionResponse) -> set[str]:
    data = response.file_descriptor_response.file_descriptor_proto
    return {FileDescriptorProto.FromString(one).name for one in data}


def test_services_are_listed(service: Service, version: str) -> None:
    answer = ask(service, version, ServerReflectionRequest(list_services="*"))
    found = {one.name for one in answer.list_services_response.service}
    others = {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    assert found == {*SERVICES, *others}


@pytest.mark.parametrize("kind", ["", ".Generate", ".Tokenize"])
def test_a_service_and_its_methods_are_found(service: Service, version: str, kind: str) -> None:
    symbol = f"lowbit.v1.GenerationService{kind}"
    answer = ask(service, version, ServerReflectionRequest(file_containing_symbol=symbol))
    # Whole: with all that it imports, and without the rules' schema, which it does not.
    assert files(answer) == {"lowbit/v1/generation.proto", "google/protobuf/duration.proto"}


def test_the_details_of_errors_are_found(service: Service, version: str) -> None:
    request = ServerReflectionRequest(file_containing_symbol="google.rpc.ErrorInfo")
    assert "google/rpc/error_details.proto" in files(ask(service, version, request))


@pytest.mark.parametrize(
    "asked",
    [
        {"file_containing_symbol": "lowbit.v1.GenerationService.Nothing"},
        {"file_containing_symbol": "lowbit.v1.Nothing.Generate"},
        {"file_containing_symbol": ""},
        {"file_by_filename": "buf/validate/validate.proto"},
        {"file_containing_extension": ExtensionRequest(containing_type="x", extension_number=1)},
        {"all_extension_numbers_of_type": "lowbit.v1.Nothing"},
    ],
)
def test_what_is_not_there_is_not_found(service: Service, version: str, asked: dict) -> None:
    answer = ask(service, version, ServerReflectionRequest(**asked))
    assert answer.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]
