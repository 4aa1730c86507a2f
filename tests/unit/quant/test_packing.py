from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit_server.quant.packing import PackedLinear, pack, unpack

BITS = (2, 3, 4, 8)


def random_codes(bits: int, rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)


def bit_stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Lay the bits of each column's codes in a row, lowest first, and cut it into words."""
    planes = (codes[:, None, :].astype(np.int64) >> np.arange(bits)[:, None]) & 1
    stream = planes.reshape(-1, codes.shape[1]).astype(np.uint8)
    octets = np.packbits(stream, axis=0, bitorder="little")
    return np.ascontiguousarray(octets.T).view("<i4").T


@given(
    bits=st.sampled_from(BITS),
    rows=st.integers(1, 5),
    columns=st.integers(1, 40),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=150)
def test_words_are_a_stream_of_bits_and_come_back(
    bits: int, rows: int, columns: int, seed: int
) -> None:
    codes = random_codes(bits, rows * 32, columns, seed)
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (rows * bits, columns)
    assert np.array_equal(words.numpy(), bit_stream(codes.numpy(), bits))
    assert torch.equal(unpack(words, bits), codes)


def test_three_bits_lie_across_words_as_in_autogptq() -> None:
    codes = torch.zeros(32, 1, dtype=torch.uint8)
    codes[10], codes[21] = 0b101, 0b011  # the two that are split: 2 + 1 and 1 + 2 bits
    words = [value & 0xFFFFFFFF for value in pack(codes, 3)[:, 0].tolist()]
    assert words == [0b01 << 30, 1 | 1 << 31, 0b01]


@given(
    bits=st.sampled_from(BITS),
    groups=st.integers(1, 4),
    out=st.sampled_from([32, 64, 96]),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=60)
def test_a_layer_stands_for_its_float64_weight(bits: int, groups: int, out: int, seed: int) -> None:
    codes = random_codes(bits, groups * 32, out, seed)
    generator = torch.Generator().manual_seed(seed)
    # 2 ** bits is what others write as the highest zero point.
    zeros = torch.randint(1, 2**bits + 1, (groups, out), generator=generator, dtype=torch.int32)
    scales = (torch.rand(groups, out, generator=generator) + 0.01).half()
    layer = PackedLinear.of(bits, codes, zeros, scales)
    layer.check("layer", out, groups * 32)
    assert layer.group_size == 32
    assert layer.order() is None
    assert torch.equal(layer.zeros(), zeros)
    assert np.array_equal(layer.qzeros.numpy().T, bit_stream((zeros - 1).T.numpy(), bits))
    at = np.arange(groups * 32) // 32
    exact = (codes.numpy().astype(float) - zeros.numpy()[at]) * scales.double().numpy()[at]
    assert np.array_equal(layer.dequantized(torch.float64).numpy(), exact.T)


def test_groups_may_be_in_any_order() -> None:
    codes = random_codes(4, 64, 32, 0)
    zeros, scales = torch.full((2, 32), 8, dtype=torch.int32), torch.ones(2, 32).half()
    scales[1] = 3
    plain = PackedLinear.of(4, codes, zeros, scales)
    mixed = PackedLinear(4, plain.qweight, plain.qzeros, scales, plain.g_idx.flip(0))
    assert mixed.group_size == 32
    assert mixed.order().tolist() == [*range(32, 64), *range(32)]  # type: ignore[union-attr]
    uneven = PackedLinear(4, plain.qweight, plain.qzeros, scales, torch.arange(64) // 40)
    assert uneven.group_size is None
    expected = (codes.double() - 8) * (3 - 2 * plain.g_idx)[:, None]
    assert torch.equal(mixed.dequantized(torch.float64), expected.T)


@pytest.mark.parametrize("key", ["qweight", "qzeros", "scales", "g_idx"])
def test_shapes_that_do_not_fit_are_named(key: str) -> None:
    zeros = torch.ones(2, 32, dtype=torch.int32)
    layer = PackedLinear.of(4, random_codes(4, 64, 32, 0), zeros, zeros.half())
    parts = {name: getattr(layer, name) for name in ("qweight", "qzeros", "scales", "g_idx")}
    parts[key] = parts[key][:-1]
    with pytest.raises(ValueError, match="was expected"):
        PackedLinear(4, **parts).check("layer", 32, 64)
    parts = {name: getattr(layer, name) for name in parts} | {"g_idx": layer.g_idx + 1}
    with pytest.raises(ValueError, match="g_idx"):
        PackedLinear(4, **parts).check("layer", 32, 64)
