"""Grouped low-bit weights, as in the layouts of GPTQ and AWQ, without gptqmodel.

transformers leaves such layers to gptqmodel, an optional and heavy package. On a CPU
torch's own int4 kernel does them directly (docs/adr/0008).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lowbit_server.models import nibbles

if TYPE_CHECKING:
    from lowbit_server.models.weights import GroupedWeight

PACKED_ROWS = 96
"""Up to this many rows the int4 kernel beats a dense product of the dequantized weight."""
_PLANE_BITS = 4
_DIGITS = 1 << _PLANE_BITS


class GroupedLinear(nn.Module):
    """y = x W^T + bias with W kept in planes of 4 bits, on torch's int4 kernel for CPUs.

    Codes of up to 4 bits are one plane; those of 8 bits are two, of 16 * high + low, whose
    products are added.
    """

    packed: Tensor
    pairs: Tensor
    order: Tensor | None
    bias: Tensor | None

    def __init__(self, layer: GroupedWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        """Take a layer that `has_kernel`."""
        super().__init__()
        size = layer.group_size
        assert size is not None  # noqa: S101  (the caller asked)
        self.group_size = next(one for one in nibbles.GROUPS if size % one == 0)
        codes, zeros = layer.codes(), layer.zeros()
        order = layer.order()
        if order is not None:
            codes = codes[order]
        # Rounded before points are multiplied by them, so that these can be told from the
        # product again, and so that a code at its zero point stands for exactly 0.
        scales = layer.scales.to(dtype).float()
        packed, pairs = [], []
        for shift in range(0, layer.bits, _PLANE_BITS):
            last = shift + _PLANE_BITS >= layer.bits
            digits, points = codes >> shift, zeros >> shift
            if not last:  # a zero point may be 2 ** bits: the highest digit takes it
                digits, points = digits % _DIGITS, points % _DIGITS
            unit = scales * 2**shift
            pair = torch.stack([unit, (nibbles.ZERO - points) * unit], dim=-1).to(dtype)
            packed.append(nibbles.pack(digits.T))
            pairs.append(pair.repeat_interleave(size // self.group_size, dim=0))
        self.register_buffer("packed", torch.stack(packed))
        self.register_buffer("pairs", torch.stack(pairs))
        self.register_buffer("order", order)
        self.register_buffer("bias", bias)
        # Views, since indexing at every step would take longer than a small product.
        self._planes = list(zip(self.packed, self.pairs, strict=True))
        self._packed_rows = PACKED_ROWS // len(packed) if nibbles.can_unpack() else None

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (..., out) of inputs (..., in), both in the model's dtype."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        if self.order is not None:
            rows = rows[:, self.order]
        if self._packed_rows is None or len(rows) <= self._packed_rows:
            products = [nibbles.product(rows, *plane, self.group_size) for plane in self._planes]
            product = products[0] if len(products) == 1 else products[0].add_(products[1])
        else:
            product = rows @ self._dequantized()
        if self.bias is not None:
            product += self.bias
        return product.reshape(*inputs.shape[:-1], -1)

    def _dequantized(self) -> Tensor:
        """Return the transposed weight (in, out); each element is rounded once."""
        # Codes and their distances from zero points, up to 256, are exact in every type.
        steps = self._steps(0)
        for plane in range(1, len(self.packed)):
            steps += self._steps(plane).mul_(_DIGITS**plane)
        scales = self.pairs[0, :, :, 0].unsqueeze(1)
        return steps.mul_(scales).flatten(0, 1)

    def _steps(self, plane: int) -> Tensor:
        """Return a plane's codes less its zero points, (groups, columns of a group, out)."""
        scales, zeros = self.pairs[plane].float().unbind(-1)
        # A scale of 0, which other quantizers write, makes any point right.
        points = nibbles.ZERO - (zeros / scales).nan_to_num(0).round()
        codes = nibbles.unpack(self.packed[plane], self.pairs.dtype)
        grouped = codes.view(-1, self.group_size, codes.shape[1])
        return grouped.sub_(points.to(codes.dtype).unsqueeze(1))


def has_kernel(layer: GroupedWeight) -> bool:
    """Return whether the int4 kernel takes a layer."""
    return (
        layer.qweight.device.type == "cpu"
        and layer.scales.shape[1] % nibbles.ROWS == 0
        and layer.group_size is not None
        and layer.group_size % min(nibbles.GROUPS) == 0
    )


def grouped_layer(layer: GroupedWeight, bias: Tensor | None, dtype: torch.dtype) -> nn.Module:
    """Return a module for a layer on its device.

    Without a kernel (CUDA, groups of odd sizes) the weight is dequantized once, here: as
    fast as the source model, and as large.
    """
    if has_kernel(layer):
        return GroupedLinear(layer, bias, dtype)
    weight = layer.dequantized(dtype)
    with torch.device("meta"):
        dense = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    dense.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        dense.bias = nn.Parameter(bias, requires_grad=False)
    return dense
