"""The job queue, with job processes that only say what a test tells them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest

from lowbit_server.config import Config
from lowbit_server.errors import Reason
from lowbit_server.jobs.manager import REPORT_BYTES, JobManager
from lowbit_server.jobs.records import Job, JobState, JobStore, now
from lowbit_server.jobs.spec import Failed, ImportSpec, Progress
from lowbit_server.store.artifacts import ArtifactStore
from lowbit_server.store.catalog import Catalog
from lowbit_server.store.database import Database

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from pydantic import BaseModel

PROGRESS = Progress(phase="save", done=1, total=2)


@pytest.fixture
async def records(tmp_path: Path) -> AsyncIterator[JobStore]:
    database = Database(tmp_path / "lowbit.db")
    yield JobStore(database)
    database.close()


@pytest.fixture
async def manager(tmp_path: Path, records: JobStore) -> AsyncIterator[JobManager]:
    config = Config(home=tmp_path / "home")
    catalog = Catalog(ArtifactStore(config.home), records._database)
    await catalog.start()
    manager = JobManager(config, catalog, records)
    yield manager
    await manager.stop()


def play(manager: JobManager, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Let the processes of jobs run a piece of Python."""
    monkeypatch.setattr(manager, "_command", lambda *_: [sys.executable, "-c", code])


def say(*reports: BaseModel) -> str:
    return "".join(f"print({report.model_dump_json()!r}, flush=True)\n" for report in reports)


def spec(name: str = "model") -> ImportSpec:
    return ImportSpec(model=name, path="/somewhere")


async def submit(manager: JobManager, name: str = "model") -> Job:
    return await manager.submit(spec(name), "", validate_only=False)


async def events(manager: JobManager, job: Job) -> list[Job]:
    return [event async for event in manager.watch(job.id, 0)]


async def test_reports_become_events(manager: JobManager, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = Failed(reason=Reason.SOURCE_CORRUPT, message="broken")
    play(manager, monkeypatch, say(PROGRESS, PROGRESS, failed))
    seen = await events(manager, await submit(manager))
    assert [one.sequence for one in seen] == [1, 2, 3, 4, 5]
    assert [one.progress for one in seen] == [None, None, *[PROGRESS] * 3]
    assert (seen[-1].state, seen[-1].error) == (JobState.FAILED, failed)
    assert manager.counts == (0, 0)


@pytest.mark.parametrize(
    "code",
    [
        "",
        "raise SystemExit(3)",
        "print('no report')",
        f"print('x' * {2 * REPORT_BYTES})",
        "import os; os.kill(os.getpid(), 9)",
    ],
    ids=["silent", "exit code", "garbage", "too long", "killed"],
)
async def test_a_process_that_ends_without_a_result_is_lost(
    manager: JobManager, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    play(manager, monkeypatch, say(PROGRESS) + code)
    *_, last = await events(manager, await submit(manager))
    assert last.state is JobState.FAILED
    assert last.error is not None
    assert last.error.reason is Reason.JOB_PROCESS_LOST


async def test_what_claims_to_be_staged_is_checked(
    manager: JobManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(manager, monkeypatch, 'print(\'{"kind": "staged"}\')')
    *_, last = await events(manager, await submit(manager))
    assert last.state is JobState.FAILED
    assert last.error is not None
    assert last.error.reason is Reason.ARTIFACT_CORRUPT


async def test_a_job_that_is_cancelled_before_its_first_step_never_runs(
    manager: JobManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(manager, monkeypatch, "raise SystemExit('it ran')")
    job = await submit(manager)  # it has left the queue, and its task has not begun
    assert manager.counts == (1, 0)
    await manager.cancel(job.id)
    states = [one.state for one in await events(manager, job)]
    assert states == [JobState.QUEUED, JobState.CANCELLING, JobState.CANCELLED]
    assert manager.counts == (0, 0)


async def test_jobs_run_in_their_order(
    manager: JobManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(manager, monkeypatch, "import sys; sys.stdin.read()")
    jobs = [await submit(manager, f"model-{index}") for index in range(3)]
    assert [manager.position(job) for job in jobs] == [0, 1, 2]
    for job in jobs:
        assert manager.position(job) == 0
        await manager.cancel(job.id)
        assert (await events(manager, job))[-1].state is JobState.CANCELLED


async def test_stopping_fails_what_runs_and_keeps_what_waits(
    manager: JobManager, records: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(manager, monkeypatch, say(PROGRESS) + "import sys; sys.stdin.read()")
    running, waiting = await submit(manager, "running"), await submit(manager, "waiting")
    async for event in manager.watch(running.id, 0):
        if event.progress:
            break
    await manager.stop()
    ended = await records.get(running.id)
    assert ended.state is JobState.FAILED
    assert ended.error is not None
    assert ended.error.reason is Reason.SERVER_RESTARTED
    assert (await records.get(waiting.id)).state is JobState.QUEUED


async def test_after_a_restart_no_job_runs_for_ever(
    manager: JobManager, records: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = Failed(reason=Reason.SOURCE_NOT_FOUND, message="gone")
    play(manager, monkeypatch, say(failed))
    left: dict[JobState, Any] = {}
    for state in JobState:
        job = Job(id=state.lower(), spec=spec(state.lower()), state=state, create_time=now())
        await records.create(job)
        left[state] = job
    await manager.start()
    last = {state: (await events(manager, job))[-1] for state, job in left.items()}
    assert last[JobState.RUNNING].state is JobState.FAILED
    assert last[JobState.RUNNING].error.reason is Reason.SERVER_RESTARTED
    assert last[JobState.CANCELLING].state is JobState.CANCELLED
    assert last[JobState.QUEUED].error == failed  # it was started
    for state in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED):
        assert last[state] == left[state]
