"""What a model takes and how fast it is, run as the engine runs it."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import torch

from lowbit_server.models.decoder import BLOCK_TOKENS, CHUNK_TOKENS, Batch, Span, blocks_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from lowbit_server.models.decoder import DecoderModel

_PREFILLS = 3
_PROMPT_TOKENS = 16
_DECODE_STEPS = 32


def live_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of all storages that weights, buffers and quantization state use.

    Tied weights count once. bitsandbytes keeps scales and code books in attributes of
    its parameters and layers and repacks weights at the first forward pass: measure
    after that.
    """
    storages = {}
    for tensor in _tensors(model):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def prompt_logits(model: DecoderModel, prompt: Sequence[int]) -> Iterator[Tensor]:
    """Yield the logits after every token of a prompt, chunk by chunk as the engine reads it.

    Each is (tokens, vocabulary) in the type that the model computes them in; all chunks
    but the last have `CHUNK_TOKENS` tokens.
    """
    row = _Row(model, len(prompt))
    for start in range(0, len(prompt), CHUNK_TOKENS):
        chunk = prompt[start : start + CHUNK_TOKENS]
        yield model.forward(row.batch(chunk, len(chunk)))


def prefill_tokens_per_second(model: DecoderModel) -> float:
    """Return the speed of one prompt alone: the median of a few after a first one."""
    count = min(CHUNK_TOKENS, model.spec.context_tokens)
    prompt = [index % model.spec.vocab_size for index in range(count)]
    times = []
    for _ in range(1 + _PREFILLS):
        row = _Row(model, count)
        started = time.perf_counter()
        # Taking a number waits for the device too.
        model.forward(row.batch(prompt)).argmax().item()
        times.append(time.perf_counter() - started)
    return count / statistics.median(times[1:])


def decode_tokens_per_second(model: DecoderModel) -> float:
    """Return the speed of one stream alone, greedy: the median of a few dozen steps."""
    count = min(_PROMPT_TOKENS, max(1, model.spec.context_tokens // 2))
    steps = min(_DECODE_STEPS, model.spec.context_tokens - count)
    row = _Row(model, count + steps)
    prompt = [index % model.spec.vocab_size for index in range(count)]
    token = int(model.forward(row.batch(prompt)).argmax())
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        token = int(model.forward(row.batch([token])).argmax())
        times.append(time.perf_counter() - started)
    return 1 / statistics.median(times)


class _Row:
    """One sequence of tokens, alone in its KV cache."""

    def __init__(self, model: DecoderModel, capacity: int) -> None:
        spec = model.spec
        self._blocks = range(blocks_of(capacity))

        def zeros(heads: int, dim: int) -> Tensor:
            shape = (len(self._blocks), heads, BLOCK_TOKENS, dim)
            return torch.zeros(shape, dtype=spec.dtype, device=spec.device)

        self._keys = [zeros(one.heads, one.key_dim) for one in spec.layers]
        self._values = [zeros(one.heads, one.value_dim) for one in spec.layers]
        self._length = 0

    def batch(self, tokens: Sequence[int], wanted: int = 1) -> Batch:
        """Return the batch that adds these tokens to the sequence."""
        span = Span(tokens, self._length, self._blocks, wanted)
        self._length += len(tokens)
        return Batch([span], self._keys, self._values)


def _tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    seen: set[int] = set()
    todo: list[object] = [*model.modules(), *model.parameters(), *model.buffers()]
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            yield item
        if _holds_state(item):
            todo += vars(item).values()


def _holds_state(item: object) -> bool:
    """Whether an object may hold tensors that torch does not know of."""
    owned = type(item).__module__.startswith("bitsandbytes")
    return hasattr(item, "__dict__") and (owned or isinstance(item, torch.nn.Parameter))
