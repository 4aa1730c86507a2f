"""Estimates against what is measured, for every scheme, on a real model.

    python benchmarks/estimate.py MODEL [--scheme NAME ...]

MODEL is a GGUF file or a folder. A server imports it, estimates each scheme, quantizes without
an evaluation, and loads the result; printed is estimated / measured of each figure.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from lowbit import Client
from lowbit_server.testing import ServerProcess

if TYPE_CHECKING:
    from lowbit.v1.job_pb2 import Job

SCHEMES = ("bf16", "fp16", "fp32", "int8", "nf4", "rtn", "gptq", "awq")
UNLOAD_S = 60.0


def seconds(job: Job) -> float:
    """Return how long a job ran."""
    return (job.end_time.ToNanoseconds() - job.start_time.ToNanoseconds()) / 1e9


def ratio(estimated: float, measured: float, unit: float) -> str:
    """Return both and what one is of the other."""
    return f"{estimated / unit:.1f} / {measured / unit:.1f} = {estimated / measured:.2f}"


def measure(client: Client, scheme: str) -> tuple[str, ...]:
    """Return the cells of a scheme's row."""
    began = time.perf_counter()
    copy = client.estimate_quantization("base", scheme)
    asked_ms = (time.perf_counter() - began) * 1e3
    on_cpu = next(one for one in copy.devices if one.device == "cpu")
    job = client.wait_job(client.quantize("base", scheme, scheme, skip_evaluation=True).id)
    expected = next(one for one in client.estimate_load(scheme).devices if one.device == "cpu")
    began = time.perf_counter()
    (live,) = client.load(scheme, "cpu").wait()
    load_s = time.perf_counter() - began
    model = client.get_model(scheme)
    client.unload(scheme, drain_timeout=UNLOAD_S)
    mib = 2**20
    return (
        scheme,
        f"{asked_ms:.0f}",
        ratio(copy.disk_bytes, model.disk_bytes, mib),
        ratio(on_cpu.live_bytes, live.live_bytes, mib),
        ratio(expected.live_bytes, live.live_bytes, mib),
        ratio(on_cpu.peak_memory_bytes, job.progress.peak_memory_bytes, mib),
        ratio(on_cpu.duration.ToMilliseconds() / 1e3, seconds(job), 1),
        ratio(expected.duration.ToMilliseconds() / 1e3, load_s, 1),
    )


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--scheme", action="append", default=[])
    options = parser.parse_args()
    columns = ("scheme", "asked ms", "disk MiB", "live MiB", "live MiB, load")
    table = Table(*columns, "peak of job MiB", "job s", "load s", box=None)
    with tempfile.TemporaryDirectory() as home:
        roots = {"LOWBIT_IMPORT_ROOTS": str(options.model.resolve().parent)}
        with (
            ServerProcess(Path(home) / "home", environment=roots) as server,
            Client(server.address) as client,
        ):
            source = str(options.model.resolve())
            client.wait_job(client.import_model("base", path=source).id)
            can = {
                info.name
                for info in client.list_schemes()
                if any(place.can_quantize for place in info.availability)
            }
            for scheme in options.scheme or SCHEMES:
                if scheme in can:
                    table.add_row(*measure(client, scheme))
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
