"""Where the tokens of a forward pass lie in the blocks of the KV cache."""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING

import torch

from lowbit_server.models.decoder import BLOCK_TOKENS, Span, blocks_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor


def block_table(spans: Sequence[Span], device: torch.device) -> Tensor:
    """Return the block numbers of each span, int64 (spans, blocks of the longest).

    Behind the end of a shorter one stands any block: what it holds is not to be seen.
    """
    count = max(blocks_of(span.start + len(span.tokens)) for span in spans)
    tables = [[*span.blocks[:count], *(0,) * (count - len(span.blocks))] for span in spans]
    return torch.tensor(tables, device=device)


class Rows:
    """Spans of equal width as the rows of one rectangle: several of one token, or any one."""

    def __init__(self, spans: Sequence[Span], device: torch.device) -> None:
        """Take the spans."""
        self.spans = spans
        self.width = len(spans[0].tokens)
        starts = [span.start for span in spans]
        self.shortest, self.longest = min(starts), max(starts)
        self.end = self.longest + self.width
        self.starts = torch.tensor(starts, device=device)
        self.positions = self.starts[:, None] + torch.arange(self.width, device=device)
        self.table = block_table(spans, device)
        self._blocks = self.table.gather(1, self.positions // BLOCK_TOKENS).view(-1)
        self._offsets = self.positions.view(-1) % BLOCK_TOKENS

    def store(self, pool: Tensor, new: Tensor) -> None:
        """Write new (rows * width, heads, dim) into (blocks, heads, BLOCK_TOKENS, dim)."""
        pool[self._blocks, :, self._offsets] = new

    def seen(self, pool: Tensor, first: int) -> Tensor:
        """Copy the rows' tokens from `first` on, (rows, heads, end - first, dim)."""
        skipped = first // BLOCK_TOKENS
        found = pool[self.table[:, skipped:]].transpose(1, 2).flatten(2, 3)
        return found[:, :, first - skipped * BLOCK_TOKENS : self.end - skipped * BLOCK_TOKENS]


def rectangles(spans: Sequence[Span], device: torch.device) -> Iterator[Rows]:
    """Yield all spans in order: those of one token that lead together, each other by itself."""
    ones = list(takewhile(lambda span: len(span.tokens) == 1, spans))
    if ones:
        yield Rows(ones, device)
    for span in spans[len(ones) :]:
        yield Rows([span], device)
