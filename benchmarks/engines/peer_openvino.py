"""OpenVINO GenAI's continuous batching on a GGUF file."""

from __future__ import annotations

import itertools
import time

import numpy as np
import openvino as ov
import openvino_genai as genai
import protocol

CACHE_GIB = 1


def make(gguf: str) -> protocol.Run:
    """Load a GGUF file."""
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = CACHE_GIB
    scheduler.enable_prefix_caching = False
    scheduler.max_num_batched_tokens = 4096
    pipeline = genai.ContinuousBatchingPipeline(gguf, scheduler, "CPU")
    numbers = itertools.count()

    def run(prompts: protocol.Prompts, tokens: int) -> list[list[float]]:
        config = genai.GenerationConfig(
            max_new_tokens=tokens, min_new_tokens=tokens, ignore_eos=True, do_sample=False
        )
        handles = [
            pipeline.add_request(
                next(numbers), ov.Tensor(np.array([prompt], dtype=np.int64)), config
            )
            for prompt in prompts
        ]
        arrivals: list[list[float]] = [[] for _ in prompts]
        while pipeline.has_non_finished_requests():
            pipeline.step()
            now = time.perf_counter()
            for handle, stream in zip(handles, arrivals, strict=True):
                while handle.can_read():
                    for output in handle.read().values():
                        stream.extend([now] * len(output.generated_ids))
        return arrivals

    return run


if __name__ == "__main__":
    protocol.main(make)
