"""What overload does to those who are served and to those who are refused.

    python benchmarks/overload.py [--model FOLDER] [--seconds N] [--json FILE]

A server runs and admits 16 requests. They arrive at random moments: one after the other
("alone"), at 0.8 times what the server can do ("busy") and at 10 times that ("overload"), each
for `--seconds`, after a lead-in that is not counted: nothing runs when it begins. Outputs have
50 to 150 tokens: with equal ones they would begin and end in step. Without
--model the scripted engine makes a token every 10 ms for each stream, so that what is seen is
the service; with it, the folder or GGUF file is imported. Capacity is measured first. Printed
are the time to first token of admitted requests and between their tokens, how long a refusal
takes, and the memory of server and workers.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from lowbit import AsyncClient, ClientOptions, QueueFullError
from lowbit_server.testing import ServerProcess, scripted_model

SLOTS = 16
TOKENS = 50, 150
STEP_MS = 10.0
PROMPT = "Once upon a time, in a village by the sea, there lived an old man who"
ALONE = 40
TIMEOUT_S = 60.0
LEAD_IN_S = 5.0
KV_CACHE_BYTES = 1 << 28
BUSY, OVERLOAD = 0.8, 10.0


@dataclass
class Load:
    """What was seen of one load; times in ms."""

    first_tokens: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    """Between two tokens of a stream."""
    refusals: list[float] = field(default_factory=list)
    without_retry_info: int = 0
    memory: tuple[int, int] = (0, 0)
    """Bytes of all processes before and after."""

    def figures(self) -> dict[str, float]:
        """Return the figures that are printed."""
        before, after = self.memory
        return {
            "admitted": len(self.first_tokens),
            "refused": len(self.refusals),
            "first token p50 ms": statistics.median(self.first_tokens),
            "first token p99 ms": _p99(self.first_tokens),
            "between tokens p50 ms": statistics.median(self.gaps),
            "between tokens p99 ms": _p99(self.gaps),
            "refusal p50 ms": statistics.median(self.refusals or [0.0]),
            "refusal p99 ms": _p99(self.refusals or [0.0]),
            "refusals without RetryInfo": self.without_retry_info,
            "memory before MiB": before / 2**20,
            "memory after MiB": after / 2**20,
        }


def _p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[-1] if values[1:] else values[0]


class Traffic:
    """Sends requests to one model."""

    def __init__(self, client: AsyncClient, processes: list[psutil.Process]) -> None:
        """Use a client that does not try again, and weigh these processes."""
        self._client = client
        self._processes = processes
        self._random = random.Random(1)  # noqa: S311  (a reproducible load)

    async def request(self, load: Load) -> None:
        """Send one request and note what became of it."""
        began = time.perf_counter()
        stream = self._client.generate(
            "model",
            # None begins like another.
            f"{self._random.random()} {PROMPT}",
            max_tokens=self._random.randint(*TOKENS),
            temperature=0,
            ignore_eos=True,
            timeout=TIMEOUT_S,
        )
        try:
            arrivals = [time.perf_counter() async for _ in stream]
        except QueueFullError as error:
            load.refusals.append(1e3 * (time.perf_counter() - began))
            load.without_retry_info += error.retry_after_s is None
            return
        load.first_tokens.append(1e3 * (arrivals[0] - began))
        load.gaps += [1e3 * (later - earlier) for earlier, later in pairwise(arrivals)]

    async def alone(self, count: int) -> Load:
        """Send requests one after the other."""
        load = Load()
        for _ in range(count):
            await self.request(load)
        return load

    async def arriving(self, per_second: float, seconds: float) -> Load:
        """Send requests at random moments, and wait for all; return what the later ones saw."""
        lead_in, load = Load(), Load()
        tasks: list[asyncio.Task[None]] = []
        for counted, lasts in ((lead_in, LEAD_IN_S), (load, seconds)):
            load.memory = self._bytes(), 0
            ends = time.perf_counter() + lasts
            while time.perf_counter() < ends:
                tasks.append(asyncio.create_task(self.request(counted)))
                await asyncio.sleep(self._random.expovariate(per_second))
        await asyncio.gather(*tasks)
        load.memory = load.memory[0], self._bytes()
        return load

    async def capacity(self) -> float:
        """Return how many requests a second end while all slots are taken."""
        began = time.perf_counter()
        load = Load()
        await asyncio.gather(*(self.request(load) for _ in range(SLOTS)))
        return len(load.first_tokens) / (time.perf_counter() - began)

    def _bytes(self) -> int:
        return sum(one.memory_info().rss for one in self._processes)


async def measure(server: ServerProcess, source: Path, seconds: float) -> dict[str, Load]:
    """Import and load a model, and measure all loads."""
    options = ClientOptions(max_attempts=1)
    async with AsyncClient(server.address, options=options) as client:
        await client.wait_job((await client.import_model("model", path=str(source))).id)
        await client.load("model").wait()
        front = psutil.Process(server.pid)
        traffic = Traffic(client, [front, *front.children(recursive=True)])
        await traffic.capacity()  # warm-up
        capacity = await traffic.capacity()
        return {
            "alone": await traffic.alone(ALONE),
            "busy": await traffic.arriving(BUSY * capacity, seconds),
            "overload": await traffic.arriving(OVERLOAD * capacity, seconds),
        }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a folder or GGUF file; default: a script")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    gc.disable()  # what takes time here shall be the server's
    with tempfile.TemporaryDirectory() as folder:
        source = options.model or scripted_model(Path(folder, "source"), step_ms=STEP_MS)
        source = source.resolve()
        environment = {
            "LOWBIT_IMPORT_ROOTS": str(source.parent),
            "LOWBIT_MAX_ADMITTED_REQUESTS": str(SLOTS),
            "LOWBIT_MAX_RUNNING_REQUESTS": str(SLOTS),
            "LOWBIT_KV_CACHE_BYTES": str(KV_CACHE_BYTES),
        }
        with ServerProcess(Path(folder, "home"), environment=environment) as server:
            loads = asyncio.run(measure(server, source, options.seconds))
    figures = {name: load.figures() for name, load in loads.items()}
    table = Table("", *figures, box=None)
    for row in next(iter(figures.values())):
        table.add_row(row, *(f"{found[row]:.1f}" for found in figures.values()))
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
