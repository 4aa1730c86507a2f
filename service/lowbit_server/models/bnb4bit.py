"""nf4 and fp4 checkpoints on CPUs with products of bfloat16: bitsandbytes' own kernel.

Its layer checks types and states at every call, and one product a layer cannot be shared;
here the kernel gets its weights once, in the order that it wants.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ROW_TILE = 32
"""The kernel takes rows in multiples of this."""


@dataclass(frozen=True, slots=True)
class Bnb4BitWeight:
    """A weight in the kernel's order."""

    codes: Tensor
    """uint8 (out, in / 2), tiles of `ROW_TILE` rows."""
    largest: Tensor
    """The largest magnitude of each block of a row, bfloat16 (blocks, out)."""
    points: Tensor
    """What each code stands for, float32 (16)."""
    block_size: int

    @classmethod
    def of(cls, codes: Tensor, state: Mapping[str, Any], rows: int, columns: int) -> Self:
        """Take the tensors of a checkpoint; `state` is what is stored beside the codes.

        Raises ValueError when they are not those of a weight (rows, columns).
        """
        from bitsandbytes.functional import (  # noqa: PLC0415  (slow, and rarely needed)
            QuantState,
            _convert_weight_packed_for_cpu,
        )

        stored = QuantState.from_dict(dict(state), torch.device("cpu"))
        if tuple(stored.shape or ()) != (rows, columns) or codes.numel() * 2 != rows * columns:
            raise ValueError(f"4-bit codes of {stored.shape}, {(rows, columns)} was expected")
        if rows % ROW_TILE or columns % stored.blocksize:
            raise ValueError(
                f"a 4-bit weight has {rows} x {columns}: its rows must be a multiple of "
                f"{ROW_TILE}, its columns one of {stored.blocksize}"
            )
        packed, stored = _convert_weight_packed_for_cpu(codes, stored, ROW_TILE)
        return cls(packed, stored.absmax, stored.code, stored.blocksize)

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self | None:
        """Return weights of the same input as one, or None when their blocks differ."""
        first = parts[0]
        if any(one.block_size != first.block_size for one in parts):
            return None
        codes = torch.cat([one.codes for one in parts])
        largest = torch.cat([one.largest for one in parts], dim=1)
        return cls(codes, largest, first.points, first.block_size)


class Bnb4BitLinear(nn.Module):
    """y = x W^T + bias, computed in bfloat16."""

    codes: Tensor
    largest: Tensor
    points: Tensor
    bias: Tensor | None

    def __init__(self, weight: Bnb4BitWeight, bias: Tensor | None) -> None:
        """Take a weight and its bias."""
        super().__init__()
        self.register_buffer("codes", weight.codes)
        self.register_buffer("largest", weight.largest)
        self.register_buffer("points", weight.points)
        self.register_buffer("bias", bias)
        self._shape = [len(weight.codes), weight.codes.shape[1] * 2]
        self._block_size = weight.block_size

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (rows, out) of inputs (rows, in), in their dtype."""
        product: Tensor = torch.ops.bitsandbytes.gemv_4bit(
            inputs, self.codes, self._shape, self.largest, self.points, self._block_size
        )
        if self.bias is not None:
            product += self.bias
        return product


def has_kernel() -> bool:
    """Return whether this CPU has what the kernel needs."""
    from bitsandbytes.functional import has_avx512bf16  # noqa: PLC0415

    return bool(has_avx512bf16())
