"""How much of a prompt a step reads beside running streams."""

from __future__ import annotations

from lowbit_server.models.decoder import CHUNK_TOKENS

LEAST_TOKENS = 16
"""Fewer hardly take less time: the weights are read all the same."""


_LIKE = 1.25


class Pacing:
    """Chooses chunks that take about as long as a decoding step.

    So a stream's tokens come at most at half their pace while a long prompt is read. Chunks
    halve when one took longer than the step before it, and double when it took less than
    half as long; no model of the machine is needed. Alone, a prompt is read in the largest
    chunks.
    """

    def __init__(self) -> None:
        """Begin with the largest chunks."""
        self._tokens = CHUNK_TOKENS
        self._step_s = 0.0
        self._step_rows = 0

    def step_s(self, rows: int) -> float | None:
        """Return about how long a step takes that only decodes so many rows, in seconds.

        None where none of nearly as many was seen, which it takes to know how long a chunk takes
        that is read in one pass with them.
        """
        return self._step_s if rows <= self._step_rows * _LIKE else None

    def chunk_tokens(self, *, beside_streams: bool) -> int:
        """Return how many tokens the next chunk may have."""
        return self._tokens if beside_streams else CHUNK_TOKENS

    def decoded(self, seconds: float, rows: int) -> None:
        """Note how long a step took that only decoded so many rows."""
        self._step_s, self._step_rows = seconds, rows

    def read(self, tokens: int, seconds: float) -> None:
        """Note how long a chunk took that was read beside streams."""
        if seconds > self._step_s:
            self._tokens = max(LEAST_TOKENS, min(tokens, self._tokens) // 2)
        elif 2 * seconds < self._step_s and tokens == self._tokens:
            self._tokens = min(CHUNK_TOKENS, 2 * self._tokens)
