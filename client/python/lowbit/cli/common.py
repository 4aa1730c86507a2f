"""What several commands share: the connection, options and ways to print."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from datetime import UTC
from typing import TYPE_CHECKING, Annotated, Any

import typer
from google.protobuf.json_format import MessageToDict
from rich.console import Console
from rich.table import Table

from lowbit.sync.client import Client

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from google.protobuf.descriptor import EnumDescriptor
    from google.protobuf.message import Message
    from google.protobuf.timestamp_pb2 import Timestamp

    from lowbit.v1.model_pb2 import LoadEstimate
    from lowbit.v1.quantization_pb2 import DeviceEstimate

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
RequestId = Annotated[str, typer.Option(help="Makes the command idempotent.")]
DryRun = Annotated[bool, typer.Option(help="Check everything and start nothing.")]
Wait = Annotated[bool, typer.Option(help="Wait for the job and show its progress.")]
Tls = Annotated[bool, typer.Option("--tls", help="Use TLS with the system's authorities.")]
Device = Annotated[str, typer.Option(help='Such as "cpu" or "cuda:0"; chosen when empty.')]

_PIPE_COLUMNS = 200
_KIB = 1024.0
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 1 << 10, "MiB": 1 << 20}
_UNITS["GiB"] = 1 << 30
_SIZE = re.compile(rf"([0-9]+(?:\.[0-9]+)?)\s*({'|'.join(_UNITS)})?")


def connect(context: typer.Context) -> Client:
    """Return a client of the server that the options before the command name."""
    address, options = context.obj
    return Client(address, options)


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Turn a value that no request can hold into an error of usage."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def to_dict(message: Message) -> dict[str, Any]:
    """Return a message as JSON values; 64-bit integers are strings there."""
    return MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def print_json(document: Message | dict[str, Any], *, one_line: bool = False) -> None:
    """Print one JSON document."""
    values = document if isinstance(document, dict) else to_dict(document)
    typer.echo(json.dumps(values, indent=None if one_line else 2, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows under a head; nothing is cut off when the output is not a terminal."""
    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else _PIPE_COLUMNS).print(table)


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Print names and values, one pair a line."""
    for name, value in facts:
        typer.echo(f"{name + ':':<16} {value}")


def size(count: float) -> str:
    """Return bytes for a person."""
    for unit in ("B", "KiB", "MiB"):
        if count < _KIB:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= _KIB
    return f"{count:.2f} GiB"


def parsed_size(text: str) -> int:
    """Return the bytes of a size such as "120MB" (of 1000) or "1.5 GiB" (of 1024)."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        message = f"{text!r} is no size: write bytes, or a number with {', '.join(_UNITS)}"
        raise typer.BadParameter(message)
    return round(float(found[1]) * _UNITS[found[2] or "B"])


def estimate_row(estimate: DeviceEstimate | LoadEstimate) -> tuple[str, ...]:
    """Return the cells of one device: its name, bytes, and time where that is known."""
    known = estimate.HasField("duration")
    return (
        estimate.device,
        size(estimate.live_bytes),
        size(estimate.kv_bytes_per_token),
        size(estimate.peak_memory_bytes),
        f"{estimate.duration.ToMilliseconds() / 1000:.0f} s" if known else "unknown",
    )


def enum_name(kind: EnumDescriptor, value: int, prefix: str) -> str:
    """Return the name of an enum's value without prefix, also of one that is new to us."""
    found = kind.values_by_number.get(value)
    return found.name.removeprefix(prefix).lower() if found else str(value)


def moment(time: Timestamp) -> str:
    """Return a time in the local zone."""
    if not time.seconds:
        return ""
    return time.ToDatetime(tzinfo=UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")
