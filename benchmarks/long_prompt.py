"""What a long prompt does to streams that run: how long their tokens wait for it.

    python -m benchmarks.long_prompt [MODEL]

Our engine in this process, on a folder of the store (default: .models/smollm2-bf16). Streams
decode by themselves first, then while a prompt of 4,000 tokens is read. Printed are the times
between two tokens of a stream in both, how many times as long they are beside the prompt, and how
long that takes; of several prompts. No token should take more than twice as long as without it.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.engine import BASE
from lowbit_server.engine.batching import BatchingEngine
from lowbit_server.engine.request import Request
from lowbit_server.models.loading import load
from lowbit_server.worker.allocator import keep_freed_memory

STREAMS = (0, 1, 8, 16)
PROMPT_TOKENS = 4000
CONTEXT_TOKENS = 8192
KV_BYTES = 1 << 30
ALONE_STEPS = 60
PROMPTS = 3


@dataclass
class Seen:
    """Seconds of steps without a long prompt and beside one, and from its arrival to its token."""

    alone: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)


def measure(engine: BatchingEngine, streams: int, vocabulary: int) -> Seen:
    """Let streams run, and send prompts one after the other."""
    chance = random.Random()  # noqa: S311  (no prompt like another)
    seen = Seen()

    def submit(number: int, tokens: int, made: int) -> None:
        prompt = tuple(chance.randrange(vocabulary) for _ in range(tokens))
        assert not engine.submit(Request(number, prompt, made))  # noqa: S101

    def step(into: list[float]) -> set[int]:
        began = time.perf_counter()
        outputs = engine.step()
        into.append(time.perf_counter() - began)
        return {output.request for output in outputs if output.token_ids}

    for number in range(streams):
        submit(number, 32, CONTEXT_TOKENS // 2)
    for turn in range(PROMPTS):
        for _ in range(ALONE_STEPS if streams else 0):
            step(seen.alone)
        long = streams + turn
        submit(long, PROMPT_TOKENS, 1)
        began = time.perf_counter()
        while long not in step(seen.beside):
            pass
        seen.first_token.append(time.perf_counter() - began)
    engine.cancel_all()
    return seen


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?", default=BASE)
    options = parser.parse_args()
    torch.set_num_threads(2)
    keep_freed_memory()
    model = load(options.model, "cpu", CONTEXT_TOKENS)
    engine = BatchingEngine(model, max(STREAMS) + 1, KV_BYTES)
    measure(engine, 1, model.spec.vocab_size)  # warm-up
    headings = ("streams", "alone p50 / p99 ms", "beside p50 / p99 ms", "ratios", "prompt s")
    result = Table(*headings, box=None)
    for streams in STREAMS:
        seen = measure(engine, streams, model.spec.vocab_size)
        waited = f"{statistics.median(seen.first_token):.2f}"
        if not streams:
            result.add_row("0", "", "", "", waited)
            continue
        alone, beside = (
            (1e3 * statistics.median(times), 1e3 * statistics.quantiles(times, n=100)[-1])
            for times in (seen.alone, seen.beside)
        )
        times = (f"{p50:.1f} / {p99:.1f}" for p50, p99 in (alone, beside))
        ratios = " / ".join(f"{b / a:.2f}" for a, b in zip(alone, beside, strict=True))
        result.add_row(str(streams), *times, ratios, waited)
    Console().print(result)


if __name__ == "__main__":
    main()
