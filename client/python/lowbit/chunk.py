"""A piece of generated text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one message of the server added to an output; `str(chunk)` is its text."""

    text: str
    """Text that follows what came before; whole characters, may be empty."""

    token_ids: tuple[int, ...] = ()
    """Ids of the tokens that made it, when `token_ids_output` asked for them."""

    output_index: int = 0
    """Which output it belongs to, from 0."""

    def __str__(self) -> str:
        """Return the text."""
        return self.text
