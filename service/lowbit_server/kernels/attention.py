"""Attention of a few tokens over blocks of the KV cache, in one call a layer."""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p
from typing import TYPE_CHECKING

import torch

from lowbit_server import kernels

if TYPE_CHECKING:
    from torch import Tensor

_DTYPES = (torch.bfloat16, torch.float32)
# What the kernel keeps on the stack; as in attention.c.
_MAX_SIZE, _MAX_SHARING = 256, 16


class _Batch(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("tokens", "heads", "groups", "size", "table_blocks")),
        *((name, c_int64) for name in ("is_bf16", "threads")),
        *((name, c_void_p) for name in ("positions", "rows", "tables", "cosine", "sine")),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("turned", "values")),
        *((name, c_int64) for name in ("turned_stride", "values_stride")),
        *((name, c_void_p) for name in ("key_pool", "value_pool", "out")),
        *((name, c_int64) for name in ("window", "rotary")),
    )


class BlockAttention:
    """What all layers share in one forward pass: where its tokens are, and their angles."""

    def __init__(
        self,
        places: tuple[Tensor, Tensor, Tensor],
        angles: tuple[Tensor, Tensor],
        shape: tuple[int, int, int],
    ) -> None:
        """Take places, angles and (heads, KV heads, head size).

        Places: positions (tokens) of tokens in their sequences, the rows (tokens) of their
        tables, and tables (rows, blocks) of block numbers, all int64. Angles: cosines and
        sines (tokens, 1, size), those of a head's first half negative, in the heads' dtype.
        Raises NotImplementedError where there is no kernel for it.
        """
        library = kernels.library()
        positions, rows, tables = places
        cosine, sine = angles
        heads, groups, size = shape
        has_room = size <= _MAX_SIZE and size % 2 == 0 and heads <= _MAX_SHARING * groups
        known = cosine.dtype in _DTYPES and cosine.device.type == "cpu"
        if library is None or not has_room or not known:
            raise NotImplementedError
        self._call = library.lowbit_attend
        self._alive = (*places, *angles)
        self.structure = _Batch(
            len(positions),
            heads,
            groups,
            size,
            tables.shape[1],
            cosine.dtype is torch.bfloat16,
            torch.get_num_threads(),
            *(tensor.data_ptr() for tensor in (positions, rows, tables, cosine, sine)),
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
