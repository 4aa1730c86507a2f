from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit_server.kernels import products
from lowbit_server.kernels.products import Grid, Product

pytestmark = pytest.mark.skipif(
    not products.are_there(), reason="this CPU has no products of bfloat16, or no compiler was here"
)
# What is left is float32's: the result is rounded to bfloat16 once.
ROUNDING = 2**-8
SUMMING = 1e-5
WIDE = 49


class Case:
    """A random weight of one kind, and what it stands for in float64."""

    def __init__(
        self, bits: int, blocks: int, columns: tuple[int, int], *, points: bool, bias: bool
    ) -> None:
        group, groups = columns
        generator = torch.Generator().manual_seed(blocks * group + bits)
        rows, total = blocks * products.ROWS, group * groups

        def below(least: int, most: int, *shape: int) -> torch.Tensor:
            return torch.randint(least, most, shape, generator=generator)

        self.bias = torch.randn(rows, generator=generator).bfloat16() if bias else None
        if bits == 16:
            weight = torch.randn(rows, total, generator=generator).bfloat16()
            self.product = Product(bits, (rows, total), weight, None, self.bias)
            self.exact = weight.double()
            return
        scales = torch.rand(groups, rows, generator=generator)
        added = below(-128, 129, groups, rows).to(torch.int16) if points else None
        meant = torch.randn(16, generator=generator).bfloat16() if bits == 4 else None
        if meant is None:
            codes = below(-128, 128, rows, total).to(torch.int8)
            values, packed = codes.double(), products.packed8(codes)
        else:
            codes = below(0, 16, rows, total).to(torch.uint8)
            values, packed = meant.double()[codes.int()], products.packed4(codes)
        grid = Grid(scales, added, meant)
        self.product = Product(bits, (rows, total), packed, grid, self.bias)
        if added is not None:
            values += added.double().repeat_interleave(group, 0).T
        self.exact = values * scales.double().repeat_interleave(group, 0).T

    def check(self, tokens: int) -> None:
        generator = torch.Generator().manual_seed(tokens)
        inputs = torch.randn(tokens, self.exact.shape[1], generator=generator).bfloat16()
        expected = inputs.double() @ self.exact.T
        terms = inputs.double().abs() @ self.exact.abs().T
        if self.bias is not None:
            expected = expected + self.bias.double()
        found = self.product.of(inputs)
        # Many tokens are multiplied by weights that are rounded once; with points, SUMMING is of
        # the larger numbers that these are differences of.
        summing = 2**-9 if tokens >= WIDE else SUMMING
        bound = ROUNDING * expected.abs() + summing * terms + SUMMING * 128 * terms.mean()
        assert bool(((found.double() - expected).abs() <= bound).all())


cases = st.builds(
    Case,
    bits=st.sampled_from([4, 8, 16]),
    blocks=st.integers(1, 11),
    # Tiles take groups of multiples of 32, and do 128 columns at once.
    columns=st.tuples(st.sampled_from([32, 64, 96, 160, 576]), st.integers(1, 3)),
    points=st.booleans(),
    bias=st.booleans(),
)


@settings(deadline=None)
@given(cases, st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 31, 32, 33, 49, 70, 96])))
def test_it_is_the_product_in_float64(case: Case, tokens: int) -> None:
    case.check(tokens)


@settings(deadline=None)
@given(bits=st.sampled_from([4, 8]), group=st.sampled_from([8, 24, 40]), tokens=st.integers(1, 20))
def test_groups_too_odd_for_tiles_are_vectors(bits: int, group: int, tokens: int) -> None:
    Case(bits, 3, (group, 4), points=True, bias=False).check(tokens)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("points", [False, True])
def test_unpacked_weights_are_rounded_once(bits: int, *, points: bool) -> None:
    case = Case(bits, 5, (64, 3), points=points, bias=False)
    found = case.product.unpacked()
    # The sum of code and point is exact or rounded to float32, then comes the scale.
    torch.testing.assert_close(found.T.double(), case.exact, rtol=2**-8, atol=1e-6)


@settings(deadline=None)
@given(cases, st.integers(2, 40))
def test_the_number_of_threads_changes_no_bit(case: Case, tokens: int) -> None:
    inputs = torch.randn(tokens, case.exact.shape[1]).bfloat16()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = case.product.of(inputs)
        torch.set_num_threads(3)
        assert torch.equal(case.product.of(inputs), alone)
    finally:
        torch.set_num_threads(threads)


def test_tiles_leave_those_of_torch_alone() -> None:
    """Both use the CPU's tiles, whose shapes are a state of the thread."""
    case = Case(4, 8, (64, 9), points=True, bias=False)
    inputs = torch.randn(16, 576).bfloat16()
    dense = torch.randn(576, 576).bfloat16()
    expected = inputs @ dense
    for _ in range(3):
        case.product.of(inputs)
        assert torch.equal(inputs @ dense, expected)


WITHOUT_TILES = """
import ctypes
import mmap

class Stack(ctypes.Structure):
    _fields_ = [("place", ctypes.c_void_p), ("flags", ctypes.c_int), ("bytes", ctypes.c_size_t)]

libc = ctypes.CDLL(None, use_errno=True)
small = mmap.mmap(-1, 8192)
place = ctypes.addressof(ctypes.c_char.from_buffer(small))
assert libc.sigaltstack(ctypes.byref(Stack(place, 0, len(small))), None) == 0

from tests.unit.kernels.test_products import Case

for bits in (4, 8, 16):
    for tokens in (1, 2, 3, 4, 7, 8, 20, 33):
        Case(bits, 7, (64, 2), points=True, bias=True).check(tokens)

allowed = ctypes.c_uint64(0)
libc.syscall(158, 0x1022, ctypes.byref(allowed))  # arch_prctl, ARCH_GET_XCOMP_PERM
assert not allowed.value >> 18 & 1
"""


def test_a_process_that_gets_no_tiles_does_without() -> None:
    """Linux refuses them where a signal's own stack is too small for their state."""
    subprocess.run([sys.executable, "-c", WITHOUT_TILES], check=True)
