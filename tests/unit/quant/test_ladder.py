"""The order in which scheme auto tries others, as a plain decision."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit_server.errors import LowbitError, Reason, invalid
from lowbit_server.quant.footprint import Size
from lowbit_server.quant.ladder import Candidate, Limits, candidates, check
from lowbit_server.quant.schemes import (
    AwqScheme,
    Bnb4BitScheme,
    GptqScheme,
    Int8Scheme,
    RtnScheme,
    Scheme,
    describe,
)

LAYERS = 6
WEIGHTS = 1000  # a layer
KEPT = 500


def bits(scheme: Scheme) -> int:
    match scheme:
        case Int8Scheme():
            return 8
        case GptqScheme() | RtnScheme():
            return scheme.bits
    return 4


def size(scheme: Scheme) -> Size:
    """As a device with kernels for every number of bits has it: 32 bits more a group."""
    own = {one.layer: one.bits for one in getattr(scheme, "layers", ())}
    total = sum(own.get(layer, bits(scheme)) for layer in range(LAYERS)) * WEIGHTS
    total += 32 * LAYERS * WEIGHTS // getattr(scheme, "group_size", 64)
    return Size(total // 8 + KEPT, total // 8 + KEPT)


def made(found: list[Candidate]) -> list[Scheme]:
    return [one.scheme for one in found if not one.refusal]


LOSSES = st.lists(st.floats(0, 10), min_size=LAYERS, max_size=LAYERS)
BUDGETS = st.integers(0, 9 * LAYERS * WEIGHTS // 8 + 2 * KEPT)


@given(BUDGETS, BUDGETS | st.none(), st.booleans(), LOSSES)
def test_nothing_that_is_made_exceeds_a_limit(
    live: int,
    disk: int | None,
    calibrated: bool,  # noqa: FBT001
    losses: list[float],
) -> None:
    limits = Limits(live, disk)
    given_losses = dict.fromkeys((2, 3, 4), losses) if calibrated else {}
    found = candidates(size, limits, calibrated=calibrated, losses=given_losses)
    for one in found:
        assert one.size == size(one.scheme)
        assert bool(one.refusal) == bool(limits.exceeded(size(one.scheme)))
    schemes = [one.scheme for one in found]
    assert len(set(schemes)) == len(schemes)
    assert found == candidates(size, limits, calibrated=calibrated, losses=given_losses)
    # All on one rung, the first that fits.
    assert len({bits(one) for one in made(found)}) <= 1
    names = {one.name for one in schemes}
    assert names <= ({"int8", "gptq", "awq", "nf4"} if calibrated else {"int8", "rtn", "nf4"})


@given(BUDGETS, BUDGETS, LOSSES)
def test_more_budget_never_gives_fewer_bits(one: int, other: int, losses: list[float]) -> None:
    small, large = sorted((one, other))
    rungs, kept = [], []
    for budget in (small, large):
        found = candidates(size, Limits(budget), calibrated=True, losses={4: losses})
        rungs.append(max((bits(scheme) for scheme in made(found)), default=0))
        mixed = [scheme for scheme in made(found) if getattr(scheme, "layers", ())]
        kept.append(max((len(scheme.layers) for scheme in mixed), default=0))  # type: ignore[union-attr]
    assert rungs[0] <= rungs[1]
    if rungs[0] == rungs[1]:
        assert kept[0] <= kept[1]


@given(BUDGETS, LOSSES)
def test_the_layers_that_lose_most_stay_at_8_bit(budget: int, losses: list[float]) -> None:
    found = candidates(size, Limits(budget), calibrated=True, losses={4: losses})
    mixed = [one for one in found if getattr(one.scheme, "layers", ())]
    assert len(mixed) <= 1
    for one in mixed:
        assert one is found[-1]
        assert isinstance(one.scheme, GptqScheme)
        kept = {layer.layer for layer in one.scheme.layers}
        assert 0 < len(kept) < LAYERS
        others = [losses[layer] for layer in range(LAYERS) if layer not in kept]
        assert min(losses[layer] for layer in kept) >= max(others)
        # One more would not fit, whatever its group size.
        more = [GptqScheme(group_size=128).model_copy(update={"layers": one.scheme.layers})]
        more[0] = GptqScheme.model_validate(
            {"group_size": 128, "layers": [{"layer": n, "bits": 8} for n in range(len(kept) + 1)]}
        )
        assert len(kept) + 1 == LAYERS or Limits(budget).exceeded(size(more[0]))


def test_each_method_takes_the_smallest_groups_that_fit() -> None:
    budget = size(GptqScheme(group_size=64)).live_bytes
    found = candidates(size, Limits(budget), calibrated=True, losses={})
    assert [describe(one.scheme) for one in found] == [
        "int8",
        *(f"gptq bits=8 group_size={group}" for group in (32, 64, 128)),
        *(f"gptq bits=4 group_size={group}" for group in (32, 64)),
        *(f"awq group_size={group}" for group in (32, 64)),
        "nf4",
    ]
    assert made(found) == [
        GptqScheme(),
        AwqScheme(),
        Bnb4BitScheme(quant_type="nf4"),
    ]


def test_what_was_measured_counts() -> None:
    """A copy that turns out larger than its estimate makes room for the next one."""
    tight = Limits(size(GptqScheme(bits=8, group_size=64)).live_bytes)

    def corrected(scheme: Scheme) -> Size:
        more = 1 if bits(scheme) == 8 and scheme != GptqScheme(bits=8, group_size=128) else 0
        return Size(size(scheme).live_bytes + more, 0)

    first = made(candidates(size, tight, calibrated=True, losses={}))
    assert first == [Int8Scheme(), GptqScheme(bits=8)]
    second = made(candidates(corrected, tight, calibrated=True, losses={}))
    assert second == [GptqScheme(bits=8, group_size=128)]


def test_a_layout_that_does_not_fit_is_told_with_its_reason() -> None:
    def narrow(scheme: Scheme) -> Size:
        if getattr(scheme, "group_size", 32) > 32:
            raise invalid("scheme", "columns in multiples")
        return size(scheme)

    small = size(GptqScheme(bits=3, group_size=32)).live_bytes
    found = candidates(narrow, Limits(small), calibrated=True, losses={})
    refused = {describe(one.scheme): one for one in found if one.size is None}
    assert "columns in multiples" in refused["gptq bits=4 group_size=64"].refusal
    assert made(found) == [GptqScheme(bits=3, group_size=32)]


def test_a_budget_below_everything_is_refused_with_what_is_possible() -> None:
    for limits, field, words in (
        (Limits(1), "scheme.auto.max_live_bytes", "gptq bits=2 group_size=128, takes"),
        (Limits(1 << 30, 1), "gate.max_bytes", "bytes on disk"),
    ):
        found = candidates(size, limits, calibrated=True, losses={})
        with pytest.raises(LowbitError, match=words) as caught:
            check(found, limits)
        assert [one.field for one in caught.value.violations] == [field]

    def never(scheme: Scheme) -> Size:
        raise invalid("scheme", f"no {scheme.name}")

    found = candidates(never, Limits(1), calibrated=False, losses={})
    with pytest.raises(LowbitError, match=r"no int8.*no nf4") as caught:
        check(found, Limits(1))
    assert caught.value.reason is Reason.SCHEME_UNAVAILABLE
    check(candidates(size, Limits(1 << 30), calibrated=False, losses={}), Limits(1 << 30))
