"""Generation streams of the asynchronous client against a real server."""

from __future__ import annotations

import asyncio
import gc
from typing import TYPE_CHECKING

import grpc
import pytest

from lowbit import (
    AsyncClient,
    CancelledError,
    WorkerLostError,
)
from lowbit.v1.generation_pb2 import (
    FINISH_REASON_EOS,
    Delta,
    GenerateResponse,
)
from tests.unit.client.fake import Endless, events, refuse

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.unit.client.fake import FakeServer


async def test_async_chunks_and_text(server: FakeServer, aclient: AsyncClient) -> None:
    server.on["Generate"] = lambda *_: events("Par", "is")
    async with aclient.generate("m", token_ids=[1, 2]) as stream:
        assert [chunk.text async for chunk in stream] == ["Par", "is"]
    assert await stream.text() == "Paris"
    assert stream.usage is not None
    assert stream.finish_reason == FINISH_REASON_EOS
    assert list(server.requests("Generate")[0].token_ids.ids) == [1, 2]


async def test_async_error_keeps_the_text(server: FakeServer, aclient: AsyncClient) -> None:
    def generate(_: object, context: grpc.ServicerContext) -> Iterator[GenerateResponse]:
        yield GenerateResponse(delta=Delta(text="par"))
        refuse(context, grpc.StatusCode.INTERNAL, "WORKER_LOST", metadata={"output_tokens": "1"})

    server.on["Generate"] = generate
    stream = aclient.generate("m", "prompt")
    with pytest.raises(WorkerLostError) as caught:
        await stream.text()
    assert stream.partial_text == "par"
    assert caught.value.metadata == {"output_tokens": "1"}


async def test_async_close_cancels_the_call(server: FakeServer, aclient: AsyncClient) -> None:
    server.on["Generate"] = endless = Endless()
    async with aclient.generate("m", "prompt") as stream:
        assert (await anext(stream)).text == "first"
    assert await asyncio.to_thread(endless.was_cancelled)
    with pytest.raises(CancelledError):
        await anext(stream)


async def test_async_drop_cancels_the_call(server: FakeServer, aclient: AsyncClient) -> None:
    server.on["Generate"] = endless = Endless()
    async for _ in aclient.generate("m", "prompt"):
        break
    gc.collect()
    assert await asyncio.to_thread(endless.was_cancelled)


async def test_async_cancel_wakes_a_reader_that_waits(
    server: FakeServer, aclient: AsyncClient
) -> None:
    server.on["Generate"] = endless = Endless()
    stream = aclient.generate("m", "prompt")
    await anext(stream)
    reader = asyncio.ensure_future(stream.text())
    asyncio.get_running_loop().call_soon(stream.cancel)
    with pytest.raises(CancelledError):
        await reader
    assert await asyncio.to_thread(endless.was_cancelled)


async def test_a_cancelled_task_stays_cancelled_and_ends_the_call(
    server: FakeServer, aclient: AsyncClient
) -> None:
    server.on["Generate"] = endless = Endless()
    stream = aclient.generate("m", "prompt")
    await anext(stream)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await anext(stream)
    assert await asyncio.to_thread(endless.was_cancelled)


async def test_closing_the_client_ends_its_streams(
    server: FakeServer, aclient: AsyncClient
) -> None:
    server.on["Generate"] = endless = Endless()
    stream = aclient.generate("m", "prompt")
    await anext(stream)
    await aclient.close()
    assert await asyncio.to_thread(endless.was_cancelled)


def test_an_async_client_needs_a_running_loop() -> None:
    with pytest.raises(RuntimeError, match="no running event loop"):
        AsyncClient("127.0.0.1:1")
