"""Drafts from the text itself: prompt lookup decoding (Saxena 2023)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowbit_server.models.decoder import BLOCK_TOKENS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lowbit_server.engine.residents import Residents
    from lowbit_server.engine.rows import Row

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


def draft(row: Row, residents: Residents) -> Sequence[int]:
    """Return what may follow a row, as far as there is room for it, which it gets."""
    running, request = row.running, row.request
    if request.deterministic or not request.prompt_lookup_tokens:
        return ()
    if running.lookup is None:
        running.lookup = PromptLookup(request.prompt)
    running.lookup.follow(running.tokens)
    room = (len(row.blocks) + residents.kv.available) * BLOCK_TOKENS
    left = min(running.context_tokens, room, len(request.prompt) + request.max_tokens)
    # Of what is left the step makes one token without a draft.
    count = min(request.prompt_lookup_tokens, left - row.known - 1)
    found = running.lookup.draft(max(count, 0))
    residents.grow(row, row.known + len(found))
    return found
