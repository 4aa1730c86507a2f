"""Which schemes are tried for a budget, in which order. Plain decisions, no torch.

The ladder begins with 8 bit and ends at the first rung that fits: fewer bits lose more, so
nobody goes below what the budget demands. On that rung each method is tried with the
smallest groups that fit. Where all of them miss the gate, GPTQ keeps the decoder layers
that suffer most at 8 bit, as many as the budget allows.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lowbit_server.errors import LowbitError, Reason, invalid
from lowbit_server.quant.schemes import (
    AwqScheme,
    Bnb4BitScheme,
    GptqScheme,
    Int8Scheme,
    LayerBits,
    RtnScheme,
    describe,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lowbit_server.quant.footprint import Size
    from lowbit_server.quant.schemes import Scheme

# Smaller groups lose less and take more.
_GROUPS: tuple[Literal[32, 64, 128], ...] = (32, 64, 128)
_TOP_BITS = 8


@dataclass(frozen=True, slots=True)
class Limits:
    """What a copy may take, bytes; None is no limit."""

    live_bytes: int
    disk_bytes: int | None = None

    def exceeded(self, size: Size) -> str:
        """Return which limit a size exceeds, empty where none."""
        if size.live_bytes > self.live_bytes:
            return f"{size.live_bytes} bytes live exceed the budget of {self.live_bytes}"
        if self.disk_bytes is not None and size.disk_bytes > self.disk_bytes:
            return f"{size.disk_bytes} bytes on disk exceed the limit of {self.disk_bytes}"
        return ""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A scheme that might be chosen."""

    scheme: Scheme
    size: Size | None
    """None where the model cannot be made."""
    refusal: str = ""
    """Why it is not worth making; empty where it is."""


def candidates(
    size: Callable[[Scheme], Size],
    limits: Limits,
    *,
    calibrated: bool,
    losses: Mapping[int, Sequence[float]],
) -> list[Candidate]:
    """Return what is tried, in order, with what is refused on the way there.

    `size` tells what a copy takes, or raises LowbitError where it cannot be made. With
    `calibrated`, the methods that follow the activations apply. `losses` holds, by bits,
    how much each decoder layer lost where that was measured; GPTQ then mixes bits.
    """
    found: list[Candidate] = []
    for bits, methods in _rungs(calibrated=calibrated):
        fitting = []
        for variants in methods:
            for scheme in variants:
                found.append(_weighed(scheme, size, limits))
                if not found[-1].refusal:
                    fitting.append(found[-1])
                    break
        if fitting:
            if bits < _TOP_BITS and bits in losses:
                mixed = _mixed(bits, losses[bits], lambda one: _weighed(one, size, limits))
                found += [mixed] if mixed else []
            break
    return found


def check(found: Sequence[Candidate], limits: Limits) -> None:
    """Raise INVALID_FIELD that says what is possible when no candidate is worth making."""
    if not all(one.refusal for one in found):
        return
    sizes = [(one.size, one.scheme) for one in found if one.size is not None]
    if not sizes:
        raise LowbitError(Reason.SCHEME_UNAVAILABLE, "; ".join(one.refusal for one in found))
    live_bytes, smallest = min((size.live_bytes, describe(scheme)) for size, scheme in sizes)
    if live_bytes > limits.live_bytes:
        what = f"the smallest copy, {smallest}, takes {live_bytes} bytes live"
        raise invalid("scheme.auto.max_live_bytes", what)
    disk_bytes = min(size.disk_bytes for size, _ in sizes if size.live_bytes <= limits.live_bytes)
    what = f"the smallest copy within the budget takes {disk_bytes} bytes on disk"
    raise invalid("gate.max_bytes", what)


def _rungs(*, calibrated: bool) -> list[tuple[int, list[Sequence[Scheme]]]]:
    """Return bits, and on each rung the variants of each method by falling size."""

    def rounded(bits: Literal[2, 3, 4, 8]) -> Sequence[Scheme]:
        kind = GptqScheme if calibrated else RtnScheme
        return [kind(bits=bits, group_size=size) for size in _GROUPS]

    awq = [[AwqScheme(group_size=size) for size in _GROUPS]] if calibrated else []
    return [
        (8, [[Int8Scheme()], rounded(8)]),
        (4, [rounded(4), *awq, [Bnb4BitScheme(quant_type="nf4")]]),
        (3, [rounded(3)]),
        (2, [rounded(2)]),
    ]


def _weighed(scheme: Scheme, size: Callable[[Scheme], Size], limits: Limits) -> Candidate:
    try:
        found = size(scheme)
    except LowbitError as error:
        return Candidate(scheme, None, error.message)
    return Candidate(scheme, found, limits.exceeded(found))


def _mixed(
    bits: int, losses: Sequence[float], weigh: Callable[[Scheme], Candidate]
) -> Candidate | None:
    """Return GPTQ with as many layers at 8 bit as fit, those that lost most; None if none do."""
    order = sorted(range(len(losses)), key=lambda layer: -losses[layer])
    best, most = None, 0
    for group_size in _GROUPS:

        def keeping(count: int, group_size: Literal[32, 64, 128] = group_size) -> Candidate:
            layers = tuple(LayerBits(layer=one, bits=8) for one in sorted(order[:count]))
            scheme = GptqScheme.model_validate(
                {"bits": bits, "group_size": group_size, "layers": layers}
            )
            return weigh(scheme)

        counts = range(1, len(order))
        count = bisect_left(counts, x=True, key=lambda count: bool(keeping(count).refusal))
        if count > most:
            best, most = keeping(count), count
    return best
