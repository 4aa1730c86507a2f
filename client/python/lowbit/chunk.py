"""A piece of generated text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowbit.v1.generation_pb2 import Delta


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one message of the server added to an output; `str(chunk)` is its text."""

    text: str
    """Text that follows what came before; whole characters, may be empty."""

    token_ids: tuple[int, ...] = ()
    """Ids of the tokens that made it, when `token_ids_output` asked for them."""

    output_index: int = 0
    """Which output it belongs to, from 0."""

    logprobs: tuple[float | None, ...] = ()
    """Natural log-probability of each token, when `logprobs` asked for them; None for a prompt's
    first token, which `echo` shows."""

    top_logprobs: tuple[dict[int, float], ...] = ()
    """The likeliest tokens at each position and their log-probabilities, likeliest first."""

    def __str__(self) -> str:
        """Return the text."""
        return self.text


def chunk(delta: Delta) -> Chunk:
    """Return what a Delta says."""
    tokens = delta.tokens
    if not tokens:
        return Chunk(delta.text, (), delta.output_index)
    ids = tuple([token.id for token in tokens])
    if not tokens[-1].HasField("logprob"):
        return Chunk(delta.text, ids, delta.output_index)
    return Chunk(
        delta.text,
        ids,
        delta.output_index,
        tuple(token.logprob if token.HasField("logprob") else None for token in tokens),
        tuple({one.token_id: one.logprob for one in token.top} for token in tokens),
    )
