"""Causal attention in blocks of queries, for samples that are read as a whole.

torch's kernel for CPUs computes what the causal mask hides. Here a block of queries meets
only the keys up to its end, and the heads that share keys are one product: less than half
of the time for samples of 512 tokens.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from transformers import AttentionInterface

if TYPE_CHECKING:
    from torch import Tensor, nn

BLOCKED = "lowbit_blocked"
"""Its name among transformers' implementations of attention."""
_QUERIES = 64


def blocked_attention(  # noqa: PLR0913  (transformers' signature)
    module: nn.Module,  # noqa: ARG001
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    **_: object,
) -> tuple[Tensor, None]:
    """Return what queries find, (samples, tokens, heads, head size).

    Takes queries (samples, heads, tokens, head size), keys and values of KV heads, and the
    `causal_mask`.
    """
    samples, heads, tokens, size = query.shape
    pairs = samples * key.shape[1]
    queries = (query * scaling).reshape(pairs, -1, tokens, size)
    keys = key.reshape(pairs, tokens, size).transpose(1, 2).contiguous()
    values = value.reshape(pairs, tokens, size)
    found = torch.empty_like(queries)
    for start in range(0, tokens, _QUERIES):
        end = min(start + _QUERIES, tokens)
        block = queries[:, :, start:end]
        scores = torch.bmm(block.flatten(1, 2), keys[:, :, :end]).view(*block.shape[:3], end)
        weights = scores.add_(attention_mask[start:end, :end]).softmax(-1)
        found[:, :, start:end] = torch.bmm(weights.flatten(1, 2), values[:, :end]).view_as(block)
    return found.view(samples, heads, tokens, size).transpose(1, 2), None


def causal_mask(tokens: int, window: int | None, dtype: torch.dtype, device: str) -> Tensor:
    """Return what is added to scores (tokens, tokens): 0, or -inf where a query sees no key.

    With a window, a token sees that many back, itself included.
    """
    distances = torch.arange(tokens, device=device)[:, None] - torch.arange(tokens, device=device)
    hidden = distances < 0 if window is None else (distances < 0) | (distances >= window)
    mask = torch.zeros(tokens, tokens, dtype=dtype, device=device)
    return mask.masked_fill_(hidden, -math.inf)


AttentionInterface.register(BLOCKED, blocked_attention)
