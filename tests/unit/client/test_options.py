"""Options, addresses and gRPC's arguments made from them."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lowbit import Client, ClientOptions, TlsOptions, default_address
from lowbit.options import channel_options


@pytest.mark.parametrize(
    "bad",
    [
        {"call_timeout_s": 0},
        {"call_timeout_s": math.nan},
        {"stream_timeout_s": -1},
        {"max_attempts": 0},
        {"max_message_bytes": 0},
        {"token": "two words"},
        {"token": "line\n"},
        {"token": ""},
    ],
)
def test_bad_values_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        ClientOptions(**bad)


def test_the_address_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOWBIT_ADDRESS", raising=False)
    assert default_address() == "127.0.0.1:50151"
    monkeypatch.setenv("LOWBIT_ADDRESS", "host:1")
    assert default_address() == "host:1"


def test_grpc_arguments() -> None:
    arguments = dict(channel_options("host:1", ClientOptions()))
    assert arguments["grpc.enable_retries"] == 0
    assert arguments["grpc.keepalive_time_ms"] == 30_000
    assert arguments["grpc.keepalive_permit_without_calls"] == 1
    assert "grpc.enable_http_proxy" not in arguments


@pytest.mark.parametrize("address", ["127.0.0.1:1", "localhost:1", "[::1]:1", "unix:/x"])
def test_no_proxy_stands_before_loopback(address: str) -> None:
    assert ("grpc.enable_http_proxy", 0) in channel_options(address, ClientOptions())


def test_a_token_is_sent_in_the_clear_to_this_machine_only() -> None:
    options = ClientOptions(token="secret")
    for address in ("host:1", "127.example.com:1", "localhost.example.com:1", "dns:///host:1"):
        with pytest.raises(ValueError, match="token needs tls"):
            Client(address, options)
    Client("[::1]:1", options).close()
    Client("host:1", ClientOptions(token="secret", tls=TlsOptions())).close()


def test_secrets_are_not_shown() -> None:
    tls = TlsOptions(certificate=b"certificate", key=b"hidden")
    assert "hidden" not in repr(ClientOptions(token="hidden", tls=tls))


@pytest.mark.parametrize("half", [{"certificate": b"x"}, {"key": b"x"}])
def test_a_certificate_needs_its_key(half: dict[str, bytes]) -> None:
    with pytest.raises(ValueError, match="certificate and key go together"):
        TlsOptions(**half)
