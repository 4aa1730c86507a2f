"""The weights of a checkpoint's linear layers, as they are stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import torch
from torch import Tensor

from lowbit_server.quant.awq_packing import AwqLinear
from lowbit_server.quant.packing import PackedLinear

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

LARGEST_CODE = 127
"""The 8-bit code of each row's largest magnitude (Dettmers et al. 2022, section 3)."""

GroupedWeight: TypeAlias = PackedLinear | AwqLinear
Weight: TypeAlias = "Tensor | Int8Weight | Bnb4BitWeight | GroupedWeight"


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """Rows of 8-bit codes, as bitsandbytes stores them."""

    codes: Tensor
    """int8 (out, in)."""
    largest: Tensor
    """Each row's largest magnitude, float32 (out)."""

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Return weights of the same input as one."""
        codes = torch.cat([one.codes for one in parts])
        return cls(codes, torch.cat([one.largest for one in parts]))

    def scales(self) -> Tensor:
        """Return what a code of 1 stands for in each row, float32 (out)."""
        return self.largest.float() / LARGEST_CODE


@dataclass(frozen=True, slots=True)
class Bnb4BitWeight:
    """nf4 or fp4 codes in blocks of columns."""

    codes: Tensor
    """uint8 (out, in), one a byte."""
    largest: Tensor
    """The largest magnitude of each block of a row, float32 (blocks, out)."""
    points: Tensor
    """What each code stands for, float32 (16)."""

    @classmethod
    def of(cls, codes: Tensor, state: Mapping[str, Any], rows: int, columns: int) -> Self:
        """Take the tensors of a checkpoint; `state` is what is stored beside the codes.

        Raises ValueError when they are not those of a weight (rows, columns).
        """
        from bitsandbytes.functional import (  # noqa: PLC0415  (slow, and rarely needed)
            QuantState,
            dequantize_blockwise,
        )

        stored = QuantState.from_dict(dict(state), torch.device("cpu"))
        if tuple(stored.shape or ()) != (rows, columns) or codes.numel() * 2 != rows * columns:
            raise ValueError(f"4-bit codes of {stored.shape}, {(rows, columns)} was expected")
        if columns % stored.blocksize:
            raise ValueError(
                f"a 4-bit weight has {rows} x {columns}: its columns must be a multiple of "
                f"{stored.blocksize}"
            )
        largest = stored.absmax
        if stored.nested:
            largest = dequantize_blockwise(largest, stored.state2) + stored.offset
        octets = codes.view(torch.uint8).view(rows, columns // 2, 1)
        return cls(
            torch.cat([octets >> 4, octets & 15], dim=-1).view(rows, columns),
            largest.float().view(rows, -1).T.contiguous(),
            stored.code.float(),
        )

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self | None:
        """Return weights of the same input as one, or None when their blocks differ."""
        if any(len(one.largest) != len(parts[0].largest) for one in parts):
            return None
        codes = torch.cat([one.codes for one in parts])
        return cls(codes, torch.cat([one.largest for one in parts], dim=1), parts[0].points)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Return the weight (out, in), computed in float32 and rounded once."""
        values = self.points[self.codes.int()].view(len(self.codes), len(self.largest), -1)
        return (values * self.largest.T[:, :, None]).view(self.codes.shape).to(dtype)
