"""Puts the commands together and turns exceptions into one line and an exit code."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import TYPE_CHECKING, Annotated

import typer

from lowbit.cli import demo, evaluate, generate, jobs, models, quantize, runtime
from lowbit.cli.common import Tls, usage_errors
from lowbit.cli.server import DemoError
from lowbit.errors import LowbitError
from lowbit.options import (
    ADDRESS_VARIABLE,
    DEFAULT_ADDRESS,
    ClientOptions,
    TlsOptions,
    check_token,
    default_address,
)
from lowbit.renamed import replacement

if TYPE_CHECKING:
    from collections.abc import Sequence

app = typer.Typer(
    name="lowbit",
    help="Make language models smaller and serve them.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.command("import")(models.import_)
app.command("quantize")(quantize.quantize)
app.command("estimate")(quantize.estimate)
app.command("evaluate")(evaluate.evaluate)
app.command("compare")(evaluate.compare)
app.command("load")(models.load)
app.command("unload")(models.unload)
app.command("generate")(generate.generate)
app.command("score")(generate.score)
app.add_typer(models.app, name="models")
app.add_typer(jobs.app, name="jobs")
app.command("schemes")(quantize.schemes)
app.command("devices")(runtime.devices)
app.command("info")(runtime.info)
app.command("demo")(demo.demo)


@app.callback()
def root(  # noqa: PLR0913 - one parameter per option
    context: typer.Context,
    *,
    address: Annotated[
        str | None,
        typer.Option(
            envvar=ADDRESS_VARIABLE,
            metavar="HOST:PORT",
            help=f"Server to talk to.  [default: {DEFAULT_ADDRESS}]",
        ),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(envvar="LOWBIT_TOKEN", help="Bearer token; prefer the variable."),
    ] = None,
    tls: Tls = False,
    ca: Annotated[
        Path | None,
        typer.Option(envvar="LOWBIT_CA", exists=True, help="Use TLS; authority's PEM file."),
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(exists=True, help="This client's certificate, PEM.")
    ] = None,
    key: Annotated[Path | None, typer.Option(exists=True, help="Its key, PEM.")] = None,
) -> None:
    """Make language models smaller and serve them."""
    with usage_errors():
        given = tls or any((ca, certificate, key))
        secured = TlsOptions(ca=_read(ca), certificate=_read(certificate), key=_read(key))
        options = ClientOptions(tls=secured if given else None, token=token)
        check_token(address or default_address(), options)
    context.obj = (address, options)


def _read(file: Path | None) -> bytes | None:
    return None if file is None else file.read_bytes()


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    try:
        code = app(arguments, prog_name="lowbit", standalone_mode=False)
    except (LowbitError, DemoError) as error:
        return _failed(str(error), 1)
    except typer.TyperException as error:
        advice = replacement(getattr(error, "option_name", ""))
        advice = f"it is a name of another library: {advice}" if advice else "see lowbit --help"
        return _failed(f"{error.format_message()} ({advice})", error.exit_code)
    except typer.Abort:
        return 130
    return code if isinstance(code, int) else 0


def _failed(text: str, code: int) -> int:
    typer.echo(f"lowbit: error: {' '.join(text.split())}", err=True)
    return code
