"""Admission and the choice of a replica."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit_server.config import Config
from lowbit_server.errors import LowbitError, Reason
from lowbit_server.pool.replica import Replica, ReplicaState
from lowbit_server.scheduler import Scheduler, choose

if TYPE_CHECKING:
    from lowbit_server.pool.pool import Pool

MODEL = "model"


def replica(state: ReplicaState, requests: int = 0) -> Replica:
    found = Replica(MODEL, Path("/models/model"), "cpu/0", "cpu")
    found.state, found.requests = state, requests
    return found


class FakePool:
    """A pool of given replicas."""

    def __init__(self, *replicas: Replica) -> None:
        self._replicas = replicas

    def replicas(self, model: str) -> list[Replica]:
        return [one for one in self._replicas if one.model == model]


def scheduler(*replicas: Replica, **settings: Any) -> Scheduler:
    return Scheduler(Config(**settings), cast("Pool", FakePool(*replicas)))


def refusal(of: Scheduler) -> LowbitError:
    with pytest.raises(LowbitError) as caught, of.admit(MODEL):
        pass
    return caught.value


states = st.sampled_from(ReplicaState)


@given(st.lists(st.builds(replica, states, st.integers(0, 9)), max_size=6))
def test_the_least_loaded_live_replica_is_chosen(replicas: list[Replica]) -> None:
    live = [one for one in replicas if one.state is ReplicaState.LIVE]
    if live:
        chosen = choose(MODEL, replicas)
        assert chosen in live
        assert chosen.requests == min(one.requests for one in live)
        return
    with pytest.raises(LowbitError) as caught:
        choose(MODEL, replicas)
    loading = any(one.state is ReplicaState.LOADING for one in replicas)
    assert caught.value.reason is (Reason.MODEL_LOADING if loading else Reason.MODEL_NOT_LOADED)
    assert (caught.value.retry_after_s is not None) == loading
    assert caught.value.metadata == {"model": MODEL}


def test_slots_are_counted_and_come_back() -> None:
    admitting = scheduler(replica(ReplicaState.LIVE), max_admitted_requests=2)
    with admitting.admit(MODEL), admitting.admit(MODEL):
        assert admitting.admitted == 2
        error = refusal(admitting)
        assert error.reason is Reason.QUEUE_FULL
        assert error.retry_after_s
    assert admitting.admitted == 0
    with pytest.raises(RuntimeError), admitting.admit(MODEL):
        raise RuntimeError
    assert admitting.admitted == 0


def test_what_is_refused_takes_no_slot() -> None:
    admitting = scheduler(replica(ReplicaState.LOADING))
    assert refusal(admitting).reason is Reason.MODEL_LOADING
    assert refusal(scheduler()).reason is Reason.MODEL_NOT_LOADED
    assert admitting.admitted == 0


def test_a_draining_server_admits_nothing() -> None:
    admitting = scheduler(replica(ReplicaState.LIVE))
    admitting.draining = True
    error = refusal(admitting)
    assert error.reason is Reason.SHUTTING_DOWN
    assert error.retry_after_s


async def test_draining_waits_for_the_last_request() -> None:
    admitting = scheduler(replica(ReplicaState.LIVE))
    with admitting.admit(MODEL):
        with admitting.admit(MODEL):
            idle = asyncio.create_task(admitting.wait_idle(60))
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not idle.done()
    async with asyncio.timeout(5):
        await idle


async def test_draining_does_not_wait_for_ever() -> None:
    admitting = scheduler(replica(ReplicaState.LIVE))
    with admitting.admit(MODEL):
        await admitting.wait_idle(0.01)
        assert admitting.admitted == 1


def test_each_output_takes_a_place() -> None:
    admitting = scheduler(
        replica(ReplicaState.LIVE), max_admitted_requests=5, max_running_requests=4
    )
    with admitting.admit(MODEL, 3):
        assert admitting.admitted == 3
        with pytest.raises(LowbitError) as caught, admitting.admit(MODEL, 3):
            pass
        assert caught.value.reason is Reason.QUEUE_FULL
        with admitting.admit(MODEL, 2):
            assert admitting.admitted == 5
    assert admitting.admitted == 0


def test_more_outputs_than_ever_run_are_refused_for_good() -> None:
    for settings in ({"max_running_requests": 4}, {"max_admitted_requests": 4}):
        admitting = scheduler(replica(ReplicaState.LIVE), **settings)
        with pytest.raises(LowbitError) as caught, admitting.admit(MODEL, 5):
            pass
        assert caught.value.reason is Reason.INVALID_FIELD
        assert caught.value.violations[0].field == "sampling.n"
        assert "at most 4 outputs" in caught.value.violations[0].description
