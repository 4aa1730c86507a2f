"""Attention of one forward pass over the blocks of the KV cache."""

from __future__ import annotations

import math
from itertools import takewhile
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from lowbit_server.kernels.attention import BlockAttention, reads_prompts
from lowbit_server.models.blocks import Rows, block_table, rectangles

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lowbit_server.models.architecture import Architecture
    from lowbit_server.models.decoder import Span


# Without tiles longer spans are the work of torch, unless there is little to see.
_NARROW_TOKENS = 17
_NARROW_PAIRS = 1 << 14


class Attention:
    """What all layers share in one forward pass: angles, masks and where tokens are."""

    def __init__(self, spans: Sequence[Span], shape: Architecture, dtype: torch.dtype) -> None:
        """Take the spans, whose tokens stand one after the other in all tensors."""
        self._heads = shape.heads
        device = shape.rope.frequencies.device
        positions = [span.start + offset for span in spans for offset in range(len(span.tokens))]
        places = torch.tensor(positions, device=device)
        self._angles = shape.rope.table(places, dtype)
        heads = shape.heads, shape.kv_heads, shape.head_size
        few = spans if reads_prompts(dtype, heads) else list(takewhile(_is_narrow, spans))
        self._few_tokens = sum(len(span.tokens) for span in few)
        self._kernel = self._made_kernel(few, places, heads)
        if self._kernel is None:
            few, self._few_tokens = [], 0
        self._parts = [_Part(rows, dtype) for rows in rectangles(spans[len(few) :], device)]

    @property
    def kernel(self) -> BlockAttention | None:
        """The compiled attention if it is that of all spans."""
        return None if self._parts else self._kernel

    def attend(
        self,
        turned: Tensor,
        value: Tensor,
        cache: tuple[Tensor, Tensor],
        *,
        window: int | None,
        rotary: bool,
    ) -> Tensor:
        """Store new keys and values and return what the queries find, (tokens, heads * size).

        `turned` has queries and keys before their rotary embedding, (tokens, heads + KV heads,
        size), values are (tokens, KV heads, size); `cache` has keys and values (blocks, KV
        heads, BLOCK_TOKENS, size).
        """
        found, few = [], self._few_tokens
        if self._kernel is not None:
            new = turned[:few], value[:few]
            found.append(self._kernel.attend(*new, cache, window=window, rotary=rotary))
        turned, value = turned[few:], value[few:]
        if rotary and self._parts:
            turned = self._turn(turned)
        split = turned[:, : self._heads], turned[:, self._heads :], value
        first = 0
        for part in self._parts:
            tokens = slice(first, first + part.rows.positions.numel())
            query, key, own = (one[tokens] for one in split)
            found.append(part.attend((query, key, own), cache, window))
            first = tokens.stop
        return found[0] if len(found) == 1 else torch.cat(found)

    def _made_kernel(
        self, spans: Sequence[Span], positions: Tensor, heads: tuple[int, int, int]
    ) -> BlockAttention | None:
        """Return the compiled attention of some spans, None where there is none for them."""
        if not spans:
            return None
        rows = [row for row, span in enumerate(spans) for _ in span.tokens]
        places = positions[: len(rows)], torch.tensor(rows), block_table(spans, positions.device)
        angles = self._angles[0][: len(rows)], self._angles[1][: len(rows)]
        try:
            return BlockAttention([len(span.tokens) for span in spans], places, angles, heads)
        except NotImplementedError:
            return None

    def _turn(self, heads: Tensor) -> Tensor:
        """Return heads (tokens, heads, head size) at the angles of their positions."""
        cosine, sine = (one[self._few_tokens :] for one in self._angles)
        turned = heads.roll(heads.shape[-1] // 2, -1).mul_(sine)
        return turned.add_(heads * cosine)


def _is_narrow(span: Span) -> bool:
    count = len(span.tokens)
    return count <= _NARROW_TOKENS or count * (span.start + count) <= _NARROW_PAIRS


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
