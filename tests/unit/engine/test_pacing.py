"""Chunks of prompts beside running streams take about as long as a step."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lowbit_server.engine.pacing import LEAST_TOKENS, Pacing
from lowbit_server.models.decoder import CHUNK_TOKENS

MILLISECONDS = st.floats(min_value=0.1, max_value=1000)


@given(MILLISECONDS, MILLISECONDS, st.floats(min_value=0.001, max_value=10))
def test_chunks_settle_within_a_step_where_they_can(step: float, base: float, each: float) -> None:
    """A chunk of n tokens takes base + n * each here."""
    pacing = Pacing()
    sizes = []
    for _ in range(40):
        pacing.decoded(step / 1e3, 1)
        size = pacing.chunk_tokens(beside_streams=True)
        pacing.read(size, (base + size * each) / 1e3)
        sizes.append(size)
    assert set(sizes) <= {2**n for n in range(4, 10)}
    assert min(sizes) >= LEAST_TOKENS
    settled = sizes[10:]
    if base + LEAST_TOKENS * each <= step:
        # At most one chunk in two, tried when the last took less than half of a step.
        assert all(base + size * each <= 2 * step for size in settled)
    else:
        assert settled == [LEAST_TOKENS] * len(settled)
    if base + CHUNK_TOKENS * each <= step:
        assert set(sizes) == {CHUNK_TOKENS}


def test_a_prompt_alone_is_read_in_the_largest_chunks() -> None:
    pacing = Pacing()
    pacing.decoded(0.01, 1)
    pacing.read(CHUNK_TOKENS, 1.0)
    assert pacing.chunk_tokens(beside_streams=True) == CHUNK_TOKENS // 2
    assert pacing.chunk_tokens(beside_streams=False) == CHUNK_TOKENS


def test_the_rest_of_a_prompt_says_little_of_larger_chunks() -> None:
    pacing = Pacing()
    pacing.decoded(0.01, 1)
    for _ in range(3):
        pacing.read(CHUNK_TOKENS, 1.0)
    size = pacing.chunk_tokens(beside_streams=True)
    pacing.read(3, 0.001)
    assert pacing.chunk_tokens(beside_streams=True) == size


def test_steps_of_far_fewer_rows_say_nothing_of_a_larger_one() -> None:
    pacing = Pacing()
    assert pacing.step_s(1) is None
    pacing.decoded(0.01, 8)
    assert pacing.step_s(10) == 0.01
    assert pacing.step_s(11) is None
