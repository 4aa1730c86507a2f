"""Commands that fill the store and put models onto devices."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowbit.cli.common import (
    AsJson,
    Device,
    DryRun,
    RequestId,
    Wait,
    connect,
    enum_name,
    estimate_row,
    moment,
    print_facts,
    print_json,
    print_table,
    size,
    usage_errors,
)
from lowbit.cli.progress import follow_job, follow_load, print_trials
from lowbit.errors import JobFailedError
from lowbit.v1.model_pb2 import Ancestor, ListModelsResponse, Model, ReplicaState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lowbit.sync.client import Client
    from lowbit.v1.job_pb2 import Job

app = typer.Typer(help="List, show, check and remove models.", invoke_without_command=True)

# Of a digest, what a person can compare.
_SHORT = 12

Name = Annotated[str, typer.Argument(help="Name or alias of a model.", show_default=False)]


def import_(  # noqa: PLR0913 - options of one request
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Name of the new model.", show_default=False)],
    path: Annotated[str | None, typer.Argument(help="Folder or GGUF file on the server.")] = None,
    *,
    hub: Annotated[str | None, typer.Option(help='Hub id, "org/name[@revision]".')] = None,
    type_: Annotated[
        str | None, typer.Option("--type", help="Type of float weights: fp32, fp16 or bf16.")
    ] = None,
    request_id: RequestId = "",
    dry_run: DryRun = False,
    wait: Wait = True,
) -> None:
    """Bring a model into the store."""
    with connect(context) as client:
        with usage_errors():
            job = client.import_model(
                name,
                path=None if path is None else str(Path(path).absolute()),
                hub_id=hub,
                type=type_,
                request_id=request_id,
                validate_only=dry_run,
            )
        finish_making(client, job, f"import {name}", dry_run=dry_run, wait=wait)


def load(
    context: typer.Context,
    name: Name,
    *,
    device: Device = "",
    replicas: Annotated[int, typer.Option(help="Workers that hold it.")] = 1,
) -> None:
    """Put a model onto a device and wait until it is live."""
    with connect(context) as client:
        with usage_errors():
            stream = client.load(name, device, replicas)
        for replica in follow_load(stream, f"load {name}"):
            typer.echo(f"{name}: {size(replica.live_bytes)} live on {replica.worker}")


def unload(
    context: typer.Context,
    name: Name,
    *,
    drain_timeout: Annotated[
        float | None, typer.Option(help="Seconds that running streams may take.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Cancel running streams at once.")] = False,
) -> None:
    """Take a model off its devices."""
    with connect(context) as client:
        done = client.unload(name, drain_timeout=drain_timeout, force=force)
    typer.echo(f"{name}: {done.replicas} unloaded, {size(done.freed_bytes)} freed")


@app.callback()
def root(context: typer.Context, *, as_json: AsJson = False) -> None:
    """List, show, check and remove models."""
    if context.invoked_subcommand is None:
        list_(context, as_json=as_json)


@app.command("list")
def list_(context: typer.Context, *, as_json: AsJson = False) -> None:
    """List the models of the store."""
    with connect(context) as client:
        models = list(client.models())
    if as_json:
        print_json(ListModelsResponse(models=models))
        return
    columns = ("NAME", "SCHEME", "PARAMETERS", "CONTEXT", "DISK", "PERPLEXITY", "LIVE ON")
    print_table(columns, [_row(model) for model in models])


@app.command()
def show(context: typer.Context, name: Name, *, as_json: AsJson = False) -> None:
    """Show one model."""
    with connect(context) as client:
        model = client.get_model(name)
    if as_json:
        print_json(model)
        return
    print_facts(
        [
            ("name", model.name),
            ("aliases", ", ".join(model.aliases)),
            ("revision", model.revision),
            ("scheme", model.scheme),
            ("architecture", model.architecture),
            ("parameters", f"{model.parameters:,}"),
            ("context", f"{model.context_tokens:,} tokens"),
            ("disk", f"{size(model.disk_bytes)} in {len(model.files)} files"),
            ("source", model.parent or model.source),
            ("perplexity", _perplexity(model)),
            ("made", moment(model.create_time)),
            ("live on", _live(model)),
            ("calibration", model.calibration_digest),
            ("libraries", ", ".join(f"{one.name} {one.version}" for one in model.libraries)),
        ]
    )
    typer.echo("lineage:")
    for line in _lineage(model):
        typer.echo(f"  {line}")


@app.command()
def delete(context: typer.Context, name: Name) -> None:
    """Remove a model from the store."""
    with connect(context) as client:
        client.delete_model(name)
    typer.echo(f"{name}: deleted")


@app.command()
def verify(context: typer.Context, name: Name, *, as_json: AsJson = False) -> None:
    """Hash a model's files again and compare them with its manifest."""
    with connect(context) as client:
        result = client.verify_model(name)
    if as_json:
        print_json(result)
    else:
        typer.echo(f"{name}: {result.files} files, {size(result.bytes)}, all as written")


@app.command()
def estimate(context: typer.Context, name: Name, *, as_json: AsJson = False) -> None:
    """Say what a model would take on each device, without loading it."""
    with connect(context) as client:
        found = client.estimate_load(name)
    if as_json:
        print_json(found)
        return
    print_facts([("disk", size(found.disk_bytes))])
    columns = ("DEVICE", "LIVE", "KV A TOKEN", "PEAK", "TIME", "FITS")
    rows = [(*estimate_row(one), "yes" if one.fits else "no") for one in found.devices]
    print_table(columns, rows)


@app.command()
def alias(
    context: typer.Context,
    alias_name: Annotated[str, typer.Argument(metavar="ALIAS", help="The second name.")],
    name: Annotated[str, typer.Argument(help="Model; leave it out to remove the alias.")] = "",
) -> None:
    """Let a second name point at a model, or remove it."""
    with connect(context) as client:
        client.set_alias(alias_name, name)
    typer.echo(f"{alias_name} -> {name}" if name else f"{alias_name}: removed")


def _lineage(model: Model) -> Iterator[str]:
    """Yield the chain from a model to the files that its first ancestor was imported from."""
    chain: list[Model | Ancestor] = [model, *model.ancestors]
    for one in chain:
        words = [f"{one.name} ({one.scheme})", f"revision {one.revision[:_SHORT]}"]
        if one.calibration_digest:
            words.append(f"calibrated with {one.calibration_digest[:_SHORT]}")
        yield ", ".join(words)
    first = chain[-1]
    if model.parent and not model.ancestors:  # made before lineage was recorded
        yield f"{model.parent}, revision {model.source_digest[:_SHORT]}"
        return
    commit = f" at {first.source_revision}" if first.source_revision else ""
    yield f"{first.source}{commit}, digest {first.source_digest[:_SHORT]}"
    for file in first.source_files:
        yield f"  {file.path}, {size(file.bytes)}, {file.sha256[:_SHORT]}"


def _row(model: Model) -> tuple[str, ...]:
    return (
        model.name,
        model.scheme,
        f"{model.parameters:,}",
        f"{model.context_tokens:,}",
        size(model.disk_bytes),
        _perplexity(model),
        _live(model),
    )


def finish_making(client: Client, job: Job, label: str, *, dry_run: bool, wait: bool) -> None:
    """Say that a dry run went well, or follow the job to its model, or print the job's id."""
    if dry_run:
        typer.echo("all is well; nothing was started")
    elif wait:
        try:
            print_trials(follow_job(client, job, label))
        except JobFailedError as error:
            print_trials(error.job)
            raise
        typer.echo(model_line(client.get_model(job.model)))
    else:
        typer.echo(job.id)


def model_line(model: Model) -> str:
    """Return name, scheme, size and quality in one line."""
    words = [f"{model.name}: {model.scheme}", size(model.disk_bytes)]
    if perplexity := _perplexity(model):
        words.append(f"perplexity {perplexity}")
    return ", ".join(words)


def _perplexity(model: Model) -> str:
    return f"{model.quality.perplexity:.2f}" if model.HasField("quality") else ""


def _live(model: Model) -> str:
    return ", ".join(
        f"{item.worker} ({enum_name(ReplicaState.DESCRIPTOR, item.state, 'REPLICA_STATE_')})"
        for item in model.replicas
    )
