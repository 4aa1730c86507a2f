"""A tiny decoder whose tokens tell whether the engine kept every row apart."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from lowbit_server.models.decoder import (
    BLOCK_TOKENS,
    InterruptedPassError,
    LayerShape,
    ModelSpec,
)

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

    def __init__(self, context_tokens: int = 4096, *, mixes: bool = False) -> None:
        cpu = torch.device("cpu")
        self.spec = ModelSpec(SHAPES, torch.float32, cpu, context_tokens, VOCAB, mixes)
        self.batches: list[Batch] = []
        self.fails: set[int] = set()
        self.breaks: set[int] = set()

    @property
    def widths(self) -> list[int]:
        """How many tokens the first span of each batch had."""
        return [len(batch.spans[0].tokens) for batch in self.batches]

    def forward(self, batch: Batch) -> Tensor:
        number = len(self.batches)
        self.batches.append(batch)
        if number in self.fails:
            message = "the model broke"
            raise RuntimeError(message)
        if batch.interrupt is not None and batch.interrupt.value:
            for span in batch.spans:  # some of it was done
                last = span.start + len(span.tokens) - 1
                block = span.blocks[last // BLOCK_TOKENS]
                batch.keys[0][block, :, last % BLOCK_TOKENS] = VOCAB
            raise InterruptedPassError
        wanted = []
        for span in batch.spans:
            blocks, end = list(span.blocks), span.start + len(span.tokens)
            assert len(blocks) * BLOCK_TOKENS >= end
            sums = set()
            for pool in (*batch.keys, *batch.values):
                stored = pool[blocks].transpose(0, 1).flatten(1, 2)
                stored[:, span.start : end] = torch.tensor(span.tokens).float()[None, :, None]
                pool[blocks] = stored.unflatten(1, (-1, BLOCK_TOKENS)).transpose(0, 1)
                sums |= set(stored[:, :end].sum(1).flatten().tolist())
            assert len(sums) == 1, "the layers differ: a block was moved in part"
            total, columns = int(sums.pop()), []
            for index in reversed(range(len(span.tokens))):
                columns.append(_hash(total, span.start + index + 1))
                total -= span.tokens[index]
            wanted += columns[::-1][len(columns) - span.wanted :]
        logits = torch.zeros(len(wanted), VOCAB)
        logits[range(len(wanted)), wanted] = 1
        if number in self.breaks:
            logits[-1] = torch.nan
            for pool in (*batch.keys, *batch.values):
                pool[batch.spans[-1].blocks[-1]] = torch.nan
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
