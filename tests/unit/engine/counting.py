"""A tiny decoder whose tokens tell whether the engine kept every row apart."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from lowbit_server.models.decoder import LayerShape, ModelSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lowbit_server.models.decoder import Batch

VOCAB = 101
SHAPES = (LayerShape(heads=1, key_dim=1, value_dim=2), LayerShape(heads=2, key_dim=1, value_dim=1))


class CountingModel:
    """Its next token is a hash of all tokens that the KV cache holds for the row.

    `fails` says at which forward passes it raises, `breaks` at which it makes NaN for
    the last row.
    """

    def __init__(self, context_tokens: int = 4096) -> None:
        self.spec = ModelSpec(SHAPES, torch.float32, torch.device("cpu"), context_tokens, VOCAB)
        self.batches: list[Batch] = []
        self.fails: set[int] = set()
        self.breaks: set[int] = set()

    def forward(self, batch: Batch) -> Tensor:
        return self.logits(batch)[:, -1]

    def logits(self, batch: Batch) -> Tensor:
        number = len(self.batches)
        self.batches.append(batch)
        if number in self.fails:
            message = "the model broke"
            raise RuntimeError(message)
        logits = torch.zeros(len(batch.tokens), len(batch.tokens[0]), VOCAB)
        for row, (tokens, start) in enumerate(zip(batch.tokens, batch.starts, strict=True)):
            end = start + len(tokens)
            sums = set()
            for stored in (*batch.keys, *batch.values):
                stored[row, :, start:end] = torch.tensor(tokens, dtype=torch.float32)[None, :, None]
                sums |= set(stored[row, :, :end].sum(1).flatten().tolist())
            assert len(sums) == 1, "the layers differ: a row was moved in part"
            total, columns = int(sums.pop()), []
            for index in reversed(range(len(tokens))):
                columns.append(_hash(total, start + index + 1))
                total -= tokens[index]
            logits[row, range(len(tokens)), columns[::-1]] = 1
        if number in self.breaks:
            logits[-1] = torch.nan
            for stored in (*batch.keys, *batch.values):
                stored[-1] = torch.nan
        return logits


def expected(prompt: Sequence[int], count: int) -> list[int]:
    """Return the tokens that follow a prompt."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(_hash(sum(tokens), len(tokens)))
    return tokens[len(prompt) :]


def expected_logprob(tokens: Sequence[int], token: int) -> float:
    """Return the log-probability of a token after others: one logit is 1, the rest are 0."""
    likeliest = _hash(sum(tokens), len(tokens))
    return (token == likeliest) - math.log(math.e + VOCAB - 1)


def _hash(total: int, length: int) -> int:
    return (31 * total + length) % VOCAB
