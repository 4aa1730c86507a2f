from __future__ import annotations

import pytest
import torch
from torch import nn

from lowbit_server.models.grouped import PACKED_ROWS, GroupedLinear, grouped_layer
from lowbit_server.quant.packing import PackedLinear


def layer_of(bits: int, out: int, columns: int, size: int) -> PackedLinear:
    torch.manual_seed(bits * size)
    groups = columns // size
    codes = torch.randint(0, 2**bits, (columns, out), dtype=torch.uint8)
    zeros = torch.randint(1, 2**bits, (groups, out), dtype=torch.int32)
    return PackedLinear.of(bits, codes, zeros, (torch.rand(groups, out) * 0.1 + 0.01).half())


@pytest.mark.parametrize("rows", [1, 2, PACKED_ROWS, PACKED_ROWS + 1, 200])
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("out", "bias"), [(96, False), (32, True), (128, True)])
def test_it_is_the_product_with_the_codes(
    rows: int, size: int, dtype: torch.dtype, out: int, *, bias: bool
) -> None:
    layer = layer_of(4, out, 256, size)
    added = torch.randn(out).to(dtype) if bias else None
    module = grouped_layer(layer, added, dtype)
    assert isinstance(module, GroupedLinear)
    inputs = torch.randn(1, rows, 256).to(dtype)
    at = layer.g_idx.long()
    scales, zeros = layer.scales.double()[at], layer.zeros().double()[at]
    codes = layer.codes().double()
    expected = inputs.double() @ ((codes - zeros) * scales)
    # The kernel rounds scale and zero point apart: errors scale with both of these.
    size_of_terms = inputs.double().abs() @ (((codes - 8).abs() + (8 - zeros).abs()) * scales)
    if added is not None:
        expected, size_of_terms = expected + added.double(), size_of_terms + added.double().abs()
    found = module(inputs)
    assert found.shape == (1, rows, out)
    assert found.dtype == dtype
    unit = torch.finfo(dtype).eps
    assert bool(((found.double() - expected).abs() <= 2 * unit * size_of_terms).all())


@pytest.mark.parametrize(("bits", "size"), [(2, 32), (3, 64), (8, 64), (4, 256)])
@pytest.mark.parametrize("bias", [False, True])
def test_without_a_kernel_it_is_dense(bits: int, size: int, *, bias: bool) -> None:
    layer = layer_of(bits, 64, 256, size)
    added = torch.randn(64, dtype=torch.bfloat16) if bias else None
    module = grouped_layer(layer, added, torch.bfloat16)
    assert isinstance(module, nn.Linear)
    assert torch.equal(module.weight, layer.dequantized(torch.bfloat16))
    assert (module.bias is None) == (added is None)


def test_groups_in_another_order_are_dense() -> None:
    layer = layer_of(4, 32, 64, 32)
    mixed = PackedLinear(4, layer.qweight, layer.qzeros, layer.scales, layer.g_idx.flip(0))
    assert isinstance(grouped_layer(mixed, None, torch.float32), nn.Linear)
