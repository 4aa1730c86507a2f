"""What a client may be told about its connection: limits, timeouts, retries and who it is."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING

import grpc

if TYPE_CHECKING:
    from collections.abc import Callable

DEFAULT_ADDRESS = "127.0.0.1:50151"
ADDRESS_VARIABLE = "LOWBIT_ADDRESS"
USER_AGENT = f"lowbit-python/{version('lowbit')}"

_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # RFC 6750, section 2.1


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsOptions:
    """How the server is known, and how it knows this client; all files are PEM."""

    ca: bytes | None = None
    """Authorities that may have signed the server's certificate; None: gRPC's own."""

    certificate: bytes | None = None
    """This client's certificate, for servers that ask for one; needs `key`."""

    key: bytes | None = field(default=None, repr=False)
    """The certificate's private key."""

    server_name: str | None = None
    """Name that the server's certificate must have, where the address has another."""

    def __post_init__(self) -> None:
        """Raise ValueError where one of certificate and key is missing."""
        if (self.certificate is None) != (self.key is None):
            message = "certificate and key go together"
            raise ValueError(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientOptions:
    """Options of one client; all times are in seconds, all sizes in bytes."""

    call_timeout_s: float = 30.0
    """Deadline of a call that only asks or starts something, tries included."""

    slow_call_timeout_s: float = 600.0
    """Deadline of a call that reads whole models or texts: `verify_model` and `score`."""

    stream_timeout_s: float | None = None
    """Deadline of `generate` and `load`; `None` lets them take as long as they need."""

    resume_timeout_s: float = 60.0
    """How long `watch_job` tries to get back to a server that it cannot reach."""

    max_message_bytes: int = 64 * 1024 * 1024
    """Largest message that is sent or accepted."""

    keepalive_interval_s: float = 30.0
    """Time between pings of an open connection; the server allows one every 10 s."""

    keepalive_timeout_s: float = 10.0
    """A connection whose ping is not answered in this time is given up."""

    max_attempts: int = 4
    """Tries of one call in all; 1 switches retries off."""

    first_backoff_s: float = 0.1
    """Wait before the second try where the server names none; doubles each time."""

    max_backoff_s: float = 2.0
    """Longest wait between two tries where the server names none."""

    retry_budget: int = 20
    """Retries that may be made in a row, over all calls of the client.

    Each call that succeeds gives back a tenth of a retry, so that a failing server
    gets at most 10 % more calls, not `max_attempts` times as many.
    """

    tls: TlsOptions | None = None
    """Encrypts the connection; None does not."""

    token: str | None = field(default=None, repr=False)
    """Bearer token of each call. Without TLS it is sent to this machine only."""

    traceparent: Callable[[], str | None] | None = None
    """Returns the W3C traceparent of the caller's trace, asked for each try of a call."""

    def __post_init__(self) -> None:
        """Raise ValueError where a value makes no sense."""
        if self.token is not None and _TOKEN.fullmatch(self.token) is None:
            message = "token has characters that a bearer token cannot have"
            raise ValueError(message)
        for name in ("max_message_bytes", "max_attempts"):
            if getattr(self, name) < 1:
                message = f"{name} must be at least 1"
                raise ValueError(message)
        for name in self.__slots__:
            value = getattr(self, name)
            if name.endswith("_s") and value is not None and not value > 0:
                message = f"{name} must be above 0"
                raise ValueError(message)


def default_address() -> str:
    """Return HOST:PORT from LOWBIT_ADDRESS, or that of a server on this machine."""
    return os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS


def is_loopback(address: str) -> bool:
    """Return whether an address is this machine's own."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or address.startswith("unix:")


def check_token(address: str, options: ClientOptions) -> None:
    """Raise ValueError when the token would be sent in the clear to another machine."""
    if options.token is not None and options.tls is None and not is_loopback(address):
        message = f"token needs tls: {address} is another machine"
        raise ValueError(message)


def call_metadata(options: ClientOptions) -> tuple[tuple[str, str], ...]:
    """Return what each try of a call tells about its caller."""
    told = []
    if options.token is not None:
        told.append(("authorization", f"Bearer {options.token}"))
    if options.traceparent is not None and (traceparent := options.traceparent()):
        told.append(("traceparent", traceparent))
    return tuple(told)


def channel_credentials(options: ClientOptions) -> grpc.ChannelCredentials | None:
    """Return the credentials of TLS; None without it."""
    if (tls := options.tls) is None:
        return None
    return grpc.ssl_channel_credentials(tls.ca, tls.key, tls.certificate)


def channel_options(address: str, options: ClientOptions) -> list[tuple[str, str | int]]:
    """Return gRPC's own names and values for `options`."""
    arguments: list[tuple[str, str | int]] = [
        ("grpc.primary_user_agent", USER_AGENT),
        # gRPC would retry on its own and hide the tries from retry.py.
        ("grpc.enable_retries", 0),
        ("grpc.max_send_message_length", options.max_message_bytes),
        ("grpc.max_receive_message_length", options.max_message_bytes),
        ("grpc.keepalive_time_ms", round(options.keepalive_interval_s * 1000)),
        ("grpc.keepalive_timeout_ms", round(options.keepalive_timeout_s * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        # A stream that waits for its first token sends nothing between two pings.
        ("grpc.http2.max_pings_without_data", 0),
        # gRPC waits a second and more before it connects again; our waits are shorter.
        ("grpc.initial_reconnect_backoff_ms", round(options.first_backoff_s * 1000)),
        ("grpc.min_reconnect_backoff_ms", round(options.first_backoff_s * 1000)),
        ("grpc.max_reconnect_backoff_ms", round(options.max_backoff_s * 1000)),
        # Each client has its own connection, so closing one is no business of another.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if options.tls is not None and options.tls.server_name is not None:
        arguments.append(("grpc.ssl_target_name_override", options.tls.server_name))
    if is_loopback(address):
        # An http_proxy of the environment cannot reach this machine's own loopback.
        arguments.append(("grpc.enable_http_proxy", 0))
    return arguments
