from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.quant.layout import Block, Linear
from lowbit_server.quant.packing import PackedLinear
from lowbit_server.quant.rtn import RtnMethod
from lowbit_server.quant.schemes import RtnScheme
from lowbit_server.quant.shapes import check_shape

KINDS = ("normal", "positive", "negative", "offset", "zero", "minus-zero", "tiny", "huge", "one")


def weight_of(kind: str, out: int, columns: int, seed: int) -> torch.Tensor:
    normal = torch.randn(out, columns, generator=torch.Generator().manual_seed(seed))
    one = torch.zeros(out, columns)
    one[3, 7] = 0.25
    return {
        "normal": normal,
        "positive": normal.abs() + 0.1,
        "negative": -normal.abs(),
        "offset": normal + 0.7,
        "zero": torch.zeros(out, columns),
        "minus-zero": torch.full((out, columns), -0.0),
        "tiny": normal * 1e-6,
        "huge": normal * 1e4,
        "one": one,
    }[kind]


def quantized(scheme: RtnScheme, weight: torch.Tensor) -> PackedLinear:
    linear = Linear("layer", *weight.shape)
    block = Block("", ("layer.weight", "norm.weight"), (linear,))
    method = RtnMethod(scheme, "cpu")
    given = {"layer.weight": weight, "norm.weight": torch.ones(3)}
    found = dict(method.convert(block, given.__getitem__))
    assert torch.equal(found.pop("norm.weight"), torch.ones(3))
    keys = {name.removeprefix("layer."): tensor for name, tensor in found.items()}
    return PackedLinear(scheme.bits, **keys)


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    size=st.sampled_from([32, 64, 128, -1]),
    sym=st.booleans(),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=200)
def test_errors_are_at_most_half_a_step(  # noqa: PLR0913 - all that a grid depends on
    bits: int, size: int, kind: str, dtype: torch.dtype, seed: int, *, sym: bool
) -> None:
    weight = weight_of(kind, 32, 128, seed).to(dtype)
    scheme = RtnScheme(bits=bits, group_size=size, sym=sym)
    layer = quantized(scheme, weight)
    layer.check("layer", 32, 128)
    assert layer.group_size == (128 if size == -1 else size)
    zeros = layer.zeros()
    assert int(zeros.min()) >= 1
    assert int(zeros.max()) <= 2**bits - 1
    if sym:
        assert bool((zeros == 2 ** (bits - 1)).all())
    at = torch.arange(128) // layer.group_size
    steps = layer.scales.double()[at].T
    points = (layer.codes().double() - zeros.double()[at]).T * steps
    error = (points - weight.double()).abs()
    # The slack is float32's, in which codes are found.
    assert bool((error <= steps * (0.5 + 2**bits * 2**-23)).all())
    # No point of the grid is nearer.
    for step in (-1, 1):
        there = (layer.codes().double() + step).T
        inside = (there >= 0) & (there <= 2**bits - 1)
        other = (points + step * steps - weight.double()).abs()
        assert bool((error <= other + steps * 2**bits * 2**-23)[inside].all())
    assert bool((points[weight == 0] == 0).all())


def test_the_grid_is_no_wider_than_needed() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 256)
    layer = quantized(RtnScheme(), weight)
    parts = weight.view(64, 4, 64)
    wanted = ((parts.amax(2) - parts.amin(2)) / 15).T.double()
    ratio = layer.scales.double() / wanted
    assert float(ratio.min()) >= 1
    assert float(ratio.max()) <= 1 + 2**-10


@pytest.mark.parametrize(
    ("size", "out", "columns"), [(64, 32, 96), (128, 32, 64), (32, 48, 64), (-1, 32, 48)]
)
def test_shapes_are_refused_with_the_layer(size: int, out: int, columns: int) -> None:
    scheme = RtnScheme.model_validate({"group_size": size})
    with pytest.raises(LowbitError, match=f"layers.0.up has {out} x {columns}") as caught:
        check_shape(scheme, "layers.0.up", out, columns)
    assert caught.value.reason is Reason.INVALID_FIELD
    assert caught.value.violations[0].field == "scheme"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e7])
@pytest.mark.parametrize("sym", [False, True])
def test_values_without_a_step_are_refused_by_name(value: float, *, sym: bool) -> None:
    weight = torch.zeros(32, 64)
    weight[1, 2] = value
    with pytest.raises(LowbitError, match=r"layer\.weight") as caught:
        quantized(RtnScheme(sym=sym), weight)
    assert caught.value.reason is Reason.INVALID_FIELD
