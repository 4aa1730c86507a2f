"""GPTQ against a plain float64 transcription of its derivation, and its own promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.quant.gptq import inverse_factor, quantize
from lowbit_server.quant.grids import fitted, grid, nearest
from lowbit_server.quant.schemes import GptqScheme

SCHEMES = [
    GptqScheme(bits=bits, group_size=size, desc_act=ordered, sym=sym)
    for bits, size, ordered, sym in [
        (2, 32, True, False),
        (3, 64, False, False),
        (4, 64, True, False),
        (4, 32, True, True),
        (4, 128, False, False),
        (8, -1, True, False),
        (4, -1, False, True),
    ]
]


def inputs(columns: int, tokens: int = 600, seed: int = 0) -> torch.Tensor:
    """Return inputs that depend on each other, some much louder than others."""
    random = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, columns, generator=random) @ (
        torch.randn(columns, columns, generator=random) / columns**0.5
    )
    return mixed * torch.rand(columns, generator=random).pow(3).add(0.05)


def values(codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the weight (out, in) that codes stand for, float64."""
    group = torch.arange(len(codes)) // (len(codes) // len(scales))
    return ((codes.double() - zeros[group]) * scales.double()[group]).T


def by_elimination(weight: torch.Tensor, gram: torch.Tensor, scheme: GptqScheme) -> torch.Tensor:
    """Return codes by the paper's steps 2 and 3 without its tricks, in float64.

    After each column, the inverse loses its row and column by Gaussian elimination, and
    all later columns move at once; no Cholesky factor, no blocks.
    """
    columns = weight.shape[1]
    size = columns if scheme.group_size == -1 else scheme.group_size
    work = weight.double().clone()
    gram = gram.double()
    loudness = gram.diagonal() + scheme.damp * gram.diagonal().mean()
    importance = loudness.float().reshape(-1, size, 1)
    scales, zeros = fitted(
        weight.float().T.reshape(-1, size, len(weight)), importance, scheme.bits, sym=scheme.sym
    )
    gram = gram + torch.eye(columns) * scheme.damp * gram.diagonal().mean()
    inverse = torch.linalg.inv(gram)
    order = list(range(columns))
    if scheme.desc_act:
        order.sort(key=lambda column: -float(gram[column, column]))
    codes = torch.empty(columns, len(weight), dtype=torch.uint8)
    for column in order:
        group = column // size
        if not scheme.desc_act and column % size == 0:
            part = work[:, column : column + size].T[None].float()
            laid = fitted(part, importance[group, None], scheme.bits, sym=scheme.sym)
            scales[group], zeros[group] = (one[0] for one in laid)
        step, zero = scales[group].double(), zeros[group]
        code = ((work[:, column] / step).round() + zero).clamp(0, 2**scheme.bits - 1)
        codes[column] = code.to(torch.uint8)
        error = (work[:, column] - (code - zero) * step) / inverse[column, column]
        work -= torch.outer(error, inverse[column])
        inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        work[:, column] = 0
    return codes


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_it_rounds_as_elimination_in_float64_does(scheme: GptqScheme) -> None:
    # More columns than one block, and a block that is not full.
    weight, rows = torch.randn(48, 384 - 64 if scheme.group_size != 128 else 384), inputs
    gram = rows(weight.shape[1]).T @ rows(weight.shape[1]) / 600
    codes, zeros, scales, lost = quantize(weight, gram, scheme.bits, scheme)
    expected = by_elimination(weight, gram, scheme)
    # Weights that lie between two grid points may fall to either side in float32, and move
    # what follows them a little.
    assert float((codes != expected).double().mean()) < 0.01
    assert int((codes.int() - expected.int()).abs().max()) <= 1
    change = values(codes, zeros, scales) - weight.double()
    noise = scheme.damp * gram.double().diagonal().mean()
    damped = gram.double() + torch.eye(len(gram)) * noise
    assert lost == pytest.approx(float(((change @ damped) * change).sum()), rel=1e-3)


@given(
    seed=st.integers(0, 1000),
    scheme=st.sampled_from(SCHEMES),
)
@settings(max_examples=25, deadline=None)
def test_its_output_error_is_below_that_of_nearest_rounding(seed: int, scheme: GptqScheme) -> None:
    rows = inputs(128, seed=seed)
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(seed))
    gram = rows.T @ rows / len(rows)
    size = 128 if scheme.group_size == -1 else scheme.group_size
    parts = weight.T.reshape(-1, size, 32)
    scales, zeros = grid(parts, scheme.bits, sym=scheme.sym)
    plain = values(nearest(parts, scales, zeros, scheme.bits).reshape(128, 32), zeros, scales)
    ours = values(*quantize(weight, gram, scheme.bits, scheme)[:3])

    def error(rounded: torch.Tensor) -> float:
        return float(((rows.double() @ (rounded - weight.double()).T) ** 2).sum())

    assert error(ours) < error(plain)


@given(seed=st.integers(0, 1000), bits=st.sampled_from([2, 3, 4, 8]), sym=st.booleans())
@settings(max_examples=30, deadline=None)
def test_fitted_grids_lose_no_more_than_full_ones(seed: int, bits: int, *, sym: bool) -> None:
    random = torch.Generator().manual_seed(seed)
    parts = torch.randn(3, 32, 8, generator=random)
    importance = torch.rand(3, 32, 1, generator=random)

    def losses(scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        codes = nearest(parts, scales, zeros, bits).double()
        rounded = (codes - zeros[:, None]) * scales.double()[:, None]
        return ((rounded - parts.double()) ** 2 * importance.double()).sum(1)

    fit, full = (
        losses(*fitted(parts, importance, bits, sym=sym)),
        losses(*grid(parts, bits, sym=sym)),
    )
    assert bool((fit <= full * (1 + 1e-5)).all())
    if bits < 8:
        assert float(fit.sum()) < float(full.sum())


def test_factor_is_that_of_the_damped_inverse() -> None:
    gram = inputs(96).T @ inputs(96)
    factor = inverse_factor(gram, 0.01).double()
    assert torch.equal(factor, factor.triu())
    damped = gram.double() + torch.eye(96) * 0.01 * gram.double().diagonal().mean()
    unit = damped @ (factor.T @ factor)
    assert (unit - torch.eye(96)).abs().max() < 1e-4


def test_inputs_that_are_never_seen_round_to_nearest() -> None:
    rows = inputs(64)
    rows[:, 5] = 0
    weight = torch.randn(32, 64)
    scheme = GptqScheme()
    codes, zeros, scales, _ = quantize(weight, rows.T @ rows, 4, scheme)
    assert torch.equal(codes[5], nearest(weight.T[None], scales, zeros, 4)[0, 5])


def test_a_singular_gram_is_damped_until_it_can_be_factored() -> None:
    row = torch.randn(1, 64) * 1e3
    factor = inverse_factor(row.T @ row, 1e-9)
    assert bool(factor.isfinite().all())


def test_activations_that_overflow_are_refused() -> None:
    with pytest.raises(LowbitError) as caught:
        inverse_factor(torch.full((32, 32), torch.inf), 0.01)
    assert caught.value.reason is Reason.SOURCE_CORRUPT
