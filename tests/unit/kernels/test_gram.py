from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lowbit_server import kernels
from lowbit_server.kernels.gram import add_gram
from lowbit_server.quant.statistics import Gram

CPU = Path("/proc/cpuinfo")
HAS_KERNEL = shutil.which("cc") and CPU.exists() and "avx512_bf16" in CPU.read_text()


def inputs_of(tokens: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, columns, generator=generator).to(torch.bfloat16)


@pytest.fixture(params=["kernel", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(kernels, "library", lambda: None)
    elif not HAS_KERNEL:
        pytest.skip("needs cc and a CPU that multiplies bfloat16")
    return request.param


def check(parts: list[torch.Tensor]) -> None:
    """Compare with float64; float32 adds at most one rounding error a token."""
    gram = Gram(magnitudes=True)
    for part in parts:
        gram.add(part)
    whole = torch.cat(parts).double()
    epsilon = torch.finfo(torch.float32).eps
    bound = epsilon * (whole.abs().T @ whole.abs())
    mean = gram.mean()
    assert mean.dtype == torch.float32
    assert torch.equal(mean, mean.T)
    assert ((mean.double() - whole.T @ whole / len(whole)).abs() <= bound).all()
    expected = whole.abs().mean(dim=0)
    assert ((gram.magnitude().double() - expected).abs() <= epsilon * len(whole) * expected).all()


@pytest.mark.usefixtures("path")
def test_sums_are_those_of_float64() -> None:
    # hypothesis runs within one setting of the fixture
    @given(
        tokens=st.integers(1, 450),
        more=st.integers(1, 9),
        columns=st.integers(1, 150),
        seed=st.integers(0, 2**31),
    )
    @example(tokens=384, more=1, columns=96, seed=0)  # whole tiles
    @example(tokens=193, more=2, columns=97, seed=0)  # one token and one column too many
    @example(tokens=1, more=1, columns=1, seed=0)
    @settings(deadline=None, max_examples=60)
    def holds(tokens: int, more: int, columns: int, seed: int) -> None:
        check([inputs_of(tokens, columns, seed), inputs_of(more, columns, seed + 1)])

    holds()


@pytest.mark.usefixtures("path")
def test_inputs_may_be_cut_out_of_others_and_in_float32() -> None:
    wide = inputs_of(64, 200).view(4, 16, 200)
    check([wide[:, 3:9, 20:90].reshape(-1, 70)])
    check([inputs_of(64, 70).float()])
    gram = Gram(magnitudes=False)
    gram.add(wide[..., 20:90])
    whole = wide[..., 20:90].reshape(-1, 70).double()
    torch.testing.assert_close(gram.mean().double(), whole.T @ whole / 64, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not HAS_KERNEL, reason="needs cc and a CPU that multiplies bfloat16")
def test_the_number_of_threads_changes_no_bit() -> None:
    inputs = inputs_of(1000, 577)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            sums = torch.zeros(577, 577)
            assert add_gram(inputs, sums)
            found.append(sums.triu())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.usefixtures("path")
def test_what_is_not_finite_shows(value: float) -> None:
    inputs = inputs_of(5, 60)
    inputs[3, 7] = value
    gram = Gram(magnitudes=False)
    gram.add(inputs)
    finite = gram.mean().isfinite()
    assert not finite[7].any()
    finite[7] = finite[:, 7] = True
    assert finite.all()


@pytest.mark.skipif(not HAS_KERNEL, reason="needs cc and a CPU that multiplies bfloat16")
def test_its_threads_are_those_of_torch() -> None:
    code = """
import torch
from pathlib import Path
from lowbit_server.kernels.gram import add_gram
torch.set_num_threads(3)
x = torch.ones(2000, 400)
x @ x.T  # starts torch's threads
before = len(list(Path("/proc/self/task").iterdir()))
assert add_gram(x.bfloat16(), torch.zeros(400, 400))
assert len(list(Path("/proc/self/task").iterdir())) == before
lines = Path("/proc/self/maps").read_text().splitlines()
print(len({line.split()[-1] for line in lines if "omp" in line.rpartition("/")[2]}))
"""
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert made.stdout == "1\n", made.stderr
