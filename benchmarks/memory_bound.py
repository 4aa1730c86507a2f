"""A model too large for any cache: which share of the memory's bandwidth decoding reaches.

    python -m benchmarks.memory_bound [--rounds N]

The shape is that of Llama 3.2 1B, its weights are random: they take as long as others. A step
of one stream reads all weights once, those of the embedding as the head's.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.engine import ENVIRONMENTS, System, figures
from lowbit_server.models.loading import load
from lowbit_server.quant.schemes import Bnb4BitScheme, Int8Scheme, RtnScheme
from tests.models.quantkit import Store, random_source

if TYPE_CHECKING:
    from typing import Any

SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
SCHEMES = {"int8": Int8Scheme(), "nf4": Bnb4BitScheme(quant_type="nf4"), "rtn": RtnScheme()}
STREAMS, PROMPT_TOKENS, NEW_TOKENS = (1, 8), 32, 32
READ_BYTES, READS = 1 << 30, 7


def bandwidth() -> float:
    """Return how many bytes a second two threads read of a large tensor, the median of some."""
    torch.set_num_threads(2)
    numbers = torch.ones(READ_BYTES // 4)
    speeds = []
    for _ in range(READS):
        began = time.perf_counter()
        numbers.sum()
        speeds.append(READ_BYTES / (time.perf_counter() - began))
    return statistics.median(speeds)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    numbers = random.Random(0)  # noqa: S311  (tokens)
    tokens = [numbers.randrange(SHAPE["vocab_size"]) for _ in range(64 * max(STREAMS))]
    plan = [
        {
            "name": f"decode {streams}",
            "prompts": [tokens[64 * at :][:PROMPT_TOKENS] for at in range(streams)],
            "tokens": NEW_TOKENS,
        }
        for streams in STREAMS
    ]
    home = Path(tempfile.mkdtemp(prefix="lowbit-bench-"))
    try:
        store = Store(home)
        base = store.imported(random_source(home / "source", **SHAPE))
        shutil.rmtree(home / "source")
        copies = {name: store.quantized(scheme, name) for name, scheme in SCHEMES.items()}
        systems = [System("lowbit bf16", "ours.py", base)]
        systems += [System(f"lowbit {name}", "ours.py", copy) for name, copy in copies.items()]
        systems.append(System("transformers bf16", "peer_transformers.py", base))
        vllm = ENVIRONMENTS / "vllm" / "bin" / "python"
        if vllm.exists():
            systems.append(System("vllm bf16", "peer_vllm.py", base, vllm))
        live = {system.name: load(system.model, "cpu", 64).live_bytes for system in systems}
        reached = bandwidth()
        samples: dict[str, dict[str, list[float]]] = {system.name: {} for system in systems}
        for _ in range(rounds):
            for system in systems:
                reports, _ = system.run(plan)
                for name, report in reports.items():
                    speed = figures(report, PROMPT_TOKENS)["tokens/s"]
                    samples[system.name].setdefault(name, []).append(speed)
    finally:
        shutil.rmtree(home)
    table = Table("", "weights MiB", *(f"{name} tok/s" for name in samples["lowbit bf16"]), "share")
    for name, found in samples.items():
        speeds = [statistics.median(values) for values in found.values()]
        table.add_row(
            name,
            f"{live[name] / 2**20:.0f}",
            *(f"{speed:.1f}" for speed in speeds),
            f"{speeds[0] * live[name] / reached:.0%}",
        )
    console = Console(width=160)
    console.print(table)
    console.print(f"reading alone: {reached / 1e9:.1f} GB/s; share is that of one stream's weights")


if __name__ == "__main__":
    main()
