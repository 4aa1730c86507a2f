"""How much of prompts is read beside running streams, and before their next tokens."""

from __future__ import annotations

from collections import deque
from statistics import median

from lowbit_server.models.decoder import CHUNK_TOKENS

LEAST_TOKENS = 16
"""Fewer hardly take less time: the weights are read all the same."""

_FIRST_TOKENS = 64
_REMEMBERED = 5


class Pacing:
    """Chooses chunks that take about as long as a decoding step.

    So a stream's tokens come at most at half their pace while a long prompt is read. What a
    token takes is the median of the last chunks: no model of the machine is needed, and one
    that the system interrupted changes nothing. Alone, a prompt is read in the largest chunks.
    """

    def __init__(self) -> None:
        """Begin with small chunks."""
        self._token_s: deque[float] = deque(maxlen=_REMEMBERED)
        self.step_s = 0.0
        """How long the last step took that only decoded; to be set after each, 0 before."""
        self.interrupted = False
        """Whether a pass of the streams was interrupted since they last got tokens."""
        self._read_first = 0

    def chunk_tokens(self, *, beside_streams: bool) -> int:
        """Return how many tokens the next chunk may have."""
        if not beside_streams:
            return CHUNK_TOKENS
        if not self._token_s:
            return _FIRST_TOKENS
        token_s = median(self._token_s)
        if token_s * CHUNK_TOKENS <= self.step_s:
            return CHUNK_TOKENS
        return max(LEAST_TOKENS, int(self.step_s / token_s) // LEAST_TOKENS * LEAST_TOKENS)

    @property
    def tokens_first(self) -> int:
        """How many tokens of prompts may be read before the streams' next ones: two chunks."""
        return 2 * self.chunk_tokens(beside_streams=True) - self._read_first

    def read_first(self, tokens: int) -> None:
        """Note what was read before the streams' next tokens."""
        self._read_first += tokens

    def streams_got_tokens(self) -> None:
        """Begin to count anew."""
        self._read_first, self.interrupted = 0, False

    def read(self, tokens: int, seconds: float) -> None:
        """Note how long a chunk took that was read beside streams."""
        if tokens >= LEAST_TOKENS:
            self._token_s.append(seconds / tokens)
