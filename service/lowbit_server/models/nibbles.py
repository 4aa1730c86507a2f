"""Torch's int4 kernel for CPUs: 4-bit weights in an order that is the kernel's own.

Packing is opaque and depends on the CPU: blocks of rows, each column of a block in as many
bytes as half of its rows. Which order it is here is found out by trying, so that the packed
form can be read back and need not be kept beside the codes it was made of.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

GROUPS = (128, 64, 32)
"""Group sizes that the kernel takes, largest first."""
ROWS = 16
"""The kernel takes rows in multiples of this."""
ZERO = 8
"""The kernel's codes count from the middle of the grid."""
# A parameter of the CUDA kernel; the one for CPUs ignores it.
_INNER_TILES = 2
# Rows of a block with AVX-512 and with AVX2.
_BLOCKS = (64, 32)
# Whole blocks of both and a rest.
_PROBE = (112, 32)


def pack(codes: Tensor) -> Tensor:
    """Return the kernel's form, uint8 (out, in / 2), of codes (out, in) from 0 to 15."""
    codes = codes.to(torch.int32).contiguous()
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, _INNER_TILES)  # noqa: SLF001
    return packed


def product(inputs: Tensor, packed: Tensor, pairs: Tensor, group_size: int) -> Tensor:
    """Return inputs (rows, in) times the weight (code - 8) * scale + zero, (rows, out).

    `pairs` (groups, out, 2) are scale and zero in the inputs' type.
    """
    found: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(inputs, packed, group_size, pairs)  # noqa: SLF001
    return found


def unpack(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the codes (in, out), transposed, as numbers of a type; needs `can_unpack`."""
    block = _block()
    assert block is not None  # noqa: S101  (the caller asked)
    return _read(packed, block, dtype)


def can_unpack() -> bool:
    """Return whether the kernel's order on this CPU is one that `unpack` knows."""
    return _block() is not None


@cache
def _block() -> int | None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, _PROBE, dtype=torch.int32, generator=generator)
    packed = pack(codes)
    found = (size for size in _BLOCKS if torch.equal(_read(packed, size, codes.dtype).T, codes))
    return next(found, None)


def _read(packed: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    out, columns = packed.shape[0], packed.shape[1] * 2
    whole = out - out % block
    octets = packed.view(-1)
    codes = torch.empty(columns, out, dtype=dtype, device=packed.device)
    # A byte of a whole block holds a row of its first half and one of its second.
    halves = codes[:, :whole].view(columns, -1, 2, block // 2)
    source = octets[: whole * columns // 2].view(-1, columns, block // 2).transpose(0, 1)
    halves[:, :, 0] = source & 15
    halves[:, :, 1] = source >> 4
    # Elsewhere it holds two neighbours.
    neighbours = codes[:, whole:].view(columns, -1, 2)
    rest = octets[whole * columns // 2 :].view(columns, -1)
    neighbours[:, :, 0] = rest & 15
    neighbours[:, :, 1] = rest >> 4
    return codes
