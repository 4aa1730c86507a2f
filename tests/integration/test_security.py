"""TLS, client certificates and bearer tokens of a real server, beyond what SDKs can see.

What each SDK sees is in tests/conformance: right and wrong authorities, certificates, tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from lowbit import Client, ClientOptions, UnauthenticatedError
from lowbit.cli.app import run
from lowbit.v1 import model_pb2, runtime_pb2
from lowbit.v1.model_pb2_grpc import ModelServiceStub
from lowbit.v1.runtime_pb2_grpc import RuntimeServiceStub
from lowbit_server.testing import ServerProcess
from tests.certificates import Authority

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

TOKENS = ("first-token", "second-token")
Metadata = tuple[tuple[str, str], ...]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that asks for a certificate and a token."""
    folder = tmp_path_factory.mktemp("secure")
    authority = Authority(folder, "ca")
    pair, _ = authority.issue("server"), authority.issue("client")
    (folder / "tokens").write_text("\n".join(TOKENS))
    environment = {
        "LOWBIT_TLS_CERTIFICATE": str(pair.certificate),
        "LOWBIT_TLS_KEY": str(pair.key),
        "LOWBIT_TLS_CLIENT_CA": str(authority.file),
        "LOWBIT_TOKENS_FILE": str(folder / "tokens"),
    }
    with ServerProcess(folder / "home", environment=environment) as server:
        yield server


@pytest.fixture
def channel(server: ServerProcess) -> Iterator[grpc.Channel]:
    """A channel with a good certificate and no token."""
    folder = server.home.parent
    credentials = grpc.ssl_channel_credentials(
        (folder / "ca.pem").read_bytes(),
        (folder / "client.key").read_bytes(),
        (folder / "client.pem").read_bytes(),
    )
    with grpc.secure_channel(server.address, credentials) as channel:
        yield channel


def bearer(text: str) -> Metadata:
    return (("authorization", text),)


def devices(channel: grpc.Channel, metadata: Metadata) -> Any:
    request = runtime_pb2.ListDevicesRequest()
    return RuntimeServiceStub(channel).ListDevices(request, metadata=metadata, timeout=10)


@pytest.mark.parametrize("given", ["Bearer first-token", "bearer second-token"])
def test_every_token_of_the_file_is_known(channel: grpc.Channel, given: str) -> None:
    assert devices(channel, bearer(given)).devices


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        bearer("first-token"),
        bearer("Basic first-token"),
        bearer("Bearer"),
        bearer("Bearer "),
        bearer("Bearer first-toke"),
        bearer("Bearer first-tokens"),
        bearer("Bearer first-token second-token"),
        (*bearer("Bearer wrong"), *bearer("Bearer first-token")),
    ],
)
def test_anything_else_is_refused(channel: grpc.Channel, metadata: Metadata) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        devices(channel, metadata)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_health_needs_no_token(channel: grpc.Channel, eventually: Callable[..., Any]) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest()
    serving = health_pb2.HealthCheckResponse.SERVING
    eventually(lambda: stub.Check(request, timeout=10).status == serving)


def test_reflection_needs_one(channel: grpc.Channel) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    with pytest.raises(grpc.RpcError) as caught:
        next(stub.ServerReflectionInfo(iter([request]), timeout=10))
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    metadata = bearer("Bearer first-token")
    answer = next(stub.ServerReflectionInfo(iter([request]), metadata=metadata, timeout=10))
    assert "lowbit.v1.GenerationService" in [
        service.name for service in answer.list_services_response.service
    ]


def test_unknown_methods_tell_strangers_nothing(channel: grpc.Channel) -> None:
    call = channel.unary_unary("/lowbit.v1.NoService/NoMethod")
    with pytest.raises(grpc.RpcError) as caught:
        call(b"", timeout=10)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_no_service_is_reached_without_a_token(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        # Its rules would refuse this request: nobody looked at it.
        ModelServiceStub(channel).GetModel(model_pb2.GetModelRequest(), timeout=10)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_tokens_are_not_logged(server: ServerProcess, channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError):
        devices(channel, bearer("Bearer stranger-token"))
    text = server.log_file.read_text()
    assert '"reason": "UNAUTHENTICATED"' in text
    assert not any(token in text for token in (*TOKENS, "stranger-token"))


@pytest.mark.parametrize(
    ("traceparent", "trace_id"),
    [
        ("00-" + "a" * 32 + "-" + "b" * 16 + "-01", "a" * 32),
        ("cc-" + "a" * 32 + "-" + "b" * 16 + "-01-more", "a" * 32),
        ("ff-" + "a" * 32 + "-" + "b" * 16 + "-01", None),
        ("00-" + "0" * 32 + "-" + "b" * 16 + "-01", None),
        ("00-" + "A" * 32 + "-" + "b" * 16 + "-01", None),
        ("nonsense", None),
    ],
)
def test_the_trace_of_a_call_is_logged(
    server: ServerProcess, channel: grpc.Channel, traceparent: str, trace_id: str | None
) -> None:
    before = len(server.log())
    metadata = (*bearer("Bearer first-token"), ("traceparent", traceparent))
    devices(channel, metadata)
    (line,) = [one for one in server.log()[before:] if one["event"] == "rpc"]
    assert line.get("trace_id") == trace_id
    assert line.get("parent_id") == (trace_id and "b" * 16)
    assert line["user_agent"].startswith("grpc-python/")


def test_the_command_line_has_options_for_it(
    server: ServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = server.home.parent
    files = ["--ca", "ca.pem", "--certificate", "client.pem", "--key", "client.key"]
    files[1::2] = [str(folder / name) for name in files[1::2]]
    assert run(["--address", server.address, *files, "--token", TOKENS[0], "devices"]) == 0
    assert "cpu" in capsys.readouterr().out
    assert run(["--address", server.address, *files, "devices"]) == 1
    assert "UNAUTHENTICATED" in capsys.readouterr().err


def test_a_token_alone_guards_a_server_without_tls(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("one\n")
    environment = {"LOWBIT_TOKENS_FILE": str(tmp_path / "tokens")}
    with ServerProcess(tmp_path / "home", environment=environment) as server:
        with Client(server.address, ClientOptions(token="one")) as client:
            assert client.devices()
        with Client(server.address) as client, pytest.raises(UnauthenticatedError):
            client.devices()
