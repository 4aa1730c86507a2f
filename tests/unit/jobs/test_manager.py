"""The job queue, with job processes that only say what a test tells them."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any

import pytest

from lowbit_server.config import Config
from lowbit_server.errors import LowbitError, Reason
from lowbit_server.jobs.attempt import REPORT_BYTES
from lowbit_server.jobs.manager import JobManager
from lowbit_server.jobs.records import ENDED, RESUMABLE, Job, JobState, JobStore, now
from lowbit_server.jobs.run import MAX_LOST_PROCESSES
from lowbit_server.jobs.spec import Failed, ImportSpec, Progress, QuantizeSpec
from lowbit_server.quant.schemes import FloatScheme
from lowbit_server.store.artifacts import ArtifactStore
from lowbit_server.store.catalog import Catalog
from lowbit_server.store.database import Database
from lowbit_server.store.manifest import Manifest

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


def play(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Let the processes of jobs run a piece of Python."""
    command = [sys.executable, "-c", code]
    monkeypatch.setattr("lowbit_server.jobs.attempt.command", lambda *_: command)


def say(*reports: BaseModel) -> str:
    return "".join(f"print({report.model_dump_json()!r}, flush=True)\n" for report in reports)


def spec(name: str = "model") -> ImportSpec:
    return ImportSpec(model=name, path="/somewhere")


def quantizing(name: str, device: str) -> QuantizeSpec:
    return QuantizeSpec(model=name, source="source", scheme=FloatScheme(type="bf16"), device=device)


async def submit(manager: JobManager, name: str = "model") -> Job:
    return await manager.submit(spec(name), "", validate_only=False)


async def events(manager: JobManager, job: Job) -> list[Job]:
    return [event async for event in manager.watch(job.id, 0)]


async def reached(
    manager: JobManager, job: Job, state: JobState, *, progress: bool = False, after: int = 0
) -> None:
    """Wait for an event with a state, and with progress where asked for."""
    async for event in manager.watch(job.id, after):
        if event.state is state and (event.progress or not progress):
            return
    pytest.fail(f"it ended before it was {state}")


async def test_reports_become_events(manager: JobManager, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = Failed(reason=Reason.SOURCE_CORRUPT, message="broken")
    play(monkeypatch, say(PROGRESS, PROGRESS, failed))
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
async def test_processes_that_end_without_a_result_are_lost_and_soon_too_many(
    monkeypatch: pytest.MonkeyPatch, manager: JobManager, tmp_path: Path, code: str
) -> None:
    count = f"with open({str(tmp_path / 'count')!r}, 'a') as file: file.write('+')\n"
    play(monkeypatch, count + say(PROGRESS) + code)
    *_, last = await events(manager, await submit(manager))
    assert last.state is JobState.FAILED
    assert last.error is not None
    assert last.error.reason is Reason.JOB_PROCESS_LOST
    assert len((tmp_path / "count").read_text()) == MAX_LOST_PROCESSES
    assert not last.not_resumable


async def test_only_processes_that_finish_no_block_are_counted(
    monkeypatch: pytest.MonkeyPatch, manager: JobManager, tmp_path: Path
) -> None:
    # Each process finishes a block and dies, ten times; the rest finish none.
    code = f"""
import os, pathlib
file = pathlib.Path({str(tmp_path / "count")!r})
tries = len(file.read_text()) if file.exists() else 0
file.write_text((tries + 1) * "+")
print('{{"kind":"progress","phase":"quantize","done":%d,"total":99}}' % min(tries, 10), flush=True)
os.kill(os.getpid(), 9)
"""
    play(monkeypatch, code)
    seen = await events(manager, await submit(manager))
    assert (tmp_path / "count").read_text() == (1 + 10 + MAX_LOST_PROCESSES) * "+"
    assert [one.sequence for one in seen] == list(range(1, len(seen) + 1))
    assert [one.state for one in seen[1:-1]] == [JobState.RUNNING] * (len(seen) - 2)


async def test_trials_become_events_and_progress(
    monkeypatch: pytest.MonkeyPatch, manager: JobManager, tmp_path: Path
) -> None:
    # Each process has tried one scheme more, and its next one begins with the first block.
    code = f"""
import json, os, pathlib
file = pathlib.Path({str(tmp_path / "count")!r})
tries = len(file.read_text()) if file.exists() else 0
file.write_text((tries + 1) * "+")
trials = [{{"scheme": "s%d" % n, "verdict": "no"}} for n in range(min(tries, 6))]
print(json.dumps({{"kind": "tried", "trials": trials}}), flush=True)
print('{{"kind":"progress","phase":"quantize","done":0,"total":99}}', flush=True)
os.kill(os.getpid(), 9)
"""
    play(monkeypatch, code)
    seen = await events(manager, await submit(manager))
    assert (tmp_path / "count").read_text() == (1 + 6 + MAX_LOST_PROCESSES) * "+"
    assert [one.scheme for one in seen[-1].trials] == [f"s{number}" for number in range(6)]


async def test_an_error_that_is_told_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, manager: JobManager
) -> None:
    failed = Failed(reason=Reason.INTERNAL, message="a bug")
    play(monkeypatch, say(PROGRESS, failed))
    seen = await events(manager, await submit(manager))
    assert [one.progress for one in seen].count(PROGRESS) == 2  # once told, once at the end


async def test_what_claims_to_be_staged_is_checked(
    manager: JobManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(monkeypatch, 'print(\'{"kind": "staged"}\')')
    *_, last = await events(manager, await submit(manager))
    assert last.state is JobState.FAILED
    assert last.error is not None
    assert last.error.reason is Reason.ARTIFACT_CORRUPT


async def test_a_job_that_is_cancelled_before_its_first_step_never_runs(
    monkeypatch: pytest.MonkeyPatch, manager: JobManager, records: JobStore
) -> None:
    play(monkeypatch, "raise SystemExit('it ran')")
    job = Job(id="early", spec=spec(), create_time=now())
    await records.create(job)
    manager._enqueue(job)
    manager._pump()  # it has left the queue, and its task has not begun
    await manager.cancel(job.id)
    states = [one.state for one in await events(manager, job)]
    assert states == [JobState.QUEUED, JobState.CANCELLING, JobState.CANCELLED]
    assert manager.counts == (0, 0)


HANGS = "import sys; sys.stdin.read()"


async def test_jobs_run_in_their_order_and_are_told_their_places(
    monkeypatch: pytest.MonkeyPatch, manager: JobManager
) -> None:
    play(monkeypatch, HANGS)
    jobs = [await submit(manager, f"model-{index}") for index in range(4)]
    await reached(manager, jobs[0], JobState.RUNNING)
    assert [(await manager.get(job.id)).queue_position for job in jobs] == [0, 1, 2, 3]
    await manager.cancel(jobs[2].id)
    assert (await manager.get(jobs[3].id)).queue_position == 2
    for job in jobs:
        await manager.cancel(job.id)
        assert (await events(manager, job))[-1].state is JobState.CANCELLED
    places = [
        [one.queue_position for one in await events(manager, job) if one.state is JobState.QUEUED]
        for job in jobs
    ]
    assert places == [[1], [1], [2], [3, 2, 1]]


async def test_devices_do_not_wait_for_each_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, records: JobStore
) -> None:
    config = Config(home=tmp_path / "home", devices=("cpu", "cuda:0"), max_running_jobs=2)
    catalog = Catalog(ArtifactStore(config.home), records._database)
    await catalog.start()
    manager = JobManager(config, catalog, records)
    play(monkeypatch, HANGS)
    jobs = {}
    for device in ("cpu", "cuda:0"):
        for index in range(4):
            name = f"{device.partition(':')[0]}-{index}"
            jobs[name] = await manager.submit(quantizing(name, device), "", validate_only=False)
    jobs["import"] = await submit(manager, "import")
    assert manager.counts == (5, 4)
    places = {}
    for name, job in jobs.items():
        if name in {"cpu-2", "cpu-3", "cuda-2", "cuda-3"}:
            places[name] = (await manager.get(job.id)).queue_position
        else:
            await reached(manager, job, JobState.RUNNING)
    assert places == {"cpu-2": 1, "cpu-3": 2, "cuda-2": 1, "cuda-3": 2}
    await manager.stop()


async def test_stopping_pauses_what_runs_and_a_new_start_goes_on_with_it_first(
    manager: JobManager, records: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(monkeypatch, say(PROGRESS) + HANGS)
    running, waiting = await submit(manager, "running"), await submit(manager, "waiting")
    await reached(manager, running, JobState.RUNNING, progress=True)
    await manager.stop()
    assert (await records.get(running.id)).state is JobState.PAUSED
    assert (await records.get(waiting.id)).state is JobState.QUEUED
    again = JobManager(manager._config, manager._catalog, records)
    await again.start()
    await reached(again, running, JobState.RUNNING, after=(await records.get(running.id)).sequence)
    assert (await again.get(waiting.id)).queue_position == 1
    for job in (running, waiting):
        await again.cancel(job.id)
    seen = await events(again, running)
    assert [one.sequence for one in seen] == list(range(1, len(seen) + 1))
    states = [one.state for one in seen if one.state is not JobState.CANCELLING]
    assert list(dict.fromkeys(states)) == [
        JobState.QUEUED,
        JobState.RUNNING,
        JobState.PAUSED,
        JobState.CANCELLED,
    ]
    assert states.count(JobState.QUEUED) == 2
    await again.stop()


async def test_a_call_that_is_given_up_leaves_no_gap(
    manager: JobManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(monkeypatch, HANGS)
    first, second = await submit(manager, "first"), await submit(manager, "second")
    await reached(manager, first, JobState.RUNNING)
    for job in (second, first):
        call = asyncio.create_task(manager.cancel(job.id))
        await asyncio.sleep(0)  # it has begun, and its event is being stored
        call.cancel()
        seen = await events(manager, job)
        assert [one.sequence for one in seen] == list(range(1, len(seen) + 1))
        assert seen[-1].state is JobState.CANCELLED


async def test_after_a_restart_every_job_goes_on_or_has_ended(
    manager: JobManager, records: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = Failed(reason=Reason.SOURCE_NOT_FOUND, message="gone")
    play(monkeypatch, say(failed))
    left: dict[JobState, Any] = {}
    for state in JobState:
        job = Job(id=state.lower(), spec=spec(state.lower()), state=state, create_time=now())
        await records.create(job)
        left[state] = job
    await manager.start()
    last = {state: (await events(manager, job))[-1] for state, job in left.items()}
    assert last[JobState.CANCELLING].state is JobState.CANCELLED
    for state in (JobState.RUNNING, JobState.QUEUED, JobState.PAUSED):
        assert last[state].error == failed  # it was started
    for state in ENDED:
        assert last[state] == left[state]


async def test_a_job_that_was_published_before_the_server_died_has_succeeded(
    manager: JobManager, records: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(monkeypatch, "raise SystemExit('it ran')")
    for state in (JobState.RUNNING, JobState.CANCELLING):
        name = state.lower()
        await records.create(Job(id=name, spec=spec(name), state=state, create_time=now()))
        manager._catalog._manifests[name] = Manifest.model_construct(name=name)
    await manager.start()
    for state in (JobState.RUNNING, JobState.CANCELLING):
        assert (await records.get(state.lower())).state is JobState.SUCCEEDED


# Resuming


async def ended(records: JobStore, state: JobState, reason: Reason | None = None) -> Job:
    error = Failed(reason=reason, message="so it ended") if reason else None
    job = Job(id="ended", spec=spec(), state=state, error=error, create_time=now(), sequence=7)
    await records.create(job)
    return job


@pytest.mark.parametrize("reason", Reason)
async def test_failed_jobs_are_resumed_where_the_cause_may_be_gone(
    manager: JobManager, records: JobStore, monkeypatch: pytest.MonkeyPatch, reason: Reason
) -> None:
    play(monkeypatch, HANGS)
    job = await ended(records, JobState.FAILED, reason)
    assert manager.resumable(job) == (reason in RESUMABLE)
    if reason not in RESUMABLE:
        with pytest.raises(LowbitError, match=str(reason)) as caught:
            await manager.resume(job.id)
        assert caught.value.reason is Reason.JOB_NOT_RESUMABLE
        return
    resumed = await manager.resume(job.id)
    assert (resumed.state, resumed.error, resumed.end_time) == (JobState.QUEUED, None, None)
    await reached(manager, job, JobState.RUNNING, after=7)


async def test_what_runs_or_has_succeeded_is_not_resumed(
    manager: JobManager, records: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(monkeypatch, HANGS)
    running = await submit(manager, "running")
    waiting = await submit(manager, "waiting")
    succeeded = await ended(records, JobState.SUCCEEDED)
    for job, why in ((running, "by itself"), (waiting, "by itself"), (succeeded, "ended well")):
        with pytest.raises(LowbitError, match=why) as caught:
            await manager.resume(job.id)
        assert caught.value.reason is Reason.JOB_NOT_RESUMABLE
    with pytest.raises(LowbitError) as caught:
        await manager.resume("nobody")
    assert caught.value.reason is Reason.JOB_NOT_FOUND


async def test_checkpoints_that_nobody_can_go_on_from_are_removed(
    manager: JobManager, records: JobStore
) -> None:
    kept = {"cancelled", "lost", "queued"}
    for name, state, reason in (
        ("cancelled", JobState.CANCELLED, None),
        ("lost", JobState.FAILED, Reason.JOB_PROCESS_LOST),
        ("queued", JobState.QUEUED, None),
        ("gate", JobState.FAILED, Reason.QUALITY_GATE_FAILED),
        ("done", JobState.SUCCEEDED, None),
    ):
        error = Failed(reason=reason, message="") if reason else None
        job = Job(id=name, spec=spec(name), state=state, error=error, create_time=now())
        await records.create(job)
    folder = manager._config.home / "checkpoints"
    for name in (*kept, "gate", "done", "orphan"):
        (folder / name).mkdir(parents=True)
    await manager._checkpoints.remove_leftovers()
    assert {path.name for path in folder.iterdir()} == kept
    await manager.delete("lost")
    assert {path.name for path in folder.iterdir()} == kept - {"lost"}
