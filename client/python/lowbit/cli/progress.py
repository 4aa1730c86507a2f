"""Progress bars of jobs and loads, on stderr."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from lowbit.cli.common import enum_name, print_table, size
from lowbit.errors import JobFailedError
from lowbit.v1.job_pb2 import (
    JOB_STATE_CANCELLING,
    JOB_STATE_RUNNING,
    JOB_STATE_SUCCEEDED,
    Job,
    JobPhase,
    JobState,
)
from lowbit.v1.model_pb2 import LoadPhase

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lowbit.sync.client import Client
    from lowbit.sync.stream import LoadStream
    from lowbit.v1.model_pb2 import LoadResponse

_AT_WORK = (JOB_STATE_RUNNING, JOB_STATE_CANCELLING)


def follow_job(client: Client, job: Job, title: str) -> Job:
    """Show a job until it ends, and return it.

    Raises:
        JobFailedError: when it did not succeed.

    """
    try:
        with _bar() as bar, client.watch_job(job.id) as events:
            task = bar.add_task(title, total=None, detail="")
            for event in events:
                job = event.job
                _show(bar, task, job)
            if job.state == JOB_STATE_SUCCEEDED:
                bar.update(task, total=1, completed=1, detail="done")
    except KeyboardInterrupt:
        typer.echo(f"job {job.id} goes on; stop it with: lowbit jobs cancel {job.id}", err=True)
        raise
    if job.state != JOB_STATE_SUCCEEDED:
        raise JobFailedError(job)
    return job


def follow_load(stream: LoadStream, title: str) -> Sequence[LoadResponse]:
    """Show a load until it is done; return the last message of each replica."""
    last: dict[tuple[str, str], LoadResponse] = {}
    with _bar() as bar, stream:
        tasks = {}
        for step in stream:
            key = (step.device, step.worker)
            last[key] = step
            if key not in tasks:
                tasks[key] = bar.add_task(title, total=1.0, detail="")
            phase = enum_name(LoadPhase.DESCRIPTOR, step.phase, "LOAD_PHASE_").replace("_", " ")
            done = 1.0 if phase == "live" else step.fraction
            bar.update(tasks[key], completed=done, detail=f"{phase} {step.worker}")
    return list(last.values())


def progress_text(job: Job) -> str:
    """Return what a job is doing, in a few words."""
    if job.queue_position:
        return f"place {job.queue_position} in the queue"
    if job.state not in _AT_WORK or not job.progress.phase:
        return enum_name(JobState.DESCRIPTOR, job.state, "JOB_STATE_")
    words = [enum_name(JobPhase.DESCRIPTOR, job.progress.phase, "JOB_PHASE_")]
    if job.progress.total:
        words.append(f"{job.progress.done}/{job.progress.total}")
    if job.progress.bytes:
        words.append(size(job.progress.bytes))
    if job.progress.HasField("eta"):
        words.append(f"{job.progress.eta.ToSeconds()} s left")
    return " ".join(words)


def print_trials(job: Job) -> None:
    """Print what scheme auto has tried; nothing for other jobs."""
    if not job.trials:
        return
    rows = [
        (
            trial.scheme,
            size(trial.live_bytes) if trial.live_bytes else "",
            f"{trial.quality.mean_kl:.4f}" if trial.HasField("quality") else "",
            f"{trial.quality.top1_agreement:.1%}" if trial.HasField("quality") else "",
            trial.verdict,
        )
        for trial in job.trials
    ]
    print_table(("TRIED", "LIVE", "KL MEAN", "TOP-1", "VERDICT"), rows)


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
        console=Console(stderr=True),
    )


def _show(bar: Progress, task: TaskID, job: Job) -> None:
    total = job.progress.total or None
    bar.update(task, total=total, completed=job.progress.done, detail=progress_text(job))
