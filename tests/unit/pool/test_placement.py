"""Which workers a model goes to."""

from __future__ import annotations

from dataclasses import replace

import pytest
from grpc import StatusCode
from hypothesis import given
from hypothesis import strategies as st

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.pool.placement import Candidate, place

GIB = 1 << 30


def candidate(worker: str, free: int = 8, *, models: int = 0, has_model: bool = False) -> Candidate:
    """Return a worker that is up, with so many GiB free."""
    return Candidate(worker, worker.split("/", maxsplit=1)[0], True, free * GIB, models, has_model)  # noqa: FBT003


def refused(candidates: list[Candidate], device: str = "", replicas: int = 1) -> LowbitError:
    with pytest.raises(LowbitError) as caught:
        place(candidates, device=device, replicas=replicas, needed_bytes=4 * GIB)
    return caught.value


def placed(candidates: list[Candidate], device: str = "", replicas: int = 1) -> list[str]:
    return place(candidates, device=device, replicas=replicas, needed_bytes=4 * GIB)


def test_the_device_with_most_free_memory_is_taken() -> None:
    assert placed([candidate("cpu/0", 5), candidate("gpu/0", 9)]) == ["gpu/0"]
    assert placed([candidate("cpu/0", 5), candidate("gpu/0", 9)], "cpu") == ["cpu/0"]


def test_of_a_devices_workers_the_emptiest_is_taken() -> None:
    assert placed([candidate("cpu/0", models=2), candidate("cpu/1", models=1)]) == ["cpu/1"]


def test_a_worker_that_has_the_model_comes_first() -> None:
    full = candidate("cpu/1", 0, models=9, has_model=True)
    assert placed([candidate("cpu/0"), full]) == ["cpu/1"]
    assert placed([candidate("cpu/0"), full, candidate("gpu/0", 9)], "", 2) == ["cpu/1", "gpu/0"]
    assert placed([replace(full, ready=False)]) == ["cpu/1"]


def test_each_replica_counts_against_what_is_free() -> None:
    workers = [candidate(f"cpu/{index}", 9) for index in range(3)]
    assert len(placed(workers, replicas=2)) == 2
    error = refused(workers, replicas=3)
    assert error.reason is Reason.INSUFFICIENT_DEVICE_MEMORY


def test_what_does_not_fit_says_what_is_needed_and_free() -> None:
    error = refused([candidate("cpu/0", 1), candidate("cuda:0/0", 2)])
    assert error.reason is Reason.INSUFFICIENT_DEVICE_MEMORY
    assert error.code is StatusCode.RESOURCE_EXHAUSTED
    assert error.metadata == {
        "needed_bytes": str(4 * GIB),
        "free_bytes_cpu": str(GIB),
        "free_bytes_cuda:0": str(2 * GIB),
    }


def test_a_device_that_does_not_exist() -> None:
    error = refused([candidate("cpu/0")], "cuda:0")
    assert (error.reason, error.metadata) == (Reason.DEVICE_NOT_FOUND, {"device": "cuda:0"})


def test_more_replicas_than_workers() -> None:
    error = refused([candidate("cpu/0"), candidate("gpu/0")], "cpu", 2)
    assert error.reason is Reason.INVALID_FIELD
    assert [one.field for one in error.violations] == ["replicas"]


def test_no_worker_is_up() -> None:
    error = refused([replace(candidate("cpu/0"), ready=False)])
    assert error.reason is Reason.WORKER_LOST
    assert error.retry_after_s


@st.composite
def pools(draw: st.DrawFn) -> list[Candidate]:
    """Draw the workers of up to three devices; a device's workers share its free memory."""
    found = []
    for device in draw(st.lists(st.sampled_from(["cpu", "cuda:0", "cuda:1"]), unique=True)):
        free = draw(st.integers(0, 100))
        found += [
            Candidate(
                worker=f"{device}/{index}",
                device=device,
                ready=draw(st.booleans()),
                free_bytes=free,
                models=draw(st.integers(0, 5)),
                has_model=draw(st.booleans()),
            )
            for index in range(draw(st.integers(1, 3)))
        ]
    return found


def attempt(
    pool: list[Candidate], device: str, replicas: int, needed: int
) -> list[str] | LowbitError:
    try:
        return place(pool, device=device, replicas=replicas, needed_bytes=needed)
    except LowbitError as error:
        return error


@given(pools(), st.sampled_from(["", "cpu", "cuda:0"]), st.integers(1, 6), st.integers(1, 60))
def test_a_placement_is_sound(
    pool: list[Candidate], device: str, replicas: int, needed: int
) -> None:
    found = attempt(pool, device, replicas, needed)
    usable = [one for one in pool if device in ("", one.device)]
    holders = {one.worker for one in usable if one.has_model}
    if isinstance(found, LowbitError):
        # It is refused only for a reason: with room everywhere it would have been placed.
        roomy = [replace(one, ready=True, free_bytes=replicas * needed) for one in usable]
        assert len(holders) < replicas
        possible = isinstance(attempt(roomy, "", replicas, needed), list)
        shape = {Reason.INVALID_FIELD, Reason.DEVICE_NOT_FOUND}
        assert possible == (found.reason not in shape)
        return
    assert len(found) == len(set(found)) == replicas
    assert holders <= set(found) or set(found) <= holders
    chosen = [one for one in usable if one.worker in found]
    assert len(chosen) == replicas
    new = [one for one in chosen if not one.has_model]
    assert all(one.ready for one in new)
    for name in {one.device for one in new}:
        mine = [one for one in new if one.device == name]
        assert len(mine) * needed <= mine[0].free_bytes
