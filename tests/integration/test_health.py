"""grpc.health.v1, reflection and keepalive of a real server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from lowbit import ClientOptions
from lowbit.options import channel_options
from lowbit_server import server
from lowbit_server.config import Config

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

SERVING = health_pb2.HealthCheckResponse.SERVING
SERVICES = [
    "lowbit.v1.GenerationService",
    "lowbit.v1.JobService",
    "lowbit.v1.ModelService",
    "lowbit.v1.QuantizationService",
    "lowbit.v1.RuntimeService",
]


@pytest.fixture
def health(service: Any) -> health_pb2_grpc.HealthStub:
    return health_pb2_grpc.HealthStub(service.channel)


def reflect(service: Any, **request: str) -> reflection_pb2.ServerReflectionResponse:
    stub = reflection_pb2_grpc.ServerReflectionStub(service.channel)
    requests = iter([reflection_pb2.ServerReflectionRequest(**request)])
    (response,) = stub.ServerReflectionInfo(requests, timeout=30)
    return response


@pytest.mark.parametrize("name", ["", "cpu/0", *SERVICES])
def test_every_service_and_worker_is_checked_by_name(service: Any, health: Any, name: str) -> None:
    answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=30)
    assert answer.status == SERVING


@pytest.mark.parametrize("name", ["", "cpu/0", SERVICES[0]])
def test_watch_answers_at_once_and_stays_open(service: Any, health: Any, name: str) -> None:
    watch = health.Watch(health_pb2.HealthCheckRequest(service=name), timeout=30)
    assert next(watch).status == SERVING
    assert watch.is_active()
    watch.cancel()


def test_a_name_that_nobody_knows(service: Any, health: Any) -> None:
    request = health_pb2.HealthCheckRequest(service="cpu/1")
    with pytest.raises(grpc.RpcError) as caught:
        health.Check(request, timeout=30)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    watch = health.Watch(request, timeout=30)
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    watch.cancel()


def test_reflection_lists_exactly_the_public_services(service: Any) -> None:
    response = reflect(service, list_services="")
    listed = sorted(one.name for one in response.list_services_response.service)
    assert listed == [
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        *SERVICES,
    ]


@pytest.mark.parametrize("name", SERVICES)
def test_reflection_describes_each_service(service: Any, name: str) -> None:
    response = reflect(service, file_containing_symbol=name)
    assert response.file_descriptor_response.file_descriptor_proto


@pytest.mark.parametrize("symbol", ["lowbit.worker.v1.WorkerService", "lowbit.v1.Nothing"])
def test_the_private_protocol_is_not_served(service: Any, symbol: str) -> None:
    call = service.channel.unary_unary(f"/{symbol}/Attach")
    with pytest.raises(grpc.RpcError) as caught:
        call(b"", timeout=30)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def numbers(options: Iterable[tuple[str, Any]]) -> dict[str, int]:
    return {name: value for name, value in options if isinstance(value, int)}


def test_the_server_allows_the_pings_that_clients_send(tmp_path: Path) -> None:
    # A ping too many makes a server close the connection with ENHANCE_YOUR_CALM, and that
    # would cut every stream that is silent for long. Waiting for it takes minutes.
    served = numbers(server._grpc_options(Config(home=tmp_path)))
    sent = numbers(channel_options("127.0.0.1:50151", ClientOptions()))
    allowed = served["grpc.http2.min_ping_interval_without_data_ms"]
    assert allowed == server.CLIENT_PING_MS == 10_000
    assert sent["grpc.keepalive_time_ms"] >= allowed
    assert sent["grpc.keepalive_permit_without_calls"] == 1
    assert sent["grpc.http2.max_pings_without_data"] == 0
    assert served["grpc.keepalive_permit_without_calls"] == 1
    assert served["grpc.http2.max_ping_strikes"] == 0
    assert served["grpc.keepalive_time_ms"] == sent["grpc.keepalive_time_ms"]
    assert served["grpc.keepalive_timeout_ms"] == sent["grpc.keepalive_timeout_ms"]
