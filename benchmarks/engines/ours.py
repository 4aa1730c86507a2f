"""Lowbit's engine in this process, as a worker runs it."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import protocol
import torch

from lowbit_server.engine.batching import BatchingEngine
from lowbit_server.engine.request import Request
from lowbit_server.models.loading import load
from lowbit_server.worker.allocator import keep_freed_memory
from lowbit_server.worker.memory import page_out_cuda

KV_BYTES = 1 << 29
CONTEXT_TOKENS = 4096
MAX_RUNNING = 64


def make(folder: str) -> protocol.Run:
    """Load a folder of the store."""
    torch.set_num_threads(2)
    keep_freed_memory()
    page_out_cuda()
    model = load(Path(folder), "cpu", CONTEXT_TOKENS)
    engine = BatchingEngine(model, MAX_RUNNING, KV_BYTES)

    runs = itertools.count()

    def run(prompts: protocol.Prompts, tokens: int) -> list[list[float]]:
        # Nothing is found that an earlier run has left.
        salt = next(runs).to_bytes(4)
        for number, prompt in enumerate(prompts):
            engine.submit(Request(number, prompt, tokens, cache_salt=salt))
        arrivals: list[list[float]] = [[] for _ in prompts]
        while engine.status().due is not None:
            outputs = engine.step()
            now = time.perf_counter()
            for output in outputs:
                arrivals[output.request] += [now] * len(output.token_ids)
        return arrivals

    return run


if __name__ == "__main__":
    protocol.main(make)
