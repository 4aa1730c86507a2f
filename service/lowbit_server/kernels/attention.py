"""Attention of tokens over blocks of the KV cache, in one call a layer."""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from lowbit_server import kernels
from lowbit_server.kernels.products import have_tiles

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

_DTYPES = (torch.bfloat16, torch.float32)
# What the kernel keeps on the stack; as in attention.h.
_MAX_SIZE, _MAX_SHARING, _SPAN_NUMBERS = 256, 16, 8192
# Queries, and numbers, in one tile.
_TILE_QUERIES, _TILE_NUMBERS = 16, 32
# Spans for each thread, so that all have about as much to do.
_SPANS_EACH = 4


class _Batch(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("tokens", "heads", "groups", "size", "table_blocks")),
        *((name, c_int64) for name in ("is_bf16", "threads")),
        *((name, c_void_p) for name in ("positions", "rows", "tables", "cosine", "sine")),
        ("spans", c_void_p),
        ("span_count", c_int64),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("turned", "values")),
        *((name, c_int64) for name in ("turned_stride", "values_stride")),
        *((name, c_void_p) for name in ("key_pool", "value_pool", "out")),
        *((name, c_int64) for name in ("window", "rotary")),
    )


def reads_prompts(dtype: torch.dtype, shape: tuple[int, int, int]) -> bool:
    """Return whether many tokens of one sequence are computed at once: by tiles.

    The shape is (heads, KV heads, head size).
    """
    fits = _has_room(shape) and shape[-1] % _TILE_NUMBERS == 0
    return fits and dtype is torch.bfloat16 and have_tiles()


class BlockAttention:
    """What all layers share in one forward pass: where its tokens are, and their angles."""

    def __init__(
        self,
        counts: Sequence[int],
        places: tuple[Tensor, Tensor, Tensor],
        angles: tuple[Tensor, Tensor],
        shape: tuple[int, int, int],
    ) -> None:
        """Take places, angles and (heads, KV heads, head size).

        Counts are how many of the tokens, one after the other, are of one sequence. Places:
        positions (tokens) of tokens in their sequences, the rows (tokens) of their tables, and
        tables (rows, blocks) of block numbers, all int64. Angles: cosines and
        sines (tokens, 1, size), those of a head's first half negative, in the heads' dtype.
        Raises NotImplementedError where there is no kernel for it.
        """
        library = kernels.library()
        positions, rows, tables = places
        cosine, sine = angles
        heads, groups, size = shape
        known = cosine.dtype in _DTYPES and cosine.device.type == "cpu"
        if library is None or not _has_room(shape) or not known:
            raise NotImplementedError
        self._call = library.lowbit_attend
        sharing = heads // groups
        if reads_prompts(cosine.dtype, shape):
            spans = torch.tensor([*_tiled(counts, size, sharing)])
        else:
            spans = torch.tensor([(sharing * token, 0) for token in range(len(positions))])
        self._alive = (*places, *angles, spans)
        self.structure = _Batch(
            len(positions),
            heads,
            groups,
            size,
            tables.shape[1],
            cosine.dtype is torch.bfloat16,
            torch.get_num_threads(),
            *(tensor.data_ptr() for tensor in (positions, rows, tables, cosine, sine, spans)),
            len(spans),
        )

    def attend(
        self,
        turned: Tensor,
        values: Tensor,
        cache: tuple[Tensor, Tensor],
        *,
        window: int | None,
        rotary: bool,
    ) -> Tensor:
        """Store new keys and values and return what the queries find, (tokens, heads * size).

        `turned` has queries and keys before their rotary embedding, (tokens, heads + KV heads,
        size), values are (tokens, KV heads, size); `cache` has keys and values (blocks, KV
        heads, BLOCK_TOKENS, size). All heads of a token are contiguous.
        """
        batch = self.structure
        out = turned.new_empty(batch.tokens, batch.heads * batch.size)
        layer = _Layer(
            turned.data_ptr(),
            values.data_ptr(),
            turned.stride(0),
            values.stride(0),
            cache[0].data_ptr(),
            cache[1].data_ptr(),
            out.data_ptr(),
            window or 0,
            rotary,
        )
        self._call(ctypes.byref(batch), ctypes.byref(layer))
        return out


def _has_room(shape: tuple[int, int, int]) -> bool:
    heads, groups, size = shape
    return size <= _MAX_SIZE and size % 2 == 0 and heads <= _MAX_SHARING * groups


def _tiled(counts: Sequence[int], size: int, sharing: int) -> Iterator[tuple[int, int]]:
    """Yield (first query, count) of all spans, a count of 0 for a token by itself.

    Queries are those that share keys. Spans of many come first: they take longest.
    """
    shared = sum(count for count in counts if count > 1) * sharing
    even = shared // (_SPANS_EACH * torch.get_num_threads())
    length = max(min(even, _SPAN_NUMBERS // size) // _TILE_QUERIES, 1) * _TILE_QUERIES
    firsts = [sharing * first for first in accumulate(counts, initial=0)]
    for first, count in zip(firsts, counts, strict=False):
        queries = sharing * count if count > 1 else 0
        # The last ones see most.
        for start in reversed(range(0, queries, length)):
            yield first + start, min(length, queries - start)
    yield from ((first, 0) for first, count in zip(firsts, counts, strict=False) if count == 1)
