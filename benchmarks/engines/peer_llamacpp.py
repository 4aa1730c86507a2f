"""llama.cpp through its Python bindings: all streams in one batch a step."""

from __future__ import annotations

import time

import llama_cpp
import protocol

CONTEXT_TOKENS = 4096 + 64 * 128
MAX_STREAMS = 64
BATCH_TOKENS = 2048
THREADS = 2


def make(gguf: str) -> protocol.Run:
    """Load a GGUF file."""
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        gguf.encode(), llama_cpp.llama_model_default_params()
    )
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = CONTEXT_TOKENS
    options.n_batch = BATCH_TOKENS
    options.n_seq_max = MAX_STREAMS
    options.n_threads = options.n_threads_batch = THREADS
    options.kv_unified = True
    context = llama_cpp.llama_init_from_model(model, options)
    memory = llama_cpp.llama_get_memory(context)
    batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)
    chain = llama_cpp.llama_sampler_init_greedy()

    def decode(entries: list[tuple[int, int, int, bool]]) -> list[int]:
        """Run (token, position, stream, last) and return what follows the last ones."""
        batch.n_tokens = len(entries)
        for index, (token, position, stream, last) in enumerate(entries):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = stream
            batch.logits[index] = last
        if llama_cpp.llama_decode(context, batch):
            raise SystemExit("llama_decode failed")
        return [
            llama_cpp.llama_sampler_sample(chain, context, index)
            for index, entry in enumerate(entries)
            if entry[3]
        ]

    def run(prompts: protocol.Prompts, tokens: int) -> list[list[float]]:
        llama_cpp.llama_memory_clear(memory, True)  # noqa: FBT003  (a C function)
        arrivals: list[list[float]] = []
        heads = []
        for stream, prompt in enumerate(prompts):
            last = len(prompt) - 1
            entries = [(token, place, stream, place == last) for place, token in enumerate(prompt)]
            heads += decode(entries)
            arrivals.append([time.perf_counter()])
        for step in range(tokens - 1):
            heads = decode(
                [
                    (head, len(prompt) + step, stream, True)
                    for stream, (head, prompt) in enumerate(zip(heads, prompts, strict=True))
                ]
            )
            now = time.perf_counter()
            for stream in arrivals:
                stream.append(now)
        return arrivals

    return run


if __name__ == "__main__":
    protocol.main(make)
