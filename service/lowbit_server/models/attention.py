"""Attention of one forward pass over the blocks of the KV cache."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from lowbit_server.models.blocks import Rows, rectangles

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lowbit_server.models.architecture import Rope
    from lowbit_server.models.decoder import Span


class Attention:
    """What all layers share in one forward pass: angles, masks and where tokens are."""

    def __init__(self, spans: Sequence[Span], rope: Rope, dtype: torch.dtype) -> None:
        """Take the spans, whose tokens stand one after the other in all tensors."""
        device = rope.frequencies.device
        self._parts = [_Part(rows, dtype) for rows in rectangles(spans, device)]
        positions = torch.cat([part.rows.positions.view(-1) for part in self._parts])
        self._cosine, self._sine = rope.table(positions, dtype)

    def turn(self, heads: Tensor) -> Tensor:
        """Return heads (tokens, heads, head size) at the angles of their positions."""
        turned = heads.roll(heads.shape[-1] // 2, -1).mul_(self._sine)
        return turned.add_(heads * self._cosine)

    def attend(
        self, new: tuple[Tensor, Tensor, Tensor], cache: tuple[Tensor, Tensor], window: int | None
    ) -> Tensor:
        """Store new keys and values and return what the queries find, (tokens, heads * size).

        `new` has queries (tokens, heads, size), keys and values (tokens, KV heads, size);
        `cache` has keys and values (blocks, KV heads, BLOCK_TOKENS, size).
        """
        found, first = [], 0
        for part in self._parts:
            tokens = slice(first, first + part.rows.positions.numel())
            query, key, value = (one[tokens] for one in new)
            found.append(part.attend((query, key, value), cache, window))
            first = tokens.stop
        return found[0] if len(found) == 1 else torch.cat(found)


class _Part:
    """Attention of the rows of one rectangle."""

    def __init__(self, rows: Rows, dtype: torch.dtype) -> None:
        self.rows = rows
        self._dtype = dtype
        self._masks: dict[int | None, Tensor | None] = {}

    def attend(
        self, new: tuple[Tensor, Tensor, Tensor], cache: tuple[Tensor, Tensor], window: int | None
    ) -> Tensor:
        rows = self.rows
        query, key, value = new
        for stored, made in zip(cache, (key, value), strict=True):
            rows.store(stored, made)
        first = 0 if window is None else max(rows.shortest - window + 1, 0)
        if rows.width > 1 and not rows.longest:  # all that can be seen is new
            keys, values = (one.transpose(0, 1)[None] for one in (key, value))
        else:
            keys, values = (rows.seen(one, first) for one in cache)
        mask = self._mask(window, first)
        heads, groups = query.shape[1], key.shape[1]
        if rows.width == 1:
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

    def _mask(self, window: int | None, first: int) -> Tensor | None:
        """Return what is added to scores, (rows or 1, 1, tokens or 1, seen); None for nothing."""
        if window not in self._masks:
            self._masks[window] = self._made_mask(window, first)
        return self._masks[window]

    def _made_mask(self, window: int | None, first: int) -> Tensor | None:
        rows = self.rows
        if rows.width == 1 and rows.shortest == rows.longest:
            return None
        if rows.width > 1 and not rows.longest and (window is None or window >= rows.width):
            return None  # the kernel's own causal mask, which skips what it hides
        keys = torch.arange(first, rows.end, device=rows.starts.device)
        positions = rows.positions.view(-1, 1)
        hidden = keys > positions
        if window is not None:
            hidden |= keys <= positions - window
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=keys.device)
        mask.masked_fill_(hidden, -math.inf)
        return mask[:, None, None] if rows.width == 1 else mask[None, None]
