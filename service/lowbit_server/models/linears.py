"""The linear layers of a checkpoint, each on the kernels of its scheme.

Layers that share their input become one where their scheme allows it: one product of many
rows takes less time than several of few.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowbit_server.models.grouped import grouped_layer
from lowbit_server.models.int8 import Int8Linear
from lowbit_server.models.products import product_linear
from lowbit_server.models.weights import Bnb4BitWeight, Int8Weight
from lowbit_server.quant.awq_packing import AwqLinear
from lowbit_server.quant.packing import PackedLinear

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lowbit_server.models.weights import Weight


class DenseLinear(nn.Module):
    """y = x W^T + bias with W (out, in) in the model's dtype."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Take a weight and its bias."""
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (rows, out) of inputs (rows, in)."""
        return functional.linear(inputs, self.weight, self.bias)


class SideBySide(nn.Module):
    """Layers that share their input but not their kernel."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        """Take the layers in the order of their outputs."""
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (rows, all out) of inputs (rows, in)."""
        return torch.cat([part(inputs) for part in self.parts], dim=-1)


def linear(
    weights: Sequence[Weight], biases: Sequence[Tensor] | None, dtype: torch.dtype
) -> nn.Module:
    """Return one module for layers that share their input, outputs side by side."""
    whole = weights[0] if len(weights) == 1 else _joined(weights)
    if whole is None:
        parts = [biases[place : place + 1] if biases else None for place in range(len(weights))]
        each = zip(weights, parts, strict=True)
        return SideBySide([linear([weight], part, dtype) for weight, part in each])
    bias = torch.cat(list(biases)) if biases else None
    product = product_linear(whole, bias, dtype)
    if product is not None:
        return product
    match whole:
        case Tensor():
            return DenseLinear(whole, bias)
        case Int8Weight():
            return Int8Linear(whole, bias, dtype)
        case PackedLinear() | AwqLinear():
            return grouped_layer(whole, bias, dtype)
        case Bnb4BitWeight():
            return DenseLinear(whole.dequantized(dtype), bias)


def _joined(weights: Sequence[Any]) -> Weight | None:
    """Return weights of the same input as one, or None where they differ in kind."""
    kind = type(weights[0])
    if any(type(one) is not kind for one in weights):
        return None
    if kind is Tensor:
        return torch.cat(list(weights))
    joined: Weight | None = kind.joined(weights)
    return joined
