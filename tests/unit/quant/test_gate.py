from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.jobs.spec import GateSpec
from lowbit_server.quant import gate
from lowbit_server.quant.quality import Quality

BYTES = 1000


def quality(**values: float) -> Quality:
    measured = {"perplexity": 12.0, "base_perplexity": 10.0, "mean_kl": 0.2, "top1_agreement": 0.8}
    return Quality(text_digest="0", tokens=10, **(measured | values))


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"max_perplexity_increase": 0.2001, "max_mean_kl": 0.2, "min_top1_agreement": 0.8},
        {"max_bytes": BYTES},
    ],
)
def test_what_keeps_every_limit_passes(limits: dict[str, float]) -> None:
    gate.check(GateSpec(**limits), quality(), BYTES)


def test_every_missed_limit_is_named_with_what_was_measured() -> None:
    limits = GateSpec(
        max_perplexity_increase=0.1, max_mean_kl=0.1, min_top1_agreement=0.9, max_bytes=999
    )
    with pytest.raises(LowbitError) as caught:
        gate.check(limits, quality(), BYTES)
    assert caught.value.reason is Reason.QUALITY_GATE_FAILED
    assert caught.value.message == (
        "max_perplexity_increase 0.1: measured 0.2; max_mean_kl 0.1: measured 0.2; "
        "min_top1_agreement 0.9: measured 0.8; max_bytes 999: measured 1000"
    )


@pytest.mark.parametrize("measured", [None, quality(mean_kl=math.nan)])
def test_what_was_not_measured_keeps_no_limit(measured: Quality | None) -> None:
    with pytest.raises(LowbitError):
        gate.check(GateSpec(max_mean_kl=1000), measured, BYTES)


@given(st.floats(0, 10), st.floats(0, 10), st.floats(0, 1), st.floats(0, 1))
def test_it_is_the_comparison(limit: float, found: float, least: float, agreed: float) -> None:
    limits = GateSpec(max_mean_kl=limit, min_top1_agreement=least)
    keeps = found <= limit and agreed >= least
    try:
        gate.check(limits, quality(mean_kl=found, top1_agreement=agreed), BYTES)
    except LowbitError:
        assert not keeps
    else:
        assert keeps
