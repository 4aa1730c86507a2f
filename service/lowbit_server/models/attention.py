"""Attention of one batch over the engine's KV cache."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lowbit_server.models.architecture import Rope


class Attention:
    """What all layers share in one forward pass: angles, masks and where tokens go.

    Tokens are flat: one of each row, or several of one row.
    """

    def __init__(self, starts: Sequence[int], width: int, rope: Rope, dtype: torch.dtype) -> None:
        """Take how many tokens each row has in the cache, and how many new ones."""
        device = rope.frequencies.device
        self._width, self._shortest, self._longest = width, min(starts), max(starts)
        self._end = self._longest + width
        self._dtype, self._device = dtype, device
        self._starts = torch.tensor(starts, device=device)
        self._rows = torch.arange(len(starts), device=device)
        new = torch.arange(width, device=device)
        self._positions = self._starts + new if len(starts) == 1 else self._starts
        self._cosine, self._sine = rope.table(self._positions, dtype)
        self._masks: dict[int | None, Tensor | None] = {}

    def turn(self, heads: Tensor) -> Tensor:
        """Return heads (tokens, heads, head size) at the angles of their positions."""
        turned = heads.roll(heads.shape[-1] // 2, -1).mul_(self._sine)
        return turned.add_(heads * self._cosine)

    def attend(
        self, new: tuple[Tensor, Tensor, Tensor], cache: tuple[Tensor, Tensor], window: int | None
    ) -> Tensor:
        """Store new keys and values and return what the queries find, (tokens, heads * size).

        `new` has queries (tokens, heads, size), keys and values (tokens, KV heads, size);
        `cache` has keys and values (rows, KV heads, capacity, size).
        """
        query, key, value = new
        first = 0 if window is None else max(self._shortest - window + 1, 0)
        keys = self._stored(cache[0], key)[:, :, first:]
        values = self._stored(cache[1], value)[:, :, first:]
        mask = self._mask(window, first)
        heads, groups = query.shape[1], key.shape[1]
        if self._width == 1:
            # The heads that share keys are queries of one: far fewer, larger products.
            folded = query.view(len(query), groups, heads // groups, -1)
            found = functional.scaled_dot_product_attention(folded, keys, values, attn_mask=mask)
            return found.reshape(len(query), -1)
        found = functional.scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=heads != groups,
        )
        return found[0].transpose(0, 1).reshape(len(query), -1)

    def _stored(self, stored: Tensor, new: Tensor) -> Tensor:
        """Write new heads (tokens, heads, size) to their rows' ends; return all up to there."""
        if self._width > 1:
            stored[0, :, self._longest : self._end] = new.transpose(0, 1)
        elif self._shortest == self._longest:
            stored[:, :, self._longest] = new
        else:
            stored[self._rows, :, self._starts] = new
        return stored[:, :, : self._end]

    def _mask(self, window: int | None, first: int) -> Tensor | None:
        """Return what is added to scores, (rows or 1, 1, tokens or 1, seen); None for nothing."""
        if window not in self._masks:
            self._masks[window] = self._made_mask(window, first)
        return self._masks[window]

    def _made_mask(self, window: int | None, first: int) -> Tensor | None:
        if self._width == 1 and self._shortest == self._longest:
            return None
        if self._width > 1 and not self._longest and (window is None or window >= self._width):
            return None  # the kernel's own causal mask, which skips what it hides
        keys = torch.arange(first, self._end, device=self._device)
        positions = self._positions[:, None]
        hidden = keys > positions
        if window is not None:
            hidden |= keys <= positions - window
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device)
        mask.masked_fill_(hidden, -math.inf)
        return mask[:, None, None] if self._width == 1 else mask[None, None]
