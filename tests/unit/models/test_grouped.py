from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from lowbit_server.models import nibbles
from lowbit_server.models.grouped import PACKED_ROWS, GroupedLinear, grouped_layer
from lowbit_server.models.measure import live_bytes
from lowbit_server.quant.awq_packing import AwqLinear
from lowbit_server.quant.packing import PackedLinear

if TYPE_CHECKING:
    from lowbit_server.models.grouped import GroupedWeight


def parts(bits: int, out: int, columns: int, size: int) -> tuple[torch.Tensor, ...]:
    """Return codes, zero points of the whole range and scales, one of them 0."""
    torch.manual_seed(bits * size)
    groups = columns // size
    codes = torch.randint(0, 2**bits, (columns, out), dtype=torch.uint8)
    zeros = torch.randint(1, 2**bits, (groups, out), dtype=torch.int32)
    scales = (torch.rand(groups, out) * 0.1 + 0.01).half()
    scales[-1, -1] = 0
    return codes, zeros, scales


def layer_of(bits: int, out: int, columns: int, size: int) -> PackedLinear:
    codes, zeros, scales = parts(bits, out, columns, size)
    zeros[0, 0] = 2**bits  # as others write it
    return PackedLinear.of(bits, codes, zeros, scales)


def awq_layer_of(out: int, columns: int, size: int) -> AwqLinear:
    codes, zeros, scales = parts(4, out, columns, size)
    zeros[0, 0] = 0
    return AwqLinear.of(codes, zeros, scales)


def shuffled(layer: PackedLinear) -> PackedLinear:
    generator = torch.Generator().manual_seed(1)
    g_idx = layer.g_idx[torch.randperm(len(layer.g_idx), generator=generator)]
    return PackedLinear(layer.bits, layer.qweight, layer.qzeros, layer.scales, g_idx)


def uneven(layer: PackedLinear) -> PackedLinear:
    g_idx = torch.arange(len(layer.g_idx)) // 40
    return PackedLinear(layer.bits, layer.qweight, layer.qzeros, layer.scales, g_idx)


def check(layer: GroupedWeight, rows: int, dtype: torch.dtype, *, bias: bool) -> None:
    """Compare a layer's module with the product in float64."""
    weight = layer.dequantized(torch.float64)
    out, columns = weight.shape
    added = torch.randn(out).to(dtype) if bias else None
    module = grouped_layer(layer, added, dtype)
    assert isinstance(module, GroupedLinear)
    inputs = torch.randn(1, rows, columns).to(dtype)
    expected = inputs.double() @ weight.T
    # The kernel rounds scale and zero apart: errors grow with the distances from its middle.
    largest = layer.scales.double().amax(dim=0) * 2**layer.bits
    terms = inputs.double().abs() @ (weight.abs() + largest[:, None]).T
    if added is not None:
        expected, terms = expected + added.double(), terms + added.double().abs()
    found = module(inputs)
    assert found.shape == (1, rows, out)
    assert found.dtype == dtype
    assert bool(((found.double() - expected).abs() <= torch.finfo(dtype).eps * terms).all())


@pytest.mark.parametrize("rows", [1, 2, PACKED_ROWS // 2 + 1, PACKED_ROWS, PACKED_ROWS + 1])
@pytest.mark.parametrize("size", [32, 64, 128, 192, 384])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_is_the_product_with_the_codes(
    rows: int, size: int, bits: int, dtype: torch.dtype
) -> None:
    check(layer_of(bits, 96, 384, size), rows, dtype, bias=False)


@pytest.mark.parametrize("rows", [1, PACKED_ROWS + 1])
@pytest.mark.parametrize("out", [16, 32, 80, 128, 144])
def test_it_is_so_for_awq(rows: int, out: int) -> None:
    check(awq_layer_of(out, 256, 64), rows, torch.bfloat16, bias=True)


@pytest.mark.parametrize("rows", [1, PACKED_ROWS + 1])
@pytest.mark.parametrize("bits", [4, 8])
def test_it_is_so_for_groups_in_another_order(rows: int, bits: int) -> None:
    check(shuffled(layer_of(bits, 64, 256, 32)), rows, torch.bfloat16, bias=True)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_dequantized_weights_are_exact(bits: int) -> None:
    layer = layer_of(bits, 96, 256, 64)
    module = grouped_layer(layer, None, torch.bfloat16)
    assert isinstance(module, GroupedLinear)
    exact = (layer.codes().double().view(4, 64, 96) - layer.zeros()[:, None]).flatten(0, 1)
    scales = layer.scales.bfloat16().double()[layer.g_idx.long()]
    assert torch.equal(module._dequantized(), (exact * scales).bfloat16())


@pytest.mark.parametrize(("bits", "planes"), [(3, 1), (4, 1), (8, 2)])
def test_it_holds_its_codes_once(bits: int, planes: int) -> None:
    module = grouped_layer(layer_of(bits, 64, 256, 64), None, torch.bfloat16)
    assert live_bytes(module) == planes * (64 * 256 // 2 + 64 * 256 // 64 * 4)


def test_an_unknown_order_is_left_to_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nibbles, "can_unpack", lambda: False)
    monkeypatch.setattr(nibbles, "unpack", None)
    check(layer_of(8, 96, 256, 64), PACKED_ROWS + 1, torch.bfloat16, bias=False)


@pytest.mark.parametrize(("capability", "known"), [("avx2", True), ("default", False)])
def test_the_order_of_other_processors_is_found_out(capability: str, *, known: bool) -> None:
    script = f"""
import torch
from lowbit_server.models import nibbles
assert torch.backends.cpu.get_cpu_capability() != "AVX512"
codes = torch.randint(0, 16, (112, 64))
assert nibbles.can_unpack() is {known}
if {known}:
    assert torch.equal(nibbles.unpack(nibbles.pack(codes), torch.int64).T, codes)
"""
    environment = {"ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


@pytest.mark.parametrize(
    "layer",
    [
        layer_of(4, 32, 96, 48),
        awq_layer_of(24, 64, 32),
        uneven(layer_of(4, 32, 64, 32)),
    ],
    ids=["groups of 48", "24 rows", "uneven groups"],
)
@pytest.mark.parametrize("bias", [False, True])
def test_without_a_kernel_it_is_dense(layer: GroupedWeight, *, bias: bool) -> None:
    added = torch.randn(layer.scales.shape[1], dtype=torch.bfloat16) if bias else None
    module = grouped_layer(layer, added, torch.bfloat16)
    assert isinstance(module, nn.Linear)
    assert torch.equal(module.weight, layer.dequantized(torch.bfloat16))
    assert (module.bias is None) == (added is None)
