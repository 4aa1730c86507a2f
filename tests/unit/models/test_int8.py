from __future__ import annotations

import pytest
import torch

from lowbit_server.models.int8 import PACKED_ROWS, Int8Linear
from lowbit_server.models.weights import Int8Weight


@pytest.mark.parametrize("rows", [1, 2, PACKED_ROWS, PACKED_ROWS + 1, 200])
@pytest.mark.parametrize("offset", [0, 1, 13])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_the_product_with_the_unpacked_weight(rows: int, offset: int, *, bias: bool) -> None:
    torch.manual_seed(rows)
    memory = torch.randint(-127, 128, (96 * 64 + offset,), dtype=torch.int8)
    codes = memory[offset:].view(96, 64)  # as a mapped file may hold them
    largest, added = torch.rand(96), torch.randn(96, dtype=torch.bfloat16) if bias else None
    inputs = torch.randn(1, rows, 64, dtype=torch.bfloat16)
    layer = Int8Linear(Int8Weight(codes, largest), added, torch.bfloat16)
    expected = inputs.double() @ (codes.double() * largest.double()[:, None] / 127).T
    size = expected.abs()
    if added is not None:
        expected, size = expected + added.double(), size + added.double().abs()
    found = layer(inputs)
    assert found.shape == (1, rows, 96)
    assert found.dtype == torch.bfloat16
    # The scale and the result are rounded to bf16, 2^-9 each, and once more with a bias.
    bound = size * 3 * 2**-8 + size.mean() * 2**-8
    assert bool(((found.double() - expected).abs() <= bound).all())
