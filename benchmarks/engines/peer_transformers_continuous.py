"""Continuous batching of transformers."""

from __future__ import annotations

import time

import protocol
import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

KV_BYTES = 1 << 29
PAGE_TOKENS = 32


def make(folder: str) -> protocol.Run:
    """Load a folder."""
    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="sdpa")
    config = model.config
    token_bytes = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    cache = ContinuousBatchingConfig(
        page_size=PAGE_TOKENS,
        num_blocks=KV_BYTES // token_bytes // PAGE_TOKENS,
        # Nothing is found that an earlier run has left.
        allow_block_sharing=False,
    )
    manager = model.init_continuous_batching(greedy, cache)
    manager.start()

    def run(prompts: protocol.Prompts, tokens: int) -> list[list[float]]:
        arrivals: dict[str, list[float]] = {
            manager.add_request(prompt, max_new_tokens=tokens, streaming=True): []
            for prompt in prompts
        }
        left = len(arrivals)
        while left:
            result = manager.get_result(timeout=60)
            if result is None:
                raise SystemExit(str(manager.background_thread_status.fatal_error))
            times = arrivals[result.request_id]
            times += [time.perf_counter()] * (len(result.generated_tokens) - len(times))
            left -= result.is_finished()
        return list(arrivals.values())

    return run


if __name__ == "__main__":
    protocol.main(make)
