"""Linear layers on the compiled products of this CPU, for all kinds of weights in bfloat16."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowbit_server.kernels import products
from lowbit_server.kernels.products import Grid, Product
from lowbit_server.models.weights import Bnb4BitWeight, Int8Weight
from lowbit_server.quant.awq_packing import AwqLinear
from lowbit_server.quant.packing import PackedLinear

if TYPE_CHECKING:
    from lowbit_server.models.weights import GroupedWeight, Weight

WIDE_TOKENS = 33
"""Without tiles a dense product of torch, of the whole weight, is faster from so many tokens."""


class ProductLinear(nn.Module):
    """y = x W^T + bias in bfloat16; weights are held once, as the kernel reads them."""

    order: Tensor | None

    def __init__(self, product: Product, order: Tensor | None = None) -> None:
        """Take a product, and the columns of the inputs in its order."""
        super().__init__()
        self.product = product
        for name, tensor in product.tensors.items():
            self.register_buffer(name, tensor)
        self.register_buffer("order", order)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (..., out) of inputs (..., in), in their type."""
        rows = inputs.reshape(-1, inputs.shape[-1]).to(torch.bfloat16)
        if self.order is not None:
            rows = rows[:, self.order]
        is_narrow = products.have_tiles() or len(rows) < WIDE_TOKENS
        found = self.product.of(rows) if is_narrow else self._wide(rows)
        return found.to(inputs.dtype).view(*inputs.shape[:-1], -1)

    def _wide(self, rows: Tensor) -> Tensor:
        bias = self.product.tensors.get("bias")
        if "scales" not in self.product.tensors:
            return functional.linear(rows, self.product.tensors["weights"], bias)
        weight = self.product.unpacked()
        return rows @ weight if bias is None else torch.addmm(bias, rows, weight)


def product_linear(weight: Weight, bias: Tensor | None, dtype: torch.dtype) -> ProductLinear | None:
    """Return the layer of a weight in a model of a type, None where there is no kernel for it.

    4-bit weights of bitsandbytes are multiplied in bfloat16 whatever the model's type is.
    """
    computed = torch.bfloat16 if isinstance(weight, Bnb4BitWeight) else dtype
    if computed is not torch.bfloat16 or not products.are_there():
        return None
    if bias is not None:
        bias = bias.to(torch.bfloat16)
    match weight:
        case Tensor():
            return _dense(weight, bias)
        case Int8Weight():
            return _int8(weight, bias)
        case Bnb4BitWeight():
            return _bnb4bit(weight, bias)
        case PackedLinear() | AwqLinear():
            return _grouped(weight, bias)


def _dense(weight: Tensor, bias: Tensor | None) -> ProductLinear | None:
    rows, columns = weight.shape
    if not _fits(weight, rows) or columns % products.COLUMNS:
        return None
    return ProductLinear(Product(16, (rows, columns), weight, None, bias))


def _int8(weight: Int8Weight, bias: Tensor | None) -> ProductLinear | None:
    rows, columns = weight.codes.shape
    if not _fits(weight.codes, rows) or columns % products.GROUP:
        return None
    codes, grid = products.packed8(weight.codes), Grid(weight.scales()[None])
    return ProductLinear(Product(8, (rows, columns), codes, grid, bias))


def _bnb4bit(weight: Bnb4BitWeight, bias: Tensor | None) -> ProductLinear | None:
    rows, columns = weight.codes.shape
    if not _fits(weight.codes, rows):
        return None
    codes = products.packed4(weight.codes)
    grid = Grid(weight.largest, meant=weight.points.to(torch.bfloat16))
    return ProductLinear(Product(4, (rows, columns), codes, grid, bias))


def _grouped(weight: GroupedWeight, bias: Tensor | None) -> ProductLinear | None:
    size, rows = weight.group_size, weight.scales.shape[1]
    if not _fits(weight.qweight, rows) or size is None or size % products.GROUP:
        return None
    order, codes = weight.order(), weight.codes()
    codes = (codes if order is None else codes[order]).T
    bits = 4 if weight.bits <= 4 else 8  # noqa: PLR2004  (what the kernels have)
    middle = 1 << (bits - 1)
    points = (middle - weight.zeros()).to(torch.int16)
    meant = None
    if bits == 4:  # noqa: PLR2004
        packed = products.packed4(codes)
        meant = torch.arange(-middle, middle, dtype=torch.bfloat16)
    else:
        packed = products.packed8((codes ^ middle).view(torch.int8))
    grid = Grid(weight.scales.float(), points if points.any() else None, meant)
    return ProductLinear(Product(bits, (rows, codes.shape[1]), packed, grid, bias), order)


def _fits(weight: Tensor, rows: int) -> bool:
    return weight.device.type == "cpu" and rows % products.ROWS == 0
