"""Drafts from the text itself: prompt lookup decoding (Saxena 2023)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

# Longest first: what follows three tokens is a better guess than what follows two.
_SIZES = (3, 2)


class PromptLookup:
    """What followed each short run of tokens when it was last seen."""

    def __init__(self, prompt: Sequence[int]) -> None:
        """Begin with a prompt."""
        self._tokens: list[int] = []
        self._places: dict[tuple[int, ...], int] = {}
        self._prompt_tokens = len(prompt)
        self._add(prompt)

    def follow(self, made: Sequence[int]) -> None:
        """Take all tokens that were made behind the prompt; earlier ones are known."""
        self._add(made[len(self._tokens) - self._prompt_tokens :])

    def draft(self, count: int) -> Sequence[int]:
        """Return up to `count` tokens that followed the latest tokens before; none: unknown."""
        for size in _SIZES:
            place = self._places.get(tuple(self._tokens[-size:]))
            if place is not None:
                return self._tokens[place : place + count]
        return ()

    def _add(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            place = len(self._tokens)
            for size in _SIZES:
                if place >= size:
                    self._places[tuple(self._tokens[-size:])] = place
            self._tokens.append(token)
