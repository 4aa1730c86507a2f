"""The bounded buffer between a worker and an RPC."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from lowbit.worker.v1.worker_pb2 import Output
from lowbit_server.errors import LowbitError, Reason
from lowbit_server.pool.stream import RequestStream

if TYPE_CHECKING:
    from collections.abc import Callable


def tokens(count: int) -> Output:
    return Output(request=1, token_ids=range(count))


def stream(limit: int = 8, on_stall: Callable[[], object] = lambda: None) -> RequestStream:
    return RequestStream(limit, on_stall)


async def test_what_was_put_is_taken_in_order_and_once() -> None:
    buffer = stream()
    buffer.put(tokens(1))
    buffer.put(tokens(2))
    assert [len(one.token_ids) for one in await buffer.take()] == [1, 2]
    buffer.put(tokens(3))
    assert [len(one.token_ids) for one in await buffer.take()] == [3]


async def test_take_waits_for_the_next_output() -> None:
    buffer = stream()
    waiting = asyncio.create_task(buffer.take())
    await asyncio.sleep(0)
    assert not waiting.done()
    buffer.put(tokens(1))
    assert len(await waiting) == 1


async def test_taking_makes_room() -> None:
    buffer = stream(8)
    for _ in range(5):
        buffer.put(tokens(8))
        assert not buffer.stalled
        await buffer.take()


async def test_a_reader_that_lags_too_far_behind_is_failed_once() -> None:
    calls = []
    buffer = stream(8, lambda: calls.append(buffer.stalled))
    buffer.put(tokens(8))
    assert not buffer.stalled
    for _ in range(3):
        buffer.put(tokens(1))
    assert calls == [True]
    with pytest.raises(LowbitError, match="8 tokens") as caught:
        await buffer.take()
    assert caught.value.reason is Reason.CLIENT_STALLED


async def test_an_error_comes_after_what_is_pending_and_stays() -> None:
    buffer = stream()
    buffer.put(tokens(2))
    buffer.fail(LowbitError(Reason.WORKER_LOST, "gone"))
    assert len(await buffer.take()) == 1
    for _ in range(2):
        with pytest.raises(LowbitError, match="gone"):
            await buffer.take()


async def test_an_error_wakes_who_waits() -> None:
    buffer = stream()
    waiting = asyncio.create_task(buffer.take())
    await asyncio.sleep(0)
    buffer.fail(LowbitError(Reason.WORKER_LOST, "gone"))
    with pytest.raises(LowbitError, match="gone"):
        await waiting
