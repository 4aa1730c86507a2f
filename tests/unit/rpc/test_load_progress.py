from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lowbit.v1 import model_pb2 as pb
from lowbit_server.pool.replica import LoadPhase, Replica, ReplicaState
from lowbit_server.rpc.models import _follow

if TYPE_CHECKING:
    from lowbit_server.rpc.context import Context


class FakeContext:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.written: list[pb.LoadResponse] = []
        self.first = asyncio.Event()

    async def write(self, message: Any) -> None:
        self.written.append(message)
        self.first.set()


async def test_phases_that_pass_between_two_looks_are_sent_all_the_same() -> None:
    replica = Replica("m", Path("/m"), "cpu/0", "cpu")
    context = FakeContext()
    following = asyncio.create_task(_follow([replica], cast("Context", context)))
    await context.first.wait()
    # Three events of the worker before the follower has its turn.
    for phase, fraction in ((LoadPhase.PLACE, 1.0), (LoadPhase.WARM_UP, 1.0), (LoadPhase.LIVE, 1)):
        replica.phase, replica.fraction = phase, fraction
        replica.changed.notify()
    replica.state, replica.live_bytes = ReplicaState.LIVE, 7
    await following
    assert [one.phase for one in context.written] == [1, 2, 3, 4]
    assert [one.fraction for one in context.written] == [0, 1, 1, 1]
    assert [one.live_bytes for one in context.written] == [0, 0, 0, 7]
    assert {one.worker for one in context.written} == {"cpu/0"}


async def test_who_joins_late_sees_no_phases_that_were_over() -> None:
    replica = Replica("m", Path("/m"), "cpu/0", "cpu")
    replica.state, replica.phase, replica.fraction = ReplicaState.LIVE, LoadPhase.LIVE, 1.0
    context = FakeContext()
    await _follow([replica], cast("Context", context))
    assert [one.phase for one in context.written] == [pb.LOAD_PHASE_LIVE]
