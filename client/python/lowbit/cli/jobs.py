"""Commands that follow, stop and resume jobs."""

from __future__ import annotations

from typing import Annotated

import typer

from lowbit.cli.common import (
    AsJson,
    connect,
    enum_name,
    moment,
    print_facts,
    print_json,
    print_table,
    usage_errors,
)
from lowbit.cli.progress import follow_job, print_trials, progress_text
from lowbit.errors import JobFailedError, reason_name
from lowbit.v1.job_pb2 import (
    JOB_STATE_SUCCEEDED,
    Job,
    JobKind,
    JobState,
    ListJobsResponse,
)

app = typer.Typer(help="List, watch, cancel and resume jobs.", invoke_without_command=True)

JobId = Annotated[str, typer.Argument(metavar="ID", help="Id of a job.", show_default=False)]
States = Annotated[
    list[str] | None, typer.Option("--state", help="Only jobs in this state; may be repeated.")
]

_STATES = {
    name.removeprefix("JOB_STATE_").lower(): value for name, value in JobState.items() if value
}


@app.callback()
def root(context: typer.Context, *, state: States = None, as_json: AsJson = False) -> None:
    """List, watch, cancel and resume jobs."""
    if context.invoked_subcommand is None:
        list_(context, state=state, as_json=as_json)


@app.command("list")
def list_(context: typer.Context, *, state: States = None, as_json: AsJson = False) -> None:
    """List jobs, newest first."""
    with usage_errors():
        states = [_state(name) for name in state or ()]
    with connect(context) as client:
        jobs = list(client.jobs(states))
    if as_json:
        print_json(ListJobsResponse(jobs=jobs))
        return
    columns = ("ID", "KIND", "STATE", "MODEL", "SCHEME", "MADE", "PROGRESS")
    print_table(columns, [_row(job) for job in jobs])


@app.command()
def show(context: typer.Context, job_id: JobId, *, as_json: AsJson = False) -> None:
    """Show one job."""
    with connect(context) as client:
        job = client.get_job(job_id)
    if as_json:
        print_json(job)
        return
    names = ("id", "kind", "state", "model", "scheme", "made", "progress")
    facts = list(zip(names, _row(job), strict=True))
    if job.device:
        facts.append(("device", job.device))
    if job.HasField("error"):
        facts.append(("error", f"{reason_name(job.error.reason)}: {job.error.message}"))
    if job.resumable:
        facts.append(("resume with", f"lowbit jobs resume {job.id}"))
    print_facts(facts)
    print_trials(job)


@app.command()
def watch(context: typer.Context, job_id: JobId, *, as_json: AsJson = False) -> None:
    """Follow a job until it ends; exits with 1 when it does not succeed."""
    with connect(context) as client:
        if not as_json:
            follow_job(client, Job(id=job_id), job_id)
            return
        job = Job(id=job_id)
        for event in client.watch_job(job_id):
            job = event.job
            print_json(event, one_line=True)
    if job.state != JOB_STATE_SUCCEEDED:
        raise JobFailedError(job)


@app.command()
def cancel(context: typer.Context, job_id: JobId) -> None:
    """Ask a job to stop."""
    with connect(context) as client:
        job = client.cancel_job(job_id)
    typer.echo(f"{job_id}: {_state_name(job)}")


@app.command()
def resume(context: typer.Context, job_id: JobId) -> None:
    """Go on with a job that was cancelled or interrupted."""
    with connect(context) as client:
        job = client.resume_job(job_id)
    typer.echo(f"{job_id}: {_state_name(job)}")


def _state_name(job: Job) -> str:
    return enum_name(JobState.DESCRIPTOR, job.state, "JOB_STATE_")


def _state(name: str) -> JobState.ValueType:
    if name.lower() not in _STATES:
        text = f"unknown state {name!r}; allowed are {', '.join(_STATES)}"
        raise ValueError(text)
    return _STATES[name.lower()]


def _row(job: Job) -> tuple[str, ...]:
    return (
        job.id,
        enum_name(JobKind.DESCRIPTOR, job.kind, "JOB_KIND_"),
        _state_name(job),
        job.model,
        job.scheme,
        moment(job.create_time),
        progress_text(job),
    )
