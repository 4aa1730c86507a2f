"""What quantizing costs and what it spoils: our methods beside gptqmodel's.

    python -m benchmarks.quantize MODEL [--gptqmodel PYTHON] [--only NAME ...] [--json FILE]

MODEL is a folder of the store, such as .models/smollm2-bf16. Everything sees the same
calibration tokens and runs in a process of its own, one after another: ours is the job
process of the service, the peer is gptqmodel in the environment whose Python is given.
"whole" is the process from start to end, "quantize" without imports, loading and saving.
Quality is that of each checkpoint's weights, dequantized by the same code, on held-out text.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from lowbit_server.hardware import processor_name
from lowbit_server.jobs.spec import CalibrationSpec, QuantizeSpec
from lowbit_server.quant.schemes import (
    AwqScheme,
    Bnb4BitScheme,
    GptqScheme,
    Int8Scheme,
    RtnScheme,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lowbit_server.quant.schemes import Scheme

OURS: dict[str, Scheme] = {
    "int8": Int8Scheme(),
    "nf4": Bnb4BitScheme(quant_type="nf4"),
    "rtn": RtnScheme(),
    "gptq": GptqScheme(),
    "awq": AwqScheme(),
}
# Columns by activation, as ours: with groups of neighbours, as ours, with groups in that
# order, and what it does when it is not asked.
PEERS: dict[str, dict[str, Any]] = {
    "gptqmodel-gptq": {"desc_act": True, "static_groups": True, "damp_percent": 0.01},
    "gptqmodel-gptq-reordered": {"desc_act": True, "damp_percent": 0.01},
    "gptqmodel-gptq-default": {},
    "gptqmodel-awq": {},
}
PAIRS = {name: name.split("-")[1] for name in PEERS}
QUALITY = ("mean_kl", "p99_kl", "perplexity", "top1_agreement")


@dataclass(slots=True)
class Figures:
    """What one process took. Times in seconds; `cpu_s` sums all of its threads."""

    name: str
    samples: int
    load_average: float
    options: dict[str, Any]
    finished: bool = False
    """False when it was stopped: times are lower bounds then."""
    whole_s: float = 0
    cpu_s: float = 0
    quantize_s: float = 0
    peak_bytes: int = 0
    disk_bytes: int = 0
    quality: dict[str, float] = field(default_factory=dict)


def run(command: Sequence[str], figures: Figures, log: Path, timeout_s: float) -> None:
    """Run a process that says on stdout, in JSON lines, which phase begins."""
    began = time.perf_counter()
    phases: dict[str, float] = {}
    with (
        log.open("w") as errors,
        subprocess.Popen(  # noqa: S603  (commands of our own)
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        timer = threading.Timer(timeout_s, process.kill)
        timer.start()
        assert process.stdout is not None  # noqa: S101  (it was asked for)
        for line in process.stdout:
            if phase := json.loads(line).get("phase"):
                phases.setdefault(phase, time.perf_counter() - began)
        # Nothing of torch is loaded here: a child's peak begins with its parent's.
        _, status, usage = os.wait4(process.pid, 0)
        timer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
    figures.whole_s = time.perf_counter() - began
    figures.finished = not process.returncode
    figures.quantize_s = phases.get("save", figures.whole_s) - phases.get("quantize", 0)
    figures.cpu_s = usage.ru_utime + usage.ru_stime
    figures.peak_bytes = usage.ru_maxrss * 1024
    if process.returncode not in {0, -signal.SIGKILL}:
        raise SystemExit(f"{figures.name} failed:\n{log.read_text()[-2000:]}")


def sample_numbers(name: str, samples: int, awq_samples: int) -> list[int]:
    """Return how many samples each run of a method sees: AWQ is compared on fewer."""
    if name == "awq":
        return sorted({samples, awq_samples})
    return [awq_samples if name == "gptqmodel-awq" else samples]


def job(name: str, drawn: CalibrationSpec, folder: Path) -> list[str]:
    """Return the command line of a job that quantizes into a folder."""
    scheme, home = OURS[name], folder.parent
    calibrated = isinstance(scheme, GptqScheme | AwqScheme)
    spec = QuantizeSpec(
        model=name,
        source="base",
        scheme=scheme,
        device="cpu",
        calibration=drawn if calibrated else None,
    )
    file = home / "spec.json"
    file.write_text(spec.model_dump_json())
    command = [sys.executable, "-m", "lowbit_server.jobs.process", "--spec", file]
    command += ["--staging", folder, "--checkpoint", home / "checkpoints" / folder.name]
    command += ["--models", home, "--cache", home / "cache"]
    return [str(one) for one in command]


def peer(name: str, python: Path, folder: Path) -> list[str]:
    """Return the command line of gptqmodel, which quantizes into a folder."""
    script = Path(__file__).with_name("quantize_peer.py")
    paths = (folder.parent / "base", folder.parent / "samples.json", folder)
    return [str(python), str(script), PAIRS[name], json.dumps(PEERS[name]), *map(str, paths)]


def torch_step(home: Path, *arguments: object) -> None:
    """Draw samples or measure quality, in a process that may load torch."""
    command = [sys.executable, "-m", "benchmarks.quantize_quality", str(home)]
    subprocess.run([*command, *map(str, arguments)], check=True)  # noqa: S603  (our own)


def cell(row: Figures, own: Figures | None, key: str, unit: float = 1) -> str:
    """Return a figure and, beside our own run, the ratio to it."""
    value = getattr(row, key)
    text = f"{value / unit:.1f}" if row.finished or key != "whole_s" else f"> {value:.0f}"
    return text if own is None else f"{text} ({value / getattr(own, key):.1f}x)"


def table(rows: list[Figures]) -> Table:
    """Return the figures; of the peer's also what they are of ours."""
    columns = ("", "samples", "whole s", "quantize s", "CPU s", "peak MiB", "disk MiB")
    result = Table(*columns, "mean KL", "p99", "perplexity", "top-1", box=None)
    ours = {(row.name, row.samples): row for row in rows}
    mib = 2**20
    for row in rows:
        own = ours.get((PAIRS.get(row.name, ""), row.samples))
        units = {"whole_s": 1, "quantize_s": 1, "cpu_s": 1, "peak_bytes": mib, "disk_bytes": mib}
        cells = [cell(row, own, key, unit) for key, unit in units.items()]
        cells += [f"{row.quality[key]:.3f}" if row.quality else "-" for key in QUALITY]
        result.add_row(row.name, str(row.samples), *cells)
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--gptqmodel", type=Path, help="Python of an environment that has it")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--awq-samples", type=int, default=16, help="for another pair of AWQ runs")
    parser.add_argument("--tokens", type=int, default=512, help="of each sample")
    parser.add_argument("--timeout", type=float, default=1500, help="seconds for each process")
    parser.add_argument("--only", nargs="*", choices=[*OURS, *PEERS], default=[*OURS, *PEERS])
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    console = Console(width=170)
    home = Path(tempfile.mkdtemp(prefix="lowbit-bench-"))
    rows = []
    try:
        (home / "base").symlink_to(options.model.resolve())
        plan = [
            (name, samples)
            for name in options.only
            for samples in sample_numbers(name, options.samples, options.awq_samples)
            if name in OURS or options.gptqmodel
        ]
        for name, samples in plan:
            drawn = CalibrationSpec(samples=samples, sequence_tokens=options.tokens)
            folder = home / f"{name}-{samples}"
            if name in OURS:
                command = job(name, drawn, folder)
                said = OURS[name].model_dump(exclude={"kind", "layers"})
            else:
                torch_step(home, "draw", drawn.model_dump_json())
                command = peer(name, options.gptqmodel, folder)
                said = PEERS[name]
            row = Figures(name, samples, os.getloadavg()[0], said)
            run(command, row, home / "log", options.timeout)
            if row.finished:
                row.disk_bytes = sum(file.stat().st_size for file in folder.iterdir())
            rows.append(row)
            console.print(f"{name}, {samples} samples: {row.whole_s:.0f} s", style="dim")
        finished = [row for row in rows if row.finished]
        torch_step(home, "measure", *(f"{row.name}-{row.samples}" for row in finished))
        for row, quality in zip(
            finished, json.loads((home / "quality.json").read_text()), strict=True
        ):
            row.quality = quality
    finally:
        shutil.rmtree(home)
    console.print(table(rows))
    if options.json:
        machine = {"processor": processor_name(), "processors": os.cpu_count()}
        figures = {**machine, "tokens": options.tokens, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
