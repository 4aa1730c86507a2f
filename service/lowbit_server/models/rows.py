"""Lets transformers' modules work on rows of the engine's KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from lowbit_server.models.blocks import Rows
    from lowbit_server.models.decoder import Batch


class RowLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values: writes new tokens in place, returns copies of all.

    With a sliding window these begin where the shortest row's window begins.
    """

    def __init__(self, rows: Rows, keys: Tensor, values: Tensor, window: int | None) -> None:
        """Take tensors (blocks, heads, BLOCK_TOKENS, dim)."""
        super().__init__()
        self.is_initialized = True
        self.is_sliding = window is not None
        self.keys, self.values = keys, values
        self._rows = rows
        self._first = 0 if window is None else max(rows.shortest - window + 1, 0)

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Store new tokens (rows, heads, tokens, dim); return all that may be seen."""
        rows = self._rows
        for stored, new in ((self.keys, key_states), (self.values, value_states)):
            rows.store(stored, new.transpose(1, 2).flatten(0, 1))
        return rows.seen(self.keys, self._first), rows.seen(self.values, self._first)

    def get_mask_sizes(self, _: int) -> tuple[int, int]:
        """Return the length and the first position of what `update` returns."""
        return self._rows.end - self._first, self._first

    def get_seq_length(self) -> int | Tensor:
        """Return the number of tokens before the new ones: one, or (rows,) when they differ.

        Rows of equal length so take the very path that `generate` takes.
        """
        rows = self._rows
        return rows.longest if rows.shortest == rows.longest else rows.starts

    def get_max_length(self) -> int:
        """Return -1: the engine sees to the length."""
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the tensors are given."""


def row_cache(batch: Batch, rows: Rows, windows: Sequence[int | None]) -> Cache:
    """Return the cache that a transformers model runs this batch on."""
    layers = zip(batch.keys, batch.values, windows, strict=True)
    return Cache(layers=[RowLayer(rows, keys, values, window) for keys, values, window in layers])


def register_masks() -> None:
    """Make the masks of transformers work for rows of different lengths.

    Its mask patterns (causal, sliding window, chunked) are functions of positions and
    broadcast; only the position of the first new token was one number for all rows.
    """
    AttentionMaskInterface.register("sdpa", _by_row(sdpa_mask))
    AttentionMaskInterface.register("eager", _by_row(eager_mask))


def _by_row(make_mask: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    def make(
        *, q_offset: int | Tensor, mask_function: Callable[..., Tensor], **kwargs: object
    ) -> Tensor | None:
        if isinstance(q_offset, int):
            return make_mask(q_offset=q_offset, mask_function=mask_function, **kwargs)

        def shifted(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return mask_function(row, head, query + q_offset[row], key)

        kwargs["allow_is_causal_skip"] = False
        return make_mask(q_offset=0, mask_function=shifted, **kwargs)

    return make
