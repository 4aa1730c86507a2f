"""The command `lowbit-server`."""

from __future__ import annotations

import asyncio
from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import Annotated, Any

import typer

from lowbit_server import logs
from lowbit_server.config import ConfigError, load_config

app = typer.Typer(add_completion=False)


@app.command()
def serve(  # noqa: PLR0913 - one parameter per flag
    config: Annotated[Path | None, typer.Option(help="TOML file.")] = None,
    home: Annotated[Path | None, typer.Option(help="Folder of the store.")] = None,
    listen: Annotated[str | None, typer.Option(help="HOST:PORT of the API.")] = None,
    device: Annotated[list[str] | None, typer.Option(help="cpu or cuda:N; repeatable.")] = None,
    workers_per_device: Annotated[int | None, typer.Option(help="Worker processes each.")] = None,
    import_root: Annotated[
        list[Path] | None, typer.Option(help="Folder to import from; repeatable.")
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
) -> None:
    """Make language models smaller and serve them over gRPC."""
    flags: dict[str, Any] = {
        "home": home,
        "listen": listen,
        "devices": device,
        "workers_per_device": workers_per_device,
        "import_roots": import_root,
        "log_level": log_level,
    }
    try:
        # A repeatable flag that is not given is an empty list.
        given = {key: value for key, value in flags.items() if value not in (None, [])}
        settings = load_config(config, given)
    except ConfigError as error:
        typer.echo(f"lowbit-server: {error}", err=True)
        raise typer.Exit(2) from error
    logs.configure(settings.log_level)
    from lowbit_server.server import Server  # noqa: PLC0415 - a bad configuration fails fast

    async def run() -> None:
        await Server(settings).run()

    asyncio.run(run())
