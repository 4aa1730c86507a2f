"""What a client may be told about its connection: limits, timeouts and retries."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.metadata import version

DEFAULT_ADDRESS = "127.0.0.1:50151"
ADDRESS_VARIABLE = "LOWBIT_ADDRESS"
USER_AGENT = f"lowbit-python/{version('lowbit')}"

_LOOPBACK = ("127.", "localhost:", "[::1]:", "unix:")


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

    def __post_init__(self) -> None:
        """Raise ValueError where a value makes no sense."""
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
    if address.startswith(_LOOPBACK):
        # An http_proxy of the environment cannot reach this machine's own loopback.
        arguments.append(("grpc.enable_http_proxy", 0))
    return arguments
