"""Grids of whole numbers over groups of weights, as the GPTQ and AWQ layouts store them.

Imports torch: for job processes only.
"""

from __future__ import annotations

import torch

from lowbit_server.errors import invalid

# Grids that are tried for each group, and how far the last one is drawn in.
_GRIDS = 8
_DRAWN_IN = 0.5


def grid(parts: torch.Tensor, bits: int, *, sym: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales fp16 and zero points int32 (groups, out) of weights (groups, size, out).

    The grid reaches to half a step of every weight.
    """
    return between(parts.amin(dim=1), parts.amax(dim=1), bits, sym=sym)


def between(
    low: torch.Tensor, high: torch.Tensor, bits: int, *, sym: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales fp16 and zero points int32 of grids from `low` to `high`, all (groups, out).

    Zero is on every grid, and its ends are no further than half a step within. Scales round
    up for that, as one that rounds down would leave the outermost weights outside. Zero
    points begin at 1 (see `PackedLinear.of`), so the scale also spans from zero to the
    largest weight without the grid's lowest point.
    """
    last = 2**bits - 1
    low, high = low.clamp(max=0), high.clamp(min=0)
    if sym:
        high = torch.maximum(high, -low)
        low = -high
    # Without the sign of a negative zero, from whose bits the next one would be negative.
    wanted = torch.maximum((high - low) / last, high / (last - 0.5)).abs()
    scales = wanted.to(torch.float16)
    # The next fp16 is the next integer in its bits. A group of zeros gets a step, too.
    above = (scales.view(torch.int16) + 1).view(torch.float16)
    scales = torch.where((scales.float() < wanted) | (scales == 0), above, scales)
    if sym:
        zeros = torch.full_like(scales, 2 ** (bits - 1), dtype=torch.int32)
    else:
        zeros = (-low / scales.float()).round().clamp(1, last).to(torch.int32)
    return scales, zeros


def fitted(
    parts: torch.Tensor, importance: torch.Tensor, bits: int, *, sym: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales fp16 and zero points int32 (groups, out) of weights (groups, size, out).

    Of grids drawn in by up to `_DRAWN_IN` at both ends, each group and row gets that whose
    rounding errors, squared and weighted by `importance` (groups, size, 1), are least: a
    large weight is cut off where that serves the others. Without calibration all weights are
    as important, and the full `grid` is the safe choice.
    """
    low, high = parts.amin(dim=1), parts.amax(dim=1)
    found = between(low, high, bits, sym=sym)
    least = _loss(parts, importance, *found, bits)
    for step in range(1, _GRIDS):
        kept = 1 - _DRAWN_IN * step / (_GRIDS - 1)
        drawn = between(low * kept, high * kept, bits, sym=sym)
        loss = _loss(parts, importance, *drawn, bits)
        better = loss < least
        least = torch.where(better, loss, least)
        scales, zeros = (torch.where(better, *pair) for pair in zip(drawn, found, strict=True))
        found = scales, zeros
    return found


def _loss(
    parts: torch.Tensor,
    importance: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bits: int,
) -> torch.Tensor:
    """Return the weighted squared rounding errors of grids, (groups, out)."""
    steps = nearest(parts, scales, zeros, bits).to(torch.int32) - zeros[:, None]
    errors = (steps * scales.float()[:, None]).sub_(parts)
    return errors.square_().mul_(importance).sum(dim=1)


def nearest(
    parts: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int
) -> torch.Tensor:
    """Return the codes uint8 (groups, size, out) of the grid points nearest to weights."""
    steps = (parts / scales.float()[:, None]).round() + zeros[:, None]
    return steps.clamp(0, 2**bits - 1).to(torch.uint8)


def check_finite(name: str, scales: torch.Tensor) -> None:
    """Raise INVALID_FIELD that names a weight whose grid fp16 cannot hold."""
    if not bool(scales.isfinite().all()):
        raise invalid(
            "scheme", f"tensor {name} has infinities, no numbers or steps beyond fp16's 65504"
        )
