"""vLLM's CPU build, its engine stepped in this process."""

from __future__ import annotations

import itertools
import os
import time

import protocol

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

from vllm import LLM, SamplingParams, TokensPrompt
from vllm.sampling_params import RequestOutputKind


def make(folder: str) -> protocol.Run:
    """Load a folder."""
    engine = LLM(
        model=folder,
        dtype="bfloat16",
        max_model_len=4096,
        max_num_seqs=64,
        enable_prefix_caching=False,
    ).llm_engine
    numbers = itertools.count()

    def run(prompts: protocol.Prompts, tokens: int) -> list[list[float]]:
        sampling = SamplingParams(
            temperature=0,
            max_tokens=tokens,
            ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
        )
        arrivals: dict[str, list[float]] = {}
        for prompt in prompts:
            name = str(next(numbers))
            arrivals[name] = []
            engine.add_request(name, TokensPrompt(prompt_token_ids=prompt), sampling)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter()
            for output in outputs:
                arrivals[output.request_id] += [now] * len(output.outputs[0].token_ids)
        return list(arrivals.values())

    return run


if __name__ == "__main__":
    protocol.main(make)
