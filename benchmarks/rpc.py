"""What the server adds to the engine: time to first token and time per token.

    python benchmarks/rpc.py [--json FILE]

The scripted engine makes a token every 5 ms for each of its streams. The same load
runs over a worker's private stream (no front) and through the whole service with the
Python SDK, in one run, warm, medians of several rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from lowbit import AsyncClient
from lowbit.worker.v1 import worker_pb2 as wire
from lowbit_server.pool.launcher import LocalLauncher
from lowbit_server.pool.link import Link
from lowbit_server.testing import ServerProcess, byte_tokenizer, scripted_model

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

STEP_MS = 5.0
TOKENS = 200
STREAMS = (1, 8, 32)
ROUNDS = 5
PROMPT = "measure"
PROMPT_IDS = byte_tokenizer().encode(PROMPT).ids

Times = tuple[float, float]
"""Time to first token and time per later token of one stream, ms."""


def times(began: float, arrivals: list[float]) -> Times:
    """Return the times of a stream from when its tokens arrived."""
    per_token = (arrivals[-1] - arrivals[0]) / (TOKENS - 1)
    return (arrivals[0] - began) * 1e3, per_token * 1e3


async def through_sdk(client: AsyncClient, streams: int) -> list[Times]:
    """Run `streams` requests at once through the service."""

    async def one() -> Times:
        began = time.perf_counter()
        stream = client.generate(
            "scripted", PROMPT, max_tokens=TOKENS, temperature=0, ignore_eos=True
        )
        return times(began, [time.perf_counter() async for _ in stream])

    return await asyncio.gather(*(one() for _ in range(streams)))


class PrivateStream:
    """A client of the worker's own protocol."""

    def __init__(self, link: Link) -> None:
        """Talk over `link`."""
        self._link = link
        self._arrivals: dict[int, list[float]] = {}
        self._ended = asyncio.Condition()
        self._open = 0
        self._next = 1
        self.ready = asyncio.Event()

    async def read(self) -> None:
        """Take events until cancelled."""
        async with aclosing(self._link.events()) as events:
            async for event in events:
                if event.WhichOneof("event") == "loaded":
                    self.ready.set()
                for output in event.step.outputs:
                    self._arrivals[output.request] += [time.perf_counter()] * len(output.token_ids)
                    if output.finish:
                        async with self._ended:
                            self._open -= 1
                            self._ended.notify_all()

    async def run(self, streams: int) -> list[Times]:
        """Run `streams` requests at once in the worker."""
        requests = range(self._next, self._next + streams)
        self._next += streams
        self._open = streams
        began = time.perf_counter()
        for request in requests:
            self._arrivals[request] = []
            submit = wire.Submit(
                request=request, model="scripted", prompt=PROMPT_IDS, max_tokens=TOKENS, top_p=1
            )
            self._link.send(wire.AttachRequest(submit=submit))
        async with self._ended:
            await self._ended.wait_for(lambda: not self._open)
        return [times(began, self._arrivals.pop(request)) for request in requests]


async def measure(run: Callable[[int], Awaitable[list[Times]]]) -> dict[int, Times]:
    """Return the median times for each number of streams, after one warm-up round."""
    medians = {}
    for streams in STREAMS:
        await run(streams)
        rounds = [await run(streams) for _ in range(ROUNDS)]
        firsts, laters = zip(*(one for each in rounds for one in each), strict=True)
        medians[streams] = statistics.median(firsts), statistics.median(laters)
    return medians


async def measure_worker(folder: Path, home: Path) -> dict[int, Times]:
    """Measure a worker alone."""
    launcher = LocalLauncher(home / "run", threads=1, max_running=64, kv_cache_bytes=1 << 20)
    process = await launcher.launch("cpu/0", "cpu")
    link = Link(process.address)
    await link.connect()
    private = PrivateStream(link)
    reader = asyncio.create_task(private.read())
    try:
        link.send(wire.AttachRequest(load=wire.Load(model="scripted", path=str(folder))))
        await private.ready.wait()
        return await measure(private.run)
    finally:
        reader.cancel()
        process.kill()
        await process.wait()
        await link.close()


async def measure_service(address: str) -> dict[int, Times]:
    """Measure the whole service."""
    async with AsyncClient(address) as client:
        await client.load("scripted").wait()
        return await measure(lambda streams: through_sdk(client, streams))


async def bring_in(address: str, source: Path) -> None:
    """Import the scripted model."""
    async with AsyncClient(address) as client:
        job = await client.import_model("scripted", path=str(source))
        await client.wait_job(job.id)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home, source = Path(folder, "home"), Path(folder, "source")
        scripted_model(source, step_ms=STEP_MS)
        with ServerProcess(home, environment={"LOWBIT_IMPORT_ROOTS": folder}) as server:
            asyncio.run(bring_in(server.address, source))
            service = asyncio.run(measure_service(server.address))
        worker = asyncio.run(measure_worker(home / "models" / "scripted", Path(folder)))
    table = Table("streams", "worker ttft", "service ttft", "added", "worker/token", title="ms")
    for title in ("service/token", "added", "added to 5 ms"):
        table.add_column(title)
    figures = []
    for streams in STREAMS:
        (alone_first, alone), (first, later) = worker[streams], service[streams]
        figures.append(
            {
                "streams": streams,
                "worker_ttft_ms": alone_first,
                "service_ttft_ms": first,
                "added_ttft_ms": first - alone_first,
                "worker_ms_per_token": alone,
                "service_ms_per_token": later,
                "added_per_token": later / alone - 1,
                "added_per_token_to_script": later / STEP_MS - 1,
            }
        )
        row = [f"{alone_first:.2f}", f"{first:.2f}", f"{first - alone_first:+.2f}"]
        row += [f"{alone:.3f}", f"{later:.3f}", f"{later / alone - 1:+.2%}"]
        table.add_row(str(streams), *row, f"{later / STEP_MS - 1:+.2%}")
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
