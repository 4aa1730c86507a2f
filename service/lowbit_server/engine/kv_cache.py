"""The memory of keys and values, one tensor a layer for all requests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from lowbit_server.models.decoder import ModelSpec

# Capacity is a multiple of this: few sizes, so that freed memory fits again.
BLOCK_TOKENS = 256


class KvCache:
    """Keys and values of rows 0 to n-1; it grows as they need and never over its budget."""

    def __init__(self, spec: ModelSpec, budget_bytes: int) -> None:
        """Make an empty cache that may take `budget_bytes`."""
        self._spec = spec
        self._budget_tokens = budget_bytes // spec.token_bytes
        self._rows = 0
        self._capacity = 0
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self.release()

    def row_limit_tokens(self, rows: int) -> int:
        """Return the longest that so many rows may be that fit into the budget by themselves."""
        return self._budget_tokens // rows // BLOCK_TOKENS * BLOCK_TOKENS

    @property
    def bytes(self) -> int:
        """Bytes that are allocated."""
        return sum(tensor.nbytes for tensor in (*self._keys, *self._values))

    def fits(self, lengths: Iterable[int]) -> bool:
        """Whether rows of these lengths, tokens, fit into the budget together."""
        rows = [_blocks(length) for length in lengths]
        return len(rows) * max(rows, default=0) <= self._budget_tokens

    def reserve(self, rows: int, length: int, lengths: Iterable[int]) -> None:
        """Make room for `rows` rows of `length` tokens; what is stored stays.

        `lengths` is what the live rows may come to and must fit. Sizes double, so that
        a growing row is copied a few times only, but no further than that.
        Raises torch.OutOfMemoryError or RuntimeError when there is no memory; the cache
        is then as good as before.
        """
        if rows <= self._rows and length <= self._capacity:
            return
        capacity, count = self._capacity, self._rows
        if length > capacity:
            capacity = max(_blocks(length), 2 * capacity)
        if rows > count:
            count = max(rows, 2 * count)
        # In this order: rows may double as far as the longest row leaves room.
        capacity = min(capacity, max(map(_blocks, lengths)))
        count = min(count, self._budget_tokens // capacity)
        for layer, shape in enumerate(self._spec.layers):
            # Layer by layer: the old and the new tensor of just one live at a time.
            self._keys[layer] = self._grown(self._keys[layer], count, capacity, shape.key_dim)
            self._values[layer] = self._grown(self._values[layer], count, capacity, shape.value_dim)
        self._rows, self._capacity = count, capacity

    def view(self, row: int, rows: int) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Return keys and values of `rows` rows from `row`, as views."""
        return (
            [keys[row : row + rows] for keys in self._keys],
            [values[row : row + rows] for values in self._values],
        )

    @torch.inference_mode()
    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one row over another."""
        for tensor in (*self._keys, *self._values):
            tensor[target, :, :length] = tensor[source, :, :length]

    def clear(self, row: int) -> None:
        """Overwrite a row with zeros: masked values are multiplied by 0, NaN stays NaN."""
        for tensor in (*self._keys, *self._values):
            tensor[row].zero_()

    def release(self) -> None:
        """Give all memory back; nothing stays stored."""
        self._rows = self._capacity = 0
        shapes = self._spec.layers
        self._keys = [self._zeros(0, one.heads, 0, one.key_dim) for one in shapes]
        self._values = [self._zeros(0, one.heads, 0, one.value_dim) for one in shapes]

    def _grown(self, old: Tensor, rows: int, capacity: int, dim: int) -> Tensor:
        new = self._zeros(rows, old.shape[1], capacity, dim)
        kept, length = min(rows, old.shape[0]), min(capacity, old.shape[2])
        new[:kept, :, :length] = old[:kept, :, :length]
        return new

    def _zeros(self, rows: int, heads: int, capacity: int, dim: int) -> Tensor:
        # Zeros, as what lies beyond a row's tokens must be finite.
        spec = self._spec
        return torch.zeros(rows, heads, capacity, dim, dtype=spec.dtype, device=spec.device)


def _blocks(tokens: int) -> int:
    """Round up to whole blocks."""
    return -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS
