"""Commands that show what the server runs on."""

from __future__ import annotations

import typer  # noqa: TC002 - read at run time

from lowbit.cli.common import (
    AsJson,
    connect,
    enum_name,
    moment,
    print_facts,
    print_json,
    print_table,
    size,
)
from lowbit.v1.runtime_pb2 import ListDevicesResponse, WorkerState


def devices(context: typer.Context, *, as_json: AsJson = False) -> None:
    """List devices with their memory, workers and live models."""
    with connect(context) as client:
        found = client.devices()
    if as_json:
        print_json(ListDevicesResponse(devices=found))
        return
    rows = [
        (
            device.name,
            device.description,
            f"{size(device.free_bytes)} of {size(device.total_bytes)}",
            ", ".join(
                f"{worker.name} {enum_name(WorkerState.DESCRIPTOR, worker.state, 'WORKER_STATE_')}"
                for worker in device.workers
            ),
            ", ".join(f"{live.model} {size(live.live_bytes)}" for live in device.models),
        )
        for device in found
    ]
    print_table(("NAME", "DESCRIPTION", "FREE", "WORKERS", "MODELS"), rows)


def info(context: typer.Context, *, as_json: AsJson = False) -> None:
    """Show the server's versions, limits and import roots."""
    with connect(context) as client:
        found = client.info()
        address = client.address
    if as_json:
        print_json(found)
        return
    print_facts(
        [
            ("address", address),
            ("version", found.version),
            ("started", moment(found.start_time)),
            ("state", "draining" if found.draining else "serving"),
            ("import roots", ", ".join(found.import_roots) or "none"),
            ("largest message", size(found.limits.max_message_bytes)),
            ("most requests", f"{found.limits.max_admitted_requests:,}"),
            ("libraries", ", ".join(f"{item.name} {item.version}" for item in found.libraries)),
        ]
    )
