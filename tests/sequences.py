"""Feeds a model some sequences through a KV cache, as an engine does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowbit_server.engine.kv_cache import KvCache
from lowbit_server.models.decoder import Batch, Span, blocks_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from ctypes import c_int

    import torch

    from lowbit_server.models.decoder import DecoderModel


class Sequences:
    """Some sequences whose blocks lie between those of the others."""

    def __init__(self, model: DecoderModel, count: int) -> None:
        self._model = model
        self._kv = KvCache(model.spec, 1 << 24)
        self._blocks: list[list[int]] = [[] for _ in range(count)]
        self.lengths = [0] * count

    def feed(self, *new: Sequence[int], interrupt: c_int | None = None) -> torch.Tensor:
        """Return the logits after each new token of each sequence, (tokens, vocabulary) float32.

        After an InterruptedPassError the sequences are as they were.
        """
        spans = []
        for row, tokens in enumerate(new):
            end = self.lengths[row] + len(tokens)
            self._blocks[row] += self._kv.take(blocks_of(end) - len(self._blocks[row]))
            if tokens:
                spans.append(Span(tokens, self.lengths[row], self._blocks[row], len(tokens)))
        batch = Batch(spans, self._kv.keys, self._kv.values, interrupt)
        logits = self._model.forward(batch).float()
        for row, tokens in enumerate(new):
            self.lengths[row] += len(tokens)
        return logits
