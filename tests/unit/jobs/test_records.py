"""Jobs and their events in the database."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.jobs.records import ENDED, Job, JobState, JobStore, now
from lowbit_server.jobs.spec import Failed, ImportSpec, Progress, QuantizeSpec
from lowbit_server.quant.schemes import Bnb4BitScheme
from lowbit_server.store.database import Database, job_events

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "lowbit.db")
    yield database
    database.close()


@pytest.fixture
def store(database: Database) -> JobStore:
    return JobStore(database)


def job(name: str, **values: Any) -> Job:
    spec = ImportSpec(model=name, path="/somewhere")
    return Job(id=name, spec=spec, create_time=now(), **values)


async def add(store: JobStore, *names: str, **values: Any) -> list[Job]:
    jobs = [job(name, **values) for name in names]
    for one in jobs:
        await store.create(one)
    return jobs


async def change(store: JobStore, before: Job, **values: Any) -> Job:
    after = before.model_copy(update={**values, "sequence": before.sequence + 1})
    await store.update(after)
    return after


async def refused(call: Any) -> Reason:
    with pytest.raises(LowbitError) as caught:
        await call
    return caught.value.reason


async def test_a_job_comes_back_as_it_was_stored(store: JobStore) -> None:
    scheme = Bnb4BitScheme(quant_type="nf4", double_quant=False)
    spec = QuantizeSpec(model="small", source="big", scheme=scheme, device="cpu")
    stored = Job(
        id="1",
        spec=spec,
        state=JobState.FAILED,
        progress=Progress(phase="quantize", done=3, total=9, bytes=1 << 40, eta_s=1.5),
        error=Failed(reason=Reason.DISK_FULL, message="full"),
        request_id="request",
        create_time=now(),
        start_time=now(),
        end_time=now(),
    )
    await store.create(stored)
    assert await store.get("1") == stored
    assert await store.find("request") == stored
    assert await store.find("another") is None


async def test_each_change_is_an_event(store: JobStore) -> None:
    (queued,) = await add(store, "a")
    running = await change(store, queued, state=JobState.RUNNING)
    ended = await change(store, running, state=JobState.SUCCEEDED)
    assert await store.events("a", 0) == [queued, running, ended]
    assert await store.events("a", 1) == [running, ended]
    assert await store.events("a", 3) == []
    assert await store.get("a") == ended


async def test_an_event_is_never_stored_twice(store: JobStore) -> None:
    (queued,) = await add(store, "a")
    running = await change(store, queued, state=JobState.RUNNING)
    with pytest.raises(sa.exc.IntegrityError):
        await store.update(running)
    with pytest.raises(sa.exc.IntegrityError):
        await store.create(queued)
    assert len(await store.events("a", 0)) == 2


async def test_a_request_id_belongs_to_one_job(store: JobStore) -> None:
    await store.create(job("a", request_id="same"))
    with pytest.raises(sa.exc.IntegrityError):
        await store.create(job("b", request_id="same"))
    assert await refused(store.get("b")) is Reason.JOB_NOT_FOUND
    await add(store, "c", "d")  # an empty request_id is none


async def test_pages_are_newest_first_and_meet_without_gaps(store: JobStore) -> None:
    names = [str(index) for index in range(7)]
    await add(store, *names)
    for size in (1, 3, 7, 100):
        seen: list[str] = []
        before: int | None = None
        while True:
            page, before = await store.page([], before, size)
            assert 0 < len(page) <= size
            seen += [one.id for one in page]
            if before is None:
                break
        assert seen == names[::-1]


async def test_a_job_that_is_added_between_two_pages_moves_nothing(store: JobStore) -> None:
    await add(store, "a", "b", "c")
    first, before = await store.page([], None, 2)
    await add(store, "d")
    second, _ = await store.page([], before, 2)
    assert [one.id for one in (*first, *second)] == ["c", "b", "a"]


async def test_pages_of_some_states(store: JobStore) -> None:
    a, b, c = await add(store, "a", "b", "c")
    await change(store, a, state=JobState.RUNNING)
    await change(store, c, state=JobState.FAILED)
    page, more = await store.page([JobState.RUNNING, JobState.QUEUED], None, 10)
    assert ([one.id for one in page], more) == (["b", "a"], None)
    assert b.state is JobState.QUEUED


@pytest.mark.parametrize("state", JobState)
async def test_only_ended_jobs_are_deleted(store: JobStore, state: JobState) -> None:
    await add(store, "a", state=state)
    if state not in ENDED:
        assert await refused(store.delete("a")) is Reason.JOB_NOT_ENDED
        assert (await store.get("a")).state is state
        return
    await store.delete("a")
    assert await refused(store.get("a")) is Reason.JOB_NOT_FOUND
    assert await refused(store.delete("a")) is Reason.JOB_NOT_FOUND


async def test_a_deleted_job_takes_its_events_along(store: JobStore, database: Database) -> None:
    await add(store, "a", state=JobState.SUCCEEDED)
    await add(store, "b")
    await store.delete("a")
    left = await database.run(
        lambda connection: list(connection.execute(sa.select(job_events.c.job)).scalars())
    )
    assert left == ["b"]
