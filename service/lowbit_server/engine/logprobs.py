"""Log-probabilities of tokens, from a model's own logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lowbit_server.engine.request import TokenLogprob

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

# Positions that are worked on at one time: in float32 those of a large vocabulary
# (150,000 tokens) take 40 MB, a whole chunk of a prompt would take 300.
SLICE_ROWS = 64


class AskedLogprobs:
    """The logits of the rows that ask for log-probabilities, as they are before sampling."""

    def __init__(self, logits: Tensor, top: Sequence[int | None]) -> None:
        """Copy from logits (rows, vocabulary); `top` is how many likeliest a row asks for."""
        self._top = {row: count for row, count in enumerate(top) if count is not None}
        self._rows = len(top)
        self._logits = logits[list(self._top)] if self._top else None

    def of(self, tokens: Sequence[int]) -> list[TokenLogprob | None]:
        """Return what they say of a token a row; None for rows that do not ask."""
        found: list[TokenLogprob | None] = [None] * self._rows
        if self._logits is not None:
            chosen = [tokens[row] for row in self._top]
            logprobs = token_logprobs(self._logits, chosen, list(self._top.values()))
            for row, logprob in zip(self._top, logprobs, strict=True):
                found[row] = logprob
        return found


def token_logprobs(logits: Tensor, tokens: Sequence[int], top: Sequence[int]) -> list[TokenLogprob]:
    """Return what the distribution says of one token a row, and of the likeliest ones.

    Takes logits (rows, vocabulary) of any float type, a token a row, and how many of the
    likeliest tokens each row wants. Log-softmax is computed in float32.
    """
    found = []
    for start in range(0, len(tokens), SLICE_ROWS):
        rows = slice(start, start + SLICE_ROWS)
        found += _slice(logits[rows], tokens[rows], top[rows])
    return found


def _slice(logits: Tensor, tokens: Sequence[int], top: Sequence[int]) -> list[TokenLogprob]:
    values = logits.float()
    total = values.logsumexp(-1, keepdim=True)
    ids = torch.tensor(tokens, device=logits.device)[:, None]
    chosen = (values.gather(-1, ids) - total)[:, 0].tolist()
    # Of rows that want different numbers each takes a part of the most.
    likeliest = values.topk(min(max(top), values.shape[-1]))
    tops = zip(likeliest.indices.tolist(), (likeliest.values - total).tolist(), strict=True)
    return [
        TokenLogprob(logprob, tuple(best[:count]), tuple(logprobs[:count]))
        for logprob, (best, logprobs), count in zip(chosen, tops, top, strict=True)
    ]
