"""What the server adds to the engine: time to first token and time per token.

    python benchmarks/rpc.py [--json FILE]

The scripted engine makes a token every 5 ms for each of its streams. The same loads
run over a worker's private stream (no front) and through the whole service with the
Python SDK, in one run, warm, medians of several rounds. "steady" keeps the streams busy
with starts spread over time, "burst" starts all of them in the same moment.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import tempfile
import time
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from rich.console import Console
from rich.table import Table

from lowbit import AsyncClient
from lowbit.worker.v1 import worker_pb2 as wire
from lowbit_server.pool.launcher import LocalLauncher
from lowbit_server.pool.link import Link
from lowbit_server.testing import ServerProcess, byte_tokenizer, scripted_model

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

STEP_MS = 5.0
TOKENS = 200
STREAMS = (1, 8, 32)
ROUNDS = 5
REQUEST_TIMEOUT_S = 30.0
PROMPT = "measure"
PROMPT_IDS = byte_tokenizer().encode(PROMPT).ids

Times: TypeAlias = tuple[float, float]
"""Time to first token and time per later token of one request, ms."""
Figures: TypeAlias = dict[tuple[str, int], Times]
"""The medians of each load and number of streams."""


def times(began: float, arrivals: list[float]) -> Times:
    """Return the times of a stream from when its tokens arrived."""
    per_token = (arrivals[-1] - arrivals[0]) / (TOKENS - 1)
    return (arrivals[0] - began) * 1e3, per_token * 1e3


class Sdk:
    """A client of the whole service."""

    def __init__(self, client: AsyncClient) -> None:
        """Use `client`."""
        self._client = client

    async def run(self) -> Times:
        """Run one request."""
        began = time.perf_counter()
        stream = self._client.generate(
            "scripted",
            PROMPT,
            max_tokens=TOKENS,
            temperature=0,
            ignore_eos=True,
            timeout=REQUEST_TIMEOUT_S,
        )
        return times(began, [time.perf_counter() async for _ in stream])


class PrivateStream:
    """A client of the worker's own protocol."""

    def __init__(self, link: Link) -> None:
        """Talk over `link`."""
        self._link = link
        self._numbers = itertools.count(1)
        self._arrivals: dict[int, list[float]] = {}
        self._ends: dict[int, asyncio.Event] = {}
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
                        self._ends[output.request].set()

    async def run(self) -> Times:
        """Run one request."""
        request = next(self._numbers)
        self._arrivals[request], self._ends[request] = [], asyncio.Event()
        began = time.perf_counter()
        submit = wire.Submit(
            request=request, model="scripted", prompt=PROMPT_IDS, max_tokens=TOKENS, top_p=1, n=1
        )
        self._link.send(wire.AttachRequest(submit=submit))
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            await self._ends[request].wait()
        del self._ends[request]
        return times(began, self._arrivals.pop(request))


async def steady(run: Callable[[], Awaitable[Times]], streams: int) -> Times:
    """Keep `streams` requests running whose starts are spread over time; return medians.

    The first request of each stream is the warm-up.
    """

    async def one(index: int) -> list[Times]:
        await asyncio.sleep(index / streams * TOKENS * STEP_MS / 1e3)
        return [await run() for _ in range(1 + ROUNDS)][1:]

    return medians(await asyncio.gather(*(one(index) for index in range(streams))))


async def burst(run: Callable[[], Awaitable[Times]], streams: int) -> Times:
    """Start `streams` requests in the same moment, round after round; return medians."""
    rounds = [await asyncio.gather(*(run() for _ in range(streams))) for _ in range(1 + ROUNDS)]
    return medians(rounds[1:])


def medians(rounds: Iterable[Iterable[Times]]) -> Times:
    """Return the median times over all requests of all rounds."""
    firsts, laters = zip(*(one for each in rounds for one in each), strict=True)
    return statistics.median(firsts), statistics.median(laters)


async def measure(run: Callable[[], Awaitable[Times]]) -> Figures:
    """Measure every load."""
    return {
        (load.__name__, streams): await load(run, streams)
        for load in (steady, burst)
        for streams in STREAMS
    }


async def measure_worker(folder: Path, home: Path) -> Figures:
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


async def measure_service(address: str) -> Figures:
    """Measure the whole service."""
    async with AsyncClient(address) as client:
        await client.load("scripted").wait()
        return await measure(Sdk(client).run)


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
    table = Table("load", "streams", "ttft worker", "service", "added", title="milliseconds")
    for title in ("per token worker", "service", "added"):
        table.add_column(title)
    figures = []
    for (load, streams), (first, later) in service.items():
        alone_first, alone = worker[load, streams]
        figures.append(
            {
                "load": load,
                "streams": streams,
                "worker_ttft_ms": alone_first,
                "service_ttft_ms": first,
                "added_ttft_ms": first - alone_first,
                "worker_ms_per_token": alone,
                "service_ms_per_token": later,
                "added_per_token": later / alone - 1,
            }
        )
        row = [f"{alone_first:.2f}", f"{first:.2f}", f"{first - alone_first:+.2f}"]
        row += [f"{alone:.3f}", f"{later:.3f}", f"{later / alone - 1:+.2%}"]
        table.add_row(load, str(streams), *row)
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
