from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit_server.quant.awq_packing import AwqLinear, pack, unpack


def random_codes(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8)


def code_at(words: np.ndarray, row: int, column: int) -> int:
    """Read one code as the kernels do: even neighbours in the low half, odd ones in the high."""
    word, place = divmod(column, 8)
    nibble = place // 2 + (4 if place % 2 else 0)
    return (int(words[row, word]) & 0xFFFFFFFF) >> (4 * nibble) & 0xF


def reference(words: np.ndarray) -> np.ndarray:
    rows, columns = words.shape[0], words.shape[1] * 8
    codes = [[code_at(words, row, column) for column in range(columns)] for row in range(rows)]
    return np.array(codes, dtype=np.uint8)


@given(rows=st.integers(1, 6), words=st.integers(1, 5), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=150)
def test_words_are_read_as_the_kernels_do_and_come_back(rows: int, words: int, seed: int) -> None:
    codes = random_codes(rows, words * 8, seed)
    packed = pack(codes)
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, words)
    assert np.array_equal(reference(packed.numpy()), codes.numpy())
    assert torch.equal(unpack(packed), codes)


def test_a_word_in_hexadecimal() -> None:
    word = pack(torch.arange(8, dtype=torch.uint8)[None] + 8).item() & 0xFFFFFFFF
    assert f"{word:08X}" == "FDB9ECA8"


@given(
    groups=st.integers(1, 4),
    size=st.sampled_from([16, 32, 64]),
    out=st.sampled_from([8, 40, 64]),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=60)
def test_a_layer_stands_for_its_float64_weight(groups: int, size: int, out: int, seed: int) -> None:
    codes = random_codes(groups * size, out, seed)
    generator = torch.Generator().manual_seed(seed)
    zeros = torch.randint(0, 16, (groups, out), generator=generator, dtype=torch.int32)
    scales = (torch.rand(groups, out, generator=generator) + 0.01).half()
    layer = AwqLinear.of(codes, zeros, scales)
    layer.check("layer", out, groups * size)
    assert layer.group_size == size
    assert torch.equal(layer.codes(), codes)
    assert torch.equal(layer.zeros(), zeros)
    at = np.arange(groups * size) // size
    words, points = reference(layer.qweight.numpy()), reference(layer.qzeros.numpy())
    exact = (words.astype(float) - points.astype(float)[at]) * scales.double().numpy()[at]
    assert np.array_equal(layer.dequantized(torch.float64).numpy(), exact.T)
    shapes = {key: tuple(tensor.shape) for key, tensor in layer.tensors("x").items()}
    assert shapes == {
        "x.qweight": (groups * size, out // 8),
        "x.qzeros": (groups, out // 8),
        "x.scales": (groups, out),
    }


@pytest.mark.parametrize("key", ["qweight", "qzeros", "scales"])
def test_shapes_that_do_not_fit_are_named(key: str) -> None:
    zeros = torch.ones(4, 32, dtype=torch.int32)
    parts = AwqLinear.of(random_codes(64, 32, 0), zeros, zeros.half())
    tensors = {name: getattr(parts, name) for name in AwqLinear.keys}
    tensors[key] = tensors[key][:-2]
    with pytest.raises(ValueError, match="was expected"):
        AwqLinear(**tensors).check("layer", 32, 64)


@pytest.mark.parametrize(("out", "columns"), [(36, 64), (32, 66)])
def test_layers_that_the_layout_cannot_hold_are_named(out: int, columns: int) -> None:
    zeros = torch.ones(4, 32, dtype=torch.int32)
    layer = AwqLinear.of(random_codes(64, 32, 0), zeros, zeros.half())
    with pytest.raises(ValueError, match=f"layer has {out} x {columns} in 4 groups"):
        layer.check("layer", out, columns)
