"""Clients that go away leave nothing behind; readers that stall are failed."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from typing import TYPE_CHECKING

import grpc
import psutil
import pytest

from lowbit import AsyncClient, DeadlineExceededError
from lowbit.v1 import generation_pb2, generation_pb2_grpc
from lowbit_server.config import Config
from lowbit_server.server import Server
from lowbit_server.testing import scripted_model

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

DEADLINE_S = 20.0


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[tuple[Server, str]]:
    """A server inside this process, so that its tasks and slots can be counted."""
    scripted_model(tmp_path / "sources" / "slow", step_ms=5.0, context_tokens=1_000_000)
    scripted_model(tmp_path / "sources" / "flood", step_ms=0.0, context_tokens=1_000_000)
    config = Config(
        home=tmp_path / "home",
        listen="127.0.0.1:0",
        import_roots=(tmp_path / "sources",),
        scripted_models=True,
    )
    server = Server(config)
    address = await server.start()
    async with AsyncClient(address) as client:
        for name in ("slow", "flood"):
            job = await client.import_model(name, path=str(tmp_path / "sources" / name))
            await client.wait_job(job.id)
            await client.load(name).wait()
    yield server, address
    await server.drain()
    await server.stop()


async def until(condition: Callable[[], bool]) -> float:
    """Wait for a condition; return how long that took, seconds."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < DEADLINE_S, "the condition never came true"
        await asyncio.sleep(0.002)
    return time.monotonic() - began


def slots(server: Server) -> int:
    """Return the requests that the workers hold."""
    return sum(worker.requests for worker in server._pool.workers)


async def test_500_random_cancellations_leave_nothing(server: tuple[Server, str]) -> None:
    server_, address = server
    generator = random.Random(20)
    gate = asyncio.Semaphore(32)

    async def one(client: AsyncClient) -> None:
        how = generator.choice(("close", "drop", "task", "deadline"))
        after = generator.randrange(6)
        async with gate:
            timeout = 0.02 if how == "deadline" else 30.0
            stream = client.generate("slow", "hello", max_tokens=100_000, timeout=timeout)

            async def read(count: int) -> None:
                for _ in range(count):
                    await anext(stream)

            if how == "deadline":
                with pytest.raises(DeadlineExceededError):
                    await read(100_000)
            elif how == "task":
                task = asyncio.create_task(read(100_000))
                await asyncio.sleep(generator.random() * 0.03)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            else:
                await read(after)
            if how == "drop":
                del stream
            else:
                stream.close()

    async with AsyncClient(address) as client:
        await asyncio.gather(*(one(client) for _ in range(32)))  # everything is warm
        await until(lambda: not server_._scheduler.admitted and not slots(server_))
        workers = [psutil.Process(worker.pid) for worker in server_._pool.workers]
        tasks = len(asyncio.all_tasks())
        memory = [worker.memory_info().rss for worker in workers]
        await asyncio.gather(*(one(client) for _ in range(500)))
        await until(lambda: not server_._scheduler.admitted and not slots(server_))
        await until(lambda: len(asyncio.all_tasks()) <= tasks)
        for worker, before in zip(workers, memory, strict=True):
            assert worker.memory_info().rss - before < 16 << 20
        assert await client.generate("slow", "hi", max_tokens=4).text() == "hihi"


async def test_a_cancelled_stream_frees_its_slot_within_one_step(
    server: tuple[Server, str],
) -> None:
    server_, address = server
    async with AsyncClient(address) as client:
        waits = []
        for _ in range(20):
            stream = client.generate("slow", "hello", max_tokens=100_000)
            await anext(stream)
            await until(lambda: slots(server_) > 0)
            stream.close()
            waits.append(await until(lambda: not slots(server_)))
        # A step is 5 ms; the rest is two processes' share of a busy machine.
        assert sorted(waits)[len(waits) // 2] < 0.05


async def test_a_killed_client_frees_its_slot(server: tuple[Server, str]) -> None:
    server_, address = server
    code = "import sys; from lowbit import Client; s = Client(sys.argv[1]).generate("
    code += "'slow', 'x', max_tokens=900_000); next(s); print('reading', flush=True); s.text()"
    client = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, address, stdout=asyncio.subprocess.PIPE
    )
    assert client.stdout is not None
    assert await client.stdout.readline() == b"reading\n"
    assert slots(server_) == 1
    client.kill()
    await client.wait()
    assert await until(lambda: not slots(server_)) < 1.0


async def test_a_stalled_reader_is_failed_and_blocks_nobody(server: tuple[Server, str]) -> None:
    server_, address = server
    # Without probing, the client's window stays at 64 KiB and is soon full.
    channel = grpc.aio.insecure_channel(address, options=[("grpc.http2.bdp_probe", 0)])
    request = generation_pb2.GenerateRequest(
        model="flood", text="x", stopping=generation_pb2.Stopping(max_tokens=900_000)
    )
    async with channel, AsyncClient(address) as other:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        stalled = stub.Generate(request, timeout=60)
        assert (await stalled.read()).WhichOneof("event") == "started"
        # And then nothing more is read.
        assert await other.generate("slow", "ab", max_tokens=50).text() == "ab" * 25
        await until(lambda: not slots(server_))

        async def read_on() -> None:
            while await stalled.read() is not grpc.aio.EOF:
                pass

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_on()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "tokens unread" in (caught.value.details() or "")
        await until(lambda: not server_._scheduler.admitted)
