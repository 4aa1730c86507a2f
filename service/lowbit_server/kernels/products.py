"""Products of bfloat16 inputs with 4-bit, 8-bit and bfloat16 weights, in C.

One structure a layer says where its parts are; products and the decoder's step read it.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit_server import kernels

ROWS = 16
"""Outputs come in multiples of this,"""
COLUMNS = 32
"""columns of bfloat16 in multiples of this,"""
GROUP = 8
"""and columns of codes that share a scale in multiples of this."""
_NIBBLES, _PARITIES = 4, 2
_TILES = 2


class CProduct(ctypes.Structure):
    """`struct product` of products.h."""

    _fields_ = (
        *((name, c_int64) for name in ("bits", "rows", "columns", "group")),
        *((name, c_void_p) for name in ("weights", "scales", "points", "meant", "bias")),
    )


@dataclass(frozen=True, slots=True)
class Grid:
    """What codes stand for: that of row i and column j for scales[g, i] * (m + points[g, i]).

    Here g is the column's group and m the code's meaning.
    """

    scales: Tensor
    """float32 (groups, rows)."""
    points: Tensor | None = None
    """int16 (groups, rows); zeros where there are none."""
    meant: Tensor | None = None
    """The meanings of 4-bit codes, bfloat16 (16); signed codes of 8 bits mean themselves."""


class Product:
    """The product with one weight, whose tensors it keeps."""

    def __init__(
        self,
        bits: int,
        shape: tuple[int, int],
        weights: Tensor,
        grid: Grid | None,
        bias: Tensor | None,
    ) -> None:
        """Take weights of a shape (rows, columns).

        Those of 4 and 8 bits are as `packed4` and `packed8` return them and have a grid; those
        of 16 are bfloat16 (rows, columns). The bias is bfloat16 (rows).
        """
        self.shape = shape
        parts = {"weights": weights, "bias": bias}
        if grid:
            parts |= {"scales": grid.scales, "points": grid.points, "meant": grid.meant}
        self.tensors = {name: one.contiguous() for name, one in parts.items() if one is not None}
        group = shape[1] // len(grid.scales) if grid else shape[1]
        pointers = {name: one.data_ptr() for name, one in self.tensors.items()}
        self.structure = CProduct(bits, *shape, group, **pointers)

    def of(self, inputs: Tensor) -> Tensor:
        """Return y (tokens, rows) of bfloat16 inputs (tokens, columns)."""
        inputs = inputs.contiguous()
        out = inputs.new_empty(len(inputs), self.shape[0])
        self._call("lowbit_product", c_int64(len(inputs)), c_void_p(inputs.data_ptr()), out)
        return out

    def unpacked(self) -> Tensor:
        """Return a weight of codes, transposed: bfloat16 (columns, rows), rounded once each."""
        out = torch.empty(self.shape[::-1], dtype=torch.bfloat16)
        self._call("lowbit_unpack", out)
        return out

    def _call(self, name: str, *arguments: object) -> None:
        *before, out = arguments
        assert isinstance(out, Tensor)  # noqa: S101
        function = getattr(kernels.library(), name)
        threads = c_int64(torch.get_num_threads())
        if not function(ctypes.byref(self.structure), *before, c_void_p(out.data_ptr()), threads):
            raise MemoryError


def are_there() -> bool:
    """Return whether these kernels were compiled and this CPU can run them."""
    library = kernels.library()
    return library is not None and bool(library.lowbit_has_products())


def have_tiles() -> bool:
    """Return whether this CPU has tiles, with which any number of tokens is fast."""
    library = kernels.library()
    return library is not None and library.lowbit_has_products() == _TILES


def packed4(codes: Tensor) -> Tensor:
    """Return 4-bit codes (rows, columns), uint8, as the kernel reads them.

    Blocks of 16 rows and 8 columns are 32 words of 16 bits: of row i, columns 0, 2, 4 and 6 in
    word 2 i and columns 1, 3, 5 and 7 in the next, lowest bits first.
    """
    rows, columns = codes.shape
    blocks = codes.view(rows // ROWS, ROWS, columns // GROUP, _NIBBLES, _PARITIES)
    words = blocks.permute(0, 2, 1, 4, 3)
    return words[..., 0::2] | words[..., 1::2] << 4


def packed8(codes: Tensor) -> Tensor:
    """Return signed codes (rows, columns), int8, in blocks of 16 rows, column by column."""
    rows, columns = codes.shape
    return codes.view(rows // ROWS, ROWS, columns).transpose(1, 2).contiguous()
