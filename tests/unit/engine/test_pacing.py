"""Chunks of prompts beside running streams take about as long as a step."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lowbit_server.engine.pacing import LEAST_TOKENS, Pacing
from lowbit_server.models.decoder import CHUNK_TOKENS

MILLISECONDS = st.floats(min_value=0.1, max_value=1000)
STEP_S = 0.016


def settled(pacing: Pacing, tokens: int) -> Pacing:
    """Let a step's time be enough for so many tokens."""
    pacing.step_s = STEP_S
    for _ in range(5):
        pacing.read(LEAST_TOKENS, STEP_S * LEAST_TOKENS / tokens)
    return pacing


@given(MILLISECONDS, MILLISECONDS, st.floats(min_value=0.001, max_value=10))
def test_chunks_settle_within_a_step_where_they_can(step: float, base: float, each: float) -> None:
    """A chunk of n tokens takes base + n * each here."""
    pacing = Pacing()
    sizes = []
    for _ in range(40):
        pacing.step_s = step / 1e3
        size = pacing.chunk_tokens(beside_streams=True)
        pacing.read(size, (base + size * each) / 1e3)
        sizes.append(size)
    assert set(sizes) <= {*range(LEAST_TOKENS, CHUNK_TOKENS + 1, LEAST_TOKENS)}
    last = sizes[20:]
    if base + LEAST_TOKENS * each <= step:
        assert all(base + size * each <= step * (1 + 1e-9) for size in last)
    else:
        assert last == [LEAST_TOKENS] * len(last)
    # A token's share of `base` is less in larger chunks: they grow or shrink, but not by turns.
    assert sizes in (sorted(sizes), sorted(sizes, reverse=True))
    if 2 * base + CHUNK_TOKENS * each <= step:
        assert sizes[-1] == CHUNK_TOKENS


def test_a_prompt_alone_is_read_in_the_largest_chunks() -> None:
    pacing = settled(Pacing(), 64)
    assert pacing.chunk_tokens(beside_streams=True) == 64
    assert pacing.chunk_tokens(beside_streams=False) == CHUNK_TOKENS


def test_the_rest_of_a_prompt_says_little_of_larger_chunks() -> None:
    pacing = settled(Pacing(), 64)
    for _ in range(5):
        pacing.read(3, STEP_S)
    assert pacing.chunk_tokens(beside_streams=True) == 64


def test_chunks_that_were_interrupted_change_nothing() -> None:
    pacing = settled(Pacing(), 128)
    for _ in range(2):
        pacing.read(128, 100 * STEP_S)
    assert pacing.chunk_tokens(beside_streams=True) == 128


def test_chunks_shrink_when_they_take_longer() -> None:
    pacing = settled(Pacing(), 128)
    for _ in range(3):
        pacing.read(128, 4 * STEP_S)
    assert pacing.chunk_tokens(beside_streams=True) == 32


def test_a_chunk_that_took_no_time_may_be_followed_by_the_largest() -> None:
    pacing = Pacing()
    pacing.step_s = STEP_S
    pacing.read(LEAST_TOKENS, -0.001)  # the step before was a slow one
    assert pacing.chunk_tokens(beside_streams=True) == CHUNK_TOKENS
